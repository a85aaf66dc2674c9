"""The work of conclude_run: deliver what the tracker still lacks, end the run there, and say how it ended."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from rlhf_ppo.delivery import UNCHANGED_TAG, client_of, pipeline_run_of
from rlhf_ppo.events import emit
from rlhf_ppo.tracking import DEADLINE, default_uri, resend


def conclude_run(run_id: str, state: str, message: str, *, mlflow_tracking_uri: str, experiment: str) -> None:
    """End the pipeline's run in MLflow as ``state`` says (SUCCEEDED or else); a dead server does not hold it up."""
    succeeded = state.upper() == "SUCCEEDED"
    emit("run_concluded", state=state, succeeded=succeeded, message=message)
    # A thread, because a server that hangs must not keep the last step.
    ending = threading.Thread(target=_end, args=(run_id, succeeded, mlflow_tracking_uri, experiment), daemon=True)
    ending.start()
    ending.join(6 * DEADLINE)
    if ending.is_alive():
        print("[tracking] the server does not answer; the run is not marked as ended there", flush=True)


def _end(run_id: str, succeeded: bool, tracking_uri: str, experiment: str) -> None:
    spool = os.environ.get("RLHF_PPO_SPOOL")
    left = resend(Path(spool)) if spool else []
    for directory in left:
        print(f"[tracking] not delivered: {directory}; send it by: python -m rlhf_ppo.tracking {spool}", flush=True)
    uri = default_uri(tracking_uri)
    try:
        client = client_of(uri)
        run = pipeline_run_of(client, uri, experiment, run_id)
        before = run.data.tags.get(UNCHANGED_TAG)
        if before:
            print(f"nothing was trained: nothing new since the run {before}", flush=True)
        if os.environ.get("MLFLOW_RUN_ID"):
            return  # KFP ends the runs that it made.
        outcome = ("unchanged" if before else "succeeded") if succeeded else "failed"
        client.set_tag(run.info.run_id, "rlhf_ppo.outcome", outcome)
        client.set_terminated(run.info.run_id, "FINISHED" if succeeded else "FAILED")
    except Exception as error:
        print(f"[tracking] the run is not marked as ended on {uri}: {type(error).__name__}: {error}", flush=True)
