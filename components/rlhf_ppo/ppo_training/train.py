"""The work of train_ppo: from prompts and a reference to a trained policy and the history of its training."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf_ppo.artifacts import complete_directory, write_whole
from rlhf_ppo.devices import find_device
from rlhf_ppo.errors import InputError
from rlhf_ppo.events import emit
from rlhf_ppo.launch import processes_on, run_processes
from rlhf_ppo.parameters import RunSettings, encode
from rlhf_ppo.ppo import PolicyWithValueHead, PPOTrainer, Prompt, Sampling, train
from rlhf_ppo.ppo.loop import Interrupted, check_prompts
from rlhf_ppo.ppo.models import decoder_start, load_critic, load_model, shared_reference
from rlhf_ppo.ppo.rewards import Reward, load_reward, score
from rlhf_ppo.ppo_training.keep import Keeper, Stopped
from rlhf_ppo.ppo_training.nodes import NodeTraining
from rlhf_ppo.ppo_training.policy_files import read_value_head
from rlhf_ppo.ppo_training.record import Recorder
from rlhf_ppo.preemption import Preemption
from rlhf_ppo.preflight import preflight
from rlhf_ppo.settings import ModelSettings
from rlhf_ppo.tracking import Tracker


def train_on_cards(
    config: str, prompts: Path, reference: Path, policy: Path, history: Path, run_id: str
) -> dict[str, float]:
    """``train_ppo`` in one process for each card, or in as many as node_processes says, here or in node_count pods.

    Raises what train_ppo raises, and ProcessFailed where one of several processes failed in another way, and with
    node_count ClusterError.
    """
    settings = RunSettings.from_json(config)
    if settings.node.node_count:
        elsewhere = NodeTraining(config, run_id, prompts, reference, digests_of(prompts, reference))
        return elsewhere.finish(elsewhere.run(), policy, history)
    device = find_device(settings.ppo.use_habana)
    processes = processes_on(device, settings.node.node_processes)
    if processes == 1:
        return train_ppo(config, prompts, reference, policy, history, run_id)
    paths = {"prompts": prompts, "reference": reference, "policy": policy, "history": history}
    arguments = {"config": config, "run_id": run_id, **{name: str(path) for name, path in paths.items()}}
    kinds = {kind.__name__: kind for kind in (InputError, Stopped)}
    found: dict[str, float] = run_processes("rlhf_ppo.ppo_training", arguments, processes, device, kinds)
    return found


def train_from_names(
    config: str, prompts: str, reference: str, policy: str, history: str, run_id: str
) -> dict[str, float]:
    """``train_ppo`` with paths as texts."""
    return train_ppo(config, Path(prompts), Path(reference), Path(policy), Path(history), run_id)


def train_ppo(
    config: str, prompts: Path, reference: Path, policy: Path, history: Path, run_id: str
) -> dict[str, float]:
    """Train, write the directory ``policy`` and the file ``history``, and return the final metrics.

    Under torchrun every process calls it; the first writes. Their ``policy`` must be on a file system that all see.

    Raises InputError before anything is trained where the reward, the prompts or the model don't fit the settings.
    """
    from transformers import AutoTokenizer

    settings = RunSettings.from_json(config)
    # 1. The cheap things first: what is wrong with them ends the step in seconds.
    device = find_device(settings.ppo.use_habana)
    preflight(settings, reference, device)
    rows = read_prompts(prompts / "train.parquet")
    check_prompts(len(rows), settings.ppo.batch_size, int(os.environ.get("WORLD_SIZE", "1")))
    reward = load_reward(
        str(settings.ppo.reward_model), settings.reward, str(device.device), static=settings.ppo.pad_for_acceleration
    )
    _try_reward(reward, rows)
    # 2. Models
    tokenizer = AutoTokenizer.from_pretrained(reference)
    trainer = build_trainer(settings, reference, tokenizer)
    digests = digests_of(prompts, reference)
    main = trainer.accelerator.is_main_process
    if settings.ppo.optimize_device_cache and main:
        emit("note", step="train_ppo", message=trainer.on.cache)
    # 3. Training, from where an earlier attempt was ended
    with Tracker.for_run("train_ppo", run_id, settings) if main else nullcontext() as tracker:
        if tracker is not None:
            _describe(tracker, settings, trainer, prompts, digests)
        recorder = Recorder(settings, trainer, tracker, run_id)
        keeper, trained = _train(settings, trainer, rows, reward, recorder, digests, policy.parent / "checkpoints")
        if main and trained is not None:
            with complete_directory(policy) as unfinished:
                keeper.save_result(trained, unfinished)
                recorder.conclude(unfinished, digests)
            write_whole(history, "".join(json.dumps(line) + "\n" for line in recorder.lines))
            keeper.remove()
    return recorder.metrics()


def _train(
    settings: RunSettings,
    trainer: PPOTrainer,
    prompts: list[Prompt],
    reward: Reward,
    recorder: Recorder,
    digests: dict[str, Any],
    beside: Path,
) -> tuple[Keeper, PolicyWithValueHead | None]:
    """Train to the end, or to SIGTERM or node_timeout_seconds: a checkpoint and Stopped. Returns what to save."""
    try:
        with Preemption(trainer.accelerator, settings.node.node_timeout_seconds) as preemption:
            keeper = Keeper(settings, trainer, recorder, preemption, digests, beside)
            keeper.resume()
            trainer.between_updates = preemption.check
            try:
                train(
                    trainer,
                    prompts,
                    reward,
                    on_step=recorder.record,
                    before_step=keeper.before_step,
                    before_update=keeper.before_update,
                    interruptible=preemption.interruptible,
                    rollout_batch_size=settings.rollout.rollout_batch_size,
                )
            except Interrupted:
                raise keeper.stopped() from None
            found = keeper, trainer.whole_policy()
    except Stopped:  # All processes stop together.
        trainer.close()
        raise
    except BaseException:
        trainer.close(failed=True)
        raise
    trainer.close()
    return found


def _describe(
    tracker: Tracker, settings: RunSettings, trainer: PPOTrainer, prompts: Path, digests: dict[str, Any]
) -> None:
    """Tell the tracker what is trained on what."""
    tracker.log_params({**encode(settings), **trainer.config.to_dict()})
    tracker.log_dataset("prompts", digests["prompts_digest"] or "", str(settings.ppo.query_dataset), "training")
    counts = read_json(prompts / "manifest.json").get("counts", {})
    tracker.log_tags({f"prompts.{name}": count for name, count in counts.items()})
    tracker.log_tags({"reference.digest": digests["reference_digest"]})


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of one split of prepared data."""
    import pyarrow.parquet as parquet

    table = parquet.read_table(path, columns=["prompt", "input_ids"])
    return [
        Prompt(text, torch.tensor(ids, dtype=torch.long))
        for text, ids in zip(table["prompt"].to_pylist(), table["input_ids"].to_pylist(), strict=True)
    ]


def digests_of(prompts: Path, reference: Path) -> dict[str, Any]:
    """What the inputs of training hold, as the steps that made them say."""
    return {
        "prompts_digest": read_json(prompts / "manifest.json").get("digest"),
        "reference_digest": read_json(reference / "digest.json").get("digest"),
    }


def build_trainer(settings: RunSettings, reference: Path, tokenizer: Any) -> PPOTrainer:
    """The trainer of a policy that starts as ``reference``; with LoRA the reference is the policy without adapters."""
    torch.manual_seed(settings.ppo.seed)
    named = f"model_name={settings.ppo.model_name!r}"
    trunk = load_model(reference, settings.model.model_dtype, named)
    _check_lengths(settings, trunk)
    sampling = Sampling.for_model(
        trunk, settings.rollout.rollout_max_new_tokens, temperature=settings.rollout.rollout_temperature
    )
    algorithm, frozen, critic = settings.algorithm, None, None
    if settings.model.model_lora_r:
        task = "CAUSAL_LM" if decoder_start(trunk) is None else "SEQ_2_SEQ_LM"
        trunk = with_adapters(trunk, settings.model, task)
    elif algorithm.ppo_shared_layers:
        frozen = shared_reference(trunk, algorithm.ppo_shared_layers)
    else:
        # Sooner than a copy, for its weights are the file's, which are in memory already.
        torch.manual_seed(settings.ppo.seed)
        frozen = load_model(reference, settings.model.model_dtype, named)
    if algorithm.ppo_separate_critic:
        critic = load_critic(reference, settings.model.model_dtype)
        if settings.model.model_lora_r:
            critic = with_adapters(critic, settings.model, "FEATURE_EXTRACTION")
    policy = PolicyWithValueHead(trunk, critic)
    if algorithm.ppo_value_head:
        policy.set_value_head(read_value_head(algorithm.ppo_value_head))
    # The pipeline tracks in MLflow by itself; log_with adds the others.
    config = replace(settings.ppo, log_with=None) if settings.ppo.log_with == "mlflow" else settings.ppo
    return PPOTrainer(
        config,
        policy,
        frozen,
        tokenizer,
        sampling=sampling,
        controller_kl=algorithm.ppo_controller_kl,
        missing_eos_penalty=algorithm.ppo_missing_eos_penalty,
        critic_learning_rate=algorithm.ppo_critic_learning_rate,
        sharded=settings.node.node_sharding,
    )


def with_adapters(trunk: nn.Module, settings: ModelSettings, task: str) -> nn.Module:
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
        task_type=task,
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
    ids = [prompt.input_ids.tolist() for prompt in prompts[:2]]
    score(reward, texts, [f" {text}" for text in reversed(texts)], ids[::-1])


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, or an empty one where there is no file."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found
