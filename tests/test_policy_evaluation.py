"""The comparison of policy and reference: its numbers by hand, and the whole step with tiny models."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.parquet as parquet
import pytest
import torch

from rlhf_ppo.errors import InputError
from rlhf_ppo.parameters import decode
from rlhf_ppo.policy_evaluation.evaluate import evaluate_policy
from rlhf_ppo.policy_evaluation.gate import decide
from rlhf_ppo.policy_evaluation.statistics import (
    Samples,
    compare,
    distinct,
    interval,
    jackknife_interval,
    kl_estimates,
    per_prompt,
    perplexity,
    repetition,
    wins,
)
from rlhf_ppo.ppo import Sampling
from rlhf_ppo.ppo.generation import sample
from rlhf_ppo.ppo.sampling import draw
from rlhf_ppo.settings import GateSettings
from tiny_models import llama, queries, word_tokenizer

PROMPTS, EACH = 6, 2


def word_count(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward: how many different words."""
    return [float(len(set(response.split()))) for response in responses]


def broken(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward that gives no number for the last response."""
    return [1.0] * (len(responses) - 1) + [math.nan]


# Statistics


def test_the_interval_of_two_values_spans_them() -> None:
    # Of the four equally likely resamples of (0, 1) a quarter has the mean 0 and a quarter the mean 1.
    assert interval(numpy.array([0.0, 1.0])) == {"mean": 0.5, "low": 0.0, "high": 1.0}


def test_the_interval_of_many_values_is_that_of_the_normal_distribution() -> None:
    values = numpy.arange(1000.0)
    half = 1.96 * values.std() / math.sqrt(1000)
    found = interval(values)
    assert found["mean"] == 499.5
    assert found["low"] == pytest.approx(499.5 - half, abs=0.05 * half)
    assert found["high"] == pytest.approx(499.5 + half, abs=0.05 * half)


def test_an_interval_is_the_same_every_time() -> None:
    values = numpy.random.default_rng(3).normal(size=40)
    assert interval(values) == interval(values)


def test_a_value_that_is_not_finite_leaves_no_number() -> None:
    for value in (math.nan, math.inf):
        assert all(math.isnan(number) for number in interval(numpy.array([1.0, value])).values())


def test_equal_policies_pass_the_score_check_in_one_of_twenty_at_most() -> None:
    generator = numpy.random.default_rng(0)
    gains = generator.normal(size=(200, 64)) - generator.normal(size=(200, 64))
    passed = sum(interval(gain, resamples=1000)["low"] > 0 for gain in gains)
    assert passed <= 10
    # A true gain of half a standard deviation is seen nearly always.
    assert sum(interval(gain + 0.7, resamples=1000)["low"] > 0 for gain in gains) >= 190


def test_samples_of_a_prompt_are_averaged_before_prompts_are_resampled() -> None:
    assert per_prompt([1, 3, 5, 7], 2).tolist() == [2.0, 6.0]
    assert interval(per_prompt([10, -10] * 8, 2)) == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_distinct_counts_ngrams_of_words_within_responses() -> None:
    assert distinct(["a b a b"], 1)[0] == 2 / 4
    assert distinct(["a b a b"], 2)[0] == 2 / 3
    assert distinct(["a b", "b a"], 2)[0] == 1.0
    assert distinct(["a b", "a b"], 2)[0] == 1 / 2
    assert distinct(["a", ""], 2)[0] == 0.0


def test_scripts_without_spaces_are_counted_by_their_characters() -> None:
    assert distinct(["好看好看"], 1)[0] == 2 / 4
    assert distinct(["好看好看"], 2)[0] == 2 / 3
    assert distinct(["GPT-2 很好", "ดี"], 1)[0] == 1.0


def test_distinct_without_a_prompt_is_that_of_all_others() -> None:
    generator = numpy.random.default_rng(2)
    texts = [" ".join(generator.choice(list("abcdef"), generator.integers(0, 6))) for _ in range(12)]
    for n in (1, 2):
        without = distinct(texts, n, 2)[1]
        rest = [distinct(texts[: 2 * k] + texts[2 * k + 2 :], n)[0] for k in range(6)]
        assert without == pytest.approx(rest)


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    # 1, 2, 3, 6: without each 11/3, 10/3, 3, 2; the standard error is sqrt(14 / 3 / 4).
    half = 1.96 * math.sqrt(14 / 12)
    found = jackknife_interval(3.0, numpy.array([11 / 3, 10 / 3, 3.0, 2.0]))
    assert found == pytest.approx({"mean": 3.0, "low": 3 - half, "high": 3 + half})


def test_the_interval_of_distinct_covers_what_other_responses_of_the_same_kind_have() -> None:
    generator = numpy.random.default_rng(4)
    words = [str(word) for word in range(60)]
    corpora = [[" ".join(row) for row in generator.choice(words, (40, 12))] for _ in range(200)]
    found = [jackknife_interval(*distinct(texts, 2)) for texts in corpora]
    usual = sum(of["mean"] for of in found) / len(found)
    assert 0.9 <= sum(of["low"] <= usual <= of["high"] for of in found) / len(found) <= 0.995


def test_kl_estimates_of_two_tokens_by_hand() -> None:
    policy, reference = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.5]).log()
    k1, k3 = kl_estimates([policy, reference], [reference, policy])
    assert k1 == pytest.approx([math.log(2), -math.log(2)], abs=1e-6)
    # q/p - 1 - log(q/p): 1/2 - 1 + log 2, and the other way round 2 - 1 - log 2
    assert k3 == pytest.approx([0.193147, 0.306853], abs=1e-6)


def samples(scores: list[float], responses: list[str] | None = None) -> Samples:
    texts = responses or [f"a b c w{number}" for number in range(len(scores))]
    return Samples(texts, scores, [4] * len(scores), [True] * len(scores), [2.0] * len(scores))


def test_equal_samples_have_no_gain_and_no_width() -> None:
    scores = numpy.random.default_rng(1).normal(size=60).tolist()
    found = compare(samples(scores), samples(scores), [0.0] * 60, [0.0] * 60, 2)
    zero = {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert [of["gain"] for of in found["metrics"].values()] == [zero] * 8
    half = {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert found["win_rate"] == half
    assert (found["prompts"], found["distinct2_ratio"]) == (30, 1.0)
    assert not decide(found, GateSettings(gate_min_prompts=2)).passed


def test_a_win_is_a_higher_score_and_what_only_rounding_parts_is_a_tie() -> None:
    assert wins([1.0, 0.0, 2.0, 1e-10], [0.5, 0.5, 2.0 + 1e-7, 0.0]) == [1.0, 0.0, 0.5, 0.5]
    assert wins([math.nan], [0.0]) == [0.0]
    # Of each prompt's two samples one wins: the prompt is undecided.
    found = compare(samples([1.0, 0.0] * 30), samples([0.5] * 60), [0.0] * 60, [0.0] * 60, 2)
    assert found["win_rate"] == {"mean": 0.5, "low": 0.5, "high": 0.5}


def test_repetition_is_the_share_of_ngrams_that_stood_there_before() -> None:
    assert repetition("a b c d e f g h") == 0.0
    assert repetition("a b c d a b c d a b c d") == pytest.approx(1 - 4 / 9)
    assert repetition("a b") == repetition("") == 0.0


def test_a_policy_that_turns_in_circles_is_held() -> None:
    circles = [f"a{n} b{n} c{n} d{n} " * 12 for n in range(60)]
    varied = [f"a{n} b{n} c{n} d{n}" for n in range(60)]
    found = compare(samples([9.0] * 60, circles), samples([0.0] * 60, varied), [1.0] * 60, [1.0] * 60, 1)
    held = [
        reason for reason in decide(found, GateSettings(gate_min_distinct2=0.0)).reasons if reason.startswith("held")
    ]
    assert len(held) == 1 and "gate_max_repetition" in held[0]


def test_gains_are_paired_by_prompt() -> None:
    before = (numpy.random.default_rng(1).normal(size=60) * 100).round().tolist()
    found = compare(samples([score + 1 for score in before]), samples(before), [0.0] * 60, [0.0] * 60, 1)
    assert found["metrics"]["score"]["gain"] == {"mean": 1.0, "low": 1.0, "high": 1.0}


def test_a_policy_that_always_says_the_same_is_held_however_well_it_scores() -> None:
    good, varied = ["what a good film"] * 60, [f"a{n} b{n} c{n}" for n in range(60)]
    found = compare(samples([9.0] * 60, good), samples([0.0] * 60, varied), [1.0] * 60, [1.0] * 60, 1)
    held = [reason for reason in decide(found, GateSettings()).reasons if reason.startswith("held")]
    assert len(held) == 2 and "gate_min_distinct2" in held[0] and "one and the same" in held[1]


@pytest.mark.parametrize("spoken", [0, 1, 29])
def test_a_policy_that_falls_silent_is_held_however_well_it_scores(spoken: int) -> None:
    responses = [f"a{n} b{n}" for n in range(spoken)] + [" "] * (60 - spoken)
    found = compare(samples([9.0] * 60, responses), samples([0.0] * 60), [1.0] * 60, [1.0] * 60, 1)
    assert found["empty_responses"] == pytest.approx(1 - spoken / 60)
    assert not decide(found, GateSettings(gate_min_distinct2=0.0)).passed


def test_collapse_is_seen_in_a_language_without_spaces() -> None:
    varied = [f"{chr(0x4E00 + 7 * n)}{chr(0x5E00 + 11 * n)}很好看" for n in range(60)]
    found = compare(samples([9.0] * 60, ["真的很好看"] * 60), samples([0.0] * 60, varied), [1.0] * 60, [1.0] * 60, 1)
    held = [reason for reason in decide(found, GateSettings()).reasons if reason.startswith("held")]
    assert len(held) == 2 and "gate_min_distinct2" in held[0] and "100.0% of the responses one and the same" in held[1]


@pytest.mark.parametrize(("others", "passes"), [(0, False), (5, False), (6, True)])
def test_one_answer_to_everything_is_held_also_where_no_diversity_is_asked_for(others: int, passes: bool) -> None:
    responses = [f"a{n} b{n}" for n in range(others)] + ["a good film", " a good film\n"] * 27
    n = len(responses)
    found = compare(samples([9.0] * n, responses), samples([0.0] * n), [1.0] * n, [1.0] * n, 1)
    assert found["same_responses"] == pytest.approx(54 / n)
    assert decide(found, GateSettings(gate_min_distinct2=0.0)).passed == passes


# The step


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference, a policy, one whose weights are nan, prompts and a history."""
    directory = tmp_path_factory.mktemp("inputs")
    tokenizer = word_tokenizer()
    nan = llama(seed=0)
    with torch.no_grad():
        nan.lm_head.weight.fill_(math.nan)
    for name, model in (("reference", llama(seed=0)), ("policy", llama(seed=7)), ("nan", nan)):
        model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    (directory / "reference" / "digest.json").write_text(json.dumps({"revision": "abc", "digest": "ref-digest"}))
    (directory / "policy" / "training.json").write_text(json.dumps({"best_step": 3}))
    ids = [query.tolist() for query in queries(3, 5, 2, 4, 3, 6, 5, 4)]
    (directory / "prompts").mkdir()
    table = pyarrow.table({"prompt": [tokenizer.decode(row) for row in ids], "input_ids": ids})
    parquet.write_table(table, directory / "prompts" / "validation.parquet")
    parquet.write_table(table.slice(0, 0), directory / "validation.parquet")
    (directory / "prompts" / "manifest.json").write_text(json.dumps({"digest": "prompts-digest"}))
    steps = [{"step": float(step), "env/reward_mean": 0.1 * step, "objective/kl": 0.2} for step in range(4)]
    (directory / "history").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (directory / "mlflow").mkdir()
    return directory


@pytest.fixture(autouse=True)
def events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "events.jsonl"
    monkeypatch.setenv("RLHF_PPO_EVENTS", str(path))
    monkeypatch.setenv("RLHF_PPO_SPOOL", str(tmp_path / "spool"))
    for name in ("MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    yield path


def evaluate(inputs: Path, out: Path, policy: str = "policy", prompts: str = "prompts", **parameters: Any) -> Any:
    settings = decode(
        {
            "model_name": "org/base",
            "query_dataset": "prompts.jsonl",
            "reward_model": f"{__name__}:word_count",
            "rollout_max_new_tokens": 8,
            "rollout_batch_size": 5,
            "eval_max_prompts": PROMPTS,
            "eval_samples_per_prompt": EACH,
            "gate_min_prompts": 2,
            "mlflow_tracking_uri": f"sqlite:///{inputs}/mlflow/mlflow.db",
            **parameters,
        }
    )
    return evaluate_policy(
        settings.to_json(),
        inputs / prompts,
        inputs / "reference",
        inputs / policy,
        inputs / "history",
        out / "evaluation",
        out / "report",
        "run-1",
        "/steps/policy",
    )


def strictly(path: Path) -> Any:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def told(events: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in events.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_the_outputs_agree_with_each_other(inputs: Path, tmp_path: Path, events: Path) -> None:
    figures = evaluate(inputs, tmp_path)
    found = strictly(tmp_path / "evaluation" / "evaluation.json")
    rows = parquet.read_table(tmp_path / "evaluation" / "samples.parquet").to_pylist()
    assert (found["prompts"], found["samples_per_prompt"], len(rows)) == (PROMPTS, EACH, PROMPTS * EACH)
    assert [row["sample"] for row in rows] == [0, 1] * PROMPTS
    assert all(rows[row]["prompt"] == rows[row + 1]["prompt"] for row in range(0, len(rows), EACH))
    for name in ("reference", "policy"):
        scores = [row[f"{name}_score"] for row in rows]
        assert scores == word_count([], [row[name] for row in rows])
        assert found["metrics"]["score"][name]["mean"] == pytest.approx(sum(scores) / len(scores))
        ended = [row[f"{name}_ended"] for row in rows]
        assert found["metrics"]["ended"][name]["mean"] == pytest.approx(sum(ended) / len(ended))
        assert found["metrics"]["truncated"][name]["mean"] == pytest.approx(1 - sum(ended) / len(ended))
        assert all(row[f"{name}_length"] == 8 for row in rows if not row[f"{name}_ended"])
    assert figures["score_gain"] == pytest.approx(figures["score_after"] - figures["score_before"])
    assert figures["kl"] == pytest.approx(sum(row["kl"] for row in rows) / len(rows))
    assert all(isinstance(value, float) and math.isfinite(value) for value in figures.values())
    lineage = found["lineage"]
    assert (lineage["reference digest"], lineage["prompts digest"]) == ("ref-digest", "prompts-digest")
    assert lineage["best PPO step"] == 3
    assert (tmp_path / "report").read_text() == (tmp_path / "evaluation" / "report.html").read_text()
    (event,) = told(events, "evaluation")
    assert (event["gain"], event["reasons"]) == (figures["score_gain"], found["verdict"]["reasons"])
    progress = told(events, "progress")
    assert [line["done"] for line in progress] == [5, 10, 12, 17, 22, 24]
    assert {(line["step"], line["total"], line["unit"]) for line in progress} == {("evaluate_policy", 24, "responses")}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_kl_is_that_of_the_policys_own_samples(inputs: Path, tmp_path: Path, temperature: float) -> None:
    figures = evaluate(inputs, tmp_path, rollout_temperature=temperature, rollout_batch_size=64)
    policy, reference = llama(seed=7), llama(seed=0)
    asked = [query for query in queries(3, 5, 2, 4, 3, 6, 5, 4)[:PROMPTS] for _ in range(EACH)]
    sampling = Sampling.for_model(policy, 8, temperature)
    responses = sample(
        policy, asked, sampling, draw(len(asked), sampling.max_new_tokens, torch.Generator().manual_seed(1234))
    ).responses
    total = 0.0
    for query, response in zip(asked, responses, strict=True):
        ids = torch.cat([query, response])[None]
        places = torch.arange(len(query) - 1, ids.shape[1] - 1)
        with torch.no_grad():
            of_policy, of_reference = (
                (model(input_ids=ids).logits[0, places] / temperature).log_softmax(-1).gather(1, response[:, None])
                for model in (policy, reference)
            )
        total += float((of_policy - of_reference).sum())
    assert figures["kl"] == pytest.approx(total / len(asked), abs=1e-4)


def test_a_policy_equal_to_the_reference_has_no_gain_no_kl_and_is_held(inputs: Path, tmp_path: Path) -> None:
    figures = evaluate(inputs, tmp_path, policy="reference")
    found = strictly(tmp_path / "evaluation" / "evaluation.json")
    assert found["metrics"]["score"]["gain"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert abs(figures["kl"]) < 1e-4 and abs(figures["kl3"]) < 1e-4 and figures["passed"] == 0.0


def test_the_seed_alone_decides_the_samples(inputs: Path, tmp_path: Path) -> None:
    first = evaluate(inputs, tmp_path / "first")
    assert evaluate(inputs, tmp_path / "again") == first
    assert evaluate(inputs, tmp_path / "other", eval_seed=5) != first


def test_a_policy_of_nan_is_held_with_outputs_that_any_json_reader_takes(inputs: Path, tmp_path: Path) -> None:
    figures = evaluate(inputs, tmp_path, policy="nan")
    found = strictly(tmp_path / "evaluation" / "evaluation.json")
    assert found["kl"]["mean"] is None and not found["verdict"]["passed"] and figures["passed"] == 0.0
    assert any("kl.mean" in reason for reason in found["verdict"]["reasons"])
    assert "kl.mean" in (tmp_path / "report").read_text()


@pytest.mark.parametrize("existing", [False, True])
def test_a_reward_that_fails_leaves_no_outputs_and_a_failed_run(inputs: Path, tmp_path: Path, existing: bool) -> None:
    if existing:  # KFP makes the directory of an output beforehand
        (tmp_path / "evaluation").mkdir()
    with pytest.raises(InputError, match="reward_model returned nan"):
        evaluate(inputs, tmp_path, reward_model=f"{__name__}:broken", tracker_project_name=f"failing-{existing}")
    assert not any(tmp_path.glob("evaluation/*")) and not (tmp_path / "report").exists()
    assert not list(tmp_path.glob("*.unfinished"))
    assert step_run(inputs, f"failing-{existing}").info.status == "FAILED"


def test_no_held_out_prompts_are_an_input_error_that_names_the_parameter(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="data_eval_fraction"):
        evaluate(inputs, tmp_path, prompts=".")


def step_run(inputs: Path, experiment: str) -> Any:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{inputs}/mlflow/mlflow.db")
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    (run,) = client.search_runs([found.experiment_id], "tags.rlhf_ppo.step = 'evaluate_policy'")
    return run


def test_the_tracker_gets_figures_samples_and_the_report(inputs: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    figures = evaluate(inputs, tmp_path, tracker_project_name="tracked")
    run = step_run(inputs, "tracked")
    assert run.info.status == "FINISHED"
    assert {f"eval/{name}": value for name, value in figures.items()}.items() <= run.data.metrics.items()
    assert run.data.tags["rlhf_ppo.gate"] in ("passed", "held")
    artifacts = MlflowClient(f"sqlite:///{inputs}/mlflow/mlflow.db").list_artifacts(run.info.run_id)
    wanted = {"report.html", "evaluation.json", "samples.json", "samples.parquet"}
    assert wanted <= {artifact.path for artifact in artifacts}


def test_a_perplexity_is_the_exponential_of_the_surprise_and_no_error_where_that_is_huge() -> None:
    assert perplexity(math.log(50)) == pytest.approx(50)
    assert perplexity(1e30) == math.inf and math.isnan(perplexity(math.nan))


# A judge


def length(prompts: list[str], responses: list[str], response_ids: list[list[int]]) -> list[float]:
    """A reward that did not train the policy, and reads tokens."""
    return [float(len(ids)) for ids in response_ids]


def test_a_judge_scores_the_same_responses_and_its_gain_can_be_asked_for(inputs: Path, tmp_path: Path) -> None:
    evaluate(inputs, tmp_path, eval_judge=f"{__name__}:length", gate_min_judge_gain=100.0)
    found = strictly(tmp_path / "evaluation" / "evaluation.json")
    judge, lengths = found["judge"], found["metrics"]["response_length"]
    assert judge["name"] == f"{__name__}:length" and found["lineage"]["judge"] == judge["name"]
    assert all(judge[name] == lengths[name] for name in ("gain", "reference", "policy"))
    rows = parquet.read_table(tmp_path / "evaluation" / "samples.parquet").to_pylist()
    assert [row["policy_judge_score"] for row in rows] == [float(row["policy_length"]) for row in rows]
    (reason,) = [text for text in found["verdict"]["reasons"] if "gate_min_judge_gain=100" in text]
    assert reason.startswith("held: score gain")
    assert "Score of the judge" in (tmp_path / "report").read_text()


def test_without_a_judge_nothing_is_said_of_one(inputs: Path, tmp_path: Path) -> None:
    evaluate(inputs, tmp_path)
    assert "the judge" not in (tmp_path / "report").read_text()
