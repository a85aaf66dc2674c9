"""The work of evaluate_policy: policy and reference answer the same held-out prompts, and are compared."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf_ppo.artifacts import complete_directory, digest_of, write_json, write_whole
from rlhf_ppo.devices import Device, find_device, has_habana
from rlhf_ppo.errors import InputError
from rlhf_ppo.events import emit
from rlhf_ppo.parameters import RunSettings, encode
from rlhf_ppo.policy_evaluation.champion import fetch_champion, load_champion
from rlhf_ppo.policy_evaluation.gate import decide
from rlhf_ppo.policy_evaluation.report import render
from rlhf_ppo.policy_evaluation.statistics import (
    Samples,
    against,
    compare,
    interval,
    kl_estimates,
    per_prompt,
    perplexity,
)
from rlhf_ppo.ppo import Prompt, Sampling
from rlhf_ppo.ppo.generation import Generated, draw, sample
from rlhf_ppo.ppo.models import load_model
from rlhf_ppo.ppo.rewards import Reward, load_reward, score, totals
from rlhf_ppo.ppo.rollout import response_logprobs
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
            samples, k1, k3 = _measure(settings, repeated, reward, models)
        found = compare(samples["policy"], samples["reference"], k1, k3, settings.evaluation.eval_samples_per_prompt)
        if champion:
            compared = against(samples["policy"], samples["champion"], settings.evaluation.eval_samples_per_prompt)
            found["champion"] = {"repo_id": settings.repo_id, "revision": champion, **compared}
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


@dataclass(frozen=True)
class Models:
    """Where the models that are compared lie; there may be no champion."""

    reference: Path
    policy: Path
    champion: Path | None


def _measure(
    settings: RunSettings, prompts: Sequence[Prompt], reward: Reward, models: Models
) -> tuple[dict[str, Samples], list[float], list[float]]:
    """Scored samples of all models, one in memory at a time, and the two KL estimates of the policy's."""
    from transformers import AutoTokenizer

    tokenizer, device = AutoTokenizer.from_pretrained(models.reference), _device(settings).device
    rounds = 3 if models.champion else 2
    # 1. The policy responds
    model = load_model(models.policy, settings.model.model_dtype).to(device)
    of_policy = _respond(model, prompts, settings, _progress(0, rounds, len(prompts)))
    policy_ends = _ends(model)
    del model
    gc.collect()
    # 2. The reference responds, and says how likely the policy's responses are
    model = load_model(models.reference, settings.model.model_dtype).to(device)
    of_reference = _respond(model, prompts, settings, _progress(1, rounds, len(prompts)))
    ref_logprobs = _logprobs(model, prompts, of_policy, settings)
    k1, k3 = kl_estimates(of_policy.logprobs, ref_logprobs)
    reference_ends = _ends(model)
    del model
    gc.collect()
    # 3. The reward scores all
    samples = {
        "policy": _samples(of_policy, ref_logprobs, prompts, tokenizer, reward, policy_ends),
        "reference": _samples(of_reference, of_reference.logprobs, prompts, tokenizer, reward, reference_ends),
    }
    # 4. The published model responds, if there is one
    if models.champion is not None:
        model = load_champion(models.champion, settings, models.reference).to(device)
        theirs = AutoTokenizer.from_pretrained(models.champion)
        asked = prompts if theirs.get_vocab() == tokenizer.get_vocab() else _read_by(theirs, prompts)
        found = _respond(model, asked, settings, _progress(2, rounds, len(prompts)))
        samples["champion"] = _samples(found, [], prompts, theirs, reward, _ends(model))
    return samples, k1, k3


def _read_by(tokenizer: Any, prompts: Sequence[Prompt]) -> list[Prompt]:
    """``prompts`` in the tokens of another model; their texts hold the special tokens that they begin with."""
    texts = [prompt.text for prompt in prompts]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [Prompt(text, torch.tensor(row, dtype=torch.long)) for text, row in zip(texts, ids, strict=True)]


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
    each = settings.evaluation.eval_samples_per_prompt
    compared = against(judged["policy"], judged["reference"], each)
    return {
        "name": settings.evaluation.eval_judge,
        "gain": compared["gain"],
        "win_rate": compared["win_rate"],
        "reference": compared["score"],
        "policy": interval(per_prompt(judged["policy"].scores, each)),
    }


def _ends(model: Any) -> set[int]:
    return set(Sampling.for_model(model, 1).eos_token_ids)


def _progress(number: int, rounds: int, each: int) -> Callable[[int], None]:
    def report(done: int) -> None:
        emit("progress", step="evaluate_policy", done=number * each + done, total=rounds * each, unit="responses")

    return report


def _respond(
    model: Any, prompts: Sequence[Prompt], settings: RunSettings, progress: Callable[[int], None]
) -> Generated:
    sampling = Sampling.for_model(model, settings.rollout.rollout_max_new_tokens, settings.rollout.rollout_temperature)
    generator = torch.Generator().manual_seed(settings.evaluation.eval_seed)
    uniform = draw(len(prompts), sampling.max_new_tokens, generator)
    queries = [prompt.input_ids.to(model.device) for prompt in prompts]
    return sample(model, queries, sampling, uniform, settings.rollout.rollout_batch_size, progress)


def _logprobs(model: Any, prompts: Sequence[Prompt], generated: Generated, settings: RunSettings) -> list[torch.Tensor]:
    queries = [prompt.input_ids.to(model.device) for prompt in prompts]
    temperature = settings.rollout.rollout_temperature
    return response_logprobs(model, queries, generated.responses, temperature=temperature)


def _samples(
    generated: Generated,
    ref_logprobs: Sequence[torch.Tensor],
    prompts: Sequence[Prompt],
    tokenizer: Any,
    reward: Reward,
    ends: set[int],
) -> Samples:
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in generated.responses]
    return Samples(
        texts,
        totals(
            score(reward, [prompt.text for prompt in prompts], texts, [ids.tolist() for ids in generated.responses])
        ),
        [len(ids) for ids in generated.responses],
        [len(ids) > 0 and int(ids[-1]) in ends for ids in generated.responses],
        [float(-row.double().mean()) if len(row) else 0.0 for row in ref_logprobs],
        [ids.tolist() for ids in generated.responses],
    )


def _rows(
    prompts: Sequence[Prompt], samples: dict[str, Samples], judged: dict[str, Samples], k1: list[float], each: int
) -> list[dict[str, Any]]:
    """One row for each response of the policy, with those of the others to the same prompt and seed."""
    return [
        {
            "prompt": prompt.text,
            "sample": row % each,
            "reference": samples["reference"].responses[row],
            "policy": samples["policy"].responses[row],
            "reference_score": samples["reference"].scores[row],
            "policy_score": samples["policy"].scores[row],
            "kl": k1[row],
            "policy_length": samples["policy"].lengths[row],
            "policy_ended": samples["policy"].ended[row],
            **{f"{name}_judge_score": of.scores[row] for name, of in sorted(judged.items())},
            **_of_champion(samples.get("champion"), row),
        }
        for row, prompt in enumerate(prompts)
    ]


def _of_champion(champion: Samples | None, row: int) -> dict[str, Any]:
    if champion is None:
        return {}
    return {"champion": champion.responses[row], "champion_score": champion.scores[row]}


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
