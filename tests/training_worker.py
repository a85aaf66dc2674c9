"""Training in a process of its own, which tests may kill: the real step, on a tiny model."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Event
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from rlhf_ppo import checkpoint, tensor_files
from rlhf_ppo.checkpoint import CheckpointStore
from rlhf_ppo.dataset_preparation.prepare import prepare_dataset
from rlhf_ppo.parameters import decode
from rlhf_ppo.ppo import PPOTrainer
from rlhf_ppo.ppo.optimization import Optimization
from rlhf_ppo.ppo_training.keep import Keeper
from rlhf_ppo.ppo_training.train import train_on_cards
from rlhf_ppo.reference_snapshot.snapshot import snapshot_reference
from rlhf_ppo.settings import DataSettings
from rlhf_ppo.steps import running_step
from tiny_models import llama, word_tokenizer

REWARD = """
import os, pathlib, random, time
import numpy, torch
from rlhf_ppo import tracking

calls = 0
# Nobody is there to be told, and no test waits for that.
tracking.DEADLINE = 0.0

def noisy(prompts, responses):
    # Draws from every global random stream: a resumed run must find them where they were.
    global calls
    calls += 1
    wait_at = os.environ.get("WAIT_IN_REWARD")
    if wait_at and len(responses) > 2 and calls == int(wait_at):
        pathlib.Path("waiting").touch()
        time.sleep(600)
    if os.environ.get("RANK", "0") == "0":
        time.sleep(float(os.environ.get("SLOW_IN_THE_FIRST", "0")))
    for _ in range(1 + int(os.environ.get("RANK", "0"))):
        noise = random.random() + numpy.random.rand() + float(torch.rand(()))
    high = [sum(int(word[1:]) > 33 for word in text.split() if word[1:].isdigit()) for text in responses]
    return [value / 12 + noise for value in high]

def fails_in_the_second(prompts, responses):
    if os.environ.get("RANK") == "1":
        raise ConnectionError("the reward service went away")
    return [1.0] * len(responses)

def is_killed_in_the_second(prompts, responses):
    # Not in the trial before training: the processes are connected, and the first notices that the second is gone.
    if os.environ.get("RANK") == "1" and len(responses) > 2:
        os.kill(os.getpid(), 9)
    return [1.0] * len(responses)

def is_killed_in_the_second_once(prompts, responses):
    global calls
    calls += 1
    here = pathlib.Path(os.environ["RLHF_PPO_CHECKPOINTS"])
    later = [path for path in here.glob("*/step-*-000000") if path.name > "step-00000002"]
    if os.environ.get("RANK") == "1" and calls >= 5 and later and not pathlib.Path("killed").exists():
        pathlib.Path("killed").touch()
        print("about to run out of memory", flush=True)
        os.kill(os.getpid(), 9)
    return [float(len(text)) for text in responses]
"""
SMALL = {
    "model_name": "model", "query_dataset": "rows.jsonl", "reward_model": "noisy_reward:noisy", "steps": 192,
    "batch_size": 8, "mini_batch_size": 2, "gradient_accumulation_steps": 2, "ppo_epochs": 2, "learning_rate": 1e-2,
    "rollout_max_new_tokens": 8, "checkpoint_every": 1, "use_score_scaling": True, "use_score_norm": True,
    "horizon": 100.0, "mlflow_tracking_uri": "sqlite:////dev/null/nowhere",
}  # fmt: skip


def make_inputs(directory: Path) -> None:
    """A tiny model, prompts and a reward in ``directory``, prepared by the real steps."""
    llama(seed=3).save_pretrained(directory / "model")
    word_tokenizer().save_pretrained(directory / "model")
    snapshot_reference(str(directory / "model"), "", directory / "reference", directory / "tokenizer")
    rows = [json.dumps({"prompt": f"w{3 + i % 60} w{3 + i // 60} w5"}) for i in range(40)]
    (directory / "rows.jsonl").write_text("\n".join(rows))
    prepare_dataset(
        query_dataset=str(directory / "rows.jsonl"),
        data=DataSettings(),
        remove_unused_columns=True,
        max_new_tokens=8,
        tokenizer=directory / "tokenizer",
        prompts=directory / "prompts",
    )
    (directory / "noisy_reward.py").write_text(REWARD)


def start(inputs: Path, place: Path, env: dict[str, str] | None = None, **changes: Any) -> BaseProcess:
    """Begin training with outputs and checkpoints in ``place``; returns the process."""
    context = multiprocessing.get_context("forkserver")
    # This module itself is not among them: Python 3.11's fork server does not look into the tests' directory.
    stores = ["mlflow.tracking", "mlflow.store.tracking.sqlalchemy_store"]
    models = ["transformers.models.llama.modeling_llama", "peft"]
    context.set_forkserver_preload(["rlhf_ppo.ppo_training.train", *stores, *models, "datasets", "pyarrow.parquet"])
    process = context.Process(target=_train, args=(inputs, place, {**SMALL, **changes}, env or {}))
    process.start()
    return process


def _train(inputs: Path, place: Path, values: dict[str, Any], env: dict[str, str]) -> None:
    place.mkdir(exist_ok=True)
    os.chdir(place)
    os.environ.update(
        {**env, "RLHF_PPO_EVENTS": str(place / "events.jsonl"), "RLHF_PPO_SPOOL": str(place / "spool"),
         "RLHF_PPO_CHECKPOINTS": str(place / "checkpoints")}
    )  # fmt: skip
    sys.path.insert(0, str(inputs))
    sys.stderr = (place / "stderr").open("a")
    _leave_no_checkpoint_out()
    if "WAIT_BEFORE_UPDATE" in env:
        _wait_before_update(int(env["WAIT_BEFORE_UPDATE"]))
    if "WAIT_IN_UPDATE" in env:
        _wait_in_update(int(env["WAIT_IN_UPDATE"]))
    if "WRITE_LATE" in env:
        _write_late()
    with running_step("train_ppo"):
        train_on_cards(decode(values).to_json(), inputs / "prompts", inputs / "reference", place / "policy",
                       place / "history", env.get("RUN_ID", "run-1"))  # fmt: skip


def _leave_no_checkpoint_out() -> None:
    """Begin a PPO step once the checkpoint before is written: tests count on it, however slow the disk is."""
    before_step = Keeper.before_step

    def unhurried(self: Keeper, step: int) -> None:
        while self.store.busy:
            time.sleep(0.001)
        before_step(self, step)

    Keeper.before_step = unhurried  # type: ignore[method-assign]


def _wait_before_update(number: int) -> None:
    """Stop in the ``number``-th PPO step, when it was scored and the running moments know it."""
    begin, calls = PPOTrainer.begin_update, 0

    def waiting(self: PPOTrainer, *given: Any) -> None:
        nonlocal calls
        calls += 1
        begin(self, *given)
        if calls == number:
            Path("waiting").touch()
            time.sleep(600)

    PPOTrainer.begin_update = waiting  # type: ignore[method-assign]


def _wait_in_update(number: int) -> None:
    """Stop in the middle of a PPO step, before the ``number``-th optimizer step, until a signal has been taken."""
    advance, calls = Optimization.advance, 0

    def waiting(self: Optimization, update: Any) -> bool:
        nonlocal calls
        calls += 1
        if calls == number:
            Path("waiting").touch()
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and not Path("go").exists():
                time.sleep(0.01)
        return advance(self, update)

    Optimization.advance = waiting  # type: ignore[method-assign]


def _write_late() -> None:
    """Write each checkpoint only after the next optimizer step, and copy nothing sooner than that."""
    save, write, advance, changed = CheckpointStore.save, checkpoint.write_tensors, Optimization.advance, Event()

    def saving(*given: Any, **named: Any) -> bool:
        changed.clear()
        return save(*given, **named)

    def advancing(*given: Any) -> bool:
        found = advance(*given)
        changed.set()
        return found

    def late(*given: Any) -> str:
        assert changed.wait(60)
        return write(*given)

    CheckpointStore.save, Optimization.advance = saving, advancing  # type: ignore[method-assign]
    checkpoint.write_tensors, tensor_files.SMALL = late, 0  # type: ignore[assignment]


def start_two(inputs: Path, place: Path, **changes: Any) -> subprocess.Popen[bytes]:
    """Begin the training by two processes, under torchrun."""
    arguments = [str(inputs), str(place), json.dumps({**SMALL, "accelerator_kwargs": {"cpu": True}, **changes})]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    place.mkdir(exist_ok=True)
    with (place / "torchrun").open("ab") as log:
        return subprocess.Popen(
            [*command, *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=log, stderr=log,
        )  # fmt: skip


def children(pid: int) -> list[int]:
    """The processes that ``pid`` started."""
    stats = {int(path.parent.name): path.read_text() for path in Path("/proc").glob("[0-9]*/stat")}
    return [child for child, stat in stats.items() if int(stat.rpartition(")")[2].split()[1]) == pid]


def finished(process: BaseProcess) -> int | None:
    """The exit code, once the process has ended by itself."""
    process.join(300)
    return process.exitcode


def wait_for(path: Path, process: BaseProcess) -> None:
    """Wait until ``path`` is there."""
    while not path.exists():
        assert process.is_alive(), (path.parent / "stderr").read_text()
        time.sleep(0.01)


def events(place: Path, kind: str) -> list[dict[str, Any]]:
    """What was told, of one kind."""
    lines = (place / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def told(place: Path, kind: str) -> int:
    """How often something of this kind was told so far."""
    file = place / "events.jsonl"
    return file.read_text().count(f'"kind": "{kind}"') if file.exists() else 0


def result(place: Path) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """All trained weights, and the history without what the clock says."""
    weights = {
        **load_file(place / "policy" / "model.safetensors"),
        **(load_file(head) if (head := place / "policy" / "value_head.safetensors").exists() else {}),
    }
    lines = [json.loads(line) for line in (place / "history").read_text().splitlines()]
    timed = ("time/", "tokens/per_second")
    return weights, [{n: v for n, v in line.items() if not n.startswith(timed)} for line in lines]


def kill_at(process: BaseProcess, place: Path, step: int, seconds: float) -> None:
    """SIGKILL ``seconds`` after the training has told of its PPO step ``step``; 0 is before the first."""
    while process.is_alive() and told(place, "progress") < step:
        time.sleep(0.001)
    time.sleep(seconds)
    assert process.pid is not None
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()


def assert_same(place: Path, undisturbed: Path) -> None:
    weights, history = result(place)
    expected, expected_history = result(undisturbed)
    assert list(weights) == list(expected)
    assert [name for name in weights if not torch.equal(weights[name], expected[name])] == []
    assert history == expected_history
    assert not (place / "checkpoints").exists() or not list((place / "checkpoints").iterdir())


if __name__ == "__main__":
    _train(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]), {})
