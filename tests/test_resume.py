"""A killed training goes on as if nothing had happened: real processes, real signals, the same bits."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

import training_worker as worker
from rlhf_ppo.checkpoint import CheckpointStore
from rlhf_ppo.errors import InputError


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    worker.make_inputs(directory)
    return directory


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of 24 PPO steps that nothing happened to."""
    place = tmp_path_factory.mktemp("undisturbed")
    assert worker.finished(worker.start(inputs, place)) == 0, (place / "stderr").read_text()
    return place


def assert_same(place: Path, undisturbed: Path) -> None:
    weights, history = worker.result(place)
    expected, expected_history = worker.result(undisturbed)
    assert list(weights) == list(expected)
    assert [name for name in weights if not torch.equal(weights[name], expected[name])] == []
    assert history == expected_history
    assert not (place / "checkpoints").exists() or not list((place / "checkpoints").iterdir())


def kill_at(process: worker.BaseProcess, place: Path, step: int, seconds: float) -> None:
    """SIGKILL ``seconds`` after the training has told of its PPO step ``step``; 0 is before the first."""
    while process.is_alive() and worker.told(place, "progress") < step:
        time.sleep(0.001)
    time.sleep(seconds)
    assert process.pid is not None
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_ten_killed_trainings_end_with_the_same_bits(inputs: Path, undisturbed: Path, tmp_path: Path) -> None:
    moments = random.Random(20261123)
    resumed = 0
    for number in range(10):
        place = tmp_path / str(number)
        kill_at(worker.start(inputs, place), place, moments.randrange(24), moments.uniform(0, 0.1))
        assert worker.finished(worker.start(inputs, place)) == 0, (place / "stderr").read_text()
        resumed += worker.told(place, "resumed")
        assert_same(place, undisturbed)
    assert resumed >= 7


def test_a_training_that_is_killed_again_and_again_ends_with_the_same_bits(
    inputs: Path, undisturbed: Path, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    for step in (5, 9, 14, 20):
        kill_at(worker.start(inputs, place), place, step, 0.02)
    assert worker.finished(worker.start(inputs, place)) == 0
    assert worker.told(place, "resumed") == 4
    assert_same(place, undisturbed)


@pytest.mark.parametrize("env", [{"WAIT_IN_REWARD": "4"}, {"WAIT_IN_UPDATE": "11"}, {"WAIT_IN_UPDATE": "14"}])
def test_sigterm_keeps_everything_wherever_it_comes(
    inputs: Path, undisturbed: Path, tmp_path: Path, env: dict[str, str]
) -> None:
    """In sampling and scoring the step begins again; inside an update it goes on from the optimizer step."""
    place = tmp_path / "place"
    process = worker.start(inputs, place, env, checkpoint_every=0)
    worker.wait_for(place / "waiting", process)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    (place / "go").touch()
    assert worker.finished(process) == 1
    (failed,) = worker.events(place, "step_failed")
    assert "stopped by SIGTERM" in failed["message"] and "goes on from" in failed["message"]
    (folder,) = (place / "checkpoints").iterdir()
    (checkpoint,) = folder.iterdir()
    inside = int(checkpoint.name.rpartition("-")[2])
    # Each PPO step has four optimizer steps, and a fifth call that finds them done.
    assert inside == {"11": 1, "14": 4}.get(env.get("WAIT_IN_UPDATE", ""), 0)
    assert worker.finished(worker.start(inputs, place, checkpoint_every=0)) == 0
    assert_same(place, undisturbed)


@pytest.fixture(scope="module")
def stopped(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that was stopped in its fifth step, with its last three checkpoints."""
    place = tmp_path_factory.mktemp("stopped")
    process = worker.start(inputs, place, {"WAIT_IN_REWARD": "6"}, checkpoint_keep=3, checkpoint_name="mine")
    worker.wait_for(place / "waiting", process)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    assert worker.finished(process) == 1
    assert [path.name for path in sorted((place / "checkpoints" / "mine").iterdir())] == [
        "step-00000002-000000", "step-00000003-000000", "step-00000004-000000",
    ]  # fmt: skip
    return place


def identity(stopped: Path) -> dict[str, object]:
    state = json.loads((stopped / "checkpoints" / "mine" / "step-00000004-000000" / "state.json").read_text())
    found: dict[str, object] = state["identity"]
    return found


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "delete"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, harm: str
) -> None:
    monkeypatch.setenv("RLHF_PPO_EVENTS", str(tmp_path / "events.jsonl"))
    chance = random.Random(name)
    for number in range(8 if harm == "flip" else 1):
        folder = tmp_path / str(number)
        shutil.copytree(stopped / "checkpoints" / "mine", folder)
        file = folder / "step-00000004-000000" / name
        content = bytearray(file.read_bytes())
        if harm == "flip":
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            file.write_bytes(content)
        elif harm == "cut":
            file.write_bytes(content[: len(content) // 2])
        else:
            file.unlink()
        assert CheckpointStore(folder, identity(stopped), 3).latest() == "step-00000003-000000"
        told = worker.events(tmp_path, "checkpoint_damaged")[-1]
        assert told["name"] == "step-00000004-000000" and name in told["reason"]


def test_training_goes_on_from_the_checkpoint_before_a_damaged_one_with_the_same_bits(
    inputs: Path, stopped: Path, undisturbed: Path, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    shutil.copytree(stopped, place)
    (place / "waiting").unlink()
    with (place / "checkpoints" / "mine" / "step-00000004-000000" / "tensors.safetensors").open("r+b") as file:
        file.seek(-40, os.SEEK_END)
        file.write(b"\0\1\2\3")
    assert worker.finished(worker.start(inputs, place, checkpoint_keep=3, checkpoint_name="mine")) == 0
    assert worker.events(place, "resumed")[-1]["done"] == 3
    assert_same(place, undisturbed)


def test_a_checkpoint_of_another_training_is_refused_with_the_differences(
    inputs: Path, stopped: Path, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    shutil.copytree(stopped, place)
    changes = {"learning_rate": 2e-2, "ppo_epochs": 3}
    assert worker.finished(worker.start(inputs, place, checkpoint_name="mine", **changes)) == 1
    failed = worker.events(place, "step_failed")[-1]
    assert failed["input_error"]
    for words in ("learning_rate is 0.01 there and 0.02 here", "ppo_epochs is 2 there and 3 here", "checkpoint_name"):
        assert words in failed["message"]


def test_names_of_runs_and_trackers_do_not_make_another_training(inputs: Path, stopped: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    shutil.copytree(stopped, place)
    (place / "waiting").unlink()
    changes = {"exp_name": "another", "checkpoint_every": 3, "tracker_project_name": "elsewhere"}
    process = worker.start(inputs, place, {"RUN_ID": "run-2"}, checkpoint_name="mine", **changes)
    assert worker.finished(process) == 0
    assert worker.events(place, "resumed")[-1]["done"] == 4
    # The new run's tracker is told of the steps before it, too.
    told = [json.loads(line) for line in (place / "spool" / "train_ppo-2" / "spool.jsonl").read_text().splitlines()]
    steps = {point[3] for line in told if line["kind"] == "metrics" for point in line["values"]}
    assert steps == set(range(24))


def test_a_store_that_cannot_be_written_is_an_error_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="checkpoint_dir"):
        CheckpointStore(tmp_path / "file" / "inside", {}, 2)


@pytest.fixture(scope="module")
def undisturbed_two(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training by two processes that nothing happened to."""
    place = tmp_path_factory.mktemp("undisturbed_two")
    assert worker.start_two(inputs, place).wait(300) == 0, (place / "torchrun").read_text()[-3000:]
    return place


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_two_processes_that_are_ended_go_on_with_the_same_bits(
    inputs: Path, undisturbed_two: Path, tmp_path: Path, number: signal.Signals
) -> None:
    ended = tmp_path / "ended"
    every = 0 if number == signal.SIGTERM else 2
    process = worker.start_two(inputs, ended, checkpoint_every=every)
    while process.poll() is None and worker.told(ended, "progress") < 9:
        time.sleep(0.001)
    # torchrun hands SIGTERM on; its workers are in sessions of their own.
    for pid in [process.pid] if number == signal.SIGTERM else [process.pid, *worker.children(process.pid)]:
        os.kill(pid, number)
    assert process.wait(300) != 0
    state = json.loads(sorted((ended / "checkpoints").glob("*/step-*/state.json"))[-1].read_text())["state"]
    random_states = dict(state["dict"])["random"]["list"]
    assert len(random_states) == 2 and random_states[0] != random_states[1]
    assert worker.start_two(inputs, ended, checkpoint_every=every).wait(300) == 0, (ended / "torchrun").read_text()
    assert worker.events(ended, "resumed")[-1]["done"] >= (9 if number == signal.SIGTERM else 6)
    assert_same(ended, undisturbed_two)
