"""One training process for each card of a pod, or of many, by torch's elastic launcher, and one error at the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rlhf_ppo.devices import Device
from rlhf_ppo.errors import InputError

ARGUMENTS, RESULT, FAILURE, KILLED = "arguments.json", "result.json", "failure-*.json", "killed-*.json"


class ProcessFailed(RuntimeError):
    """A training process failed, or was killed."""


def processes_on(device: Device, wanted: int) -> int:
    """How many processes to start: ``wanted``, or with 0 one for each card. Raises InputError where there are fewer."""
    cards = device.count()
    if device.name != "cpu" and wanted > cards:
        raise InputError(
            f"node_processes={wanted}, and this pod sees {cards} {device.name} cards: ask for as many, or set 0 for "
            "one process on each"
        )
    return wanted or cards


def run_processes(
    module: str, arguments: Mapping[str, Any], processes: int, device: Device, kinds: Mapping[str, type[Exception]]
) -> Any:
    """Run ``python -m module DIRECTORY``, which calls ``in_process``, in several processes; what the first returned.

    SIGTERM is handed on to them. Raises the first failure: of a class that ``kinds`` names as it was, of another as
    ProcessFailed, which names the process.
    """
    with tempfile.TemporaryDirectory(prefix="rlhf-ppo-") as name:
        place = Path(name)
        (place / ARGUMENTS).write_text(json.dumps(dict(arguments)), encoding="utf-8")
        launcher = [sys.executable, "-m", "rlhf_ppo.launch", module, name, str(processes)]
        # What can be imported here can be there.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        environment.setdefault("OMP_NUM_THREADS", "1")  # As torchrun does.
        if device.name == "cpu":
            environment["ACCELERATE_USE_CPU"] = "true"  # It connects processes on CPUs only where it is told.
        process = subprocess.Popen(launcher, env=environment)
        try:
            with _handing_on(process):
                status = process.wait()
        finally:
            _end(process)
        if status != 0 or not (place / RESULT).exists():
            said = f"the training processes ended without a word (status {status}): the lines above may say more"
            raise error_of(first_failure(place), processes, kinds) or ProcessFailed(said)
        return json.loads((place / RESULT).read_text(encoding="utf-8"))


def main(module: str, directory: str, processes: int) -> None:
    """The launcher's own process: start the others, and leave in ``directory`` which of them was killed, if one was."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    with _telling_of_the_killed(Path(directory)):
        elastic_launch(config, sys.executable)("-m", module, directory)


def main_of_node(module: str, directory: str) -> None:
    """The same in one of several pods: torchrun, which reads the node's part from PET_* in the environment."""
    from torch.distributed import run

    with _telling_of_the_killed(Path(directory)):
        run.main(["-m", module, directory])


@contextmanager
def _telling_of_the_killed(place: Path) -> Iterator[None]:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        yield
    except ChildFailedError as error:
        # Of SIGTERM die those that the launcher ends after another's failure.
        killed = [(f.timestamp, rank, -f.exitcode) for rank, f in error.failures.items() if f.exitcode < 0]
        by_others = sorted(found for found in killed if found[2] != signal.SIGTERM)
        if by_others and by_others[0][0] <= min(f.timestamp for f in error.failures.values()):
            when, rank, number = by_others[0]
            told = {"rank": rank, "signal": signal.Signals(number).name, "time": when}
            _write(place / KILLED.replace("*", str(rank)), told)
        sys.exit(1)


def in_process(work: Callable[..., Any], directory: str) -> None:
    """The part of one process: call ``work`` with the arguments in ``directory``, and leave there how it ended."""
    place, rank = Path(directory), int(os.environ.get("RANK", "0"))
    try:
        result = work(**json.loads((place / ARGUMENTS).read_text(encoding="utf-8")))
    except BaseException as error:
        told = {"kind": type(error).__name__, "message": str(error), "rank": rank, "time": time.time()}
        _write(place / FAILURE.replace("*", str(rank)), told)
        traceback.print_exc()
        # The launcher's own report would hide the traceback above behind its table.
        sys.exit(1)
    if rank == 0:
        _write(place / RESULT, result)


def _write(path: Path, value: Any) -> None:
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(value), encoding="utf-8")
    unfinished.rename(path)


def first_failure(place: Path) -> dict[str, Any] | None:
    """What the process that failed first left in ``place``. The others fail after it, of its absence."""
    told = [json.loads(path.read_text(encoding="utf-8")) for kind in (KILLED, FAILURE) for path in place.glob(kind)]
    return min(told, key=_when, default=None)


def error_of(failure: dict[str, Any] | None, processes: int, kinds: Mapping[str, type[Exception]]) -> Exception | None:
    """The exception that ``failure`` is: of a class that ``kinds`` names as it was, of another as ProcessFailed."""
    if failure is None:
        return None
    who = f"process {failure['rank']} of {processes}"
    if "signal" in failure:
        cause = "; that is often for want of memory" if failure["signal"] == "SIGKILL" else ""
        return ProcessFailed(f"{who} was ended by {failure['signal']}{cause}")
    if failure["kind"] in kinds:
        return kinds[failure["kind"]](failure["message"])
    return ProcessFailed(f"{who}: {failure['kind']}: {failure['message']}")


def _when(failure: dict[str, Any]) -> float:
    """SIGKILL comes from outside: who was lost to it is noticed after those who miss it have failed."""
    return 0.0 if failure.get("signal") == "SIGKILL" else float(failure["time"])


@contextmanager
def _handing_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """SIGTERM goes to the launcher, which hands it on to its processes and waits for them."""

    def hand_on(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    before = signal.signal(signal.SIGTERM, hand_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(process: subprocess.Popen[bytes]) -> None:
    """No process is left behind, whatever ended the wait."""
    if process.poll() is None:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    if len(sys.argv) > 3:
        main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    else:
        main_of_node(sys.argv[1], sys.argv[2])
