"""The policy with its value head, and the forward pass that computes only what a response needs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_ppo.errors import InputError
from rlhf_ppo.ppo.tensors import logprob_and_entropy, pad_rows


@dataclass(frozen=True)
class Sequences:
    """Queries and responses as one right-padded batch.

    ``input_ids`` is (batch, length). ``index`` (n,) points into its flattened form at the positions that predict the n
    response tokens ``tokens`` (n,), row by row. A causal model's tokens never see what stands to their right, so no
    attention mask is needed and padding changes nothing.
    """

    input_ids: Tensor
    index: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, queries: Sequence[Tensor], responses: Sequence[Tensor], length: int | None = None) -> Sequences:
        """Join the 1-D ``queries`` and ``responses`` row by row, padded to the longest or to ``length``."""
        rows = [torch.cat(pair) for pair in zip(queries, responses, strict=True)]
        longest = max(len(row) for row in rows)
        if length is not None and longest > length:
            raise InputError(
                f"pad_max_len={length} is less than a prompt and response of {longest} tokens; none is cut"
            )
        width = length or longest
        index = torch.cat(
            [
                torch.arange(len(response), device=query.device) + (row * width + len(query) - 1)
                for row, (query, response) in enumerate(zip(queries, responses, strict=True))
            ]
        )
        return cls(pad_rows(rows, 0, width), index, torch.cat(list(responses)))


class ValueHead(nn.Module):
    """A linear map from the last hidden state to the value, zero at the start; TRL's names of parameters."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.summary = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.summary.weight)
        nn.init.zeros_(self.summary.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Values (n,) in fp32 of hidden states (n, hidden)."""
        return self.summary(hidden.to(self.summary.weight.dtype)).squeeze(-1).float()


@contextmanager
def head_input(model: nn.Module, choose: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """Let the language-model head see only what ``choose`` makes of the last hidden states (batch, length, hidden).

    ``choose`` returns (n, hidden); the model's logits then are (1, n, vocabulary), through whatever the model does
    after its head (soft caps, scales). What was chosen is put into the list that the context gives.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    chosen: list[Tensor] = []

    def replace(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        chosen.append(choose(inputs[0]))
        return (chosen[-1][None], *inputs[1:])

    handle = head.register_forward_pre_hook(replace)
    try:
        yield chosen
    finally:
        handle.remove()


def response_logits(model: nn.Module, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """Logits (n, vocabulary) that predict the n response tokens, and the hidden states (n, hidden) behind them."""
    with head_input(model, lambda hidden: hidden.flatten(0, 1).index_select(0, sequences.index)) as chosen:
        output = model(input_ids=sequences.input_ids, use_cache=False)
    if not chosen:
        raise InputError(
            f"model_name: {type(model).__name__} does not use its output head; give a causal language model"
        )
    return output.logits[0], chosen[0]


class PolicyWithValueHead(nn.Module):
    """A causal language model (plain or with adapters) whose trunk is shared by the policy and the value."""

    def __init__(self, pretrained_model: nn.Module) -> None:
        super().__init__()
        if getattr(pretrained_model.config, "is_encoder_decoder", False):
            raise InputError(
                f"model_name: {type(pretrained_model).__name__} is an encoder-decoder model; give a decoder-only one"
            )
        self.pretrained_model = pretrained_model
        head = pretrained_model.get_output_embeddings()  # type: ignore[operator]
        self.v_head = ValueHead(head.weight.shape[-1]).to(head.weight.device)

    @property
    def is_peft_model(self) -> bool:
        """Whether adapters are trained and the trunk is frozen."""
        return hasattr(self.pretrained_model, "disable_adapter")

    def forward(
        self, input_ids: Tensor, index: Tensor, tokens: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities, values and entropies, each (n,) in fp32, of the tokens of ``Sequences``."""
        logits, hidden = response_logits(self.pretrained_model, Sequences(input_ids, index, tokens))
        if temperature != 1.0:
            logits = logits / temperature
        logprobs, entropy = logprob_and_entropy(logits, tokens)
        return logprobs, self.v_head(hidden), entropy


def load_model(directory: str | Path, dtype: str = "float32") -> Any:
    """The causal language model in ``directory``, from safetensors alone, with weights of ``dtype``."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, use_safetensors=True).to(getattr(torch, dtype)).eval()


def accepts(model: nn.Module, argument: str) -> bool:
    """Whether the model's forward, beneath any adapters, takes ``argument``."""
    inner: Any = model
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    return argument in inspect.signature(inner.forward).parameters


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """All dropout off inside; every module's mode is put back at the end, also after an error."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
