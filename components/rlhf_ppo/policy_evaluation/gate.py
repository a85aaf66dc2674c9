"""The work of gate: whether the policy may be pushed, and why."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ppo.settings import GateSettings


@dataclass(frozen=True)
class Verdict:
    """Whether the policy passed, and one sentence for every check."""

    passed: bool
    reasons: tuple[str, ...]


def decide(evaluation: dict[str, Any], settings: GateSettings) -> Verdict:
    """The verdict on what ``statistics.compare`` found. Whatever is not a finite number is held."""
    gain, kl = evaluation["metrics"]["score"]["gain"], evaluation["kl"]
    ratio, prompts = evaluation["distinct2_ratio"], evaluation["prompts"]
    numbers = [*gain.values(), *kl.values(), ratio]
    if not all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers):
        return Verdict(False, ("held: a score, the KL or distinct-2 is not a finite number",))
    checks = [
        (
            prompts >= settings.gate_min_prompts,
            f"{prompts} held-out prompts",
            f"at least gate_min_prompts={settings.gate_min_prompts}",
        ),
        (
            gain["low"] > settings.gate_min_score_gain,
            f"score gain {_shown(gain)}",
            f"lower end above gate_min_score_gain={settings.gate_min_score_gain:g}",
        ),
        (
            kl["high"] < settings.gate_max_kl,
            f"KL {_shown(kl)} nats per response",
            f"upper end below gate_max_kl={settings.gate_max_kl:g}",
        ),
        (
            ratio >= settings.gate_min_distinct2 and evaluation["empty_responses"] < 1,
            f"distinct-2 is {ratio:.2f} of the reference's",
            f"at least gate_min_distinct2={settings.gate_min_distinct2:g}, and not every response empty",
        ),
    ]
    reasons = tuple(f"{'passed' if good else 'held'}: {what} (needed: {needed})" for good, what, needed in checks)
    return Verdict(all(good for good, _, _ in checks), reasons)


def _shown(interval: dict[str, float]) -> str:
    return f"{interval['mean']:.2f} [{interval['low']:.2f}, {interval['high']:.2f}]"


def gate(evaluation: Path) -> bool:
    """The verdict that evaluate_policy stored in the directory ``evaluation``."""
    found = json.loads((evaluation / "evaluation.json").read_text(encoding="utf-8"))
    for reason in found["verdict"]["reasons"]:
        print(reason)
    return bool(found["verdict"]["passed"])
