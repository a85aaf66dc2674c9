"""The coefficient of the KL penalty, and the running moments of the scores."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class KLController:
    """The KL coefficient, adapted so that the KL of a response approaches ``target`` (nats).

    Ziegler et al. 2019, section 2.2: e = clip(KL / target - 1, ±0.2); β ← β (1 + e n / horizon). With ``adaptive``
    false, β is constant.
    """

    value: float
    target: float
    horizon: float
    adaptive: bool = True

    def update(self, kl: float, samples: int) -> None:
        """Take in the mean KL of ``samples`` responses (of all processes)."""
        if self.adaptive and math.isfinite(kl):
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.value *= 1 + error * samples / self.horizon


@dataclass
class RunningMoments:
    """Mean and variance of all scores so far (Chan et al. 1979)."""

    mean: float = 0.0
    var: float = 1.0
    count: float = 1e-24

    @property
    def std(self) -> float:
        """Unbiased standard deviation of what was seen; 1 before two values were, and while all are equal in fp32."""
        found = math.sqrt(self.var * self.count / (self.count - 1)) if self.count > 1 else 0.0
        return found if found > torch.finfo(torch.float32).eps * abs(self.mean) else 1.0

    def update(self, scores: Tensor) -> None:
        """Take in ``scores`` (batch,)."""
        given = scores.tolist()
        count, mean = len(given), math.fsum(given) / len(given)
        var = math.fsum((score - mean) ** 2 for score in given) / count
        delta, everything = mean - self.mean, self.count + count
        self.var = (var * count + self.var * self.count + delta**2 * self.count * count / everything) / everything
        self.mean += delta * count / everything
        self.count = everything


def shape_scores(
    scores: Tensor, moments: RunningMoments, *, scaling: bool, center: bool, clip: float | None
) -> tuple[Tensor, float]:
    """Scores (batch,) divided by their running standard deviation, centred and clipped, as far as is asked for.

    Also returns the factor by which they were scaled. The batch is taken into the moments first, as TRL does.
    """
    factor = 1.0
    if scaling:
        moments.update(scores)
        factor = 1 / (moments.std + torch.finfo(scores.dtype).eps)
        scores = (scores - (moments.mean if center else 0.0)) * factor
    return (scores if clip is None else scores.clamp(-clip, clip)), factor
