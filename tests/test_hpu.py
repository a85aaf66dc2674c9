"""On Gaudi hardware: pytest -m hpu, on a node with a card and Intel's software. Everywhere else these are skipped.

They were never run so far: nobody who wrote them had a card.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from rlhf_ppo.config import PPOConfig
from rlhf_ppo.devices import has_habana
from rlhf_ppo.ppo import PolicyWithValueHead, PPOTrainer, Sampling
from tiny_models import llama, queries, word_tokenizer

pytestmark = [
    pytest.mark.hpu,
    pytest.mark.skipif(not has_habana(), reason="habana_frameworks.torch is not installed"),
]
WATCHED = ("graph_compilation", "recipe_cache", "cpu_fallback")


def trainer(**changes: Any) -> PPOTrainer:
    """One that starts from the same weights each time, with static shapes."""
    policy = PolicyWithValueHead(llama(0))
    torch.manual_seed(5)
    nn.init.normal_(policy.v_head.summary.weight, std=0.2)
    values = {
        "batch_size": 8, "mini_batch_size": 4, "ppo_epochs": 2, "learning_rate": 1e-3, "pad_for_acceleration": True,
        "pad_max_input_len": 12, "pad_max_len": 22, "accelerator_kwargs": {"mixed_precision": "no"},
    }  # fmt: skip
    config = PPOConfig(**{**values, **changes})
    return PPOTrainer(config, policy, llama(1), word_tokenizer(), sampling=Sampling(10, eos_token_ids=(2,)))


def steps(trained: PPOTrainer, seeds: range) -> Iterator[dict[str, Any]]:
    """PPO steps on prompts of random lengths."""
    for seed in seeds:
        chance = random.Random(seed)
        rollout = trained.rollout(queries(*[chance.randint(1, 12) for _ in range(8)], seed=seed))
        yield trained.update(rollout, [chance.gauss(0, 1) for _ in range(8)])


def counters() -> dict[str, dict[str, int]]:
    """Gaudi's own, since the process began."""
    metrics = importlib.import_module("habana_frameworks.torch.hpu.metrics")
    return {name: dict(metrics.metric_global(name).stats()) for name in WATCHED}


def test_after_two_steps_nothing_is_compiled_and_nothing_falls_back_to_the_cpu() -> None:
    trained = trainer(use_habana=True)
    list(steps(trained, range(2)))
    before = counters()
    list(steps(trained, range(2, 8)))
    after = counters()
    assert after["graph_compilation"] == before["graph_compilation"]
    assert after["recipe_cache"].get("MISS", 0) == before["recipe_cache"].get("MISS", 0)
    assert after["cpu_fallback"] == before["cpu_fallback"]


def test_a_step_in_fp32_is_the_cpus() -> None:
    found = next(steps(trainer(use_habana=True), range(1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf_ppo.devices.has_habana", lambda: False)
        expected = next(steps(trainer(accelerator_kwargs={"mixed_precision": "no", "cpu": True}), range(1)))
    for name in ("objective/kl", "ppo/loss/total", "ppo/policy/entropy", "ppo/returns/mean", "ppo/grad_norm"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4)


def test_memory_is_counted() -> None:
    trained = trainer(use_habana=True)
    list(steps(trained, range(1)))
    memory = trained.on.memory()
    assert memory is not None and 0 < memory.allocated <= memory.peak < memory.total
