"""What a local run ends with: what came out, where it lies, or what went wrong."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

LOG_LINES = 15
Events = dict[str, dict[str, Any]]


def succeeded(events: Events, directory: Path) -> str:
    """The summary of a run that went through, from the last event of each kind."""
    if "unchanged" in events:
        lines = [("Ended", f"early, with nothing new since the run {events['unchanged']['since']}")]
    else:
        lines = [
            *_results(events),
            ("Model", _shown(directory / "policy")),
            ("Report", _shown(directory / "report.html")),
        ]
    lines += [("Log", _shown(directory / "pipeline.log")), *_tracking(events.get("tracking"))]
    return "\n".join(f"{name:<9}{text}" for name, text in lines)


def _results(events: Events) -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    found = events.get("evaluation")
    if found:
        lines.append(
            (
                "Score",
                f"{_number(found['score_before'])} → {_number(found['score_after'])}, gain {_number(found['gain'])} "
                f"[{_number(found['low'])}, {_number(found['high'])}] on {found['prompts']} held-out prompts",
            )
        )
        lines.append(("KL", f"{_number(found['kl'])} nats per response"))
        lines.append(("Gate", "passed" if found["passed"] else "held the policy back"))
        lines += [("", reason) for reason in found["reasons"]]
    if "pushed" in events:
        lines.append(("Push", f"{events['pushed']['url']} (tag {events['pushed']['tag']})"))
    elif "push_skipped" in events:
        lines.append(("Push", f"skipped: {events['push_skipped']['reason']}"))
    elif found:
        lines.append(("Push", "none: the gate held the policy back"))
    return lines


def _tracking(event: dict[str, Any] | None) -> list[tuple[str, str]]:
    if event is None:
        return [("MLflow", "nothing delivered yet; the log says why")]
    lines = [("MLflow", f"experiment {event['experiment']}, run {event['parent_run_id'] or event['run_id']}")]
    uri = event["tracking_uri"]
    if uri.startswith("sqlite:"):
        command = "mlflow" if shutil.which("mlflow") else _shown(Path(sys.executable).parent / "mlflow")
        lines.append(("", f"{command} ui --backend-store-uri {shlex.quote(uri)}"))
    else:
        lines.append(("", uri))
    return lines


def failed(failure: dict[str, Any] | None, open_steps: list[str], code: int, directory: Path) -> str:
    """What went wrong: in the step's own words or, where it was killed, by the end of its log.

    ``code`` is the exit code of the process that ran the pipeline, negative where a signal ended it.
    """
    log = directory / "pipeline.log"
    if failure:
        said = f"{failure['step']} failed: {failure['message']}"
    else:
        if code < 0:
            what = f"the pipeline was ended by {signal.Signals(-code).name}"
        elif open_steps:
            what = f"{open_steps[0]} was ended from outside (out of memory?)"
        else:
            what = "the pipeline could not be run"
        said = f"{what}. The last it said:\n" + "\n".join(_last_words(log))
    return f"{said}\n\nThe whole log: {_shown(log)}"


def _last_words(log: Path) -> list[str]:
    """The last lines, without colours; where KFP reports a failure, those before its report."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(encoding="utf-8", errors="replace"))
    before, reported, _ = text.partition("finished with status FAILURE")
    lines = before.splitlines()
    return [line for line in (lines[:-1] if reported else lines) if line.strip()][-LOG_LINES:]


def _number(value: float | None) -> str:
    return "nan" if value is None else f"{value:.2f}"


def _shown(path: Path) -> str:
    """``path`` as the user would type it."""
    try:
        return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
    except ValueError:
        return str(path)
