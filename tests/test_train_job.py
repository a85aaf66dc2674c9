"""Training in a TrainJob, on the API server that KUBECONFIG names, with the rights that the shipped Role gives."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import training_worker as worker
from kube_cluster import KubeCluster, Kubelet, find_cluster
from rlhf_ppo import cluster as kube
from rlhf_ppo.cluster import Cluster, ClusterError
from rlhf_ppo.node_settings import NodeSettings
from rlhf_ppo.train_job import TrainJobs, Work, job_name, manifest
from train_job_controller import MACHINE, Controller

RUN = "0b0c9f1e-5a0e-4f6e-9d57-3a1f6f7f3c11"
WORK = Work("digest", RUN, ["python3", "-m", "work"], "/there", [{"name": "A", "value": "1"}], "claim", "/mnt")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeCluster]:
    found = find_cluster(tmp_path_factory.mktemp("cluster"))
    yield found
    found.close()


class Trainer:
    """A step that trains in a TrainJob of two pods, and the cluster around it."""

    def __init__(self, cluster: KubeCluster, controller: Controller, inputs: Path, place: Path) -> None:
        self.cluster, self.controller, self.inputs, self.place = cluster, controller, inputs, place
        self.volume = place / "volume"
        self.volume.mkdir(parents=True)
        self.pod: dict[str, str] = {}
        self.started: list[Any] = []

    def start(self, **changes: Any) -> Any:
        """Begin an attempt, in a pod of its own."""
        self.pod = self.cluster.make_step_pod()
        env = {
            "KUBECONFIG": str(self.cluster.kubeconfig), "RLHF_PPO_VOLUME": "claim", "RUN_ID": RUN,
            "RLHF_PPO_VOLUME_PATH": str(self.volume), **self.pod,
        }  # fmt: skip
        self.started.append(worker.start(self.inputs, self.place, env, **{"node_count": 2, **changes}))
        return self.started[-1]

    def finished(self, process: Any) -> int | None:
        """The exit code of an attempt, once it has ended by itself."""
        self.wait(lambda: not process.is_alive())
        code: int | None = process.exitcode
        return code

    def wait(self, reached: Callable[[], bool]) -> None:
        """Wait until something is so."""
        deadline = time.monotonic() + 120
        while not reached():
            assert time.monotonic() < deadline and self.controller.errors == [], self.report()
            time.sleep(0.05)

    def wait_for_steps(self, process: Any, number: int) -> None:
        """Wait until the job's processes have told of so many PPO steps, through the launcher."""
        self.wait(lambda: worker.told(self.place, "progress") >= number or not process.is_alive())
        assert process.is_alive(), self.report()

    def report(self) -> str:
        """What all have said."""
        files = [*self.place.glob("stderr"), *self.place.glob("events.jsonl"), *self.controller.logs.iterdir()]
        errors = [str(error) for error in self.controller.errors]
        return "\n".join([*errors, *(f"== {file}\n{file.read_text()[-3000:]}" for file in files)])

    def left(self) -> dict[str, list[Any]]:
        """What a run that is over must not leave: jobs, processes, folders on the volume."""
        folders = [path.name for path in (self.volume / "train-jobs").glob("*")]
        return {"jobs": self.controller.jobs(), "processes": self.controller.processes(), "folders": folders}


NOTHING: dict[str, list[Any]] = {"jobs": [], "processes": [], "folders": []}


@pytest.fixture
def trainer(cluster: KubeCluster, training_inputs: Path, tmp_path: Path) -> Iterator[Trainer]:
    search = os.pathsep.join([str(training_inputs), *filter(None, sys.path)])
    image = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": search, "OMP_NUM_THREADS": "1"}
    logs = tmp_path / "logs"
    with Kubelet(cluster, MACHINE, logs), Controller(cluster.admin, cluster.namespace, logs, image) as controller:
        found = Trainer(cluster, controller, training_inputs, tmp_path / "place")
        yield found
        for process in found.started:
            process.kill()


def test_two_nodes_train_what_two_processes_of_one_pod_train(trainer: Trainer, undisturbed_two: Path) -> None:
    assert trainer.finished(trainer.start()) == 0, trainer.report()
    worker.assert_same(trainer.place, undisturbed_two)
    assert worker.told(trainer.place, "progress") == 24
    (job,) = trainer.controller.jobs()
    assert job["metadata"]["name"] == job_name(RUN)
    (owner,) = job["metadata"]["ownerReferences"]
    assert (owner["name"], owner["uid"]) == (trainer.pod["KFP_POD_NAME"], trainer.pod["KFP_POD_UID"])
    assert trainer.left() == {**NOTHING, "jobs": [job]}


def test_a_lost_rank_is_the_steps_error_and_the_retry_goes_on_in_a_new_job(trainer: Trainer) -> None:
    reward = "noisy_reward:is_killed_in_the_second_once"
    assert trainer.finished(trainer.start(reward_model=reward)) == 1
    (failed,) = worker.events(trainer.place, "step_failed")
    name = job_name(RUN)
    assert failed["message"].startswith("ProcessFailed: process 1 of 2 was ended by SIGKILL; that is often for want")
    assert f"pod {name}-node-0-1, of node 1: Error (exit code 1)" in failed["message"]
    assert f"TrainJob {name} failed: FailedJobs: jobset failed" in failed["message"]
    _, _, log = failed["message"].partition(f"the last lines of {name}-node-0-1:\n")
    assert 1 < len(log.splitlines()) <= 21 and "about to run out of memory" in log
    assert trainer.finished(trainer.start(reward_model=reward)) == 0, trainer.report()
    assert worker.events(trainer.place, "resumed")[-1]["done"] >= 2
    assert len({job["metadata"]["uid"] for job in trainer.controller.seen}) == 2


def test_a_cancelled_run_leaves_nothing_but_the_checkpoint_that_it_goes_on_from(
    trainer: Trainer, undisturbed_two: Path
) -> None:
    trainer.controller.image["SLOW_IN_THE_FIRST"] = "0.2"
    process = trainer.start(checkpoint_every=0)
    trainer.wait_for_steps(process, 3)
    os.kill(process.pid, signal.SIGTERM)
    assert trainer.finished(process) == 1
    (failed,) = worker.events(trainer.place, "step_failed")
    assert "goes on from" in failed["message"], trainer.report()
    assert trainer.left() == NOTHING
    trainer.controller.image["SLOW_IN_THE_FIRST"] = "0"
    assert trainer.finished(trainer.start(checkpoint_every=0)) == 0, trainer.report()
    assert worker.told(trainer.place, "resumed") == 1
    worker.assert_same(trainer.place, undisturbed_two)


def test_a_retry_takes_up_the_job_that_it_finds(trainer: Trainer, undisturbed_two: Path) -> None:
    trainer.controller.image["SLOW_IN_THE_FIRST"] = "0.2"
    process = trainer.start()
    trainer.wait_for_steps(process, 3)
    os.kill(process.pid, signal.SIGKILL)
    assert trainer.finished(trainer.start()) == 0, trainer.report()
    worker.assert_same(trainer.place, undisturbed_two)
    assert worker.told(trainer.place, "progress") == 24 and worker.told(trainer.place, "resumed") == 0
    (job,) = trainer.controller.jobs()
    assert len(trainer.controller.seen) == 1
    assert [owner["uid"] for owner in job["metadata"]["ownerReferences"]] == [trainer.pod["KFP_POD_UID"]]


def test_the_job_goes_with_the_pod_of_the_step(trainer: Trainer) -> None:
    trainer.controller.image["SLOW_IN_THE_FIRST"] = "0.2"
    process = trainer.start()
    trainer.wait_for_steps(process, 1)
    os.kill(process.pid, signal.SIGKILL)
    trainer.cluster.delete_pod(trainer.pod["KFP_POD_NAME"])
    trainer.wait(lambda: trainer.controller.jobs() == [] and trainer.controller.processes() == [])


def test_a_suspended_job_is_waited_for_and_a_deleted_one_is_an_error(trainer: Trainer) -> None:
    trainer.controller.suspended.set()
    process = trainer.start()
    trainer.wait(lambda: trainer.controller.jobs() != [])
    trainer.controller.write_condition(job_name(RUN), "Suspended", "Suspended", "waiting for quota")
    trainer.wait(lambda: "waits to be started: waiting for quota" in (trainer.place / "events.jsonl").read_text())
    assert process.is_alive()
    TrainJobs(Cluster(trainer.cluster.admin, trainer.cluster.namespace), job_name(RUN)).delete()
    assert trainer.finished(process) == 1
    (failed,) = worker.events(trainer.place, "step_failed")
    assert failed["message"] == f"ClusterError: TrainJob {job_name(RUN)} was deleted before it ended"


def test_secrets_are_referred_to_and_never_copied(cluster: KubeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = {"secretKeyRef": {"name": "hf-token", "key": "HF_TOKEN", "optional": True}}
    plain = {"MLFLOW_TRACKING_URI": "http://mlflow", "MLFLOW_EXPERIMENT_NAME": "e", "PT_HPU_LAZY_MODE": "0"}
    secret = {"WANDB_API_KEY": "S3cret", "MLFLOW_PROXY": "http://me:S3cret@proxy", "HF_TOKEN": "S3cret"}
    pod = cluster.make_step_pod(env=[{"name": "HF_TOKEN", "valueFrom": reference}])
    other = {"UNKNOWN": "x", "RLHF_PPO_EVENTS": "/here", "HABANA_VISIBLE_DEVICES": "all"}
    other |= {"KUBECONFIG": str(cluster.kubeconfig)}
    for name in [name for name in os.environ if kube.FORWARDED.fullmatch(name)]:
        monkeypatch.delenv(name)
    for name, value in {**plain, **secret, **other, **pod}.items():
        monkeypatch.setenv(name, value)
    found = Cluster.find()
    entries, left_out = found.environment(found.own_pod())
    values = {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in entries}
    assert values == {**plain, "HF_TOKEN": reference}
    assert left_out == ["MLFLOW_PROXY", "WANDB_API_KEY"]


def requests(cluster: Cluster, pod: Any) -> dict[tuple[str, str], Callable[[], Any]]:
    """All that the step asks of a cluster, by the right that it needs for it; each returns something if it gets it."""
    jobs = TrainJobs(cluster, "rights")
    return {
        ("trainjobs", "create"): lambda: jobs._create(lambda: manifest("rights", NodeSettings(node_count=2), WORK)),
        ("trainjobs", "list"): lambda: jobs.find(),
        ("trainjobs", "watch"): lambda: [*jobs._watch(""), True],
        ("trainjobs", "patch"): lambda: jobs._own(),
        ("trainjobs", "delete"): lambda: [jobs.delete(), True],
        ("pods", "get"): lambda: cluster.own_pod(),
        ("pods", "list"): lambda: jobs.pods(),
        ("pods/log", "get"): lambda: "bind the Role" not in jobs.last_lines(pod),
    }


def allowed(asked: dict[tuple[str, str], Callable[[], Any]]) -> set[tuple[str, str]]:
    """The rights of those requests that are not refused."""
    found = set()
    for right, ask in asked.items():
        try:
            if ask():
                found.add(right)
        except ClusterError as error:
            assert f"bind the Role in {kube.ROLE}" in str(error) and "(403)" in str(error)
    return found


def test_every_right_of_the_shipped_role_is_needed_and_no_other(
    cluster: KubeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**cluster.make_step_pod(), "KUBECONFIG": str(cluster.kubeconfig)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("rlhf_ppo.train_job.WATCH", 1)
    labels = {"jobset.sigs.k8s.io/jobset-name": "rights"}
    asked = requests(Cluster.find(), cluster.make_pod("rights-node-0-0", labels))
    granted = {(r, verb) for rule in cluster.rules for r in rule["resources"] for verb in rule["verbs"]}
    assert granted == set(asked)
    admin = TrainJobs(Cluster(cluster.admin, cluster.namespace), "rights")
    try:
        for taken in [None, *sorted(granted)]:
            cluster.allow(without(cluster.rules, taken))
            if taken == ("trainjobs", "create"):
                admin._create(lambda: manifest("rights", NodeSettings(node_count=2), WORK))
            assert allowed(asked) == granted - {taken}
            cluster.remove_finalizers("rights")
            admin.delete()
            cluster.remove_finalizers("rights")
    finally:
        cluster.allow(cluster.rules)


def without(rules: list[dict[str, Any]], right: tuple[str, str] | None) -> list[dict[str, Any]]:
    """``rules`` less one right."""
    resource, verb = right or ("", "")
    left = [
        {**rule, "verbs": [each for each in rule["verbs"] if each != verb or rule["resources"] != [resource]]}
        for rule in rules
    ]
    return [rule for rule in left if rule["verbs"]]
