"""The PPO trainer: step-wise as users of the classic trainer know it, and a loop on top of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from rlhf_ppo.config import PPOConfig
from rlhf_ppo.devices import Device, find_device
from rlhf_ppo.errors import InputError
from rlhf_ppo.ppo.advantages import advantages_and_returns, kl_penalty, token_rewards
from rlhf_ppo.ppo.diagnosis import PAUSE, diagnose_negative_kl
from rlhf_ppo.ppo.experience import (
    Experience,
    Score,
    Update,
    earned_by_token,
    fine,
    gathered,
    response_mask,
    shaped_for,
    split_scores,
)
from rlhf_ppo.ppo.generation import sample
from rlhf_ppo.ppo.kl_control import KLController, RunningMoments
from rlhf_ppo.ppo.models import PolicyWithValueHead
from rlhf_ppo.ppo.optimization import SKIPPED, Optimization
from rlhf_ppo.ppo.rollout import (
    Rollout,
    Scorer,
    critic_values,
    response_full_kl,
    response_logprobs,
    score_with_policy,
)
from rlhf_ppo.ppo.sampling import Sampling, draw
from rlhf_ppo.ppo.sequences import Padding
from rlhf_ppo.ppo.setup import adam, make_accelerator, restore, state_of
from rlhf_ppo.ppo.sharding import Sharding
from rlhf_ppo.ppo.statistics import Clock, batch_statistics
from rlhf_ppo.ppo.tensors import masked_sum, pad_rows


class PPOTrainer:
    """PPO with a KL penalty to a reference (Ziegler et al. 2019), after TRL's classic trainer.

    ``reference`` is a frozen model; None takes the policy without its adapters. ``sampling`` is how ``generate``
    samples; its temperature is the policy's also where log-probabilities are computed. ``optimizer`` replaces Adam;
    ``lr_scheduler`` advances once per ``step``. ``controller_kl`` is the estimate of the KL that the adaptive
    coefficient reads (as kl_penalty; "kl" is ITREX' rule, TRL reads what kl_penalty names). ``missing_eos_penalty`` is
    subtracted from the score of a response that does not end. ``critic_learning_rate`` is that of a separate critic.
    ``between_updates`` is called wherever ``state_dict`` may be taken: after every optimizer step. ``device`` is found
    by use_habana where it is not given. ``sharded`` spreads models and optimizer over all processes (FSDP2); it needs
    pad_for_acceleration, and what ``state_dict`` then holds of them is this process' part.

    With several processes each has its own ``batch_size`` samples; what is computed from them is gathered first, so
    that statistics, whitening, minibatches and every decision are the same on all, and as on one process with all the
    samples. Raises InputError where config and models don't go together.
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
        controller_kl: str = "kl",
        missing_eos_penalty: float = 0.0,
        critic_learning_rate: float | None = None,
        between_updates: Callable[[], None] | None = None,
        device: Device | None = None,
        sharded: bool = False,
    ) -> None:
        if reference is None and not policy.is_peft_model:
            raise InputError("reference=None needs a policy with adapters (model_lora_r > 0): give a reference model")
        self.on = device or find_device(config.use_habana)
        set_seed(config.seed)
        self.accelerator = make_accelerator(config, self.on)
        self.config = config.at_run_time(
            world_size=self.accelerator.num_processes,
            is_encoder_decoder=policy.decoder_start is not None,
            is_peft_model=policy.is_peft_model,
        )
        self.device = self.accelerator.device
        if self.device.type != self.on.device.type:
            if config.use_habana:
                raise InputError(f"use_habana=True, but accelerator_kwargs put the training on {self.device}")
            self.on = Device()
        self.tokenizer = tokenizer
        self.sampling = sampling or Sampling.for_model(policy.pretrained_model, max_new_tokens=64)
        if missing_eos_penalty and not self.sampling.eos_token_ids:
            raise InputError(
                f"ppo_missing_eos_penalty={missing_eos_penalty}: the model names no end token, so that no response "
                "ever ends: set 0, or eos_token_id in the model's generation_config.json"
            )
        self.policy = policy
        self.reference = None if reference is None else reference.eval().requires_grad_(False)
        for model in [policy] if reference is None else [policy, reference]:
            self.on.fuse(model, alone=self.accelerator.num_processes == 1)
        self.sharding: Sharding | None = None
        if sharded and self.accelerator.num_processes > 1:
            if not config.pad_for_acceleration or optimizer is not None:
                raise InputError("sharded=True needs pad_for_acceleration=True, and makes the optimizer by itself")
            self.sharding = Sharding(self.accelerator, policy, reference)
        else:
            for model in [policy] if reference is None else [policy, reference]:
                model.to(self.device)
        self.optimizer = optimizer or adam(policy, config.learning_rate, critic_learning_rate)
        self.lr_scheduler = lr_scheduler
        self.controller_kl, self.missing_eos_penalty = controller_kl, missing_eos_penalty
        self.between_updates = between_updates
        self.padding = Padding(config.pad_max_input_len, config.pad_max_len) if config.pad_for_acceleration else None
        self.optimization = Optimization(
            self.config, self.accelerator, policy, self.optimizer, self.padding, self.on, self.sharded
        )
        self.scorer: nn.Module | None = None
        if self.padding is not None and not self.sharded:
            self.scorer = self.on.inference(Scorer(policy.pretrained_model if reference is None else reference))
        self.kl_controller = KLController(config.init_kl_coef, config.target, config.horizon, config.adap_kl_ctrl)
        self.moments = RunningMoments()
        # In the same state on all processes; of what is drawn each takes its own rows.
        self.sampling_generator = torch.Generator().manual_seed(config.seed)
        self.steps_done = self.next_diagnosis = 0
        self.current: Update | None = None
        self.last_update: Update | None = None

    # 1. Rollout

    def generate(
        self, queries: Sequence[Tensor], sampling: Sampling | None = None, *, return_prompt: bool = False
    ) -> list[Tensor]:
        """Sample a response to each of the 1-D ``queries``; with ``return_prompt`` the query stands before it."""
        rollout = self._rollout(queries, sampling or self.sampling)
        if return_prompt:
            return [torch.cat(pair) for pair in zip(rollout.queries, rollout.responses, strict=True)]
        return rollout.responses

    def rollout(self, queries: Sequence[Tensor], sampling: Sampling | None = None, *, batch_size: int = 64) -> Rollout:
        """Sample a response to each of the 1-D ``queries``, with the policy's log-probabilities and values.

        Every process must give equally many; each has its own part of one stream of random numbers. Raises InputError
        for another temperature than the trainer's: ``update`` would compare with log-probabilities of that.
        """
        if sampling is not None and sampling.temperature != self.sampling.temperature:
            raise InputError(
                f"temperature={sampling.temperature:g} is not the trainer's, {self.sampling.temperature:g}, with which "
                "the update goes on: give the trainer the sampling, or take generate and step"
            )
        return self._rollout(queries, sampling or self.sampling, batch_size)

    def _rollout(self, queries: Sequence[Tensor], sampling: Sampling, batch_size: int = 64) -> Rollout:
        queries = [query.cpu() for query in queries]
        here = self.accelerator.process_index * len(queries)
        uniform = draw(len(queries) * self.accelerator.num_processes, sampling.max_new_tokens, self.sampling_generator)
        critic = self.policy.critic is not None
        with self.accelerator.autocast():
            generated = sample(
                self.policy.pretrained_model,
                queries,
                sampling,
                uniform[here : here + len(queries)],
                batch_size,
                value_head=None if critic else self.policy.v_head,
                padding=self.padding,
                mark_step=self.on.mark_step,
                agreed=self.sharding.agreed if self.sharding else bool,
                capture=None if self.sharding else self.on.capture,
            )
            values = generated.values
            if critic:
                values = critic_values(self.policy, queries, generated.responses, self.padding)
        return Rollout(queries, generated.responses, generated.logprobs, values)

    # 2. Step

    def step(
        self,
        queries: Sequence[Tensor],
        responses: Sequence[Tensor],
        scores: Sequence[Score],
        response_masks: Sequence[Tensor] | None = None,
    ) -> dict[str, Any]:
        """One PPO step on ``batch_size`` 1-D queries, 1-D responses and what each earned; returns the statistics.

        A score is one number, or one for each token of the response. ``response_masks`` are true for the tokens that
        are the policy's own: only these are trained, and are time steps of the advantages.
        """
        started = time.perf_counter()
        self._check_batch(len(queries), len(responses), len(scores))
        with self.accelerator.autocast():
            scored = score_with_policy(
                self.policy,
                [query.cpu() for query in queries],
                [response.cpu() for response in responses],
                temperature=self.sampling.temperature,
                padding=self.padding,
            )
        masks = None if response_masks is None else [mask.cpu() for mask in response_masks]
        rollout = Rollout(scored.queries, scored.responses, scored.logprobs, scored.values, masks)
        self.begin_update(rollout, scores, {"time/ppo/second_pass": time.perf_counter() - started})
        return self.finish_update()

    def update(
        self, rollout: Rollout, scores: Sequence[Score], extra: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """One PPO step on what ``rollout`` gave: no second pass of the policy is needed; returns the statistics.

        ``extra`` is put among them.
        """
        self.begin_update(rollout, scores, extra)
        return self.finish_update()

    def begin_update(self, rollout: Rollout, scores: Sequence[Score], extra: Mapping[str, Any] | None = None) -> None:
        """The first half of ``update``: all that comes before the weights change. Makes ``current``."""
        self._check_batch(len(rollout.queries), len(rollout.responses), len(scores))
        update = self._begin(rollout, scores)
        update.extra |= extra or {}
        self.current = update

    def finish_update(self) -> dict[str, Any]:
        """The second half of ``update``, from wherever it was interrupted; returns the statistics."""
        update, clock = self.current, Clock()
        if update is None:
            raise RuntimeError("no PPO step is under way: call begin_update")
        while self.optimization.advance(update):
            if self.between_updates is not None:
                self.between_updates()
        clock.lap("time/ppo/optimize_step")
        stats = self._conclude(update)
        clock.lap("time/ppo/calc_stats")
        stats |= clock.times
        return {**stats, "time/ppo/total": sum(value for name, value in stats.items() if name.startswith("time/ppo/"))}

    def _check_batch(self, queries: int, responses: int, scores: int) -> None:
        if not queries == responses == scores == self.config.batch_size:
            raise InputError(
                f"step got {queries} queries, {responses} responses and {scores} scores: "
                f"batch_size={self.config.batch_size} of each are needed"
            )

    # 3. Rewards and advantages

    def _begin(self, rollout: Rollout, scores: Sequence[Score]) -> Update:
        clock = Clock()
        columns = self._reference_rows(rollout, full="full" in (self.config.kl_penalty, self.controller_kl))
        totals, by_token = split_scores(scores, rollout)
        rollout, columns, totals, by_token = gathered(self.accelerator, rollout, columns, totals, by_token)
        clock.lap("time/ppo/forward_pass")
        raw_scores = torch.tensor(totals)
        fined, mask = raw_scores, response_mask(rollout, self._width)
        if self.missing_eos_penalty:
            ended = rollout.ended(self.sampling.eos_token_ids)
            fined = fine(raw_scores, by_token, ended, mask, self.missing_eos_penalty)
        shaped, factor = shaped_for(self.config, fined, self.moments, by_token is not None)
        earned = earned_by_token(shaped, factor, by_token, mask)
        experience = self._experience(rollout, mask, earned, columns)
        kls = self._kl(experience.logprobs, experience.ref_logprobs, columns, self.controller_kl)
        kl = float(masked_sum(kls, mask)) / len(totals)
        update = Update(experience, self.sampling.temperature, shaped, raw_scores, kl)
        if self.steps_done >= self.next_diagnosis:
            with self.accelerator.autocast():
                note = diagnose_negative_kl(self.policy.pretrained_model, experience, self.sampling, self.padding)
            if note:
                update.extra["objective/kl_diagnosis"] = note
                self.next_diagnosis = self.steps_done + PAUSE
        clock.lap("time/ppo/compute_advantages")
        update.extra |= clock.times
        return update

    def _reference_rows(self, rollout: Rollout, *, full: bool) -> dict[str, list[Tensor]]:
        """The reference's log-probabilities and, where it is asked for, the exact KL per token."""
        temperature, padding = self.sampling.temperature, self.padding
        queries, responses = rollout.queries, rollout.responses
        with self.accelerator.autocast():
            with self._reference_model() as reference:
                logprobs = response_logprobs(
                    reference, queries, responses, temperature=temperature, padding=padding, scorer=self.scorer
                )
            if not full:
                return {"ref": logprobs}
            policy = self.policy.pretrained_model
            exact = response_full_kl(
                policy, self._reference_model, queries, responses, temperature=temperature, padding=padding
            )
        return {"ref": logprobs, "full": exact}

    def _experience(
        self, rollout: Rollout, mask: Tensor, earned: Tensor, columns: dict[str, list[Tensor]]
    ) -> Experience:
        logprobs, ref_logprobs, values = (
            torch.where(mask, pad_rows(rows, 0, self._width), 0)
            for rows in (rollout.logprobs, columns["ref"], rollout.values)
        )
        penalties = self._kl(logprobs, ref_logprobs, columns, self.config.kl_penalty)
        rewards = token_rewards(earned, penalties, mask, self.kl_controller.value)
        advantages, returns = advantages_and_returns(
            values,
            rewards,
            mask,
            gamma=self.config.gamma,
            lam=self.config.lam,
            whiten_rewards=self.config.whiten_rewards,
        )
        return Experience(rollout, mask, logprobs, ref_logprobs, values, earned, rewards, advantages, returns)

    def _kl(self, logprobs: Tensor, ref_logprobs: Tensor, columns: dict[str, list[Tensor]], kind: str) -> Tensor:
        return pad_rows(columns["full"], 0, self._width) if kind == "full" else kl_penalty(logprobs, ref_logprobs, kind)

    # 4. Statistics

    def _conclude(self, update: Update) -> dict[str, Any]:
        """The statistics of the step; the KL coefficient and the scheduler go on."""
        ended = update.experience.rollout.ended(self.sampling.eos_token_ids)
        # The one read of what the device measured.
        measured = torch.cat([*update.seen, *update.norms]).tolist()
        minibatches, width = len(update.seen), len(update.names)
        columns = [measured[place : minibatches * width : width] for place in range(width)]
        norms = measured[minibatches * width :]
        counted = [norm for norm, any_used in zip(norms[::2], norms[1::2], strict=True) if any_used]
        means = {name: math.fsum(column) / minibatches for name, column in zip(update.names, columns, strict=True)}
        stats: dict[str, Any] = {
            **means,
            **batch_statistics(update.experience, update.scores, update.raw_scores, update.controller_kl),
            **update.extra,
            "objective/kl_coef": self.kl_controller.value,
            "ppo/learning_rate": self.optimizer.param_groups[0]["lr"],
            SKIPPED: round(means[SKIPPED] * minibatches),
            "ppo/policy/minibatches": minibatches,
            "ppo/grad_norm": sum(counted) / len(counted) if counted else 0.0,
            "tokens/responses_ended": sum(ended) / len(ended),
        }
        self.kl_controller.update(update.controller_kl, len(update.scores))
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        self.steps_done += 1
        self.current, self.last_update = None, update
        if self.config.optimize_device_cache:
            self.on.release_cache()
        return stats

    def log_stats(self, stats: dict[str, Any], step: int | None = None) -> None:
        """Send the numbers among ``stats`` to the tracker that config.log_with names."""
        numbers = {name: value for name, value in stats.items() if isinstance(value, (int, float))}
        self.accelerator.log(numbers, step=self.steps_done if step is None else step)

    def close(self, *, failed: bool = False) -> None:
        """End the trackers and the processes' connection; nothing can be trained any more.

        Cards end a connection with all its processes only: where this one has ``failed`` it leaves that to its own end,
        after which the launcher ends the others.
        """
        # The connection must not be ended by the last reference to the distributed model: torch then waits for a thread
        # that waits for Python's lock.
        self.optimization.model = self.policy
        self.accelerator.free_memory()
        if failed and self.accelerator.num_processes > 1 and self.on.backend != "gloo":
            for tracker in self.accelerator.trackers:
                tracker.finish()
        else:
            self.accelerator.end_training()

    # State

    def state_dict(self) -> dict[str, Any]:
        """All that decides how training goes on, the same on every process: nested dicts of tensors and numbers.

        May be taken between steps and, in ``between_updates``, within one. The global random states of Python, NumPy
        and torch, which differ by process, are not in it: see ``rlhf_ppo.ppo.randomness``.
        """
        return {
            **state_of(self.policy, self.optimizer, self.lr_scheduler),
            "kl_coef": self.kl_controller.value,
            "moments": dict(vars(self.moments)),
            "sampling_generator": self.sampling_generator.get_state(),
            "order_generator": self.optimization.generator.get_state(),
            "steps_done": self.steps_done,
            "next_diagnosis": self.next_diagnosis,
            "current": None if self.current is None else self.current.state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``. Raises InputError where it is of another policy."""
        restore(state, self.policy, self.optimizer, self.lr_scheduler)
        self.kl_controller.value = state["kl_coef"]
        self.moments = RunningMoments(**state["moments"])
        self.sampling_generator.set_state(state["sampling_generator"])
        self.optimization.generator.set_state(state["order_generator"])
        self.steps_done, self.next_diagnosis = state["steps_done"], state.get("next_diagnosis", 0)
        current = state["current"]
        self.current = None if current is None else Update.from_state(current, self.device)

    @property
    def sharded(self) -> bool:
        """Whether the models are spread over the processes."""
        return self.sharding is not None

    def whole_policy(self) -> PolicyWithValueHead | None:
        """The policy with all of its weights, to be saved; on the main process only where it is spread.

        All processes must call it.
        """
        found: PolicyWithValueHead | None = self.policy
        if self.sharding is not None:
            found = self.sharding.whole(self.policy)
        return found

    @property
    def _width(self) -> int | None:
        """Of the experience's arrays, where it is fixed."""
        return self.padding.response if self.padding else None

    @contextmanager
    def _reference_model(self) -> Iterator[nn.Module]:
        if self.reference is not None:
            yield self.reference
        else:
            with self.policy.pretrained_model.disable_adapter():  # type: ignore[operator]
                yield self.policy.pretrained_model
