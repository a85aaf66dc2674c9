"""A training that is told to end keeps all it has, and goes on from there: real signals, the same bits."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

import training_worker as worker
from rlhf_ppo.ppo.loop import Interrupted
from rlhf_ppo.preemption import Preemption


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


@pytest.mark.parametrize("processes", [1, 2])
def test_an_attempt_that_takes_too_long_writes_a_checkpoint_and_says_so(
    training_inputs: Path, undisturbed: Path, undisturbed_two: Path, tmp_path: Path, processes: int
) -> None:
    place = tmp_path / "place"
    limited = {"checkpoint_every": 0, "node_processes": processes, "node_timeout_seconds": 3}
    env = {"WAIT_IN_REWARD": "4"} if processes == 1 else {"SLOW_IN_THE_FIRST": "0.5"}
    assert worker.finished(worker.start(training_inputs, place, env, **limited)) == 1
    (failed,) = worker.events(place, "step_failed")
    assert "Stopped: stopped by node_timeout_seconds=3 after" in failed["message"]
    assert "goes on from" in failed["message"]
    assert worker.finished(worker.start(training_inputs, place, node_processes=processes)) == 0
    assert worker.told(place, "resumed") == 1
    worker.assert_same(place, undisturbed if processes == 1 else undisturbed_two)


def test_a_signal_that_comes_while_the_processes_agree_counts_at_the_next_check_on_all() -> None:
    class Busy:
        """Two processes; this one is told to stop while the first agreement is under way."""

        num_processes, device = 2, torch.device("cpu")

        def __init__(self) -> None:
            self.asked = 0

        def reduce(self, flags: torch.Tensor, reduction: str) -> torch.Tensor:
            self.asked += 1
            os.kill(os.getpid(), signal.SIGTERM)
            return flags

    with Preemption(Busy()) as preemption:
        preemption.check()
        assert preemption.taken == {signal.SIGTERM}
        with pytest.raises(Interrupted):
            preemption.check()
