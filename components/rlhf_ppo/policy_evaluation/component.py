"""The KFP interfaces of the two steps that judge the policy."""

from kfp import dsl

from rlhf_ppo.images import CPU_IMAGE


@dsl.component(base_image=CPU_IMAGE, install_kfp_package=False)
def evaluate_policy(
    config: str,
    run_id: str,
    prompts: dsl.Input[dsl.Dataset],
    reference: dsl.Input[dsl.Model],
    policy: dsl.Input[dsl.Model],
    history: dsl.Input[dsl.Artifact],
    evaluation: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Compare the policy with the reference on held-out prompts, with 95 % intervals and a report.

    Args:
        config: The validated settings of the run, as JSON.
        run_id: The pipeline run; groups the runs in the tracker.
        prompts: What prepare_dataset made.
        reference: What snapshot_reference made.
        policy: What train_ppo made.
        history: The metrics of each PPO step, from train_ppo.
    """
    import math
    from pathlib import Path

    from rlhf_ppo.steps import running_step

    with running_step("evaluate_policy"):
        from rlhf_ppo.policy_evaluation import evaluate

        found = evaluate.evaluate_policy(
            config,
            Path(prompts.path),
            Path(reference.path),
            Path(policy.path),
            Path(history.path),
            Path(evaluation.path),
            Path(report.path),
            run_id,
            policy.uri,
        )
        # The tracker has the same names; KFP's MLflow plugin logs these to the same run.
        for name, value in found.items():
            if math.isfinite(value):
                metrics.log_metric(f"final_{name}", float(value))


@dsl.component(base_image=CPU_IMAGE, install_kfp_package=False)
def gate(evaluation: dsl.Input[dsl.Artifact]) -> bool:
    """Whether the policy may be pushed: one bool, because a local run takes a condition on anything else as false.

    Args:
        evaluation: What evaluate_policy found.
    """
    from pathlib import Path

    from rlhf_ppo.steps import running_step

    with running_step("gate"):
        from rlhf_ppo.policy_evaluation import gate

        return bool(gate.gate(Path(evaluation.path)))
