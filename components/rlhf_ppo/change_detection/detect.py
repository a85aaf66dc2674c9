"""The work of detect_changes: has a run that succeeded learned from all this before? MLflow remembers."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

from rlhf_ppo import __version__
from rlhf_ppo.artifacts import digest_of
from rlhf_ppo.config_validation import sources
from rlhf_ppo.delivery import UNCHANGED_TAG, client_of, pipeline_run_of
from rlhf_ppo.events import emit
from rlhf_ppo.parameters import RunSettings
from rlhf_ppo.provenance import code_commit
from rlhf_ppo.tracking import DEADLINE, default_uri, run_name_of

FINGERPRINT_TAG = "rlhf_ppo.fingerprint"
"""Tag of a pipeline's run in MLflow that trains: equal for two runs that have the same to learn from."""
NOT_LEARNED_FROM = frozenset(
    "exp_name task_name log_with tracker_kwargs project_kwargs tracker_project_name mlflow_tracking_uri "
    "mlflow_skip_unchanged optimize_device_cache reward_deadline_seconds checkpoint_dir checkpoint_name "
    "checkpoint_every checkpoint_keep node_accelerator node_cpu node_memory node_selector node_tolerations "
    "node_timeout_seconds node_sharding node_resources node_runtime".split()
)
"""Parameters that say where and how a run is made and what it is called, and not what comes out."""


def detect_changes(config: str, run_id: str, model_digest: str, data_digest: str) -> bool:
    """Whether the run has something to learn that no run before it did, which is so where nobody can tell.

    Marks the run in MLflow, so that later ones can tell.
    """
    settings = RunSettings.from_json(config)
    found: list[str] = []
    # A thread, because a server that hangs must not keep the run.
    asking = threading.Thread(target=_ask, args=(settings, run_id, model_digest, data_digest, found), daemon=True)
    asking.start()
    asking.join(6 * DEADLINE)
    if asking.is_alive():
        _cannot_tell("MLflow does not answer", settings)
    if not found:
        return True
    emit("note", step="detect_changes", message=f"nothing new since the run {found[0]}: ending here")
    emit("unchanged", since=found[0])
    return False


def fingerprint(settings: RunSettings, model_digest: str, data_digest: str) -> str:
    """A digest of all that decides what comes out; of no use twice where something can't be told."""
    values = {name: value for name, value in json.loads(settings.to_json()).items() if name not in NOT_LEARNED_FROM}
    rewards = {settings.ppo.reward_model, *settings.reward.reward_sum, settings.evaluation.eval_judge}
    content = {name: sources.digest_of_reward(name, settings) for name in rewards if name}
    head = settings.algorithm.ppo_value_head
    content[head] = sources.digest(head, "") if head else ""
    return digest_of([__version__, code_commit(), values, model_digest, data_digest, content])


def _ask(settings: RunSettings, run_id: str, model_digest: str, data_digest: str, found: list[str]) -> None:
    """Add to ``found`` the run that learned from the same, if there is one and it is asked for."""
    try:
        mark = fingerprint(settings, model_digest, data_digest)
        uri, experiment = default_uri(settings.tracking.mlflow_tracking_uri), settings.ppo.tracker_project_name
        client = client_of(uri)
        mine = pipeline_run_of(client, uri, experiment, run_id, run_name_of(settings, run_id))
        before = _before(client, mine.info.experiment_id, mark) if settings.tracking.mlflow_skip_unchanged else ""
        if not before:
            client.set_tag(mine.info.run_id, FINGERPRINT_TAG, mark)
            return
        client.set_tag(mine.info.run_id, UNCHANGED_TAG, before)
        told = {"tracking_uri": uri, "experiment": experiment, "run_id": mine.info.run_id, "parent_run_id": ""}
        emit("tracking", step="detect_changes", **told)
        found.append(before)
    except Exception as error:  # of the server, its database or its client: a run too many is better than one too few
        _cannot_tell(f"{type(error).__name__}: {error}".splitlines()[0][:300], settings)


def _before(client: Any, experiment_id: str, mark: str) -> str:
    """The last pipeline run that succeeded and bears the ``mark``, with its time, or an empty text."""
    condition = f"tags.`{FINGERPRINT_TAG}` = '{mark}' and attributes.status = 'FINISHED'"
    runs = client.search_runs([experiment_id], condition, max_results=1, order_by=["attributes.start_time DESC"])
    if not runs:
        return ""
    tags, info = runs[0].data.tags, runs[0].info
    name = tags.get("rlhf_ppo.run_id") or tags.get("kfp.pipeline_run_id") or info.run_id
    return f"{name} of {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(info.start_time / 1000))}"


def _cannot_tell(reason: str, settings: RunSettings) -> None:
    """Say it to the person who asked, and else to the log."""
    if settings.tracking.mlflow_skip_unchanged:
        said = f"nobody can tell whether there is something new, so there is ({reason})"
        emit("note", step="detect_changes", message=said)
    else:
        print(f"[tracking] the run is not marked for later ones that skip what is unchanged ({reason})", flush=True)
