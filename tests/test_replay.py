"""Tokens that a device repeats without the host, on a strict stand-in for CUDA graphs (``recorded_graphs``)."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from recorded_graphs import Graphs
from rlhf_ppo.config import PPOConfig
from rlhf_ppo.devices import Cuda, Device
from rlhf_ppo.errors import InputError
from rlhf_ppo.ppo import PolicyWithValueHead, PPOTrainer, generation, replay
from rlhf_ppo.ppo import sampling as choices
from rlhf_ppo.ppo.generation import sample
from rlhf_ppo.ppo.replay import ReplayedDecoding
from rlhf_ppo.ppo.responses import Generated
from rlhf_ppo.ppo.sampling import Sampling, draw
from rlhf_ppo.ppo.sequences import Padding
from tiny_models import SIZES, gemma2, gpt2, llama, made, neox, policy_of, queries, qwen2, t5, word_tokenizer

TOKENS = 14
since_5 = pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 computes it with the host's help")


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no model's layers are written out."""
    monkeypatch.setattr(generation, "written_out", lambda model: None)


def with_adapters() -> nn.Module:
    torch.manual_seed(3)
    return get_peft_model(llama(0), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


def wide_gemma2() -> nn.Module:
    """Windows that hold all tokens; soft-capped attention, which transformers computes by itself."""
    return made("Gemma2", **SIZES, head_dim=8, sliding_window=64)


def mixtral() -> nn.Module:
    """Experts in one grouped product."""
    return made("Mixtral", **SIZES, num_local_experts=4)


def eager_mixtral() -> nn.Module:
    """One expert after the other, and only those that are asked for: the host must know which."""
    model = mixtral()
    model.set_experts_implementation("eager")
    return model


def sampled(model: nn.Module, capture: Any = None, sizes: tuple[int, ...] = (3, 5, 4, 6, 2), **more: Any) -> Generated:
    """Responses to ragged prompts in batches of three; some end early."""
    head = policy_of(model).v_head
    sampling = Sampling(TOKENS, **{"temperature": 0.8, "eos_token_ids": (2, 5, 9, 33), **more.pop("sampling", {})})
    numbers = draw(len(sizes), TOKENS, torch.Generator().manual_seed(1))
    return sample(model, queries(*sizes), sampling, numbers, 3, value_head=head, capture=capture, **more)


def same(one: Generated, other: Generated) -> None:
    for left, right in zip(one.responses, other.responses, strict=True):
        assert left.tolist() == right.tolist()
    for rows, others in ((one.logprobs, other.logprobs), (one.values, other.values)):
        for left, right in zip(rows, others, strict=True):
            torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


@contextmanager
def warned(*said: str) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield
    ours = [str(warning.message) for warning in found if "operation by operation" in str(warning.message)]
    assert len(ours) == len(said)
    for message, part in zip(ours, said, strict=True):
        assert part in message


@pytest.mark.parametrize(("model", "sampling"), [
    (llama, {}), (gpt2, {}), (neox, {}), (qwen2, {}), (with_adapters, {}),
    pytest.param(wide_gemma2, {}, marks=since_5), pytest.param(mixtral, {}, marks=since_5),
    (gpt2, {"top_k": 7}), (llama, {"top_p": 0.7}), (gpt2, {"do_sample": False}),
])  # fmt: skip
def test_repeated_tokens_are_those_that_the_host_would_sample(
    model: Callable[[], nn.Module], sampling: dict[str, Any]
) -> None:
    made, graphs = model(), Graphs()
    with warned():
        replayed = sampled(made, graphs.capture, sampling=sampling)
    same(replayed, sampled(made, sampling=sampling))
    # One to try the model, and two batches; of each but the first two tokens, until all have ended.
    assert graphs.recorded == 3
    assert graphs.repeated > 6 + 2 * 6
    assert len({len(row) for row in replayed.responses}) > 1 or not sampling.get("do_sample", True)


def test_a_model_is_tried_once_and_weights_that_changed_are_those_that_are_read() -> None:
    model, graphs = gpt2(), Graphs()
    sampled(model, graphs.capture)
    for number in range(2):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.02)
        same(sampled(model, graphs.capture), sampled(model))
        assert graphs.recorded == 3 + 2 * (number + 1)


@pytest.mark.parametrize("architecture", [gpt2, llama])
def test_in_bf16_weights_that_changed_between_rollouts_are_cast_anew(architecture: Callable[[], nn.Module]) -> None:
    model, graphs = architecture(), Graphs()

    def by_hand(step: Callable[[], None]) -> Callable[[], None]:
        step()
        return step

    before = sampled(model)
    for _ in range(2):
        # Casts are kept until the context ends; what is recorded reads them where they are.
        with torch.autocast("cpu", torch.bfloat16):
            replayed = sampled(model, graphs.capture)
        with torch.autocast("cpu", torch.bfloat16):
            same(replayed, sampled(model, by_hand))
        assert not torch.equal(torch.cat(replayed.logprobs), torch.cat(before.logprobs))
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.05)
    assert graphs.recorded == 5


def test_shapes_that_pad_for_acceleration_fixes_are_repeated_too() -> None:
    model, graphs = gpt2(), Graphs()
    padding = Padding(8, 8 + TOKENS)
    same(sampled(model, graphs.capture, padding=padding), sampled(model))
    assert graphs.recorded == 3


def test_a_batch_ends_when_the_host_asks_and_all_have_ended() -> None:
    model, graphs = gpt2(), Graphs()
    replayed = sampled(model, graphs.capture, sampling={"eos_token_ids": tuple(range(64))})
    assert [len(row) for row in replayed.responses] == [1] * 5
    assert graphs.repeated == 6 + 2 * 6


@pytest.mark.parametrize(("model", "why"), [
    (gemma2, "not all of its layers see all tokens"),
    (t5, "it has an encoder"),
    pytest.param(eager_mixtral, "called a synchronizing operation", marks=since_5),
])  # fmt: skip
def test_a_model_that_can_not_be_repeated_is_sampled_as_before_and_says_why_once(
    model: Callable[[], nn.Module], why: str
) -> None:
    made, graphs = model(), Graphs()
    with warned(why):
        replayed = sampled(made, graphs.capture)
        sampled(made, graphs.capture)
    same(replayed, sampled(made))
    assert graphs.repeated == 0


def test_a_model_that_is_wrong_when_repeated_is_found_out() -> None:
    model, graphs = gpt2(), Graphs()
    calls = 0

    def another_word(*given: Any) -> None:
        """By a number of the host's, which a graph would keep."""
        nonlocal calls
        calls += 1
        given[-1].logits[..., calls % 5] += 3

    model.register_forward_hook(another_word)
    with warned("other probabilities"):
        assert not replay.replays(model, Sampling(4), graphs.capture)
    assert graphs.repeated == 6


def test_a_choice_that_waits_for_the_device_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graphs, restricted = gpt2(), Graphs(), choices._restricted

    def asking(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
        assert logits.sum().item()
        return restricted(logits, sampling)

    monkeypatch.setattr(choices, "_restricted", asking)
    with warned():
        sampled(model, graphs.capture)
    with warned("called a synchronizing operation"):
        replayed = sampled(model, graphs.capture, sampling={"top_k": 5})
    same(replayed, sampled(model, sampling={"top_k": 5}))
    assert graphs.recorded == 3


def test_a_window_that_is_too_short_for_these_tokens_is_sampled_as_before() -> None:
    model, graphs = made("Mistral", **SIZES, sliding_window=17), Graphs()
    with warned():
        replayed = sampled(model, graphs.capture)
    same(replayed, sampled(model))
    # That of the trial alone: three prompts' six tokens and fourteen more have no room.
    assert graphs.recorded == 1


def test_what_a_token_sees() -> None:
    prompts, numbers = queries(3, 1), draw(2, 2, torch.Generator().manual_seed(0))
    batch = ReplayedDecoding(gpt2(), prompts, Sampling(2), numbers, None, capture=Graphs().capture)
    # Four places for prompts, one of which is always hidden, and two for responses; what is padded sees itself alone.
    rows = [
        [[1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0]],
        [[1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0]],
    ]
    assert batch._decoder_only_arguments()["attention_mask"].squeeze(1).int().tolist() == rows
    batch._next(0)
    seen = batch._decoder_only_arguments()
    assert seen["attention_mask"].int().tolist() == [[[[0, 1, 1, 1, 1, 0]]], [[[0, 0, 0, 1, 1, 0]]]]
    assert seen["position_ids"].tolist() == [[3], [1]]


class Repeating(Device):
    """A CPU that repeats."""

    def __init__(self) -> None:
        super().__init__()
        self.graphs = Graphs()
        self.capture = self.graphs.capture


def trained(on: Device) -> tuple[list[dict[str, Any]], nn.Module]:
    config = PPOConfig(
        batch_size=6, mini_batch_size=3, ppo_epochs=2, learning_rate=1e-3, accelerator_kwargs={"mixed_precision": "no"}
    )
    policy = PolicyWithValueHead(gpt2(0, dropout=0.0))
    # Adam would make a step of full length of what rounding leaves of a gradient.
    optimizer = torch.optim.SGD(policy.parameters(), lr=1e-2)
    sampling = Sampling(10, eos_token_ids=(2,))
    reference, tokenizer = gpt2(1, dropout=0.0), word_tokenizer()
    trainer = PPOTrainer(config, policy, reference, tokenizer, sampling=sampling, optimizer=optimizer, device=on)
    found = []
    for step in range(3):
        rollout = trainer.rollout(queries(3, 5, 4, 6, 2, 3, seed=step))
        found.append(trainer.update(rollout, [float(len(row)) for row in rollout.responses]))
    return found, policy


def test_training_that_repeats_ends_with_the_same_weights() -> None:
    device = Repeating()
    (stats, policy), (others, other) = trained(device), trained(Device())
    assert device.graphs.recorded == 4
    for one, two in zip(stats, others, strict=True):
        assert one["objective/kl"] == pytest.approx(two["objective/kl"], abs=1e-5)
        assert one["ppo/loss/total"] == pytest.approx(two["ppo/loss/total"], abs=1e-5)
    before = gpt2(0).lm_head.weight
    assert (policy.pretrained_model.lm_head.weight - before).abs().max() > 1e-3
    for left, right in zip(policy.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


def test_the_benchmark_of_sampling_measures_both_sides() -> None:
    place = Path(__file__).parent.parent / "benchmarks" / "replayed_decoding.py"
    spec = importlib.util.spec_from_file_location("replayed_decoding", place)
    assert spec and spec.loader
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    device, tiny = Repeating(), {**SIZES, "tie_word_embeddings": True}
    model = benchmark.llama(tiny, device.device, torch.float32)
    found = benchmark.measure(model, device, queries(4, 4), 6, 2)
    assert [len(found[side]) for side in ("called", "repeated")] == [2, 2]
    # The trial, and a round that does not count.
    assert (device.graphs.recorded, device.graphs.repeated) == (1 + 3, 6 + 3 * 4)
    rate = benchmark.bandwidth(device, 1 << 12)
    said = benchmark.report(model, {"called": [6.0, 6.0], "repeated": [3.0, 2.0]}, 6, 1e6)
    assert rate > 0 and said.startswith("called 1000.00 ms a token, repeated 416.67: ratio 2.50 (2.00 to 3.00)")
    limit = sum(parameter.numel() for parameter in model.parameters()) * 4 / 1e6 * 1000
    assert f"take {limit:.2f} ms, {limit / 416.67:.2f} of that" in said
    with pytest.raises(InputError, match="cpu does not repeat the tokens of LlamaForCausalLM"):
        benchmark.measure(model, Device(), queries(4), 6, 1)


# What CUDA is asked for


class Torch:
    """What ``Cuda.capture`` calls, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.mode = self.stream = "default"
        outer = self

        class Graph:
            def replay(self) -> None:
                outer.calls.append("replay")

        @contextmanager
        def graph(made: Graph, *, capture_error_mode: str) -> Iterator[None]:
            assert isinstance(made, Graph) and capture_error_mode == "thread_local" and outer.mode == "default"
            outer.calls.append("begin")
            self.stream = "of the capture"
            yield
            self.stream = "default"
            outer.calls.append("end")

        @contextmanager
        def stream(current: str) -> Iterator[None]:
            try:
                yield
            finally:
                self.stream = current

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", graph)
        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.stream)
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: self.mode)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: setattr(self, "mode", mode))


def test_cuda_is_asked_to_refuse_waiting_before_it_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Torch(monkeypatch)
    again = Cuda().capture(lambda: fake.calls.append(fake.mode))
    assert fake.calls == ["error", "begin", "default", "end"]
    again()
    assert fake.calls[-1] == "replay"


def test_what_waits_is_never_captured_and_the_mode_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Torch(monkeypatch)

    def waits() -> None:
        raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        Cuda().capture(waits)
    assert (fake.calls, fake.mode) == ([], "default")

    def fails_when_captured() -> None:
        if fake.mode == "default":
            raise RuntimeError("not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        Cuda().capture(fails_when_captured)
    assert (fake.calls, fake.mode, fake.stream) == (["begin"], "default", "default")


def test_a_cpu_repeats_nothing_by_itself() -> None:
    assert Device().capture is None


# The stand-in is as strict as the real one


def test_the_stand_in_refuses_what_waits_and_keeps_the_hosts_numbers() -> None:
    total, number = torch.zeros(2), 1

    def step() -> None:
        total.add_(number)

    again = Graphs().capture(step)
    number = 5
    assert total.tolist() == [1.0, 1.0]  # recording computes nothing
    again()
    assert total.tolist() == [2.0, 2.0]
    mask = torch.tensor([True, False])
    waiting: list[Callable[[], Any]] = [
        lambda: total.sum().item(), lambda: bool(total[0] > 0), lambda: total[mask], lambda: torch.tensor([1.0]),
        lambda: total.nonzero(),
    ]  # fmt: skip
    for ask in waiting:
        with pytest.raises(RuntimeError, match="synchronizing"):
            Graphs().capture(ask)
    assert copy.copy(total).tolist() == [2.0, 2.0]
