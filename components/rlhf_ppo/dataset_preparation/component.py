"""The KFP interface of the step that makes prompts of a dataset."""

from kfp import dsl

from rlhf_ppo.descriptions import documented
from rlhf_ppo.images import CPU_IMAGE


@dsl.component(base_image=CPU_IMAGE, install_kfp_package=False)
@documented
def prepare_dataset(
    tokenizer: dsl.Input[dsl.Artifact],
    prompts: dsl.Output[dsl.Dataset],
    tokenizer_digest: str,
    data_digest: str,
    # parameters: begin (written by python -m rlhf_pipelines.generate)
    query_dataset: str = "",
    remove_unused_columns: bool = True,
    rollout_max_new_tokens: int = 64,
    data_revision: str = "",
    data_config: str = "",
    data_split: str = "train",
    data_prompt_column: str = "prompt",
    data_chat_template: bool = False,
    data_system_prompt: str = "",
    data_max_prompt_tokens: int = 512,
    data_eval_fraction: float = 0.1,
    data_max_prompts: int = 0,
    # parameters: end
) -> None:
    """Make tokenised, filtered, deduplicated prompts for training and validation, with a manifest.

    Args:
        tokenizer_digest: Digest of the snapshot that the tokenizer belongs to; only there to be part of the cache key,
            which knows artifacts by name, not by content.
        data_digest: What query_dataset held when it was validated; only there to be part of the cache key.
    """
    given = dict(locals())
    from pathlib import Path

    from rlhf_ppo.steps import running_step

    with running_step("prepare_dataset"):
        from rlhf_ppo.dataset_preparation import prepare
        from rlhf_ppo.fields import parameters_of
        from rlhf_ppo.settings import DataSettings

        manifest = prepare.prepare_dataset(
            query_dataset=query_dataset,
            data=DataSettings(**{parameter.name: given[parameter.name] for parameter in parameters_of(DataSettings)}),
            remove_unused_columns=remove_unused_columns,
            max_new_tokens=rollout_max_new_tokens,
            tokenizer=Path(tokenizer.path),
            prompts=Path(prompts.path),
        )
        names = ("source", "revision", "digest", "train", "validation")
        prompts.metadata.update({name: manifest[name] for name in names if manifest.get(name)})
