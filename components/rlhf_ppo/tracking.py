"""Tracking in MLflow that never delays a step, never stops it, and loses nothing.

A call appends one line to a spool file and returns. A thread delivers the spool, and goes on when a server that was
gone comes back; what is left at the end is delivered by the step that concludes the run, or later by
``python -m rlhf_ppo.tracking DIRECTORY``. Sending twice does no harm: MLflow keeps one of equal metrics.

One MLflow run stands for the pipeline run and one nested run for each step. A run that KFP's MLflow plugin injected
(``MLFLOW_RUN_ID``) is adopted: its parameters get the prefix "ppo/", and its status is left to KFP.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rlhf_ppo.delivery import Delivery, Destination, unsent_spools
from rlhf_ppo.errors import InputError
from rlhf_ppo.parameters import RunSettings

DEADLINE = 10.0
"""Seconds that the end of a step waits for a server that does not answer."""
PATIENCE = 60.0
"""Seconds that the end of a step waits for a server that answers slowly."""
LONGEST_PARAM = 6000


def default_uri(tracking_uri: str) -> str:
    """Where to track: ``tracking_uri``, else MLFLOW_TRACKING_URI, else mlflow.db in the current directory.

    An injected run is only to be found where MLFLOW_TRACKING_URI says, so that goes first there. The path of a SQLite
    database is made absolute: a spool may be delivered from another directory.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    of_injected = given if os.environ.get("MLFLOW_RUN_ID") else ""
    uri = of_injected or tracking_uri or given or "sqlite:///mlflow.db"
    database = uri.removeprefix("sqlite:///")
    return f"sqlite:///{Path(database).absolute()}" if database not in (uri, "", ":memory:") else uri


def run_name_of(settings: RunSettings, run_id: str) -> str:
    """What the pipeline run is called in MLflow: as tracker_kwargs say, else exp_name and its id."""
    kwargs = settings.ppo.tracker_kwargs.get("mlflow", {})
    return str(kwargs.get("run_name") or f"{settings.ppo.exp_name} {run_id}")


class Tracker:
    """One step's MLflow run. Calls return at once and never raise."""

    def __init__(self, destination: Destination, spool: Path, settings: RunSettings | None = None) -> None:
        self.destination = destination
        self._directory = _place_of_spool(spool, destination)
        self._files = self._directory / "files"
        self._files.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._file = self._directory / "spool.jsonl"
        self._number = sum(1 for _ in self._files.iterdir())
        self._tables: list[str] = []
        self._done = self._failed = False
        self._wake, self._stop, self._given_up = threading.Event(), threading.Event(), threading.Event()
        self._write("open", **destination.as_json())
        self._delivery = Delivery(self._directory)
        self._thread = threading.Thread(target=self._deliver, name="mlflow", daemon=True)
        self._thread.start()
        if settings is not None:
            self.log_tags({"rlhf_ppo.exp_name": settings.ppo.exp_name, "rlhf_ppo.task_name": settings.ppo.task_name})

    @classmethod
    def for_run(cls, step: str, run_id: str, settings: RunSettings) -> Tracker:
        """The tracker of ``step`` as the run's settings say, with its spool in RLHF_PPO_SPOOL where that is set."""
        return cls.for_step(
            step,
            run_id,
            settings,
            tracking_uri=settings.tracking.mlflow_tracking_uri,
            experiment=settings.ppo.tracker_project_name,
            spool=Path(os.environ.get("RLHF_PPO_SPOOL") or tempfile.mkdtemp(prefix="rlhf-ppo-spool-")),
        )

    @classmethod
    def for_step(
        cls,
        step: str,
        run_id: str,
        settings: RunSettings | None = None,
        *,
        tracking_uri: str,
        experiment: str,
        spool: Path,
    ) -> Tracker:
        """The tracker of ``step`` in the pipeline run ``run_id``; a retried step goes on in its own run.

        Raises InputError where mlflow is not installed.
        """
        import importlib.util

        if importlib.util.find_spec("mlflow") is None:
            raise InputError('tracking needs mlflow: pip install "rlhf-ppo[train]"')
        uri, injected = default_uri(tracking_uri), os.environ.get("MLFLOW_RUN_ID", "")
        kwargs = settings.ppo.tracker_kwargs.get("mlflow", {}) if settings else {}
        name = run_name_of(settings, run_id) if settings else run_id
        tags = {_name(str(tag)): str(value) for tag, value in (kwargs.get("tags") or {}).items()}
        destination = Destination(step, run_id, uri, experiment, injected, name, tags)
        return cls(destination, spool, settings)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log parameters; one that is too long for MLflow becomes a text artifact."""
        prefix = "ppo/" if self.destination.injected_run else ""
        texts = {_name(prefix + name): str(value) for name, value in params.items()}
        short = {name: text for name, text in texts.items() if len(text) <= LONGEST_PARAM}
        self._write("params", values=short)
        for name, text in texts.items():
            if name not in short:
                self._keep_text(f"{name}.txt", text, "params")

    def log_metrics(self, metrics: Mapping[str, Any], step: int = 0) -> None:
        """Log the numbers among ``metrics``; nan and inf are kept."""
        self._write("metrics", values=_points(metrics, step))

    def log_summary(self, metrics: Mapping[str, Any]) -> None:
        """Log the figures that stand for the whole pipeline, on its run, where they can be compared over runs."""
        self._write("summary", values=_points(metrics, 0))

    def log_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags; those that are None are left out."""
        self._write(
            "tags", values={_name(name): str(value)[:8000] for name, value in tags.items() if value is not None}
        )

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Log a file, as it is now."""
        self._keep(path.name, folder, lambda kept: shutil.copyfile(path, kept))

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log ``rows`` as a table that MLflow's pages show; a number that is not finite becomes an empty cell."""
        columns = list(dict.fromkeys(column for row in rows for column in row))
        table = {"columns": columns, "data": [[_cell(row.get(column)) for column in columns] for row in rows]}
        file = _file_name(f"{name}.json")
        self._keep_text(file, json.dumps(table, default=str), "")
        self._tables = [*(table for table in self._tables if table != file), file]
        self.log_tags({"mlflow.loggedArtifacts": json.dumps([{"path": t, "type": "table"} for t in self._tables])})

    def log_dataset(self, name: str, digest: str, source: str, context: str) -> None:
        """Record that the run used a data set."""
        self._write("dataset", name=name, digest=digest[:36], source=source[:65535], context=context)

    def log_model(self, name: str, uri: str, tags: Mapping[str, str], alias: str) -> None:
        """Register the run's policy, which lies at ``uri``, as a version of the model ``name``; ``alias`` is
        "challenger" or "champion".
        """
        now = int(time.time() * 1000)
        self._write("model", name=name, source=uri, tags=dict(tags), alias=alias, time=now)

    def pipeline_run(self) -> str:
        """The id of the MLflow run that stands for the pipeline run; waits a little, and is empty without one."""
        deadline = time.monotonic() + DEADLINE
        while not (found := self._delivery.pipeline_run) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found

    def finish(self, status: str = "FINISHED") -> None:
        """End the run and wait a little for what is not yet delivered; the rest stays in the spool."""
        if self._done:
            return
        self._done = True
        self._write("end", status=status, time=int(time.time() * 1000))
        self._stop.set()
        self._wake.set()
        started = time.monotonic()
        while self._thread.is_alive():
            self._thread.join(0.2)
            waited = time.monotonic() - started
            if waited > PATIENCE or (waited > DEADLINE and not self._delivery.answers):
                break
        self._given_up.set()
        if self._delivery.unsent():
            print(
                f"[tracking] {self.destination.uri} has not taken everything; what is missing there is kept in "
                f"{self._directory} and is sent by: python -m rlhf_ppo.tracking {self._directory.parent}",
                file=sys.stderr,
            )

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish("FINISHED" if kind is None else "FAILED")

    def _keep(self, name: str, folder: str, write: Callable[[Path], Any]) -> None:
        """Have ``write`` make a file in the spool, to be sent as an artifact."""
        with self._lock:
            self._number += 1
            kept = self._files / str(self._number) / _file_name(name)
        try:
            kept.parent.mkdir()
            write(kept)
        except OSError as error:
            print(f"[tracking] {name} is not logged: {error}", file=sys.stderr)
            return
        self._write("artifact", file=str(kept.relative_to(self._directory)), folder=folder)

    def _keep_text(self, name: str, text: str, folder: str) -> None:
        self._keep(name, folder, lambda kept: kept.write_text(text, encoding="utf-8", errors="replace"))

    def _write(self, kind: str, **values: Any) -> None:
        """Append one call to the spool, wholly or not at all."""
        with self._lock:
            before = self._file.stat().st_size if self._file.exists() else 0
            try:
                with self._file.open("ab") as stream:
                    stream.write(_line(kind, values))
            except OSError as error:
                # Half a line would make the next one unreadable.
                with contextlib.suppress(OSError):
                    os.truncate(self._file, before)
                if not self._failed:
                    print(f"[tracking] {self._file} takes no more, what comes is lost: {error}", file=sys.stderr)
                self._failed = True
        self._wake.set()

    def _deliver(self) -> None:
        pause = 1.0
        while True:
            delivered = self._delivery.attempt()
            if self._given_up.is_set() or (delivered and self._stop.is_set() and not self._delivery.unsent()):
                return
            pause = 1.0 if delivered else min(pause * 2, 30.0)
            if self._stop.is_set():
                # The end of the step waits for this thread only so long; it may try again until then.
                self._given_up.wait(min(pause, 1.0))
                continue
            if delivered:
                self._wake.wait()
                self._wake.clear()
            self._stop.wait(pause)


def _points(metrics: Mapping[str, Any], step: int) -> list[list[Any]]:
    """Name, value, time and step of each number among ``metrics``."""
    now = int(time.time() * 1000)
    numbers = [(_name(name), number) for name, value in metrics.items() if (number := _number(value)) is not None]
    return [[name, str(value), now, int(step)] for name, value in numbers]


def _line(kind: str, values: Mapping[str, Any]) -> bytes:
    return json.dumps({"kind": kind, **values}).encode() + b"\n"


def _name(name: str) -> str:
    """``name`` as MLflow takes it: other characters replaced, and nothing that names another name as a path."""
    parts = re.sub(r"[^\w\-. :/]", "_", name)[:249].split("/")
    clean = "/".join(part for part in parts if part not in ("", ".", ".."))
    return f"_{clean}" if not clean or clean.startswith("..") else clean


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.\- ]", "_", name)


def _number(value: Any) -> float | None:
    try:
        if hasattr(value, "item") and getattr(value, "size", None) is not None:
            value = value.item()
        return float(value) if isinstance(value, (int, float)) else None
    except (ValueError, RuntimeError, OverflowError):
        return None


def _cell(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _place_of_spool(spool: Path, destination: Destination) -> Path:
    """The directory of a step's spool; it goes on in one of an earlier attempt, but not in another run's."""
    wanted, number = _line("open", destination.as_json()), 1
    while True:
        directory = spool / (destination.step if number == 1 else f"{destination.step}-{number}")
        file = directory / "spool.jsonl"
        lines = file.read_bytes() if file.exists() else b""
        whole = lines.rfind(b"\n") + 1
        if not whole or lines.startswith(wanted):
            if whole < len(lines):
                # An attempt that was killed left half a line.
                os.truncate(file, whole)
            return directory
        number += 1


def resend(directory: Path) -> list[Path]:
    """Deliver what is left in the spools below ``directory``; returns those of which something is left."""
    for spool in unsent_spools(directory):
        delivery = Delivery(spool)
        # Each attempt goes on where the last one ended; one that gets nothing across ends it.
        while delivery.unsent() and delivery.attempt():
            pass
    return unsent_spools(directory)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m rlhf_ppo.tracking DIRECTORY")
    left = resend(Path(sys.argv[1]))
    sys.exit("\n".join(f"not delivered: {spool}" for spool in left) or None)
