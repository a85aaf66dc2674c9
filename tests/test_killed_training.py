"""A killed training goes on as if nothing had happened: real processes, SIGKILL, the same bits."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

import training_worker as worker


def test_ten_killed_trainings_end_with_the_same_bits(training_inputs: Path, undisturbed: Path, tmp_path: Path) -> None:
    moments = random.Random(20261123)
    resumed = 0
    for number in range(10):
        place = tmp_path / str(number)
        worker.kill_at(worker.start(training_inputs, place), place, moments.randrange(24), moments.uniform(0, 0.1))
        assert worker.finished(worker.start(training_inputs, place)) == 0, (place / "stderr").read_text()
        resumed += worker.told(place, "resumed")
        worker.assert_same(place, undisturbed)
    assert resumed >= 7


def test_a_training_that_is_killed_again_and_again_ends_with_the_same_bits(
    training_inputs: Path, undisturbed: Path, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    for step in (5, 9, 14, 20):
        worker.kill_at(worker.start(training_inputs, place), place, step, 0.02)
    assert worker.finished(worker.start(training_inputs, place)) == 0
    assert worker.told(place, "resumed") == 4
    worker.assert_same(place, undisturbed)


def test_the_best_policy_is_the_same_however_often_training_was_killed(training_inputs: Path, tmp_path: Path) -> None:
    best = {"push_to_hub_if_best_kwargs": {"repo_id": "me/film"}, "compare_steps": 2, "learning_rate": 5e-2}
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    assert worker.finished(worker.start(training_inputs, alone, **best)) == 0
    for step in (6, 13, 19):
        worker.kill_at(worker.start(training_inputs, killed, **best), killed, step, 0.01)
    assert worker.finished(worker.start(training_inputs, killed, **best)) == 0
    assert worker.told(killed, "resumed") == 3
    worker.assert_same(killed, alone)
    found = [json.loads((place / "policy" / "training.json").read_text())["best_step"] for place in (alone, killed)]
    assert found[0] == found[1] and found[0] % 2 == 0 and found[0] < 23
    assert "manifest.json" not in {path.name for path in (killed / "policy").iterdir()}


def test_a_checkpoint_that_is_written_while_the_policy_changes_is_of_before(
    training_inputs: Path, undisturbed: Path, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    process = worker.start(training_inputs, place, {"WRITE_LATE": "1", "WAIT_IN_UPDATE": "12"}, checkpoint_name="mine")
    worker.wait_for(place / "waiting", process)
    # The third PPO step has taken an optimizer step: only then was its checkpoint begun.
    worker.wait_for(place / "checkpoints" / "mine" / "step-00000002-000000", process)
    process.kill()
    process.join()
    assert worker.finished(worker.start(training_inputs, place, checkpoint_name="mine")) == 0
    assert worker.events(place, "resumed")[-1]["done"] == 2
    worker.assert_same(place, undisturbed)


@pytest.mark.parametrize("changes", [{"model_lora_r": 4}, {"ppo_separate_critic": True, "whiten_rewards": True}])
def test_adapters_and_a_critic_go_on_with_the_same_bits(
    training_inputs: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    assert worker.finished(worker.start(training_inputs, alone, steps=96, **changes)) == 0
    worker.kill_at(worker.start(training_inputs, killed, steps=96, **changes), killed, 6, 0.01)
    assert worker.finished(worker.start(training_inputs, killed, steps=96, **changes)) == 0
    assert worker.told(killed, "resumed") == 1
    worker.assert_same(killed, alone)
