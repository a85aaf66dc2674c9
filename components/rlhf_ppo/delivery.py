"""Getting a spool of tracking calls across to MLflow, in order, each at least once."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlhf_ppo.events import emit
from rlhf_ppo.registry import CHAMPION, challenge, crown, registered, source_of

REFUSED = {
    "INVALID_PARAMETER_VALUE",
    "BAD_REQUEST",
    "RESOURCE_DOES_NOT_EXIST",
    "RESOURCE_ALREADY_EXISTS",
    "INVALID_STATE",
}
"""MLflow's words for calls that no repetition will make good."""
LARGEST_BATCH = 1000
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Lets MLflow's pages open with runs and metrics instead of traces."""
UNCHANGED_TAG = "rlhf_ppo.unchanged_since"
"""Tag of a pipeline's run that ended early: the run that learned from the same before it."""


@dataclass(frozen=True)
class Destination:
    """Which MLflow run a step's calls go to."""

    step: str
    pipeline_run: str
    uri: str
    experiment: str
    injected_run: str = ""
    run_name: str = ""
    tags: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


def client_of(uri: str) -> Any:
    """A client that gives up on a dead server in seconds, unless the environment says otherwise."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    from mlflow import MlflowClient

    return MlflowClient(uri)


def experiment_of(client: Any, uri: str, name: str) -> str:
    """The id of the experiment; where it is made on a SQLite store, its artifacts lie beside the database."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    location = None
    if uri.startswith("sqlite:///"):
        location = (Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlflow-artifacts" / name).as_uri()
    try:
        return str(client.create_experiment(name, artifact_location=location, tags=EXPERIMENT_TAGS))
    except Exception:
        # Another step may have made it in the meantime.
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)


def parent_run(client: Any, uri: str, experiment: str, pipeline_run: str, run_name: str = "") -> str:
    """The run that stands for the pipeline run, made where there is none."""
    experiment_id = experiment_of(client, uri, experiment)
    tags = {"rlhf_ppo.run_id": pipeline_run, "rlhf_ppo.step": "pipeline"}
    return _find_run(client, experiment_id, tags) or str(
        client.create_run(experiment_id, run_name=run_name or pipeline_run, tags=tags).info.run_id
    )


def pipeline_run_of(client: Any, uri: str, experiment: str, pipeline_run: str, run_name: str = "") -> Any:
    """MLflow's run of the pipeline run, made where there is none; KFP's own where its plugin injects a task's."""
    injected = os.environ.get("MLFLOW_RUN_ID")
    return root_of(client, injected or parent_run(client, uri, experiment, pipeline_run, run_name))


def root_of(client: Any, run_id: str) -> Any:
    """The run that the run lies in: KFP's plugin has one for the pipeline and one for each task, at any depth."""
    run = client.get_run(run_id)
    while above := run.data.tags.get("mlflow.parentRunId"):
        run = client.get_run(above)
    return run


def _find_run(client: Any, experiment_id: str, tags: dict[str, str]) -> str | None:
    condition = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
    runs = client.search_runs([experiment_id], condition, max_results=1, order_by=["attributes.start_time ASC"])
    return str(runs[0].info.run_id) if runs else None


MARKS = {"calls": "sent", "files": "sent-files"}
"""Files that hold how far each lane got. Files have one of their own: where the store for them fails, metrics go on."""


class Delivery:
    """The spool in ``directory`` on its way: how far it got stands in files beside it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.spool = directory / "spool.jsonl"
        self.answers = True
        self._client: Any = None
        self._run = self._parent = ""
        self._destination: Destination | None = None

    @property
    def pipeline_run(self) -> str:
        """The run that stands for the pipeline run, which may be KFP's own; empty while none is known."""
        return self._parent or self._run

    def unsent(self) -> bool:
        """Whether anything is left."""
        if not self.spool.exists():
            return False
        with self.spool.open("rb") as stream:
            opening = len(stream.readline())
        return self.spool.stat().st_size > max(min(self._sent(lane) for lane in MARKS), opening)

    def attempt(self) -> bool:
        """Send what is there; false where the server did not take it, now or in the end."""
        self.answers = all(self._attempt(lane) for lane in MARKS)
        return self.answers

    def _attempt(self, lane: str) -> bool:
        try:
            with self._alone():
                for calls, end in self._batches(lane):
                    if calls:
                        self._send(calls)
                    self._mark_sent(lane, end)
            return True
        except Exception as error:
            if self.answers:
                reason = (str(error).splitlines() or [""])[0][:300]
                print(
                    f"[tracking] not delivered yet ({type(error).__name__}: {reason}); kept in {self.directory}",
                    flush=True,
                )
            return False

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Wait until nobody else delivers this spool: two at once could make a run twice."""
        with (self.directory / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _sent(self, lane: str) -> int:
        mark = self.directory / MARKS[lane]
        return int(mark.read_text() or 0) if mark.exists() else 0

    def _mark_sent(self, lane: str, position: int) -> None:
        mark = self.directory / MARKS[lane]
        unfinished = mark.with_name(f"{mark.name}.unfinished")
        unfinished.write_text(str(position))
        os.replace(unfinished, mark)

    def _batches(self, lane: str) -> Iterator[tuple[list[dict[str, Any]], int]]:
        """Calls of ``lane`` not yet sent, metrics of several put together, with the position after them."""
        with self.spool.open("rb") as stream:
            self._destination = _destination(stream.readline())
            stream.seek(max(self._sent(lane), stream.tell()))
            calls: list[dict[str, Any]] = []
            end = stream.tell()
            while (line := stream.readline()).endswith(b"\n"):
                call = _call(line)
                if call is not None and (call["kind"] == "artifact") == (lane == "files"):
                    full = sum(len(c["values"]) for c in calls if c["kind"] == "metrics") >= LARGEST_BATCH // 2
                    if calls and (full or call["kind"] != "metrics" or calls[-1]["kind"] != "metrics"):
                        yield calls, end
                        calls = []
                    calls.append(call)
                end = stream.tell()
            if end > self._sent(lane):
                yield calls, end

    def _send(self, calls: list[dict[str, Any]]) -> None:
        from mlflow.exceptions import MlflowException

        assert self._destination is not None
        if self._client is None:
            self._client = client_of(self._destination.uri)
        if not self._run:
            # Files that come late are no reason to call an ended run running.
            self._run = self._find_or_make_run(self._destination, reopen=calls[0]["kind"] != "artifact")
        try:
            if calls[0]["kind"] == "metrics":
                self._send_metrics([value for call in calls for value in call["values"]], self._run)
            else:
                for call in calls:
                    self._send_one(call)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST" and not self._destination.injected_run:
                # The server came back without its database: all goes to a new run.
                self._run = ""
                for lane in MARKS:
                    self._mark_sent(lane, 0)
                raise
            if error.error_code not in REFUSED:
                raise
            print(f"[tracking] MLflow refused {calls[0]['kind']}: {error.message[:300]}", flush=True)

    def _in_batches(self, values: Sequence[Any], largest: int, send: Callable[[Sequence[Any]], None]) -> None:
        """Send ``values``; a batch that MLflow refuses is halved, so that one value costs no other."""
        from mlflow.exceptions import MlflowException

        for start in range(0, len(values), largest):
            batch = values[start : start + largest]
            try:
                send(batch)
            except MlflowException as error:
                if error.error_code != "INVALID_PARAMETER_VALUE":
                    raise
                if len(batch) == 1:
                    print(f"[tracking] MLflow refused {batch[0].key}: {error.message[:300]}", flush=True)
                else:
                    self._in_batches(batch, (len(batch) + 1) // 2, send)

    def _find_or_make_run(self, to: Destination, *, reopen: bool) -> str:
        if to.injected_run:
            self._client.set_tag(to.injected_run, "rlhf_ppo.step", to.step)
            self._parent = str(root_of(self._client, to.injected_run).info.run_id)
            return to.injected_run
        self._parent = parent = parent_run(self._client, to.uri, to.experiment, to.pipeline_run, to.run_name)
        experiment_id = experiment_of(self._client, to.uri, to.experiment)
        tags = {"rlhf_ppo.run_id": to.pipeline_run, "rlhf_ppo.step": to.step, "mlflow.parentRunId": parent}
        found = _find_run(self._client, experiment_id, tags)
        if found and reopen:
            self._client.update_run(found, status="RUNNING")
        elif not found:
            found = str(self._client.create_run(experiment_id, run_name=to.step, tags={**to.tags, **tags}).info.run_id)
        emit(
            "tracking", step=to.step, tracking_uri=to.uri, experiment=to.experiment, run_id=found, parent_run_id=parent
        )
        return found

    def _send_metrics(self, values: list[list[Any]], run: str) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(name, float(value), when, step) for name, value, when, step in values]
        self._in_batches(metrics, LARGEST_BATCH, lambda batch: self._client.log_batch(run, metrics=batch))

    def _send_one(self, call: dict[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag

        kind = call["kind"]
        if kind == "params":
            params = [Param(name, value) for name, value in call["values"].items()]
            self._in_batches(params, 100, lambda batch: self._client.log_batch(self._run, params=batch))
        elif kind == "tags":
            tags = [RunTag(name, value) for name, value in call["values"].items()]
            self._in_batches(tags, 100, lambda batch: self._client.log_batch(self._run, tags=batch))
        elif kind == "summary":
            self._send_metrics(call["values"], self._parent or self._run)
        elif kind == "artifact":
            self._client.log_artifact(self._run, str(self.directory / call["file"]), call["folder"] or None)
        elif kind == "dataset":
            source_type = "hf" if "/" in call["source"] and not call["source"].startswith((".", "/")) else "local"
            used = Dataset(call["name"], call["digest"], source_type, json.dumps({"uri": call["source"]}))
            context = InputTag("mlflow.data.context", call["context"])
            self._client.log_inputs(self._run, datasets=[DatasetInput(used, tags=[context])])
        elif kind == "model":
            self._register(call)
        elif kind == "end" and not (self._destination and self._destination.injected_run):
            self._client.set_terminated(self._run, call["status"], call["time"])

    def _register(self, call: dict[str, Any]) -> None:
        assert self._destination is not None
        to, name = self._destination, call["name"]
        source = source_of(call["source"], to.uri)
        version = registered(self._client, name, to.pipeline_run, source, self.pipeline_run, call["tags"])
        if call["alias"] == CHAMPION:
            crown(self._client, name, version, call["time"])
        else:
            challenge(self._client, name, version)


def _call(line: bytes) -> dict[str, Any] | None:
    try:
        call: dict[str, Any] = json.loads(line)
        return call
    except ValueError:
        # A process that was killed left half a line; its other half was never written.
        return None


def _destination(line: bytes) -> Destination:
    opened = json.loads(line)
    opened.pop("kind")
    return Destination(**opened)


def unsent_spools(directory: Path) -> list[Path]:
    """The directories below ``directory`` whose spools are not wholly delivered."""
    spools = sorted(file.parent for file in directory.rglob("spool.jsonl"))
    return [spool for spool in spools if Delivery(spool).unsent()]
