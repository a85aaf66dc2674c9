"""TRL 0.11.4's classic trainer on a workload; runs in an environment of its own (see run.py)."""

from __future__ import annotations

import os
import time
import warnings
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false")
warnings.filterwarnings("ignore")

import numpy  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer  # noqa: E402
from workloads import CHECKED_RATE, INIT_KL_COEF, LEARNING_RATE, SEED, arguments, serve  # noqa: E402

WORKLOAD, MODEL, EXCHANGE = arguments()


def make_trainer() -> PPOTrainer:
    """The trainer as its users make it, with the value head that both have."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(MODEL / "tokenizer.json"), padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.convert_ids_to_tokens(2)
    config = PPOConfig(
        batch_size=WORKLOAD.batch_size,
        mini_batch_size=WORKLOAD.mini_batch_size,
        gradient_accumulation_steps=1,
        learning_rate=LEARNING_RATE,
        init_kl_coef=INIT_KL_COEF,
        adap_kl_ctrl=False,
        ppo_epochs=WORKLOAD.ppo_epochs,
        seed=SEED,
    )
    policy, reference = (AutoModelForCausalLMWithValueHead.from_pretrained(str(MODEL)) for _ in range(2))
    head = load_file(EXCHANGE / "value_head.safetensors")
    with torch.no_grad():
        for name, parameter in policy.v_head.named_parameters():
            parameter.copy_(head[f"v_head.{name}"])
    return PPOTrainer(config, policy, reference, tokenizer)


TRAINER = make_trainer()
QUERIES = WORKLOAD.queries(TRAINER.model.pretrained_model.config.vocab_size)
LENGTHS = [response for _, response in WORKLOAD.lengths()]


def in_order(number: int) -> None:
    """The order of the rows in the next step's passes, in place of numpy's."""
    orders = iter(WORKLOAD.orders(number))
    numpy.random.permutation = lambda _: numpy.array(next(orders))


def iterate(asked: dict[str, Any]) -> dict[str, Any]:
    """One iteration. generate goes on until the longest response has ended, and is cut here."""
    in_order(asked["number"])
    longest, started = max(LENGTHS), time.perf_counter()
    with torch.no_grad():
        found = TRAINER.generate(
            QUERIES, return_prompt=False, batch_size=len(QUERIES), do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
            max_new_tokens=longest, min_new_tokens=longest, pad_token_id=2, eos_token_id=-1,
        )  # fmt: skip
    sampled = time.perf_counter()
    responses = [row[:length] for row, length in zip(found, LENGTHS, strict=True)]
    stats = TRAINER.step(QUERIES, responses, WORKLOAD.scores())
    ended = time.perf_counter()
    update = float(stats["time/ppo/optimize_step"])
    return {
        "rollout": sampled - started,
        "scoring": ended - sampled - update,
        "update": update,
        "total": ended - started,
    }


def check(asked: dict[str, Any]) -> dict[str, Any]:
    """One step on the responses that lie there: its statistics, and its first gradient as a file; with SGD, as ours.

    With ``exact`` it is computed in fp64.
    """
    in_order(0)
    if asked.get("exact"):
        compute_in_fp64()
    TRAINER.optimizer.optimizer = torch.optim.SGD(TRAINER.model.parameters(), CHECKED_RATE)
    responses = [row for _, row in sorted(load_file(EXCHANGE / "responses.safetensors").items())]
    step, kept = TRAINER.optimizer.step, []

    def keep(*given: Any, **named: Any) -> Any:
        if not kept:
            gradients = {n: p.grad.clone() for n, p in TRAINER.model.named_parameters() if p.grad is not None}
            save_file(gradients, EXCHANGE / f"gradients_of_{'fp64' if asked.get('exact') else 'trl'}.safetensors")
            kept.append(True)
        return step(*given, **named)

    TRAINER.optimizer.step = keep
    stats = TRAINER.step(QUERIES, responses, WORKLOAD.scores())
    TRAINER.optimizer.step = step
    return {"stats": {name: float(value) for name, value in stats.items() if numpy.ndim(value) == 0}}


def compute_in_fp64() -> None:
    """Models and all that comes from them in fp64, where transformers and TRL would go back to fp32.

    The rotations stay the fp32 numbers that both trainers have.
    """
    for model in (TRAINER.model, TRAINER.ref_model):
        model.double()
        for module in model.modules():
            if hasattr(module, "inv_freq"):
                module.inv_freq = module.inv_freq.float()
    to, single = torch.Tensor.to, torch.Tensor.float

    def stay(tensor: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        back = torch.float32 in given or named.get("dtype") is torch.float32
        return tensor if back and tensor.dtype == torch.float64 else to(tensor, *given, **named)

    torch.Tensor.to = stay
    torch.Tensor.float = lambda tensor: tensor if tensor.dtype == torch.float64 else single(tensor)


serve({"iterate": iterate, "check": check})
