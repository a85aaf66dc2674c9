"""When training's state is kept, where, and how it goes on from there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object

from rlhf_ppo.artifacts import digest_of
from rlhf_ppo.checkpoint import MANIFEST, CheckpointStore, DamagedCheckpoint
from rlhf_ppo.config_validation import sources
from rlhf_ppo.errors import InputError
from rlhf_ppo.events import emit
from rlhf_ppo.fields import parameters_of
from rlhf_ppo.parameters import GROUPS, RunSettings, encode
from rlhf_ppo.ppo import PolicyWithValueHead, PPOTrainer
from rlhf_ppo.ppo.randomness import random_state, set_random_state
from rlhf_ppo.ppo_training.policy_files import save_policy
from rlhf_ppo.ppo_training.record import Recorder
from rlhf_ppo.preemption import Preemption
from rlhf_ppo.volume import CHECKPOINTS_VARIABLE

DECIDING_GROUPS = ("ppo", "model", "reward", "rollout", "algorithm")
NOT_DECIDING = frozenset(
    "exp_name log_with task_name model_name model_revision query_dataset remove_unused_columns tracker_kwargs "
    "project_kwargs tracker_project_name optimize_device_cache reward_deadline_seconds".split()
)
"""Parameters that leave the trained weights as they are, or that the digests of the inputs stand for."""


class Stopped(RuntimeError):
    """Training was told to stop, and says where it goes on."""


class Keeper:
    """Writes checkpoints of the trainer and the recorder, and takes training up from the latest."""

    def __init__(
        self,
        settings: RunSettings,
        trainer: PPOTrainer,
        recorder: Recorder,
        preemption: Preemption,
        digests: dict[str, Any],
        beside: Path,
    ) -> None:
        self.trainer, self.recorder, self.preemption = trainer, recorder, preemption
        self.every = settings.checkpoint.checkpoint_every
        accelerator = trainer.accelerator
        # One process looks: weights can be large.
        contents = [contents_of(settings) if accelerator.is_main_process else {}]
        if accelerator.num_processes > 1:
            broadcast_object_list(contents)
        identity = identity_of(settings, {**digests, **contents[0]}, accelerator.num_processes, trainer.sharded)
        place = settings.checkpoint.checkpoint_dir or os.environ.get(CHECKPOINTS_VARIABLE) or str(beside)
        name = settings.checkpoint.checkpoint_name or f"{digest_of(identity)[:16]}"
        parts = accelerator.num_processes if trainer.sharded else 0
        self.store = CheckpointStore(
            Path(place) / name, identity, settings.checkpoint.checkpoint_keep, accelerator.process_index, parts
        )
        self.resumed_at: int | None = None

    def resume(self) -> None:
        """Take up the latest whole checkpoint, if there is one. Raises InputError for one of another training."""
        accelerator = self.trainer.accelerator
        found: list[str | InputError | None] = [self._latest() if accelerator.is_main_process else None]
        if accelerator.num_processes > 1:
            broadcast_object_list(found)
        name = found[0]
        if isinstance(name, InputError):
            raise name
        if name is None:
            return
        state = self.store.read(name)
        self.trainer.load_state_dict(state["trainer"])
        self.recorder.load_state(state["recorder"])
        set_random_state(state["random"][accelerator.process_index], self.trainer.on)
        self.resumed_at = self.trainer.steps_done
        if accelerator.is_main_process:
            emit("resumed", step="train_ppo", done=self.resumed_at, checkpoint=str(self.store.directory / name))

    def _latest(self) -> str | InputError | None:
        """The latest checkpoint, or why it can't be taken: all processes must hear of it, or they would wait."""
        try:
            return self.store.latest()
        except InputError as error:
            return error

    def before_step(self, step: int) -> None:
        """Between two PPO steps: stop if that was asked for, or write a checkpoint if it is time."""
        self.preemption.check()
        if self.every and step and step % self.every == 0 and step != self.resumed_at:
            self.save()

    def save(self, *, wait: bool = False) -> bool:
        """Write a checkpoint of this moment. All processes must call it together."""
        current = self.trainer.current
        name = f"step-{self.trainer.steps_done:08d}-{0 if current is None else current.optimizer_steps:06d}"
        found = gather_object([{"random": random_state(self.trainer.on), "busy": self.store.busy}])
        main = self.trainer.accelerator.is_main_process
        if not wait and any(process["busy"] for process in found):
            if main:
                emit("checkpoint_left_out", name=name, reason="the one before is still being written")
            return False
        if not main and not self.store.parts:
            return True
        state = {
            "trainer": self.trainer.state_dict(),
            "recorder": self.recorder.state(),
            "random": [process["random"] for process in found],
        }
        return self.store.save(name, state, wait=wait)

    def before_update(self, step: int, mean_score: float) -> None:
        """Before the policy changes: keep it where its samples scored best so far and that is asked for."""
        self.store.before_change()
        if not self.recorder.is_best(step, mean_score):
            return
        policy = self.trainer.whole_policy()
        if policy is not None and self.trainer.accelerator.is_main_process:
            self.store.keep_best(step, lambda directory: save_policy(policy, self.trainer.tokenizer, directory))

    def stopped(self) -> Stopped:
        """Write a checkpoint at once; returns what to raise."""
        said = f"stopped by {self.preemption.reason} after {self.trainer.steps_done} PPO steps"
        try:
            self.save(wait=True)
        except OSError as error:
            return Stopped(f"{said}; no checkpoint could be written: {error}")
        return Stopped(f"{said}; the same training, started again, goes on from {self.store.directory}")

    def save_result(self, policy: PolicyWithValueHead, directory: Path) -> None:
        """Write the best policy, where one was asked for, or else ``policy``, into ``directory``."""
        self.store.finish_writing()
        if self.recorder.best_step >= 0:
            try:
                shutil.copytree(self.store.best(self.recorder.best_step), directory, dirs_exist_ok=True)
                (directory / MANIFEST).unlink()
                return
            except DamagedCheckpoint as error:
                emit(
                    "warning",
                    step="train_ppo",
                    message=f"the best policy, of PPO step {self.recorder.best_step}, is damaged ({error}): the last "
                    "one is saved in its place",
                )
                self.recorder.best_step = -1
        save_policy(policy, self.trainer.tokenizer, directory)

    def remove(self) -> None:
        """Delete the checkpoints: the outputs are complete."""
        if self.trainer.accelerator.is_main_process:
            self.store.remove()


def contents_of(settings: RunSettings) -> dict[str, str]:
    """Digests of the code and the weights on this machine that rewards and the value head come from.

    Code is the Python files alone: a package may be written to while it scores. What can't be told is left out.
    """
    names = {str(settings.ppo.reward_model), *settings.reward.reward_sum}
    found = {name: sources.digest_of_reward(name, settings, "*.py") for name in names}
    head = settings.algorithm.ppo_value_head
    found |= {head: sources.digest(head, "")} if head else {}
    return {f"the content of {name}": digest[:16] for name, digest in found.items() if sources.is_known(digest)}


def identity_of(
    settings: RunSettings, digests: dict[str, Any], processes: int, sharded: bool = False
) -> dict[str, Any]:
    """Everything that decides the trained weights."""
    values = encode(settings)
    names = [parameter.name for group in DECIDING_GROUPS for parameter in parameters_of(GROUPS[group])]
    deciding = {name: values[name] for name in names if name not in NOT_DECIDING}
    # How the weights are spread decides how they are kept.
    return {**deciding, **digests, "processes": processes, **({"sharded": True} if sharded else {})}
