"""Checkpoints: complete or absent, damage is found, and another training's are refused."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import training_worker as worker
from rlhf_ppo import checkpoint
from rlhf_ppo.artifacts import digest_of, sha256
from rlhf_ppo.checkpoint import CheckpointStore, DamagedCheckpoint
from rlhf_ppo.errors import InputError
from rlhf_ppo.parameters import decode
from rlhf_ppo.ppo_training.keep import contents_of


@pytest.fixture(scope="module")
def stopped(training_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that was stopped in its fifth step, with its last three checkpoints."""
    place = tmp_path_factory.mktemp("stopped")
    process = worker.start(training_inputs, place, {"WAIT_IN_REWARD": "6"}, checkpoint_keep=3, checkpoint_name="mine")
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
    training_inputs: Path, stopped: Path, undisturbed: Path, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    shutil.copytree(stopped, place)
    (place / "waiting").unlink()
    with (place / "checkpoints" / "mine" / "step-00000004-000000" / "tensors.safetensors").open("r+b") as file:
        file.seek(-40, os.SEEK_END)
        file.write(b"\0\1\2\3")
    assert worker.finished(worker.start(training_inputs, place, checkpoint_keep=3, checkpoint_name="mine")) == 0
    assert worker.events(place, "resumed")[-1]["done"] == 3
    worker.assert_same(place, undisturbed)


def test_a_checkpoint_of_another_training_is_refused_with_the_differences(
    training_inputs: Path, stopped: Path, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    shutil.copytree(stopped, place)
    changes = {"learning_rate": 2e-2, "ppo_epochs": 3}
    assert worker.finished(worker.start(training_inputs, place, checkpoint_name="mine", **changes)) == 1
    failed = worker.events(place, "step_failed")[-1]
    assert failed["input_error"]
    for words in ("learning_rate is 0.01 there and 0.02 here", "ppo_epochs is 2 there and 3 here", "checkpoint_name"):
        assert words in failed["message"]


def test_a_checkpoint_of_another_code_of_the_reward_is_refused(
    training_inputs: Path, stopped: Path, tmp_path: Path
) -> None:
    place, inputs = tmp_path / "place", tmp_path / "inputs"
    shutil.copytree(stopped, place)
    shutil.copytree(training_inputs, inputs)
    with (inputs / "noisy_reward.py").open("a") as file:
        file.write("changed = 1\n")
    assert worker.finished(worker.start(inputs, place, checkpoint_name="mine")) == 1
    failed = worker.events(place, "step_failed")[-1]
    assert failed["input_error"] and "the content of noisy_reward:noisy is " in failed["message"]


def test_what_rewards_and_the_value_head_hold_makes_another_training_and_what_a_reward_writes_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("package_of_a_user/__init__.py", "weights/model.safetensors", "more/model.safetensors", "head"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    weights, more, head = (str(tmp_path / name) for name in ("weights", "more", "head"))
    settings = decode(
        {"model_name": "org/model", "query_dataset": "org/prompts", "reward_model": weights, "ppo_value_head": head,
         "reward_sum": {"package_of_a_user:f": 1.0, more: 1.0, "builtins:len": 1.0, "https://a/b": 1.0, "org/x": 1.0}}
    )  # fmt: skip
    before = contents_of(settings)
    assert set(before) == {f"the content of {name}" for name in (weights, more, head, "package_of_a_user:f")}
    (tmp_path / "package_of_a_user" / "scored.log").write_text("a line")
    assert contents_of(settings) == before
    for name in ("package_of_a_user/__init__.py", "weights/model.safetensors", "more/model.safetensors", "head"):
        (tmp_path / name).write_text("changed = 1")
    after = contents_of(settings)
    assert [name for name in before if after[name] == before[name]] == []


def test_names_of_runs_and_trackers_do_not_make_another_training(
    training_inputs: Path, stopped: Path, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    shutil.copytree(stopped, place)
    (place / "waiting").unlink()
    changes = {"exp_name": "another", "checkpoint_every": 3, "tracker_project_name": "elsewhere"}
    process = worker.start(training_inputs, place, {"RUN_ID": "run-2"}, checkpoint_name="mine", **changes)
    assert worker.finished(process) == 0
    assert worker.events(place, "resumed")[-1]["done"] == 4
    # The new run's tracker is told of the steps before it, too.
    told = [json.loads(line) for line in (place / "spool" / "train_ppo-2" / "spool.jsonl").read_text().splitlines()]
    steps = {point[3] for line in told if line["kind"] == "metrics" for point in line["values"]}
    assert steps == set(range(24))


def test_a_store_that_cannot_be_written_is_an_error_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    who = f"user {os.getuid()} or group {os.getgid()} may write to"
    with pytest.raises(InputError, match=f"checkpoint_dir: .* can't be made .*: name a directory that {who}"):
        CheckpointStore(tmp_path / "file" / "inside", {}, 2)


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
    store, state = CheckpointStore(tmp_path / "store", {}, 2), {"weights": torch.ones(5 << 20)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # What the system says in a file's middle, as where a disk is full.
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 << 20, limits[1]))
    try:
        store.save("step-00000001-000000", state)
        store.finish_writing()
        (failed,) = worker.events(tmp_path, "checkpoint_failed")
        assert "File too large" in failed["reason"] and list((tmp_path / "store").iterdir()) == []
        with pytest.raises(OSError, match="File too large"):
            store.save("step-00000002-000000", state, wait=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert store.save("step-00000003-000000", state, wait=True) and store.latest() == "step-00000003-000000"


@pytest.fixture
def go(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set, it lets checkpoints be written."""
    go, write = threading.Event(), checkpoint.write_tensors
    monkeypatch.setattr(checkpoint, "write_tensors", lambda *given: write(*given) if go.wait(60) else "")
    return go


def test_a_checkpoint_is_left_out_while_the_one_before_is_written(tmp_path: Path, go: threading.Event) -> None:
    store, state = CheckpointStore(tmp_path, {}, 3), {"weights": torch.ones(2)}
    assert store.save("step-00000001-000000", state) and not store.save("step-00000002-000000", state)
    go.set()
    assert store.save("step-00000003-000000", state, wait=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001-000000", "step-00000003-000000"]


def test_a_state_may_change_once_the_store_knows_of_it(tmp_path: Path, go: threading.Event) -> None:
    store, weights, step = CheckpointStore(tmp_path, {}, 9), torch.ones(1 << 20), torch.tensor(1)
    assert store.save("step-00000001-000000", {"weights": weights, "step": step})
    store.before_change()
    weights += 1
    step += 1
    threading.Timer(0.2, go.set).start()
    assert store.save("step-00000002-000000", {"weights": weights, "step": step}, wait=True)
    for number in (1, 2):
        found = store.read(f"step-{number:08}-000000")
        assert bool((found["weights"] == number).all()) and int(found["step"]) == number


def test_checkpoints_whose_digests_name_no_kind_are_checked_by_sha256(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, {}, 2)
    store.save("step-00000001-000000", {"weights": torch.ones(2)}, wait=True)
    directory = tmp_path / "step-00000001-000000"
    digests = {name: sha256(directory / name) for name in ("state.json", "tensors.safetensors")}
    (directory / "manifest.json").write_text(json.dumps({"files": digests, "digest": digest_of(digests)}))
    assert store.latest() == "step-00000001-000000"
    (directory / "state.json").write_text((directory / "state.json").read_text() + " ")
    assert store.latest() is None


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_ppo.checkpoint.FORMAT", 99)
    CheckpointStore(tmp_path, {}, 2).save("step-00000001-000000", {}, wait=True)
    monkeypatch.undo()
    with pytest.raises(InputError, match="has the format 99, and this version reads"):
        CheckpointStore(tmp_path, {}, 2).latest()
