"""Several training processes in one pod: started, told to stop, failed and killed, as the step itself does it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

import training_worker as worker
from rlhf_ppo.devices import Device
from rlhf_ppo.errors import InputError
from rlhf_ppo.launch import processes_on


class Cards(Device):
    """Four cards."""

    name = "cuda"

    def count(self) -> int:
        """How many."""
        return 4


def left_behind(place: Path) -> list[int]:
    """Processes that work in ``place``."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "cwd") == str(place):
                found.append(int(process.name))
        except OSError:
            continue
    return found


def test_there_is_one_process_for_each_card_unless_told_otherwise() -> None:
    assert (processes_on(Device(), 0), processes_on(Device(), 2)) == (1, 2)
    assert (processes_on(Cards(), 0), processes_on(Cards(), 1), processes_on(Cards(), 4)) == (4, 1, 4)
    with pytest.raises(InputError, match="node_processes=8, and this pod sees 4 cuda cards"):
        processes_on(Cards(), 8)


def test_the_step_trains_in_two_processes_as_torchrun_does_and_goes_on_after_sigterm(
    training_inputs: Path, undisturbed_two: Path, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    process = worker.start(training_inputs, place, node_processes=2, checkpoint_every=0)
    while process.is_alive() and worker.told(place, "progress") < 9:
        time.sleep(0.001)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    assert worker.finished(process) == 1
    (failed,) = worker.events(place, "step_failed")
    assert failed["message"].startswith("Stopped: stopped by SIGTERM after")
    assert left_behind(place) == []
    assert worker.finished(worker.start(training_inputs, place, node_processes=2, checkpoint_every=0)) == 0
    assert worker.told(place, "resumed") == 1
    worker.assert_same(place, undisturbed_two)


@pytest.mark.parametrize(
    ("reward", "message", "input_error"),
    [
        (
            "fails_in_the_second",
            "ProcessFailed: process 1 of 2: RewardFailed: reward_model='noisy_reward:fails_in_the_second' raised "
            "ConnectionError: the reward service went away (at ",
            False,
        ),
        (
            "is_killed_in_the_second",
            "ProcessFailed: process 1 of 2 was ended by SIGKILL; that is often for want",
            False,
        ),
        ("not_there", "reward_model='noisy_reward:not_there': the module noisy_reward has no function", True),
    ],
)
def test_the_first_failure_is_the_steps(
    training_inputs: Path, tmp_path: Path, reward: str, message: str, input_error: bool
) -> None:
    place = tmp_path / "place"
    name = f"noisy_reward:{reward}"
    assert worker.finished(worker.start(training_inputs, place, node_processes=2, reward_model=name)) == 1
    (failed,) = worker.events(place, "step_failed")
    assert failed["message"].startswith(message) and failed["input_error"] is input_error
    assert left_behind(place) == [] and not (place / "policy").exists()
