"""Steps that share imports: what KFP starts must not be told from an interpreter of its own."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from rlhf_pipelines import step_server
from rlhf_pipelines.compile import COMPILED
from rlhf_pipelines.step_server import NEEDED, STEP, served_steps

Command = list[str]


@pytest.fixture(scope="module")
def command() -> Iterator[Command]:
    with served_steps() as found:
        yield found


def write(place: Path, body: str) -> Command:
    """The arguments of a step whose function has that ``body``, as KFP gives them."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    (place / "step.py").write_text(f"import atexit, gc, os, signal, sys, threading, time\ndef step():\n{lines}")
    told = json.dumps({"inputs": {}, "outputs": {"outputFile": str(place / "outputs.json")}})
    names = ["--component_module_path", str(place / "step.py"), "--function_to_execute", "step"]
    return [*STEP, *names, "--executor_input", told]


def run(command: Command, place: Path, body: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, *write(place, body)], cwd=place, env={**os.environ, **environment}, capture_output=True, text=True
    )


def said(done: subprocess.CompletedProcess[str]) -> str:
    """What the function printed; KFP's executor prints, too."""
    assert "@ " in done.stdout, done.stdout + done.stderr
    lines = done.stdout.rpartition("@ ")[2].splitlines()
    return "\n".join(line for line in lines if not line.startswith("[KFP"))


def command_of(process: int) -> str:
    return Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ")


def test_a_step_finds_what_it_would_find_in_an_interpreter_of_its_own(command: Command, tmp_path: Path) -> None:
    body = (
        "heard = [str(signal.getsignal(n)) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)]\n"
        "found = [os.getcwd(), os.environ['OF_STEP'], sys.argv[1:], sys.orig_argv[1:], sys.executable, sys.path,\n"
        "         heard, sorted(os.listdir('/proc/self/fd'), key=int), 'step' in sys.modules, gc.isenabled(),\n"
        "         sys.stdin.read()]\n"
        "print('said', file=sys.stderr)\n"
        "print('@', repr(found))\n"
    )
    served, alone = (run(start, tmp_path, body, OF_STEP="here") for start in (command, [sys.executable]))
    assert served.returncode == alone.returncode == 0, served.stderr
    assert "here" in said(served)
    assert said(served) == said(alone)
    assert "said\n" in served.stderr


def test_a_step_is_a_child_of_the_server(command: Command, tmp_path: Path) -> None:
    body = "print('@', open(f'/proc/{os.getppid()}/cmdline').read().split(chr(0)))"
    assert "rlhf_pipelines.step_server" in said(run(command, tmp_path, body))
    assert "rlhf_pipelines.step_server" not in said(run([sys.executable], tmp_path, body))


@pytest.mark.parametrize(
    ("body", "code"),
    [("pass", 0), ("sys.exit(3)", 3), ("sys.exit('enough')", 1), ("raise KeyError('lost')", 1)],
)
def test_it_ends_as_an_interpreter_does(command: Command, tmp_path: Path, body: str, code: int) -> None:
    served, alone = (run(start, tmp_path, body) for start in (command, [sys.executable]))
    assert served.returncode == alone.returncode == code
    assert served.stderr.splitlines()[-1:] == alone.stderr.splitlines()[-1:]


def test_one_that_is_killed_ends_as_a_shell_tells_it(command: Command, tmp_path: Path) -> None:
    assert run(command, tmp_path, "os.kill(os.getpid(), signal.SIGKILL)").returncode == 128 + signal.SIGKILL


def test_threads_and_what_is_registered_for_the_end_are_waited_for(command: Command, tmp_path: Path) -> None:
    done = run(
        command,
        tmp_path,
        "atexit.register(lambda: print('end'))\n"
        "threading.Thread(target=lambda: (time.sleep(0.5), print('@ thread'))).start()\n",
    )
    assert said(done).split() == ["thread", "end"]


def test_no_two_steps_draw_the_same_numbers(command: Command, tmp_path: Path) -> None:
    body = "import numpy, random\nprint('@', numpy.random.rand(), random.random())"
    first, second = (said(run(command, tmp_path, body)).split() for _ in range(2))
    assert first[0] != second[0] and first[1] != second[1]


def test_whoever_asked_waits_while_a_step_that_is_told_to_end_still_writes(command: Command, tmp_path: Path) -> None:
    body = (
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), open('written', 'w').close(), os._exit(7)))\n"
        "open('process', 'w').write(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    asking = subprocess.Popen([*command, *write(tmp_path, body)], cwd=tmp_path)
    while not (tmp_path / "process").exists() or not (tmp_path / "process").read_text():
        time.sleep(0.05)
    asking.send_signal(signal.SIGTERM)
    os.kill(int((tmp_path / "process").read_text()), signal.SIGTERM)
    assert asking.wait(30) == 7 and (tmp_path / "written").exists()


def test_anything_else_is_done_by_a_new_interpreter(command: Command, tmp_path: Path) -> None:
    body = "import os, sys; print(open(f'/proc/{os.getpid()}/cmdline').read().split(chr(0))[0], sys.prefix, sys.argv)"
    done = subprocess.run([*command, "-c", body, "a b"], capture_output=True, text=True)
    assert done.stdout.split(maxsplit=2) == [sys.executable, sys.prefix, "['-c', 'a b']\n"]


def test_a_step_starts_by_itself_where_the_server_is_gone(tmp_path: Path) -> None:
    with served_steps() as command:
        (server,) = [p for p in map(int, filter(str.isdigit, os.listdir("/proc"))) if is_server_of_this_test(p)]
        os.kill(server, signal.SIGKILL)
        while state(server) not in ("Z", ""):
            time.sleep(0.05)
        done = run(command, tmp_path, "print('@', sys.orig_argv[0])")
    assert said(done) == sys.executable


def test_the_server_ends_with_the_run_even_if_that_is_killed(tmp_path: Path) -> None:
    script = (
        "import os, sys, time\nfrom rlhf_pipelines.step_server import served_steps\n"
        "with served_steps():\n    print(os.getpid(), flush=True)\n    time.sleep(60)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    run.stdout.readline()
    (server,) = [p for p in map(int, filter(str.isdigit, os.listdir("/proc"))) if parent_of(p) == run.pid]
    run.kill()
    run.communicate()
    for _ in range(600):
        if state(server) in ("Z", ""):
            break
        time.sleep(0.1)
    assert state(server) in ("Z", "")


def fields(process: int) -> list[str]:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ["", "0"]


def state(process: int) -> str:
    """R, S, Z and so on; empty where there is none."""
    return fields(process)[0]


def parent_of(process: int) -> int:
    return int(fields(process)[1])


def is_server_of_this_test(process: int) -> bool:
    """Whether it is the younger of this process' servers: the older one is the fixture's."""
    mine = [p for p in map(int, filter(str.isdigit, os.listdir("/proc"))) if parent_of(p) == os.getpid()]
    servers = [p for p in mine if state(p) != "Z" and "step_server serve" in command_of(p)]
    return process == max(servers, key=lambda p: int(fields(p)[19]))


@pytest.mark.parametrize("path", step_server.ACCELERATORS)
def test_no_step_is_forked_beside_an_accelerator(path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert step_server.can_serve()
    monkeypatch.setattr(os.path, "exists", lambda name: name == path)
    assert not step_server.can_serve()
    with served_steps() as command:
        monkeypatch.undo()
        assert said(run(command, tmp_path, "print('@', sys.orig_argv[0])")) == sys.executable


def test_a_long_path_of_temporary_files_is_no_hindrance(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    deep = tmp_path / ("a" * 120)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with served_steps() as command:
        assert said(run(command, tmp_path, "print('@', sys.orig_argv[0])")) == "python3"


def test_what_is_imported_beforehand_is_there_and_belongs_to_the_pipeline_s_steps() -> None:
    document = next(yaml.safe_load_all(COMPILED.read_text()))
    executors = document["deploymentSpec"]["executors"].values()
    functions = {executor["container"]["args"][-1] for executor in executors}
    assert set(NEEDED) == functions
    for modules in NEEDED.values():
        for module in modules:
            importlib.import_module(module)
