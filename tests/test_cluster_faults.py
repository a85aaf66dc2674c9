"""What a server does not do on demand: it is away, busy, forgetful or refuses, as a stand-in plays it."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from rlhf_ppo import cluster as kube
from rlhf_ppo.cluster import Cluster, ClusterError
from rlhf_ppo.errors import InputError
from rlhf_ppo.node_settings import NodeSettings
from rlhf_ppo.train_job import TrainJobs, Work, job_name, manifest

JOBS = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/here/trainjobs"
WORK = Work("digest", "run", ["python3", "-m", "work"], "/there", [], "claim", "/mnt")


class Server(ThreadingHTTPServer):
    """One TrainJob, and faults: for each kind of request what is answered before the truth is.

    A status is answered as an error; a list is what a watch sends before it is cut off.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: dict[str, list[Any]] = {}
        self.asked: list[str] = []
        self.job: dict[str, Any] | None = None
        self.version = 7
        # What the CRD lacks, of a TrainJob's spec
        self.unknown: set[str] = set()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def _kind(self) -> tuple[str, dict[str, list[str]]]:
        address = urlsplit(self.path)
        query = parse_qs(address.query)
        if address.path.endswith("/log"):
            return "log", query
        kind = {"POST": "create", "DELETE": "delete", "PATCH": "patch"}.get(self.command, "list")
        return ("watch" if query.get("watch") == ["True"] else kind), query

    def _answer(self) -> None:
        kind, query = self._kind()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server = self.server
        server.asked.append(kind)
        fault = server.faults.get(kind, []).pop(0) if server.faults.get(kind) else None
        if isinstance(fault, tuple):
            self._send(fault[0], {"kind": "Status", "code": fault[0], "message": fault[1]})
        elif kind == "watch":
            self._watch(fault if fault is not None else [event("MODIFIED", job("Complete"))], query)
        elif kind == "create":
            server.job = server.job or {**json.loads(body), "status": {}}
            server.job["metadata"] |= {"uid": "u", "resourceVersion": "3"}
            server.job["spec"] = {
                name: value for name, value in server.job["spec"].items() if name not in server.unknown
            }
            self._send(201, server.job)
        elif kind == "list":
            items = [server.job] if server.job else []
            self._send(200, {"metadata": {"resourceVersion": str(server.version)}, "items": items})
        else:
            self._send(200, {})

    do_GET = do_POST = do_PATCH = do_DELETE = _answer

    def _watch(self, lines: list[bytes], query: dict[str, list[str]]) -> None:
        assert query["resourceVersion"] == [str(self.server.version)]
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for line in lines:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
        if not lines or lines[-1].endswith(b"\n"):
            self.wfile.write(b"0\r\n\r\n")
        self.close_connection = True

    def _send(self, code: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *given: Any) -> None: ...


def job(*conditions: str) -> dict[str, Any]:
    told = [{"type": kind, "status": "True", "reason": "R", "message": "m"} for kind in conditions]
    return {"metadata": {"name": "j", "uid": "u", "resourceVersion": "8"}, "status": {"conditions": told}}


def event(kind: str, value: dict[str, Any]) -> bytes:
    return json.dumps({"type": kind, "object": value}).encode() + b"\n"


GONE = event("ERROR", {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"})


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    found = Server()
    threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(kube, "FIRST_PAUSE", 0.01)
    use(found.server_port, tmp_path, monkeypatch)
    yield found
    found.shutdown()
    found.server_close()


def use(port: int, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let KUBECONFIG name a server on ``port``."""
    clusters = [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}}]
    contexts = [{"name": "c", "context": {"cluster": "c", "user": "u", "namespace": "here"}}]
    users = [{"name": "u", "user": {"token": "t"}}]
    config = {"clusters": clusters, "contexts": contexts, "users": users, "current-context": "c"}
    (place / "conf").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(place / "conf"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)


def jobs() -> TrainJobs:
    return TrainJobs(Cluster.find(), "j")


def make() -> dict[str, Any]:
    return manifest("j", NodeSettings(node_count=2), WORK)


def begin() -> tuple[dict[str, Any], bool]:
    return jobs().begin("digest", lambda found: True, make)


def test_a_server_that_is_away_or_busy_for_a_while_is_asked_again(server: Server) -> None:
    server.faults = {"create": [(503, "starting"), (503, "starting")], "list": [(500, "etcd"), (429, "too many")]}
    made, found = begin()
    assert (made["metadata"]["uid"], found) == ("u", False)
    assert server.asked == ["list"] * 3 + ["create"] * 3


def test_a_job_that_was_created_though_the_answer_was_an_error_is_taken_up(server: Server) -> None:
    server.job = make()
    server.job["metadata"] |= {"uid": "u"}
    items = server.job
    server.job, server.faults = None, {"create": [(503, "timeout"), (409, "already exists")]}
    created = threading.Thread(target=lambda: _appear(server, items))
    created.start()
    made, found = begin()
    created.join()
    assert found and made["metadata"]["uid"] == "u"


def _appear(server: Server, value: dict[str, Any]) -> None:
    while "create" not in server.asked:
        time.sleep(0.001)
    server.job = value


def test_a_server_that_stays_away_ends_the_step_after_some_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        use(unused.getsockname()[1], tmp_path, monkeypatch)
        monkeypatch.setattr(kube, "FIRST_PAUSE", 0.01)
        monkeypatch.setattr(kube, "PATIENCE", 0.3)
        started = time.monotonic()
        with pytest.raises(ClusterError, match="list TrainJob j: the cluster does not answer: .*refused"):
            begin()
        assert 0.1 < time.monotonic() - started < 5


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param([], id="closed"),
        pytest.param([event("MODIFIED", job("Suspended")), b'{"type": "MODI'], id="cut off in a line"),
        pytest.param([GONE], id="too old"),
        pytest.param((410, "too old resource version"), id="too old at once"),
        pytest.param((503, "starting"), id="away"),
    ],
)
def test_a_watch_that_ends_is_begun_anew(server: Server, fault: Any) -> None:
    server.job, server.faults = job(), {"watch": [fault, fault]}
    told: list[str] = []
    assert jobs().follow("u", told.append)["status"]["conditions"][0]["type"] == "Complete"
    assert server.asked == ["list", "watch"] * 3
    assert len(told) <= 2


def test_what_happened_while_nobody_watched_is_seen(server: Server) -> None:
    server.job, server.faults = job("Failed"), {}
    assert jobs().follow("u", print)["status"]["conditions"][0]["type"] == "Failed"
    assert server.asked == ["list"]


@pytest.mark.parametrize(
    ("kind", "fault", "message"),
    [
        (
            "list",
            (403, "trainjobs is forbidden"),
            "list TrainJob j: trainjobs is forbidden .403.: bind the Role",
        ),
        ("watch", (403, "trainjobs is forbidden"), "watch TrainJob j: .*bind the Role"),
        ("create", (404, "page not found"), "install Kubeflow Trainer v2"),
        ("create", (401, "Unauthorized"), "Unauthorized .401.: the token"),
        ("create", (422, "spec.trainer.numNodes: Invalid value"), "create TrainJob j: spec.trainer.numNodes: Invalid"),
        (
            "create",
            (403, "admission webhook denied the request: ClusterTrainingRuntime not found"),
            "denied the request: ClusterTrainingRuntime not found .403.: node_runtime names the runtime",
        ),
    ],
)
def test_a_refusal_is_said_at_once_with_what_helps(
    server: Server, kind: str, fault: tuple[int, str], message: str
) -> None:
    server.faults = {kind: [fault]}
    with pytest.raises(ClusterError, match=message):
        begin()
        jobs().follow("u", print)
    assert server.asked.count(kind) == 1


def test_another_trainings_job_is_left_alone_while_it_is_active(server: Server) -> None:
    begin()
    with pytest.raises(ClusterError, match="TrainJob j is active and trains something else"):
        jobs().begin("another", lambda found: True, make)
    assert "delete" not in server.asked


def test_a_name_fits_what_is_added_to_it_and_differs_for_every_run() -> None:
    run = "0b0c9f1e-5a0e-4f6e-9d57-3a1f6f7f3c11"
    assert job_name(run) == f"rlhf-ppo-{run}"
    long = [job_name(f"{run}-{number}-and-more") for number in range(3)]
    assert len(set(long)) == 3 and {len(name) for name in long} == {45}
    assert len({job_name("My_Run"), job_name("my-run"), job_name("my.run")}) == 3
    assert all(len(name + "-node-0-9999-abcde") <= 63 for name in [*long, job_name(run)])


def test_the_spec_is_what_kubeflow_trainer_reads() -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models")
    node = NodeSettings(
        node_count=2, node_accelerator="habana.ai/gaudi", node_accelerator_count=8, node_cpu="90", node_memory="600Gi",
        node_selector={"pool": "gaudi2"}, node_tolerations=[{"key": "habana.ai/gaudi", "operator": "Exists"}],
        node_resources={"hugepages-2Mi": "42000Mi"}, node_timeout_seconds=3600, node_runtime="torch",
    )  # fmt: skip
    written = manifest("j", node, WORK)
    assert models.TrainerV1alpha1TrainJob.from_dict(written).to_dict() == written
    trainer = written["spec"]["trainer"]
    resources = {"cpu": "90", "memory": "600Gi", "hugepages-2Mi": "42000Mi", "habana.ai/gaudi": "8"}
    assert trainer["resourcesPerNode"] == {"limits": resources, "requests": resources}
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 8)
    assert written["spec"]["activeDeadlineSeconds"] == 3600 + 600
    (patch,) = written["spec"]["runtimePatches"]
    pod = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"pool": "gaudi2"} and pod["tolerations"][0]["key"] == "habana.ai/gaudi"
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "claim"}
    assert pod["containers"][0]["volumeMounts"][0] == {"name": "rlhf-ppo", "mountPath": "/mnt"}
    assert "resourcesPerNode" not in make()["spec"]["trainer"]


def test_a_kubeflow_trainer_before_2_2_is_named_and_nothing_stays(server: Server) -> None:
    server.unknown = {"runtimePatches"}
    with pytest.raises(ClusterError, match="knows no runtimePatches: node_count needs Kubeflow Trainer 2.2 or later"):
        begin()
    assert server.asked[-1] == "delete"


def test_outside_a_cluster_node_count_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(InputError, match="node_count needs a cluster"):
        Cluster.find()


def test_node_count_needs_a_volume(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from rlhf_ppo.parameters import decode
    from rlhf_ppo.ppo_training.train import train_on_cards

    needed = {"model_name": "m", "query_dataset": "d", "reward_model": "a:b", "node_count": 2}
    monkeypatch.delenv("RLHF_PPO_VOLUME", raising=False)
    with pytest.raises(InputError, match="rlhf-ppo compile --volume"):
        train_on_cards(decode(needed).to_json(), tmp_path, tmp_path, tmp_path / "p", tmp_path / "h", "run")
