"""The work of train_ppo: from prompts and a reference to a trained policy and the history of its training."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf_ppo.artifacts import complete_directory, loadable_by_transformers_4
from rlhf_ppo.errors import InputError
from rlhf_ppo.events import emit
from rlhf_ppo.parameters import RunSettings
from rlhf_ppo.ppo import PolicyWithValueHead, PPOTrainer, Prompt, Sampling, StepReport, train
from rlhf_ppo.ppo.models import load_model
from rlhf_ppo.ppo.rewards import Reward, load_reward, score
from rlhf_ppo.settings import ModelSettings
from rlhf_ppo.tracking import Tracker


def train_ppo(
    config: str, prompts: Path, reference: Path, policy: Path, history: Path, run_id: str
) -> dict[str, float]:
    """Train, write the directory ``policy`` and the file ``history``, and return the final metrics.

    Raises InputError before anything is trained where the reward, the prompts or the model don't fit the settings.
    """
    from transformers import AutoTokenizer

    settings = RunSettings.from_json(config)
    # 1. The cheap things first: what is wrong with them ends the step in seconds.
    rows = read_prompts(prompts / "train.parquet")
    reward = load_reward(str(settings.ppo.reward_model), settings.reward, _device())
    _try_reward(reward, rows)
    # 2. Models
    tokenizer = AutoTokenizer.from_pretrained(reference)
    trainer = build_trainer(settings, reference, tokenizer)
    # 3. Training
    with Tracker.for_run("train_ppo", run_id, settings) as tracker:
        tracker.log_params(trainer.config.to_dict())
        manifest = read_json(prompts / "manifest.json")
        tracker.log_dataset("prompts", manifest.get("digest", ""), str(settings.ppo.query_dataset), "training")
        tracker.log_tags({f"prompts.{name}": count for name, count in manifest.get("counts", {}).items()})
        tracker.log_tags({"reference.digest": read_json(reference / "digest.json").get("digest")})
        with complete_directory(policy) as unfinished:
            recorder = Recorder(settings, trainer, tracker, unfinished)
            train(
                trainer,
                rows,
                reward,
                on_step=recorder.record,
                before_update=recorder.keep_if_best,
                rollout_batch_size=settings.rollout.rollout_batch_size,
            )
            trainer.accelerator.end_training()
            metrics = recorder.save(reference, prompts)
        _write_whole(history, "".join(json.dumps(line) + "\n" for line in recorder.lines))
    return metrics


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of one split of prepared data."""
    import pyarrow.parquet as parquet

    table = parquet.read_table(path, columns=["prompt", "input_ids"])
    return [
        Prompt(text, torch.tensor(ids, dtype=torch.long))
        for text, ids in zip(table["prompt"].to_pylist(), table["input_ids"].to_pylist(), strict=True)
    ]


def build_trainer(settings: RunSettings, reference: Path, tokenizer: Any) -> PPOTrainer:
    """The trainer of a policy that starts as ``reference``; with LoRA the reference is the policy without adapters."""
    torch.manual_seed(settings.ppo.seed)
    trunk = load_model(reference, settings.model.model_dtype)
    _check_lengths(settings, trunk)
    sampling = Sampling.for_model(
        trunk, settings.rollout.rollout_max_new_tokens, temperature=settings.rollout.rollout_temperature
    )
    frozen = None
    if settings.model.model_lora_r:
        trunk = with_adapters(trunk, settings.model)
    else:
        frozen = load_model(reference, settings.model.model_dtype)
    # The pipeline tracks in MLflow by itself; log_with adds the others.
    config = replace(settings.ppo, log_with=None) if settings.ppo.log_with == "mlflow" else settings.ppo
    return PPOTrainer(config, PolicyWithValueHead(trunk), frozen, tokenizer, sampling=sampling)


def with_adapters(trunk: nn.Module, settings: ModelSettings) -> nn.Module:
    """``trunk`` with LoRA adapters, which alone are trained."""
    from peft import LoraConfig, get_peft_model

    names: Any = settings.model_lora_target_modules
    if names != "all-linear":
        names = [name.strip() for name in names.split(",")]
    lora = LoraConfig(
        r=settings.model_lora_r,
        lora_alpha=settings.model_lora_alpha,
        lora_dropout=settings.model_lora_dropout,
        target_modules=names,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(trunk, lora)
    except ValueError as error:
        raise InputError(f"model_lora_target_modules={settings.model_lora_target_modules!r}: {error}") from error


def _check_lengths(settings: RunSettings, model: nn.Module) -> None:
    longest = getattr(model.config, "max_position_embeddings", None)
    needed = settings.rollout.rollout_max_new_tokens + 1
    if longest is not None and needed > longest:
        raise InputError(
            f"rollout_max_new_tokens={settings.rollout.rollout_max_new_tokens} leaves no room for a prompt: "
            f"{settings.ppo.model_name} reads {longest} tokens"
        )


def _try_reward(reward: Reward, prompts: list[Prompt]) -> None:
    """Score a few texts that are at hand, so that a broken reward shows before training."""
    texts = [prompt.text for prompt in prompts[:2]]
    score(reward, texts, [f" {text}" for text in reversed(texts)])


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _write_whole(path: Path, text: str) -> None:
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


class Recorder:
    """Tells of every step, keeps the best policy where that is asked for, and saves the policy at the end."""

    def __init__(self, settings: RunSettings, trainer: PPOTrainer, tracker: Tracker, directory: Path) -> None:
        self.settings, self.trainer, self.tracker, self.directory = settings, trainer, tracker, directory
        self.lines: list[dict[str, float]] = []
        self.best_score, self.best_step = -math.inf, -1
        self.started = time.monotonic()
        self.last_scores: deque[float] = deque(maxlen=5)

    def record(self, report: StepReport) -> None:
        """Write one PPO step to the history, the tracker and the progress."""
        numbers = {name: float(value) for name, value in report.stats.items() if isinstance(value, (int, float))}
        self.lines.append({"step": float(report.step), **numbers})
        self.last_scores.append(numbers["env/reward_mean"])
        self.tracker.log_metrics(numbers, step=report.step)
        emit(
            "progress",
            step="train_ppo",
            done=report.step + 1,
            total=self.trainer.config.total_ppo_epochs,
            unit="PPO steps",
            numbers={
                "reward": numbers["env/reward_mean"],
                "kl": numbers["objective/kl"],
                "tokens/s": numbers["tokens/per_second"],
            },
        )

    def keep_if_best(self, step: int, mean_score: float) -> None:
        """On every compare_steps-th step: save the policy if its samples scored higher than any before."""
        config = self.trainer.config
        if not config.push_to_hub_if_best_kwargs or step % config.compare_steps or mean_score <= self.best_score:
            return
        self.best_score, self.best_step = mean_score, step
        self._save_policy()

    def _save_policy(self) -> None:
        """Write the weights: plain files of the base model, with adapters merged in and also beside."""
        from safetensors.torch import save_file

        if not self.trainer.accelerator.is_main_process:
            return
        model = self.trainer.policy.pretrained_model
        for entry in self.directory.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        if self.trainer.policy.is_peft_model:
            model.save_pretrained(self.directory / "adapter", safe_serialization=True)  # type: ignore[operator]
            save_merged(model, self.directory)
        else:
            model.save_pretrained(self.directory, safe_serialization=True)  # type: ignore[operator]
        head = {f"v_head.{name}": value.cpu() for name, value in self.trainer.policy.v_head.state_dict().items()}
        save_file(head, str(self.directory / "value_head.safetensors"))

    def save(self, reference: Path, prompts: Path) -> dict[str, float]:
        """Finish the policy's directory; returns the final metrics."""
        if self.best_step < 0:
            self._save_policy()
        self.trainer.tokenizer.save_pretrained(self.directory)
        loadable_by_transformers_4(self.directory)
        last = self.lines[-1]
        metrics = {
            "mean_score": sum(self.last_scores) / len(self.last_scores),
            "kl": last["objective/kl"],
            "ppo_steps": float(len(self.lines)),
            "seconds": time.monotonic() - self.started,
        }
        lineage = {
            "base": self.settings.ppo.model_name,
            "reference_digest": read_json(reference / "digest.json").get("digest"),
            "prompts_digest": read_json(prompts / "manifest.json").get("digest"),
            "reward_model": self.settings.ppo.reward_model,
            "best_step": self.best_step if self.best_step >= 0 else None,
            "metrics": metrics,
            "settings": json.loads(self.settings.to_json()),
        }
        (self.directory / "training.json").write_text(json.dumps(lineage, indent=1), encoding="utf-8")
        return metrics


def save_merged(model: Any, directory: Path) -> None:
    """Save a PEFT model's base with the adapters' product added to its weights; the model itself is not touched."""
    from peft.tuners.lora import LoraLayer

    base = model.get_base_model()
    weights = {
        name.replace(".base_layer.", "."): value for name, value in base.state_dict().items() if ".lora_" not in name
    }
    layers: list[tuple[str, Any]] = [(n, layer) for n, layer in base.named_modules() if isinstance(layer, LoraLayer)]
    for name, layer in layers:
        if f"{name}.weight" in weights:
            for adapter in model.active_adapters:
                weights[f"{name}.weight"] = weights[f"{name}.weight"] + layer.get_delta_weight(adapter)
    base.save_pretrained(directory, state_dict=weights, safe_serialization=True)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, or an empty one where there is no file."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found
