"""The update of the policy: passes over the batch in minibatches, gradients, optimizer steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rlhf_ppo.config import PPOConfig
from rlhf_ppo.devices import Device
from rlhf_ppo.ppo.experience import Experience, Update
from rlhf_ppo.ppo.gradients import Gradients, takes
from rlhf_ppo.ppo.llama import Llama, written_out
from rlhf_ppo.ppo.losses import ppo_loss
from rlhf_ppo.ppo.models import PolicyWithValueHead, device_of, evaluating
from rlhf_ppo.ppo.passes import Pass
from rlhf_ppo.ppo.sequences import Padding, Sequences
from rlhf_ppo.ppo.setup import step_unless
from rlhf_ppo.ppo.sharding import everywhere
from rlhf_ppo.ppo.tensors import Reduce, length_mask, pad_rows

LEARNED_FROM = ("logprobs", "values", "advantages", "returns")
"""What a minibatch needs of the experience, beside the mask."""

SKIPPED = "ppo/policy/skipped_minibatches"

Learn = Callable[[Tensor, Tensor], None]
"""Takes the gradients (n,) of log-probabilities and values."""


class Minibatches:
    """The batch of an update; packed, or with ``padding``, its sequences are ready, and those of minibatches chosen."""

    def __init__(
        self, experience: Experience, padding: Padding | None, policy: PolicyWithValueHead, device: torch.device
    ) -> None:
        self.experience, self.decoder_start, self.device = experience, policy.decoder_start, device
        self.packed = padding is None and policy.packs
        self.mask = experience.mask.to(device)
        # (batch, kinds, tokens)
        self.tables = torch.stack([getattr(experience, name) for name in LEARNED_FROM], 1).to(device)
        rollout = experience.rollout
        self.whole: Sequences | None = None
        if padding is not None or self.packed:
            given = rollout.queries, rollout.responses, padding, policy.decoder_start, self.packed
            self.whole = Sequences.of(*given).to(device if padding else torch.device("cpu"))
        # Of a pass: the order of its rows, and packed sequences, mask and tables in that order
        self.order: list[int] = []
        self.ordered: tuple[Sequences, Tensor, Tensor] | None = None

    def of(self, order: list[int], first: int, last: int) -> tuple[Sequences, list[int] | None, dict[str, Tensor]]:
        """The sequences of the rows ``order[first:last]``, their tokens (None: equally many), (rows, tokens) tables."""
        rows = order[first:last]
        responses = self.experience.rollout.responses
        if self.packed:
            whole, masks, all_tables = self._in_order(order)
            sequences, mask, tables = whole.between(first, last), masks[first:last], all_tables[first:last]
        else:
            chosen = torch.tensor(rows, device=self.device)
            mask, tables = self.mask.index_select(0, chosen), self.tables.index_select(0, chosen)
            if self.whole is not None:
                return self.whole.select(chosen), None, _named(tables, mask)
            queries = self.experience.rollout.queries
            given = [queries[row] for row in rows], [responses[row] for row in rows], None, self.decoder_start
            sequences = Sequences.of(*given).to(self.device)
        lengths = [responses[row].shape[0] for row in rows]
        longest = max(lengths)
        named = _named(tables[..., :longest], mask[:, :longest])
        return sequences, None if min(lengths) == longest else lengths, named

    def _in_order(self, order: list[int]) -> tuple[Sequences, Tensor, Tensor]:
        """Packed sequences, mask and tables of all rows of a pass: its minibatches are parts of them."""
        if self.ordered is None or self.order is not order:
            assert self.whole is not None
            chosen = torch.tensor(order, device=self.device)
            mask, tables = self.mask.index_select(0, chosen), self.tables.index_select(0, chosen)
            self.order, self.ordered = order, (self.whole.of_rows(order).to(self.device), mask, tables)
        return self.ordered


class Optimization:
    """Minimises the PPO loss of a batch, one optimizer step at a time.

    The batch is that of all processes: every process draws the same order and takes its rows of each minibatch, so that
    a minibatch holds the same rows however many processes there are.

    What a minibatch gives is read by the host where a pass ends (with early_stopping) or all passes: what has to be
    skipped is skipped by the device.
    """

    def __init__(
        self,
        config: PPOConfig,
        accelerator: Accelerator,
        policy: PolicyWithValueHead,
        optimizer: torch.optim.Optimizer,
        padding: Padding | None,
        device: Device,
        sharded: bool = False,
    ) -> None:
        self.config, self.accelerator, self.policy, self.optimizer = config, accelerator, policy, optimizer
        self.model = policy if sharded else accelerator.prepare_model(policy, device_placement=False)
        self.sharded = sharded
        if padding is not None:
            self.model = device.training(self.model)
        self.on, self.device = device, device_of(policy.pretrained_model)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.padding = padding
        self.minibatches: Minibatches | None = None
        self.written: Llama | None = None
        one, plain = accelerator.num_processes == 1, padding is None and policy.critic is None
        self.may_be_written = one and plain and policy.packs
        self.learned: Gradients | None = None

    def advance(self, update: Update) -> bool:
        """One optimizer step; false where ppo_epochs passes are done, or early_stopping ended them."""
        config, world = self.config, self.accelerator.num_processes
        assert config.global_backward_batch_size is not None
        if update.position == len(update.order):
            if update.order:
                update.epoch += 1
                if update.epoch == config.ppo_epochs or self._went_too_far(update):
                    self.minibatches = None
                    return False
            update.order, update.position = self._permutation(config.batch_size * world), 0
        last = min(update.position + config.global_backward_batch_size, len(update.order))
        used = self._accumulate(update, last)
        update.norms.append(self._apply_gradients(used))
        update.position = last
        update.optimizer_steps += 1
        return True

    def _went_too_far(self, update: Update) -> bool:
        """Whether the mean KL (k3) of the pass that just ended exceeds 1.5 target_kl."""
        if not self.config.early_stopping:
            return False
        of_pass = update.seen[-(self.config.batch_size // self.config.mini_batch_size) :]
        kl = torch.stack([stats[update.names.index("ppo/policy/kl3")] for stats in of_pass]).mean()
        return bool(kl > 1.5 * self.config.target_kl)

    def _accumulate(self, update: Update, last: int) -> Tensor:
        """Add up the gradients of the minibatches to the row before ``last``; returns how many counted, 0-d."""
        config, world, rank = self.config, self.accelerator.num_processes, self.accelerator.process_index
        size, used = config.mini_batch_size, torch.zeros((), device=self.device)
        minibatches = self._on_device(update.experience)
        # What is written out has no dropout.
        with nullcontext() if self.written else evaluating(self.model):
            for start in range(update.position, last, size * world):
                goes_on = start + size * world < last
                with self.accelerator.no_sync(self.model) if goes_on else nullcontext():
                    here = start + rank * size
                    used = used + self._minibatch(update, minibatches, here, min(here + size, last))
        return used

    def _on_device(self, experience: Experience) -> Minibatches:
        if self.minibatches is None or self.minibatches.experience is not experience:
            self.minibatches = Minibatches(experience, self.padding, self.policy, self.device)
            self.written = self._written_out()
        return self.minibatches

    def _minibatch(self, update: Update, minibatches: Minibatches, first: int, last: int) -> Tensor:
        """Add up the gradients of the rows from ``first`` to before ``last`` of the pass, zeros where it is skipped.

        Returns whether it counted, a 0-d tensor.
        """
        config = self.config
        sequences, lengths, tables = minibatches.of(update.order, first, last)
        outputs, learn = self._forward(sequences, update.temperature)
        logprobs, values, entropy = (_as_rows(flat, lengths, last - first) for flat in outputs)
        loss = ppo_loss(
            logprobs=logprobs,
            values=values,
            entropy=entropy,
            old_logprobs=tables["logprobs"],
            old_values=tables["values"],
            advantages=tables["advantages"],
            returns=tables["returns"],
            mask=tables["mask"],
            cliprange=config.cliprange,
            cliprange_value=config.cliprange_value,
            vf_coef=config.vf_coef,
            ratio_threshold=config.ratio_threshold,
            reduce=self._reduce,
        )
        if self.written is None or not bool(loss.skip):
            # Each process has its part of the sum, and the processes' gradients are averaged.
            scale = self.accelerator.num_processes / config.gradient_accumulation_steps
            kept = None if lengths is None else length_mask(lengths, self.device)
            parts = [gradient * scale for gradient in (loss.of_logprobs, loss.of_values)]
            learn(*(part.flatten() if kept is None else part[kept] for part in parts))
        self.on.mark_step()
        update.names = [*loss.stats, SKIPPED]
        update.seen.append(torch.stack([*loss.stats.values(), loss.skip.float()]))
        return (~loss.skip).float()

    def _written_out(self) -> Llama | None:
        """The policy's layers, written out; None where autograd is needed."""
        if not self.may_be_written or self.model is not self.policy:
            return None
        if any(parameter._backward_hooks for parameter in self.policy.parameters()):
            return None
        return written_out(self.policy.pretrained_model)

    def _forward(self, sequences: Sequences, temperature: float) -> tuple[list[Tensor], Learn]:
        """Log-probabilities, values and entropies (n,), and what takes the gradients of the first two."""
        if self.written is not None:
            one = Pass(self.written, self.policy.v_head, sequences, temperature)
            return [one.logprobs, one.values, one.entropy], lambda *gradients: self._learn(one.learn(*gradients))
        # A model that accelerate prepared does this by itself.
        with self.accelerator.autocast() if self.sharded else nullcontext():
            outputs = self.model(sequences, temperature)
        return [output.detach() for output in outputs], lambda *gradients: torch.autograd.backward(
            outputs[:2], gradients
        )

    def _learn(self, gradients: Gradients) -> None:
        """Keep ``gradients`` for the optimizer, as products where it takes them so and nothing else needs them."""
        several, clipped = self.config.gradient_accumulation_steps > 1, self.config.max_grad_norm is not None
        if several or clipped or not takes(self.optimizer):
            gradients.materialize()
        else:
            self.learned = gradients

    def _apply_gradients(self, used: Tensor) -> Tensor:
        """One optimizer step, clipped on every step; returns the gradient's norm, and 1 where any minibatch counted.

        It is not taken where none did, or the gradient isn't finite.
        """
        learned, self.learned = self.learned, None
        if learned is not None and learned.small:
            return torch.stack([learned.step_at_once(self.optimizer), used])
        if learned is not None and bool(torch.isfinite(learned.bound())):
            return torch.stack([learned.step(self.optimizer), used])
        if learned is not None:
            learned.materialize()
        parameters = [p for p in self.policy.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        whole_norm = everywhere(norm)
        skip = (used == 0) | ~torch.isfinite(whole_norm)
        if self.config.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.config.max_grad_norm, norm)
        step_unless(self.optimizer, skip)
        self.optimizer.zero_grad(set_to_none=True)
        self.on.mark_step()
        return torch.stack([whole_norm, (used > 0).float()])

    @property
    def _reduce(self) -> Reduce | None:
        if self.accelerator.num_processes == 1:
            return None
        return lambda tensor: self.accelerator.reduce(tensor, reduction="sum")

    def _permutation(self, size: int) -> list[int]:
        return torch.randperm(size, generator=self.generator).tolist()


def _named(tables: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """``tables`` (rows, kinds, tokens) by their names, and the mask."""
    return {**dict(zip(LEARNED_FROM, tables.unbind(1), strict=True)), "mask": mask}


def _as_rows(flat: Tensor, lengths: list[int] | None, rows: int) -> Tensor:
    """What ``flat`` (n,) has of each row, (rows, longest of ``lengths``, or n / rows)."""
    return flat.view(rows, -1) if lengths is None else pad_rows(list(flat.split(lengths)))
