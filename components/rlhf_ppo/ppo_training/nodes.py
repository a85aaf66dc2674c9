"""Training in the pods of a Kubeflow TrainJob: what they read and write on the volume, and what becomes of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rlhf_ppo.artifacts import complete_directory, digest_of, write_json, write_whole
from rlhf_ppo.cluster import Cluster, ClusterError
from rlhf_ppo.errors import InputError
from rlhf_ppo.events import EVENTS_VARIABLE, emit
from rlhf_ppo.launch import ARGUMENTS, RESULT, ProcessFailed, error_of, first_failure
from rlhf_ppo.parameters import RunSettings
from rlhf_ppo.ppo_training.keep import Stopped
from rlhf_ppo.ppo_training.policy_files import TRAINING
from rlhf_ppo.provenance import provenance
from rlhf_ppo.train_job import (
    TrainJobs,
    Work,
    condition,
    directory_of,
    end_of,
    has_ended,
    job_name,
    manifest,
    processes_per_pod,
)
from rlhf_ppo.volume import CHECKPOINTS_VARIABLE, CLAIM_VARIABLE, PATH_VARIABLE, VOLUME_PATH

COMMAND = ["python3", "-m", "rlhf_ppo.launch", "rlhf_ppo.ppo_training"]
EVENTS = "events.jsonl"
RELAY_SECONDS = 0.5
FAREWELL = 20.0
"""Seconds in which a job that is cancelled may write its checkpoint; Kubernetes gives a pod 30 for everything."""
KINDS: dict[str, type[Exception]] = {kind.__name__: kind for kind in (InputError, Stopped)}


class _Cancelled(BaseException):
    """SIGTERM came; not an Exception, so that nothing takes it for a fault of the cluster."""


class NodeTraining:
    """One run's training in a TrainJob, and its folder on the volume."""

    def __init__(self, config: str, run_id: str, prompts: Path, reference: Path, digests: dict[str, Any]) -> None:
        self.config, self.run_id, self.digests = config, run_id, digests
        self.node = RunSettings.from_json(config).node
        self.claim, self.volume = _volume()
        self.cluster = Cluster.find()
        self.jobs = TrainJobs(self.cluster, job_name(run_id))
        self.sources = {"prompts": prompts, "reference": reference}
        self.training = digest_of([config, digests])
        self.place = self.volume / "train-jobs" / self.jobs.name
        self.processes = self.node.node_count * processes_per_pod(self.node)

    def run(self) -> Path:
        """Create the job or take it up, follow it, and return the directory with its results.

        Raises what training raised; Stopped after SIGTERM, which deletes the job; ClusterError.
        """
        try:
            with _cancellable():
                job, found = self.jobs.begin(self.training, self._usable, self._make)
                directory = Path(directory_of(job))
                said = f"TrainJob {self.jobs.name} of {self.node.node_count} pods is "
                emit("note", step="train_ppo", message=said + ("there and taken up" if found else "created"))
                with _relayed(directory):
                    job = self.jobs.follow(job["metadata"]["uid"], self._tell_of_suspension)
        except _Cancelled:
            raise self._stopped() from None
        failed = condition(job, "Failed")
        if failed:
            raise self._failure(directory, failed)
        if not (directory / RESULT).exists():
            raise ProcessFailed(
                f"TrainJob {self.jobs.name} is complete and left no {RESULT} in {directory}: is it on the same volume?"
            )
        return directory

    def _usable(self, job: dict[str, Any]) -> bool:
        """Whether the pods of a job that is there have what they need, or have left their results."""
        return (Path(directory_of(job)) / (RESULT if has_ended(job) else ARGUMENTS)).exists()

    def _make(self) -> dict[str, Any]:
        """The new job. It works in a directory of its own: pods of an earlier one may still be writing into theirs."""
        inputs = self._inputs()
        for earlier in self.place.glob("attempt-*"):
            shutil.rmtree(earlier, ignore_errors=True)
        directory = self.place / f"attempt-{uuid.uuid4().hex[:8]}"
        directory.mkdir(parents=True)
        paths = {name: inputs / name for name in self.sources} | {n: directory / n for n in ("policy", "history")}
        arguments = {"config": self.config, "run_id": self.run_id, **{name: str(path) for name, path in paths.items()}}
        write_json(directory / ARGUMENTS, arguments)
        environment = self._environment(directory)
        work = Work(
            self.training, self.run_id, COMMAND, str(directory), environment, self.claim, str(self.volume)
        )  # fmt: skip
        return manifest(self.jobs.name, self.node, work)

    def _inputs(self) -> Path:
        """The prompts and the reference on the volume, complete; copied where an earlier attempt hasn't done it."""
        inputs = self.place / f"inputs-{self.training[:16]}"
        if not inputs.exists() or None in self.digests.values():
            with complete_directory(inputs) as unfinished:
                for name, source in self.sources.items():
                    shutil.copytree(source, unfinished / name)
        return inputs

    def _environment(self, directory: Path) -> list[dict[str, Any]]:
        """What the job's processes find in their environment."""
        pod = self.cluster.own_pod()
        if pod is None:
            self._warn("this step's pod can't be read (that needs KFP_POD_NAME and the right to get pods): its "
                       "secrets do not reach the TrainJob")  # fmt: skip
        entries, left_out = self.cluster.environment(pod)
        if left_out:
            self._warn(
                f"{', '.join(left_out)} may be a credential and does not reach the TrainJob: put it into a Kubernetes "
                "secret that the step's environment refers to"
            )
        own = {EVENTS_VARIABLE: str(directory / EVENTS), PATH_VARIABLE: str(self.volume), "PYTHONUNBUFFERED": "1"}
        own[CHECKPOINTS_VARIABLE] = os.environ.get(CHECKPOINTS_VARIABLE) or str(self.volume / "checkpoints")
        if not self.node.node_accelerator:
            own["ACCELERATE_USE_CPU"] = "true"  # It connects processes on CPUs only where it is told.
        return [
            *(entry for entry in entries if entry["name"] not in own),
            *({"name": name, "value": value} for name, value in own.items()),
        ]

    def _tell_of_suspension(self, message: str) -> None:
        emit("note", step="train_ppo", message=f"TrainJob {self.jobs.name} waits to be started: {message}")

    @staticmethod
    def _warn(message: str) -> None:
        emit("warning", step="train_ppo", message=message)

    def _stopped(self) -> Stopped:
        """Delete the job, and return what to raise; its processes write a checkpoint where the time suffices."""
        self.cluster.patience = FAREWELL / 4
        try:
            self.jobs.delete()
            gone = self.jobs.wait_until_gone(FAREWELL)
        except ClusterError as error:
            return Stopped(f"stopped by SIGTERM; TrainJob {self.jobs.name} could not be deleted: {error}")
        if not gone:
            return Stopped(f"stopped by SIGTERM; TrainJob {self.jobs.name} was deleted, and its pods are still ending")
        said = [error_of(first_failure(each), self.processes, KINDS) for each in self.place.glob("attempt-*")]
        shutil.rmtree(self.place, ignore_errors=True)
        stopped = next((each for each in said if isinstance(each, Stopped)), None)
        return stopped or Stopped(
            f"stopped by SIGTERM; TrainJob {self.jobs.name} was deleted before it wrote a new checkpoint"
        )

    def _failure(self, directory: Path, failed: dict[str, Any]) -> Exception:
        """What failed first: as its process said it, or as its pod ended, with the last lines of its log."""
        failure = first_failure(directory)
        error = error_of(failure, self.processes, KINDS)
        if error is not None and isinstance(error, tuple(KINDS.values())):
            return error
        pods = self.jobs.pods()
        if failure is None:
            number = next((number for number, pod in pods.items() if end_of(pod)), None)
        else:
            number = failure["rank"] // processes_per_pod(self.node)
        pod = pods.get(number) if number is not None else None
        said = [str(error)] if error else []
        if pod is not None and end_of(pod):
            said.append(f"pod {pod.metadata.name}, of node {number}: {end_of(pod)}")
        said.append(f"TrainJob {self.jobs.name} failed: {failed['reason']}: {failed['message']}")
        return ProcessFailed("; ".join(said) + (f"\n{self.jobs.last_lines(pod)}" if pod is not None else ""))

    def finish(self, directory: Path, policy: Path, history: Path) -> dict[str, float]:
        """Copy the results to the step's outputs, clear the volume of the job's folder, and return the metrics."""
        with complete_directory(policy) as unfinished:
            shutil.copytree(directory / "policy", unfinished, dirs_exist_ok=True)
            told = json.loads((unfinished / TRAINING).read_text(encoding="utf-8"))
            # The job's pods may not ask Kubernetes which image they run; this step's is the same.
            write_json(unfinished / TRAINING, {**told, **provenance()})
        write_whole(history, (directory / "history").read_text(encoding="utf-8"))
        metrics: dict[str, float] = json.loads((directory / RESULT).read_text(encoding="utf-8"))
        shutil.rmtree(self.place, ignore_errors=True)
        return metrics


def _volume() -> tuple[str, Path]:
    """The claim of the volume that all nodes share, and where it is mounted. Raises InputError where there is none."""
    claim = os.environ.get(CLAIM_VARIABLE)
    if not claim:
        raise InputError(
            "node_count needs a volume that all nodes can write to (ReadWriteMany): compile the pipeline with "
            "rlhf-ppo compile --volume CLAIM"
        )
    return claim, Path(os.environ.get(PATH_VARIABLE) or VOLUME_PATH)


@contextmanager
def _cancellable() -> Iterator[None]:
    """SIGTERM ends the block with _Cancelled; a second one changes nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def cancel(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _Cancelled

    before = signal.signal(signal.SIGTERM, cancel)
    try:
        yield
    except _Cancelled:
        raise
    except BaseException:
        signal.signal(signal.SIGTERM, before)
        raise
    else:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _relayed(directory: Path) -> Iterator[None]:
    """Inside the block what the job's processes tell in ``directory`` is told here, once even with retries."""
    ending = threading.Event()

    def relay() -> None:
        while not ending.wait(RELAY_SECONDS):
            _tell_what_is_new(directory)

    thread = threading.Thread(target=relay, name="relay", daemon=True)
    thread.start()
    try:
        yield
    except _Cancelled:
        raise  # At once: what kills the pod may leave it just the time to delete the job.
    finally:
        ending.set()
    thread.join()
    _tell_what_is_new(directory)


def _tell_what_is_new(directory: Path) -> None:
    """Emit the lines that are complete and weren't told before; ``told`` holds how far that went."""
    marker = directory / "told"
    try:
        position = int(marker.read_text(encoding="utf-8")) if marker.exists() else 0
        with (directory / EVENTS).open("rb") as stream:
            stream.seek(position)
            complete, newline, _ = stream.read().rpartition(b"\n")
        if not newline:
            return
        write_whole(marker, str(position + len(complete) + 1))
    except OSError:
        return  # Not there yet, or the volume's server is busy: the next time will tell.
    for line in complete.split(b"\n"):
        try:
            event = json.loads(line)
            emit(event.pop("kind"), **event)
        except (ValueError, AttributeError, KeyError, TypeError):
            continue  # Two nodes wrote at the same time.
