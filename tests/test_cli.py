"""The command line as a user meets it: a process, its exit code, what it prints and what it leaves."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_pipelines.cli import main, read_parameters
from rlhf_pipelines.local import follow
from rlhf_pipelines.progress import Progress
from rlhf_ppo.errors import InputError
from rlhf_ppo.parameters import defaults

FAKES = Path(__file__).parent / "fakes"
NEEDED = ["--set", "model_name=model", "--set", "query_dataset=prompts.jsonl", "--set", "reward_model=my_reward:score"]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A directory as a user might have it, whose path KFP would spoil."""
    directory = tmp_path / "python3.11 of mine"
    (directory / "model").mkdir(parents=True)
    (directory / "model" / "config.json").write_text("{}")
    (directory / "model" / "model.safetensors").write_text("weights")
    (directory / "prompts.jsonl").write_text('{"prompt": "hello"}\n')
    (directory / "my_reward.py").write_text("def score(prompts, responses):\n    return [1.0] * len(responses)\n")
    return directory


def environment(here: Path, **changes: str) -> dict[str, str]:
    """The steps' work is light (tests/fakes), all else is real."""
    names = {"PYTHONPATH": str(FAKES), "CALLS": str(here / "calls"), "GATE": "true", "FAILS": "", "NOT_INSTALLED": "-"}
    return {**os.environ, **names, **changes}


def cli(here: Path, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rlhf_pipelines.cli", *arguments]
    return subprocess.run(command, cwd=here, env=environment(here, **changes), capture_output=True, text=True)


def calls(here: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(line) for line in (here / "calls").read_text().splitlines()]
    return {call["step"]: call for call in found}


def test_a_run_goes_through_all_steps_and_leaves_its_outputs_by_name(here: Path) -> None:
    done = cli(here, "run", *NEEDED, "--set", f"model_name={here / 'model'}", "--run-dir", "first")
    assert done.returncode == 0, done.stderr + done.stdout
    assert "\x1b" not in done.stdout and "\r" not in done.stdout
    assert "train_ppo           done in" in done.stdout and "Model    first/policy" in done.stdout
    found = calls(here)
    assert list(found)[-2:] == ["push_to_hub", "conclude_run"]
    assert found["snapshot_reference"]["model_name"] == str(here / "model"), "KFP's python3 did no harm"
    assert (here / "first" / "policy" / "model.safetensors").read_text() == "policy"
    assert (here / "first" / "history.jsonl").read_text() == "history"
    assert yaml.safe_load((here / "first" / "parameters.yaml").read_text())["query_dataset"] == "prompts.jsonl"
    assert not (here / "first" / "policy").readlink().is_absolute()
    again = cli(here, "run", *NEEDED, "--run-dir", "first")
    assert again.returncode == 2 and "--run-dir=first" in again.stderr


def test_a_gate_that_holds_is_no_failure(here: Path) -> None:
    done = cli(here, "run", *NEEDED, GATE="false")
    assert done.returncode == 0, done.stderr
    assert "push_to_hub" not in calls(here)
    assert len(list((here / "runs").glob("*/parameters.yaml"))) == 1


def test_a_failing_step_says_so_in_its_own_words(here: Path) -> None:
    done = cli(here, "run", *NEEDED, FAILS="train_ppo")
    assert done.returncode == 1
    assert "train_ppo failed: RuntimeError: train_ppo has no luck" in done.stderr
    assert "The whole log: runs/" in done.stderr
    assert "evaluate_policy" not in calls(here) and calls(here)["conclude_run"]["state"] == "FAILED"


def test_wrong_input_is_all_said_at_once_and_leaves_nothing(here: Path) -> None:
    (here / "file.yaml").write_text("learning_rate: fast\nbatchsize: 3\nppo_epochs: 2.5\nmodel_name: nowhere/at/all\n")
    done = cli(here, "run", "--parameters", "file.yaml", "--set", "steps=0", "--set", "gate_max_kl")
    assert done.returncode == 2 and done.stdout == ""
    said = done.stderr.splitlines()
    assert all(line.startswith("rlhf-ppo: ") for line in said)
    for words in (
        "learning_rate='fast'",
        "batchsize is not a parameter (did you mean batch_size?)",
        "ppo_epochs=2.5",
        "steps=0",
        "--set gate_max_kl: give NAME=VALUE",
        "query_dataset is not set",
    ):
        assert words in done.stderr
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("model_name", "nowhere/at/all", "model_name='nowhere/at/all' does not exist"),
        ("query_dataset", "none.jsonl", "query_dataset='none.jsonl' does not exist"),
        ("reward_model", "my_reward:points", "my_reward"),
        ("batch_size", "3", "batch_size=3 is not a multiple of mini_batch_size=2"),
        ("push_to_hub_if_best_kwargs", '{"repo_id": "me/m", "token": "x"}', "must not hold token"),
    ],
)
def test_what_is_missing_is_said_before_anything_starts(here: Path, name: str, value: str, words: str) -> None:
    done = cli(here, "run", *NEEDED, "--set", "mini_batch_size=2", "--set", f"{name}={value}")
    assert done.returncode == 2
    assert words in done.stderr
    assert not (here / "runs").exists() and not (here / "calls").exists()


def is_running(process: int) -> bool:
    """Whether a process is there that has not ended (one that nobody has collected yet has)."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_no_process_behind(here: Path, number: signal.Signals) -> None:
    (here / "my_reward.py").write_text(
        "import os, time\n"
        "def score(prompts, responses):\n    return [1.0] * len(responses)\n"
        "if 'kfp.dsl.executor_main' in ' '.join(__import__('sys').orig_argv):\n"
        "    open('waiting', 'w').write(str(os.getpid()))\n    time.sleep(600)\n"
    )
    command = [sys.executable, "-m", "rlhf_pipelines.cli", "run", *NEEDED]
    process = subprocess.Popen(command, cwd=here, env=environment(here), stderr=subprocess.PIPE, text=True)
    for _ in range(300):
        if (here / "waiting").exists() and (here / "waiting").read_text():
            break
        time.sleep(0.1)
    step = int((here / "waiting").read_text())
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; the run is in" in said
    assert not is_running(step)


def test_a_step_that_is_killed_is_reported_with_the_end_of_the_log(here: Path) -> None:
    (here / "my_reward.py").write_text(
        "import os, signal, sys\n"
        "def score(prompts, responses):\n    return [1.0] * len(responses)\n"
        "if 'kfp.dsl.executor_main' in ' '.join(sys.orig_argv):\n"
        "    print('the last words', flush=True)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = cli(here, "run", *NEEDED)
    assert done.returncode == 1
    assert "validate_config was ended from outside" in done.stderr and "the last words" in done.stderr
    assert "\x1b" not in done.stderr and "The whole log" in done.stderr


def everything(descriptor: int) -> str:
    """What was written to a terminal that is closed by now."""
    found = b""
    with contextlib.suppress(OSError):
        while part := os.read(descriptor, 4096):
            found += part
    return found.decode()


def test_on_a_terminal_there_is_a_live_bar(here: Path) -> None:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 110, 0, 0))
    with os.fdopen(slave, "w") as terminal:
        progress = Progress(terminal)
        progress.show({"kind": "step_started", "step": "train_ppo"})
        numbers = {"reward": 0.5, "kl": 1.25, "tokens/s": 900.0}
        event = {"kind": "progress", "step": "train_ppo", "total": 4, "unit": "PPO steps", "numbers": numbers}
        for done in (1, 2):
            progress.show({**event, "done": done})
        progress.show({"kind": "step_finished", "step": "train_ppo", "seconds": 61})
    shown = everything(master)
    assert "2/4" in shown and "reward 0.50  kl 1.25  tokens/s 900" in shown and "\r" in shown
    assert "done in 1 min 1 s" in shown


def test_where_there_is_no_terminal_there_are_plain_lines() -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    progress.show({"kind": "step_started", "step": "train_ppo"})
    event = {"kind": "progress", "step": "train_ppo", "total": 2, "unit": "PPO steps", "numbers": {"reward": None}}
    for done in (1, 2):
        progress.show({**event, "done": done})
    first, second = stream.getvalue().splitlines()
    assert first.startswith("train_ppo           1/2 PPO steps  reward nan") and first.endswith("left")
    assert second == "train_ppo           2/2 PPO steps  reward nan"


def test_half_a_line_waits_for_its_rest(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"kind": "a"}\n{"ki')
    turns = iter([True, False])

    def running() -> bool:
        alive = next(turns)
        if not alive:
            path.write_text('{"kind": "a"}\n{"kind": "b"}\n')
        return alive

    assert [event["kind"] for event in follow(path, running)] == ["a", "b"]


def test_a_set_wins_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "parameters.yaml"
    sources = "model_name: m\nquery_dataset: d\nreward_model: r\n"
    file.write_text(sources + "learning_rate: 1e-4\nscore_clip: null\nbatch_size: 64\nmini_batch_size: 8\n")
    found = read_parameters("trl", str(file), ["batch_size=32", 'tracker_kwargs={"wandb": {"name": "x"}}'])
    assert (found["batch_size"], found["mini_batch_size"], found["learning_rate"]) == (32, 8, 1e-4)
    assert found["score_clip"] == 0.0 and found["tracker_kwargs"] == {"wandb": {"name": "x"}}
    assert set(found) == set(defaults())
    assert read_parameters("trl", None, ["model_name=m"])["query_dataset"] == "stanfordnlp/imdb"


@pytest.mark.parametrize("content", ["- a\n", "a: [\n", None])
def test_a_file_that_holds_no_parameters_is_refused(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "parameters.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match="--parameters="):
        read_parameters(None, str(file), [])


def test_fields_compile_and_version(here: Path) -> None:
    fields = cli(here, "fields").stdout
    assert "learning_rate (float, 1e-05)" in fields and "world_size" in fields
    assert "| `learning_rate` | float | `1e-05` |" in cli(here, "fields", "--markdown").stdout
    cli(here, "compile", "-o", "ppo.yaml", "--image", "registry.example/ppo:1")
    text = (here / "ppo.yaml").read_text()
    assert text.count("image: registry.example/ppo:1\n") == 7 and "rlhf-ppo/cpu" not in text
    assert next(yaml.safe_load_all((here / "ppo.yaml").read_text()))["pipelineInfo"]["name"] == "rlhf-ppo"
    assert cli(here, "--version").stdout.startswith("rlhf-ppo 0.")


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of wrong input that the command line ends with."""
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_file_that_can_not_be_written_or_read_is_said_in_one_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(here)
    (here / "binary").write_bytes(b"\xff\x00\xfe")
    for place, reason in (("/nonexistent/x.yaml", "No such file or directory"), (str(here), "Is a directory")):
        assert said(capsys, "compile", "-o", place) == (
            f"rlhf-ppo: -o {place} can't be written: {reason}; name a YAML file"
        )
    assert said(capsys, "compile", "--check", "-o", "binary").startswith("rlhf-ppo: -o binary can't be read: ")


def test_a_run_directory_that_can_not_be_written_is_said_in_one_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(here)
    monkeypatch.setattr("sys.path", list(sys.path))
    (here / "runs").write_text("")
    (here / "mine").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "mine")
    for place, given, reason in (
        ("prompts.jsonl/x", ["--run-dir", "prompts.jsonl/x"], "Not a directory"),
        ("mine", ["--run-dir", "mine"], "Permission denied"),
        ("runs/2", [], "File exists"),
    ):
        line = said(capsys, "run", *NEEDED, *given)
        assert line.startswith(f"rlhf-ppo: --run-dir={place}") and f"can't be written: {reason}; name a dir" in line
