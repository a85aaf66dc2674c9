"""Our trainer on a workload, as the pipeline makes and calls it."""

from __future__ import annotations

import time
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer
from workloads import CHECKED_RATE, INIT_KL_COEF, LEARNING_RATE, SEED, arguments, serve

from rlhf_ppo.config import PPOConfig
from rlhf_ppo.ppo import PolicyWithValueHead, PPOTrainer, Sampling
from rlhf_ppo.ppo import trainer as trainer_module
from rlhf_ppo.ppo.models import load_model, shared_reference
from rlhf_ppo.ppo.optimization import SKIPPED
from rlhf_ppo.ppo.rollout import Rollout

WORKLOAD, MODEL, EXCHANGE = arguments()


def make_trainer() -> PPOTrainer:
    """The trainer as train_ppo makes it."""
    trunk = load_model(MODEL)
    reference = shared_reference(trunk, 0)
    policy = PolicyWithValueHead(trunk)
    policy.set_value_head(load_file(EXCHANGE / "value_head.safetensors"))
    config = PPOConfig(
        batch_size=WORKLOAD.batch_size,
        mini_batch_size=WORKLOAD.mini_batch_size,
        learning_rate=LEARNING_RATE,
        init_kl_coef=INIT_KL_COEF,
        adap_kl_ctrl=False,
        ppo_epochs=WORKLOAD.ppo_epochs,
        seed=SEED,
    )
    last = trunk.config.vocab_size - 1
    sampling = Sampling(max(response for _, response in WORKLOAD.lengths()), eos_token_ids=(last,))
    return PPOTrainer(config, policy, reference, AutoTokenizer.from_pretrained(MODEL), sampling=sampling)


TRAINER = make_trainer()
QUERIES = WORKLOAD.queries(TRAINER.policy.pretrained_model.config.vocab_size)
DRAW = trainer_module.draw


def drawn(rows: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Random numbers of which that for a response's last token is the largest: it takes the last id, the end token."""
    uniform = DRAW(rows, tokens, generator)
    for row, (_, response) in enumerate(WORKLOAD.lengths()):
        uniform[row, response - 1] = 1.0
    return uniform


def rolled_out() -> Rollout:
    """A rollout whose responses have the workload's lengths."""
    with mock.patch.object(trainer_module, "draw", drawn):
        return TRAINER.rollout(QUERIES)


def in_order(number: int) -> None:
    """The order of the rows in the next step's passes."""
    orders = iter(WORKLOAD.orders(number))
    TRAINER.optimization._permutation = lambda _: next(orders)  # type: ignore[method-assign]


def iterate(asked: dict[str, Any]) -> dict[str, Any]:
    """One iteration."""
    in_order(asked["number"])
    started = time.perf_counter()
    rollout = rolled_out()
    sampled = time.perf_counter()
    stats = TRAINER.update(rollout, WORKLOAD.scores())
    ended = time.perf_counter()
    update, tokens = stats["time/ppo/optimize_step"], sum(map(len, rollout.responses))
    phases = {"rollout": sampled - started, "scoring": ended - sampled - update, "update": update}
    return {**phases, "total": ended - started, "tokens": tokens, "skipped": stats[SKIPPED]}


def respond(_: dict[str, Any]) -> dict[str, Any]:
    """Sample the responses that both are checked with."""
    global CHECKED
    CHECKED = rolled_out()
    save_file({f"{row:04}": ids for row, ids in enumerate(CHECKED.responses)}, EXCHANGE / "responses.safetensors")
    return {"lengths": [len(row) for row in CHECKED.responses]}


CHECKED: Rollout


def check(_: dict[str, Any]) -> dict[str, Any]:
    """One step on these responses: its statistics, and the gradient of its first minibatch as a file.

    With plain gradient descent: Adam makes a step of full length of a gradient that is nothing but rounding.
    """
    in_order(0)
    TRAINER.optimization.optimizer = torch.optim.SGD(TRAINER.policy.parameters(), CHECKED_RATE)
    TRAINER.begin_update(CHECKED, WORKLOAD.scores())
    apply, kept = TRAINER.optimization._apply_gradients, []

    def keep(used: Tensor) -> Tensor:
        if not kept:
            parameters = dict(TRAINER.policy.named_parameters())
            gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
            save_file(gradients, EXCHANGE / "gradients_of_ours.safetensors")
            kept.append(True)
        return apply(used)

    with mock.patch.object(TRAINER.optimization, "_apply_gradients", keep):
        stats = TRAINER.finish_update()
    return {"stats": {name: value for name, value in stats.items() if isinstance(value, float)}}


serve({"iterate": iterate, "respond": respond, "check": check})
