"""On an NVIDIA GPU: pytest -m cuda. Everywhere else these are skipped.

They were never run so far: nobody who wrote them had a GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from rlhf_ppo.config import PPOConfig
from rlhf_ppo.devices import Cuda, Device
from rlhf_ppo.ppo import PolicyWithValueHead, PPOTrainer
from rlhf_ppo.ppo.generation import sample
from rlhf_ppo.ppo.responses import Generated
from rlhf_ppo.ppo.sampling import Sampling, draw
from tiny_models import SIZES, gpt2, llama, made, neox, policy_of, queries, qwen2, word_tokenizer

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU"),
]


def gemma2() -> nn.Module:
    """Soft-capped attention, windows that hold all tokens."""
    return made("Gemma2", **SIZES, head_dim=8, sliding_window=64)


def sampled(model: nn.Module, on: Device, capture: Any) -> Generated:
    """Responses to ragged prompts in batches of three; some end early."""
    sizes = (3, 5, 4, 6, 2)
    head = policy_of(model).v_head.to(on.device)
    numbers = draw(len(sizes), 14, torch.Generator().manual_seed(1))
    sampling = Sampling(14, temperature=0.8, eos_token_ids=(2, 5, 9, 33))
    return sample(model, queries(*sizes), sampling, numbers, 3, value_head=head, capture=capture)


@pytest.mark.parametrize("model", [llama, gpt2, neox, qwen2, gemma2], ids=lambda model: model.__name__)
def test_repeated_tokens_are_those_that_the_host_samples(model: Callable[[], nn.Module]) -> None:
    on = Cuda()
    moved = model().to(on.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*operation by operation")
        replayed = sampled(moved, on, on.capture)
    plain = sampled(moved, on, None)
    for left, right in zip(replayed.responses, plain.responses, strict=True):
        assert left.tolist() == right.tolist()
    for rows, others in ((replayed.logprobs, plain.logprobs), (replayed.values, plain.values)):
        for one, other in zip(rows, others, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_ppo_steps_that_repeat_have_the_statistics_of_those_that_do_not(
    precision: str, precisions: Callable[[], None]
) -> None:
    found: list[list[dict[str, Any]]] = []
    for repeats in (True, False):
        on = Cuda()
        if not repeats:
            on.capture = None  # type: ignore[method-assign, assignment]
        config = PPOConfig(
            batch_size=6, mini_batch_size=3, ppo_epochs=2, learning_rate=1e-4,
            accelerator_kwargs={"mixed_precision": precision},
        )  # fmt: skip
        policy = PolicyWithValueHead(llama(0))
        trainer = PPOTrainer(
            config, policy, llama(1), word_tokenizer(), sampling=Sampling(10, eos_token_ids=(2,)), device=on
        )
        steps = []
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*operation by operation")
            for step in range(3):
                rollout = trainer.rollout(queries(3, 5, 4, 6, 2, 3, seed=step))
                steps.append(trainer.update(rollout, [float(len(row)) for row in rollout.responses]))
        found.append(steps)
    allowed = 1e-4 if precision == "no" else 0.1
    for one, other in zip(*found, strict=True):
        for name in ("objective/kl", "ppo/policy/entropy", "ppo/loss/value"):
            assert one[name] == pytest.approx(other[name], abs=allowed, rel=allowed)
