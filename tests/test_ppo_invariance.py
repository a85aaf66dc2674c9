"""Padding, order, batch sizes and the way of sampling change nothing: properties, over random batches."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rlhf_ppo.config import PPOConfig
from rlhf_ppo.ppo import PolicyWithValueHead, PPOTrainer, Sampling
from rlhf_ppo.ppo.rollout import Rollout
from tiny_models import gpt2, llama, queries, t5, word_tokenizer

ROWS = 6
Found = tuple[dict[str, float], dict[str, Tensor]]


def trainer(architecture: Callable[[int], nn.Module], **changes: object) -> PPOTrainer:
    policy = PolicyWithValueHead(architecture(0))
    torch.manual_seed(5)
    nn.init.normal_(policy.v_head.summary.weight, std=0.2)
    values: dict[str, object] = {
        "batch_size": ROWS, "mini_batch_size": ROWS, "ppo_epochs": 1, "whiten_rewards": True, "kl_penalty": "full",
        "use_score_scaling": True,
    }  # fmt: skip
    config = PPOConfig(**{**values, **changes})  # type: ignore[arg-type]
    return PPOTrainer(config, policy, architecture(1), word_tokenizer(), sampling=Sampling(10, eos_token_ids=(2,)))


def batch(seed: int) -> tuple[list[Tensor], list[Tensor], list[float], list[Tensor]]:
    """Random queries, responses, scores and masks of turns."""
    chance = random.Random(seed)
    asked = queries(*[chance.randint(1, 12) for _ in range(ROWS)], seed=seed)
    answers = queries(*[chance.randint(1, 10) for _ in range(ROWS)], seed=seed + 100)
    masks = [torch.tensor([chance.random() < 0.7 for _ in row]) for row in answers]
    return asked, answers, [chance.gauss(0, 1) for _ in range(ROWS)], masks


def found_by(trained: PPOTrainer, seed: int, order: list[int]) -> Found:
    """The statistics of a step and the gradient of its one optimizer step."""
    asked, answers, scores, masks = ([column[row] for row in order] for column in batch(seed))  # type: ignore[index]
    gradients: dict[str, Tensor] = {}

    def record() -> None:
        named = trained.policy.named_parameters()
        gradients.update({name: value.grad.clone() for name, value in named if value.grad is not None})

    trained.optimizer.step = record  # type: ignore[assignment, method-assign]
    stats = trained.step(asked, answers, scores, masks)
    return {name: value for name, value in stats.items() if not name.startswith("time/")}, gradients


def assert_same(one: Found, other: Found) -> None:
    assert one[0] == {name: pytest.approx(value, abs=2e-5, rel=2e-5) for name, value in other[0].items()}
    assert one[1].keys() == other[1].keys() and any(bool((value != 0).any()) for value in one[1].values())
    for name, gradient in other[1].items():
        torch.testing.assert_close(one[1][name], gradient, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("architecture", [llama, gpt2, t5])
def test_order_and_extra_padding_change_neither_statistics_nor_gradients(
    architecture: Callable[[int], nn.Module], seed: int
) -> None:
    plain = found_by(trainer(architecture), seed, list(range(ROWS)))
    order = random.Random(seed).sample(range(ROWS), ROWS)
    assert_same(found_by(trainer(architecture), seed, order), plain)
    padded = trainer(architecture, pad_for_acceleration=True, pad_max_input_len=20, pad_max_len=37)
    assert_same(found_by(padded, seed, order), plain)


@pytest.mark.parametrize("architecture", [llama, gpt2, t5])
def test_a_response_depends_neither_on_its_batch_nor_on_the_padding_of_prompts(
    architecture: Callable[[int], nn.Module],
) -> None:
    asked = queries(3, 9, 1, 12, 5, 7)

    def rollout(batch_size: int, **changes: object) -> Rollout:
        return trainer(architecture, **changes).rollout(asked, batch_size=batch_size)

    plain = rollout(64)
    padded = {"pad_for_acceleration": True, "pad_max_input_len": 17, "pad_max_len": 40}
    for other in (rollout(1), rollout(4), rollout(64, **padded)):
        assert [row.tolist() for row in other.responses] == [row.tolist() for row in plain.responses]
        for name in ("logprobs", "values"):
            for row, expected in zip(getattr(other, name), getattr(plain, name), strict=True):
                torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-5)
