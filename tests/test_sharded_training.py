"""Weights that are spread over two processes (FSDP2): saved whole, kept in parts, taken up again to the same bits."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import training_worker as worker
from rlhf_ppo import checkpoint, tensor_files
from rlhf_ppo.checkpoint import CheckpointStore
from rlhf_ppo.ppo import PolicyWithValueHead
from rlhf_ppo.ppo.sharding import Sharding
from rlhf_ppo.ppo_training.policy_files import save_policy
from tiny_models import gpt2, t5, word_tokenizer

STATIC: dict[str, Any] = {
    "pad_for_acceleration": True, "pad_max_input_len": 8, "pad_max_len": 16, "data_max_prompt_tokens": 8,
    # A larger rate would blow rounding up.
    "steps": 96, "learning_rate": 1e-3,
}  # fmt: skip
SHARDED = {**STATIC, "node_sharding": True}


def trained(inputs: Path, place: Path, **changes: Any) -> Path:
    assert worker.start_two(inputs, place, **changes).wait(300) == 0, (place / "torchrun").read_text()[-3000:]
    return place


@pytest.fixture(scope="module")
def sharded(training_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that nothing happened to."""
    return trained(training_inputs, tmp_path_factory.mktemp("sharded"), **SHARDED)


def assert_close(one: Path, other: Path) -> None:
    """The same files with the same weights within 1e-5."""
    files = [path.relative_to(other) for path in other.rglob("*.safetensors")]
    assert {path.relative_to(one) for path in one.rglob("*.safetensors")} == set(files)
    for file in files:
        expected = load_file(other / file)
        torch.testing.assert_close(load_file(one / file), expected, atol=1e-5, rtol=1e-5)


def test_what_is_saved_is_the_whole_policy_as_without_sharding(
    training_inputs: Path, sharded: Path, tmp_path: Path
) -> None:
    whole = trained(training_inputs, tmp_path / "whole", **STATIC)
    assert_close(sharded / "policy", whole / "policy")
    configs = [json.loads((place / "policy" / "config.json").read_text()) for place in (sharded, whole)]
    assert configs[0] == configs[1] and configs[0]["architectures"] == ["LlamaForCausalLM"]
    AutoModelForCausalLM.from_pretrained(sharded / "policy")


def test_adapters_are_saved_merged_and_by_themselves_as_without_sharding(training_inputs: Path, tmp_path: Path) -> None:
    changes = {"model_lora_r": 4, "steps": 48}
    spread = trained(training_inputs, tmp_path / "sharded", **{**SHARDED, **changes})
    whole = trained(training_inputs, tmp_path / "whole", **{**STATIC, **changes})
    assert (spread / "policy" / "adapter" / "adapter_model.safetensors").exists()
    assert_close(spread / "policy", whole / "policy")


def test_the_best_policy_is_kept_whole(training_inputs: Path, tmp_path: Path) -> None:
    best = {"push_to_hub_if_best_kwargs": {"repo_id": "me/film"}, "compare_steps": 2, "steps": 48}
    spread = trained(training_inputs, tmp_path / "sharded", **{**SHARDED, **best})
    whole = trained(training_inputs, tmp_path / "whole", **{**STATIC, **best})
    found = [json.loads((place / "policy" / "training.json").read_text())["best_step"] for place in (spread, whole)]
    assert found[0] == found[1] and 0 <= found[0] < 5
    assert_close(spread / "policy", whole / "policy")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_sharded_training_that_is_ended_goes_on_with_the_same_bits(
    training_inputs: Path, sharded: Path, tmp_path: Path, number: signal.Signals
) -> None:
    ended = tmp_path / "ended"
    every = 0 if number == signal.SIGTERM else 2
    process = worker.start_two(training_inputs, ended, checkpoint_every=every, **SHARDED)
    while process.poll() is None and worker.told(ended, "progress") < 5:
        time.sleep(0.001)
    for pid in [process.pid] if number == signal.SIGTERM else [process.pid, *worker.children(process.pid)]:
        os.kill(pid, number)
    assert process.wait(300) != 0
    newest = sorted(path for path in (ended / "checkpoints").glob("*/step-*") if not path.suffix)[-1]
    parts = sorted(path.name for path in newest.glob("part-*"))
    assert parts == ["part-00000.safetensors", "part-00001.safetensors"]
    shapes = [_shapes(newest / part) for part in parts]
    name = "/trainer/policy/pretrained_model.model.layers.0.mlp.up_proj.weight"
    assert shapes[0][name] == shapes[1][name] == [shapes[0][name][0], shapes[0][name][1]]
    assert (
        shapes[0][name][0] * 2
        == load_file(training_inputs / "model" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].shape[0]
    )
    trained(training_inputs, ended, checkpoint_every=every, **SHARDED)
    assert worker.events(ended, "resumed")[-1]["done"] >= 2
    worker.assert_same(ended, sharded)


def _shapes(file: Path) -> dict[str, list[int]]:
    with safe_open(file, framework="pt") as tensors:
        return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118


def test_a_checkpoint_of_spread_weights_is_not_one_of_whole_weights(training_inputs: Path, tmp_path: Path) -> None:
    place, name = tmp_path / "place", {"checkpoint_name": "mine", "checkpoint_every": 1}
    process = worker.start_two(training_inputs, place, **name, **SHARDED)
    while process.poll() is None and worker.told(place, "checkpoint_written") < 1:
        time.sleep(0.001)
    process.terminate()
    process.wait(300)
    assert worker.start_two(training_inputs, place, **name, **STATIC).wait(300) != 0
    failures = [event["message"] for event in worker.events(place, "step_failed")]
    # Both hear of it, so that whoever fails first says why.
    assert "sharded is True there and None here" in failures[-1]


@pytest.fixture
def spread(tmp_path: Path) -> Any:
    """A tensor that is spread over one process, which is enough for the stores' part in it."""
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/meeting")
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    yield DTensor.from_local(torch.arange(3.0), mesh)
    torch.distributed.destroy_process_group()


def stores(directory: Path) -> tuple[CheckpointStore, CheckpointStore]:
    """Those of two processes."""
    return CheckpointStore(directory, {}, 2, 0, 2), CheckpointStore(directory, {}, 2, 1, 2)


def test_a_checkpoint_is_there_only_when_every_process_has_written_its_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spread: Any
) -> None:
    monkeypatch.setenv("RLHF_PPO_EVENTS", str(tmp_path / "events.jsonl"))
    first, second = stores(tmp_path / "store")
    writing = threading.Thread(target=first.save, args=("step-1", {"a": spread, "b": torch.ones(1)}))
    writing.start()
    time.sleep(0.3)
    assert first.latest() is None and first.busy
    second.save("step-1", {"a": spread + 10, "b": torch.ones(1)}, wait=True)
    writing.join()
    first.finish_writing()
    assert first.latest() == "step-1"
    assert first.read("step-1")["a"].tolist() == [0, 1, 2] and second.read("step-1")["a"].tolist() == [10, 11, 12]
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["step-1"]


def test_a_part_that_can_not_be_written_fails_the_checkpoint_and_keeps_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spread: Any
) -> None:
    monkeypatch.setenv("RLHF_PPO_EVENTS", str(tmp_path / "events.jsonl"))
    first, second = stores(tmp_path / "store")

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    for name in ("step-1", "step-2"):
        if name == "step-2":
            monkeypatch.setattr(os, "replace", full)
        second.save(name, {"a": spread})
        second.finish_writing()
        monkeypatch.undo() if name == "step-2" else None
        monkeypatch.setenv("RLHF_PPO_EVENTS", str(tmp_path / "events.jsonl"))
        assert first.save(name, {"a": spread})
        first.finish_writing()
    assert first.latest() == "step-1"
    reasons = [event["reason"] for event in worker.events(tmp_path, "checkpoint_failed")]
    assert reasons == ["no space left on device", "process 1 could not write its part"]


@pytest.mark.parametrize("process", [0, 1])
def test_parts_may_change_once_their_store_knows_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spread: Any, process: int
) -> None:
    monkeypatch.setattr(tensor_files, "SMALL", 0)
    go, write = threading.Event(), checkpoint.write_tensors
    monkeypatch.setattr(checkpoint, "write_tensors", lambda *given: write(*given) if go.wait(60) else "")
    both = stores(tmp_path / "store")
    for store in both:
        assert store.save("step-1", {"a": spread if store is both[process] else spread + 10})
    both[process].before_change()
    spread.to_local().add_(1)
    go.set()
    for store in both:
        store.finish_writing()
    assert both[process].read("step-1")["a"].tolist() == [0, 1, 2]
    assert both[1 - process].read("step-1")["a"].tolist() == [10, 11, 12]


def test_parts_that_a_killed_process_left_are_not_taken_for_new_ones(tmp_path: Path, spread: Any) -> None:
    (tmp_path / "step-1.parts").mkdir()
    (tmp_path / "step-1.parts" / "part-00001.safetensors").write_bytes(b"old")
    stores(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "meeting"]


def test_an_encoder_decoder_is_refused(spread: Any) -> None:
    from accelerate import Accelerator

    with pytest.raises(Exception, match="an encoder-decoder model can't be spread"):
        Sharding(Accelerator(cpu=True), PolicyWithValueHead(t5(0)), None)


def test_weights_that_a_model_uses_twice_are_saved_once(spread: Any, tmp_path: Path) -> None:
    from accelerate import Accelerator

    policy = PolicyWithValueHead(gpt2(0))
    expected = {name: value.clone() for name, value in policy.state_dict().items()}
    sharding = Sharding(Accelerator(cpu=True), policy, None)
    assert isinstance(policy.v_head.summary.weight, DTensor)
    save_policy(sharding.whole(policy), word_tokenizer(), tmp_path / "policy")
    found = load_file(tmp_path / "policy" / "model.safetensors")
    assert "lm_head.weight" not in found and json.loads((tmp_path / "policy" / "config.json").read_text())[
        "architectures"
    ] == ["GPT2LMHeadModel"]
    for name, value in found.items():
        assert torch.equal(value, expected[f"pretrained_model.{name}"]), name
