"""A Kubeflow TrainJob: written down, created or taken up, followed to its end, and deleted."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rlhf_ppo import cluster as kube
from rlhf_ppo.cluster import Cluster, ClusterError
from rlhf_ppo.node_settings import NodeSettings

GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
NODE = "node"
"""The replicated job, and its container, that the runtimes of Kubeflow Trainer train in."""
NAME = "rlhf-ppo"
LONGEST_NAME = 45
"""JobSet adds -node-0-9999 and five random letters, and all of it must fit 63."""
TRAINING = "rlhf-ppo/training"
"""Annotation with the digest of what a job trains."""
DEADLINE_SLACK = 600
"""Seconds beyond node_timeout_seconds, at which training stops by itself, for images to be pulled and models loaded."""
WATCH = 300
"""Seconds after which a watch is begun anew."""
GONE = 600.0
"""Seconds for a deleted job to go."""
LOG_LINES = 20


def job_name(run_id: str) -> str:
    """The name of the TrainJob of the pipeline run ``run_id``, as Kubernetes allows it."""
    plain = re.sub(r"[^a-z0-9-]+", "-", run_id.lower()).strip("-")
    name = f"{NAME}-{plain}"
    if plain == run_id and len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(run_id.encode()).hexdigest()[:8]
    return f"{name[: LONGEST_NAME - 9].rstrip('-')}-{digest}"


def processes_per_pod(node: NodeSettings) -> int:
    """Training processes in each pod: as many as asked for, else one per card, and one on a CPU."""
    return node.node_processes or node.node_accelerator_count or 1


@dataclass(frozen=True)
class Work:
    """What the pods of a TrainJob run: a command, in an environment, with the claim of a volume mounted."""

    training: str
    run_id: str
    command: list[str]
    directory: str
    environment: list[dict[str, Any]]
    claim: str
    mounted_at: str


def manifest(name: str, node: NodeSettings, work: Work) -> dict[str, Any]:
    """The TrainJob ``name`` that runs ``work`` in the pods that ``node`` asks for, owned by this step's pod."""
    labels = {"app.kubernetes.io/name": NAME, "app.kubernetes.io/managed-by": NAME}
    if re.fullmatch(r"[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?", work.run_id):
        labels["rlhf-ppo/run-id"] = work.run_id
    spec: dict[str, Any] = {
        "runtimeRef": {"apiGroup": GROUP, "kind": "ClusterTrainingRuntime", "name": node.node_runtime},
        "trainer": {
            "image": node.node_image,
            "command": work.command,
            "args": [work.directory],
            "numNodes": node.node_count,
            # Kubeflow Trainer would count the node's CPUs where the accelerator isn't called a GPU.
            "numProcPerNode": processes_per_pod(node),
            "env": work.environment,
        },
        "runtimePatches": [{"manager": NAME, "trainingRuntimeSpec": {"template": {"spec": _patch(node, work)}}}],
    }
    resources = _resources(node)
    if resources:
        spec["trainer"]["resourcesPerNode"] = {"limits": resources, "requests": dict(resources)}
    if node.node_timeout_seconds:
        spec["activeDeadlineSeconds"] = node.node_timeout_seconds + DEADLINE_SLACK
    metadata: dict[str, Any] = {"name": name, "labels": labels, "annotations": {TRAINING: work.training}}
    if kube.owner():
        metadata["ownerReferences"] = kube.owner()
    return {"apiVersion": f"{GROUP}/{VERSION}", "kind": "TrainJob", "metadata": metadata, "spec": spec}


def _resources(node: NodeSettings) -> dict[str, Any]:
    """What each pod asks for and may not exceed."""
    asked = {"cpu": node.node_cpu, "memory": node.node_memory, **node.node_resources}
    if node.node_accelerator:
        asked[node.node_accelerator] = node.node_accelerator_count
    return {name: str(quantity) for name, quantity in asked.items() if str(quantity) != "0"}


def _patch(node: NodeSettings, work: Work) -> dict[str, Any]:
    """What the runtime's pods get besides: where they run, the volume, and memory that their processes share."""
    mounts = [{"name": NAME, "mountPath": work.mounted_at}, {"name": f"{NAME}-shm", "mountPath": "/dev/shm"}]
    pod: dict[str, Any] = {
        "containers": [{"name": NODE, "volumeMounts": mounts}],
        "volumes": [
            {"name": NAME, "persistentVolumeClaim": {"claimName": work.claim}},
            {"name": f"{NAME}-shm", "emptyDir": {"medium": "Memory"}},
        ],
    }
    if node.node_selector:
        pod["nodeSelector"] = node.node_selector
    if node.node_tolerations:
        pod["tolerations"] = node.node_tolerations
    return {"replicatedJobs": [{"name": NODE, "template": {"spec": {"template": {"spec": pod}}}}]}


def condition(job: dict[str, Any], kind: str) -> dict[str, Any] | None:
    """The condition ``kind`` of a job, where it is true."""
    found = (job.get("status") or {}).get("conditions") or []
    return next((each for each in found if each["type"] == kind and each["status"] == "True"), None)


def has_ended(job: dict[str, Any]) -> bool:
    """Whether a job is complete or has failed."""
    return bool(condition(job, "Complete") or condition(job, "Failed"))


def directory_of(job: dict[str, Any]) -> str:
    """The directory that a job's command works in."""
    return str(job["spec"]["trainer"]["args"][-1])


class TrainJobs:
    """The TrainJob ``name`` in ``cluster``, whether there is one or not."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster, self.name = cluster, name

    @cached_property
    def _objects(self) -> Any:
        from kubernetes.client import CustomObjectsApi

        return CustomObjectsApi(self.cluster.api_client)

    @cached_property
    def _core(self) -> Any:
        from kubernetes.client import CoreV1Api

        return CoreV1Api(self.cluster.api_client)

    @property
    def _all(self) -> tuple[str, str, str, str]:
        return GROUP, VERSION, self.cluster.namespace, PLURAL

    @property
    def _only(self) -> dict[str, Any]:
        return {"field_selector": f"metadata.name={self.name}"}

    def find(self) -> tuple[dict[str, Any] | None, str]:
        """The job, if it is there, and the version of the list, from which a watch goes on."""
        listing = self._objects.list_namespaced_custom_object
        found = self.cluster.ask(f"list TrainJob {self.name}", listing, *self._all, **self._only)
        return next(iter(found["items"]), None), found["metadata"]["resourceVersion"]

    def begin(
        self, training: str, usable: Callable[[dict[str, Any]], bool], make: Callable[[], dict[str, Any]]
    ) -> tuple[dict[str, Any], bool]:
        """The job that trains ``training``, and whether it was there: one that is ``usable`` is taken up and goes with
        this step's pod from then on; another that has ended is deleted, and what ``make`` returns is created.
        """
        while True:
            job, _ = self.find()
            if job is not None and not job["metadata"].get("deletionTimestamp"):
                same = job["metadata"].get("annotations", {}).get(TRAINING) == training
                if same and not condition(job, "Failed") and usable(job):
                    if self._own():
                        return job, True
                    continue
                if not same and not has_ended(job):
                    raise ClusterError(f"TrainJob {self.name} is active and trains something else: delete it first")
                self.delete()
            if job is not None and not self.wait_until_gone(GONE):
                raise ClusterError(
                    f"TrainJob {self.name} is being deleted and still there after {GONE:.0f} seconds: "
                    f"kubectl describe trainjob {self.name}"
                )
            made = self._create(make)
            if made is not None:
                return made, False

    def _create(self, make: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """The new job; None where there is one of this name. Raises ClusterError where Kubeflow Trainer is too old."""
        create, doing = self._objects.create_namespaced_custom_object, f"create TrainJob {self.name}"
        made: dict[str, Any] | None = self.cluster.ask(doing, create, *self._all, make(), unless=(409,))
        # What its CRD doesn't know the API server leaves out and says nothing: pods without the volume.
        if made is not None and not made["spec"].get("runtimePatches"):
            self.delete()
            raise ClusterError(
                f"TrainJob {self.name}: this cluster's Kubeflow Trainer knows no runtimePatches: node_count needs "
                "Kubeflow Trainer 2.2 or later"
            )
        return made

    def _own(self) -> bool:
        """Let the job go with this step's pod; whether it is still there."""
        owner = kube.owner()
        if not owner:
            return True
        patch = self._objects.patch_namespaced_custom_object
        change = {"metadata": {"ownerReferences": owner}}  # A merge patch: the list is replaced.
        doing = f"patch TrainJob {self.name}"
        return self.cluster.ask(doing, patch, *self._all, self.name, change, unless=(404,)) is not None

    def delete(self) -> None:
        """Delete the job, its pods first."""
        delete, doing = self._objects.delete_namespaced_custom_object, f"delete TrainJob {self.name}"
        self.cluster.ask(doing, delete, *self._all, self.name, propagation_policy="Foreground", unless=(404,))

    def wait_until_gone(self, seconds: float) -> bool:
        """Whether the job was gone within ``seconds``."""
        deadline = time.monotonic() + seconds
        while self.find()[0] is not None:
            if time.monotonic() > deadline:
                return False
            time.sleep(min(kube.FIRST_PAUSE, seconds))
        return True

    def follow(self, uid: str, on_suspended: Callable[[str], None]) -> dict[str, Any]:
        """The job ``uid`` once it has ended. Raises ClusterError where somebody deletes it."""
        suspended = False
        for job in self._states():
            if job is None or job["metadata"]["uid"] != uid:
                raise ClusterError(f"TrainJob {self.name} was deleted before it ended")
            if has_ended(job):
                return job
            waiting = condition(job, "Suspended")
            if waiting and not suspended:
                on_suspended(waiting["message"])
            suspended = bool(waiting)
        raise AssertionError("the states of a job have no end")

    def _states(self) -> Iterator[dict[str, Any] | None]:
        """The job, as it is and after every change; None once it is gone. A watch that ends is begun anew."""
        pause = kube.FIRST_PAUSE
        while True:
            job, version = self.find()
            yield job
            try:
                for event in self._watch(version):
                    pause = kube.FIRST_PAUSE
                    yield None if event["type"] == "DELETED" else event["object"]
            except TemporaryTrouble:
                pause = min(2 * pause, kube.LONGEST_PAUSE)
            time.sleep(pause)

    def _watch(self, version: str) -> Iterator[dict[str, Any]]:
        """Changes after ``version``. Raises TemporaryTrouble for what passes, and ClusterError for what doesn't."""
        from kubernetes import watch
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        limits = {"timeout_seconds": WATCH, "_request_timeout": (kube.ANSWER[0], WATCH + kube.ANSWER[1])}
        listing = self._objects.list_namespaced_custom_object
        try:
            yield from watch.Watch().stream(listing, *self._all, **self._only, resource_version=version, **limits)
        except (ApiException, HTTPError, ValueError) as error:
            # 410: the version is too old by now. ValueError: a line that was cut off.
            if not isinstance(error, ApiException) or error.status == 410 or kube.temporary(error):
                raise TemporaryTrouble from error
            raise self.cluster.refused(f"watch TrainJob {self.name}", error) from error

    def pods(self) -> dict[int, Any]:
        """The job's pods by the number of the node; none where they may not be listed."""
        selector = f"jobset.sigs.k8s.io/jobset-name={self.name}"
        listing, doing = self._core.list_namespaced_pod, f"list the pods of TrainJob {self.name}"
        found = self.cluster.ask(doing, listing, self.cluster.namespace, label_selector=selector, unless=(403,))
        numbered = [
            (int(pod.metadata.labels.get("batch.kubernetes.io/job-completion-index", "0")), pod)
            for pod in (found.items if found else [])
        ]
        return dict(sorted(numbered, key=lambda item: item[0]))

    def last_lines(self, pod: Any) -> str:
        """The end of a pod's log, or why it can't be read."""
        read, name = self._core.read_namespaced_pod_log, pod.metadata.name
        doing = f"read the log of {name}"
        only: dict[str, Any] = {"container": NODE, "tail_lines": LOG_LINES}
        try:
            text = self.cluster.ask(doing, read, name, self.cluster.namespace, patience=0, **only)
        except ClusterError as error:
            return str(error)
        return f"the last lines of {name}:\n{text.rstrip()}" if text.strip() else f"{name} has logged nothing"


class TemporaryTrouble(Exception):
    """A watch ended in a way that a new one cures."""


def end_of(pod: Any) -> str:
    """How a pod ended badly, e.g. "OOMKilled (exit code 137)"; empty where it didn't."""
    if pod.status.reason:
        return " ".join(filter(None, (pod.status.reason, pod.status.message)))
    for container in pod.status.container_statuses or []:
        ended = container.state.terminated or (container.last_state and container.last_state.terminated)
        if container.name == NODE and ended and ended.exit_code:
            return f"{ended.reason or 'Error'} (exit code {ended.exit_code})"
    return ""
