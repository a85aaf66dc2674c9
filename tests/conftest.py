"""What all tests need."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# A shell script's background jobs ignore SIGINT, and nohup's SIGHUP; so would the commands that the tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(params=("by number", "by token", "by oneDNN", "by both"))
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What this kind of processor wants: the layout of states in memory, and with the last two oneDNN's products.

    With the first one MKL clears results by itself.

    "by both" has them of all tiny weights but the smallest, which attention's output goes through.
    """
    from rlhf_ppo.ppo import products

    monkeypatch.setattr(products, "BY_TOKEN", request.param != "by number")
    monkeypatch.setattr(products, "BY_ONEDNN", request.param in ("by oneDNN", "by both"))
    monkeypatch.setattr(products, "LEAST_BY_ONEDNN", 2000 if request.param == "by both" else 0)
    monkeypatch.setattr(products, "GRADIENTS_BY_ONEDNN", request.param != "by both")
    monkeypatch.setattr(products, "NARROW", 0)
    monkeypatch.setattr(products, "CLEARS", request.param == "by number")
    return str(request.param)


@pytest.fixture
def precisions() -> Iterator[Callable[[], None]]:
    """Lets a test train in several: accelerate has one for each process, until what this gives is called."""
    from accelerate.state import AcceleratorState

    def forget() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)

    forget()
    yield forget
    forget()


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
