"""Sampling on a GPU: tokens that the GPU repeats by itself beside tokens whose every operation the host calls.

    python benchmarks/replayed_decoding.py [--rows 64] [--prompt 64] [--tokens 256] [--rounds 3]

A Llama of 1.2 billion random weights in bf16 samples with both in turns, after a round that does not count; nothing
ends early. The limit is the time in which the GPU reads the weights, once for each token, at the rate of a large copy.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_ppo.devices import Device, find_device
from rlhf_ppo.errors import InputError
from rlhf_ppo.ppo.generation import sample
from rlhf_ppo.ppo.models import ValueHead
from rlhf_ppo.ppo.replay import replays
from rlhf_ppo.ppo.sampling import Sampling, draw

SIZES = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}  # fmt: skip
SIDES = ("called", "repeated")


def llama(sizes: dict[str, Any], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A model of these sizes with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig(**sizes)).to(dtype).eval()


def measure(model: nn.Module, on: Device, queries: list[Tensor], tokens: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round, by side. Raises InputError where the model can't be repeated on this device."""
    if on.capture is None or not replays(model, Sampling(tokens), on.capture):
        raise InputError(f"{on.name} does not repeat the tokens of {type(model).__name__}: nothing to compare")
    head = ValueHead(model.get_input_embeddings().weight.shape[1]).to(on.device)  # type: ignore[operator]
    numbers = draw(len(queries), tokens, torch.Generator().manual_seed(0))
    found: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(rounds + 1):
        for side in SIDES:
            capture = on.capture if side == "repeated" else None
            on.synchronize()
            started = time.perf_counter()
            sample(model, queries, Sampling(tokens), numbers, len(queries), value_head=head, capture=capture)
            on.synchronize()
            if number:
                found[side].append(time.perf_counter() - started)
    return found


def bandwidth(on: Device, numbers: int = 1 << 28) -> float:
    """Bytes that a large copy moves in a second, those that it reads and those that it writes."""
    one = torch.zeros(numbers, device=on.device)
    other, times = torch.empty_like(one), []
    for _ in range(5):
        on.synchronize()
        started = time.perf_counter()
        other.copy_(one)
        on.synchronize()
        times.append(time.perf_counter() - started)
    return 2 * one.nbytes / statistics.median(times)


def report(model: nn.Module, found: dict[str, list[float]], tokens: int, rate: float) -> str:
    """Milliseconds a token by side, their ratio, and the limit's share of the second."""
    called, repeated = (statistics.median(found[side]) / tokens * 1000 for side in SIDES)
    ratios = [one / other for one, other in zip(*(found[side] for side in SIDES), strict=True)]
    limit = sum(parameter.nbytes for parameter in model.parameters()) / rate * 1000
    return (
        f"called {called:.2f} ms a token, repeated {repeated:.2f}: ratio {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f}); the weights at {rate / 1e9:.0f} GB/s take {limit:.2f} ms, "
        f"{limit / repeated:.2f} of that"
    )


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 64), ("prompt", 64), ("tokens", 256), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    on = find_device(use_habana=False)
    if on.capture is None:
        raise SystemExit(f"no device here repeats tokens ({on.name}): run this on a machine with an NVIDIA GPU")
    model = llama(SIZES, on.device, torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    queries = list(torch.randint(3, SIZES["vocab_size"], (given.rows, given.prompt), generator=generator))
    found = measure(model, on, queries, given.tokens, given.rounds)
    print(report(model, found, given.tokens, bandwidth(on)))


if __name__ == "__main__":
    main()
