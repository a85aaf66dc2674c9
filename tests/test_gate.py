"""The gate: every check passes or holds with its reason, and nothing that is not a number gets through."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest

from rlhf_ppo.policy_evaluation.gate import decide, gate
from rlhf_ppo.settings import GateSettings

GOOD: dict[str, Any] = {
    "prompts": 64,
    "samples_per_prompt": 2,
    "metrics": {
        "score": {
            "policy": {"mean": 1.0, "low": 0.9, "high": 1.1},
            "reference": {"mean": 0.5, "low": 0.4, "high": 0.6},
            "gain": {"mean": 0.5, "low": 0.3, "high": 0.7},
        },
        "repetition": {"policy": {"mean": 0.1, "low": 0.05, "high": 0.15}},
    },
    "win_rate": {"mean": 0.7, "low": 0.6, "high": 0.8},
    "kl": {"mean": 6.0, "low": 5.0, "high": 7.0},
    "kl3": {"mean": 6.5, "low": 5.5, "high": 7.5},
    "distinct2_ratio": 0.9,
    "empty_responses": 0.0,
    "same_responses": 0.05,
}
FIGURES = [
    *(f"metrics.score.{who}.{end}" for who in ("policy", "reference", "gain") for end in ("mean", "low", "high")),
    *(f"{name}.{end}" for name in ("kl", "kl3", "win_rate") for end in ("mean", "low", "high")),
    "distinct2_ratio",
    "empty_responses",
    "same_responses",
]


def found(name: str = "", value: Any = None) -> dict[str, Any]:
    """A good evaluation in which one figure, named with dots, is another."""
    evaluation = copy.deepcopy(GOOD)
    if name:
        *path, last = name.split(".")
        inner = evaluation
        for key in path:
            inner = inner[key]
        inner[last] = value
    return evaluation


def held(evaluation: dict[str, Any], **settings: Any) -> list[str]:
    """What is held; the verdict is passed exactly when nothing is."""
    verdict = decide(evaluation, GateSettings(**settings))
    reasons = [reason for reason in verdict.reasons if reason.startswith("held: ")]
    assert verdict.passed == (not reasons)
    assert all(reason.startswith(("passed: ", "held: ")) for reason in verdict.reasons)
    return reasons


def test_a_good_policy_passes_and_every_check_is_told_with_its_parameter() -> None:
    verdict = decide(found(), GateSettings())
    assert verdict.passed
    told = " ".join(verdict.reasons)
    for parameter in (
        "gate_min_prompts=50", "gate_min_score_gain=0", "gate_min_win_rate=0.5",
        "gate_max_kl=25", "gate_min_distinct2=0.7", "gate_max_repetition=0.5",
    ):  # fmt: skip
        assert told.count(parameter) == 1


def test_a_reason_says_what_was_found_and_what_it_is_not() -> None:
    evaluation = found("metrics.score.gain", {"mean": 0.12, "low": -0.03, "high": 0.27})
    assert held(evaluation) == ["held: score gain 0.12 [-0.03, 0.27]: the lower end is not above gate_min_score_gain=0"]


@pytest.mark.parametrize(
    ("figure", "last_good", "first_bad", "parameter"),
    [
        ("prompts", 50, 49, "gate_min_prompts"),
        ("metrics.score.gain.low", 1e-9, 0.0, "gate_min_score_gain"),
        ("win_rate.low", 0.501, 0.5, "gate_min_win_rate"),
        ("metrics.repetition.policy.mean", 0.5, 0.501, "gate_max_repetition"),
        ("kl.high", 24.999, 25.0, "gate_max_kl"),
        ("distinct2_ratio", 0.7, 0.699, "gate_min_distinct2"),
        ("empty_responses", 0.5, 0.501, "50.1% of the responses empty: that is not at most 50%"),
        ("same_responses", 0.9, 0.901, "90.1% of the responses one and the same: that is not at most 90%"),
    ],
)
def test_each_limit_holds_where_its_help_says(figure: str, last_good: float, first_bad: float, parameter: str) -> None:
    assert held(found(figure, last_good)) == []
    (reason,) = held(found(figure, first_bad))
    assert parameter in reason


def test_a_floor_of_the_score_is_asked_for_only_where_one_is_set() -> None:
    assert "gate_min_score=" not in " ".join(decide(found(), GateSettings()).reasons)
    assert held(found(), gate_min_score=0.9) == []
    assert held(found(), gate_min_score=0.91) == [
        "held: score 1 [0.9, 1.1]: the lower end is not at least gate_min_score=0.91"
    ]


def test_limits_are_the_settings() -> None:
    assert held(found(), gate_min_score_gain=0.3, gate_max_kl=7.0, gate_min_distinct2=0.95, gate_min_prompts=65) == [
        "held: 64 held-out prompts: that is not at least gate_min_prompts=65",
        "held: score gain 0.5 [0.3, 0.7]: the lower end is not above gate_min_score_gain=0.3",
        "held: KL 6 [5, 7] nats per response: the upper end is not below gate_max_kl=7",
        "held: distinct-2 = 0.9 × the reference's: that is not at least gate_min_distinct2=0.95",
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("figure", FIGURES)
def test_a_figure_that_is_not_finite_is_held_by_name(figure: str, value: float) -> None:
    assert f"held: {figure} is not a finite number" in held(found(figure, value))


NOTHING_ASKED = {
    "gate_min_score_gain": -1e9, "gate_min_win_rate": 0.0, "gate_max_kl": 1e9, "gate_min_distinct2": 0.0,
    "gate_max_repetition": 1.0, "gate_min_prompts": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("figure", "value"),
    [("empty_responses", 1.0), ("same_responses", 1.0), ("metrics.score.gain.mean", math.nan), ("kl.high", math.inf)],
)
def test_collapse_and_what_is_no_number_are_held_whatever_the_settings_ask_for(figure: str, value: float) -> None:
    assert held(found(), **NOTHING_ASKED) == []
    assert held(found(figure, value), **NOTHING_ASKED)


def test_a_published_model_is_asked_for_its_gain_alone() -> None:
    """One that gives no numbers otherwise, because it is broken, can be replaced; one without a score can't."""
    gain = {"mean": 0.2, "low": 0.1, "high": 0.3}
    nothing = {"mean": math.nan, "low": math.nan, "high": math.nan}
    better = {"metrics": {"score": {"gain": gain}, "nll": {"gain": nothing}}, "kl": nothing}
    assert held(found("champion", better)) == []
    (reason,) = held(found("champion", better), gate_min_champion_gain=0.1)
    assert reason == "held: score gain 0.2 [0.1, 0.3] over the published model: the lower end is not above " + (
        "gate_min_champion_gain=0.1"
    )
    (reason,) = held(found("champion", {"metrics": {"score": {"gain": nothing}}}))
    assert "over the published model" in reason


@pytest.mark.parametrize("passed", [True, False])
def test_the_step_returns_the_stored_verdict_and_tells_its_reasons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], passed: bool
) -> None:
    stored = {"verdict": {"passed": passed, "reasons": ["passed: first", "held: second"]}}
    (tmp_path / "evaluation.json").write_text(json.dumps(stored), encoding="utf-8")
    assert gate(tmp_path) is passed
    assert capsys.readouterr().out == "passed: first\nheld: second\n"


def test_of_equal_policies_at_most_one_in_twenty_passes_and_a_clearly_better_one_does() -> None:
    """The whole gate, on simulated evaluations; benchmarks/gate_error_rates.py prints more of them."""
    place = Path(__file__).parent.parent / "benchmarks" / "gate_error_rates.py"
    spec = importlib.util.spec_from_file_location("gate_error_rates", place)
    assert spec and spec.loader
    rates = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rates)
    assert rates.passed("normal", 50, 0.0, 200) <= 0.05
    assert rates.passed("normal", 50, 1.0, 50) >= 0.9
