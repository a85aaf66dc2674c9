"""The work of gate: whether the policy may be pushed, and why."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ppo.settings import GateSettings

MOST_EMPTY = 0.5
NO_FLOOR = -1e9
"""The value of a floor that asks for nothing, and of which nothing is said."""


@dataclass(frozen=True)
class Verdict:
    """Whether the policy passed, and one sentence for every check."""

    passed: bool
    reasons: tuple[str, ...]


def decide(evaluation: dict[str, Any], settings: GateSettings) -> Verdict:
    """The verdict on what ``statistics.compare`` found: passed if every check is."""
    score, kl, prompts = evaluation["metrics"]["score"], evaluation["kl"], evaluation["prompts"]
    gain, wins, repeated = score["gain"], evaluation["win_rate"], evaluation["metrics"]["repetition"]["policy"]["mean"]
    ratio, empty = evaluation["distinct2_ratio"], evaluation["empty_responses"]
    strange = ", ".join(not_finite(evaluation))
    # Each check: whether it passes (nan passes none), what was found, and what therefore is or is not so.
    checks = [
        (not strange, strange or "every figure", "a finite number"),
        (
            prompts >= settings.gate_min_prompts,
            f"{prompts} held-out prompts: that",
            f"at least gate_min_prompts={settings.gate_min_prompts}",
        ),
        (
            gain["low"] > settings.gate_min_score_gain,
            f"score gain {shown(gain)}: the lower end",
            f"above gate_min_score_gain={settings.gate_min_score_gain:g}",
        ),
        (
            wins["low"] > settings.gate_min_win_rate,
            f"win rate {shown(wins)}: the lower end",
            f"above gate_min_win_rate={settings.gate_min_win_rate:g}",
        ),
        (
            kl["high"] < settings.gate_max_kl,
            f"KL {shown(kl)} nats per response: the upper end",
            f"below gate_max_kl={settings.gate_max_kl:g}",
        ),
        (
            ratio >= settings.gate_min_distinct2,
            f"distinct-2 {ratio:.3g} times the reference's: that",
            f"at least gate_min_distinct2={settings.gate_min_distinct2:g}",
        ),
        (
            repeated <= settings.gate_max_repetition,
            f"{repeated:.3g} of the responses' word 4-grams repeated: that",
            f"at most gate_max_repetition={settings.gate_max_repetition:g}",
        ),
        (empty <= MOST_EMPTY, f"{empty:.0%} of the responses empty: that", f"at most {MOST_EMPTY:.0%}"),
    ]
    champion = evaluation.get("champion")
    if champion:
        gained, needed = champion["gain"], settings.gate_min_champion_gain
        said = f"score gain {shown(gained)} over the published model: the lower end"
        checks.append((gained["low"] > needed, said, f"above gate_min_champion_gain={needed:g}"))
    if settings.gate_min_score > NO_FLOOR:
        floor = f"at least gate_min_score={settings.gate_min_score:g}"
        said = f"score {shown(score['policy'])}: the lower end"
        checks.append((score["policy"]["low"] >= settings.gate_min_score, said, floor))
    judge = evaluation.get("judge")
    if judge and settings.gate_min_judge_gain > NO_FLOOR:
        gained, needed = judge["gain"], settings.gate_min_judge_gain
        said = f"score gain {shown(gained)} by the judge {judge['name']}: the lower end"
        checks.append((gained["low"] > needed, said, f"above gate_min_judge_gain={needed:g}"))
    reasons = tuple(
        f"{'passed' if good else 'held'}: {what} {'is' if good else 'is not'} {needed}" for good, what, needed in checks
    )
    return Verdict(all(good for good, _, _ in checks), reasons)


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
