"""Tracking in MLflow that never delays a step, never stops it, and loses nothing.

A call appends one line to a spool file and returns. A thread delivers the spool, and goes on when a server that was
gone comes back; what is left at the end is delivered by the step that concludes the run, or later by
``python -m rlhf_ppo.tracking DIRECTORY``. Sending twice does no harm: MLflow keeps one of equal metrics.

One MLflow run stands for the pipeline run and one nested run for each step. A run that KFP's MLflow plugin injected
(``MLFLOW_RUN_ID``) is adopted: its parameters get the prefix "ppo/", and its status is left to KFP.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Mapping, Sequence
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
    """Where to track: ``tracking_uri``, else MLFLOW_TRACKING_URI, else mlflow.db in the current directory."""
    return tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"


class Tracker:
    """One step's MLflow run. Calls return at once and never raise."""

    def __init__(self, destination: Destination, spool: Path, settings: RunSettings | None = None) -> None:
        self.destination = destination
        self._directory = spool / destination.step
        self._files = self._directory / "files"
        self._files.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._file = self._directory / "spool.jsonl"
        self._number = sum(1 for _ in self._files.iterdir())
        self._done = False
        self._write("open", **destination.as_json())
        self._wake, self._stop = threading.Event(), threading.Event()
        self._delivery = Delivery(self._directory)
        self._thread = threading.Thread(target=self._deliver, name="mlflow", daemon=True)
        self._thread.start()
        if settings is not None:
            self.log_tags({"rlhf_ppo.exp_name": settings.ppo.exp_name, "rlhf_ppo.task_name": settings.ppo.task_name})

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
        name = f"{settings.ppo.exp_name} {run_id}" if settings else run_id
        destination = Destination(
            step, run_id, uri, experiment, injected, kwargs.get("run_name") or name, kwargs.get("tags", {})
        )
        return cls(destination, spool, settings)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log parameters; one that is too long for MLflow becomes a text artifact."""
        prefix = "ppo/" if self.destination.injected_run else ""
        texts = {_name(prefix + name): str(value) for name, value in params.items()}
        short = {name: text for name, text in texts.items() if len(text) <= LONGEST_PARAM}
        self._write("params", values=short)
        for name, text in texts.items():
            if name not in short:
                self._keep(f"{name.replace('/', '_')}.txt", text, "params")

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
        kept = self._place(path.name)
        try:
            shutil.copyfile(path, kept)
        except OSError as error:
            print(f"[tracking] {path} is not logged: {error}", file=sys.stderr)
            return
        self._write("artifact", file=str(kept.relative_to(self._directory)), folder=folder)

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log ``rows`` as a table that MLflow's pages show."""
        columns = list(rows[0]) if rows else []
        table = {"columns": columns, "data": [[row.get(column) for column in columns] for row in rows]}
        self._keep(f"{name}.json", json.dumps(table, ensure_ascii=False, default=str), "")
        shown = [{"path": f"{name}.json", "type": "table"}]
        self.log_tags({"mlflow.loggedArtifacts": json.dumps(shown)})

    def log_dataset(self, name: str, digest: str, source: str, context: str) -> None:
        """Record that the run used a data set."""
        self._write("dataset", name=name, digest=digest[:36], source=source[:65535], context=context)

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
        if self._delivery.unsent():
            print(
                f"[tracking] {self.destination.uri} does not answer; what is missing there is kept in "
                f"{self._directory} and is sent by: python -m rlhf_ppo.tracking {self._directory.parent}",
                file=sys.stderr,
            )

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish("FINISHED" if kind is None else "FAILED")

    def _place(self, name: str) -> Path:
        with self._lock:
            self._number += 1
            place = self._files / str(self._number)
        place.mkdir()
        return place / re.sub(r"[^\w.\- ]", "_", name)

    def _keep(self, name: str, text: str, folder: str) -> None:
        kept = self._place(name)
        kept.write_text(text, encoding="utf-8")
        self._write("artifact", file=str(kept.relative_to(self._directory)), folder=folder)

    def _write(self, kind: str, **values: Any) -> None:
        line = json.dumps({"kind": kind, **values}, ensure_ascii=False)
        with self._lock, self._file.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
        if kind != "open":
            self._wake.set()

    def _deliver(self) -> None:
        pause = 1.0
        while True:
            delivered = self._delivery.attempt()
            if delivered and self._stop.is_set() and not self._delivery.unsent():
                return
            pause = 1.0 if delivered else min(pause * 2, 30.0)
            if self._stop.is_set():
                # The end of the step waits for this thread only so long; it may try again until then.
                time.sleep(min(pause, 1.0))
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


def _name(name: str) -> str:
    """``name`` with the characters that MLflow refuses replaced."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:250]


def _number(value: Any) -> float | None:
    if hasattr(value, "item") and getattr(value, "size", None) is not None:
        try:
            value = value.item()
        except (ValueError, RuntimeError):
            return None
    return float(value) if isinstance(value, (int, float)) else None


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
