"""The models that are compared answer the same prompts with the same seeds, one in memory at a time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rlhf_ppo.devices import Device
from rlhf_ppo.events import emit
from rlhf_ppo.parameters import RunSettings
from rlhf_ppo.policy_evaluation.champion import load_champion
from rlhf_ppo.policy_evaluation.statistics import Samples, kl_estimates
from rlhf_ppo.ppo import Prompt, Sampling, cpu
from rlhf_ppo.ppo.generation import sample
from rlhf_ppo.ppo.models import load_model
from rlhf_ppo.ppo.responses import Generated
from rlhf_ppo.ppo.rewards import Reward, score, totals
from rlhf_ppo.ppo.rollout import response_logprobs
from rlhf_ppo.ppo.sampling import draw
from rlhf_ppo.ppo.setup import precision_of


@dataclass(frozen=True)
class Models:
    """Where the models that are compared lie; there may be no champion."""

    reference: Path
    policy: Path
    champion: Path | None


@dataclass(frozen=True)
class Measured:
    """Scored samples by model; and of each response of the policy k1 and k3 against the models that have its tokens."""

    samples: dict[str, Samples]
    kl: dict[str, tuple[list[float], list[float]]]


@dataclass(frozen=True)
class Answers:
    """What one model says: its responses, the tokens that end them, its log-probabilities of others' responses."""

    generated: Generated
    ends: set[int]
    logprobs: dict[str, list[torch.Tensor]]


def measure(settings: RunSettings, prompts: Sequence[Prompt], reward: Reward, models: Models, on: Device) -> Measured:
    """Let the models answer, and the reward score what they say; a prompt stands as often as samples are wanted."""
    from transformers import AutoTokenizer

    ours = AutoTokenizer.from_pretrained(models.reference)
    tokenizers = {"policy": ours, "reference": ours}
    answers: dict[str, Answers] = {}
    known: dict[str, Generated] = {}
    ask = partial(_ask, settings, on, 3 if models.champion else 2)
    # 1. The policy responds
    answers["policy"] = ask(0, lambda: load_model(models.policy, settings.model.model_dtype), prompts, known)
    known["policy"] = answers["policy"].generated
    # 2. The published model responds, if there is one, and says how likely the policy's responses are
    if models.champion is not None:
        place, theirs = models.champion, AutoTokenizer.from_pretrained(models.champion)
        same = theirs.get_vocab() == ours.get_vocab()
        asked = prompts if same else _read_by(theirs, prompts)
        champion = ask(1, lambda: load_champion(place, settings, models.reference), asked, known if same else {})
        tokenizers["champion"], answers["champion"] = theirs, champion
        known |= {"champion": champion.generated} if same else {}
    # 3. The reference responds, and says how likely the others' responses are
    number = len(answers)
    reference = ask(number, lambda: load_model(models.reference, settings.model.model_dtype), prompts, known)
    answers["reference"] = reference
    # 4. The reward scores all
    of_reference = {**reference.logprobs, "reference": reference.generated.logprobs}
    samples = {
        name: _samples(answer, of_reference.get(name, []), prompts, tokenizers[name], reward)
        for name, answer in answers.items()
    }
    of_policy = {name: answer.logprobs["policy"] for name, answer in answers.items() if "policy" in answer.logprobs}
    own = answers["policy"].generated.logprobs
    return Measured(samples, {name: kl_estimates(own, logprobs) for name, logprobs in of_policy.items()})


def _ask(
    settings: RunSettings,
    on: Device,
    rounds: int,
    number: int,
    load: Callable[[], Any],
    prompts: Sequence[Prompt],
    others: Mapping[str, Generated],
) -> Answers:
    """Responses of the model of a round, and its log-probabilities of those of ``others`` to the same prompts."""
    gc.collect()  # the model of the round before
    model, temperature = load().to(on.device), settings.rollout.rollout_temperature
    if on.device.type == "cpu":
        cpu.keep_memory()
        cpu.fuse(model, alone=True)
    sampling = Sampling.for_model(model, settings.rollout.rollout_max_new_tokens, temperature)
    generator = torch.Generator().manual_seed(settings.evaluation.eval_seed)
    uniform = draw(len(prompts), sampling.max_new_tokens, generator)
    queries = [prompt.input_ids for prompt in prompts]
    progress = _progress(number, rounds, len(prompts))
    size = settings.rollout.rollout_batch_size
    with _as_in_training(settings, on):
        generated = sample(model, queries, sampling, uniform, size, progress, capture=on.capture)
        logprobs = {
            name: response_logprobs(model, queries, other.responses, temperature=temperature)
            for name, other in others.items()
        }
    return Answers(generated, set(sampling.eos_token_ids), logprobs)


def _as_in_training(settings: RunSettings, on: Device) -> torch.autocast:
    """The precision in which a card trains; a CPU evaluates in that of the weights."""
    in_bf16 = on.device.type != "cpu" and precision_of(settings.ppo, on) == "bf16"
    return torch.autocast(on.device.type, torch.bfloat16, enabled=in_bf16)


def _read_by(tokenizer: Any, prompts: Sequence[Prompt]) -> list[Prompt]:
    """``prompts`` in the tokens of another model; their texts hold the special tokens that they begin with."""
    texts = [prompt.text for prompt in prompts]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [Prompt(text, torch.tensor(row, dtype=torch.long)) for text, row in zip(texts, ids, strict=True)]


def _progress(number: int, rounds: int, each: int) -> Callable[[int], None]:
    def report(done: int) -> None:
        emit("progress", step="evaluate_policy", done=number * each + done, total=rounds * each, unit="responses")

    return report


def _samples(
    answers: Answers, ref_logprobs: Sequence[torch.Tensor], prompts: Sequence[Prompt], tokenizer: Any, reward: Reward
) -> Samples:
    responses = answers.generated.responses
    texts, ids = [tokenizer.decode(row, skip_special_tokens=True) for row in responses], [r.tolist() for r in responses]
    return Samples(
        texts,
        totals(score(reward, [prompt.text for prompt in prompts], texts, ids)),
        [len(row) for row in ids],
        [len(row) > 0 and row[-1] in answers.ends for row in ids],
        [float(-row.double().mean()) if len(row) else 0.0 for row in ref_logprobs],
        ids,
    )
