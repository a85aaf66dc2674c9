"""Steps of a local run as children of one process that has imported what they all need, which costs each 3 to 10 s.

KFP starts a step as ``python3 -m kfp.dsl.executor_main …``. Under that name it finds a script, which asks the server
for the step and waits for its end; the server forks. Whatever else is asked for, or where no server answers, a
new interpreter does it.

This file is both: the server as a module, what KFP starts as a script, for which it imports little.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

STEP = ["-m", "kfp.dsl.executor_main"]
STREAMS = (0, 1, 2)
TOLD = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
NEEDED = {
    "validate_config": ["kfp.dsl.executor", "rlhf_ppo.config_validation.validate"],
    "detect_changes": ["mlflow", "mlflow.store.tracking.sqlalchemy_store", "rlhf_ppo.change_detection.detect"],
    "snapshot_reference": ["torch", "transformers.modeling_utils", "rlhf_ppo.reference_snapshot.snapshot"],
    "prepare_dataset": ["datasets", "rlhf_ppo.dataset_preparation.prepare"],
    "train_ppo": ["transformers.masking_utils", "rlhf_ppo.ppo_training.train"],
    "evaluate_policy": ["rlhf_ppo.policy_evaluation.evaluate"],
    "gate": ["rlhf_ppo.policy_evaluation.gate"],
    "push_to_hub": ["rlhf_ppo.hub_push.push"],
    "conclude_run": ["rlhf_ppo.run_conclusion.conclude"],
}
"""Modules that a step imports or needs while it works, in the order in which a run needs them."""
ACCELERATORS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd", "/dev/accel", "/dev/hl0")
"""What says that there may be one: a driver bears no fork of a process that has looked for it."""


def can_serve() -> bool:
    """Whether steps may be forked here."""
    return sys.platform == "linux" and not any(os.path.exists(path) for path in ACCELERATORS)


@contextmanager
def served_steps() -> Iterator[list[str]]:
    """The start of a command line that does what ``python …`` does, and that of a step sooner, while the block runs."""
    if not can_serve():
        yield [sys.executable]
        return
    with tempfile.TemporaryDirectory() as place, _server(place):
        # -I and -S: the script needs none of what makes an interpreter slow to start.
        yield [sys.executable, "-I", "-S", __file__, sys.executable, place]


@contextmanager
def _server(place: str) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as listener:
        with _short(place) as path:
            listener.bind(path)
        listener.listen()
        number = listener.fileno()
        process = subprocess.Popen(
            [sys.executable, "-m", "rlhf_pipelines.step_server", "serve", str(number)],
            # As steps have it.
            env={**os.environ, "_KFP_RUNTIME": "true"},
            stdin=subprocess.PIPE,
            pass_fds=[number],
        )
    # Where it has ended nobody listens any more, and steps start by themselves.
    with process:
        try:
            yield
        finally:
            process.kill()


@contextmanager
def _short(place: str) -> Iterator[str]:
    """The socket in the directory ``place`` by a name that is short enough for any."""
    directory = os.open(place, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{directory}/steps"
    finally:
        os.close(directory)


def serve(listener: socket.socket) -> None:
    """Answer until standard input ends, which it does with the run; import what is needed between two answers."""
    # A run that is interrupted tells all its processes; the steps end by themselves, and this one after them.
    for number in TOLD:
        signal.signal(number, signal.SIG_IGN)
    # Nobody has to be asked how it ended.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    needed = [(step, module) for step, modules in NEEDED.items() for module in modules]
    # What is imported stays: to look through it for garbage takes a tenth of the time.
    gc.disable()
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [], 0 if needed else None)
        if sys.stdin in ready:
            return
        if listener in ready:
            connection, _ = listener.accept()
            asked, streams = _read(connection)
            for module in [module for step, module in needed if step in asked["arguments"]]:
                _import(module)
            # Nor shall each step look through it, and so copy what it shares.
            gc.freeze()
            if os.fork() == 0:
                listener.close()
                _keep(connection, asked, streams)
            for stream in streams:
                os.close(stream)
            connection.close()
        elif needed:
            _import(needed.pop(0)[1])


def _read(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """What is asked for, and the streams of whoever asks."""
    _, streams, _, _ = socket.recv_fds(connection, 1, len(STREAMS))
    with connection.makefile("rb") as stream:
        return json.load(stream), streams


def _import(module: str) -> None:
    # The step that needs it says what is wrong with it.
    with suppress(Exception):
        importlib.import_module(module)


def _keep(connection: socket.socket, asked: dict[str, Any], streams: list[int]) -> None:
    """Fork the step, wait for its end and tell ``connection`` of it; the step's own process never comes back."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    process = os.fork()
    if process == 0:
        connection.close()
        _become(asked, streams)
    # Else whoever reads what the step says would wait for this process, too.
    for stream in streams:
        os.close(stream)
    _, status = os.waitpid(process, 0)
    with suppress(OSError):
        connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def _become(asked: dict[str, Any], streams: list[int]) -> None:
    """Be the interpreter that was ``asked`` for, to its end."""
    gc.enable()
    for number in TOLD:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for target, stream in zip(STREAMS, streams, strict=True):
        os.dup2(stream, target)
        os.close(stream)
    os.chdir(asked["directory"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.orig_argv = ["python3", *asked["arguments"]]
    sys.argv = ["", *asked["arguments"][len(STEP) :]]
    sys.path[0] = asked["directory"]
    if "numpy" in sys.modules:
        # Else all steps would draw the same numbers; Python's own generator sees to it by itself.
        sys.modules["numpy"].random.seed()
    code: Any = 0
    try:
        runpy.run_module(STEP[-1], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    _exit(code)


def _exit(code: Any) -> None:
    """End as an interpreter does, but for taking all modules apart, which would take 2 s."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    if isinstance(code, str):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def ask(place: str, arguments: list[str]) -> int | None:
    """The exit code of the step with ``arguments``, as a shell would tell it; None where no server answers."""
    asked = {"arguments": arguments, "directory": os.getcwd(), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            with _short(place) as path:
                connection.connect(path)
        except OSError:
            return None
        # A step that is told to end may still have to write; whoever asked hears of it when it has.
        for number in TOLD:
            signal.signal(number, signal.SIG_IGN)
        socket.send_fds(connection, [b"."], STREAMS)
        connection.sendall(json.dumps(asked).encode())
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(16)
    code = int(answer or -signal.SIGKILL)
    return code if code >= 0 else 128 - code


def main(first: str, *others: str) -> int:
    """Serve, or with an interpreter's path and the server's directory be what KFP asks for."""
    if first == "serve":
        serve(socket.socket(fileno=int(others[0])))
        return 0
    place, *arguments = others
    ended = ask(place, arguments) if arguments[: len(STEP)] == STEP else None
    if ended is None:
        os.execv(first, [first, *arguments])
    return ended


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
