"""Where scores come from: a sequence-classification model, or the user's own function."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rlhf_ppo.errors import InputError
from rlhf_ppo.ppo.rollout import batches_by_length
from rlhf_ppo.settings import RewardSettings, is_callable_name

Reward = Callable[[list[str], list[str]], Sequence[float]]
"""Maps prompts and responses, equally many, to one score each; higher is better."""


def load_reward(reward_model: str, settings: RewardSettings, device: str = "cpu") -> Reward:
    """The reward that ``reward_model`` names. Raises InputError where there is none."""
    return (
        load_callable(reward_model) if is_callable_name(reward_model) else RewardModel(reward_model, settings, device)
    )


def load_callable(name: str) -> Reward:
    """Import package.module:function. Raises InputError that says what is missing."""
    module_name, _, function_name = name.partition(":")
    try:
        function: Any = getattr(importlib.import_module(module_name), function_name, None)
    except ImportError as error:
        raise InputError(
            f"reward_model={name!r} can't be imported ({error}): start where {module_name.split('.')[0]} can be "
            "imported, or install it"
        ) from error
    if not callable(function):
        raise InputError(f"reward_model={name!r}: the module {module_name} has no function {function_name}")
    reward: Reward = function
    return reward


class RewardModel:
    """A frozen sequence-classification model: the logit of its one label, or of the second of its two."""

    def __init__(self, source: str, settings: RewardSettings, device: str = "cpu") -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.settings, self.device = settings, device
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(source, revision=settings.reward_revision or None)
            model = AutoModelForSequenceClassification.from_pretrained(
                source, revision=settings.reward_revision or None, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            raise InputError(
                f"reward_model={source!r} can't be loaded: give a sequence-classification model with safetensors "
                f"weights, or package.module:function ({error})"
            ) from error
        if model.config.num_labels not in (1, 2):
            raise InputError(
                f"reward_model={source!r} has {model.config.num_labels} labels: give a model with 1 or 2, "
                "or a function that makes one number of them"
            )
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.tokenizer.pad_token_id
        # What is judged is the end of the text; a causal classifier reads its last token, which must not be padding.
        self.tokenizer.truncation_side, self.tokenizer.padding_side = "left", "right"
        self.model = model.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        """One logit for each prompt and response, read as one text."""
        texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        encoded = [self.tokenizer(t, truncation=True, max_length=self.settings.reward_max_tokens) for t in texts]
        scores = [0.0] * len(texts)
        lengths = [len(item["input_ids"]) for item in encoded]
        for rows in batches_by_length(lengths, self.settings.reward_batch_size * max(lengths, default=1)):
            batch = self.tokenizer.pad([encoded[row] for row in rows], return_tensors="pt").to(self.device)
            for row, score in zip(rows, self.model(**batch).logits[:, -1].float().tolist(), strict=True):
                scores[row] = score
        return scores


def score(
    reward: Reward, prompts: list[str], responses: list[str], response_ids: list[list[int]] | None = None
) -> list[float]:
    """The scores, checked: as many as responses, each a finite number. Raises InputError otherwise."""
    scores = reward(prompts, responses)
    try:
        found = [float(value) for value in scores]
    except TypeError as error:
        raise InputError(f"reward_model returned {scores!r}: it must return one number for each response") from error
    if len(found) != len(responses):
        raise InputError(
            f"reward_model returned {len(found)} scores for {len(responses)} responses: one each is needed"
        )
    for position, value in enumerate(found):
        if not math.isfinite(value):
            raise InputError(
                f"reward_model returned {value} for response {position} ({responses[position][:80]!r}): "
                "every score must be finite"
            )
    return found


def totals(scores: Sequence[float | Sequence[float]]) -> list[float]:
    """What each response earned in all."""
    return [float(value) if isinstance(value, (int, float)) else math.fsum(value) for value in scores]
