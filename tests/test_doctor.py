"""What an image says of itself and of the machine that it runs on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import rlhf_ppo
from rlhf_ppo import doctor as doctoring
from rlhf_ppo.__main__ import main
from rlhf_ppo.devices import Device
from rlhf_ppo.errors import InputError


class Cards(Device):
    """Several cards in one pod."""

    name = "cuda"

    def __init__(self) -> None:
        self.device = Device().device

    def count(self) -> int:
        return 8

    def driver_problem(self) -> str:
        return "the driver is old"


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The environment that an image has."""
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr("rlhf_ppo.doctor.version", lambda name: "2.11.0a0+git1")
    monkeypatch.delenv("RLHF_PPO_CHECKPOINTS", raising=False)
    (tmp_path / "image.json").write_text(json.dumps({"torch": "2.11.0a0+git1", "vendor": True}))
    return tmp_path


def told(capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main(["doctor"])
    return code, capsys.readouterr().out


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"rlhf-ppo {rlhf_ppo.__version__}\n"
    assert main(["docter"]) == 2 and main([]) == 2


def test_where_a_training_could_run_nothing_has_failed(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = told(capsys)
    assert code == 0 and "failed" not in text
    assert "torch 2.11.0a0+git1, of the base image" in text and "ok      1 cpu\n" in text


def test_secrets_are_set_or_not_and_never_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abc123")
    monkeypatch.delenv("MLFLOW_TRACKING_TOKEN", raising=False)
    _, text = told(capsys)
    assert "HF_TOKEN is set" in text and "MLFLOW_TRACKING_TOKEN is not set" in text and "hf_abc123" not in text


def test_a_torch_that_is_not_the_images_is_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_ppo.doctor.version", lambda name: "2.13.0")
    code, text = told(capsys)
    assert code == 1 and "failed  torch is 2.13.0, and the image was built with 2.11.0a0+git1" in text


def test_a_card_that_can_not_be_used_is_a_failure_with_the_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(use_habana: bool) -> Any:
        raise InputError("take the GPU image")

    monkeypatch.setattr("rlhf_ppo.doctor.find_device", none)
    code, text = told(capsys)
    assert code == 1 and "failed  take the GPU image" in text


def test_little_shared_memory_for_several_cards_and_an_old_driver_are_warnings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_ppo.doctor.find_device", lambda use_habana: Cards())
    monkeypatch.setattr("rlhf_ppo.doctor.GIB", 2**60)
    code, text = told(capsys)
    assert code == 0 and "warning /dev/shm has 0.00 GiB" in text and "warning the driver is old" in text


def test_a_place_for_checkpoints_that_can_not_be_written_is_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, installed: Path
) -> None:
    (installed / "file").touch()
    monkeypatch.setenv("RLHF_PPO_CHECKPOINTS", str(installed / "file" / "checkpoints"))
    code, text = told(capsys)
    assert code == 1 and f"{installed}/file/checkpoints can't be written" in text


def test_a_package_that_is_missing_is_a_failure_unless_only_kfp_needs_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctoring, "NEEDED", ("no_such_package",))
    code, text = told(capsys)
    assert code == 1 and "failed  no_such_package can't be imported" in text
    monkeypatch.setattr(doctoring, "NEEDED", ("kfp.no_such_module",))
    code, text = told(capsys)
    assert code == 0 and "warning kfp.no_such_module can't be imported" in text
