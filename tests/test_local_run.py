"""A local run under the conditions of a real machine: other runs, closed terminals, missing packages, small screens."""

from __future__ import annotations

import fcntl
import io
import json
import os
import platform
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_pipelines import local, progress, summary
from rlhf_pipelines.cli import read_parameters
from rlhf_ppo.errors import InputError
from rlhf_ppo.parameters import PARAMETERS, defaults

FAKES = Path(__file__).parent / "fakes"
NEEDED = ["--set", "model_name=model", "--set", "query_dataset=prompts.jsonl", "--set", "reward_model=my_reward:score"]
COMMAND = [sys.executable, "-m", "rlhf_pipelines.cli"]
REWARD = "def score(prompts, responses):\n    return [1.0] * len(responses)\n"
WAITING_REWARD = (
    REWARD + "import os, sys, time\n"
    "if 'kfp.dsl.executor_main' in ' '.join(sys.orig_argv):\n"
    "    open('waiting', 'w').write(str(os.getpid()))\n    time.sleep(600)\n"
)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_text("weights")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hello"}\n')
    (tmp_path / "my_reward.py").write_text(REWARD)
    (tmp_path / "temporary").mkdir()
    return tmp_path


def environment(here: Path, **changes: str) -> dict[str, str]:
    """The steps' work is light (tests/fakes), all else is real."""
    names = {"PYTHONPATH": str(FAKES), "CALLS": str(here / "calls"), "GATE": "true", "FAILS": "", "NOT_INSTALLED": "-"}
    return {**os.environ, **names, "TMPDIR": str(here / "temporary"), **changes}


def cli(here: Path, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], cwd=here, env=environment(here, **changes), capture_output=True, text=True
    )


def await_text(path: Path) -> str:
    for _ in range(600):
        if path.exists() and path.read_text():
            return path.read_text()
        time.sleep(0.1)
    raise AssertionError(f"{path} was never written")


def is_running(process: int) -> bool:
    """Whether a process is there that has not ended (one that nobody has collected yet has)."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def waiting(here: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A run whose first step never ends, and that step's process; both are gone afterwards, come what may."""
    (here / "my_reward.py").write_text(WAITING_REWARD)
    run = subprocess.Popen(
        [*COMMAND, "run", *NEEDED],
        cwd=here,
        env=environment(here),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    step = int(await_text(here / "waiting"))
    group = os.getpgid(step)
    yield run, step
    if is_running(step):
        os.killpg(group, signal.SIGKILL)
    run.kill()
    run.communicate()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_closed_terminal_ends_the_run_and_leaves_no_temporary_files(
    here: Path, waiting: tuple[subprocess.Popen[str], int], number: signal.Signals
) -> None:
    run, step = waiting
    run.send_signal(number)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130 and "interrupted; the run is in" in said
    assert not is_running(step)
    assert list((here / "temporary").iterdir()) == []


def test_a_run_that_went_through_leaves_no_temporary_files(here: Path) -> None:
    done = cli(here, "run", *NEEDED, "--quiet")
    assert done.returncode == 0, done.stderr
    assert list((here / "temporary").iterdir()) == []
    assert "done in" not in done.stdout and "Model    runs/" in done.stdout, "quiet: the summary alone"


def test_nohup_keeps_a_run_from_a_closed_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with local._terminable():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_interruption_before_the_start_is_no_traceback(here: Path) -> None:
    (here / "my_reward.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n" + REWARD)
    done = cli(here, "run", *NEEDED)
    assert done.returncode == 130 and done.stderr == "\ninterrupted; nothing was started\n"
    assert not (here / "runs").exists()


def test_runs_that_start_in_the_same_second_have_directories_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "20260102-030405")
    found = [local.make_run_directory(None).name for _ in range(3)]
    assert found == ["20260102-030405", "20260102-030405-2", "20260102-030405-3"]


def test_what_keeps_the_pipeline_from_starting_is_told_to_its_last_line(here: Path) -> None:
    (here / "kfp").mkdir()
    (here / "kfp" / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'kfp'\")\n")
    done = cli(here, "run", *NEEDED, PYTHONPATH=f"{FAKES}{os.pathsep}{here}")
    assert done.returncode == 1
    assert "the pipeline could not be run" in done.stderr and "No module named 'kfp'" in done.stderr
    assert "memory" not in done.stderr


def test_a_pipeline_that_a_signal_ended_names_the_signal(tmp_path: Path) -> None:
    (tmp_path / "pipeline.log").write_text("first\nlast\n")
    said = summary.failed(None, [], -signal.SIGKILL, tmp_path)
    assert "the pipeline was ended by SIGKILL" in said and "first\nlast" in said


def test_an_unreadable_file_does_not_hide_what_else_is_wrong() -> None:
    with pytest.raises(InputError) as caught:
        read_parameters(None, "none.yaml", ["steps=0", "nope=1"])
    first, *others = caught.value.problems
    assert first.startswith("--parameters=none.yaml can't be read")
    assert [text.split()[0] for text in others] == ["steps=0", "nope"]


def test_a_rejected_value_is_not_followed_by_complaints_about_its_stand_in(tmp_path: Path) -> None:
    file = tmp_path / "parameters.yaml"
    file.write_text("query_dataset: 5\nmodel_name: m\nreward_model: r\n")
    with pytest.raises(InputError) as caught:
        read_parameters(None, str(file), ["batch_size=x", "mini_batch_size=3"])
    assert [text.split()[0] for text in caught.value.problems] == ["query_dataset=5", "batch_size='x'"]
    with pytest.raises(InputError) as caught:
        read_parameters(None, str(file), [])
    assert len(caught.value.problems) == 1
    with pytest.raises(InputError) as caught:
        read_parameters(None, None, ["seed=x", "batch_size=7", "mini_batch_size=3"])
    said = [text.split()[0] for text in caught.value.problems]
    assert said == ["seed='x'", "batch_size=7"], "what has nothing to do with it is said"


def on_a_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a terminal is sent for the second of four PPO steps, ten seconds after the start."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    monkeypatch.delenv("COLUMNS", raising=False)
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        shown = progress.Progress(terminal)
        shown.show({"kind": "step_started", "step": "train_ppo"})
        shown._started -= 10
        numbers = {"reward": -0.374, "kl": 16.54, "tokens/s": 1234.0}
        event = {"kind": "progress", "step": "train_ppo", "total": 400, "unit": "PPO steps", "numbers": numbers}
        shown.show({**event, "done": 100})
        print(end="END", file=terminal, flush=True)
        text = b""
        while not text.endswith(b"END"):  # a terminal hands over in pieces
            text += os.read(master, 10_000)
        monkeypatch.undo()
        shown.close()
    os.close(master)
    return text.decode().removesuffix("END").split("\r")[-1]


def test_the_bar_shows_all_its_figures_on_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    line = on_a_terminal(80, monkeypatch)
    for words in ("100/400", "reward -0.37", "kl 16.54", "tokens/s 1234", "00:30 left"):
        assert words in line
    assert len(line) < 80


def test_the_time_left_is_seen_on_a_small_terminal_too(monkeypatch: pytest.MonkeyPatch) -> None:
    line = on_a_terminal(50, monkeypatch)
    assert "00:30 left" in line and len(line) < 50


def test_a_screen_without_arrows_costs_no_run_its_summary(here: Path) -> None:
    script = "from rlhf_pipelines.cli import main; main(['compile', '-o', 'x']); print('0.1 \u2192 0.2')"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=here, env=environment(here, PYTHONIOENCODING="ascii"), capture_output=True
    )
    assert done.returncode == 0 and done.stdout == b"0.1 ? 0.2\n"


def test_fields_as_json_has_every_parameter(here: Path) -> None:
    found = {entry["name"]: entry for entry in json.loads(cli(here, "fields", "--json").stdout)}
    assert {name: entry["default"] for name, entry in found.items()} == defaults() and set(found) == set(PARAMETERS)
    assert found["learning_rate"]["type"] == "float" and "Adam" in found["learning_rate"]["meaning"]


def test_a_quiet_run_still_knows_what_happened() -> None:
    stream = io.StringIO()
    quiet = progress.Progress(stream, quiet=True)
    quiet.show({"kind": "step_started", "step": "gate"})
    quiet.show({"kind": "step_failed", "step": "gate", "input_error": False, "message": "first", "seconds": 1})
    assert stream.getvalue() == "" and quiet.last["step_failed"]["message"] == "first" and quiet.open_steps == []


THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not THP.exists() or "[never]" in THP.read_text(), reason="this kernel has no large pages")
def test_steps_have_their_memory_in_large_pages_unless_the_user_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = """
import re, torch
kept = [torch.ones(1 << 18) for _ in range(64)]
print(re.search(r"AnonHugePages:\\s+(\\d+)", open("/proc/self/smaps_rollup").read())[1])
"""

    def kilobytes() -> int:
        command, env = [sys.executable, "-c", script], local._environment(tmp_path, defaults())
        return int(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout)

    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    # Of 64 MiB
    assert kilobytes() > 32 << 10
    if "[madvise]" in THP.read_text():
        monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
        assert kilobytes() == 0


def test_the_cpu_image_manages_memory_as_a_local_run_does() -> None:
    lines = (FAKES.parents[1] / "images" / "cpu" / "Dockerfile").read_text().splitlines()
    assert f"ENV GLIBC_TUNABLES={local.MEMORY['GLIBC_TUNABLES']}" in lines


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_steps_free_is_not_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = """
import ctypes
class Info(ctypes.Structure):
    _fields_ = [(f"number_{place}", ctypes.c_size_t) for place in range(10)]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype, libc.malloc.restype, libc.free.argtypes = Info, ctypes.c_void_p, [ctypes.c_void_p]
def used_and_set_aside():
    info = libc.mallinfo2()
    return info.number_7, info.number_6
used_and_set_aside()
before = used_and_set_aside()
pieces = [libc.malloc(64) for _ in range(20)]
for piece in pieces:
    libc.free(piece)
print(*(now - then for now, then in zip(used_and_set_aside(), before)))
"""

    def left() -> list[str]:
        command, env = [sys.executable, "-c", script], local._environment(tmp_path, defaults())
        return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout.split()

    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert left() == ["0", "0"]
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    assert left() != ["0", "0"]
