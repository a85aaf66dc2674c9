"""A training that is told to end keeps all it has, and goes on from there: real signals, the same bits."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

import training_worker as worker


@pytest.mark.parametrize(
    "env", [{"WAIT_IN_REWARD": "4"}, {"WAIT_BEFORE_UPDATE": "3"}, {"WAIT_IN_UPDATE": "11"}, {"WAIT_IN_UPDATE": "14"}]
)
def test_sigterm_keeps_everything_wherever_it_comes(
    training_inputs: Path, undisturbed: Path, tmp_path: Path, env: dict[str, str]
) -> None:
    """In sampling and scoring the step begins again; inside an update it goes on from the optimizer step."""
    place = tmp_path / "place"
    process = worker.start(training_inputs, place, env, checkpoint_every=0)
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
    assert worker.finished(worker.start(training_inputs, place, checkpoint_every=0)) == 0
    worker.assert_same(place, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_two_processes_that_are_ended_go_on_with_the_same_bits(
    training_inputs: Path, undisturbed_two: Path, tmp_path: Path, number: signal.Signals
) -> None:
    ended = tmp_path / "ended"
    every = 0 if number == signal.SIGTERM else 2
    process = worker.start_two(training_inputs, ended, checkpoint_every=every)
    while process.poll() is None and worker.told(ended, "progress") < 9:
        time.sleep(0.001)
    # torchrun hands SIGTERM on; its workers are in sessions of their own.
    for pid in [process.pid] if number == signal.SIGTERM else [process.pid, *worker.children(process.pid)]:
        os.kill(pid, number)
    assert process.wait(300) != 0
    state = json.loads(sorted((ended / "checkpoints").glob("*/step-*/state.json"))[-1].read_text())["state"]
    random_states = dict(state["dict"])["random"]["list"]
    assert len(random_states) == 2 and random_states[0] != random_states[1]
    assert worker.start_two(training_inputs, ended, checkpoint_every=every).wait(300) == 0, (
        ended / "torchrun"
    ).read_text()
    assert worker.events(ended, "resumed")[-1]["done"] >= (9 if number == signal.SIGTERM else 6)
    worker.assert_same(ended, undisturbed_two)
