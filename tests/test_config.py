"""PPOConfig is the documented class, checked; and the codec loses nothing on its way through KFP."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from rlhf_ppo.config import PPO_PARAMETERS, PRESETS, PPOConfig, preset
from rlhf_ppo.errors import InputError
from rlhf_ppo.fields import parameters_of, runtime_fields_of
from rlhf_ppo.parameters import (
    GROUPS,
    PARAMETERS,
    RunSettings,
    decode,
    defaults,
    encode,
    from_kfp,
    parse_text,
    to_kfp,
)

# The page of intel_extension_for_transformers.transformers.ppo_config.PPOConfig, by hand; exp_name has no value there.
DOCUMENTED: dict[str, Any] = {
    "seed": 0, "log_with": None, "task_name": None, "model_name": None, "query_dataset": None, "reward_model": None,
    "remove_unused_columns": True, "tracker_kwargs": {}, "accelerator_kwargs": {}, "project_kwargs": {},
    "tracker_project_name": "trl", "push_to_hub_if_best_kwargs": {}, "steps": 20000, "learning_rate": 1e-5,
    "adap_kl_ctrl": True, "init_kl_coef": 0.2, "kl_penalty": "kl", "target": 6, "horizon": 10000, "gamma": 1,
    "lam": 0.95, "cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1, "batch_size": 256,
    "gradient_accumulation_steps": 1, "mini_batch_size": 1, "ppo_epochs": 4, "max_grad_norm": None,
    "early_stopping": False, "target_kl": 1, "compare_steps": 1, "ratio_threshold": 10.0, "use_score_scaling": False,
    "use_score_norm": False, "score_clip": None, "whiten_rewards": False, "optimize_device_cache": False,
    "use_habana": False, "pad_for_acceleration": False, "pad_max_len": 0, "pad_max_input_len": 0,
}  # fmt: skip
RUN_TIME = {
    "is_encoder_decoder", "is_peft_model", "world_size", "global_backward_batch_size", "global_batch_size",
    "backward_batch_size",
}  # fmt: skip
NEEDED = {"model_name": "model", "query_dataset": "data.jsonl", "reward_model": "module:function"}


def problems(**values: Any) -> list[str]:
    with pytest.raises(InputError) as caught:
        PPOConfig(**values)
    return caught.value.problems


def test_the_fields_and_defaults_are_the_documented_ones() -> None:
    config = PPOConfig()
    assert {p.name for p in PPO_PARAMETERS} == set(DOCUMENTED) | {"exp_name"}
    assert {name: getattr(config, name) for name in DOCUMENTED} == DOCUMENTED
    assert {name for name, _ in runtime_fields_of(PPOConfig)} == RUN_TIME
    assert len(PPO_PARAMETERS) + len(RUN_TIME) == 49


def test_every_parameter_says_what_it_means() -> None:
    for parameter in PARAMETERS.values():
        assert parameter.declaration.help.endswith("."), parameter.name


def test_a_config_is_frozen_and_derives_its_sizes() -> None:
    config = PPOConfig(batch_size=12, mini_batch_size=2, gradient_accumulation_steps=3)
    assert config.backward_batch_size == 6
    assert (PPOConfig().total_ppo_epochs, PPOConfig(batch_size=128).total_ppo_epochs) == (79, 157)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]


def test_two_configs_share_no_dict() -> None:
    assert PPOConfig().tracker_kwargs is not PPOConfig().tracker_kwargs


def test_run_time_fields_are_filled_by_the_trainer_alone() -> None:
    with pytest.raises(TypeError, match="world_size"):
        PPOConfig(world_size=2)  # type: ignore[call-arg]
    config = PPOConfig()
    filled = config.at_run_time(world_size=2, is_encoder_decoder=False, is_peft_model=True)
    assert (filled.global_batch_size, filled.global_backward_batch_size, filled.is_peft_model) == (512, 2, True)
    assert config.world_size is None


def test_all_errors_come_at_once_with_name_value_and_what_is_valid() -> None:
    found = problems(kl_penalty="kl2", learning_rate=-1.0, steps="many", lam=1.5)
    assert found == [
        "steps='many' is not valid: give an integer >= 1",
        "learning_rate=-1.0 is not valid: give a number > 0",
        "kl_penalty='kl2' is not valid: give one of 'kl', 'abs', 'mse', 'full', 'k3'",
        "lam=1.5 is not valid: give a number >= 0 and <= 1",
    ]


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"batch_size": 256, "mini_batch_size": 3, "gradient_accumulation_steps": 2}, "batch_size=256 .*=3 × .*=2"),
        ({"use_score_norm": True}, "use_score_norm=True .*use_score_scaling"),
        ({"push_to_hub_if_best_kwargs": {"private": True}}, "push_to_hub_if_best_kwargs.*repo_id"),
        ({"pad_for_acceleration": True, "pad_max_len": 8, "pad_max_input_len": 8}, "0 < pad_max_input_len"),
        ({"pad_max_len": 8}, "pad_max_len=8 .*pad_for_acceleration"),
        ({"accelerator_kwargs": {"log_with": "wandb"}}, "accelerator_kwargs has 'log_with'"),
        ({"log_with": "tensorboard"}, "logging_dir"),
        ({"log_with": "comet"}, "log_with='comet'"),
        ({"seed": True}, "seed=True"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"ratio_threshold": float("inf")}, "ratio_threshold=inf"),
    ],
)
def test_what_can_not_be_is_refused(values: dict[str, Any], names: str) -> None:
    with pytest.raises(InputError, match=names):
        PPOConfig(**values)


def test_to_dict_flattens_and_refuses_a_slash_in_a_key() -> None:
    flat = PPOConfig(tracker_kwargs={"wandb": {"name": "x"}}).to_dict()
    assert flat["tracker_kwargs/wandb/name"] == "x"
    assert flat["total_ppo_epochs"] == 79
    assert "project_kwargs" not in flat
    with pytest.raises(InputError, match="'a/b'"):
        PPOConfig(tracker_kwargs={"a/b": 1}).to_dict()


def test_presets() -> None:
    assert PPOConfig(**preset("itrex")) == PPOConfig()
    trl = PPOConfig(**preset("trl"))
    assert (trl.batch_size, trl.mini_batch_size, trl.learning_rate) == (128, 128, 1.41e-5)
    with pytest.raises(InputError, match="one of itrex, trl"):
        preset("ppo")
    assert set(PRESETS) == {"itrex", "trl"}


OTHER: dict[type, Any] = {str: "x y", int: 7, float: 0.5, bool: True, dict: {"a": {"b": 1, "c": 1.5}}, list: [{"a": 1}]}


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_codec_goes_both_ways_for_every_parameter(name: str) -> None:
    parameter = PARAMETERS[name]
    choices = parameter.declaration.choices
    for value in [parameter.default, choices[-1] if choices else OTHER[parameter.type]]:
        carried = to_kfp(parameter, value)
        assert type(carried) is parameter.type, "KFP's boundary knows no None"
        assert from_kfp(parameter, carried) == value
        # KFP hands integers inside objects on as floats.
        assert from_kfp(parameter, json.loads(json.dumps(carried), parse_int=float)) == value


def test_settings_survive_kfp_and_json() -> None:
    settings = decode({**defaults(), **NEEDED, "max_grad_norm": 1.0, "tracker_kwargs": {"wandb": {"x": 1}}})
    assert settings.ppo.max_grad_norm == 1.0 and settings.ppo.score_clip is None
    assert decode(encode(settings)) == settings
    assert RunSettings.from_json(settings.to_json()) == settings


def test_problems_of_all_groups_come_at_once() -> None:
    with pytest.raises(InputError) as caught:
        decode({"max_gradnorm": 1, "gate_max_kl": -1.0, "batch_size": 3, "mini_batch_size": 2})
    text = str(caught.value)
    assert "max_gradnorm is not a parameter (did you mean max_grad_norm?)" in text
    assert "gate_max_kl=-1.0" in text and "batch_size=3" in text
    with pytest.raises(InputError, match="model_name is not set.*\n.*query_dataset is not set.*\n.*reward_model"):
        decode({})


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        (
            {"hub_repo_id": "a/b", "push_to_hub_if_best_kwargs": {"repo_id": "c/d"}},
            "hub_repo_id='a/b' contradicts",
        ),
        (
            {"pad_for_acceleration": True, "pad_max_len": 600, "pad_max_input_len": 100},
            "data_max_prompt_tokens=512 exceeds pad_max_input_len=100",
        ),
        ({"data_system_prompt": "hello"}, "data_system_prompt='hello'"),
        ({"mlflow_tracking_uri": "http://me:secret@mlflow:5000"}, "mlflow_tracking_uri holds a password"),
        ({"query_dataset": "https://me:secret@host/rows.jsonl"}, "query_dataset holds a password"),
    ],
)
def test_groups_that_contradict_each_other_are_refused(changes: dict[str, Any], names: str) -> None:
    with pytest.raises(InputError, match=names) as caught:
        decode({**NEEDED, **changes})
    assert "secret" not in str(caught.value)


def test_text_from_the_command_line_is_read_by_type() -> None:
    assert parse_text("learning_rate", "1e-4") == 1e-4
    assert parse_text("use_habana", "true") is True
    assert parse_text("max_grad_norm", "none") == 0.0
    assert parse_text("tracker_kwargs", '{"wandb": {"name": "x"}}') == {"wandb": {"name": "x"}}
    for name, text in (("learning_rate", "fast"), ("seed", "1.5"), ("use_habana", "1"), ("tracker_kwargs", "[1]")):
        with pytest.raises(InputError, match=f"{name}="):
            parse_text(name, text)
    with pytest.raises(InputError, match="did you mean learning_rate"):
        parse_text("learningrate", "1")


def test_no_two_groups_have_a_parameter_of_one_name() -> None:
    assert sum(len(parameters_of(group)) for group in GROUPS.values()) == len(PARAMETERS)
