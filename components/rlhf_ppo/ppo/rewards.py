"""Where scores come from: a model, the user's own function, an endpoint, or a weighted sum of these."""

from __future__ import annotations

import importlib
import inspect
import math
import reprlib
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch

from rlhf_ppo.errors import InputError
from rlhf_ppo.ppo.models import missing_weights
from rlhf_ppo.ppo.reward_endpoint import RewardEndpoint
from rlhf_ppo.ppo.rollout import batches_by_length
from rlhf_ppo.settings import RewardSettings, is_callable_name, is_endpoint, split_revision

Score = float | list[float]
"""What a response earned: one number, or one for each of its tokens."""
Reward = Callable[..., Sequence[Any]]
"""Maps prompts and responses, equally many texts, to one ``Score`` each; higher is better.

One with a parameter ``response_ids`` is also given the token ids of each response, and may score every token.
"""


def load_reward(reward_model: str, settings: RewardSettings, device: str = "cpu", *, static: bool = False) -> Reward:
    """The reward that ``reward_model`` names, and what reward_sum adds.

    With ``static`` a model sees batches of reward_batch_size texts of reward_max_tokens tokens, always. Raises
    InputError where there is no such reward.
    """
    weights = {reward_model: 1.0, **{name: float(weight) for name, weight in settings.reward_sum.items()}}
    parts: dict[str, Reward] = {}
    for name in weights:
        if is_endpoint(name):
            parts[name] = RewardEndpoint(name, settings)
        elif is_callable_name(name):
            parts[name] = load_callable(name)
        else:
            model, revision = split_revision(name)
            own = settings.reward_revision if name == reward_model else revision
            parts[name] = RewardModel(model, own, settings, device, static)
    return parts[reward_model] if not settings.reward_sum else RewardSum(parts, weights)


class RewardSum:
    """A weighted sum of rewards; ``parts`` has each one's mean, unweighted, in the last call."""

    def __init__(self, rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> None:
        self.rewards, self.weights = rewards, weights
        self.parts: dict[str, float] = {}

    def __call__(self, prompts: list[str], responses: list[str], response_ids: list[list[int]]) -> list[Score]:
        """The sums. A part with one number per response goes on the last token where another has one per token."""
        found = {name: score(reward, prompts, responses, response_ids) for name, reward in self.rewards.items()}
        self.parts = {name: math.fsum(totals(scores)) / len(responses) for name, scores in found.items()}
        return [
            _sum([(self.weights[name], scores[row]) for name, scores in found.items()], len(response_ids[row]))
            for row in range(len(responses))
        ]


def _sum(parts: list[tuple[float, Score]], tokens: int) -> Score:
    whole = math.fsum(weight * value for weight, value in parts if not isinstance(value, list))
    by_token = [(weight, value) for weight, value in parts if isinstance(value, list)]
    if not by_token or not tokens:
        return whole
    summed = [math.fsum(weight * value[place] for weight, value in by_token) for place in range(tokens)]
    summed[-1] += whole
    return summed


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
    return OwnReward(name, reward)


class RewardFailed(RuntimeError):
    """The user's function raised; the message says what and where."""


class OwnReward:
    """A function of the user's, of this ``name``, which what it raises is told by; it is given lists of its own."""

    def __init__(self, name: str, function: Reward) -> None:
        self.name, self.function, self.takes_ids = name, function, _takes_ids(function)

    def __call__(self, prompts: list[str], responses: list[str], response_ids: list[list[int]]) -> list[Score]:
        """The scores, as plain numbers. Raises RewardFailed; and InputError where they are none."""
        given = {"response_ids": [list(ids) for ids in response_ids]} if self.takes_ids else {}
        try:
            scores = self.function(list(prompts), list(responses), **given)
            # What is made one by one may fail here only.
            scores = list(scores) if isinstance(scores, Iterator) else scores
        except Exception as error:
            said = f"reward_model={self.name!r} raised {type(error).__name__}: {error}{self._place_of(error)}"
            raise RewardFailed(said) from error
        return _plain_scores(scores, f"reward_model={self.name!r}")

    def _place_of(self, error: Exception) -> str:
        """File and line of the last place in the user's own directory, or else of the last at all."""
        frames = traceback.extract_tb(error.__traceback__)[1:]
        module = sys.modules.get(self.name.partition(":")[0])
        home = Path(getattr(module, "__file__", None) or "").parent
        own = [frame for frame in frames if Path(frame.filename).parent == home] or frames
        return f" (at {own[-1].filename}:{own[-1].lineno})" if own else ""


class RewardModel:
    """A frozen sequence-classification model: the logit of its one label, or of the second of its two."""

    def __init__(
        self, source: str, revision: str, settings: RewardSettings, device: str = "cpu", static: bool = False
    ) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.settings, self.device, self.static = settings, device, static
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(source, revision=revision or None)
            model, loaded = AutoModelForSequenceClassification.from_pretrained(
                source, revision=revision or None, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError) as error:
            raise InputError(
                f"reward_model={source!r} can't be loaded: give a sequence-classification model with safetensors "
                f"weights, or package.module:function ({error})"
            ) from error
        missing = missing_weights(model, loaded["missing_keys"])
        if missing:
            raise InputError(
                f"reward_model={source!r} lacks {', '.join(missing[:3])} of a {type(model).__name__}, whose scores "
                "would be random: give a model that was trained as a sequence classifier"
            )
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
        for rows in self._rows([len(item["input_ids"]) for item in encoded]):
            batch = self._batch([encoded[row] for row in rows]).to(self.device)
            # What fills a batch up comes last.
            for row, score in zip(rows, self.model(**batch).logits[:, -1].float().tolist(), strict=False):
                scores[row] = score
        return scores

    def _rows(self, lengths: list[int]) -> Iterator[list[int]]:
        """Row numbers in batches."""
        size = self.settings.reward_batch_size
        if not self.static:
            return batches_by_length(lengths, size * max(lengths, default=1))
        return (list(range(start, min(start + size, len(lengths)))) for start in range(0, len(lengths), size))

    def _batch(self, items: list[Any]) -> Any:
        """``items`` padded to the longest; with static shapes to the longest possible, and filled up with the first."""
        if not self.static:
            return self.tokenizer.pad(items, return_tensors="pt")
        longest = getattr(self.model.config, "max_position_embeddings", None) or self.settings.reward_max_tokens
        return self.tokenizer.pad(
            items + items[:1] * (self.settings.reward_batch_size - len(items)),
            padding="max_length",
            max_length=min(self.settings.reward_max_tokens, longest),
            return_tensors="pt",
        )


def score(reward: Reward, prompts: list[str], responses: list[str], response_ids: list[list[int]]) -> list[Score]:
    """The scores, checked: as many as responses, each a finite number or one for each token of ``response_ids``.

    Raises InputError otherwise.
    """
    given = {"response_ids": response_ids} if _takes_ids(reward) else {}
    found = _plain_scores(reward(prompts, responses, **given))
    if len(found) != len(responses):
        raise InputError(
            f"reward_model returned {len(found)} scores for {len(responses)} responses: one each is needed"
        )
    for position, value in enumerate(found):
        told = f"reward_model returned {value} for response {position} ({responses[position][:80]!r})"
        if isinstance(value, list) and len(value) != len(response_ids[position]):
            raise InputError(
                f"{told}: {len(value)} numbers for {len(response_ids[position])} tokens; give one number, or one for "
                "each token"
            )
        if not all(map(math.isfinite, value if isinstance(value, list) else [value])):
            raise InputError(f"{told}: every score must be finite")
    return found


def totals(scores: Sequence[Score]) -> list[float]:
    """What each response earned in all."""
    return [math.fsum(value) if isinstance(value, list) else value for value in scores]


def _plain_scores(scores: Any, named: str = "reward_model") -> list[Score]:
    """What a reward returned, in order; keys, characters and what has no order are no scores."""
    try:
        if isinstance(scores, (Mapping, Set, str, bytes)):
            raise TypeError(f"a {type(scores).__name__} is no list")
        return [_plain(value) for value in scores]
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{named} returned {reprlib.repr(scores)} ({error}): it must return one number for each "
            "response, or one for each token"
        ) from error


def _plain(value: Any) -> Score:
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [float(item) for item in value] if isinstance(value, (list, tuple)) else float(value)


def _takes_ids(reward: Reward) -> bool:
    try:
        return "response_ids" in inspect.signature(reward).parameters
    except (TypeError, ValueError):
        return False
