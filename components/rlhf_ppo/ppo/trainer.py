"""The PPO trainer: step-wise as users of the classic trainer know it, and a loop on top of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from torch import Tensor, nn

from rlhf_ppo.config import PPOConfig
from rlhf_ppo.errors import InputError
from rlhf_ppo.ppo.advantages import advantages_and_returns, kl_penalty, token_rewards
from rlhf_ppo.ppo.generation import Sampling, sample
from rlhf_ppo.ppo.kl_control import KLController, RunningMoments, shape_scores
from rlhf_ppo.ppo.losses import MinibatchLoss, ppo_loss
from rlhf_ppo.ppo.models import PolicyWithValueHead, Sequences, evaluating
from rlhf_ppo.ppo.rollout import Rollout, response_full_kl, response_logprobs, score_with_policy
from rlhf_ppo.ppo.statistics import Clock, batch_statistics, mean_over_minibatches
from rlhf_ppo.ppo.tensors import Reduce, length_mask, pad_rows


@dataclass(frozen=True)
class Experience:
    """One batch, ready for the update. All arrays are (batch, response); entries outside ``mask`` are 0."""

    rollout: Rollout
    mask: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor


class PPOTrainer:
    """PPO with a KL penalty to a reference (Ziegler et al. 2019), after TRL's classic trainer.

    ``reference`` is a frozen model; None takes the policy without its adapters. ``sampling`` is how ``generate``
    samples; its temperature is the policy's also where log-probabilities are computed. ``optimizer`` replaces Adam;
    ``lr_scheduler`` advances once per ``step``. Raises InputError where config and models don't go together.
    """

    def __init__(
        self,
        config: PPOConfig,
        policy: PolicyWithValueHead,
        reference: nn.Module | None,
        tokenizer: Any,
        *,
        sampling: Sampling | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        lr_scheduler: Any = None,
    ) -> None:
        if reference is None and not policy.is_peft_model:
            raise InputError("reference=None needs a policy with adapters (model_lora_r > 0): give a reference model")
        set_seed(config.seed)
        self.accelerator = _accelerator(config)
        self.config = config.at_run_time(
            world_size=self.accelerator.num_processes,
            is_encoder_decoder=False,
            is_peft_model=policy.is_peft_model,
        )
        self.device = self.accelerator.device
        if config.use_habana and self.device.type != "hpu":
            raise InputError(
                f"use_habana=True but this machine's device is {self.device.type}: run on a Gaudi node with "
                "habana_frameworks installed, or set use_habana=False"
            )
        self.tokenizer = tokenizer
        self.sampling = sampling or Sampling.for_model(policy.pretrained_model, max_new_tokens=64)
        self.policy = policy.to(self.device)
        self.reference = None if reference is None else reference.to(self.device).eval().requires_grad_(False)
        self.optimizer = optimizer or _adam(policy, config.learning_rate)
        self.lr_scheduler = lr_scheduler
        self._update_model = self.accelerator.prepare_model(self.policy)
        self.kl_controller = KLController(config.init_kl_coef, config.target, config.horizon, config.adap_kl_ctrl)
        self.moments = RunningMoments()
        # Sampling differs by process; the order of minibatches is the same everywhere.
        self.sampling_generator = torch.Generator(self.device).manual_seed(config.seed + self.accelerator.process_index)
        self.order_generator = torch.Generator().manual_seed(config.seed)
        self.steps_done = 0

    # 1. Rollout

    def generate(
        self, queries: Sequence[Tensor], sampling: Sampling | None = None, *, return_prompt: bool = False
    ) -> list[Tensor]:
        """Sample a response to each of the 1-D ``queries``; with ``return_prompt`` the query stands before it."""
        responses = self.rollout(queries, sampling).responses
        if return_prompt:
            return [torch.cat(pair) for pair in zip(queries, responses, strict=True)]
        return responses

    def rollout(self, queries: Sequence[Tensor], sampling: Sampling | None = None, *, batch_size: int = 64) -> Rollout:
        """Sample a response to each of the 1-D ``queries``, with the policy's log-probabilities and values."""
        queries = [query.to(self.device) for query in queries]
        with self.accelerator.autocast():
            generated = sample(
                self.policy.pretrained_model,
                queries,
                sampling or self.sampling,
                self.sampling_generator,
                batch_size,
                value_head=self.policy.v_head,
                prompt_length=self.config.pad_max_input_len or None,
            )
        return Rollout(queries, generated.responses, generated.logprobs, generated.values)

    # 2. Step

    def step(
        self, queries: Sequence[Tensor], responses: Sequence[Tensor], scores: Sequence[Tensor | float]
    ) -> dict[str, Any]:
        """One PPO step on ``batch_size`` 1-D queries, 1-D responses and one score each; returns the statistics."""
        started = time.perf_counter()
        if not len(queries) == len(responses) == len(scores) == self.config.batch_size:
            raise InputError(
                f"step got {len(queries)} queries, {len(responses)} responses and {len(scores)} scores: "
                f"batch_size={self.config.batch_size} of each are needed"
            )
        rollout = score_with_policy(
            self.policy,
            [query.to(self.device) for query in queries],
            [response.to(self.device) for response in responses],
            temperature=self.sampling.temperature,
            length=self._length,
        )
        stats = self.update(rollout, scores)
        stats["time/ppo/forward_pass"] += time.perf_counter() - started - stats["time/ppo/total"]
        stats["time/ppo/total"] = time.perf_counter() - started
        return stats

    def update(self, rollout: Rollout, scores: Sequence[Tensor | float]) -> dict[str, Any]:
        """One PPO step on what ``rollout`` gave: no second pass of the policy is needed; returns the statistics."""
        clock = Clock()
        raw_scores = torch.tensor([float(score) for score in scores], device=self.device)
        shaped = shape_scores(
            raw_scores,
            self.moments,
            scaling=self.config.use_score_scaling,
            center=self.config.use_score_norm,
            clip=self.config.score_clip,
            reduce=self._reduce,
        )
        ref_rows, penalty_rows = self._reference_logprobs(rollout)
        clock.lap("time/ppo/forward_pass")
        experience = self._experience(rollout, shaped, ref_rows, penalty_rows)
        clock.lap("time/ppo/compute_advantages")
        with evaluating(self._update_model):
            stats = self._optimize(experience)
        clock.lap("time/ppo/optimize_step")
        kl_coef = self.kl_controller.value
        stats.update(batch_statistics(experience, shaped, raw_scores, self._reduce))
        self.kl_controller.update(stats["objective/kl"], len(shaped) * self.accelerator.num_processes)
        stats["objective/kl_coef"] = kl_coef
        stats["ppo/learning_rate"] = self.optimizer.param_groups[0]["lr"]
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        self.steps_done += 1
        if self.config.optimize_device_cache and self.device.type == "cuda":
            torch.cuda.empty_cache()
        clock.lap("time/ppo/calc_stats")
        return {**stats, **clock.times, "time/ppo/total": clock.total}

    # 3. Rewards and advantages

    def _reference_logprobs(self, rollout: Rollout) -> tuple[list[Tensor], list[Tensor] | None]:
        """The reference's log-probabilities and, where kl_penalty is full, the exact KL per token."""
        temperature, length = self.sampling.temperature, self._length
        queries, responses = rollout.queries, rollout.responses
        with self.accelerator.autocast():
            with self._reference_model() as reference:
                logprobs = response_logprobs(reference, queries, responses, temperature=temperature, length=length)
            if self.config.kl_penalty != "full":
                return logprobs, None
            policy = self.policy.pretrained_model
            return logprobs, response_full_kl(
                policy, self._reference_model, queries, responses, temperature=temperature, length=length
            )

    def _experience(
        self, rollout: Rollout, scores: Tensor, ref_rows: list[Tensor], penalty_rows: list[Tensor] | None
    ) -> Experience:
        lengths = [len(response) for response in rollout.responses]
        mask = length_mask(lengths, self.device)
        logprobs, ref_logprobs, values = (pad_rows(rows) for rows in (rollout.logprobs, ref_rows, rollout.values))
        if penalty_rows is None:
            penalties = kl_penalty(logprobs, ref_logprobs, self.config.kl_penalty)
        else:
            penalties = pad_rows(penalty_rows)
        rewards = token_rewards(scores, penalties, mask, self.kl_controller.value)
        advantages, returns = advantages_and_returns(
            values,
            rewards,
            mask,
            gamma=self.config.gamma,
            lam=self.config.lam,
            whiten_rewards=self.config.whiten_rewards,
            reduce=self._reduce,
        )
        return Experience(rollout, mask, logprobs, ref_logprobs, values, rewards, advantages, returns)

    # 4. Optimisation

    def _optimize(self, experience: Experience) -> dict[str, Any]:
        """ppo_epochs passes over the batch in random minibatches; returns the means over all minibatches."""
        config, found, skipped, norms = self.config, [], 0, []
        assert config.backward_batch_size is not None
        for _ in range(config.ppo_epochs):
            order = self._permutation(config.batch_size)
            epoch: list[dict[str, Tensor]] = []
            for start in range(0, config.batch_size, config.backward_batch_size):
                rows = order[start : start + config.backward_batch_size]
                stats, used = self._accumulate(experience, rows)
                skipped += len(stats) - used
                epoch += stats
                if used:
                    norms.append(self._apply_gradients())
            found += epoch
            if config.early_stopping and mean_over_minibatches(epoch)["ppo/policy/kl3"] > 1.5 * config.target_kl:
                break
        means = mean_over_minibatches(found)
        means["ppo/policy/skipped_minibatches"] = skipped
        means["ppo/policy/minibatches"] = len(found)
        means["ppo/grad_norm"] = float(torch.stack(norms).mean()) if norms else 0.0
        return means

    def _accumulate(self, experience: Experience, rows: list[int]) -> tuple[list[dict[str, Tensor]], int]:
        """Add up the gradients of the minibatches of ``rows``; returns their statistics and how many counted."""
        size, parts = self.config.mini_batch_size, self.config.gradient_accumulation_steps
        stats, used = [], 0
        for start in range(0, len(rows), size):
            last = start + size >= len(rows)
            with nullcontext() if last else self.accelerator.no_sync(self._update_model):
                loss = self._minibatch(experience, rows[start : start + size])
                stats.append(loss.stats)
                skip = bool(loss.skip)
                used += not skip
                # A skipped minibatch adds nothing; with several processes all must still meet in the backward pass.
                if not skip:
                    self.accelerator.backward(loss.total / parts)
                elif self.accelerator.num_processes > 1:
                    self.accelerator.backward(torch.nan_to_num(loss.total) * 0)
        return stats, used

    def _minibatch(self, experience: Experience, rows: list[int]) -> MinibatchLoss:
        rollout, config = experience.rollout, self.config
        lengths = [len(rollout.responses[row]) for row in rows]
        sequences = Sequences.of(
            [rollout.queries[row] for row in rows], [rollout.responses[row] for row in rows], self._length
        )
        outputs = self._update_model(sequences.input_ids, sequences.index, sequences.tokens, self.sampling.temperature)
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

    def log_stats(self, stats: dict[str, Any], step: int | None = None) -> None:
        """Send the numbers among ``stats`` to the tracker that config.log_with names."""
        numbers = {name: value for name, value in stats.items() if isinstance(value, (int, float))}
        self.accelerator.log(numbers, step=self.steps_done if step is None else step)

    # Processes, shapes, order

    @property
    def _reduce(self) -> Reduce | None:
        if self.accelerator.num_processes == 1:
            return None
        return lambda tensor: self.accelerator.reduce(tensor, reduction="sum")

    @property
    def _length(self) -> int | None:
        return self.config.pad_max_len or None

    def _permutation(self, size: int) -> list[int]:
        return torch.randperm(size, generator=self.order_generator).tolist()

    @contextmanager
    def _reference_model(self) -> Iterator[nn.Module]:
        if self.reference is not None:
            yield self.reference
        else:
            with self.policy.pretrained_model.disable_adapter():  # type: ignore[operator]
                yield self.policy.pretrained_model


def _accelerator(config: PPOConfig) -> Accelerator:
    project = ProjectConfiguration(**config.project_kwargs) if config.project_kwargs else None
    accelerator = Accelerator(log_with=config.log_with, project_config=project, **config.accelerator_kwargs)
    if config.log_with is not None:
        settings = {
            name: value if isinstance(value, (int, float)) else str(value) for name, value in config.to_dict().items()
        }
        accelerator.init_trackers(config.tracker_project_name, config=settings, init_kwargs=config.tracker_kwargs)
    return accelerator


def _adam(policy: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    return torch.optim.Adam(parameters, lr=learning_rate, fused=fused or None)
