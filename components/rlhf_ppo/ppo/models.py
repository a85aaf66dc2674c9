"""The policy with its value head, and the forward pass that computes only what a response needs."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from rlhf_ppo.errors import InputError
from rlhf_ppo.ppo.tensors import length_mask, logprob_and_entropy, pad_rows


@dataclass(frozen=True)
class Padding:
    """The fixed lengths of static shapes, in tokens: of a prompt, and of prompt and response together."""

    prompt: int
    total: int

    @property
    def response(self) -> int:
        """The fixed length of a response."""
        return self.total - self.prompt

    @property
    def query(self) -> int:
        """The width of a batch of prompts that has a mask.

        transformers goes another way where a mask hides nothing, so that one place more is always hidden.
        """
        return self.prompt + 1


@dataclass(frozen=True)
class Sequences:
    """Queries and responses as one right-padded batch.

    ``input_ids`` is (batch, length): query and response of a decoder-only model, the query alone where there is an
    encoder. ``index`` (n,) points into the flattened decoder's input at the positions that predict the n response
    tokens ``tokens`` (n,), row by row. A causal model's tokens never see what stands to their right, so that needs no
    attention mask and padding changes nothing; an encoder has ``encoder_mask`` (batch, length), and the decoder reads
    ``decoder_ids`` (batch, response): the start token and the response without its last.

    With static shapes (``static``) every row has as many entries in ``index`` and ``tokens``: those beyond its response
    mean nothing.
    """

    input_ids: Tensor
    index: Tensor
    tokens: Tensor
    encoder_mask: Tensor | None = None
    decoder_ids: Tensor | None = None
    static: bool = False

    @classmethod
    def of(
        cls,
        queries: Sequence[Tensor],
        responses: Sequence[Tensor],
        padding: Padding | None = None,
        decoder_start: int | None = None,
    ) -> Sequences:
        """Join the 1-D ``queries`` and ``responses``, which the host holds, row by row.

        They are padded to the longest, or as ``padding`` says. ``decoder_start`` is an encoder-decoder's start token.
        Raises InputError where a row is longer than ``padding``.
        """
        lengths, query_lengths = [len(response) for response in responses], [len(query) for query in queries]
        if padding is None:
            tokens = torch.cat(list(responses))
        else:
            check_lengths(query_lengths, lengths, padding)
            tokens, lengths = pad_rows(responses, 0, padding.response).flatten(), [padding.response] * len(responses)
        if decoder_start is None:
            rows = [torch.cat(pair) for pair in zip(queries, responses, strict=True)]
            ids = pad_rows(rows, 0, padding.total if padding else None)
            starts = [length - 1 for length in query_lengths]
            index = _positions(starts, lengths, ids.shape[1])
            return cls(ids, index, tokens, static=padding is not None)
        shifted = [torch.cat([row.new_tensor([decoder_start]), row[:-1]]) for row in responses]
        queries_ids = pad_rows(queries, 0, padding.query if padding else None)
        decoder_ids = pad_rows(shifted, 0, padding.response if padding else None)
        return cls(
            queries_ids,
            _positions([0] * len(responses), lengths, decoder_ids.shape[1]),
            tokens,
            length_mask(query_lengths, width=queries_ids.shape[1]).long(),
            decoder_ids,
            padding is not None,
        )

    def to(self, device: torch.device) -> Sequences:
        """The same on ``device``."""
        tables: dict[str, Any] = {name: t.to(device) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **tables)

    def select(self, rows: Tensor) -> Sequences:
        """The rows of static shapes that ``rows`` (n,) names."""
        batch, width = (self.input_ids if self.decoder_ids is None else self.decoder_ids).shape
        moved = (torch.arange(len(rows), device=rows.device) - rows)[:, None] * width
        return Sequences(
            self.input_ids.index_select(0, rows),
            (self.index.view(batch, -1).index_select(0, rows) + moved).flatten(),
            self.tokens.view(batch, -1).index_select(0, rows).flatten(),
            None if self.encoder_mask is None else self.encoder_mask.index_select(0, rows),
            None if self.decoder_ids is None else self.decoder_ids.index_select(0, rows),
            static=True,
        )

    def arguments(self) -> dict[str, Any]:
        """What a model's forward is called with."""
        if self.decoder_ids is None:
            unread = {"past_key_values": Nothing()} if self.static else {}
            return {"input_ids": self.input_ids, "use_cache": False, **unread}
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.encoder_mask,
            "decoder_input_ids": self.decoder_ids,
            "use_cache": False,
        }

    def choose(self, hidden: Tensor) -> Tensor:
        """Of (batch, length, hidden) the n positions that predict a response token, (n, hidden)."""
        return hidden.flatten(0, 1).index_select(0, self.index)


class Nothing(Cache):
    """A cache that keeps nothing. A model that has one does not look at its positions on the host for packed texts."""

    is_compileable = False
    is_sliding = is_linear = is_dummy = [False]  # type: ignore[assignment]

    def __init__(self) -> None:
        self.layers: list[Any] = []

    def __len__(self) -> int:
        return 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The given keys and values."""
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """No token was seen."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The first query is the first token."""
        return 0

    def get_mask_sizes(self, query: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        """As many keys as queries (transformers 4 gives their positions), from the first."""
        return (query if isinstance(query, int) else len(query)), 0


def check_lengths(queries: Sequence[int], responses: Sequence[int], padding: Padding) -> None:
    """Raises InputError where a prompt or a response is longer than ``padding``."""
    if max(queries) > padding.prompt:
        raise InputError(
            f"pad_max_input_len={padding.prompt} is less than a prompt of {max(queries)} tokens; none is cut"
        )
    if max(responses, default=0) > padding.response:
        raise InputError(
            f"pad_max_len={padding.total} less pad_max_input_len={padding.prompt} leaves {padding.response} tokens, "
            f"and a response has {max(responses)}; none is cut"
        )


def _positions(starts: Sequence[int], lengths: Sequence[int], width: int) -> Tensor:
    rows = enumerate(zip(starts, lengths, strict=True))
    return torch.cat([torch.arange(length) + (row * width + start) for row, (start, length) in rows])


class ValueHead(nn.Module):
    """A linear map from the last hidden state to the value, zero at the start; TRL's names of parameters."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.summary = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.summary.weight)
        nn.init.zeros_(self.summary.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Values (n,) of hidden states (n, hidden), in fp32 also where the model computes in less."""
        kind = hidden.device.type
        cut = kind != "meta" and torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False) if cut else nullcontext():
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


def decoder_start(model: nn.Module) -> int | None:
    """The token that an encoder-decoder's responses start after; None for a decoder-only model.

    Raises InputError where an encoder-decoder names none.
    """
    config: Any = model.config
    if not getattr(config, "is_encoder_decoder", False):
        return None
    start = config.decoder_start_token_id
    if start is None:
        start = getattr(getattr(model, "generation_config", None), "decoder_start_token_id", None)
    if start is None:
        raise InputError("model_name: the model's config.json has no decoder_start_token_id: name one there")
    return int(start)


@contextmanager
def decoder_output(model: nn.Module) -> Iterator[list[Tensor]]:
    """Catch the decoder's last hidden states (batch, length, hidden), before what T5 multiplies them with."""
    caught: list[Tensor] = []
    handle = model.get_decoder().register_forward_hook(lambda _, __, output: caught.append(output[0]))  # type: ignore[operator]
    try:
        yield caught
    finally:
        handle.remove()


def response_logits(model: nn.Module, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """Logits (n, vocabulary) that predict the n response tokens, and the hidden states (n, hidden) behind them."""
    with ExitStack() as stack:
        chosen = stack.enter_context(head_input(model, sequences.choose))
        if sequences.decoder_ids is None:
            output = model(**sequences.arguments())
            hidden = chosen
        else:
            caught = stack.enter_context(decoder_output(model))
            output = model(**sequences.arguments())
            hidden = [sequences.choose(state) for state in caught]
    if not chosen:
        raise InputError(f"model_name: {type(model).__name__} does not use its output head; give a language model")
    return output.logits[0], hidden[0]


def _say_nothing(*_: Any) -> None:
    pass


class PolicyWithValueHead(nn.Module):
    """A language model (plain or with adapters, decoder-only or encoder-decoder) and its value.

    The value is a linear map of the model's last hidden state, so that policy and value share the trunk; or of
    ``critic``'s, a model without a language-model head (as AutoModel loads it), which then learns the value alone.
    """

    def __init__(self, pretrained_model: nn.Module, critic: nn.Module | None = None) -> None:
        super().__init__()
        self.pretrained_model = pretrained_model
        self.critic = critic
        for module in self.modules():
            # It looks for padding on the host in every pass, and would be wrong: what is padded is never read.
            if hasattr(module, "warn_if_padding_and_no_attention_mask"):
                module.warn_if_padding_and_no_attention_mask = _say_nothing  # type: ignore[assignment]
        self.decoder_start = decoder_start(pretrained_model)
        head: nn.Linear = pretrained_model.get_output_embeddings()  # type: ignore[operator]
        self.v_head = ValueHead(head.weight.shape[-1]).to(head.weight.device)

    @property
    def is_peft_model(self) -> bool:
        """Whether adapters are trained and the trunk is frozen."""
        return hasattr(self.pretrained_model, "disable_adapter")

    def forward(self, sequences: Sequences, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities, values and entropies, each (n,) in fp32, of the response tokens of ``sequences``."""
        logits, hidden = response_logits(self.pretrained_model, sequences)
        if temperature != 1.0:
            logits = logits / temperature
        logprobs, entropy = logprob_and_entropy(logits, sequences.tokens)
        return logprobs, self.v_head(hidden) if self.critic is None else self.critic_values(sequences), entropy

    def critic_values(self, sequences: Sequences) -> Tensor:
        """The separate critic's values (n,) of the states before the response tokens."""
        assert self.critic is not None
        return self.v_head(sequences.choose(self.critic(**sequences.arguments()).last_hidden_state))

    def set_value_head(self, weights: Mapping[str, Tensor]) -> None:
        """Take the value head's weights, under TRL's names ``v_head.summary.weight`` and ``.bias``, from ``weights``.

        Other entries are left alone. Raises InputError where one is missing or of another size.
        """
        for name, parameter in self.v_head.named_parameters():
            key = f"v_head.{name}"
            found = weights.get(key)
            if found is None or found.shape != parameter.shape:
                what = "is not there" if found is None else f"is {tuple(found.shape)}"
                raise InputError(f"value head: {key} {what}; {tuple(parameter.shape)} is needed")
            with torch.no_grad():
                parameter.copy_(found)


def device_of(model: nn.Module) -> torch.device:
    """Where a language model reads its tokens."""
    device: torch.device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    return device


def load_model(directory: str | Path, dtype: str = "float32") -> Any:
    """The language model in ``directory``, from safetensors alone, with weights of ``dtype``."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    of_encoder = AutoConfig.from_pretrained(directory).is_encoder_decoder
    loader = AutoModelForSeq2SeqLM if of_encoder else AutoModelForCausalLM
    return loader.from_pretrained(directory, use_safetensors=True).to(getattr(torch, dtype)).eval()


def load_critic(directory: str | Path, dtype: str = "float32") -> Any:
    """The model in ``directory`` without its language-model head, as the start of a separate critic."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(directory, use_safetensors=True).to(getattr(torch, dtype)).eval()


def shared_reference(policy: nn.Module, layers: int) -> nn.Module:
    """A frozen copy of ``policy`` that shares the embeddings and the first ``layers`` layers with it, in memory.

    What is shared is frozen in the policy as well, tied output embeddings included. With 0 nothing is shared.
    Raises InputError where the model has no more than ``layers`` layers, or an encoder.
    """
    shared: list[nn.Parameter] = []
    if layers:
        if decoder_start(policy) is not None:
            raise InputError(f"ppo_shared_layers={layers}: an encoder-decoder model shares no layers, set 0")
        stack = layers_of(policy)
        if layers >= len(stack):
            raise InputError(
                f"ppo_shared_layers={layers} is too many: of the model's {len(stack)} layers one must train"
            )
        modules = [policy.get_input_embeddings(), *stack[:layers]]  # type: ignore[operator]
        positions = [m for name, m in policy.named_modules() if name.split(".")[-1] in ("wpe", "embed_positions")]
        shared = [parameter for module in (*modules, *positions) for parameter in module.parameters()]
    # What the copy finds in the memo it takes as it is, and so freezes it in both.
    reference = copy.deepcopy(policy, {id(parameter): parameter for parameter in shared})
    return reference.eval().requires_grad_(False)


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The stack of layers of a decoder-only model."""
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()))


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
