"""Start a run on a cluster, follow it, and say why it failed in the failing step's own words."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from rlhf_pipelines.kubeflow import Server, called
from rlhf_ppo.errors import InputError

ENDED = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")
POLL_SECONDS = 5.0
LOG = "/apis/v1alpha1/runs/{run_id}/nodes/{node_id}/log"
"""Where KFP's API server gives the log of a step's pod; its Python client doesn't know it."""
TEMPLATES = ("", "system-container-impl-", "system-container-driver-")
"""What may stand before the hash in the name of a pod: nothing in Argo's older form, else the template."""
DETECTION = ("detect-changes", "Detect changes")
"""What KFP calls the step detect_changes: by its name, or by its label."""


@dataclass(frozen=True)
class Source:
    """What to run: the compiled pipeline ``package``, or a version of a pipeline that the server has."""

    package: str = ""
    pipeline_id: str = ""
    version_id: str = ""

    def body(self) -> dict[str, Any]:
        """The fields of a run that name it."""
        from kfp_server_api import V2beta1PipelineVersionReference

        if self.package:
            spec, platform = yaml.safe_load_all(self.package)
            return {"pipeline_spec": {"pipeline_spec": spec, "platform_spec": platform}}
        reference = V2beta1PipelineVersionReference(
            pipeline_id=self.pipeline_id, pipeline_version_id=self.version_id or None
        )
        return {"pipeline_version_reference": reference}


def stored(server: Server, pipeline: str, version: str, given: Mapping[str, Any]) -> Source:
    """The version of the server's pipeline called ``pipeline``: the latest, where ``version`` is "latest".

    Raises InputError where there is none, or where it has no such parameters as ``given``.
    """
    found = _pipeline(server, pipeline)
    if found is None:
        raise InputError(f"{pipeline} is no pipeline of the server: upload or apply it first, or check its name")
    call = server.client.pipelines.pipeline_service_list_pipeline_versions
    listed = {"pipeline_id": found.pipeline_id, "sort_by": "created_at desc"}
    versions = list(server.all(f"list the versions of {pipeline}", call, "pipeline_versions", **listed))
    chosen = next((one for one in versions if version in ("latest", *_names(one), one.pipeline_version_id)), None)
    if chosen is None:
        names = ", ".join(one.display_name for one in versions) or "none"
        raise InputError(f"{version} is no version of {pipeline}; there are: {names}")
    problems = [
        f"{name} is no parameter of {pipeline}, version {chosen.display_name}" for name in _unknown(chosen, given)
    ]
    if problems:
        raise InputError(problems)
    return Source(pipeline_id=str(found.pipeline_id), version_id=str(chosen.pipeline_version_id))


def _pipeline(server: Server, name: str) -> Any:
    """The pipeline of this name in the namespace, else the shared one; a pipeline made by Kubernetes has two names."""
    call = server.client.pipelines.pipeline_service_list_pipelines
    for scope in [{"namespace": server.namespace}, {}] if server.namespace else [{}]:
        for found in server.all(f"look for the pipeline {name}", call, "pipelines", **scope):
            if name in _names(found):
                return found
    return None


def _names(found: Any) -> tuple[str, str]:
    return found.name, found.display_name


def _unknown(version: Any, given: Mapping[str, Any]) -> list[str]:
    spec = version.pipeline_spec or {}
    spec = spec.get("pipeline_spec", spec)
    known = spec.get("root", {}).get("inputDefinitions", {}).get("parameters")
    return [] if known is None else sorted(set(given) - set(known))


@dataclass(frozen=True)
class Submission:
    """A run as it is asked for; a second one with the same name in the experiment is taken for the same."""

    name: str
    experiment: str
    parameters: Mapping[str, Any]
    source: Source
    service_account: str = ""


def submit(server: Server, wanted: Submission) -> str:
    """Start the run, once; returns its id.

    Raises InputError where a run of that name is there with other parameters; KubeflowError.
    """
    from kfp_server_api import V2beta1Run, V2beta1RuntimeConfig

    experiment_id = server.experiment(wanted.experiment)

    def look() -> Any:
        call = server.client.runs.run_service_list_runs
        found = server.all("look for the run", call, "runs", experiment_id=experiment_id, filter=called(wanted.name))
        return next(found, None)

    body = V2beta1Run(
        experiment_id=experiment_id,
        display_name=wanted.name,
        runtime_config=V2beta1RuntimeConfig(parameters=dict(wanted.parameters)),
        service_account=wanted.service_account or None,
        **wanted.source.body(),
    )
    run = server.make("start the run", look, server.client.runs.run_service_create_run, run=body)
    theirs = (run.runtime_config.parameters if run.runtime_config else None) or {}
    other = sorted(name for name in {*theirs, *wanted.parameters} if theirs.get(name) != wanted.parameters.get(name))
    if other:
        raise InputError(
            f"a run called {wanted.name!r} is there with other parameters ({', '.join(other)}): give another "
            "--client-token"
        )
    return str(run.run_id)


@dataclass(frozen=True)
class Outcome:
    """How a run ended; ``reasons`` says why, step by step, where it did not succeed or ended early."""

    state: str
    reasons: list[str]


def follow(server: Server, run_id: str, show: Callable[[str, str], None], timeout: float = 0.0) -> Outcome:
    """Wait for the end of a run; ``show`` hears of each step and its new state.

    Raises TimeoutError after ``timeout`` seconds (0: never), the run goes on.
    """
    deadline = time.monotonic() + timeout if timeout else None
    told: dict[str, str] = {}
    while True:
        run = server.ask("look at the run", server.client.runs.run_service_get_run, run_id=run_id)
        for name, state in _states(run).items():
            if told.get(name) != state:
                told[name] = state
                show(name, state)
        if run.state in ENDED:
            return Outcome(run.state, list((_early if run.state == "SUCCEEDED" else _reasons)(server, run)))
        if deadline is not None and time.monotonic() > deadline:
            raise TimeoutError(f"the run has not ended within {timeout:g} s; it goes on")
        time.sleep(POLL_SECONDS)


def _tasks(run: Any) -> list[Any]:
    return list((run.run_details.task_details if run.run_details else None) or [])


def _states(run: Any) -> dict[str, str]:
    """The state of each step, without what KFP adds: drivers, and the graph as a whole."""
    return {
        task.display_name: task.state
        for task in _tasks(run)
        if task.state and not re.search(r"driver|^root|^executor$", task.display_name or "") and task.state != "SKIPPED"
    }


def _early(server: Server, run: Any) -> Iterator[str]:
    """That detect_changes ended the run, from its log, where it did."""
    for log in _logs(server, run, [task for task in _tasks(run) if task.display_name in DETECTION]):
        event = event_in(log, "unchanged")
        if event:
            yield f"nothing was trained: nothing new since the run {event['since']}"


def _reasons(server: Server, run: Any) -> Iterator[str]:
    """Why the run failed: the words of the steps that failed, from their logs; else what KFP knows."""
    failed = [task for task in _tasks(run) if task.state == "FAILED"]
    said = list(dict.fromkeys(filter(None, map(failure_in, _logs(server, run, failed)))))
    if not said:
        said = [f"{task.display_name}: {task.error.message}" for task in failed if task.error and task.error.message]
    if not said and run.error and run.error.message:
        said = [run.error.message]
    names = ", ".join(dict.fromkeys(task.display_name for task in failed))
    yield from said or [f"{names or 'the run'} failed, and neither a log nor KFP says why: look at its pods"]


def _logs(server: Server, run: Any, tasks: Sequence[Any]) -> Iterator[str]:
    for task in tasks:
        for node in _nodes(task):
            yield server.text(LOG.format(run_id=run.run_id, node_id=node))


def _nodes(task: Any) -> list[str]:
    """What may be the names of a task's pods."""
    ids = [task.pod_name, *(child.pod_name for child in task.child_tasks or [])]
    found = []
    for node in dict.fromkeys(filter(None, ids)):
        before, dash, number = node.rpartition("-")
        found += [f"{before}{dash}{template}{number}" for template in TEMPLATES]
    return found


def failure_in(log: str) -> str:
    """What a step of ours said last of its failure, or an empty text."""
    event = event_in(log, "step_failed")
    return f"{event['step']}: {event['message']}" if event else ""


def event_in(log: str, kind: str) -> dict[str, Any]:
    """The last event of this kind that a step of ours told, or an empty one."""
    for line in reversed(log.splitlines()):
        if f'"{kind}"' not in line:
            continue
        try:
            event = json.loads(line[line.index("{") :])
            if event["kind"] == kind:
                return dict(event)
        except (ValueError, KeyError, TypeError):
            continue
    return {}
