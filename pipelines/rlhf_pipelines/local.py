"""Run the compiled pipeline on this machine with KFP's own SubprocessRunner: what ships is what runs.

``run`` starts this module in a process of its own, whose output goes to a log, and follows what the steps tell.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from rlhf_pipelines.step_server import served_steps
from rlhf_ppo.errors import InputError
from rlhf_ppo.events import EVENTS_VARIABLE

Event = dict[str, Any]
GRACE = 30.0
"""Seconds in which a run that is interrupted may end by itself; Kubernetes gives as many."""
# Those in C take 0.1 s for the pipeline, where the others take 1.4.
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
OUTPUTS = {
    "policy": "train-ppo/policy",
    "history.jsonl": "train-ppo/history",
    "evaluation": "evaluate-policy/evaluation",
    "report.html": "evaluate-policy/evaluation/report.html",
    "prompts": "prepare-dataset/prompts",
}
"""Names in the run's directory for what the steps leave deep inside it."""
MEMORY = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"}
"""How glibc manages memory, which it reads as a process begins, as in ``images/cpu``.

In pages of 2 MiB, where Linux gives them. And small pieces that are freed are not set aside: they would keep apart
what is free around them, and large tensors could not take it (docs/performance.md).
"""


def package() -> str:
    """The compiled pipeline without retries: on one machine a failure is no preemption, and would only be repeated."""
    from rlhf_pipelines.compile import COMPILED

    documents = list(yaml.load_all(COMPILED.read_text(encoding="utf-8"), LOADER))
    for dag in (documents[0]["root"], *documents[0]["components"].values()):
        for task in dag.get("dag", {}).get("tasks", {}).values():
            task.pop("retryPolicy", None)
    return yaml.dump_all(documents, Dumper=DUMPER, sort_keys=False)


def make_run_directory(wanted: str | None) -> Path:
    """The run's directory, made now.

    Raises InputError where ``wanted`` holds something already, and where it can't be made or written to.
    """
    directory = Path(wanted or Path("runs") / time.strftime("%Y%m%d-%H%M%S"))
    try:
        if not wanted:
            return _new_directory(directory)
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise InputError(f"--run-dir={directory} exists and is not empty: name a new directory")
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise InputError(
            f"--run-dir={directory} can't be written: {error.strerror}; name a directory that you may write to"
        ) from error
    return directory.absolute()


def _new_directory(wanted: Path) -> Path:
    """``wanted``, or with a number where another run that started in the same second has it."""
    wanted.parent.mkdir(parents=True, exist_ok=True)
    directory, number = wanted, 1
    while True:
        try:
            directory.mkdir()
            return directory.absolute()
        except FileExistsError:
            number += 1
            directory = wanted.with_name(f"{wanted.name}-{number}")


def run(parameters: Mapping[str, Any], directory: Path, show: Callable[[Event], None]) -> int:
    """Run the pipeline in ``directory`` with ``parameters`` in KFP's encoding; ``show`` gets every event as it comes.

    Returns the exit code of the process that ran it. An interruption ends the whole process group.
    """
    (directory / "parameters.yaml").write_text(yaml.safe_dump(dict(parameters), sort_keys=False), encoding="utf-8")
    events = directory / "events.jsonl"
    events.touch()
    with (
        _terminable(),
        tempfile.TemporaryDirectory(prefix="rlhf-ppo-", ignore_cleanup_errors=True) as temporary,
        (directory / "pipeline.log").open("wb") as log,
    ):
        process = subprocess.Popen(
            [sys.executable, "-m", "rlhf_pipelines.local", str(directory)],
            # KFP leaves a directory for each step, and whoever is killed leaves more: all go with this one.
            env={**_environment(directory, parameters), "TMPDIR": temporary},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            for event in follow(events, lambda: process.poll() is None):
                show(event)
            return process.wait()
        finally:
            _end_group(process)
            _link_outputs(directory)


def follow(path: Path, running: Callable[[], bool]) -> Iterator[Event]:
    """The events in ``path`` as they are appended, until nothing runs and all is read; half a line waits for its rest.

    ``running`` tells whether more may come.
    """
    with path.open("rb") as stream:
        rest = b""
        while True:
            alive = running()
            rest += stream.read()
            *lines, rest = rest.split(b"\n")
            for line in lines:
                with contextlib.suppress(ValueError):
                    yield json.loads(line)
            if not alive:
                return
            time.sleep(0.2)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM and a closed terminal interrupt like Ctrl-C, so that nothing is left running; nohup keeps its meaning."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    heard = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End what still runs: with time for a training to write its checkpoint, unless it is interrupted once more."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(GRACE if number == signal.SIGTERM else None)


def _environment(directory: Path, parameters: Mapping[str, Any]) -> dict[str, str]:
    """What the steps find in their environment; the user's own settings win."""
    defaults = {
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
        **MEMORY,
    }
    if not parameters["mlflow_tracking_uri"]:
        # One database for all runs beside each other, so that MLflow's page compares them.
        defaults["MLFLOW_TRACKING_URI"] = f"sqlite:///{directory.parent / 'mlflow.db'}"
    search = [os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **defaults,
        **os.environ,
        "PYTHONPATH": os.pathsep.join(search),
        EVENTS_VARIABLE: str(directory / "events.jsonl"),
        "RLHF_PPO_SPOOL": str(directory / "spool"),
        # Beside all runs: the one that goes on with a training that was ended is another run.
        "RLHF_PPO_CHECKPOINTS": os.environ.get("RLHF_PPO_CHECKPOINTS") or str(directory.parent / "checkpoints"),
    }


def _link_outputs(directory: Path) -> None:
    """Give the outputs short names."""
    for name, place in OUTPUTS.items():
        found = sorted((directory / "steps").glob(f"*/{place}"))
        if found and not (directory / name).exists():
            (directory / name).symlink_to(found[-1].relative_to(directory))


@contextlib.contextmanager
def _python3_by_name() -> Iterator[None]:
    """Let KFP call this interpreter "python3".

    KFP 2.17 replaces the text python3 by sys.executable in all of a step's command line, parameters and paths included;
    where the two are the same text, it can't do harm.
    """
    with tempfile.TemporaryDirectory() as names, served_steps() as command:
        script = Path(names) / "python3"
        script.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        script.chmod(0o755)
        os.environ["PATH"] = os.pathsep.join([names, os.environ.get("PATH", os.defpath)])
        executable, sys.executable = sys.executable, "python3"
        try:
            yield
        finally:
            sys.executable = executable


def main(directory: Path) -> int:
    """Run the package with the parameters in the run's directory; returns the exit code."""
    warnings.simplefilter("ignore")
    # The steps are told, too; this process waits for what they have yet to do.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    parameters = yaml.safe_load((directory / "parameters.yaml").read_text(encoding="utf-8"))
    # KFP deletes the directory that it is given as workspace.
    workspace = tempfile.mkdtemp()
    try:
        with _python3_by_name():
            from kfp import components, local

            local.init(
                local.SubprocessRunner(use_venv=False),
                pipeline_root=str(directory / "steps"),
                workspace_root=workspace,
            )
            components.load_component_from_text(package())(**parameters)
    except RuntimeError as error:
        print(error)
        return 1
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
