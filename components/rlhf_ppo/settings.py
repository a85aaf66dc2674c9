"""The parameters of the steps around PPO, in groups named by their prefix, and the run's settings as a whole."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ppo.config import KL_PENALTIES
from rlhf_ppo.fields import Checked, declare

_CALLABLE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class ModelSettings(Checked):
    """How the model named by ``model_name`` is loaded and adapted."""

    model_revision: str = declare("", "Hub revision of model_name: a commit, tag or branch; empty for the latest.")
    model_dtype: str = declare(
        "float32", "Number format of the policy's weights.", choices=("float32", "bfloat16", "float16")
    )
    model_lora_r: int = declare(0, "Rank of LoRA adapters; 0 trains all weights.", minimum=0)
    model_lora_alpha: int = declare(32, "Scale of LoRA adapters: their output counts alpha / r times.", minimum=1)
    model_lora_dropout: float = declare(0.0, "Dropout inside LoRA adapters.", minimum=0, maximum=1)
    model_lora_target_modules: str = declare(
        "all-linear", "Layers that get LoRA adapters: all-linear, or names separated by commas."
    )


@dataclass(frozen=True)
class DataSettings(Checked):
    """How prompts are made from the data named by ``query_dataset``."""

    data_revision: str = declare("", "Hub revision of query_dataset: a commit, tag or branch; empty for the latest.")
    data_config: str = declare("", "Configuration (subset) of a hub dataset; empty for its default.")
    data_split: str = declare("train", "Split of a hub dataset or a saved dataset.")
    data_prompt_column: str = declare("prompt", "Column that holds the prompt: a text, or chat messages.")
    data_chat_template: bool = declare(False, "Put the prompt through the model's chat template, as the user's turn.")
    data_system_prompt: str = declare("", "With data_chat_template: the system's turn before the prompt.")
    data_max_prompt_tokens: int = declare(
        512, "Longer prompts are left out (and counted), never cut.", unit="tokens", minimum=1
    )
    data_eval_fraction: float = declare(
        0.1, "Share of the prompts held out for evaluation, chosen by a hash of the prompt.", above=0, maximum=0.9
    )
    data_max_prompts: int = declare(0, "Use only the first n distinct prompts; 0 uses all.", minimum=0)

    def relations(self) -> list[str]:
        """The problems that concern more than one field."""
        if self.data_system_prompt and not self.data_chat_template:
            return [
                f"data_system_prompt={self.data_system_prompt!r} has no effect without data_chat_template=True: "
                "set both, or neither"
            ]
        return []


@dataclass(frozen=True)
class RewardSettings(Checked):
    """How the reward named by ``reward_model`` is computed."""

    reward_revision: str = declare("", "Hub revision of reward_model: a commit, tag or branch; empty for the latest.")
    reward_batch_size: int = declare(16, "Texts scored at once by a reward model.", minimum=1)
    reward_max_tokens: int = declare(
        512,
        "Longest text, prompt and response, that a reward model reads; the prompt's start is cut.",
        unit="tokens",
        minimum=1,
    )
    reward_sum: dict[str, Any] = declare(
        {},
        "More rewards and their weights, added to reward_model's score, whose own weight is 1 unless it is named here, "
        'too; e.g. {"my_rewards:length": -0.01, "org/model@revision": 0.5}.',
    )
    reward_deadline_seconds: float = declare(
        120.0,
        "Longest time for an endpoint to score reward_batch_size texts, all tries together.",
        unit="seconds",
        above=0,
    )

    def relations(self) -> list[str]:
        """The problems of the weights."""
        return [
            f"reward_sum has the weight {weight!r} for {name!r}: give a finite number other than 0"
            for name, weight in self.reward_sum.items()
            if isinstance(weight, bool)
            or not isinstance(weight, (int, float))
            or not math.isfinite(weight)
            or weight == 0
        ]


def is_callable_name(reward_model: str) -> bool:
    """Whether ``reward_model`` names a function as package.module:function."""
    return _CALLABLE.fullmatch(reward_model) is not None


def is_endpoint(reward_model: str) -> bool:
    """Whether ``reward_model`` is the address of a server."""
    return reward_model.startswith(("http://", "https://"))


def split_revision(name: str) -> tuple[str, str]:
    """The model and the revision, or an empty text, in ``model@revision``; a path that exists has none."""
    if Path(name).exists():
        return name, ""
    model, _, revision = name.partition("@")
    return model, revision


@dataclass(frozen=True)
class RolloutSettings(Checked):
    """How responses are sampled, in training and in evaluation."""

    rollout_max_new_tokens: int = declare(64, "Longest response.", unit="tokens", minimum=1)
    rollout_temperature: float = declare(
        1.0, "Temperature of sampling; log-probabilities are those of the tempered policy.", above=0
    )
    rollout_batch_size: int = declare(64, "Responses sampled at once.", minimum=1)


@dataclass(frozen=True)
class AlgorithmSettings(Checked):
    """What this trainer can do beyond PPOConfig's fields; the defaults change nothing."""

    ppo_controller_kl: str = declare(
        "kl",
        "The KL that the adaptive coefficient reads, in the terms of kl_penalty. kl is the rule of Intel's trainer; "
        "TRL's reads what kl_penalty names.",
        choices=KL_PENALTIES,
    )
    ppo_missing_eos_penalty: float = declare(
        0.0, "Subtracted from the score of a response that reaches its longest length without an end.", minimum=0
    )
    ppo_shared_layers: int = declare(
        0, "First layers, with the embeddings, that are frozen and shared with the reference in memory.", minimum=0
    )
    ppo_value_head: str = declare(
        "",
        "A value head to start from: a safetensors file, or a directory that this pipeline or TRL saved; empty starts "
        "at zero.",
    )
    ppo_separate_critic: bool = declare(
        False,
        "Learn the value in a second copy of the model, which shares no layer with the policy and isn't saved with it.",
    )
    ppo_critic_learning_rate: float | None = declare(
        None, "With ppo_separate_critic: its learning rate; off takes learning_rate.", above=0
    )

    def relations(self) -> list[str]:
        """The problems that concern more than one field."""
        if self.ppo_critic_learning_rate and not self.ppo_separate_critic:
            return [
                f"ppo_critic_learning_rate={self.ppo_critic_learning_rate} has no effect without "
                "ppo_separate_critic=True: set both, or neither"
            ]
        return []


@dataclass(frozen=True)
class CheckpointSettings(Checked):
    """How training is kept from being lost."""

    checkpoint_dir: str = declare(
        "",
        "Directory that outlives the training's container, e.g. on a mounted volume; empty takes RLHF_PPO_CHECKPOINTS, "
        "and else a place beside the step's outputs.",
    )
    checkpoint_name: str = declare(
        "",
        "Folder of this training in checkpoint_dir; empty makes a name from everything that decides the result, so "
        "that the same training, started again, goes on.",
    )
    checkpoint_every: int = declare(
        5,
        "Write a checkpoint after every n-th PPO step; 0 only when the container is told to stop.",
        unit="PPO steps",
        minimum=0,
    )
    checkpoint_keep: int = declare(2, "Latest checkpoints that are kept, besides the best policy.", minimum=1)

    def relations(self) -> list[str]:
        """The problems of a name."""
        if re.fullmatch(r"[\w.-]*", self.checkpoint_name) and self.checkpoint_name not in (".", ".."):
            return []
        return [f"checkpoint_name={self.checkpoint_name!r} is no name of a folder: use letters, digits, '.', '_', '-'"]


@dataclass(frozen=True)
class EvaluationSettings(Checked):
    """How the policy is compared with the reference on held-out prompts."""

    eval_max_prompts: int = declare(256, "Held-out prompts used.", minimum=1)
    eval_samples_per_prompt: int = declare(1, "Responses sampled for each prompt.", minimum=1)
    eval_judge: str = declare(
        "",
        "A second reward, which did not train the policy, as reward_model or model@revision: a gain that it does not "
        "see is reward hacking. Empty for none.",
    )
    eval_seed: int = declare(
        1234, "Seed of sampling in evaluation; the same for policy and reference.", minimum=0, maximum=2**32 - 1
    )


@dataclass(frozen=True)
class GateSettings(Checked):
    """What the policy must show before it is pushed."""

    gate_min_score_gain: float = declare(
        0.0, "The lower end of the 95 % interval of the score's gain must exceed this.", unit="score"
    )
    gate_min_score: float = declare(
        -1e9,
        "The lower end of the 95 % interval of the policy's own score must reach this; -1e9 is no floor.",
        unit="score",
    )
    gate_min_win_rate: float = declare(
        0.5,
        "The lower end of the 95 % interval of the share of responses that score higher than the reference's must "
        "exceed this; a tie is one half.",
        minimum=0,
        maximum=1,
    )
    gate_min_champion_gain: float = declare(
        0.0,
        "The lower end of the 95 % interval of the score's gain over the model that is published in the repository "
        "must exceed this; nothing is asked where none is.",
        unit="score",
    )
    gate_min_judge_gain: float = declare(
        -1e9,
        "With eval_judge: the lower end of the 95 % interval of its score's gain must exceed this; -1e9 is no floor.",
        unit="score of the judge",
    )
    gate_max_kl: float = declare(
        25.0,
        "The upper end of the 95 % interval of the KL to the reference must stay below this.",
        unit="nats per response",
        above=0,
    )
    gate_min_distinct2: float = declare(
        0.7, "Share of the reference's distinct-2 that the policy must keep.", minimum=0, maximum=1
    )
    gate_max_repetition: float = declare(
        0.5, "Largest share of a response's word 4-grams that may be repetitions, on average.", minimum=0, maximum=1
    )
    gate_min_prompts: int = declare(50, "Fewest held-out prompts that a verdict may rest on.", minimum=2)


@dataclass(frozen=True)
class HubSettings(Checked):
    """Where the policy is pushed."""

    hub_repo_id: str = declare("", "Repository on the hub, e.g. me/my-model; empty pushes nothing.")
    hub_private: bool = declare(True, "Create the repository as private.")
    hub_adapter: bool = declare(
        False, "With model_lora_r: push the adapter alone, to be used on top of model_name; false merges it in."
    )


@dataclass(frozen=True)
class TrackingSettings(Checked):
    """Where runs are tracked."""

    mlflow_tracking_uri: str = declare(
        "", "MLflow server or store; empty takes MLFLOW_TRACKING_URI, and locally mlflow.db beside the run."
    )
    mlflow_registered_model: str = declare(
        "",
        "Name in MLflow's model registry; empty takes hub_repo_id with -- for /, and without one registers nothing. "
        "What passes the gate becomes the model's challenger, what is pushed its champion, and the one before it "
        "previous.",
    )
    mlflow_skip_unchanged: bool = declare(
        False,
        "End early where MLflow has a run of this experiment that succeeded with the same settings, model, prompts and "
        "rewards: for scheduled runs. What a reward's endpoint serves is not looked at.",
    )

    def relations(self) -> list[str]:
        """The problems of a name."""
        name = self.mlflow_registered_model
        if not re.search(r"[/:'\\\n]", name):
            return []
        return [f"mlflow_registered_model={name!r} is no name of a model: leave out '/', ':', quotes and backslashes"]
