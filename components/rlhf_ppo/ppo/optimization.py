"""The update of the policy: passes over the batch in minibatches, gradients, optimizer steps."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rlhf_ppo.config import PPOConfig
from rlhf_ppo.ppo.experience import Update
from rlhf_ppo.ppo.losses import MinibatchLoss, ppo_loss
from rlhf_ppo.ppo.models import PolicyWithValueHead, Sequences, evaluating
from rlhf_ppo.ppo.tensors import Reduce, pad_rows


class Optimization:
    """Minimises the PPO loss of a batch, one optimizer step at a time.

    The batch is that of all processes: every process draws the same order and takes its rows of each minibatch, so that
    a minibatch holds the same rows however many processes there are.
    """

    def __init__(
        self,
        config: PPOConfig,
        accelerator: Accelerator,
        policy: PolicyWithValueHead,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.config, self.accelerator, self.policy, self.optimizer = config, accelerator, policy, optimizer
        self.model = accelerator.prepare_model(policy)
        self.generator = torch.Generator().manual_seed(config.seed)

    def advance(self, update: Update) -> bool:
        """One optimizer step; false where ppo_epochs passes are done, or early_stopping ended them."""
        config, world = self.config, self.accelerator.num_processes
        assert config.global_backward_batch_size is not None
        if update.position == len(update.order):
            if update.order:
                update.epoch += 1
                if update.epoch == config.ppo_epochs or self._went_too_far(update):
                    return False
            update.order, update.position = self._permutation(config.batch_size * world), 0
        rows = update.order[update.position : update.position + config.global_backward_batch_size]
        with evaluating(self.model):
            used = self._accumulate(update, rows)
        if used:
            update.norms.append(float(self._apply_gradients()))
        update.position += len(rows)
        update.optimizer_steps += 1
        return True

    def _went_too_far(self, update: Update) -> bool:
        """Whether the mean KL (k3) of the pass that just ended exceeds 1.5 target_kl."""
        if not self.config.early_stopping:
            return False
        of_pass = update.seen[-(self.config.batch_size // self.config.mini_batch_size) :]
        kl = torch.stack([stats[update.names.index("ppo/policy/kl3")] for stats in of_pass]).mean()
        return bool(kl > 1.5 * self.config.target_kl)

    def _accumulate(self, update: Update, rows: list[int]) -> int:
        """Add up the gradients of the minibatches of ``rows``; returns how many counted."""
        config, world, rank = self.config, self.accelerator.num_processes, self.accelerator.process_index
        size, parts, used = config.mini_batch_size, config.gradient_accumulation_steps, 0
        for start in range(0, len(rows), size * world):
            last = start + size * world >= len(rows)
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                here = start + rank * size
                loss = self._minibatch(update, rows[here : here + size])
                update.names = list(loss.stats)
                update.seen.append(torch.stack(list(loss.stats.values())))
                skip = bool(loss.skip)
                update.skipped += skip
                used += not skip
                if not skip:
                    # Each process has its part of the sum, and the processes' gradients are averaged.
                    self.accelerator.backward(loss.total * (world / parts))
                elif world > 1 and last:
                    self.accelerator.backward(self._nothing())
        return used

    def _nothing(self) -> Tensor:
        """A loss of zero with which all processes meet, so that what they accumulated before is averaged."""
        parameters = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        return torch.stack([parameter.flatten()[0] * 0 for parameter in parameters]).sum()

    def _minibatch(self, update: Update, rows: list[int]) -> MinibatchLoss:
        experience, config = update.experience, self.config
        rollout = experience.rollout
        lengths = [len(rollout.responses[row]) for row in rows]
        sequences = Sequences.of(
            [rollout.queries[row] for row in rows],
            [rollout.responses[row] for row in rows],
            self.config.pad_max_len or None,
            self.policy.decoder_start,
        )
        outputs = self.model(sequences, update.temperature)
        logprobs, values, entropy = (pad_rows(list(flat.split(lengths))) for flat in outputs)
        width = logprobs.shape[1]

        def of(table: Tensor) -> Tensor:
            return table[rows, :width]

        return ppo_loss(
            logprobs=logprobs,
            values=values,
            entropy=entropy,
            old_logprobs=of(experience.logprobs),
            old_values=of(experience.values),
            advantages=of(experience.advantages),
            returns=of(experience.returns),
            mask=of(experience.mask),
            cliprange=config.cliprange,
            cliprange_value=config.cliprange_value,
            vf_coef=config.vf_coef,
            ratio_threshold=config.ratio_threshold,
            reduce=self._reduce,
        )

    def _apply_gradients(self) -> Tensor:
        """One optimizer step, clipped on every step, not taken where the gradient isn't finite; returns its norm."""
        parameters = [p for p in self.policy.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if bool(torch.isfinite(norm)):
            if self.config.max_grad_norm is not None:
                nn.utils.clip_grads_with_norm_(parameters, self.config.max_grad_norm, norm)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.detach()

    @property
    def _reduce(self) -> Reduce | None:
        if self.accelerator.num_processes == 1:
            return None
        return lambda tensor: self.accelerator.reduce(tensor, reduction="sum")

    def _permutation(self, size: int) -> list[int]:
        return torch.randperm(size, generator=self.generator).tolist()
