"""The same training by one process or by several, under torchrun; what each rank found goes to a file."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import FSDPModule

from rlhf_ppo.config import PPOConfig
from rlhf_ppo.ppo import PolicyWithValueHead, PPOTrainer, Prompt, Sampling, train
from rlhf_ppo.ppo import trainer as trainers
from rlhf_ppo.ppo.loop import StepReport
from rlhf_ppo.ppo.models import layers_of
from rlhf_ppo.ppo.setup import Adam, adam
from rlhf_ppo.ppo.sharding import everywhere, local
from tiny_models import llama, queries, word_tokenizer


def wants_high_tokens(_: list[str], responses: list[str]) -> list[float]:
    return [sum(int(word[1:]) > 33 for word in response.split() if word[1:].isdigit()) / 12 for response in responses]


def policy(case: dict[str, Any]) -> tuple[PolicyWithValueHead, nn.Module | None]:
    model: Any = llama(0)
    if case.get("lora"):
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    critic = llama(2).model if case.get("critic") else None
    made = PolicyWithValueHead(model, critic)
    torch.manual_seed(5)
    nn.init.normal_(made.v_head.summary.weight, std=0.2)
    return made, None if case.get("lora") else llama(1)


def run(case: dict[str, Any], out: Path) -> None:
    """Train ``global_batch_size`` samples a step, however many processes there are, and save what each rank knows."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    sizes = {"batch_size": 8 // world, "mini_batch_size": case.get("minibatch", 4) // world, "steps": 24 // world}
    values: dict[str, Any] = {"accelerator_kwargs": {"cpu": True}, "learning_rate": 1e-3, "ppo_epochs": 2}
    config = PPOConfig(**{**values, **sizes, **case.get("config", {})})
    made, reference = policy(case)
    if case.get("own_adam"):
        trainers.adam = lambda made, rate, _: Adam(made.parameters(), lr=rate)  # type: ignore[assignment]
    sharded = bool(case.get("sharded"))
    sampling = Sampling(case.get("tokens", 8), eos_token_ids=tuple(range(2, 3 + case.get("more_ends", 0))))
    trainer = PPOTrainer(config, made, reference, word_tokenizer(), sampling=sampling, sharded=sharded)
    assert trainer.sharded == (sharded and world > 1)
    assert trainer.config.world_size == world and trainer.config.global_batch_size == 8
    for group in trainer.optimizer.param_groups:
        # Else a gradient that is nothing but rounding makes a step of full length, another one in two processes.
        group["eps"] = 1e-5
    trainer.lr_scheduler = torch.optim.lr_scheduler.StepLR(trainer.optimizer, 1, 0.5)
    reports: list[StepReport] = []
    prompts = [Prompt(f"prompt {row}", query) for row, query in enumerate(queries(*[3, 4, 5, 6] * 5))]
    if case.get("spoil"):
        _spoil(trainer, rank)
    train(trainer, prompts, wants_high_tokens, on_step=reports.append)
    if trainer.sharded:
        _check_spread(trainer, world)
    weights = {name: everywhere(value.detach()) for name, value in trainer.policy.named_parameters()}
    saved = trainer.whole_policy()
    assert (saved is not None) == (not trainer.sharded or rank == 0)
    if saved is not None:
        assert all(
            torch.equal(weights[name], value) for name, value in saved.named_parameters() if "critic" not in name
        )
    torch.save(weights, out / f"weights-{world}-{rank}.pt")
    lines = [
        {
            "stats": {n: v for n, v in report.stats.items() if not n.startswith(("time/", "tokens/per_second"))},
            "scores": report.scores,
            "responses": report.responses,
        }
        for report in reports
    ]
    (out / f"reports-{world}-{rank}.json").write_text(json.dumps({"lines": lines, "kl": trainer.kl_controller.value}))
    trainer.accelerator.free_memory()
    trainers.adam = adam


def _check_spread(trainer: PPOTrainer, world: int) -> None:
    """Every weight, gradient and state of Adam, and the reference, is here only in part."""
    models = [trainer.policy] if trainer.reference is None else [trainer.policy, trainer.reference]
    for name, value in [pair for model in models for pair in model.named_parameters()]:
        assert local(value).numel() <= value.numel() // world + value[0].numel(), name
    layers = [layer for model in models for layer in layers_of(model)]
    assert all(isinstance(layer, FSDPModule) for layer in layers), "a pass would collect all layers at once"
    for values in trainer.optimizer.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            assert local(values[name]).numel() <= values[name].numel() // world + values[name][0].numel()


def _spoil(trainer: PPOTrainer, rank: int) -> None:
    """Make the ratio of one sample, which only the first process has, overflow: all must skip its minibatch."""
    begin = trainer._begin

    def spoiled(*arguments: Any) -> Any:
        update = begin(*arguments)
        update.experience.logprobs[1] -= 200
        return update

    trainer._begin = spoiled  # type: ignore[method-assign]


if __name__ == "__main__":
    for name, settings in json.loads(sys.argv[1]).items():
        directory = Path(sys.argv[2]) / name
        directory.mkdir(parents=True, exist_ok=True)
        run(settings, directory)
