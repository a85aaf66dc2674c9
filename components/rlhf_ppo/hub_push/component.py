"""The KFP interface of the step that publishes."""

from kfp import dsl

from rlhf_ppo.images import CPU_IMAGE


@dsl.component(base_image=CPU_IMAGE, install_kfp_package=False)
def push_to_hub(
    config: str,
    run_id: str,
    policy: dsl.Input[dsl.Model],
    evaluation: dsl.Input[dsl.Artifact],
) -> str:
    """Push the policy to the hub; without hub_repo_id nothing is pushed.

    Args:
        config: The validated settings of the run, as JSON.
        run_id: The pipeline run; stands in the model card.
        policy: What train_ppo made.
        evaluation: What evaluate_policy found.

    Returns:
        The revision on the hub, or an empty text.
    """
    from pathlib import Path

    from rlhf_ppo.steps import running_step

    with running_step("push_to_hub"):
        from rlhf_ppo.hub_push import push

        return push.push_to_hub(config, Path(policy.path), Path(evaluation.path), run_id, policy.uri)
