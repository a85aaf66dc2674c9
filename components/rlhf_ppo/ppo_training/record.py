"""What training tells while it runs and leaves at its end."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from rlhf_ppo.artifacts import write_json
from rlhf_ppo.events import emit
from rlhf_ppo.parameters import RunSettings
from rlhf_ppo.ppo import PPOTrainer, StepReport
from rlhf_ppo.ppo_training.policy_files import TRAINING
from rlhf_ppo.provenance import provenance
from rlhf_ppo.tracking import Tracker

LAST = 5
"""PPO steps whose mean score stands for the end of training."""


class Recorder:
    """Tells of every step, where it is given a tracker, and remembers the history over interruptions."""

    def __init__(self, settings: RunSettings, trainer: PPOTrainer, tracker: Tracker | None, run_id: str) -> None:
        self.settings, self.trainer, self.tracker, self.run_id = settings, trainer, tracker, run_id
        self.lines: list[dict[str, float]] = []
        self.best_score, self.best_step = -math.inf, -1
        self.seconds_before = 0.0
        self.started = time.monotonic()

    def state(self) -> dict[str, Any]:
        """What must survive an interruption."""
        return {
            "run_id": self.run_id,
            "lines": self.lines,
            "best_score": self.best_score,
            "best_step": self.best_step,
            "seconds": self._seconds(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``; a pipeline run that is not the one that wrote it is told of the steps before, too."""
        self.lines, self.seconds_before = state["lines"], state["seconds"]
        self.best_score, self.best_step = state["best_score"], state["best_step"]
        if state["run_id"] != self.run_id and self.tracker is not None:
            for line in self.lines:
                self.tracker.log_metrics({n: v for n, v in line.items() if n != "step"}, step=int(line["step"]))

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def record(self, report: StepReport) -> None:
        """Write one PPO step to the history, the tracker and the progress."""
        numbers = {name: float(value) for name, value in report.stats.items() if isinstance(value, (int, float))}
        self.lines.append({"step": float(report.step), **numbers})
        if self.tracker is None:
            return
        self.tracker.log_metrics(numbers, step=report.step)
        if "objective/kl_diagnosis" in report.stats:
            emit("warning", step="train_ppo", number=report.step, message=report.stats["objective/kl_diagnosis"])
        emit(
            "progress",
            step="train_ppo",
            done=report.step + 1,
            total=self.trainer.config.total_ppo_epochs,
            unit="PPO steps",
            numbers={
                "reward": numbers["env/reward_mean"],
                "kl": numbers["objective/kl"],
                "tokens/s": numbers["tokens/per_second"],
            },
        )

    def is_best(self, step: int, mean_score: float) -> bool:
        """Whether push_to_hub_if_best_kwargs asks for the policy of this step: on every compare_steps-th, if its
        samples scored higher than any before.
        """
        config = self.trainer.config
        if not config.push_to_hub_if_best_kwargs or step % config.compare_steps or mean_score <= self.best_score:
            return False
        self.best_score, self.best_step = mean_score, step
        return True

    def metrics(self) -> dict[str, float]:
        """What training came to."""
        last, scores = self.lines[-1], [line["env/reward_mean"] for line in self.lines[-LAST:]]
        return {
            "mean_score": sum(scores) / len(scores),
            "kl": last["objective/kl"],
            "ppo_steps": float(len(self.lines)),
            "seconds": self._seconds(),
        }

    def conclude(self, directory: Path, digests: dict[str, Any]) -> None:
        """Write TRAINING into the policy's ``directory``."""
        lineage = {
            "base": self.settings.ppo.model_name,
            **digests,
            **provenance(),
            "reward_model": self.settings.ppo.reward_model,
            "best_step": self.best_step if self.best_step >= 0 else None,
            "metrics": self.metrics(),
            "settings": json.loads(self.settings.to_json()),
        }
        write_json(directory / TRAINING, lineage)
