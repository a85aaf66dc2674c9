"""The work of evaluate_policy: policy and reference answer the same held-out prompts, and are compared."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_ppo.artifacts import complete_directory, digest_of, write_json, write_whole
from rlhf_ppo.devices import Device, find_device, has_habana
from rlhf_ppo.errors import InputError
from rlhf_ppo.events import emit
from rlhf_ppo.parameters import RunSettings, encode
from rlhf_ppo.policy_evaluation.champion import fetch_champion
from rlhf_ppo.policy_evaluation.gate import decide
from rlhf_ppo.policy_evaluation.report import render
from rlhf_ppo.policy_evaluation.responses import Measured, Models, measure
from rlhf_ppo.policy_evaluation.statistics import Samples, against, compare, divergence, paired, perplexity, win_rate
from rlhf_ppo.ppo import Prompt
from rlhf_ppo.ppo.rewards import load_reward, score, totals
from rlhf_ppo.ppo_training.policy_files import TRAINING
from rlhf_ppo.ppo_training.train import read_prompts
from rlhf_ppo.preflight import check_cards
from rlhf_ppo.registry import CHALLENGER
from rlhf_ppo.settings import split_revision
from rlhf_ppo.tracking import Tracker

TRACKED_SAMPLES = 50


def evaluate_policy(
    config: str,
    prompts: Path,
    reference: Path,
    policy: Path,
    history: Path,
    evaluation: Path,
    report: Path,
    run_id: str,
    policy_uri: str,
) -> dict[str, float]:
    """Write the directory ``evaluation`` and the page ``report``; returns the figures that matter most.

    ``policy_uri`` is where the policy lies for MLflow's registry, which hears of one that passes the gate.

    Raises InputError where there are no held-out prompts or the reward gives something else than numbers.
    """
    settings = RunSettings.from_json(config)
    with Tracker.for_run("evaluate_policy", run_id, settings) as tracker:
        reward = load_reward(str(settings.ppo.reward_model), settings.reward, _device(settings).name)
        repeated = _held_out(prompts, settings)
        with tempfile.TemporaryDirectory(prefix="rlhf-ppo-") as place:
            champion = fetch_champion(settings, Path(place))
            models = Models(reference, policy, Path(place) if champion else None)
            measured = measure(settings, repeated, reward, models, _device(settings))
        samples, k1 = measured.samples, measured.kl["reference"][0]
        found = _found(measured, settings, champion)
        judged: dict[str, Samples] = {}
        if settings.evaluation.eval_judge:
            judged = _judged(settings, repeated, samples)
            found["judge"] = _verdict_of_judge(settings, judged)
        verdict = decide(found, settings.gate)
        found["verdict"] = {"passed": verdict.passed, "reasons": list(verdict.reasons)}
        found["lineage"] = _lineage(settings, run_id, prompts, reference, policy)
        rows = _rows(repeated, samples, judged, k1, settings.evaluation.eval_samples_per_prompt)
        _write(found, rows, render(found, rows, _read_history(history), settings), evaluation, report)
        _track(tracker, settings, found, rows, evaluation)
        if verdict.passed and settings.registered_model:
            tracker.log_model(settings.registered_model, policy_uri, {}, CHALLENGER)
    _announce(found)
    return _headline(found)


def _device(settings: RunSettings) -> Device:
    """Of this step's pod, which need not be that of the training."""
    device = find_device(settings.ppo.use_habana and has_habana())
    check_cards(settings, device, "evaluate_policy")
    return device


def _held_out(prompts: Path, settings: RunSettings) -> list[Prompt]:
    """The held-out prompts, each as often as samples are wanted."""
    held_out = read_prompts(prompts / "validation.parquet")[: settings.evaluation.eval_max_prompts]
    if not held_out:
        raise InputError(
            f"data_eval_fraction={settings.data.data_eval_fraction} held out no prompt of "
            f"{settings.ppo.query_dataset}: raise it, or give more prompts"
        )
    return [prompt for prompt in held_out for _ in range(settings.evaluation.eval_samples_per_prompt)]


def _found(measured: Measured, settings: RunSettings, champion: str | None) -> dict[str, Any]:
    """Every figure against the reference, and against the published model, of the commit ``champion``."""
    samples, kl, each = measured.samples, measured.kl, settings.evaluation.eval_samples_per_prompt
    found = compare(samples["policy"], samples["reference"], *kl["reference"], each)
    if champion:
        found["champion"] = {
            "repo_id": settings.repo_id,
            "revision": champion,
            **against(samples["policy"], samples["champion"], each, "champion"),
            **(divergence(*kl["champion"], each) if "champion" in kl else {}),
        }
    return found


def _judged(settings: RunSettings, prompts: Sequence[Prompt], samples: dict[str, Samples]) -> dict[str, Samples]:
    """Policy's and reference's responses with the second reward's scores."""
    alone = dataclasses.replace(settings.reward, reward_sum={}, reward_revision="")
    model, revision = split_revision(settings.evaluation.eval_judge)
    judge = load_reward(model, dataclasses.replace(alone, reward_revision=revision), _device(settings).name)
    texts, found = [prompt.text for prompt in prompts], {}
    for name in ("policy", "reference"):
        scores = totals(score(judge, texts, samples[name].responses, samples[name].ids))
        found[name] = dataclasses.replace(samples[name], scores=scores)
    return found


def _verdict_of_judge(settings: RunSettings, judged: dict[str, Samples]) -> dict[str, Any]:
    policy, reference = judged["policy"].scores, judged["reference"].scores
    each = settings.evaluation.eval_samples_per_prompt
    won = win_rate(policy, reference, each)
    return {"name": settings.evaluation.eval_judge, **paired(policy, reference, each, "reference"), "win_rate": won}


def _rows(
    prompts: Sequence[Prompt], samples: dict[str, Samples], judged: dict[str, Samples], k1: list[float], each: int
) -> list[dict[str, Any]]:
    """One row for each response of the policy, with those of the others to the same prompt and seed."""
    return [
        {
            "prompt": prompt.text,
            "sample": row % each,
            **{name: of.responses[row] for name, of in samples.items()},
            **{f"{name}_score": of.scores[row] for name, of in samples.items()},
            "kl": k1[row],
            **{f"{name}_length": of.lengths[row] for name, of in samples.items()},
            **{f"{name}_ended": of.ended[row] for name, of in samples.items()},
            **{f"{name}_judge_score": of.scores[row] for name, of in judged.items()},
        }
        for row, prompt in enumerate(prompts)
    ]


def _lineage(settings: RunSettings, run_id: str, prompts: Path, reference: Path, policy: Path) -> dict[str, Any]:
    def read(path: Path, name: str) -> Any:
        return json.loads(path.read_text(encoding="utf-8")).get(name) if path.exists() else None

    return {
        "model": settings.ppo.model_name,
        "model revision": read(reference / "digest.json", "revision"),
        "reference digest": read(reference / "digest.json", "digest"),
        "dataset": settings.ppo.query_dataset,
        "prompts digest": read(prompts / "manifest.json", "digest"),
        "tokenizer digest": read(prompts / "manifest.json", "tokenizer_digest"),
        "reward": settings.ppo.reward_model,
        "reward revision": settings.reward.reward_revision or None,
        "judge": settings.evaluation.eval_judge or None,
        "best PPO step": read(policy / TRAINING, "best_step"),
        "settings digest": digest_of(encode(settings)),
        "code": read(policy / TRAINING, "code"),
        "image": read(policy / TRAINING, "image"),
        "pipeline run": run_id,
    }


def _read_history(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _strict(value: Any) -> Any:
    """``value`` as JSON knows it: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {key: _strict(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(found: dict[str, Any], rows: list[dict[str, Any]], page: str, evaluation: Path, report: Path) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    with complete_directory(evaluation) as unfinished:
        write_json(unfinished / "evaluation.json", _strict(found))
        parquet.write_table(pyarrow.Table.from_pylist(rows), unfinished / "samples.parquet")
        write_whole(unfinished / "report.html", page)
    write_whole(report, page)


def _track(
    tracker: Tracker, settings: RunSettings, found: dict[str, Any], rows: list[dict[str, Any]], evaluation: Path
) -> None:
    tracker.log_metrics({f"eval/{name}": value for name, value in _headline(found).items()})
    tracker.log_summary(_headline(found))
    tracker.log_tags({"rlhf_ppo.gate": "passed" if found["verdict"]["passed"] else "held"})
    tracker.log_table("samples", rows[:TRACKED_SAMPLES])
    digest = found["lineage"]["prompts digest"] or ""
    tracker.log_dataset("held-out prompts", digest, str(settings.ppo.query_dataset), "evaluation")
    tracker.log_artifact(evaluation / "report.html")
    tracker.log_artifact(evaluation / "evaluation.json")
    tracker.log_artifact(evaluation / "samples.parquet")


def _headline(found: dict[str, Any]) -> dict[str, float]:
    score_of = found["metrics"]["score"]
    return {
        "score_before": score_of["reference"]["mean"],
        "score_after": score_of["policy"]["mean"],
        "score_gain": score_of["gain"]["mean"],
        "score_gain_low": score_of["gain"]["low"],
        "score_gain_high": score_of["gain"]["high"],
        "win_rate": found["win_rate"]["mean"],
        "win_rate_low": found["win_rate"]["low"],
        "kl": found["kl"]["mean"],
        "kl3": found["kl3"]["mean"],
        "distinct2_ratio": found["distinct2_ratio"],
        "perplexity_under_reference": perplexity(found["metrics"]["nll"]["policy"]["mean"]),
        "repetition": found["metrics"]["repetition"]["policy"]["mean"],
        "ended": found["metrics"]["ended"]["policy"]["mean"],
        "truncated": found["metrics"]["truncated"]["policy"]["mean"],
        "response_length": found["metrics"]["response_length"]["policy"]["mean"],
        "passed": float(found["verdict"]["passed"]),
    }


def _announce(found: dict[str, Any]) -> None:
    gain = found["metrics"]["score"]["gain"]
    emit(
        "evaluation",
        score_before=found["metrics"]["score"]["reference"]["mean"],
        score_after=found["metrics"]["score"]["policy"]["mean"],
        gain=gain["mean"],
        low=gain["low"],
        high=gain["high"],
        kl=found["kl"]["mean"],
        distinct2_ratio=found["distinct2_ratio"],
        prompts=found["prompts"],
        passed=found["verdict"]["passed"],
        reasons=found["verdict"]["reasons"],
    )
