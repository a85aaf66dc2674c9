"""The page of rights: what each Role grants, which line needs it, and that the line really asks for just that."""

from __future__ import annotations

import ast
import functools
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from kfp_server import Kfp
from rlhf_pipelines import rights
from rlhf_pipelines.generate import expected_rights, stale
from rlhf_pipelines.kubeflow import Server, connect
from rlhf_pipelines.reconcile import apply, plan
from rlhf_pipelines.rights import RIGHTS, SCHEDULE, SUBMIT, Place, Right, line_of
from rlhf_pipelines.schedules import Schedule
from rlhf_pipelines.submit import Submission, follow, stored, submit
from rlhf_ppo.cluster import Cluster
from rlhf_ppo.train_job import TrainJobs
from test_generated import Copy

ROOT = Path(__file__).parent.parent
PAGE, TABLE = "docs/rights.md", "pipelines/rlhf_pipelines/rights.py"
Asked = tuple[str, str, str]
"""Group, resource and verb."""


def test_the_page_is_what_would_be_written_and_roles_and_code_agree() -> None:
    assert rights.problems_of(ROOT) == []
    assert stale(expected_rights()) == []


def test_every_right_is_on_the_page_with_a_link_to_a_line_that_holds_the_call() -> None:
    text = (ROOT / PAGE).read_text()
    for right in RIGHTS:
        assert f"| {right.group or 'core'} | `{right.resource}`" in text
        if right.place:
            line = (ROOT / right.place.file).read_text().splitlines()[line_of(ROOT, right.place) - 1]
            assert right.place.call in line
            assert f"(../{right.place.file}#L{line_of(ROOT, right.place)}) `{right.place.function}`" in text


def test_what_others_need_stands_in_the_role_s_comments_too() -> None:
    for right in RIGHTS:
        if right.source and right.role:
            assert right.source.file in (ROOT / rights.roles_in(ROOT)[right.role].file).read_text()


# 1. Whatever drifts is named


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    found = Copy(tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs", dirs_exist_ok=True)
    assert rights.problems_of(tmp_path) == []
    return found


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("manifests/base/train-job-role.yaml", "[create, list, watch, patch, delete]", "[create, list, watch, patch]",
         "rlhf-ppo-train-job does not grant delete trainjobs.trainer.kubeflow.org"),
        ("manifests/base/train-job-role.yaml", "verbs: [get, list]", "verbs: [get, list, delete]",
         "rlhf-ppo-train-job grants delete pods, which nothing"),
        ("manifests/base/runner-role.yaml", "resources: [pods]\n    verbs: [get]",
         "resources: [pods, nodes]\n    verbs: [get]", "rlhf-ppo-runner grants get nodes, which nothing"),
        ("components/rlhf_ppo/train_job.py", "self._core.read_namespaced_pod_log", "self._core.read_namespaced_pod",
         "TrainJobs.last_lines no longer calls read_namespaced_pod_log"),
        ("components/rlhf_ppo/train_job.py", "def delete(self)", "def remove(self)", "has no TrainJobs.delete"),
    ],
)  # fmt: skip
def test_a_right_too_many_or_too_few_and_a_call_that_is_gone_are_named(
    copy: Copy, file: str, old: str, new: str, said: str
) -> None:
    copy.edit(file, old, new)
    (problem,) = rights.problems_of(copy.root)
    assert said in problem and problem.startswith((file, Path(file).parent.parent.name))


def test_a_role_of_a_name_that_nothing_knows_is_all_too_much(copy: Copy) -> None:
    (copy.root / "manifests" / "overlays" / "gpu" / "role.yaml").write_text(
        "kind: ClusterRole\nmetadata: {name: more}\nrules: [{apiGroups: [''], resources: [pods], verbs: [get, list]}]\n"
    )
    assert [problem.partition(",")[0] for problem in rights.problems_of(copy.root)] == [
        f"manifests/overlays/gpu/role.yaml: more grants {verb} pods" for verb in ("get", "list")
    ]


def test_the_check_ends_where_roles_and_code_do_not_agree(copy: Copy) -> None:
    copy.edit("manifests/base/schedule-role.yaml", "verbs: [list, create, disable, delete]", "verbs: [list, create]")
    code, messages = copy.generate("--check")
    said = f"manifests/base/schedule-role.yaml: {SCHEDULE} does not grant"
    assert code == 1 and messages.splitlines() == [
        f"{said} {verb} jobs.pipelines.kubeflow.org, which {TABLE} needs" for verb in ("delete", "disable")
    ]


def test_a_call_that_moved_makes_the_page_stale_and_one_command_renews_it(copy: Copy) -> None:
    copy.edit("components/rlhf_ppo/cluster.py", "from __future__", "\n\n\nfrom __future__")
    assert copy.stale() == {PAGE}
    assert copy.generate()[0] == 0 and copy.stale() == set()


# 2. No call is without a right


def calls_in_sources() -> Iterator[tuple[str, str]]:
    """File and name of every call to Kubernetes or KFP by their clients."""
    for path in [*(ROOT / "components").rglob("*.py"), *(ROOT / "pipelines").rglob("*.py")]:
        tree = ast.parse(path.read_text())
        handles = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == "__self__"}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and id(node) not in handles:
                if re.search(r"^\w+_(namespaced|cluster)_|^\w+_for_all_namespaces|_service_|^call_api$", node.attr):
                    yield str(path.relative_to(ROOT)), node.attr


def test_every_call_of_a_client_is_in_the_table_and_the_other_way_round() -> None:
    found, known = sorted(calls_in_sources()), {right.place for right in RIGHTS if right.place}
    assert found == sorted((place.file, place.call) for place in known)


# 3. The line asks for just that right


class Recorded:
    """A client that notes which line took which of its methods, and what became of it."""

    def __init__(self, real: Any, note: Callable[[Place, int, Callable[[], Any]], Any]) -> None:
        self.real, self.note = real, note

    def __getattr__(self, name: str) -> Any:
        frame, method = sys._getframe(1), getattr(self.real, name)
        file = Path(frame.f_code.co_filename)
        if not callable(method) or not file.is_relative_to(ROOT):
            return method
        function = frame.f_code.co_qualname.partition(".<locals>")[0]
        place, line = Place(str(file.relative_to(ROOT)), function, name), frame.f_lineno

        @functools.wraps(method)
        def call(*given: Any, **named: Any) -> Any:
            return self.note(place, line, lambda: method(*given, **named))

        call.__self__ = self.real  # type: ignore[attr-defined]
        return call


def placed(role_or_group: Callable[[Right], bool]) -> set[tuple[Place, int, Asked]]:
    return {
        (right.place, line_of(ROOT, right.place), (right.group, right.resource, right.verb))
        for right in RIGHTS
        if right.place and role_or_group(right)
    }


class Stop(Exception):
    """Enough was seen."""


def asked_of_kubernetes(path: str, method: str, parameters: dict[str, str], query: list[tuple[str, Any]]) -> Asked:
    """The right that Kubernetes' API server asks for: by method and path, as it does."""
    parts = [parameters.get(part.strip("{}"), part) for part in path.strip("/").split("/")]
    group, rest = ("", parts[2:]) if parts[0] == "api" else (parts[1], parts[3:])
    assert rest[0] == "namespaces" and rest[1] == "team"
    resource, name, part = (*rest[2:], "", "")[:3]
    reads = "get" if name else "watch" if dict(query).get("watch") else "list"
    verb = {"GET": reads, "POST": "create", "PATCH": "patch", "DELETE": "delete"}[method]
    return group, f"{resource}/{part}" if part else resource, verb


def test_each_call_to_kubernetes_is_made_by_its_line_and_asks_for_its_right(monkeypatch: pytest.MonkeyPatch) -> None:
    from kubernetes import client

    seen: set[tuple[Place, int, Asked]] = set()
    at: list[tuple[Place, int]] = []

    class Api(client.ApiClient):  # type: ignore[misc]
        def call_api(
            self, path: str, method: str, parameters: Any = None, query: Any = None, *_: Any, **__: Any
        ) -> None:
            seen.add((*at[-1], asked_of_kubernetes(path, method, parameters or {}, query or [])))
            raise Stop

    def note(place: Place, line: int, call: Callable[[], Any]) -> Any:
        at.append((place, line))
        return call()

    for name in ("CoreV1Api", "CustomObjectsApi"):
        real = getattr(client, name)
        monkeypatch.setattr(client, name, lambda api_client, real=real: Recorded(real(api_client), note))
    monkeypatch.setenv("KFP_POD_NAME", "train-1")
    monkeypatch.setenv("KFP_POD_UID", "1")
    cluster = Cluster(Api(), "team")
    jobs, pod = TrainJobs(cluster, "rlhf-ppo-1"), client.V1Pod(metadata=client.V1ObjectMeta(name="node-0"))
    for do in (
        jobs.find, lambda: jobs._create(dict), jobs._own, jobs.delete, lambda: list(jobs._watch("1")), jobs.pods,
        lambda: jobs.last_lines(pod), cluster.own_pod,
    ):  # fmt: skip
        with suppress(Stop):
            do()
    assert seen == placed(lambda right: right.group != rights.KFP)


KFP_ASKS: list[tuple[str, list[tuple[str, str]]]] = [
    (r"GET /apis/v2beta1/pipelines(/[^/]+/versions)?", [("pipelines", "list")]),
    (r"GET /apis/v2beta1/experiments", [("experiments", "list")]),
    (r"POST /apis/v2beta1/experiments", [("experiments", "create")]),
    (r"GET /apis/v2beta1/recurringruns", [("jobs", "list")]),
    (r"POST /apis/v2beta1/recurringruns", [("jobs", "create"), ("pipelines", "get")]),
    (r"POST /apis/v2beta1/recurringruns/[^/]+:disable", [("jobs", "disable")]),
    (r"DELETE /apis/v2beta1/recurringruns/[^/]+", [("jobs", "delete")]),
    (r"GET /apis/v2beta1/runs", [("runs", "list")]),
    (r"POST /apis/v2beta1/runs", [("runs", "create"), ("pipelines", "get")]),
    (r"GET /apis/v2beta1/runs/[^/]+", [("runs", "get")]),
    (r"GET /apis/v1alpha1/runs/[^/]+/nodes/[^/]+/log", [("runs", "readLog")]),
]
"""What KFP's API server asks for in multi-user mode, by kubeflow/pipelines, backend/src/apiserver/server."""


def recorded(kfp: Kfp, monkeypatch: pytest.MonkeyPatch) -> tuple[Server, set[tuple[Place, int, Asked]]]:
    """A server whose calls are noted, with the rights that they take."""
    import kfp_server_api

    seen: set[tuple[Place, int, Asked]] = set()

    def note(place: Place, line: int, call: Callable[[], Any]) -> Any:
        before = len(kfp.asked)
        try:
            return call()
        finally:
            for request in kfp.asked[before:]:
                (asked,) = [each for pattern, each in KFP_ASKS if re.fullmatch(pattern, request)]
                seen.update((place, line, (rights.KFP, *each)) for each in asked)

    server = connect(kfp.url, "team")
    for name in ("runs", "recurring_runs", "experiments", "pipelines"):
        monkeypatch.setattr(server.client, name, Recorded(getattr(server.client, name), note))
    real_call = kfp_server_api.ApiClient.call_api

    def call_api(self: Any, *given: Any, **named: Any) -> Any:
        frame = sys._getframe(1)
        if frame.f_code.co_qualname != "Server.text":
            return real_call(self, *given, **named)
        place = Place(str(Path(frame.f_code.co_filename).relative_to(ROOT)), "Server.text", "call_api")
        return note(place, frame.f_lineno, lambda: real_call(self, *given, **named))

    monkeypatch.setattr(kfp_server_api.ApiClient, "call_api", call_api)
    return server, seen


@pytest.fixture
def kfp() -> Iterator[Kfp]:
    found = Kfp(multi_user=True)
    spec = next(iter(yaml.safe_load_all((ROOT / "pipelines/rlhf_pipelines/compiled/ppo.yaml").read_text())))
    found.upload("rlhf-ppo", "v1", spec, namespace="team")
    yield found
    found.close()


def test_schedule_apply_asks_kfp_for_what_its_role_grants_each_by_its_line(
    kfp: Kfp, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, seen = recorded(kfp, monkeypatch)
    given = [Schedule("changed", "0 0 2 * * *"), Schedule("off", "0 0 2 * * *"), Schedule("gone", "0 0 2 * * *")]
    wanted = [Schedule("changed", "0 0 3 * * *"), Schedule("off", "0 0 2 * * *", enabled=False)]
    for schedules in (given, wanted):
        apply(server, plan(server, "team", schedules), lambda text: None)
    assert {each["display_name"]: each["status"] for each in kfp.recurring.values()} == {
        "changed": "ENABLED", "off": "DISABLED",
    }  # fmt: skip
    assert seen == placed(lambda right: right.role == SCHEDULE)


def test_submit_asks_kfp_for_what_the_page_says_each_by_its_line(kfp: Kfp, monkeypatch: pytest.MonkeyPatch) -> None:
    server, seen = recorded(kfp, monkeypatch)
    source = stored(server, "rlhf-ppo", "latest", {})
    run_id = submit(server, Submission("run", "new", {}, source))
    task = {"display_name": "train-ppo", "state": "FAILED", "pod_name": "run-1"}
    kfp.script = [{"state": "FAILED", "run_details": {"task_details": [task]}}]
    assert follow(server, run_id, lambda step, state: None).state == "FAILED"
    assert seen == placed(lambda right: right.role == SUBMIT)
