"""The report: one page that needs nothing beside itself, shows what was found, and takes any text and any number."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from rlhf_ppo.parameters import decode
from rlhf_ppo.policy_evaluation.charts import histogram, line_chart, strip, ticks
from rlhf_ppo.policy_evaluation.gate import decide
from rlhf_ppo.policy_evaluation.report import CURVES, FIGURES, render
from rlhf_ppo.policy_evaluation.statistics import Samples, compare

NEEDED = {"model_name": "org/base", "query_dataset": "prompts.jsonl", "reward_model": "rewards:score"}
ATTACK = '</style></div><script>alert("1")</script><img src=x onerror=alert(2)>'
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """What is in a page; fails where an element is closed that is not open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def history(steps: int) -> list[dict[str, float]]:
    names = [name for _, _, lines in CURVES for name in lines.values()]
    return [
        {"step": float(step), **{name: math.sin(step) + k for k, name in enumerate(names)}} for step in range(steps)
    ]


def page(
    after: list[float], before: list[float], *, text: str = "a film", steps: int = 5, kl: float = 1.0, **parameters: Any
) -> str:
    """The report on one response to each prompt."""
    settings = decode({**NEEDED, "gate_min_prompts": 2, **parameters})

    def samples(scores: list[float]) -> Samples:
        return Samples(
            [f" {text} w{n}" for n in range(len(scores))],
            scores,
            [3] * len(scores),
            [True] * len(scores),
            [2.0] * len(scores),
        )

    found = compare(samples(after), samples(before), [kl] * len(after), [kl] * len(after), 1)
    verdict = decide(found, settings.gate)
    found["verdict"] = {"passed": verdict.passed, "reasons": list(verdict.reasons)}
    found["lineage"] = {"model": text, "reference digest": "abc123", "reward revision": None}
    rows = [
        {"prompt": f"{text} p{n}", "sample": 0, "reference": f" {text} r{n}", "policy": f" {text} q{n}",
         "reference_score": before[n], "policy_score": after[n], "kl": kl}
        for n in range(len(after))
    ]  # fmt: skip
    return render(found, rows, history(steps), settings)


def test_the_page_is_well_formed_and_needs_nothing_from_elsewhere() -> None:
    text = page([1.0, 2.0, 0.0], [0.0, 0.5, 1.0])
    found = Page(text)
    assert found.open == [] and not {"script", "link", "img", "iframe", "object"} & set(found.tags)
    assert not {"src", "href", "xlink:href", "action", "data"} & {name for name, _ in found.attributes}
    assert not re.search(r"https?:|//|url\(|@import", text)
    assert ("name", "viewport") in found.attributes
    for rule in ("prefers-color-scheme: dark", "@media print", "max-width: 620px"):
        assert rule in text


def test_texts_of_models_and_users_are_shown_never_obeyed() -> None:
    text = page([1.0, 2.0, 0.0], [0.0, 0.5, 1.0], text=ATTACK, exp_name=ATTACK, data_system_prompt="",
                data_prompt_column=ATTACK)  # fmt: skip
    found = Page(text)
    assert found.open == [] and not {"script", "img"} & set(found.tags)
    assert not any(name.startswith("on") for name, _ in found.attributes)
    # Prompt and responses, exp_name in heading and title, the setting, the lineage
    assert found.words.count(ATTACK) >= 3 * 3 + 4


def test_the_verdict_and_all_its_reasons_are_shown() -> None:
    passed, held = Page(page([1.0] * 3, [0.0] * 3)), Page(page([0.0] * 3, [1.0] * 3))
    assert "The gate is passed" in passed.words and "held: " not in passed.words
    assert "The gate holds the policy back" in held.words
    assert "score gain -1 [-1, -1]: the lower end is not above gate_min_score_gain=0" in held.words


def test_cards_show_before_after_gain_and_lineage() -> None:
    words = Page(page([1.0, 2.0], [0.0, 0.5], kl=3.25)).words
    for shown in ("0.25 → 1.50", "+1.25", "[1.00, 1.50]", "3.2", "abc123"):
        assert shown in words
    assert "reward revision" not in words and "None" not in words.split("Settings")[0]


def test_a_judge_and_a_published_model_have_their_cards_and_a_judge_its_scores_beside_the_responses() -> None:
    settings = decode({**NEEDED, "eval_judge": "m:f"})
    texts = Samples([" a b", " c d"], [1.0, 2.0], [2] * 2, [True] * 2, [math.log(50)] * 2)
    found = compare(texts, texts, [1.0] * 2, [1.0] * 2, 1)
    gain = {"mean": -0.75, "low": -1.25, "high": -0.25}
    share = {"mean": 0.25, "low": 0.125, "high": 0.375}
    judge = {"name": "m:f", "gain": gain, "win_rate": share, "reference": gain, "policy": gain}
    of = {"champion": gain, "policy": {"mean": 9.5, "low": 9.0, "high": 10.0}, "gain": gain}
    champion = {
        "repo_id": "me/film",
        "revision": "c0ffee",
        "metrics": {"score": of, "distinct2": of},
        "win_rate": share,
    }
    found |= {"verdict": {"passed": False, "reasons": []}, "lineage": {}}
    row = {"prompt": "p", "sample": 0, "reference": " r", "policy": " q", "reference_score": 0.0, "policy_score": 1.0}
    rows = [{**row, "kl": 1.0, "reference_judge_score": 0.625, "policy_judge_score": -0.125}] * 2
    alone = Page(render(found, [{**row, "kl": 1.0}] * 2, [], settings)).words
    assert "by the judge" not in alone and "judge +" not in alone and "published model" not in alone
    found |= {"judge": judge, "champion": champion}
    words = Page(render(found, rows, [], settings)).words
    for title in ("Gain over the published model", "Gain by the judge"):
        assert re.search(title + r"-0\.75score \[-1\.25, -0\.25\]", words)
    assert "needs more than 0" in words and "no gain at 0" in words
    assert "judge +0.62" in words and "judge -0.12" in words
    ours, theirs = words.split("Against me/film as published c0ffee")
    assert "Perplexity under the reference50.000 [50.000, 50.000]" in ours
    intervals = "-0.750 [-1.250, -0.250]9.500 [9.000, 10.000]-0.750 [-1.250, -0.250]"
    assert f"publishedpolicygainScore{intervals}Distinct-2{intervals}Win rate, a tie is one half0.250" in theirs
    # What can't be known of a model with other tokens is not shown.
    assert "Perplexity" not in theirs and "k1" not in theirs


def test_the_page_stays_small_enough_for_a_mail_whatever_is_in_it() -> None:
    long, many = "word " * 1000, 300
    text = page([float(n) for n in range(many)], [0.0] * many, text=long, steps=20_000)
    assert len(text.encode()) < 5_000_000


def test_the_largest_gains_and_losses_come_first_and_only_where_there_are_any() -> None:
    words = Page(page([5.0, 1.0, 0.0, 0.0], [0.0, 0.0, 3.0, 0.0])).words
    gains, losses = words.split("Largest gains")[1].split("Largest losses")
    assert re.findall(r"p\d", gains) == ["p0", "p1"] and re.findall(r"p\d", losses.split("All figures")[0]) == ["p2"]
    assert "Largest losses" not in Page(page([1.0, 2.0], [0.0, 0.0])).words


def test_samples_of_a_prompt_stand_together_with_their_mean_gain() -> None:
    settings = decode(NEEDED)
    texts = Samples([" a b", " c d"] * 2, [1.0, 2.0, 0.0, 0.0], [2] * 4, [True] * 4, [1.0] * 4)
    found = compare(texts, Samples(texts.responses, [0.0] * 4, [2] * 4, [True] * 4, [1.0] * 4), [1.0] * 4, [1.0] * 4, 2)
    found |= {"verdict": {"passed": False, "reasons": []}, "lineage": {}}
    rows = [
        {"prompt": "the same", "sample": n % 2, "reference": f" r{n}", "policy": f" q{n}", "reference_score": 0.0,
         "policy_score": texts.scores[n], "kl": 1.0}
        for n in range(4)
    ]  # fmt: skip
    shown = Page(render(found, rows, [], settings)).words.split("Largest gains")[1]
    assert shown.count("the same") == 1 and "+1.50" in shown and "q0" in shown and "q1" in shown and "q2" not in shown


def test_settings_that_differ_from_the_default_are_marked_with_it() -> None:
    text = page([1.0, 2.0], [0.0, 0.5], gate_max_kl=15.0)
    assert "<tr class=changed><th>gate_max_kl</th><td><code>15.0</code> <span class='soft'>default 25.0</span>" in text
    assert "<tr><th>gate_min_distinct2</th>" in text


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_shown_as_such(value: float) -> None:
    text = page([1.0, 2.0], [0.0, 0.5], kl=value)
    assert Page(text).open == [] and "kl.mean" in text
    assert not re.search(r'(?:[xyrd12]|points)="[^"]*(?:nan|inf)', text)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", [1e300, -1.7e308])
def test_numbers_too_large_to_draw_do_not_end_the_step(value: float) -> None:
    text = page([value, 2.0], [0.0, 0.5])
    assert Page(text).open == [] and "gate_min_score_gain" in text
    assert line_chart("t", [1, 2, 3], {"a": [0.0, value, 1.0]}) == line_chart(
        "t", [1, 2, 3], {"a": [0.0, math.nan, 1.0]}
    )


def test_every_figure_has_its_interval_in_the_table() -> None:
    table = page([1.0, 2.0, 3.0], [0.0, 0.5, 1.0]).split("<table class='figures'>")[1].split("</table>")[0]
    for name, _ in FIGURES:
        (line,) = re.findall(rf"<tr><th>{name}</th>(.*?)</tr>", table)
        assert (
            len(re.findall(r"-?\d+\.\d{3} <span class='soft'><span class='whole'>\[-?\d+\.\d{3}, -?\d+\.\d{3}\]", line))
            == 3
        )


def test_a_long_run_with_long_texts_stays_small() -> None:
    text = page([float(n) for n in range(400)], [10.0] * 400, text="word" * 25_000, steps=20_000)
    assert len(text.encode()) < 2_000_000
    assert "means of 67 steps" in text


def test_a_run_without_history_has_no_training_section() -> None:
    assert "Training" not in page([1.0, 2.0], [0.0, 0.5], steps=0)
    assert "Training" in page([1.0, 2.0], [0.0, 0.5], steps=1)


# Charts


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2.5, 5, 7.5, 10]),
        (-0.3, 0.9, [-0.5, 0, 0.5, 1]),
        (1, 15, [0, 5, 10, 15]),
        (0.05, 0.066, [0.05, 0.055, 0.06, 0.065, 0.07]),
        (2e6, 2.4e6, [2e6, 2.1e6, 2.2e6, 2.3e6, 2.4e6]),
    ],
)
def test_ticks_are_round_and_cover_the_values(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == expected


@pytest.mark.parametrize("value", [0.0, 3.0, -1e-9, 1e12])
def test_ticks_of_one_value_surround_it(value: float) -> None:
    marks = ticks(value, value)
    assert marks[0] < value < marks[-1] and len(marks) == len(set(marks))


def test_a_line_has_a_gap_where_a_value_is_not_finite() -> None:
    (path,) = re.findall(r'<path class="line s0" d="([^"]*)"', line_chart("t", [1, 2, 3, 4, 5],
                         {"a": [0.0, 4.0, math.nan, 4.0, 0.0]}))  # fmt: skip
    points = [tuple(map(float, point.split(","))) for point in re.findall(r"[\d.]+,[\d.]+", path)]
    assert re.findall("[ML]", path) == ["M", "L", "M", "L"]
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert points[0][1] == points[3][1] > points[1][1] == points[2][1]
    # Steps 1, 2, 4, 5 are as far apart as they should be.
    assert points[2][0] - points[1][0] == pytest.approx(2 * (points[1][0] - points[0][0]), abs=0.2)
    assert line_chart("t", [1], {"a": [math.nan]}) == ""


def test_a_histogram_counts_every_finite_value_and_marks_the_mean() -> None:
    chart = histogram("t", {"a": [0.0, 0.0, 0.0, 10.0, math.nan]})
    (outline,) = re.findall(r'points="([^"]*)"', chart)
    places, heights = zip(*(map(float, point.split(",")) for point in outline.split()), strict=True)
    base, three, one = max(heights), min(heights), sorted(set(heights))[1]
    assert (base - three) == pytest.approx(3 * (base - one), abs=0.2)
    # 0 and 10 are the ends of the axis, so they fill the first and the last of its bins.
    assert min(x for x, y in zip(places, heights, strict=True) if y == three) == min(places)
    assert max(x for x, y in zip(places, heights, strict=True) if y == one) == max(places)
    assert "mean <b>2.5</b>" in chart and "nan" not in chart


def test_a_strip_puts_interval_and_limit_where_they_are() -> None:
    drawn = strip([(0, {"mean": 6.0, "low": 5.0, "high": 7.0})], 25.0, "needs less than")
    (bar,) = re.findall(r'class="bar s0" x1="([\d.]+)" x2="([\d.]+)"', drawn)
    (limit,) = re.findall(r'class="limit" x1="([\d.]+)"', drawn)
    low, high, mark = float(bar[0]), float(bar[1]), float(limit)
    assert (mark - low) == pytest.approx((25 - 5) / (7 - 5) * (high - low), abs=0.6)
    assert "needs less than 25" in drawn
    assert strip([(0, {"mean": math.nan, "low": 0.0, "high": 1.0})]) == ""
