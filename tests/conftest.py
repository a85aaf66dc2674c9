"""What all tests need."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

# A shell script's background jobs ignore SIGINT, and nohup's SIGHUP; so would the commands that the tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(params=(False, True), ids=("by number", "by token"))
def by_token(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """States that lie in memory as one kind of processor or the other wants them."""
    from rlhf_ppo.ppo import cpu

    monkeypatch.setattr(cpu, "BY_TOKEN", request.param)
    monkeypatch.setattr(cpu, "NARROW", 0)
    return bool(request.param)


@pytest.fixture(scope="session")
def training_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and prompts, as the steps before training leave them."""
    import training_worker as worker

    directory = tmp_path_factory.mktemp("inputs")
    worker.make_inputs(directory)
    return directory


@pytest.fixture(scope="session")
def undisturbed(training_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of 24 PPO steps that nothing happened to."""
    import training_worker as worker

    place = tmp_path_factory.mktemp("undisturbed")
    assert worker.finished(worker.start(training_inputs, place)) == 0, (place / "stderr").read_text()
    return place


@pytest.fixture(scope="session")
def undisturbed_two(training_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training by two processes that nothing happened to."""
    import training_worker as worker

    place = tmp_path_factory.mktemp("undisturbed_two")
    assert worker.start_two(training_inputs, place).wait(300) == 0, (place / "torchrun").read_text()[-3000:]
    return place
