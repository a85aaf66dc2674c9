"""What two sets of responses to the same prompts say about the policy, with 95 % intervals."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
from numpy.typing import NDArray

RESAMPLES = 10_000
# A character of a script that sets no spaces (Thai, Lao, Burmese, Khmer, Kana, Han) is a word by itself.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORD = re.compile(f"[{_UNSPACED}]|[^\\s{_UNSPACED}]+")
Array = NDArray[numpy.float64]


@dataclass(frozen=True)
class Samples:
    """Responses of one model; every list has one entry per prompt and sample, the samples of a prompt together.

    ``nlls`` are the means over a response's tokens of -log q in nats, where q is the reference; ``ids`` its tokens.
    """

    responses: list[str]
    scores: list[float]
    lengths: list[int]
    ended: list[bool]
    nlls: list[float]
    ids: list[list[int]] = field(default_factory=list)


def interval(values: Array, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, float]:
    """Mean of ``values`` (prompts,) with its 95 % percentile-bootstrap interval (Efron & Tibshirani 1993, chapter 13).

    All three are nan where a value is.
    """
    if not numpy.isfinite(values).all():
        return dict.fromkeys(("mean", "low", "high"), float("nan"))
    if (values == values[0]).all():
        return dict.fromkeys(("mean", "low", "high"), float(values[0]))
    generator = numpy.random.default_rng(seed)
    # In parts, so that many prompts don't make one huge table.
    parts = max(1, len(values) * resamples // 5_000_000)
    means = numpy.concatenate(
        [
            values[generator.integers(0, len(values), (len(rows), len(values)))].mean(1)
            for rows in numpy.array_split(numpy.arange(resamples), parts)
        ]
    )
    low, high = numpy.quantile(means, [0.025, 0.975])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def per_prompt(values: Sequence[float], samples: int) -> Array:
    """The mean over each prompt's samples: what is resampled are prompts."""
    return numpy.asarray(values, dtype=numpy.float64).reshape(-1, samples).mean(1)


def distinct(texts: Sequence[str], n: int, samples: int = 1) -> tuple[float, Array]:
    """Share of distinct n-grams of words among all in ``texts`` (Li et al. 2016); 0 where there are none.

    Also the share (prompts,) without each prompt's ``samples`` texts, which is what the jackknife needs.
    """
    prompts = len(texts) // samples
    total = numpy.zeros(prompts)
    owners: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for row, text in enumerate(texts):
        words = WORD.findall(text)
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        total[row // samples] += len(grams)
        for gram in set(grams):
            owners[gram].add(row // samples)
    alone = numpy.bincount([min(of) for of in owners.values() if len(of) == 1], minlength=prompts)
    left = total.sum() - total
    without = numpy.divide(len(owners) - alone, left, out=numpy.zeros(prompts), where=left > 0)
    return (len(owners) / float(total.sum()) if owners else 0.0), without


def jackknife_interval(value: float, without: Array) -> dict[str, float]:
    """``value`` with its 95 % interval from the values ``without`` (prompts,) each prompt (Efron & Tibshirani 1993,
    chapter 11).

    For distinct-n: a bootstrap resample repeats responses, which by itself makes n-grams less distinct.
    """
    n = len(without)
    half = 1.96 * float(numpy.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum()))
    return {"mean": value, "low": value - half, "high": value + half}


def kl_estimates(logprobs: Sequence[Any], ref_logprobs: Sequence[Any]) -> tuple[list[float], list[float]]:
    """KL(policy || reference) of each response in nats from its tokens' log-probabilities (1-D tensors).

    k1 = Σ log p - log q is unbiased and may be negative; k3 = Σ q/p - 1 - log(q/p) is never negative
    (Schulman 2020, "Approximating KL divergence").
    """
    k1, k3 = [], []
    for policy, reference in zip(logprobs, ref_logprobs, strict=True):
        difference = (reference - policy).double()
        k1.append(float(-difference.sum()))
        k3.append(float((difference.exp() - 1 - difference).sum()))
    return k1, k3


def perplexity(nll: float) -> float:
    """The perplexity of a mean surprise in nats per token; infinite where it is beyond all numbers."""
    return math.exp(nll) if not nll > 700 else math.inf


def wins(policy: Sequence[float], reference: Sequence[float]) -> list[float]:
    """1 where the policy's score is higher, 0 where it is lower, one half for a tie, which rounding may have parted."""
    return [
        0.5 if math.isclose(after, before, rel_tol=1e-6, abs_tol=1e-9) else float(after > before)
        for after, before in zip(policy, reference, strict=True)
    ]


def repetition(text: str, n: int = 4) -> float:
    """Share of the n-grams of words in ``text`` that stood in it before; 0 where there are none."""
    words = WORD.findall(text)
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def most_frequent(texts: Sequence[str]) -> float:
    """Share of ``texts`` that are the most frequent of them."""
    return max(Counter(text.strip() for text in texts).values()) / len(texts)


def paired(policy: Sequence[float], other: Sequence[float], samples: int, name: str) -> dict[str, dict[str, float]]:
    """The intervals of the policy's values, of those of ``name``, and of the gains, paired by prompt."""
    after, before = per_prompt(policy, samples), per_prompt(other, samples)
    return {"policy": interval(after), name: interval(before), "gain": interval(after - before)}


def win_rate(policy: Sequence[float], other: Sequence[float], samples: int) -> dict[str, float]:
    """The interval of the share of responses that score higher than the other's to the same prompt."""
    return interval(per_prompt(wins(policy, other), samples))


def against(policy: Samples, other: Samples, samples: int, name: str) -> dict[str, Any]:
    """Every figure of the policy and of the model ``name`` with its interval, where both are known."""
    metrics = {}
    for metric, of_policy, of_other in (
        ("score", policy.scores, other.scores),
        ("response_length", policy.lengths, other.lengths),
        ("ended", policy.ended, other.ended),
        ("truncated", [not ended for ended in policy.ended], [not ended for ended in other.ended]),
        ("repetition", [repetition(text) for text in policy.responses], [repetition(text) for text in other.responses]),
        ("nll", policy.nlls, other.nlls),
    ):
        if of_policy and of_other:
            metrics[metric] = paired(of_policy, of_other, samples, name)
    for n in (1, 2):
        kept, without = distinct(policy.responses, n, samples)
        had, had_without = distinct(other.responses, n, samples)
        metrics[f"distinct{n}"] = {
            "policy": jackknife_interval(kept, without),
            name: jackknife_interval(had, had_without),
            "gain": jackknife_interval(kept - had, without - had_without),
        }
    return {"metrics": metrics, "win_rate": win_rate(policy.scores, other.scores, samples)}


def compare(policy: Samples, reference: Samples, k1: list[float], k3: list[float], samples: int) -> dict[str, Any]:
    """What the gate decides on: every figure of policy and reference, and the signs of collapse."""
    found = against(policy, reference, samples, "reference")
    after2, before2 = (found["metrics"]["distinct2"][who]["mean"] for who in ("policy", "reference"))
    return {
        "prompts": len(policy.scores) // samples,
        "samples_per_prompt": samples,
        **found,
        **divergence(k1, k3, samples),
        # A reference without word pairs has no diversity that could be lost.
        "distinct2_ratio": after2 / before2 if before2 else 1.0,
        "empty_responses": sum(not response.strip() for response in policy.responses) / len(policy.responses),
        "same_responses": most_frequent(policy.responses),
    }


def divergence(k1: list[float], k3: list[float], samples: int) -> dict[str, dict[str, float]]:
    """The intervals of the two estimates of the KL divergence."""
    return {"kl": interval(per_prompt(k1, samples)), "kl3": interval(per_prompt(k3, samples))}
