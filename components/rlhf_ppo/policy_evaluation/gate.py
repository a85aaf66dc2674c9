"""The work of gate: whether the policy may be pushed, and why."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ppo.settings import GateSettings

MOST_EMPTY, MOST_SAME = 0.5, 0.9
"""Largest shares of responses that are empty, and one and the same; no setting allows more."""
NO_FLOOR = -1e9
"""The value of a floor that asks for nothing, and of which nothing is said."""


@dataclass(frozen=True)
class Verdict:
    """Whether the policy passed, and one sentence for every check."""

    passed: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Check:
    """What was found and what is asked of it; ``good`` is false for every nan."""

    good: bool
    found: str
    asked: str

    def __str__(self) -> str:
        return f"{'passed' if self.good else 'held'}: {self.found} {'is' if self.good else 'is not'} {self.asked}"


def decide(evaluation: dict[str, Any], settings: GateSettings) -> Verdict:
    """The verdict on what ``statistics.compare`` found: passed if every check is."""
    checks = [
        *_gains(evaluation, settings),
        *_costs(evaluation, settings),
        *_collapse(evaluation),
        *_others(evaluation, settings),
    ]
    return Verdict(all(check.good for check in checks), tuple(str(check) for check in checks))


def _gains(evaluation: dict[str, Any], settings: GateSettings) -> Iterator[Check]:
    """That there are numbers, and that they speak for the policy."""
    # A published model that gives no numbers must not keep others from its place.
    strange = ", ".join(not_finite({name: of for name, of in evaluation.items() if name != "champion"}))
    yield Check(not strange, strange or "every figure", "a finite number")
    prompts, least = evaluation["prompts"], settings.gate_min_prompts
    yield Check(prompts >= least, f"{prompts} held-out prompts: that", f"at least gate_min_prompts={least}")
    gain, margin = evaluation["metrics"]["score"]["gain"], settings.gate_min_score_gain
    yield Check(
        gain["low"] > margin, f"score gain {shown(gain)}: the lower end", f"above gate_min_score_gain={margin:g}"
    )
    wins, half = evaluation["win_rate"], settings.gate_min_win_rate
    yield Check(wins["low"] > half, f"win rate {shown(wins)}: the lower end", f"above gate_min_win_rate={half:g}")
    score, floor = evaluation["metrics"]["score"]["policy"], settings.gate_min_score
    if floor > NO_FLOOR:
        yield Check(score["low"] >= floor, f"score {shown(score)}: the lower end", f"at least gate_min_score={floor:g}")


def _costs(evaluation: dict[str, Any], settings: GateSettings) -> Iterator[Check]:
    """What the gain may cost."""
    kl, cap = evaluation["kl"], settings.gate_max_kl
    yield Check(kl["high"] < cap, f"KL {shown(kl)} nats per response: the upper end", f"below gate_max_kl={cap:g}")
    ratio, kept = evaluation["distinct2_ratio"], settings.gate_min_distinct2
    yield Check(
        ratio >= kept, f"distinct-2 = {ratio:.3g} × the reference's: that", f"at least gate_min_distinct2={kept:g}"
    )
    repeated, most = evaluation["metrics"]["repetition"]["policy"]["mean"], settings.gate_max_repetition
    yield Check(
        repeated <= most,
        f"{repeated:.3g} of the responses' word 4-grams repeated: that",
        f"at most gate_max_repetition={most:g}",
    )


def _collapse(evaluation: dict[str, Any]) -> Iterator[Check]:
    """What no gain is worth."""
    empty, same = evaluation["empty_responses"], evaluation["same_responses"]
    yield Check(empty <= MOST_EMPTY, f"{empty:.1%} of the responses empty: that", f"at most {MOST_EMPTY:.0%}")
    yield Check(same <= MOST_SAME, f"{same:.1%} of the responses one and the same: that", f"at most {MOST_SAME:.0%}")


def _others(evaluation: dict[str, Any], settings: GateSettings) -> Iterator[Check]:
    """What the published model and the judge say, where there are any."""
    champion, judge = evaluation.get("champion"), evaluation.get("judge")
    if champion:
        gain, needed = champion["metrics"]["score"]["gain"], settings.gate_min_champion_gain
        said = f"score gain {shown(gain)} over the published model: the lower end"
        yield Check(gain["low"] > needed, said, f"above gate_min_champion_gain={needed:g}")
    if judge and settings.gate_min_judge_gain > NO_FLOOR:
        gain, needed = judge["gain"], settings.gate_min_judge_gain
        said = f"score gain {shown(gain)} by the judge {judge['name']}: the lower end"
        yield Check(gain["low"] > needed, said, f"above gate_min_judge_gain={needed:g}")


def not_finite(value: Any, name: str = "") -> Iterator[str]:
    """The names, joined by dots, of the numbers inside ``value`` that are nan or infinite."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from not_finite(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, float) and not math.isfinite(value):
        yield name


def shown(interval: dict[str, float]) -> str:
    """An interval in three significant digits: mean [low, high]."""
    return f"{interval['mean']:.3g} [{interval['low']:.3g}, {interval['high']:.3g}]"


def gate(evaluation: Path) -> bool:
    """The verdict that evaluate_policy stored in the directory ``evaluation``."""
    found = json.loads((evaluation / "evaluation.json").read_text(encoding="utf-8"))
    for reason in found["verdict"]["reasons"]:
        print(reason)
    return bool(found["verdict"]["passed"])
