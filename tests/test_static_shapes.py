"""Static shapes, proved without an accelerator: the update's operations, devices and compiled graphs never change."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf_ppo.config import PPOConfig
from rlhf_ppo.devices import Device
from rlhf_ppo.ppo import PolicyWithValueHead, PPOTrainer, Sampling, responses, rollout
from rlhf_ppo.ppo.optimization import Optimization
from rlhf_ppo.ppo.rollout import Rollout, score_with_policy
from rlhf_ppo.ppo.sequences import Sequences
from rlhf_ppo.ppo.setup import Adam, adam, step_unless
from tiny_models import bart, gemma2, gpt2, llama, neox, queries, qwen2, t5, word_tokenizer

ROWS = 8
STATIC = {"pad_for_acceleration": True, "pad_max_input_len": 12, "pad_max_len": 22}
READS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::masked_select", "aten::unique"}


class Trace(TorchDispatchMode):
    """Records every operation with the shapes and types of its tensors and its whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Any] = []
        self.reads = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        seen = [
            (tuple(leaf.shape), leaf.dtype)
            if isinstance(leaf, Tensor)
            else leaf
            if isinstance(leaf, (int, str))
            else type(leaf).__name__
            for leaf in tree_leaves((args, kwargs or {}))
        ]
        self.operations.append((str(function), seen))
        self.reads += function._schema.name in READS
        return function(*args, **(kwargs or {}))


def trainer(architecture: Callable[[int], nn.Module], **changes: Any) -> PPOTrainer:
    policy = PolicyWithValueHead(architecture(0))
    torch.manual_seed(5)
    nn.init.normal_(policy.v_head.summary.weight, std=0.2)
    values = {"batch_size": ROWS, "mini_batch_size": 4, "ppo_epochs": 2, "learning_rate": 1e-3, **STATIC, **changes}
    config = PPOConfig(**values)
    return PPOTrainer(config, policy, architecture(1), word_tokenizer(), sampling=Sampling(10, eos_token_ids=(2,)))


def ragged(trained: PPOTrainer, seed: int) -> tuple[Rollout, list[float]]:
    """A rollout of random lengths, and scores."""
    chance = random.Random(seed)
    # Of the last no prompt is padded.
    asked = queries(*[12 if seed == 3 else chance.randint(1, 12) for _ in range(ROWS)], seed=seed)
    answers = queries(*[chance.randint(0, 10) for _ in range(ROWS)], seed=seed + 50)
    found = score_with_policy(trained.policy, asked, answers, padding=trained.padding)
    return found, [chance.gauss(0, 1) for _ in range(ROWS)]


def traces(trained: PPOTrainer, updates: int) -> list[Trace]:
    """The operations of whole updates, each on other lengths."""
    found = []
    for number in range(updates):
        trained.begin_update(*ragged(trained, number))
        update = trained.current
        assert update is not None
        trained.optimization._on_device(update.experience)  # What the host lays out is not the device's.
        with Trace() as trace:
            while trained.optimization.advance(update):
                pass
        trained._conclude(update)
        found.append(trace)
    return found


# The first update makes the optimizer's state; from then on everything repeats.


@pytest.mark.parametrize("architecture", [llama, gpt2, gemma2, neox, qwen2, t5, bart])
def test_every_update_has_the_same_operations_on_the_same_shapes(architecture: Callable[[int], nn.Module]) -> None:
    _, second, *later = traces(trainer(architecture), 4)
    assert len(second.operations) > 1000
    for other in later:
        assert other.operations == second.operations


def test_without_static_shapes_the_operations_differ() -> None:
    changes = {"pad_for_acceleration": False, "pad_max_input_len": 0, "pad_max_len": 0}
    _, second, third = traces(trainer(llama, **changes), 3)
    assert second.operations != third.operations


@pytest.mark.parametrize("architecture", [llama, gpt2, gemma2, neox, qwen2])
def test_the_host_reads_nothing_inside_an_update(architecture: Callable[[int], nn.Module]) -> None:
    assert [trace.reads for trace in traces(trainer(architecture), 2)] == [0, 0]


def test_early_stopping_reads_once_per_pass() -> None:
    trained = trainer(llama, early_stopping=True, target_kl=1e9, ppo_epochs=3)
    assert [trace.reads for trace in traces(trained, 2)] == [2, 2]


@pytest.mark.parametrize("architecture", [llama, gpt2, gemma2, neox, qwen2])
def test_the_update_runs_where_no_tensor_has_a_value(architecture: Callable[[int], nn.Module]) -> None:
    if transformers.__version__.startswith("4") and architecture is not gpt2:
        pytest.skip("rotary embeddings of transformers 4 don't run on the meta device")
    planned = trainer(architecture)
    planned.begin_update(*ragged(planned, 0))
    update = planned.current
    assert update is not None
    # On the meta device reading a value is an error, and so is a tensor that was left on the CPU.
    policy = PolicyWithValueHead(architecture(0)).to("meta")
    optimizer = adam(policy, 1e-3, None)
    optimization = Optimization(planned.config, Accelerator(), policy, optimizer, planned.padding, Device())
    while optimization.advance(update):
        pass
    assert update.optimizer_steps == 4
    assert {row.device.type for row in [*update.seen, *update.norms]} == {"meta"}


@pytest.mark.parametrize("architecture", [llama, gpt2, gemma2, t5])
def test_a_compiled_update_is_never_compiled_again(architecture: Callable[[int], nn.Module]) -> None:
    torch._dynamo.reset()
    plain, compiled = trainer(architecture), trainer(architecture)
    compiled.optimization.model = torch.compile(compiled.policy, backend="eager", dynamic=False)
    batches = [ragged(plain, number) for number in range(3)]
    compiled.update(*batches[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in batches[1:]:
            compiled.update(*batch)
    for batch in batches:
        plain.update(*batch)
    for one, other in zip(plain.policy.parameters(), compiled.policy.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", [llama, gpt2, gemma2, t5])
def test_scoring_is_compiled_once_also_for_the_last_batch(
    architecture: Callable[[int], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(rollout, "SCORING_TOKENS", 70)  # three batches of three, the last of which is filled up
    plain, compiled = trainer(architecture), trainer(architecture)
    compiled.scorer = torch.compile(compiled.scorer, backend="eager", dynamic=False)
    rollouts = [ragged(plain, number)[0] for number in range(3)]
    of_one_batch = dataclasses.replace(
        rollouts[0], queries=rollouts[0].queries[:3], responses=rollouts[0].responses[:3]
    )
    compiled._reference_rows(of_one_batch, full=False)
    with torch.compiler.set_stance("fail_on_recompile"):
        found = [compiled._reference_rows(sampled, full=False)["ref"] for sampled in rollouts]
    plain.scorer = None
    for rows, sampled in zip(found, rollouts, strict=True):
        torch.testing.assert_close(rows, plain._reference_rows(sampled, full=False)["ref"], atol=1e-5, rtol=1e-5)


def test_other_shapes_would_be_compiled_again() -> None:
    torch._dynamo.reset()
    trained = trainer(llama, pad_for_acceleration=False, pad_max_input_len=0, pad_max_len=0)
    trained.optimization.model = torch.compile(trained.policy, backend="eager", dynamic=False)
    trained.update(*ragged(trained, 0))
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match="recompile"):
        trained.update(*ragged(trained, 1))


# Rollouts and scoring


@pytest.mark.parametrize("architecture", [llama, gpt2, gemma2, neox, qwen2, t5, bart])
def test_fixed_batches_also_the_last_one_change_no_number(architecture: Callable[[int], nn.Module]) -> None:
    changes = {"pad_for_acceleration": False, "pad_max_input_len": 0, "pad_max_len": 0}
    asked = queries(3, 5, 4, 6, 2, 7, 12, 1)
    fixed, tight = trainer(architecture), trainer(architecture, **changes)
    fixed.sampling = tight.sampling = Sampling(10, eos_token_ids=tuple(range(2, 9)))
    found, expected = fixed.rollout(asked, batch_size=3), tight.rollout(asked)
    assert [row.tolist() for row in found.responses] == [row.tolist() for row in expected.responses]
    assert len({len(row) for row in found.responses}) > 1
    again = score_with_policy(fixed.policy, asked, found.responses, padding=fixed.padding)
    for other in (found, again):
        for name in ("logprobs", "values"):
            for row, right in zip(getattr(other, name), getattr(expected, name), strict=True):
                torch.testing.assert_close(row, right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", [llama, gpt2, gemma2, neox, qwen2, t5, bart])
def test_in_bf16_what_is_sampled_with_fixed_shapes_is_what_a_pass_says(
    architecture: Callable[[int], nn.Module], monkeypatch: pytest.MonkeyPatch, precisions: Callable[[], None]
) -> None:
    caches: list[Any] = []
    made = responses._FixedCache.__init__
    monkeypatch.setattr(
        responses._FixedCache, "__init__", lambda self, **given: caches.append(self) or made(self, **given)
    )
    trained, asked = trainer(architecture, accelerator_kwargs={"mixed_precision": "bf16"}), queries(3, 5, 4, 6, 2)
    trained.sampling = Sampling(10, eos_token_ids=(2, 3))
    found = trained.rollout(asked, batch_size=3)
    # One precision for keys and values, also where keys are turned in fp32.
    for cache in caches:
        assert all(layer.keys.dtype == layer.values.dtype for layer in cache.layers)
    with trained.accelerator.autocast():
        again = score_with_policy(trained.policy, asked, found.responses, padding=trained.padding)
    for name in ("logprobs", "values"):
        for row, right in zip(getattr(found, name), getattr(again, name), strict=True):
            torch.testing.assert_close(row, right, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(("architecture", "fixed"), [(llama, True), (llama, False), (gpt2, False), (t5, True)])
def test_in_bf16_a_ppo_step_is_that_in_fp32_but_for_rounding(
    architecture: Callable[[int], nn.Module], fixed: bool, precisions: Callable[[], None]
) -> None:
    changes = {} if fixed else {"pad_for_acceleration": False, "pad_max_input_len": 0, "pad_max_len": 0}
    plain = trainer(architecture, **changes)
    given = ragged(plain, 0)
    expected = plain.update(*given)
    precisions()
    trained = trainer(architecture, **changes, accelerator_kwargs={"mixed_precision": "bf16"})
    found = trained.update(*given)
    for name, allowed in (("objective/kl", 0.1), ("ppo/loss/total", 0.1), ("ppo/policy/entropy", 0.02)):
        assert found[name] == pytest.approx(expected[name], rel=allowed, abs=allowed)
        assert found[name] != expected[name]  # it was bf16
    assert all(weight.dtype == torch.float32 for weight in trained.policy.parameters())


def test_every_scoring_batch_has_the_same_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "SCORING_TOKENS", 70)
    trained, shapes = trainer(llama), set()
    forward = trained.policy.forward

    def watched(sequences: Sequences, temperature: float) -> Any:
        shapes.add((tuple(sequences.input_ids.shape), tuple(sequences.index.shape)))
        return forward(sequences, temperature)

    monkeypatch.setattr(trained.policy, "forward", watched)
    ragged(trained, 0)
    assert shapes == {((3, 22), (30,))}


@pytest.mark.parametrize("architecture", [llama, gpt2, gemma2, neox, qwen2, t5, bart])
def test_every_rollout_has_the_same_operations_on_the_same_shapes(
    architecture: Callable[[int], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Trace] = []
    forward = responses.FixedDecoding._forward

    def traced(self: Any) -> Any:
        with Trace() as trace:
            result = forward(self)
        found.append(trace)
        return result

    monkeypatch.setattr(responses.FixedDecoding, "_forward", traced)
    trained = trainer(architecture)
    trained.sampling = Sampling(10)
    for seed, lengths in enumerate([(3, 5, 4, 6, 2), (7, 3, 9, 1, 2), (12, 12, 12, 12, 12)]):
        trained.rollout(queries(*lengths, seed=seed), batch_size=4)
    # Three rollouts of two batches of ten tokens; the second batch of the first is warm.
    assert len(found) == 60
    for start in (20, 30, 40, 50):
        for warm, other in zip(found[10:20], found[start : start + 10], strict=True):
            assert other.operations == warm.operations


# The optimizer that needs no host


def test_adam_is_torchs_and_a_skipped_step_leaves_no_trace() -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Linear(5, 3) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    mine, other = Adam(ours.parameters(), lr=1e-2), torch.optim.Adam(theirs.parameters(), lr=1e-2)
    for number in range(12):
        skip = number in (0, 4, 5)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            q.grad = torch.randn_like(q)
            p.grad = torch.full_like(p, torch.nan) if skip else q.grad.clone()
        step_unless(mine, torch.tensor(skip))
        if not skip:
            other.step()
        if number == 8:
            mine.param_groups[0]["lr"] = other.param_groups[0]["lr"] = 5e-3
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)
        for name, value in other.state[q].items():
            torch.testing.assert_close(mine.state[p][name], value, atol=1e-7, rtol=1e-6)
