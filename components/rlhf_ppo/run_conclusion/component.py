"""The KFP interface of the exit handler."""

from kfp import dsl

from rlhf_ppo.images import CPU_IMAGE


@dsl.component(base_image=CPU_IMAGE, install_kfp_package=False)
def conclude_run(
    status: dsl.PipelineTaskFinalStatus,
    run_id: str,
    mlflow_tracking_uri: str,
    tracker_project_name: str,
) -> None:
    """Report how the run ended, and end it in the tracker; runs whatever happened before.

    Args:
        run_id: The pipeline run; groups the runs in the tracker.
        mlflow_tracking_uri: MLflow server or store; empty takes MLFLOW_TRACKING_URI.
        tracker_project_name: Name of the MLflow experiment.
    """
    from rlhf_ppo.steps import running_step

    with running_step("conclude_run"):
        from rlhf_ppo.run_conclusion import conclude

        conclude.conclude_run(
            run_id,
            status.state,
            status.error_message or "",
            mlflow_tracking_uri=mlflow_tracking_uri,
            experiment=tracker_project_name,
        )
