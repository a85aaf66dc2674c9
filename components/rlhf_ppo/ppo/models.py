"""The policy with its value head, and the forward pass that computes only what a response needs."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_ppo.errors import InputError
from rlhf_ppo.ppo.packing import attending, packs
from rlhf_ppo.ppo.sequences import Sequences
from rlhf_ppo.ppo.tensors import logprob_and_entropy, tempered


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
            if sequences.layout is not None:
                stack.enter_context(attending(model, sequences.layout))
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

    @property
    def packs(self) -> bool:
        """Whether the policy, and its critic, read packed sequences."""
        return packs(self.pretrained_model) and (self.critic is None or packs(self.critic))

    def forward(self, sequences: Sequences, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities, values and entropies, each (n,) in fp32, of the response tokens of ``sequences``."""
        logits, hidden = response_logits(self.pretrained_model, sequences)
        logprobs, entropy = logprob_and_entropy(tempered(logits, temperature), sequences.tokens)
        return logprobs, self.v_head(hidden) if self.critic is None else self.critic_values(sequences), entropy

    def critic_values(self, sequences: Sequences) -> Tensor:
        """The separate critic's values (n,) of the states before the response tokens."""
        assert self.critic is not None
        with nullcontext() if sequences.layout is None else attending(self.critic, sequences.layout):
            output = self.critic(**sequences.arguments())
        return self.v_head(sequences.choose(output.last_hidden_state))

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


def load_model(directory: str | Path, dtype: str = "float32", named: str = "model_name") -> Any:
    """The language model in ``directory``, from safetensors alone, with weights of ``dtype``.

    Raises InputError, about the parameter ``named``, where the files lack some of its weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    of_encoder = AutoConfig.from_pretrained(directory).is_encoder_decoder
    loader: Any = AutoModelForSeq2SeqLM if of_encoder else AutoModelForCausalLM
    model, loaded = loader.from_pretrained(directory, use_safetensors=True, output_loading_info=True)
    missing = missing_weights(model, loaded["missing_keys"])
    if missing:
        raise InputError(
            f"{named}: the weights lack {', '.join(missing[:3])} ({len(missing)} in all) of a {type(model).__name__}, "
            "which would be drawn at random: give a whole model"
        )
    return model.to(getattr(torch, dtype)).eval()


def missing_weights(model: nn.Module, absent: Iterable[str]) -> list[str]:
    """Those of the names ``absent`` from a model's file that were drawn at random: neither buffers nor tied to others.

    ``absent`` is what transformers calls missing_keys.
    """
    absent, named = set(absent), list(model.named_parameters(remove_duplicate=False))
    loaded = {id(parameter) for name, parameter in named if name not in absent}
    return [name for name, parameter in named if name in absent and id(parameter) not in loaded]


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
