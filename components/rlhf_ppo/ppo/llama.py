"""Models of Llama's type on a CPU: their forward pass and its gradient, written out.

States are (tokens, n), and lie in memory as the processor wants them (``ppo/products.py``): token by token, or where a
weight times states is faster number by number those that are wide (docs/performance.md). Each pass is a short list of
large operations. The gradient of a weight is left as the two matrices that it is the product of (``Gradients``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from rlhf_ppo.ppo.attention import EIGHT, Attention
from rlhf_ppo.ppo.gradients import Gradients
from rlhf_ppo.ppo.packing import AGREEMENT, Layout
from rlhf_ppo.ppo.products import (
    MANY,
    back_times,
    back_times_by_token,
    even,
    fill,
    laid,
    plus_times,
    product_of,
    rows_of,
    times,
    times_by_token,
)
from rlhf_ppo.ppo.tensors import length_mask, pad_rows

KINDS = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
"""Of transformers; what their configurations may change is found out by trying (``written_out``)."""
ROTATIONS = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embeddings that don't depend on how long a text is."""

WIDTH = 8
"""Tokens come in multiples of that, where there are many: a product by MKL takes no longer for them."""

_silu_gradient = torch.ops.aten.silu_backward.grad_input

Attend = Callable[[Tensor], tuple[Tensor, Any]]
"""Heads (tokens, queries + keys + values, size) to (tokens, queries * size), and what its gradient needs."""


class Normed(NamedTuple):
    """What a norm gives: states ``scaled`` (tokens, hidden), which are those given times ``scale`` (tokens, 1)."""

    scaled: Tensor
    scale: Tensor
    weight: Tensor

    @property
    def states(self) -> Tensor:
        """(tokens, hidden), made anew each time: a pass keeps a good part less than with them."""
        return self.scaled * self.weight


@dataclass
class Kept:
    """What one layer's gradient needs of its forward pass, (tokens, n), but for what attention ``saw``."""

    before: Normed
    attended: Tensor
    saw: Any
    after: Normed
    gate_and_up: Tensor
    active: Tensor


@dataclass
class Tape:
    """What a forward pass leaves for its gradient, which uses it up; ``first`` is the first layer that learns.

    ``index`` has as many places as ``last`` has states; more than were asked for get no gradient.
    """

    ids: Tensor
    index: Tensor
    attention: Attention
    first: int
    layers: list[Kept] = field(default_factory=list)
    last: Normed | None = None


class _Layer:
    """The weights of one layer. Those that read the same states lie in one piece, of which each has its ``rows``."""

    def __init__(self, module: Any) -> None:
        attention, mlp = module.self_attn, module.mlp
        self.norm, self.norm_after = module.input_layernorm, module.post_attention_layernorm
        self.projections = _Joined([linear.weight for linear in (attention.q_proj, attention.k_proj, attention.v_proj)])
        biases = [linear.bias for linear in (attention.q_proj, attention.k_proj, attention.v_proj)]
        self.biases = None if biases[0] is None else _Joined(biases)
        self.feed = _Joined([mlp.gate_proj.weight, mlp.up_proj.weight])
        self.out, self.down = attention.o_proj.weight, mlp.down_proj.weight
        self.weights = [self.projections.whole, self.out, self.feed.whole, self.down]
        self.parameters = list(module.parameters())
        self.joined = [*self.projections.parameters, *(biases if self.biases else []), *self.feed.parameters]

    def is_still(self) -> bool:
        """Whether the weights lie where they lay."""
        return all(joined.is_still() for joined in (self.projections, self.biases, self.feed) if joined is not None)


class _Joined:
    """Parameters below each other in one piece of memory, ``whole``: one product is faster than several small ones."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        sizes = [len(parameter) for parameter in parameters]
        ends = list(accumulate(sizes))
        self.rows = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        first = parameters[0].detach()
        # Two models that share a layer have it in one piece already.
        self.whole = first
        if not self.is_still():
            self.whole = torch.cat([parameter.detach() for parameter in parameters])
            for parameter, rows in zip(parameters, self.rows, strict=True):
                parameter.data = self.whole[rows]
        self.whole = parameters[0].detach().as_strided((ends[-1], *first.shape[1:]), first.stride())

    def is_still(self) -> bool:
        """Whether the parameters lie below each other, from the beginning of ``whole`` on."""
        place, storage = self.whole.data_ptr(), self.whole.untyped_storage().data_ptr()
        for parameter in self.parameters:
            if parameter.data_ptr() != place or parameter.untyped_storage().data_ptr() != storage:
                return False
            place += parameter.nbytes
        return True

    def parts(self, of_whole: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Each parameter with its rows of ``of_whole``."""
        return [(parameter, of_whole[rows]) for parameter, rows in zip(self.parameters, self.rows, strict=True)]


class Llama:
    """A model of Llama's type, whose weights stay where they are. Sequences stand end to end."""

    def __init__(self, model: Any) -> None:
        inner, config = model.model, model.config
        self.embeddings, self.rotary, self.norm = inner.embed_tokens.weight, inner.rotary_emb, inner.norm
        self.head, self.padding = model.lm_head.weight, inner.embed_tokens.padding_idx
        self.layers = [_Layer(layer) for layer in inner.layers]
        self.size, self.scale = inner.layers[0].self_attn.head_dim, inner.layers[0].self_attn.scaling
        self.known_turns: tuple[Tensor, Tensor] | None = None
        self.queries, self.keys = config.num_attention_heads, config.num_key_value_heads
        # A file that weights were read from stays in memory for as long as one of them lies there.
        joined = {id(parameter) for layer in self.layers for parameter in layer.joined}
        for parameter in model.parameters():
            if id(parameter) not in joined:
                parameter.data = parameter.data.clone()

    # 1. Forward

    @torch.inference_mode()
    def read(self, ids: Tensor, layout: Layout, index: Tensor, keep: bool = False) -> tuple[Tensor, Tape | None]:
        """Last hidden states (n, hidden) of the places ``index`` (n,) of the row ``ids`` (tokens,); ``keep`` a tape."""
        attention, count = self.attention(layout), len(index)
        # The first place fills up.
        index = fill(index, even(count))
        tape = Tape(ids, index, attention, self._first()) if keep else None
        states = self.embedded(ids)
        for number, layer in enumerate(self.layers):
            states, kept = self.through(layer, states, attention, index if layer is self.layers[-1] else None)
            if tape is not None and number >= tape.first:
                tape.layers.append(kept)
            # What is not kept is free before the next layer.
            del kept
        last = normed_by(self.norm, states)
        if tape is not None:
            tape.last = last
        return last.states[:count], tape

    @torch.inference_mode()
    def logits(self, hidden: Tensor, temperature: float = 1.0) -> Tensor:
        """Logits (n, vocabulary) of last hidden states (n, hidden)."""
        found = product_of(fill(hidden.contiguous(), even(len(hidden))), self.head)[: len(hidden)]
        return found if temperature == 1.0 else found.div_(temperature)

    def attention(self, layout: Layout, turned: bool = False) -> Attention:
        """That of sequences that stand end to end, whose queries and keys are ``turned`` or not."""
        columns, turns = filled(layout.positions.shape[1]), None if turned else self.turns(max(layout.lengths) + EIGHT)
        return Attention(layout, columns, self.queries, self.keys, self.scale, turns)

    def embedded(self, ids: Tensor) -> Tensor:
        """The first states of ``ids`` (tokens,), and of tokens more, of which nothing comes."""
        return laid(self.embeddings.index_select(0, fill(ids, filled(len(ids)))))

    def turns(self, count: int) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines (``count`` or more, head size) of the rotations at the first positions."""
        if self.known_turns is None or len(self.known_turns[0]) < count:
            cosines, sines = self.rotary(self.embeddings[:1], torch.arange(count)[None])
            half = self.size // 2
            signed = torch.cat([-sines[0, :, :half], sines[0, :, half:]], 1)
            self.known_turns = cosines[0], signed
        return self.known_turns

    def through(
        self,
        layer: _Layer,
        states: Tensor,
        attention: Attend,
        index: Tensor | None = None,
    ) -> tuple[Tensor, Kept]:
        """``states``, which are used up, after ``layer``; or only those of the places ``index`` (n,)."""
        before = normed_by(layer.norm, states)
        heads = times_by_token(before.states, layer.projections.whole).view(states.shape[0], -1, self.size)
        if layer.biases is not None:
            heads += layer.biases.whole.view(-1, self.size)
        attended, saw = attention(heads)
        here = attended
        if index is not None:
            states, here = rows_of(states, index), attended.index_select(0, index)
        middle = plus_times(states, here, layer.out)
        after = normed_by(layer.norm_after, middle)
        both = times(after.states, layer.feed.whole)
        gate, up = both.chunk(2, 1)
        active = silu(gate)
        found = plus_times(middle, active * up, layer.down)
        return found, Kept(before, attended, saw, after, both, active)

    def is_still(self, model: Any) -> bool:
        """Whether ``model`` has the weights, and they the precision, that it had."""
        same = self.head is model.lm_head.weight and self.embeddings is model.model.embed_tokens.weight
        same = same and all(layer.is_still() for layer in self.layers)
        return same and self.head.dtype == torch.float32 and self.head.device.type == "cpu"

    def _first(self) -> int:
        """The first layer that learns, or has something below that does."""
        learns = [any(p.requires_grad for p in layer.parameters) for layer in self.layers]
        return 0 if self.embeddings.requires_grad or not any(learns) else learns.index(True)

    # 2. Gradient

    def learn(self, tape: Tape, gradient: Tensor, gradients: Gradients) -> None:
        """Put what the weights have of ``gradient`` (n, hidden), that of ``tape.last``, into ``gradients``."""
        assert tape.last is not None
        states = _norm_gradient(tape.last, self.norm, gradient, None, gradients)
        for layer in reversed(self.layers[tape.first :]):
            states = self._layer_gradient(layer, tape.layers.pop(), tape, states, gradients)
        states = states[: len(tape.ids)]
        if self.padding is not None and self.padding in tape.ids.numpy():
            # torch's embedding of this id learns nothing.
            states.masked_fill_((tape.ids == self.padding).unsqueeze(1), 0)
        gradients.add_rows(self.embeddings, tape.ids, states)

    def _layer_gradient(self, layer: _Layer, kept: Kept, tape: Tape, gradient: Tensor, gradients: Gradients) -> Tensor:
        # 1. The feed-forward half
        gate, up = kept.gate_and_up.chunk(2, 1)
        gradients.add_products([layer.down], gradient, kept.active * up)
        of_product = back_times(gradient, layer.down)
        of_active = of_product * up
        # The gradients of gate and up take their places.
        torch.mul(of_product, kept.active, out=up)
        _silu_gradient(of_active, gate, grad_input=gate)
        gradients.add_products(layer.feed.parameters, kept.gate_and_up, kept.after.states)
        of_normed = back_times(kept.gate_and_up, layer.feed.whole)
        of_middle = _norm_gradient(kept.after, layer.norm_after, of_normed, gradient, gradients)
        # 2. The attention's
        index = tape.index if layer is self.layers[-1] else None
        here = kept.attended if index is None else kept.attended.index_select(0, index)
        gradients.add_products([layer.out], of_middle, here)
        of_attended = back_times_by_token(of_middle, layer.out)
        if index is not None:
            tokens = kept.before.scaled.shape[0]
            of_attended = of_attended.new_zeros(tokens, of_attended.shape[1]).index_add_(0, index, of_attended)
            of_middle = laid(of_middle.new_zeros(tokens, of_middle.shape[1]).index_add_(0, index, of_middle))
        heads = tape.attention.gradient(kept.saw, kept.attended, of_attended)
        flat = heads.flatten(1)
        gradients.add_products(layer.projections.parameters, flat, kept.before.states)
        if layer.biases is not None:
            for bias, of_bias in layer.biases.parts(flat.sum(0)):
                gradients.add(bias, of_bias)
        of_normed = back_times(flat, layer.projections.whole)
        return _norm_gradient(kept.before, layer.norm, of_normed, of_middle, gradients)


def filled(tokens: int) -> int:
    """As how many that many tokens are computed."""
    return even(max(-(-tokens // WIDTH) * WIDTH, MANY))


def turns_at(turns: tuple[Tensor, Tensor], positions: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Those of ``turns`` at ``positions`` (tokens,), each (count, 1, head size)."""
    places = fill(positions, count)
    return turns[0].index_select(0, places)[:, None], turns[1].index_select(0, places)[:, None]


def normed_by(norm: Any, states: Tensor) -> Normed:
    """``states`` (tokens, hidden), each token's by the root of its mean square, times the weight of ``norm``."""
    # One over the root of the mean square
    if states.is_contiguous():
        norms = torch.linalg.vector_norm(states, dim=1, keepdim=True)
        scale = torch.addcmul(_one(norm.variance_epsilon), norms, norms, value=1 / states.shape[1]).rsqrt_()
    else:
        # Number by number torch's norm takes longer.
        one, evenly = _evenly(states.shape[1])
        scale = torch.addmv(one, states * states, evenly, beta=norm.variance_epsilon).rsqrt_().unsqueeze(1)
    scaled = states * scale
    return Normed(scaled, scale, norm.weight)


@cache
def _one(value: float) -> Tensor:
    """It as a tensor, 0-d."""
    return torch.tensor(value)


@cache
def _evenly(size: int) -> tuple[Tensor, Tensor]:
    """A one, (1,), and ``size`` equal parts of it."""
    return torch.ones(1), torch.full((size,), 1 / size)


def _norm_gradient(normed: Normed, norm: Any, gradient: Tensor, beside: Tensor | None, gradients: Gradients) -> Tensor:
    """That of what is normed, plus ``beside``; ``gradient`` is used up."""
    weight, products = norm.weight, gradient * normed.scaled
    gradients.add(weight, products.sum(0))
    along = torch.mv(products, weight).unsqueeze(1)
    of_scaled = gradient.mul_(weight).addcmul_(normed.scaled, along, value=-1 / gradient.shape[1])
    if beside is None:
        return of_scaled.mul_(normed.scale)
    return torch.addcmul(beside, of_scaled, normed.scale, out=of_scaled)


_found: WeakKeyDictionary[nn.Module, Llama | None] = WeakKeyDictionary()


def written_out(model: Any) -> Llama | None:
    """``model`` as one of Llama's type, where it computes in fp32 on a CPU; tried on a few tokens, once, else None."""
    if torch.is_autocast_enabled("cpu"):
        return None
    known = _found.get(model)
    if model not in _found or (known is not None and not known.is_still(model)):
        _found[model] = _tried(model)
    return _found[model]


@torch.no_grad()
def _tried(model: Any) -> Llama | None:
    config: Any = getattr(model, "config", None)
    if type(model).__name__ not in KINDS or any(p.device.type != "cpu" for p in model.parameters()):
        return None
    linear = [module for name, module in model.named_modules() if name.endswith(("_proj", "lm_head"))]
    biased = any(
        name.endswith(("o_proj.bias", "down_proj.bias", "lm_head.bias")) for name, _ in model.named_parameters()
    )
    wide = getattr(config, "sliding_window", None) is None or not getattr(config, "use_sliding_window", True)
    if biased or not wide or any(type(module) is not nn.Linear for module in linear) or config.hidden_act != "silu":
        return None
    if model.model.rotary_emb.rope_type not in ROTATIONS or any(p.dtype != torch.float32 for p in model.parameters()):
        return None
    layout = Layout.of([5, 1, 3])
    ids = torch.arange(1, 10) % len(model.model.embed_tokens.weight)
    try:
        found = Llama(model)
        # Causal: what stands to the right of a text changes nothing.
        padded = model(input_ids=pad_rows(ids.split(layout.lengths)), use_cache=False).logits
        said = found.logits(found.read(ids, layout, torch.arange(len(ids)))[0])
    except (AttributeError, RuntimeError, TypeError):
        return None
    plain = padded[length_mask(layout.lengths)]
    return found if bool((said - plain).abs().max() <= AGREEMENT[torch.float32] * plain.std()) else None
