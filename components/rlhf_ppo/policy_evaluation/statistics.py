"""What two sets of responses to the same prompts say about the policy, with 95 % intervals."""

from __future__ import annotations

import math
import re
from collections import defaultdict
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


def against(policy: Samples, champion: Samples, samples: int) -> dict[str, Any]:
    """The champion's score, and the policy's gain over it and share of wins, paired by prompt."""
    after, before = per_prompt(policy.scores, samples), per_prompt(champion.scores, samples)
    won = per_prompt(wins(policy.scores, champion.scores), samples)
    return {"score": interval(before), "gain": interval(after - before), "win_rate": interval(won)}


def compare(policy: Samples, reference: Samples, k1: list[float], k3: list[float], samples: int) -> dict[str, Any]:
    """Every figure of policy and reference with its interval; gains are paired by prompt."""
    metrics = {}
    for name, of_policy, of_reference in (
        ("score", policy.scores, reference.scores),
        ("response_length", policy.lengths, reference.lengths),
        ("ended", policy.ended, reference.ended),
        ("repetition", [repetition(text) for text in policy.responses], [repetition(r) for r in reference.responses]),
        ("nll", policy.nlls, reference.nlls),
    ):
        after, before = per_prompt(of_policy, samples), per_prompt(of_reference, samples)
        metrics[name] = {"policy": interval(after), "reference": interval(before), "gain": interval(after - before)}
    for n in (1, 2):
        kept, without = distinct(policy.responses, n, samples)
        had, had_without = distinct(reference.responses, n, samples)
        metrics[f"distinct{n}"] = {
            "policy": jackknife_interval(kept, without),
            "reference": jackknife_interval(had, had_without),
            "gain": jackknife_interval(kept - had, without - had_without),
        }
    after2, before2 = (metrics["distinct2"][who]["mean"] for who in ("policy", "reference"))
    return {
        "prompts": len(policy.scores) // samples,
        "samples_per_prompt": samples,
        "metrics": metrics,
        "win_rate": interval(per_prompt(wins(policy.scores, reference.scores), samples)),
        "kl": interval(per_prompt(k1, samples)),
        "kl3": interval(per_prompt(k3, samples)),
        # A reference without word pairs has no diversity that could be lost.
        "distinct2_ratio": after2 / before2 if before2 else 1.0,
        "empty_responses": sum(not response.strip() for response in policy.responses) / len(policy.responses),
    }
