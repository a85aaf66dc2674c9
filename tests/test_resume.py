"""A killed training goes on as if nothing had happened: real processes, real signals, the same bits."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import training_worker as worker
from rlhf_ppo.checkpoint import CheckpointStore, DamagedCheckpoint
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


@pytest.mark.parametrize("changes", [{"model_lora_r": 4}, {"ppo_separate_critic": True, "whiten_rewards": True}])
def test_adapters_and_a_critic_go_on_with_the_same_bits(inputs: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    assert worker.finished(worker.start(inputs, alone, steps=96, **changes)) == 0
    kill_at(worker.start(inputs, killed, steps=96, **changes), killed, 6, 0.01)
    assert worker.finished(worker.start(inputs, killed, steps=96, **changes)) == 0
    assert worker.told(killed, "resumed") == 1
    assert_same(killed, alone)


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


@pytest.mark.parametrize(
    "env", [{"WAIT_IN_REWARD": "4"}, {"WAIT_BEFORE_UPDATE": "3"}, {"WAIT_IN_UPDATE": "11"}, {"WAIT_IN_UPDATE": "14"}]
)
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


def test_the_best_policy_is_the_same_however_often_training_was_killed(inputs: Path, tmp_path: Path) -> None:
    best = {"push_to_hub_if_best_kwargs": {"repo_id": "me/film"}, "compare_steps": 2, "learning_rate": 5e-2}
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    assert worker.finished(worker.start(inputs, alone, **best)) == 0
    for step in (6, 13, 19):
        kill_at(worker.start(inputs, killed, **best), killed, step, 0.01)
    assert worker.finished(worker.start(inputs, killed, **best)) == 0
    assert worker.told(killed, "resumed") == 3
    assert_same(killed, alone)
    found = [json.loads((place / "policy" / "training.json").read_text())["best_step"] for place in (alone, killed)]
    assert found[0] == found[1] and found[0] % 2 == 0 and found[0] < 23
    assert "manifest.json" not in {path.name for path in (killed / "policy").iterdir()}


def file_of(text: str) -> Callable[[Path], None]:
    return lambda directory: (directory / "weights").write_text(text) and None


def test_policies_that_were_the_best_are_kept_as_long_as_a_checkpoint_may_want_them(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, {}, 2)
    state = {"weights": torch.ones(2)}
    for step in range(1, 7):
        store.save(f"step-{step:08d}-000000", state, wait=True)
        if step in (1, 2, 5):
            store.keep_best(step, file_of(f"of {step}"))
    # Training may restart at step 5, where the policy of step 2 was the best.
    assert {path.name for path in tmp_path.iterdir()} == {
        "step-00000005-000000", "step-00000006-000000", "best-00000002", "best-00000005",
    }  # fmt: skip
    assert (store.best(2) / "weights").read_text() == "of 2"
    (tmp_path / "best-00000002" / "weights").write_text("of 3")
    with pytest.raises(DamagedCheckpoint, match="weights was altered"):
        store.best(2)


def test_everything_in_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, {"a": 1}, 2)
    numbers = torch.arange(6, dtype=torch.int64)
    half, yes = torch.ones(2, 2, dtype=torch.bfloat16), torch.tensor([True])
    groups = [{"betas": (0.9, 0.999), "lr": 1e-3}]
    state: dict[str, Any] = {
        "tensors": {"half": half, "view": numbers[::2], "same": numbers, "bool": yes},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}, 7: {}}, "param_groups": groups},
        "plain": [None, True, 2, 1.5, float("inf"), "text", [], {}],
    }
    store.save("step-00000001-000000", state, wait=True)
    numbers += 1  # what was saved was copied
    found = store.read("step-00000001-000000")
    assert found["plain"] == state["plain"]
    assert found["optimizer"]["param_groups"] == groups
    assert list(found["optimizer"]["state"]) == [0, 7] and float(found["optimizer"]["state"][0]["step"]) == 3.0
    assert found["tensors"]["view"].tolist() == [0, 2, 4] and found["tensors"]["same"].tolist() == [0, 1, 2, 3, 4, 5]
    assert found["tensors"]["half"].dtype == torch.bfloat16 and found["tensors"]["bool"].tolist() == [True]
    with pytest.raises(TypeError, match="/what: set can't be kept"):
        store.save("step-00000002-000000", {"what": {1}})


def test_a_full_disk_ends_no_training_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHF_PPO_EVENTS", str(tmp_path / "events.jsonl"))
    store = CheckpointStore(tmp_path / "store", {}, 2)

    def full(tensors: object, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    store.save("step-00000001-000000", {"weights": torch.ones(2)})
    store.finish_writing()
    (failed,) = worker.events(tmp_path, "checkpoint_failed")
    assert "No space left" in failed["reason"] and list((tmp_path / "store").iterdir()) == []
    with pytest.raises(OSError, match="No space left"):
        store.save("step-00000002-000000", {"weights": torch.ones(2)}, wait=True)


def test_a_checkpoint_is_left_out_while_the_one_before_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch as files

    go, save_file = threading.Event(), files.save_file
    monkeypatch.setattr(files, "save_file", lambda *given: (go.wait(60), save_file(*given)))
    store, state = CheckpointStore(tmp_path, {}, 3), {"weights": torch.ones(2)}
    assert store.save("step-00000001-000000", state) and not store.save("step-00000002-000000", state)
    go.set()
    assert store.save("step-00000003-000000", state, wait=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001-000000", "step-00000003-000000"]


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_ppo.checkpoint.FORMAT", 99)
    CheckpointStore(tmp_path, {}, 2).save("step-00000001-000000", {}, wait=True)
    monkeypatch.undo()
    with pytest.raises(InputError, match="has the format 99, and this version reads 1"):
        CheckpointStore(tmp_path, {}, 2).latest()


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
