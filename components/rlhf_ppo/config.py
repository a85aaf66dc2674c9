"""PPOConfig: every field of Intel Extension for Transformers' class, with its spelling, default and real meaning.

The documented class (``intel_extension_for_transformers.transformers.ppo_config.PPOConfig``) has 48 fields and one
that its page forgot, ``pad_max_input_len``. Forty-three are settable; the trainer fills the other six.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

from rlhf_ppo.errors import InputError
from rlhf_ppo.fields import Checked, declare, parameters_of, runtime

KL_PENALTIES = ("kl", "abs", "mse", "full", "k3")
TRACKERS = ("mlflow", "wandb", "tensorboard")


@dataclass(frozen=True)
class PPOConfig(Checked):
    """The settings of PPO.

    Frozen, without side effects when imported or built. Raises InputError with every problem at once.
    Batch sizes count samples per process; KL divergences are in nats.
    """

    # Identity and tracking
    exp_name: str = declare("rlhf-ppo", "Name of the experiment; goes to the trackers, changes nothing else.")
    seed: int = declare(
        0,
        "Seed of every random choice: value head, shuffling, sampling, minibatch order.",
        minimum=0,
        maximum=2**32 - 1,
    )
    log_with: str | None = declare(
        None,
        "Tracker of the trainer beside the pipeline's own MLflow runs; mlflow asks for nothing more than those.",
        choices=TRACKERS,
    )
    task_name: str | None = declare(None, "Name of the task; a tag in the trackers, changes nothing else.")
    model_name: str | None = declare(
        None, "The model to fine-tune: a hub id, a local directory, or a GGUF file (or a directory that holds one)."
    )
    query_dataset: str | None = declare(
        None, "The prompts: a hub id, a local file or directory (json, jsonl, csv, parquet, text), or an fsspec URL."
    )
    reward_model: str | None = declare(
        None,
        "The reward: a sequence-classification model (hub id or directory), package.module:function, a callable that "
        "maps (prompts, responses) to one float each, or the http(s) address of a server that does.",
    )
    remove_unused_columns: bool = declare(
        True, "Drop the dataset's columns other than the prompt; false keeps them in the prepared data."
    )
    tracker_kwargs: dict[str, Any] = declare(
        {}, 'Arguments of the trackers by name, e.g. {"wandb": {"name": "run-1"}}.'
    )
    accelerator_kwargs: dict[str, Any] = declare(
        {}, 'Arguments of accelerate.Accelerator, e.g. {"mixed_precision": "no"}; bf16 is the default on accelerators.'
    )
    project_kwargs: dict[str, Any] = declare(
        {}, "Arguments of accelerate's ProjectConfiguration, e.g. logging_dir for tensorboard."
    )
    tracker_project_name: str = declare("trl", "Project in the trackers; the name of the MLflow experiment.")
    push_to_hub_if_best_kwargs: dict[str, Any] = declare(
        {}, "Not empty: remember the policy with the best mean score and publish that one; must hold repo_id."
    )
    # Loop sizes
    steps: int = declare(
        20000,
        "Samples to train on, per process: the loop runs ceil(steps / batch_size) PPO steps.",
        unit="samples",
        minimum=1,
    )
    # Optimisation
    learning_rate: float = declare(1e-5, "Learning rate of Adam (betas 0.9 and 0.999, no weight decay).", above=0)
    adap_kl_ctrl: bool = declare(
        True, "Adapt the KL coefficient to reach target; false keeps it constant at init_kl_coef."
    )
    init_kl_coef: float = declare(0.2, "KL coefficient at the start.", minimum=0)
    kl_penalty: str = declare(
        "kl",
        "Penalty per token: kl = logp - ref_logp (k1); abs = its absolute value; mse = half its square (k2); "
        "full = exact KL over the vocabulary; k3 = exp(-kl) - 1 + kl, never negative.",
        choices=KL_PENALTIES,
    )
    target: float = declare(6.0, "KL that the adaptive coefficient aims at.", unit="nats per response", above=0)
    horizon: float = declare(
        10000.0,
        "Time constant of the adaptive coefficient: a PPO step changes it by at most 0.2 * samples / horizon.",
        unit="samples",
        above=0,
    )
    gamma: float = declare(1.0, "Discount of rewards per token.", minimum=0, maximum=1)
    lam: float = declare(0.95, "Lambda of generalised advantage estimation.", minimum=0, maximum=1)
    cliprange: float = declare(0.2, "The probability ratio is clipped to 1 - cliprange .. 1 + cliprange.", above=0)
    cliprange_value: float = declare(
        0.2, "Largest change of a value in one update that the value loss rewards.", above=0
    )
    vf_coef: float = declare(0.1, "Weight of the value loss in the total loss.", minimum=0)
    batch_size: int = declare(256, "Samples of one PPO step, per process.", unit="samples", minimum=1)
    gradient_accumulation_steps: int = declare(
        1, "Minibatches whose gradients are averaged into one optimizer step.", minimum=1
    )
    mini_batch_size: int = declare(
        1, "Samples in one forward and backward pass, per process.", unit="samples", minimum=1
    )
    ppo_epochs: int = declare(4, "Passes over each batch of rollouts.", minimum=1)
    max_grad_norm: float | None = declare(
        None, "Clip the gradient's global norm to this, on every optimizer step; off by default.", above=0
    )
    early_stopping: bool = declare(
        False,
        "End the passes over a batch once a pass' mean KL (k3) between old and new policy exceeds 1.5 * target_kl.",
    )
    target_kl: float = declare(1.0, "KL per token for early_stopping.", unit="nats per token", above=0)
    compare_steps: int = declare(
        1,
        "With push_to_hub_if_best_kwargs: compare the mean score on every n-th PPO step.",
        unit="PPO steps",
        minimum=1,
    )
    ratio_threshold: float = declare(
        10.0, "Skip a minibatch whose mean probability ratio exceeds this: it contributes no gradient.", above=1
    )
    use_score_scaling: bool = declare(
        False, "Divide scores by the standard deviation of all scores so far, those of the batch included."
    )
    use_score_norm: bool = declare(False, "With use_score_scaling: subtract the running mean first.")
    score_clip: float | None = declare(
        None, "Clip scores, after scaling, to -score_clip .. score_clip; off by default.", above=0
    )
    whiten_rewards: bool = declare(
        False,
        "Scale the rewards per token, KL penalty included, to variance 1 around their mean before advantages.",
    )
    # Devices
    optimize_device_cache: bool = declare(
        False, "Return unused GPU memory after each PPO step; nothing can be returned on a CPU or on Gaudi."
    )
    use_habana: bool = declare(False, "Run on Gaudi (HPU); an error where there is none.")
    pad_for_acceleration: bool = declare(
        False, "Pad prompts to pad_max_input_len and sequences to pad_max_len, so that every step has the same shapes."
    )
    pad_max_len: int = declare(
        0, "With pad_for_acceleration: length of prompt and response together.", unit="tokens", minimum=0
    )
    pad_max_input_len: int = declare(0, "With pad_for_acceleration: length of the prompt.", unit="tokens", minimum=0)
    # Filled at run time
    is_encoder_decoder: bool | None = runtime("The policy is an encoder-decoder model.")
    is_peft_model: bool | None = runtime("The policy is trained through adapters.")
    backward_batch_size: int | None = runtime("mini_batch_size * gradient_accumulation_steps.")
    world_size: int | None = runtime("Number of training processes.")
    global_backward_batch_size: int | None = runtime("backward_batch_size * world_size.")
    global_batch_size: int | None = runtime("batch_size * world_size.")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "backward_batch_size", self.mini_batch_size * self.gradient_accumulation_steps)

    @property
    def total_ppo_epochs(self) -> int:
        """PPO steps in the whole run: ceil(steps / batch_size)."""
        return math.ceil(self.steps / self.batch_size)

    def relations(self) -> list[str]:
        """The problems that concern more than one field."""
        found = []
        if self.batch_size % (self.mini_batch_size * self.gradient_accumulation_steps):
            found.append(
                f"batch_size={self.batch_size} is not a multiple of mini_batch_size={self.mini_batch_size} "
                f"× gradient_accumulation_steps={self.gradient_accumulation_steps}"
            )
        if self.use_score_norm and not self.use_score_scaling:
            found.append("use_score_norm=True has no effect without use_score_scaling=True: set both, or neither")
        if self.push_to_hub_if_best_kwargs and not self.push_to_hub_if_best_kwargs.get("repo_id"):
            found.append(
                f"push_to_hub_if_best_kwargs={self.push_to_hub_if_best_kwargs!r} needs repo_id, e.g. "
                '{"repo_id": "me/my-model"}'
            )
        for name in ("log_with", "gradient_accumulation_steps", "project_config"):
            if name in self.accelerator_kwargs:
                found.append(f"accelerator_kwargs has {name!r}, which has a parameter of its own: remove it")
        if self.log_with == "tensorboard" and not self.project_kwargs.get("logging_dir"):
            found.append('log_with=\'tensorboard\' needs project_kwargs with logging_dir, e.g. {"logging_dir": "logs"}')
        return found + self._padding_problems()

    def _padding_problems(self) -> list[str]:
        if not self.pad_for_acceleration:
            return [
                f"{name}={getattr(self, name)} has no effect without pad_for_acceleration=True: set both, or neither"
                for name in ("pad_max_len", "pad_max_input_len")
                if getattr(self, name)
            ]
        if 0 < self.pad_max_input_len < self.pad_max_len:
            return []
        return [
            f"pad_max_len={self.pad_max_len}, pad_max_input_len={self.pad_max_input_len}: "
            "pad_for_acceleration=True needs 0 < pad_max_input_len < pad_max_len"
        ]

    def at_run_time(self, *, world_size: int, is_encoder_decoder: bool, is_peft_model: bool) -> PPOConfig:
        """A copy in which the run-time fields hold what the trainer found."""
        filled = copy.copy(self)
        assert self.backward_batch_size is not None
        for name, value in (
            ("world_size", world_size),
            ("is_encoder_decoder", is_encoder_decoder),
            ("is_peft_model", is_peft_model),
            ("global_backward_batch_size", self.backward_batch_size * world_size),
            ("global_batch_size", self.batch_size * world_size),
        ):
            object.__setattr__(filled, name, value)
        return filled

    def to_dict(self) -> dict[str, Any]:
        """All fields and total_ppo_epochs, with nested objects flattened by "/" as the trackers show them.

        Raises InputError where a key of a nested object holds a "/" itself.
        """
        flat: dict[str, Any] = {}
        for name, value in (*vars(self).items(), ("total_ppo_epochs", self.total_ppo_epochs)):
            _flatten(name, value, flat)
        return flat


def _flatten(name: str, value: Any, into: dict[str, Any]) -> None:
    if not isinstance(value, dict):
        into[name] = value
        return
    for key, inner in value.items():
        if "/" in key:
            raise InputError(f"{name} has the key {key!r}: a key must not contain '/'")
        _flatten(f"{name}/{key}", inner, into)


PRESETS: dict[str, dict[str, Any]] = {
    "itrex": {},
    "trl": {
        "learning_rate": 1.41e-5,
        "batch_size": 128,
        "mini_batch_size": 128,
        "model_name": "gpt2",
        "query_dataset": "stanfordnlp/imdb",
        "reward_model": "lvwerra/distilbert-imdb",
    },
}
"""Named sets of values: itrex holds the documented defaults, trl those of TRL 0.11.4 where they differ."""


def preset(name: str) -> dict[str, Any]:
    """The values of a preset. Raises InputError for an unknown name."""
    if name not in PRESETS:
        raise InputError(f"preset={name!r} is unknown: give one of {', '.join(PRESETS)}")
    return dict(PRESETS[name])


PPO_PARAMETERS = parameters_of(PPOConfig)
"""The 43 settable fields."""
