"""Tokens that a GPU samples by itself: what it did for one is recorded, and repeated for the next ones (CUDA graphs).

A model's layers are hundreds of short operations, and to call them takes the host longer than the GPU needs for them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rlhf_ppo.ppo.models import ValueHead, decoder_start, device_of, evaluating, response_logits
from rlhf_ppo.ppo.packing import AGREEMENT
from rlhf_ppo.ppo.responses import FixedDecoding
from rlhf_ppo.ppo.sampling import Sampling, draw
from rlhf_ppo.ppo.sequences import Padding, Sequences
from rlhf_ppo.ppo.tensors import token_logprobs

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Calls a function once, and gives one that lets the device repeat what it did, on the same tensors.

Raises RuntimeError where the host had to wait for the device, whose answer a repetition could not give.
"""
TRIED = [7, 4], 8
"""Tokens of the prompts, and of their responses, that a model is tried with."""


class ReplayedDecoding(FixedDecoding):
    """One batch whose tokens, from the third on, are repetitions of the second.

    Without ``padding`` a batch is as wide as its longest prompt.
    """

    _again: Callable[[], None]

    def __init__(
        self,
        model: nn.Module,
        queries: list[Tensor],
        sampling: Sampling,
        uniform: Tensor,
        value_head: ValueHead | None,
        *,
        padding: Padding | None = None,
        capture: Capture,
    ) -> None:
        longest = max(len(query) for query in queries)
        padding = padding or Padding(longest, longest + sampling.max_new_tokens)
        super().__init__(model, queries, sampling, uniform, value_head, padding)
        self.capture = capture
        assert self.mask is not None
        self.kept = self.mask.bool()[:, None, None]
        self.columns = torch.arange(self.room, device=self.rows.device)
        # transformers' own attention adds its mask to the scores; torch's takes booleans.
        self.adds = getattr(model.config, "_attn_implementation", None) == "eager"

    @property
    def slides(self) -> bool:
        """Whether some layer does not see all tokens: what its cache throws away is known to the host alone."""
        config: Any = self.model.config
        text = config.get_text_config(decoder=True)
        # transformers 4 has room for all of them, and hides some by a mask that is not used here.
        windows = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
        rooms = [getattr(layer, "max_cache_len", 0) for layer in self.cache.layers]
        return min([*rooms, *(window for window in windows if window)]) < self.room

    def _decoder_only_arguments(self) -> dict[str, Any]:
        """With a mask of its own: transformers would ask the device whether it hides anything."""
        # What is padded sees itself, for a softmax of nothing is NaN.
        here = self.places[:, None]
        seen = (self.kept & (self.columns < here)) | (self.columns == here)
        if self.adds:
            seen = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
        return {**super()._decoder_only_arguments(), "attention_mask": seen}

    def _next(self, number: int) -> None:
        if number == 0:
            self._token()
        elif number == 1:
            self._again = self.capture(self._token)
        else:
            self._again()


_found: WeakKeyDictionary[nn.Module, dict[Sampling, bool]] = WeakKeyDictionary()


def replays(model: nn.Module, sampling: Sampling, capture: Capture) -> bool:
    """Whether ``model`` samples as before when its tokens are repeated; tried once, with a few. Warns where not."""
    # Log-probabilities to compare are those of the plain softmax, before anything is left out.
    tried = replace(sampling, max_new_tokens=TRIED[1], eos_token_ids=(), temperature=1.0)
    known = _found.setdefault(model, {})
    if tried not in known:
        problem = _problem(model, tried, capture)
        if problem:
            name = type(model).__name__
            warnings.warn(f"{name} is sampled from operation by operation, which is slow: {problem}", stacklevel=2)
        known[tried] = not problem
    return known[tried]


@torch.no_grad()
def _problem(model: nn.Module, sampling: Sampling, capture: Capture) -> str:
    """Why not, in words; empty where it does."""
    if decoder_start(model) is not None:
        return "it has an encoder"
    device, words = device_of(model), model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    queries = [torch.arange(3, 3 + length) % words for length in TRIED[0]]
    uniform = draw(len(queries), sampling.max_new_tokens, torch.Generator().manual_seed(0))
    with evaluating(model):
        try:
            tried = ReplayedDecoding(model, queries, sampling, uniform, None, capture=capture)
            if tried.slides:
                return "not all of its layers see all tokens"
            found = tried.run(lambda: None)
        except (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            return str(error).splitlines()[0] if str(error) else type(error).__name__
        sequences = Sequences.of(queries, found.responses).to(device)
        logits, _ = response_logits(model, sequences)
    apart = (token_logprobs(logits, sequences.tokens).cpu() - torch.cat(found.logprobs)).abs().max()
    allowed = AGREEMENT.get(logits.dtype, 0.0) * float(logits.float().std())
    # Written so that NaN is a difference.
    return "" if float(apart) <= allowed else "repeated, its tokens have other probabilities"
