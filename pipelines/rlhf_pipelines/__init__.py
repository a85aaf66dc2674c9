"""The pipeline and the ways to start it; kfp, never torch.

``from rlhf_pipelines import ppo_pipeline`` is the pipeline for ``kfp.Client().create_run_from_pipeline_func``, and the
names of the steps are the components for pipelines of your own::

    from kfp import dsl
    from rlhf_pipelines import prepare_dataset, snapshot_reference

    @dsl.pipeline
    def prompts_only(model_name: str, query_dataset: str) -> None:
        snapshot = snapshot_reference(model_name=model_name, model_revision="", model_digest="")
        prepare_dataset(
            tokenizer=snapshot.outputs["tokenizer"], tokenizer_digest=snapshot.outputs["Output"], data_digest="",
            query_dataset=query_dataset,
        )

KFP's cache knows a source by its name, revision and digest: give commits, as validate_config does, or switch it off.
"""

import pkgutil
from typing import Any

_PLACES = {
    "conclude_run": "rlhf_ppo.run_conclusion.component:conclude_run",
    "detect_changes": "rlhf_ppo.change_detection.component:detect_changes",
    "evaluate_policy": "rlhf_ppo.policy_evaluation.component:evaluate_policy",
    "gate": "rlhf_ppo.policy_evaluation.component:gate",
    "ppo_pipeline": "rlhf_pipelines.ppo:ppo",
    "prepare_dataset": "rlhf_ppo.dataset_preparation.component:prepare_dataset",
    "push_to_hub": "rlhf_ppo.hub_push.component:push_to_hub",
    "snapshot_reference": "rlhf_ppo.reference_snapshot.component:snapshot_reference",
    "train_ppo": "rlhf_ppo.ppo_training.component:train_ppo",
    "validate_config": "rlhf_ppo.config_validation.component:validate_config",
}
__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    """What is imported by its name, when it is: kfp takes seconds, which the command line need not wait for."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return pkgutil.resolve_name(_PLACES[name])
