"""The KFP interface of the step that trains."""

from kfp import dsl

from rlhf_ppo.images import CPU_IMAGE


@dsl.component(base_image=CPU_IMAGE, install_kfp_package=False)
def train_ppo(
    config: str,
    run_id: str,
    prompts: dsl.Input[dsl.Dataset],
    reference: dsl.Input[dsl.Model],
    policy: dsl.Output[dsl.Model],
    history: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Train the policy against the reward with PPO.

    Args:
        config: The validated settings of the run, as JSON.
        run_id: The pipeline run; groups the runs in the tracker.
        prompts: What prepare_dataset made.
        reference: What snapshot_reference made: the start, and what the KL divergence is measured to.
    """
    import math
    from pathlib import Path

    from rlhf_ppo.steps import running_step

    with running_step("train_ppo"):
        from rlhf_ppo.ppo_training import train

        final = train.train_on_cards(
            config, Path(prompts.path), Path(reference.path), Path(policy.path), Path(history.path), run_id
        )
        # The tracker has the same names per step; KFP's MLflow plugin logs these to the same run.
        for name, value in final.items():
            if math.isfinite(value):
                metrics.log_metric(f"final_{name}", float(value))
        policy.metadata["reference_digest"] = reference.metadata.get("digest", "")
        policy.metadata["prompts_digest"] = prompts.metadata.get("digest", "")
