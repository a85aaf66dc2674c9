"""A pass of a policy whose layers are written out, and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_ppo.ppo.gradients import Gradients
from rlhf_ppo.ppo.llama import Llama
from rlhf_ppo.ppo.models import ValueHead
from rlhf_ppo.ppo.products import back_times, fill
from rlhf_ppo.ppo.sequences import Sequences
from rlhf_ppo.ppo.tensors import logits_gradient, softmax_of


class Pass:
    """Log-probabilities, values and entropies (n,) of the response tokens of packed ``sequences``; no autograd."""

    @torch.inference_mode()
    def __init__(self, model: Llama, value_head: ValueHead, sequences: Sequences, temperature: float) -> None:
        assert sequences.layout is not None
        self.model, self.value_head, self.sequences, self.temperature = model, value_head, sequences, temperature
        _, self.tape = model.read(sequences.input_ids[0], sequences.layout, sequences.index, keep=True)
        assert self.tape is not None and self.tape.last is not None
        # Of some places more than have a token
        self.hidden, count = self.tape.last.states, len(sequences.tokens)
        self.tokens = fill(sequences.tokens, len(self.hidden))
        logits = model.logits(self.hidden, temperature)
        logprobs, entropy, self.softmax = softmax_of(logits, self.tokens, spare=True)
        self.logprobs, self.entropy, self.values = logprobs[:count], entropy[:count], value_head(self.hidden)[:count]

    @torch.inference_mode()
    def learn(self, of_logprobs: Tensor, of_values: Tensor) -> Gradients:
        """What all weights have of the gradients (n,) of log-probabilities and values; uses this pass up."""
        assert self.tape is not None
        gradients, summary = Gradients(), self.value_head.summary
        of_logprobs, of_values = (fill(of_each, len(self.tokens)) for of_each in (of_logprobs, of_values))
        of_logits = logits_gradient(of_logprobs, self.softmax, self.tokens)
        if self.temperature != 1.0:
            of_logits.div_(self.temperature)
        gradients.add_products([self.model.head], of_logits, self.hidden)
        gradients.add(summary.weight, (of_values @ self.hidden)[None])
        gradients.add(summary.bias, of_values.sum()[None])
        of_hidden = back_times(of_logits, self.model.head).addr_(of_values, summary.weight[0])
        self.model.learn(self.tape, of_hidden, gradients)
        return gradients
