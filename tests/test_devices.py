"""Which device a training takes, and what it asks of it. Gaudi is a strict stand-in here, not hardware."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fakes import gaudi
from rlhf_ppo.config import PPOConfig
from rlhf_ppo.devices import Cuda, Device, Hpu, Memory, find_device
from rlhf_ppo.errors import InputError
from rlhf_ppo.parameters import decode, defaults
from rlhf_ppo.policy_evaluation.responses import _as_in_training
from rlhf_ppo.ppo import PolicyWithValueHead, PPOTrainer, Sampling
from rlhf_ppo.ppo.models import ValueHead
from rlhf_ppo.ppo.randomness import random_state, set_random_state
from rlhf_ppo.ppo.setup import make_accelerator
from tiny_models import gpt2, llama, queries, qwen2, word_tokenizer

CPU = torch.device("cpu")


def test_without_an_accelerator_training_runs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = find_device(use_habana=False)
    assert type(found) is Device and (found.name, found.backend, found.memory()) == ("cpu", "gloo", None)


def test_an_nvidia_gpu_is_taken_without_being_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    found = find_device(use_habana=False)
    assert isinstance(found, Cuda)
    assert (found.device.type, found.backend, found.precision) == ("cuda", "nccl", "bf16")


@pytest.mark.parametrize(
    ("cuda", "said"), [("13.0", "torch is built for CUDA 13.0"), (None, "torch is built without CUDA")]
)
def test_a_gpu_that_torch_can_not_use_is_no_reason_to_train_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr("rlhf_ppo.devices._cards_of_nvidia", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(InputError, match=f"torch can't use it .*{said}.*GPU image"):
        find_device(use_habana=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert type(find_device(use_habana=False)) is Device


def test_use_habana_where_nothing_of_gaudi_is_installed_says_what_to_do() -> None:
    with pytest.raises(
        InputError, match="use_habana=True, but habana_frameworks.torch is not installed .* Gaudi image"
    ):
        find_device(use_habana=True)


def test_the_media_package_alone_is_no_gaudi(monkeypatch: pytest.MonkeyPatch) -> None:
    # habana-media-loader brings the namespace habana_frameworks without the bridge to torch.
    monkeypatch.setitem(sys.modules, "habana_frameworks", gaudi.Strict("habana_frameworks"))
    with pytest.raises(InputError, match=r"habana_frameworks\.torch is not installed"):
        find_device(use_habana=True)


def test_use_habana_without_a_card_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    gaudi.install(monkeypatch, cards=0)
    with pytest.raises(InputError, match="no Gaudi card is available .*habana.ai/gaudi.*hl-smi"):
        find_device(use_habana=True)


def test_gaudi_cards_that_nobody_asked_for_are_no_reason_to_train_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gaudi.install(monkeypatch)
    with pytest.raises(InputError, match="use_habana=False on a machine with Gaudi's software"):
        find_device(use_habana=False)


@pytest.mark.parametrize(("chosen", "lazy"), [(None, False), ("0", False), ("1", True)])
def test_the_mode_is_always_chosen_before_the_bridge_is_imported(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None, lazy: bool
) -> None:
    gaudi.install(monkeypatch, lazy=chosen)
    found = find_device(use_habana=True)
    assert isinstance(found, Hpu) and found.lazy is lazy
    assert os.environ["PT_HPU_LAZY_MODE"] == ("1" if lazy else "0")


def test_a_bridge_that_was_imported_without_a_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gaudi.install(monkeypatch, lazy=None)
    import habana_frameworks.torch  # type: ignore[import-not-found]  # noqa: F401

    with pytest.raises(InputError, match="imported before PT_HPU_LAZY_MODE was chosen"):
        find_device(use_habana=True)


def test_the_stand_in_knows_no_other_name(monkeypatch: pytest.MonkeyPatch) -> None:
    gaudi.install(monkeypatch)
    with pytest.raises(AttributeError, match="has no empty_cache"):
        _ = torch.hpu.empty_cache  # type: ignore[attr-defined]


def test_memory_and_random_states_of_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = gaudi.install(monkeypatch, cards=2)
    found = find_device(use_habana=True)
    assert found.count() == 2 and found.memory() == Memory(2**30, 2**31, gaudi.CARD)
    state = random_state(found)
    set_random_state(state, found)
    assert calls == ["get_rng_state_all", "set_rng_state_all [[0], [1]]"]


@pytest.mark.parametrize(
    ("driver", "plugin", "problem"),
    [
        ("1.23.0-fbc5e9b", "1.23.0.45", ""),
        ("1.23.0-fbc5e9b", "1.24.1.12", "driver is 1.23.0 and the image's software 1.24.1.12"),
        ("", "1.24.1.12", ""),
    ],
)
def test_a_driver_of_another_version_than_the_image_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, driver: str, plugin: str, problem: str
) -> None:
    gaudi.install(monkeypatch)
    program = tmp_path / "hl-smi"
    program.write_text(f'#!/bin/sh\ntest "$*" = "-Q driver_version -f csv,noheader" && echo "{driver}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("importlib.metadata.version", lambda name: {"habana-torch-plugin": plugin}[name])
    found = find_device(use_habana=True)
    assert found.driver() == f"driver {driver.partition('-')[0] or 'unknown'}, habana-torch-plugin {plugin}"
    assert problem in found.driver_problem() and bool(found.driver_problem()) == bool(problem)


def test_random_states_of_the_cpu_come_back() -> None:
    state = random_state(Device())
    first = torch.rand(3)
    set_random_state(state, Device())
    assert torch.equal(torch.rand(3), first)


def training(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> PPOTrainer:
    """A trainer whose card is the CPU, and whose optimizer tells when it is called."""
    config = PPOConfig(
        batch_size=4, mini_batch_size=2, ppo_epochs=1, pad_for_acceleration=True, pad_max_input_len=6, pad_max_len=10,
        use_habana=True, accelerator_kwargs={"mixed_precision": "no"},
    )  # fmt: skip
    policy = PolicyWithValueHead(llama(0))
    sampling = Sampling(4, eos_token_ids=())
    trained = PPOTrainer(config, policy, llama(1), word_tokenizer(), sampling=sampling, device=Hpu(CPU))
    step = trained.optimizer.step

    def told(*given: Any) -> Any:
        calls.append("step")
        return step(*given)

    monkeypatch.setattr(trained.optimizer, "step", told)
    return trained


def test_a_lazy_card_is_told_to_run_after_tokens_gradients_and_optimizer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = gaudi.install(monkeypatch, lazy="1")
    trained = training(monkeypatch, calls)
    rollout = trained.rollout(queries(3, 6, 2, 4))
    assert calls == ["mark_step"] * 4
    calls.clear()
    trained.update(rollout, [1.0, 0.0, 2.0, 3.0])
    assert calls == ["capture", *["mark_step", "step", "mark_step"] * 2]


def test_a_lazy_card_captures_scoring_once_and_replays_it_with_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rlhf_ppo.ppo.rollout.SCORING_TOKENS", 20)
    calls = gaudi.install(monkeypatch, lazy="1")
    captured = training(monkeypatch, calls)
    rollouts = [captured.rollout(queries(3, 6, 2, 4, seed=seed)) for seed in (1, 2)]
    calls.clear()
    found = [captured._reference_rows(rollout, full=False)["ref"] for rollout in rollouts]
    # Two batches of two rows for each of the two rollouts.
    assert calls == ["capture", "replay", "replay", "replay"]
    captured.scorer = None
    for rows, rollout in zip(found, rollouts, strict=True):
        expected = captured._reference_rows(rollout, full=False)["ref"]
        torch.testing.assert_close(rows, expected, atol=1e-6, rtol=1e-6)


def test_a_compiling_card_compiles_once_for_its_shapes_and_marks_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = gaudi.install(monkeypatch, lazy="0")
    asked: list[dict[str, Any]] = []

    def compiled(model: nn.Module, **settings: Any) -> nn.Module:
        asked.append(settings)
        return model

    monkeypatch.setattr(torch, "compile", compiled)
    trained = training(monkeypatch, calls)
    trained.update(trained.rollout(queries(3, 6, 2, 4)), [1.0, 0.0, 2.0, 3.0])
    assert asked == [{"backend": "hpu_backend", "dynamic": False}] * 2  # The update's pass, and scoring.
    assert calls == ["step", "step"]


def test_optimum_habanas_fused_norm_is_used_where_it_is_installed_and_changes_no_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = gaudi.install(monkeypatch, lazy="1")
    plain = training(monkeypatch, calls).rollout(queries(3, 6, 2, 4))
    gaudi.install_optimum(monkeypatch, calls)
    calls.clear()
    fused = training(monkeypatch, calls).rollout(queries(3, 6, 2, 4))
    # Two layers with two norms each, and the last; four tokens.
    assert calls.count("rmsnorm") == 5 * 4
    torch.testing.assert_close(fused.logprobs, plain.logprobs)
    other = gpt2(0)
    Hpu(CPU).fuse(other)  # An architecture that it doesn't have, or without such a norm, stays as it is.
    Hpu(CPU).fuse(qwen2(0))


def test_an_optimum_habana_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = gaudi.install(monkeypatch)
    gaudi.install_optimum(monkeypatch, calls, pinned=False)
    with pytest.raises(InputError, match=r"can't be imported \(cannot import name.*rlhf-ppo\[gaudi\]"):
        Hpu(CPU).fuse(llama(0))


@pytest.mark.parametrize(
    ("device", "kwargs", "environment", "expected"),
    [
        ("hpu", {}, None, "bf16"),
        ("hpu", {"mixed_precision": "no"}, None, "no"),
        ("hpu", {"mixed_precision": None}, None, "bf16"),
        ("hpu", {}, "no", "no"),
        ("cpu", {}, None, "no"),
        ("cpu", {"mixed_precision": "bf16"}, None, "bf16"),
    ],
)
def test_accelerators_compute_in_bf16_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, device: str, kwargs: dict[str, Any], environment: str | None, expected: str
) -> None:
    class Asked:
        def __init__(self, mixed_precision: str, **_: Any) -> None:
            self.mixed_precision, self.num_processes = mixed_precision, 1

    gaudi.install(monkeypatch)
    monkeypatch.setattr("rlhf_ppo.ppo.setup.Accelerator", Asked)
    if environment is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", environment)
    config = PPOConfig(batch_size=2, mini_batch_size=1, accelerator_kwargs=kwargs)
    assert make_accelerator(config, Hpu(CPU) if device == "hpu" else Device()).mixed_precision == expected


def test_processes_that_accelerate_does_not_connect_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Alone:
        def __init__(self, **_: Any) -> None:
            self.mixed_precision, self.num_processes = "no", 1

    monkeypatch.setattr("rlhf_ppo.ppo.setup.Accelerator", Alone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="2 processes were started, and accelerate connects 1"):
        make_accelerator(PPOConfig(batch_size=2, mini_batch_size=1), Device())


def test_values_are_fp32_where_the_model_computes_in_bf16() -> None:
    torch.manual_seed(0)
    head, hidden = ValueHead(32), torch.randn(5, 32)
    nn.init.normal_(head.summary.weight)
    expected = head(hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, cut = head(hidden), head.summary(hidden).squeeze(-1).float()
    assert torch.equal(found, expected) and not torch.allclose(cut, expected, atol=1e-4)


def test_a_process_touches_no_card_but_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    for name in ("set_device", "synchronize", "get_rng_state"):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: calls.append(f"{name} {device}"))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: calls.append(f"set_rng_state {device}"))
    monkeypatch.setattr(torch, "zeros", lambda size, device: calls.append(f"zeros {device}"))
    card = Cuda()
    card.acquire()
    assert calls == ["set_device cuda:3", "zeros cuda:3", "synchronize cuda:3"]
    assert len(card.random_states()) == 1
    card.set_random_states([torch.ones(1)])
    assert calls[3:] == ["get_rng_state cuda:3", "set_rng_state cuda:3"]


def test_attention_that_plans_for_each_new_shape_is_off_on_nvidia_gpus() -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    Cuda()
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_processes_wait_for_each_other_longer_than_nccl_does() -> None:
    accelerator = make_accelerator(PPOConfig(batch_size=2, mini_batch_size=1), Device())
    assert accelerator.init_handler.timeout == timedelta(hours=2)


@pytest.mark.parametrize(
    ("backend", "processes", "failed", "ends"),
    [
        ("nccl", 2, True, False),
        ("nccl", 2, False, True),
        ("nccl", 1, True, True),
        ("gloo", 2, True, True),
    ],
)
def test_a_failed_process_does_not_wait_for_the_others_where_a_connection_ends_with_all_of_them(
    monkeypatch: pytest.MonkeyPatch, backend: str, processes: int, failed: bool, ends: bool
) -> None:
    config = PPOConfig(batch_size=2, mini_batch_size=1)
    trained = PPOTrainer(config, PolicyWithValueHead(llama(0)), llama(1), word_tokenizer())
    ended: list[bool] = []
    monkeypatch.setattr(type(trained.accelerator), "num_processes", property(lambda _: processes))
    monkeypatch.setattr(trained.accelerator, "end_training", lambda: ended.append(True))
    monkeypatch.setattr(trained.on, "backend", backend, raising=False)
    trained.close(failed=failed)
    assert bool(ended) is ends


@pytest.mark.parametrize(
    ("given", "kind", "bf16"),
    [({}, "hpu", True), ({"mixed_precision": "no"}, "hpu", False), ({"mixed_precision": "bf16"}, "cpu", False)],
)
def test_a_card_evaluates_in_the_precision_that_it_trains_in(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], kind: str, bf16: bool
) -> None:
    gaudi.install(monkeypatch)
    named = {"model_name": "m", "query_dataset": "q", "reward_model": "r"}
    settings = decode({**defaults(), **named, "accelerator_kwargs": given})
    on = Hpu(torch.device("hpu")) if kind == "hpu" else Device()
    assert _as_in_training(settings, on)._enabled is bf16


def test_the_cache_of_an_nvidia_gpu_is_given_back_after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: released.append("cuda"))
    Device().release_cache()
    assert released == []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    old = Cuda()
    old.release_cache()
    assert released == ["cuda"] and old.precision == "no"
    assert "nothing" in Device.cache and "nothing" in Hpu.cache and "every PPO step" in Cuda.cache
