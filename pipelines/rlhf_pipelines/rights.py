"""The rights that the Roles in manifests/ grant, and the code that needs each one: docs/rights.md is written from here.

What code of this repository calls is named by file, function and call, and its line is looked up. What KFP and Argo ask
for in the name of a run's service account is named by the file in their repositories that asks.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

TRAINING, RUNNER, SCHEDULE = "rlhf-ppo-train-job", "rlhf-ppo-runner", "rlhf-ppo-schedule"
"""The Roles."""
SUBMIT = ""
"""No Role: who submits brings these rights."""
TABLE = "pipelines/rlhf_pipelines/rights.py"
ARGO, KFP, TRAINER = "argoproj.io", "pipelines.kubeflow.org", "trainer.kubeflow.org"
_JOB, _CLUSTER = "components/rlhf_ppo/train_job.py", "components/rlhf_ppo/cluster.py"
_PLAN, _START = "pipelines/rlhf_pipelines/reconcile.py", "pipelines/rlhf_pipelines/submit.py"
_SERVER = "pipelines/rlhf_pipelines/kubeflow.py"
_ARGO, _KFP = "argoproj/argo-workflows", "kubeflow/pipelines"
_EXECUTOR = "manifests/quick-start/base/executor/emissary/executor-role.yaml"
_AGENT = "manifests/quick-start/base/agent-role.yaml"
_ENV, _POD_FAILURE = "backend/src/v2/config/env.go", "backend/src/v2/component/pod_failure.go"
_CHECKS = "backend/src/apiserver/server/"


class Place(NamedTuple):
    """Where a call is made: a method of a Kubernetes or KFP client, in a function of a file of this repository."""

    file: str
    function: str
    call: str


class Source(NamedTuple):
    """A file in somebody else's repository."""

    repository: str
    file: str


class Right(NamedTuple):
    """One right that a Role grants, or that no Role does; at least one of ``place`` and ``source`` is given."""

    role: str
    group: str
    resource: str
    verb: str
    why: str
    place: Place | None = None
    source: Source | None = None
    name: str = ""
    """Of the only object that it is for; empty for all."""

    def granted(self) -> tuple[str, str, str, str]:
        """What a Role says of it."""
        return self.group, self.resource, self.verb, self.name


def _asked(role: str, resource: str, verb: str, why: str, place: Place, file: str) -> Right:
    """What KFP's API server asks Kubernetes for, in multi-user mode, before it answers a call."""
    return Right(role, KFP, resource, verb, why, place, Source(_KFP, _CHECKS + file))


_VERSIONS = Place(_START, "stored", "pipeline_service_list_pipeline_versions")
_PIPELINES = Place(_START, "_pipeline", "pipeline_service_list_pipelines")
_FIND, _CREATE = "experiment_service_list_experiments", "experiment_service_create_experiment"
_EXPERIMENT = Place(_SERVER, "Server.find_experiment", _FIND)
_NEW_EXPERIMENT = Place(_SERVER, "Server.experiment", _CREATE)
_NEW_SCHEDULE = Place(_PLAN, "_make", "recurring_run_service_create_recurring_run")
_NEW_RUN = Place(_START, "submit", "run_service_create_run")

RIGHTS = [
    Right(TRAINING, TRAINER, "trainjobs", "list", "looks for the job, and for its end",
          Place(_JOB, "TrainJobs.find", "list_namespaced_custom_object")),
    Right(TRAINING, TRAINER, "trainjobs", "create", "makes the job",
          Place(_JOB, "TrainJobs._create", "create_namespaced_custom_object")),
    Right(TRAINING, TRAINER, "trainjobs", "patch", "a retry makes an earlier attempt's job its own",
          Place(_JOB, "TrainJobs._own", "patch_namespaced_custom_object")),
    Right(TRAINING, TRAINER, "trainjobs", "delete", "of a run that is cancelled, or of a job that has failed",
          Place(_JOB, "TrainJobs.delete", "delete_namespaced_custom_object")),
    Right(TRAINING, TRAINER, "trainjobs", "watch", "waits for its end",
          Place(_JOB, "TrainJobs._watch", "list_namespaced_custom_object")),
    Right(TRAINING, "", "pods", "list", "which node of a failed job failed, and how",
          Place(_JOB, "TrainJobs.pods", "list_namespaced_pod")),
    Right(TRAINING, "", "pods/log", "get", "the last lines of the pod that failed",
          Place(_JOB, "TrainJobs.last_lines", "read_namespaced_pod_log")),
    Right(TRAINING, "", "pods", "get", "which secrets the step refers to; which image it runs",
          Place(_CLUSTER, "Cluster.own_pod", "read_namespaced_pod")),
    Right(RUNNER, ARGO, "workflowtaskresults", "create", "Argo's executor reports what became of a step",
          source=Source(_ARGO, _EXECUTOR)),
    Right(RUNNER, ARGO, "workflowtaskresults", "patch", "the same", source=Source(_ARGO, _EXECUTOR)),
    Right(RUNNER, ARGO, "workflowtasksets", "list", "Argo's agent, where KFP's driver is an executor plugin",
          source=Source(_ARGO, _AGENT)),
    Right(RUNNER, ARGO, "workflowtasksets", "watch", "the same", source=Source(_ARGO, _AGENT)),
    Right(RUNNER, ARGO, "workflowtasksets/status", "patch", "the same", source=Source(_ARGO, _AGENT)),
    Right(RUNNER, "", "configmaps", "get", "KFP's driver and launcher read where artifacts go",
          source=Source(_KFP, _ENV), name="kfp-launcher"),
    Right(RUNNER, "", "secrets", "get", "KFP's launcher reads the key of the object store",
          source=Source(_KFP, _ENV), name="mlpipeline-minio-artifact"),
    Right(RUNNER, "", "pods", "get", "KFP's launcher tells why a step's pod failed", source=Source(_KFP, _POD_FAILURE)),
    Right(RUNNER, "", "pods", "get", "which image a step runs, for the model card",
          Place(_CLUSTER, "Cluster.own_pod", "read_namespaced_pod")),
    _asked(SCHEDULE, "pipelines", "list", "finds the pipeline by its name", _PIPELINES, "pipeline_server.go"),
    _asked(SCHEDULE, "pipelines", "list", "and its versions", _VERSIONS, "pipeline_server.go"),
    _asked(SCHEDULE, "experiments", "list", "finds the experiment", _EXPERIMENT, "experiment_server.go"),
    _asked(SCHEDULE, "experiments", "create", "makes it where it is missing", _NEW_EXPERIMENT, "experiment_server.go"),
    _asked(SCHEDULE, "jobs", "list", "compares with what is there",
           Place(_PLAN, "_recurring", "recurring_run_service_list_recurring_runs"), "job_server.go"),
    _asked(SCHEDULE, "jobs", "create", "makes a recurring run", _NEW_SCHEDULE, "job_server.go"),
    _asked(SCHEDULE, "pipelines", "get", "of the pipeline that it runs", _NEW_SCHEDULE, "job_server.go"),
    _asked(SCHEDULE, "jobs", "disable", "switches one off",
           Place(_PLAN, "apply", "recurring_run_service_disable_recurring_run"), "job_server.go"),
    _asked(SCHEDULE, "jobs", "delete", "deletes what was replaced",
           Place(_PLAN, "apply", "recurring_run_service_delete_recurring_run"), "job_server.go"),
    _asked(SCHEDULE, "runs", "list", "whether one goes on, which a deletion would end",
           Place(_PLAN, "_going_on", "run_service_list_runs"), "run_server.go"),
    _asked(SUBMIT, "experiments", "list", "finds the experiment", _EXPERIMENT, "experiment_server.go"),
    _asked(SUBMIT, "experiments", "create", "makes it where it is missing", _NEW_EXPERIMENT, "experiment_server.go"),
    _asked(SUBMIT, "pipelines", "list", "with `--pipeline`: finds it", _PIPELINES, "pipeline_server.go"),
    _asked(SUBMIT, "pipelines", "list", "and its versions", _VERSIONS, "pipeline_server.go"),
    _asked(SUBMIT, "runs", "list", "whether the run is there already",
           Place(_START, "submit", "run_service_list_runs"), "run_server.go"),
    _asked(SUBMIT, "runs", "create", "starts it", _NEW_RUN, "run_server.go"),
    _asked(SUBMIT, "pipelines", "get", "with `--pipeline`: of the pipeline that it runs", _NEW_RUN, "run_server.go"),
    _asked(SUBMIT, "runs", "get", "with `--wait`: follows it",
           Place(_START, "follow", "run_service_get_run"), "run_server.go"),
    _asked(SUBMIT, "runs", "readLog", "with `--wait`: why a step failed, in its own words",
           Place(_SERVER, "Server.text", "call_api"), "run_log_server.go"),
]  # fmt: skip


class Role(NamedTuple):
    """A Role as it lies in manifests/, and the service accounts that it is bound to."""

    file: str
    rules: list[dict[str, Any]]
    accounts: list[str]


def roles_in(root: Path) -> dict[str, Role]:
    """The Roles and ClusterRoles of the YAML files in ``root``/manifests, by name."""
    found, bound = {}, []
    for path in sorted((root / "manifests").rglob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        for each in yaml.safe_load_all(text) if "kind: Role" in text or "kind: ClusterRole" in text else ():
            kind = each.get("kind") if isinstance(each, dict) else None
            if kind in ("Role", "ClusterRole"):
                found[each["metadata"]["name"]] = Role(path.relative_to(root).as_posix(), each["rules"], [])
            elif kind in ("RoleBinding", "ClusterRoleBinding"):
                bound.append(each)
    for each in bound:
        found[each["roleRef"]["name"]].accounts.extend(subject["name"] for subject in each["subjects"])
    return found


def spelled_out(rules: list[dict[str, Any]]) -> Iterator[tuple[str, str, str, str]]:
    """Group, resource, verb and name of each single right in a Role's rules."""
    for rule in rules:
        names = rule.get("resourceNames") or [""]
        for group, resource in itertools.product(rule["apiGroups"], rule["resources"]):
            yield from ((group, resource, verb, name) for verb, name in itertools.product(rule["verbs"], names))


def line_of(root: Path, place: Place) -> int:
    """The line of the call. Raises LookupError where the function is gone, or calls that no more."""
    found: Any = ast.parse((root / place.file).read_text(encoding="utf-8"))
    for name in place.function.split("."):
        kinds = (ast.ClassDef, ast.FunctionDef)
        found = next((node for node in found.body if isinstance(node, kinds) and node.name == name), None)
        if found is None:
            raise LookupError(f"{place.file} has no {place.function}")
    names = [node for node in ast.walk(found) if isinstance(node, ast.Attribute) and node.attr == place.call]
    if not names:
        raise LookupError(f"{place.file}: {place.function} no longer calls {place.call}")
    return min(int(node.end_lineno or 0) for node in names)


def problems_of(root: Path) -> list[str]:
    """What the Roles grant and nothing here needs, what is needed and not granted, and which call is gone."""
    found = []
    roles = roles_in(root)
    for role in sorted({*roles, *(right.role for right in RIGHTS)} - {SUBMIT}):
        there = roles.get(role, Role("manifests", [], []))
        granted, needed = set(spelled_out(there.rules)), {right.granted() for right in RIGHTS if right.role == role}
        more, less = sorted(granted - needed), sorted(needed - granted)
        found += [f"{there.file}: {role} grants {_said(each)}, which nothing in {TABLE} needs" for each in more]
        found += [f"{there.file}: {role} does not grant {_said(each)}, which {TABLE} needs" for each in less]
    for place in dict.fromkeys(right.place for right in RIGHTS if right.place):
        try:
            line_of(root, place)
        except LookupError as error:
            found.append(str(error))
    return found


def _said(granted: tuple[str, str, str, str]) -> str:
    group, resource, verb, name = granted
    return f"{verb} {resource}" + (f".{group}" if group else "") + (f" {name}" if name else "")


INTRODUCTION = """\
# Rights

Written by `python -m rlhf_pipelines.generate` from the Roles in `manifests/` and the table in
[rights.py](../pipelines/rlhf_pipelines/rights.py). `make test` fails where a Role grants what no code needs, where code
needs what no Role grants, where a line named here no longer makes its call, and where this page is not what would be
written. The overlays bring the Roles of the base and no others; MLflow's service account has no rights. Nothing here is
granted in more than one namespace.

Rights in the group `pipelines.kubeflow.org` are none of Kubernetes' own: in multi-user mode KFP's API server asks for
them before it answers (a SubjectAccessReview); the file in KFP's repository that asks stands beside our call. In
single-user mode nobody asks.
"""
CLOSING = """
## What rlhf-ppo submit asks for

No Role here grants it: it runs with the rights of whoever submits, e.g. those of KFP's ClusterRole
`kubeflow-pipeline-edit`. Older versions of KFP don't ask for `readLog`; where it is refused, `--wait` tells what KFP
knows of a failure.

"""
_HEAD = "| API group | Resource | Verb | For | Needed by |\n|---|---|---|---|---|\n"


def page(root: Path) -> str:
    """docs/rights.md. Raises LookupError where a call is gone."""
    parts = [INTRODUCTION]
    for role, there in roles_in(root).items():
        where = f"[{there.file.removeprefix('manifests/')}](../{there.file})"
        accounts = ", ".join(f"`{account}`" for account in there.accounts)
        parts.append(f"\n## {role}\n\n{where}, bound to the service account {accounts}.\n\n{_HEAD}")
        ours = [right for right in RIGHTS if right.role == role]
        for granted in dict.fromkeys(spelled_out(there.rules)):
            parts += [_row(root, right) for right in ours if right.granted() == granted]
    parts += [CLOSING, _HEAD, *(_row(root, right) for right in RIGHTS if right.role == SUBMIT)]
    return "".join(parts)


def _row(root: Path, right: Right) -> str:
    resource = f"`{right.resource}`" + (f" `{right.name}`" if right.name else "")
    needed = []
    if right.place:
        file, function, call = right.place
        line = line_of(root, right.place)
        needed.append(f"[{Path(file).name}:{line}](../{file}#L{line}) `{function}`: `{call}`")
    if right.source:
        needed.append(f"{right.source.repository} `{right.source.file}`")
    return f"| {right.group or 'core'} | {resource} | {right.verb} | {right.why} | {'; '.join(needed)} |\n"
