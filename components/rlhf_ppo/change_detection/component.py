"""The KFP interface of detect_changes."""

from kfp import dsl

from rlhf_ppo.images import CPU_IMAGE


@dsl.component(base_image=CPU_IMAGE, install_kfp_package=False)
def detect_changes(config: str, run_id: str, model_digest: str, data_digest: str) -> bool:
    """Whether there is something new to learn from; true unless mlflow_skip_unchanged is set.

    Args:
        config: The validated settings of the run, as JSON.
        run_id: The pipeline run; groups the runs in the tracker.
        model_digest: What the model holds now, where it is not on the hub.
        data_digest: What the data hold now, where they are not on the hub.
    """
    from rlhf_ppo.steps import running_step

    with running_step("detect_changes"):
        from rlhf_ppo.change_detection import detect

        return bool(detect.detect_changes(config, run_id, model_digest, data_digest))
