"""The page that shows what training did: one HTML file that needs nothing beside itself."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

from rlhf_ppo.parameters import RunSettings, encode
from rlhf_ppo.policy_evaluation.charts import histogram, line_chart

SHOWN_EACH_WAY = 5
CURVES: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Reward", "mean score of a batch", {"reward": "env/reward_mean"}),
    ("KL to the reference", "nats per response", {"KL": "objective/kl"}),
    ("KL coefficient", "", {"coefficient": "objective/kl_coef"}),
    ("Losses", "", {"policy": "ppo/loss/policy", "value": "ppo/loss/value"}),
    ("Clipped ratios", "share of tokens", {"share": "ppo/policy/clipfrac"}),
    ("Entropy", "nats per token", {"entropy": "ppo/policy/entropy"}),
    ("Response length", "tokens", {"length": "tokens/responses_len_mean"}),
    ("Explained variance of returns", "", {"explained": "ppo/val/var_explained"}),
    ("Speed", "response tokens per second", {"speed": "tokens/per_second"}),
)


def render(
    evaluation: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    history: Sequence[dict[str, float]],
    settings: RunSettings,
) -> str:
    """The page. ``evaluation`` holds figures and verdict, ``rows`` the responses, ``history`` one entry per PPO step."""
    css = files("rlhf_ppo.policy_evaluation").joinpath("report.css").read_text(encoding="utf-8")
    body = "".join(
        (
            _heading(evaluation, settings),
            _verdict(evaluation["verdict"]),
            _cards(evaluation),
            _curves(history),
            _distributions(rows),
            _responses(rows),
            _table("Lineage", evaluation["lineage"], opened=True),
            _table("Settings", encode(settings)),
        )
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(settings.ppo.exp_name)}: PPO report</title><style>{css}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def _text(value: Any) -> str:
    return escape(str(value))


def _heading(evaluation: dict[str, Any], settings: RunSettings) -> str:
    each = evaluation["samples_per_prompt"]
    return (
        f"<h1>{_text(settings.ppo.exp_name)}</h1><p class='under'>{_text(settings.ppo.model_name)}, fine-tuned with PPO "
        f"against {_text(settings.ppo.reward_model)}; judged on {evaluation['prompts']} held-out prompts with "
        f"{each} response{'s' if each > 1 else ''} each. Brackets are 95 % intervals.</p>"
    )


def _verdict(verdict: dict[str, Any]) -> str:
    passed = verdict["passed"]
    said = "The gate is passed" if passed else "The gate holds the policy back"
    reasons = "".join(f"<li>{_text(reason)}</li>" for reason in verdict["reasons"])
    return f"<div class='verdict{' passed' if passed else ''}'><strong>{said}</strong><ul>{reasons}</ul></div>"


def _interval(of: dict[str, float], digits: int = 2) -> str:
    return f"[{of['low']:.{digits}f}, {of['high']:.{digits}f}]"


def _cards(evaluation: dict[str, Any]) -> str:
    score, length = evaluation["metrics"]["score"], evaluation["metrics"]["response_length"]
    two, kl = evaluation["distinct2"], evaluation["kl"]
    cards = (
        (
            "Mean score",
            f"{score['reference']['mean']:.2f} → {score['policy']['mean']:.2f}",
            f"gain {score['gain']['mean']:+.2f} {_interval(score['gain'])}",
        ),
        ("KL to the reference", f"{kl['mean']:.1f}", f"nats per response {_interval(kl, 1)}"),
        (
            "Response length",
            f"{length['reference']['mean']:.1f} → {length['policy']['mean']:.1f}",
            f"tokens; {evaluation['metrics']['ended']['policy']['mean']:.0%} end by themselves",
        ),
        (
            "Distinct word pairs",
            f"{two['reference']:.2f} → {two['policy']:.2f}",
            f"{evaluation['distinct2_ratio']:.0%} of the reference's",
        ),
    )
    return "<div class='cards'>{}</div>".format(
        "".join(
            f"<div class='card'><div class='name'>{name}</div><div class='value'>{value}</div>"
            f"<div class='note'>{note}</div></div>"
            for name, value, note in cards
        )
    )


def _curves(history: Sequence[dict[str, float]]) -> str:
    charts = "".join(
        line_chart(
            title, {label: [step.get(name, float("nan")) for step in history] for label, name in lines.items()}, unit
        )
        for title, unit, lines in CURVES
    )
    return f"<h2>Training, by PPO step</h2><div class='charts'>{charts}</div>" if charts else ""


def _distributions(rows: Sequence[dict[str, Any]]) -> str:
    scores = {name: [row[f"{name}_score"] for row in rows] for name in ("reference", "policy")}
    gains = {"gain": [row["policy_score"] - row["reference_score"] for row in rows]}
    charts = (
        histogram("Scores", {"policy": scores["policy"], "reference": scores["reference"]}, "responses")
        + histogram("Gain of each response", gains, "responses")
        + histogram("KL of each response", {"KL": [row["kl"] for row in rows]}, "nats")
    )
    return f"<h2>Distributions on held-out prompts</h2><div class='charts'>{charts}</div>"


def _responses(rows: Sequence[dict[str, Any]]) -> str:
    ranked = sorted(rows, key=lambda row: row["reference_score"] - row["policy_score"])
    each = min(SHOWN_EACH_WAY, len(ranked) // 2)
    gained = "".join(_pair(row) for row in ranked[:each])
    lost = "".join(_pair(row) for row in reversed(ranked[len(ranked) - each :]))
    return f"<h2>Largest gains</h2>{gained}<h2>Largest losses</h2>{lost}"


def _pair(row: dict[str, Any]) -> str:
    sides = "".join(
        f"<div class='side'><div class='head'>{name} <span class='score'>{row[f'{name}_score']:+.2f}</span></div>"
        f"<div class='text'><span class='prompt'>{_text(row['prompt'])}</span>{_text(row[name])}</div></div>"
        for name in ("reference", "policy")
    )
    return f"<div class='pair'><div class='sides'>{sides}</div></div>"


def _table(title: str, values: dict[str, Any], opened: bool = False) -> str:
    lines = "".join(
        f"<tr><td>{_text(name)}</td><td class='number'>{_text(value)}</td></tr>"
        for name, value in values.items()
        if value is not None
    )
    return f"<details{' open' if opened else ''}><summary>{title}</summary><table>{lines}</table></details>"
