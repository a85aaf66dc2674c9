"""Getting a spool of tracking calls across to MLflow, in order, each at least once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlhf_ppo.events import emit

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


def _find_run(client: Any, experiment_id: str, tags: dict[str, str]) -> str | None:
    condition = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
    runs = client.search_runs([experiment_id], condition, max_results=1, order_by=["attributes.start_time ASC"])
    return str(runs[0].info.run_id) if runs else None


class Delivery:
    """The spool in ``directory`` on its way: how far it got stands in a file beside it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.spool, self.mark = directory / "spool.jsonl", directory / "sent"
        self.answers = True
        self._client: Any = None
        self._run = self._parent = ""
        self._destination: Destination | None = None

    def unsent(self) -> bool:
        """Whether anything is left."""
        if not self.spool.exists():
            return False
        with self.spool.open("rb") as stream:
            opening = len(stream.readline())
        return self.spool.stat().st_size > max(self._sent(), opening)

    def attempt(self) -> bool:
        """Send what is there; false where the server did not take it, now or in the end."""
        try:
            for calls, end in self._batches():
                self._send(calls)
                self._mark_sent(end)
            self.answers = True
        except Exception as error:
            if self.answers:
                print(f"[tracking] not delivered yet ({type(error).__name__}); kept in {self.directory}", flush=True)
            self.answers = False
        return self.answers

    def _sent(self) -> int:
        return int(self.mark.read_text() or 0) if self.mark.exists() else 0

    def _mark_sent(self, position: int) -> None:
        unfinished = self.mark.with_name("sent.unfinished")
        unfinished.write_text(str(position))
        os.replace(unfinished, self.mark)

    def _batches(self) -> Iterator[tuple[list[dict[str, Any]], int]]:
        """Calls not yet sent, metrics of several put together, with the position after them."""
        with self.spool.open("rb") as stream:
            self._destination = _destination(stream.readline())
            stream.seek(max(self._sent(), stream.tell()))
            calls: list[dict[str, Any]] = []
            end = stream.tell()
            while (line := stream.readline()).endswith(b"\n"):
                call = json.loads(line)
                full = sum(len(c["values"]) for c in calls if c["kind"] == "metrics") >= LARGEST_BATCH // 2
                if calls and (full or call["kind"] != "metrics" or calls[-1]["kind"] != "metrics"):
                    yield calls, end
                    calls = []
                calls.append(call)
                end = stream.tell()
            if calls:
                yield calls, end

    def _send(self, calls: list[dict[str, Any]]) -> None:
        from mlflow.exceptions import MlflowException

        assert self._destination is not None
        if self._client is None:
            self._client = client_of(self._destination.uri)
        if not self._run:
            self._run = self._find_or_make_run(self._destination)
        try:
            if calls[0]["kind"] == "metrics":
                self._send_metrics([value for call in calls for value in call["values"]], self._run)
            else:
                for call in calls:
                    self._send_one(call)
        except MlflowException as error:
            if error.error_code not in REFUSED:
                raise
            print(f"[tracking] MLflow refused {calls[0]['kind']}: {error.message[:300]}", flush=True)

    def _find_or_make_run(self, to: Destination) -> str:
        if to.injected_run:
            self._client.set_tag(to.injected_run, "rlhf_ppo.step", to.step)
            return to.injected_run
        self._parent = parent = parent_run(self._client, to.uri, to.experiment, to.pipeline_run, to.run_name)
        experiment_id = experiment_of(self._client, to.uri, to.experiment)
        tags = {"rlhf_ppo.run_id": to.pipeline_run, "rlhf_ppo.step": to.step, "mlflow.parentRunId": parent}
        found = _find_run(self._client, experiment_id, tags)
        if found:
            self._client.update_run(found, status="RUNNING")
        else:
            found = str(self._client.create_run(experiment_id, run_name=to.step, tags={**to.tags, **tags}).info.run_id)
        emit(
            "tracking", step=to.step, tracking_uri=to.uri, experiment=to.experiment, run_id=found, parent_run_id=parent
        )
        return found

    def _send_metrics(self, values: list[list[Any]], run: str) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(name, float(value), when, step) for name, value, when, step in values]
        for start in range(0, len(metrics), LARGEST_BATCH):
            self._client.log_batch(run, metrics=metrics[start : start + LARGEST_BATCH])

    def _send_one(self, call: dict[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag

        kind = call["kind"]
        if kind == "params":
            params = [Param(name, value) for name, value in call["values"].items()]
            for start in range(0, len(params), 100):
                self._client.log_batch(self._run, params=params[start : start + 100])
        elif kind == "tags":
            self._client.log_batch(self._run, tags=[RunTag(name, value) for name, value in call["values"].items()])
        elif kind == "summary":
            self._send_metrics(call["values"], self._parent or self._run)
        elif kind == "artifact":
            self._client.log_artifact(self._run, str(self.directory / call["file"]), call["folder"] or None)
        elif kind == "dataset":
            source_type = "hf" if "/" in call["source"] and not call["source"].startswith((".", "/")) else "local"
            used = Dataset(call["name"], call["digest"], source_type, json.dumps({"uri": call["source"]}))
            context = InputTag("mlflow.data.context", call["context"])
            self._client.log_inputs(self._run, datasets=[DatasetInput(used, tags=[context])])
        elif kind == "end" and not (self._destination and self._destination.injected_run):
            self._client.set_terminated(self._run, call["status"], call["time"])


def _destination(line: bytes) -> Destination:
    opened = json.loads(line)
    opened.pop("kind")
    return Destination(**opened)


def unsent_spools(directory: Path) -> list[Path]:
    """The directories below ``directory`` whose spools are not wholly delivered."""
    spools = sorted(file.parent for file in directory.rglob("spool.jsonl"))
    return [spool for spool in spools if Delivery(spool).unsent()]
