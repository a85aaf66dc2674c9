"""A stand-in for Kubeflow Trainer, the kubelets and the garbage collector: TrainJobs become real torchrun processes.

It reads TrainJobs from a real API server and writes what the real ones write there: pods with their labels and states,
conditions, and the end of what is deleted. The volume is a directory of this machine.
"""

from __future__ import annotations

import base64
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kubernetes import client
from kubernetes.client.exceptions import ApiException

import training_worker as worker

ALL = ("trainer.kubeflow.org", "v1alpha1")
GRACE = 20.0
MACHINE = "train-job-test"
"""The node that the pods are on: none that runs anything."""


@dataclass
class Running:
    """A job and the processes of its nodes."""

    job: dict[str, Any]
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    ended: bool = False


class Controller:
    """Inside the block the TrainJobs of a namespace run, with ``image`` as what else their environment holds."""

    def __init__(self, api_client: Any, namespace: str, logs: Path, image: dict[str, str]) -> None:
        self.objects, self.core = client.CustomObjectsApi(api_client), client.CoreV1Api(api_client)
        self.namespace, self.logs, self.image = namespace, logs, image
        self.running: dict[str, Running] = {}
        self.seen: list[dict[str, Any]] = []
        self.errors: list[BaseException] = []
        self.suspended = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="controller", daemon=True)

    def __enter__(self) -> Controller:
        self.logs.mkdir(exist_ok=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        for found in self.running.values():
            self._end(found, signal.SIGKILL)
            self._delete_pods(found)
        for job in self.jobs():
            name = job["metadata"]["name"]
            self.objects.delete_namespaced_custom_object(*ALL, self.namespace, "trainjobs", name)
            if job["metadata"].get("finalizers"):
                self._delete(job["metadata"]["uid"], job)
        assert self.errors == []

    def processes(self) -> list[int]:
        """The torchrun processes that are alive."""
        return [p.pid for found in self.running.values() for p in found.processes if p.poll() is None]

    def jobs(self) -> list[dict[str, Any]]:
        """The TrainJobs that are there."""
        found: list[dict[str, Any]] = self.objects.list_namespaced_custom_object(*ALL, self.namespace, "trainjobs")[
            "items"
        ]
        return found

    def _run(self) -> None:
        while not self._stop.wait(0.1):
            try:
                self._look()
            except ApiException as error:
                if error.status not in (404, 409):
                    self.errors.append(error)
            except BaseException as error:
                self.errors.append(error)
                raise

    def _look(self) -> None:
        jobs = {job["metadata"]["uid"]: job for job in self.jobs()}
        for uid, job in jobs.items():
            if job["metadata"].get("deletionTimestamp"):
                self._delete(uid, job)
            elif self._lost_its_owner(job):
                self.objects.delete_namespaced_custom_object(*ALL, self.namespace, "trainjobs", job["metadata"]["name"])
            elif uid not in self.running:
                if not self.suspended.is_set():
                    self.running[uid] = self._start(job)
            elif not self.running[uid].ended:
                self._observe(self.running[uid])
        for uid in self.running.keys() - jobs.keys():
            self._end(self.running.pop(uid), signal.SIGTERM)

    def _start(self, job: dict[str, Any]) -> Running:
        self.seen.append(job)
        trainer, pod = job["spec"]["trainer"], _pod_patch(job)
        environment = {entry["name"]: self._value(entry) for entry in trainer["env"]}
        # The volume is where the job mounts it, as the processes see it.
        mounts = {each["mountPath"]: each["name"] for each in pod["containers"][0]["volumeMounts"]}
        assert any(v["name"] == mounts[environment["RLHF_PPO_VOLUME_PATH"]] for v in pod["volumes"])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        found = Running(job)
        for number in range(trainer["numNodes"]):
            contract = {
                "PET_NNODES": str(trainer["numNodes"]), "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
                "PET_NODE_RANK": str(number), "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port),
            }  # fmt: skip
            command = [sys.executable, *trainer["command"][1:], *trainer["args"]]
            name = f"{job['metadata']['name']}-node-0-{number}"
            self._make_pod(job, name, number)
            with (self.logs / name).open("wb") as log:
                found.processes.append(
                    subprocess.Popen(
                        command,
                        env={**self.image, **contract, **environment},
                        stdout=log,
                        stderr=log,
                        cwd=self.logs,
                        start_new_session=True,
                    )  # fmt: skip
                )
        return found

    def _value(self, entry: dict[str, Any]) -> str:
        if "valueFrom" not in entry:
            return str(entry["value"])
        reference = entry["valueFrom"]["secretKeyRef"]
        secret = self.core.read_namespaced_secret(reference["name"], self.namespace)
        return base64.b64decode(secret.data[reference["key"]]).decode()

    def _make_pod(self, job: dict[str, Any], name: str, number: int) -> None:
        labels = {
            "jobset.sigs.k8s.io/jobset-name": job["metadata"]["name"],
            "jobset.sigs.k8s.io/replicatedjob-name": "node",
            "batch.kubernetes.io/job-completion-index": str(number),
        }
        container = {"name": "node", "image": job["spec"]["trainer"]["image"]}
        pod = {
            "metadata": {"name": name, "labels": labels, "ownerReferences": [_owned_by(job)]},
            "spec": {"containers": [container], "nodeName": MACHINE, "restartPolicy": "Never"},
        }
        self.core.create_namespaced_pod(self.namespace, pod)
        self._tell_state(name, "Running", {"running": {}})

    def _tell_state(self, name: str, phase: str, state: dict[str, Any]) -> None:
        status = {"name": "node", "ready": False, "restartCount": 0, "image": "x", "imageID": "x", "state": state}
        self.core.patch_namespaced_pod_status(
            name, self.namespace, {"status": {"phase": phase, "containerStatuses": [status]}}
        )

    def _observe(self, found: Running) -> None:
        codes = [process.poll() for process in found.processes]
        if any(codes):
            # JobSet deletes the others; those that notice by themselves are given a moment.
            time.sleep(1)
            self._end(found, signal.SIGTERM)
            self._tell_ends(found)
            self._conclude(found, "Failed", "FailedJobs", "jobset failed due to one or more job failures")
        elif all(code == 0 for code in codes):
            self._tell_ends(found)
            self._conclude(found, "Complete", "AllJobsCompleted", "jobset completed successfully")

    def _tell_ends(self, found: Running) -> None:
        for number, process in enumerate(found.processes):
            code = process.poll()
            if code is not None:
                how = {"exitCode": code if code >= 0 else 128 - code, "reason": "Error" if code else "Completed"}
                name = f"{found.job['metadata']['name']}-node-0-{number}"
                self._tell_state(name, "Failed" if code else "Succeeded", {"terminated": how})

    def _conclude(self, found: Running, kind: str, reason: str, message: str) -> None:
        found.ended = True
        self.write_condition(found.job["metadata"]["name"], kind, reason, message)

    def write_condition(self, name: str, kind: str, reason: str, message: str) -> None:
        """Write a condition of the TrainJob ``name``."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        told = {"type": kind, "status": "True", "reason": reason, "message": message, "lastTransitionTime": now}
        change = {"status": {"conditions": [told]}}
        self.objects.patch_namespaced_custom_object_status(*ALL, self.namespace, "trainjobs", name, change)

    def _lost_its_owner(self, job: dict[str, Any]) -> bool:
        """What the garbage collector asks."""
        owners = job["metadata"].get("ownerReferences", [])
        pods = {pod.metadata.uid for pod in self.core.list_namespaced_pod(self.namespace).items}
        return bool(owners) and not any(owner["uid"] in pods for owner in owners)

    def _delete(self, uid: str, job: dict[str, Any]) -> None:
        """A deletion in the foreground: the pods, then the job."""
        if uid in self.running:
            found = self.running.pop(uid)
            self._end(found, signal.SIGTERM)
            self._delete_pods(found)
        change = {"metadata": {"finalizers": None}}
        self.objects.patch_namespaced_custom_object(*ALL, self.namespace, "trainjobs", job["metadata"]["name"], change)

    def _end(self, found: Running, number: signal.Signals) -> None:
        """End the processes, as a kubelet does."""
        alive = [process for process in found.processes if process.poll() is None]
        for process in alive:
            if number == signal.SIGKILL:
                _kill_all(process.pid)
            os.kill(process.pid, number)
        deadline = time.monotonic() + GRACE
        for process in alive:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _kill_all(process.pid)
                process.wait()

    def _delete_pods(self, found: Running) -> None:
        for number in range(len(found.processes)):
            try:
                name = f"{found.job['metadata']['name']}-node-0-{number}"
                self.core.delete_namespaced_pod(name, self.namespace, grace_period_seconds=0)
            except ApiException as error:
                if error.status != 404:
                    raise


def _kill_all(pid: int) -> None:
    """A pod's processes end together: torchrun's are in sessions of their own."""
    for each in (*worker.children(pid), pid):
        try:
            os.kill(each, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _pod_patch(job: dict[str, Any]) -> dict[str, Any]:
    """What the job adds to the runtime's pods."""
    (patch,) = job["spec"]["runtimePatches"]
    (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    found: dict[str, Any] = replicated["template"]["spec"]["template"]["spec"]
    return found


def _owned_by(job: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": job["apiVersion"], "kind": "TrainJob", "name": job["metadata"]["name"],
        "uid": job["metadata"]["uid"], "controller": True, "blockOwnerDeletion": True,
    }  # fmt: skip
