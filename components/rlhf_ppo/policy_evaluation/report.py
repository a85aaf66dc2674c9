"""The page that shows what training did: one HTML file that needs nothing beside itself."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from rlhf_ppo.parameters import RunSettings, defaults, encode
from rlhf_ppo.policy_evaluation.charts import histogram, line_chart, strip
from rlhf_ppo.policy_evaluation.gate import NO_FLOOR
from rlhf_ppo.policy_evaluation.statistics import perplexity

SHOWN_EACH_WAY = 5
SAMPLES_SHOWN = 2
LONGEST_TEXT = 4000
MOST_POINTS = 300
POLICY, REFERENCE = 0, 1  # colours of charts.py
CURVES: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Reward", "mean score of a batch", {"reward": "env/reward_mean"}),
    ("KL", "nats per response", {"KL": "objective/kl"}),
    ("KL coefficient", "", {"coefficient": "objective/kl_coef"}),
    ("Losses", "", {"policy": "ppo/loss/policy", "value": "ppo/loss/value"}),
    ("Clipped ratios", "share of tokens", {"share": "ppo/policy/clipfrac"}),
    ("Entropy", "nats per token", {"entropy": "ppo/policy/entropy"}),
    ("Response length", "tokens", {"length": "tokens/responses_len_mean"}),
    ("Explained variance", "of returns", {"explained": "ppo/val/var_explained"}),
    ("Speed", "tokens per second", {"speed": "tokens/per_second"}),
)

FIGURES = (
    ("Score", "score"),
    ("Response length, tokens", "response_length"),
    ("Share that ends by itself", "ended"),
    ("Share cut off at the longest length", "truncated"),
    ("Share of repeated word 4-grams", "repetition"),
    ("Distinct-1", "distinct1"),
    ("Distinct-2", "distinct2"),
    ("Surprise of the reference, nats per token", "nll"),
)


def render(
    evaluation: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    history: Sequence[dict[str, float]],
    settings: RunSettings,
) -> str:
    """The page: ``evaluation`` has figures and verdict, ``rows`` the responses, ``history`` an entry per PPO step."""
    css = files("rlhf_ppo.policy_evaluation").joinpath("report.css").read_text(encoding="utf-8")
    body = "".join(
        (
            _heading(evaluation, settings),
            _verdict(evaluation["verdict"]),
            _cards(evaluation, settings),
            _curves(history),
            _distributions(rows),
            _responses(rows),
            _figures(evaluation),
            _lineage(evaluation["lineage"]),
            _settings(settings),
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
    model, reward = _text(settings.ppo.model_name), _text(settings.ppo.reward_model)
    return (
        f"<header><h1>{_text(settings.ppo.exp_name)}</h1><p class='under'><code>{model}</code> fine-tuned with PPO "
        f"against <code>{reward}</code>, judged on {evaluation['prompts']} held-out prompts with "
        f"{each} response{'s' if each > 1 else ''} each. Brackets are 95&nbsp;% intervals.</p></header>"
    )


def _verdict(verdict: dict[str, Any]) -> str:
    said = "The gate is passed" if verdict["passed"] else "The gate holds the policy back"
    kind = "passed" if verdict["passed"] else "held"
    reasons = ""
    for reason in verdict["reasons"]:
        word, _, rest = reason.partition(": ")
        reasons += f"<li class='{_text(word)}'><b>{_text(word)}:</b> {_text(rest)}</li>"
    return f"<section class='verdict {kind}'><h2>{said}</h2><ul>{reasons}</ul></section>"


def _interval(of: Mapping[str, float], digits: int = 2) -> str:
    return f"<span class='whole'>[{of['low']:.{digits}f}, {of['high']:.{digits}f}]</span>"


def _cards(evaluation: dict[str, Any], settings: RunSettings) -> str:
    metrics, kl, ratio, gate = evaluation["metrics"], evaluation["kl"], evaluation["distinct2_ratio"], settings.gate
    score, length, two = metrics["score"], metrics["response_length"], metrics["distinct2"]
    wins, gain, kept = evaluation["win_rate"], score["gain"], dict.fromkeys(("low", "mean", "high"), ratio)
    keys = f"<span class='key s{REFERENCE}'>reference</span> <span class='key s{POLICY}'>policy</span>"
    judge, champion = evaluation.get("judge"), evaluation.get("champion")
    cards = [
        _card("Mean score", _change(score, 2), keys, _both(score)),
        _card(
            "Gain",
            f"{gain['mean']:+.2f}",
            f"score {_interval(gain)}",
            strip([(POLICY, gain)], gate.gate_min_score_gain, "needs more than"),
        ),
        _card(
            "Win rate",
            f"{wins['mean']:.0%}",
            f"of the pairs {_interval(wins)}",
            strip([(POLICY, wins)], gate.gate_min_win_rate, "needs more than"),
        ),
        _card(
            "KL to the reference",
            f"{kl['mean']:.1f}",
            f"nats per response {_interval(kl, 1)}",
            strip([(POLICY, kl)], gate.gate_max_kl, "needs less than"),
        ),
        _card(
            "Distinct word pairs",
            _change(two, 2),
            f"{ratio:.0%} of the reference's",
            strip([(POLICY, kept)], gate.gate_min_distinct2, "needs at least"),
        ),
        _card(
            "Response length",
            _change(length, 1),
            f"tokens; {metrics['ended']['policy']['mean']:.0%} end by themselves",
            _both(length),
        ),
    ]
    if champion:
        gained = champion["metrics"]["score"]["gain"]
        cards.append(_gain_card("Gain over the published model", gained, gate.gate_min_champion_gain))
    if judge:
        cards.append(_gain_card("Gain by the judge", judge["gain"], gate.gate_min_judge_gain))
    return f"<section class='cards'>{''.join(cards)}</section>"


def _gain_card(name: str, gain: Mapping[str, float], floor: float) -> str:
    limit = (floor, "needs more than") if floor > NO_FLOOR else (0.0, "no gain at")
    return _card(name, f"{gain['mean']:+.2f}", f"score {_interval(gain)}", strip([(POLICY, gain)], *limit))


def _card(name: str, value: str, note: str, picture: str) -> str:
    return (
        f"<div class='card'><div class='name'>{name}</div><div class='value'>{value}</div>"
        f"<div class='note'>{note}</div>{picture}</div>"
    )


def _change(of: Mapping[str, Mapping[str, float]], digits: int) -> str:
    return f"{of['reference']['mean']:.{digits}f} → {of['policy']['mean']:.{digits}f}"


def _both(of: Mapping[str, Mapping[str, float]]) -> str:
    return strip([(REFERENCE, of["reference"]), (POLICY, of["policy"])])


def _curves(history: Sequence[dict[str, float]]) -> str:
    joined = -(-len(history) // MOST_POINTS)
    points = [_mean_step(history[first : first + joined]) for first in range(0, len(history), max(joined, 1))]
    steps = [point["step"] for point in points]
    charts = "".join(
        line_chart(
            title, steps, {label: [p.get(name, math.nan) for p in points] for label, name in lines.items()}, unit
        )
        for title, unit, lines in CURVES
    )
    if not charts:
        return ""
    note = f", means of {joined} steps" if joined > 1 else ""
    return f"<section><h2>Training <small>by PPO step{note}</small></h2><div class='charts'>{charts}</div></section>"


def _mean_step(entries: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of entries of the history; steps are counted from 1."""
    names = {name for entry in entries for name in entry}
    found = {}
    for name in names:
        values = [value for entry in entries if (value := entry.get(name)) is not None]
        found[name] = sum(values) / len(values) if values else math.nan
    found["step"] = entries[-1].get("step", 0.0) + 1
    return found


def _distributions(rows: Sequence[dict[str, Any]]) -> str:
    scores = {name: [float(row[f"{name}_score"]) for row in rows] for name in ("reference", "policy")}
    gains = [after - before for after, before in zip(scores["policy"], scores["reference"], strict=True)]
    charts = (
        histogram("Score", scores, colours=(REFERENCE, POLICY))
        + histogram("Gain", {"gain": gains}, "of each pair")
        + histogram("KL", {"KL": [float(row["kl"]) for row in rows]}, "nats per response")
    )
    return f"<section><h2>Held-out responses</h2><div class='charts'>{charts}</div></section>"


def _responses(rows: Sequence[dict[str, Any]]) -> str:
    """The prompts whose mean score rose and fell most, with the responses of both."""
    groups: dict[int, list[dict[str, Any]]] = defaultdict(list)
    number = -1
    for row in rows:
        number += row["sample"] == 0
        groups[number].append(row)
    gains = {
        key: sum(row["policy_score"] - row["reference_score"] for row in group) / len(group)
        for key, group in groups.items()
    }
    ranked = sorted(groups, key=lambda key: -gains[key])
    gained = [key for key in ranked[:SHOWN_EACH_WAY] if gains[key] > 0]
    lost = [key for key in ranked[::-1][:SHOWN_EACH_WAY] if gains[key] < 0]
    return "".join(
        f"<section><h2>{title}</h2>{''.join(_pairs(groups[key], gains[key]) for key in keys)}</section>"
        for title, keys in (("Largest gains", gained), ("Largest losses", lost))
        if keys
    )


def _pairs(group: Sequence[dict[str, Any]], gain: float) -> str:
    cells = "".join(
        f"<div class='side {name}'><div class='head'>{name} "
        f"<span class='score'>{row[f'{name}_score']:+.2f}</span>{_by_judge(row, name)}</div>"
        f"<div class='text'>{_cut(row[name].strip()) or '<em>empty</em>'}</div></div>"
        for row in group[:SAMPLES_SHOWN]
        for name in ("reference", "policy")
    )
    kind = "up" if gain > 0 else "down"
    return (
        f"<article class='pair'><div class='prompt'><span class='gain {kind}'>{gain:+.2f}</span>"
        f"<span class='text'>{_cut(group[0]['prompt'])}</span></div><div class='sides'>{cells}</div></article>"
    )


def _by_judge(row: Mapping[str, Any], name: str) -> str:
    score = row.get(f"{name}_judge_score")
    return "" if score is None else f" <span class='soft'>judge {score:+.2f}</span>"


def _cut(text: str) -> str:
    return _text(text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " …")


def _figures(evaluation: dict[str, Any]) -> str:
    lines = _comparison(evaluation, "reference")
    judge = evaluation.get("judge")
    if judge:
        name = f"Score of the judge {_text(judge['name'])}"
        lines += _line(name, _cell(judge["reference"]), _cell(judge["policy"]), _cell(judge["gain"]))
        lines += _line("Win rate by the judge", "", _cell(judge["win_rate"]), "")
    lines += _line("Empty responses", "", f"{evaluation['empty_responses']:.1%}", "")
    lines += _line("Most frequent response", "", f"{evaluation['same_responses']:.1%}", "")
    tables = _table("reference", lines)
    champion = evaluation.get("champion")
    if champion:
        name, revision = _text(champion["repo_id"]), _text(champion["revision"])
        tables += f"<h3>Against {name} as published <small><code>{revision}</code></small></h3>"
        tables += _table("published", _comparison(champion, "champion"))
    return f"<details><summary>All figures</summary>{tables}</details>"


def _comparison(found: dict[str, Any], other: str) -> str:
    """The lines of all figures against the model ``other``, as far as they are known."""
    lines = ""
    for name, key in FIGURES:
        of = found["metrics"].get(key)
        if of:
            lines += _line(name, _cell(of[other]), _cell(of["policy"]), _cell(of["gain"]))
    surprise = found["metrics"].get("nll")
    if surprise:
        before, after = ({end: perplexity(nll) for end, nll in surprise[who].items()} for who in (other, "policy"))
        lines += _line("Perplexity under the reference", _cell(before), _cell(after), "")
    lines += _line("Win rate, a tie is one half", "", _cell(found["win_rate"]), "")
    if "kl" in found:
        lines += _line("KL, nats per response (k1)", "", _cell(found["kl"]), "")
        lines += _line("KL, nats per response (k3)", "", _cell(found["kl3"]), "")
    return lines


def _table(other: str, lines: str) -> str:
    head = f"<tr><th></th><th>{other}</th><th>policy</th><th>gain</th></tr>"
    return f"<div class='wide'><table class='figures'>{head}{lines}</table></div>"


def _cell(of: Mapping[str, float]) -> str:
    return f"{of['mean']:.3f} <span class='soft'>{_interval(of, 3)}</span>"


def _line(name: str, *cells: str) -> str:
    return f"<tr><th>{name}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _lineage(lineage: Mapping[str, Any]) -> str:
    lines = "".join(
        f"<tr><th>{_text(name)}</th><td><code>{_text(value)}</code></td></tr>"
        for name, value in lineage.items()
        if value is not None
    )
    return f"<details open><summary>Lineage</summary><table>{lines}</table></details>"


def _settings(settings: RunSettings) -> str:
    usual = defaults()
    lines = ""
    for name, value in encode(settings).items():
        changed = value != usual[name]
        shown = "<span class='soft'>not set</span>" if value in ("", {}) else f"<code>{_text(value)}</code>"
        if changed and usual[name] not in ("", {}):
            shown += f" <span class='soft'>default {_text(usual[name])}</span>"
        lines += f"<tr{' class=changed' if changed else ''}><th>{_text(name)}</th><td>{shown}</td></tr>"
    summary = "<summary>Settings <small>bold where not the default</small></summary>"
    return f"<details>{summary}<table>{lines}</table></details>"
