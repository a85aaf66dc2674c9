"""One codec between the settings of a run, KFP's parameters, the command line's text, and JSON.

At a KFP boundary None has no safe way through, so it travels as a value of the same type that is otherwise useless:
"" for texts and 0.0 for numbers.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_ppo.config import PPOConfig
from rlhf_ppo.errors import InputError
from rlhf_ppo.fields import Parameter, parameters_of
from rlhf_ppo.node_settings import NodeSettings
from rlhf_ppo.settings import (
    AlgorithmSettings,
    CheckpointSettings,
    DataSettings,
    EvaluationSettings,
    GateSettings,
    HubSettings,
    ModelSettings,
    RewardSettings,
    RolloutSettings,
    TrackingSettings,
)


@dataclass(frozen=True)
class RunSettings:
    """Everything that a run is told, checked as a whole."""

    ppo: PPOConfig
    model: ModelSettings
    data: DataSettings
    reward: RewardSettings
    rollout: RolloutSettings
    algorithm: AlgorithmSettings
    checkpoint: CheckpointSettings
    node: NodeSettings
    evaluation: EvaluationSettings
    gate: GateSettings
    hub: HubSettings
    tracking: TrackingSettings

    def __post_init__(self) -> None:
        problems = self.relations()
        if problems:
            raise InputError(problems)

    def relations(self) -> list[str]:
        """The problems that concern more than one group."""
        found = []
        for name, what in (
            ("model_name", "a hub id, a directory or a GGUF file"),
            ("query_dataset", "a hub id, a file, a directory or a URL"),
            ("reward_model", "a hub id, a directory, package.module:function, or an http(s) address"),
        ):
            if not getattr(self.ppo, name):
                found.append(f"{name} is not set: give {what}")
        for name, value in (
            ("mlflow_tracking_uri", self.tracking.mlflow_tracking_uri),
            ("query_dataset", self.ppo.query_dataset or ""),
            ("reward_model", self.ppo.reward_model or ""),
            ("eval_judge", self.evaluation.eval_judge),
            *(("reward_sum", name) for name in self.reward.reward_sum),
        ):
            # The value is not repeated: parameters, logs and errors are public.
            if re.search(r"://[^/\s]*@", value):
                found.append(
                    f"{name} holds a password, and parameters are public: leave it out and set the store's own "
                    "environment variables (MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for MLflow, "
                    "RLHF_PPO_REWARD_TOKEN for a reward)"
                )
        best = self.ppo.push_to_hub_if_best_kwargs.get("repo_id")
        if best and self.hub.hub_repo_id not in ("", best):
            found.append(
                f"hub_repo_id={self.hub.hub_repo_id!r} contradicts push_to_hub_if_best_kwargs' "
                f"repo_id={best!r}: give one of them, or the same in both"
            )
        if self.algorithm.ppo_shared_layers and self.model.model_lora_r:
            found.append(
                f"ppo_shared_layers={self.algorithm.ppo_shared_layers} has no effect with model_lora_r="
                f"{self.model.model_lora_r}, whose reference is the policy without its adapters: set one of them to 0"
            )
        if self.hub.hub_adapter and not self.model.model_lora_r:
            found.append("hub_adapter=True needs an adapter: set model_lora_r, e.g. to 16, or hub_adapter=False")
        if self.ppo.pad_for_acceleration:
            found += self._padding_problems()
        return found + self._node_problems()

    def _node_problems(self) -> list[str]:
        found, accelerator = [], self.node.node_accelerator
        if accelerator and self.ppo.use_habana != accelerator.startswith("habana.ai/"):
            found.append(
                f"use_habana={self.ppo.use_habana} contradicts node_accelerator={accelerator!r}: set "
                f"use_habana={not self.ppo.use_habana}, or name the other card"
            )
        if self.node.node_sharding:
            if not self.ppo.pad_for_acceleration:
                found.append(
                    "node_sharding=True needs pad_for_acceleration=True: all processes must make the same passes, of "
                    "the same shapes"
                )
            if self.algorithm.ppo_shared_layers:
                found.append(
                    f"ppo_shared_layers={self.algorithm.ppo_shared_layers} can't be combined with node_sharding=True: "
                    "set it to 0"
                )
        return found

    def _padding_problems(self) -> list[str]:
        found = []
        if self.data.data_max_prompt_tokens > self.ppo.pad_max_input_len:
            found.append(
                f"data_max_prompt_tokens={self.data.data_max_prompt_tokens} exceeds "
                f"pad_max_input_len={self.ppo.pad_max_input_len}: prompts would not fit, and none is ever cut"
            )
        longest = self.ppo.pad_max_input_len + self.rollout.rollout_max_new_tokens
        if longest > self.ppo.pad_max_len:
            found.append(
                f"pad_max_len={self.ppo.pad_max_len} is less than "
                f"pad_max_input_len + rollout_max_new_tokens = {longest}"
            )
        return found

    @property
    def repo_id(self) -> str:
        """The repository to push to, or an empty text."""
        return self.hub.hub_repo_id or self.ppo.push_to_hub_if_best_kwargs.get("repo_id", "")

    @property
    def registered_model(self) -> str:
        """The model in MLflow's registry; empty where nothing is registered."""
        return self.tracking.mlflow_registered_model or self.repo_id.replace("/", "--")

    def to_json(self) -> str:
        """The run's settings as one JSON object, in KFP's encoding."""
        return json.dumps(encode(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> RunSettings:
        """The inverse of ``to_json``."""
        return decode(json.loads(text))


GROUPS: dict[str, type] = {field.name: globals()[field.type] for field in dataclasses.fields(RunSettings)}  # type: ignore[index]
"""The groups of settings by name, PPOConfig first."""

PARAMETERS: dict[str, Parameter] = {
    parameter.name: parameter for group in GROUPS.values() for parameter in parameters_of(group)
}
"""Every parameter of a run by name."""


def to_kfp(parameter: Parameter, value: Any) -> Any:
    """``value`` as KFP carries it: None becomes "" or 0.0, an integer given for a float becomes a float."""
    if value is None:
        return parameter.type()
    return float(value) if parameter.type is float else value


def from_kfp(parameter: Parameter, value: Any) -> Any:
    """The inverse of ``to_kfp``; also undoes KFP's turning of integers into floats."""
    if parameter.optional and not isinstance(value, bool) and value in ("", 0.0):
        return None
    if parameter.type is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if parameter.type is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return _integral(value) if parameter.type in (dict, list) else value


def _integral(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _integral(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_integral(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def defaults() -> dict[str, Any]:
    """The default of every parameter, in KFP's encoding."""
    return {name: to_kfp(parameter, parameter.default) for name, parameter in PARAMETERS.items()}


def encode(settings: RunSettings) -> dict[str, Any]:
    """Every parameter of ``settings``, in KFP's encoding."""
    encoded = {}
    for group_name, group in GROUPS.items():
        values = getattr(settings, group_name)
        for parameter in parameters_of(group):
            encoded[parameter.name] = to_kfp(parameter, getattr(values, parameter.name))
    return encoded


def decode(values: Mapping[str, Any]) -> RunSettings:
    """The settings that ``values``, in KFP's encoding, stand for; what is absent has its default.

    Raises InputError with every problem of every group.
    """
    problems = unknown_names(values)
    groups: dict[str, Any] = {}
    for group_name, group in GROUPS.items():
        given = {p.name: from_kfp(p, values[p.name]) for p in parameters_of(group) if p.name in values}
        try:
            groups[group_name] = group(**given)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return RunSettings(**groups)


def unknown_names(names: Iterable[str]) -> list[str]:
    """A sentence for each name that is no parameter, with the nearest that is."""
    import difflib

    found = []
    for name in names:
        if name not in PARAMETERS:
            near = difflib.get_close_matches(name, PARAMETERS, n=1)
            hint = f" (did you mean {near[0]}?)" if near else "; `rlhf-ppo fields` lists them"
            found.append(f"{name} is not a parameter{hint}")
    return found


def parse_text(name: str, text: str) -> Any:
    """The value, in KFP's encoding, that ``text`` from the command line means for the parameter ``name``.

    Raises InputError for an unknown name or a text that is not of the parameter's type.
    """
    problems = unknown_names([name])
    if problems:
        raise InputError(problems)
    parameter = PARAMETERS[name]
    try:
        value = _parse(parameter, text)
    except ValueError:
        value = text
    problem = parameter.problem(from_kfp(parameter, value))
    if problem:
        raise InputError(problem)
    return to_kfp(parameter, value)


def _parse(parameter: Parameter, text: str) -> Any:
    if parameter.type is str:
        return text
    if parameter.optional and text.lower() in ("", "none", "null"):
        return None
    if parameter.type is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    return json.loads(text) if parameter.type in (dict, list) else parameter.type(text)
