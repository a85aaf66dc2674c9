"""The work of evaluate_policy: policy and reference answer the same held-out prompts, and are compared."""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf_ppo.artifacts import complete_directory, write_json, write_whole
from rlhf_ppo.events import emit
from rlhf_ppo.parameters import RunSettings
from rlhf_ppo.policy_evaluation.gate import decide
from rlhf_ppo.policy_evaluation.report import render
from rlhf_ppo.policy_evaluation.statistics import Samples, compare, kl_estimates
from rlhf_ppo.ppo import Prompt, Sampling
from rlhf_ppo.ppo.generation import Generated, sample
from rlhf_ppo.ppo.models import load_model
from rlhf_ppo.ppo.rewards import Reward, load_reward, score
from rlhf_ppo.ppo.rollout import response_logprobs
from rlhf_ppo.ppo_training.train import read_prompts
from rlhf_ppo.tracking import Tracker

TRACKED_SAMPLES = 100


def evaluate_policy(
    config: str,
    prompts: Path,
    reference: Path,
    policy: Path,
    history: Path,
    evaluation: Path,
    report: Path,
    run_id: str,
) -> dict[str, float]:
    """Write the directory ``evaluation`` and the page ``report``; returns the figures that matter most."""
    from transformers import AutoTokenizer

    settings = RunSettings.from_json(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # 1. The same prompts for both, each as often as samples are wanted
    held_out = read_prompts(prompts / "validation.parquet")[: settings.evaluation.eval_max_prompts]
    repeated = [prompt for prompt in held_out for _ in range(settings.evaluation.eval_samples_per_prompt)]
    tokenizer = AutoTokenizer.from_pretrained(reference)
    reward = load_reward(str(settings.ppo.reward_model), settings.reward, device)
    # 2. One model in memory at a time
    generated = {}
    for number, (name, directory) in enumerate((("policy", policy), ("reference", reference))):
        model = load_model(directory, settings.model.model_dtype).to(device)
        generated[name] = _respond(model, repeated, settings, _progress(number, len(repeated)))
        if name == "reference":
            ref_logprobs = _logprobs(model, repeated, generated["policy"], settings)
        del model
        gc.collect()
    # 3. Scores and statistics
    ends = set(Sampling.for_model(_Ends(reference), 1).eos_token_ids)
    samples = {name: _samples(found, repeated, tokenizer, reward, ends) for name, found in generated.items()}
    k1, k3 = kl_estimates(generated["policy"].logprobs, ref_logprobs)
    found = compare(samples["policy"], samples["reference"], k1, k3, settings.evaluation.eval_samples_per_prompt)
    verdict = decide(found, settings.gate)
    found["verdict"] = {"passed": verdict.passed, "reasons": list(verdict.reasons)}
    found["lineage"] = _lineage(settings, prompts, reference, policy)
    rows = _rows(repeated, samples, k1)
    # 4. Outputs
    page = render(found, rows, _read_history(history), settings)
    _write(found, rows, page, evaluation, report)
    _track(settings, run_id, found, rows, evaluation)
    _announce(found)
    return _headline(found)


class _Ends:
    """What of a model says where its texts end, without its weights."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoConfig, GenerationConfig

        self.generation_config = GenerationConfig.from_pretrained(directory)
        self.config = AutoConfig.from_pretrained(directory)


def _progress(number: int, total: int) -> Callable[[int], None]:
    def report(done: int) -> None:
        emit("progress", step="evaluate_policy", done=number * total + done, total=2 * total, unit="responses")

    return report


def _respond(
    model: Any, prompts: Sequence[Prompt], settings: RunSettings, progress: Callable[[int], None]
) -> Generated:
    sampling = Sampling.for_model(model, settings.rollout.rollout_max_new_tokens, settings.rollout.rollout_temperature)
    generator = torch.Generator(model.device).manual_seed(settings.evaluation.eval_seed)
    queries = [prompt.input_ids.to(model.device) for prompt in prompts]
    return sample(model, queries, sampling, generator, settings.rollout.rollout_batch_size, progress)


def _logprobs(model: Any, prompts: Sequence[Prompt], generated: Generated, settings: RunSettings) -> list[torch.Tensor]:
    queries = [prompt.input_ids.to(model.device) for prompt in prompts]
    temperature = settings.rollout.rollout_temperature
    return response_logprobs(model, queries, generated.responses, temperature=temperature)


def _samples(
    generated: Generated, prompts: Sequence[Prompt], tokenizer: Any, reward: Reward, ends: set[int]
) -> Samples:
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in generated.responses]
    return Samples(
        texts,
        score(reward, [prompt.text for prompt in prompts], texts),
        [len(ids) for ids in generated.responses],
        [len(ids) > 0 and int(ids[-1]) in ends for ids in generated.responses],
    )


def _rows(prompts: Sequence[Prompt], samples: dict[str, Samples], k1: list[float]) -> list[dict[str, Any]]:
    return [
        {
            "prompt": prompt.text,
            "reference": samples["reference"].responses[row],
            "policy": samples["policy"].responses[row],
            "reference_score": samples["reference"].scores[row],
            "policy_score": samples["policy"].scores[row],
            "kl": k1[row],
        }
        for row, prompt in enumerate(prompts)
    ]


def _lineage(settings: RunSettings, prompts: Path, reference: Path, policy: Path) -> dict[str, Any]:
    def read(path: Path, name: str) -> Any:
        return json.loads(path.read_text(encoding="utf-8")).get(name) if path.exists() else None

    return {
        "model": settings.ppo.model_name,
        "model revision": read(reference / "digest.json", "revision"),
        "reference digest": read(reference / "digest.json", "digest"),
        "dataset": settings.ppo.query_dataset,
        "prompts digest": read(prompts / "manifest.json", "digest"),
        "reward": settings.ppo.reward_model,
        "reward revision": settings.reward.reward_revision or None,
        "best PPO step": read(policy / "training.json", "best_step"),
    }


def _read_history(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _write(found: dict[str, Any], rows: list[dict[str, Any]], page: str, evaluation: Path, report: Path) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    with complete_directory(evaluation) as unfinished:
        write_json(unfinished / "evaluation.json", found)
        parquet.write_table(pyarrow.Table.from_pylist(rows), unfinished / "samples.parquet")
        write_whole(unfinished / "report.html", page)
    write_whole(report, page)


def _track(
    settings: RunSettings, run_id: str, found: dict[str, Any], rows: list[dict[str, Any]], evaluation: Path
) -> None:
    with Tracker.for_step(
        "evaluate_policy",
        run_id,
        settings,
        tracking_uri=settings.tracking.mlflow_tracking_uri,
        experiment=settings.ppo.tracker_project_name,
        spool=Path(os.environ.get("RLHF_PPO_SPOOL") or tempfile.mkdtemp(prefix="rlhf-ppo-spool-")),
    ) as tracker:
        tracker.log_metrics({f"eval/{name}": value for name, value in _headline(found).items()})
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
        "kl": found["kl"]["mean"],
        "distinct2_ratio": found["distinct2_ratio"],
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
