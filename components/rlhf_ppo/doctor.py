"""Whether a training could run here: a line for each thing that is looked at, with the remedy for what fails."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from rlhf_ppo.devices import Device, find_device, has_habana
from rlhf_ppo.errors import InputError
from rlhf_ppo.preflight import GIB, versions

NEEDED = ("torch", "transformers", "accelerate", "datasets", "mlflow", "peft", "safetensors", "kfp.dsl.executor_main")
BUILT = "image.json"
"""What images/install.sh notes of the image, beside the environment's own files."""
SECRETS = ("HF_TOKEN", "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_TOKEN", "RLHF_PPO_REWARD_TOKEN")
ROOM = 5 * GIB
"""Bytes below which a disk is called small."""


@dataclass(frozen=True)
class Finding:
    """One line: ``ok``, ``warning`` or ``failed``, and what was seen."""

    state: str
    text: str


def doctor() -> int:
    """Print what there is; returns 0 where a training could run here, else 1."""
    print(" ".join(f"{name} {found}" for name, found in versions().items()))
    failed = False
    for finding in _findings():
        print(f"{finding.state:8}{finding.text}")
        failed = failed or finding.state == "failed"
    return int(failed)


def _findings() -> Iterator[Finding]:
    yield from _packages()
    yield _image()
    yield from _device()
    yield from _places()
    yield from (Finding("ok", f"{name} is {'set' if os.environ.get(name) else 'not set'}") for name in SECRETS)


def _packages() -> Iterator[Finding]:
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            state = "warning" if name.startswith("kfp") else "failed"
            yield Finding(state, f"{name} can't be imported ({error}): install rlhf-ppo[train], or take an image")


def _image() -> Finding:
    """Whether torch is the one that the image was built with; Intel's and NVIDIA's can't be replaced."""
    note = Path(sys.prefix) / BUILT
    if not note.exists():
        return Finding("ok", "not an image of this project")
    built = json.loads(note.read_text(encoding="utf-8"))
    here = version("torch")
    if here != built["torch"]:
        return Finding("failed", f"torch is {here}, and the image was built with {built['torch']}: don't replace it")
    return Finding("ok", f"torch {here}, {'of the base image' if built['vendor'] else 'installed with the image'}")


def _device() -> Iterator[Finding]:
    try:
        device = find_device(has_habana())
        device.acquire()
    except InputError as error:
        yield Finding("failed", str(error))
        return
    memory = device.memory()
    has = f", {memory.total / GIB:.0f} GiB each" if memory else ""
    driver = f" ({device.driver()})" if device.driver() else ""
    yield Finding("ok", f"{device.count()} {device.name}{has}{driver}")
    if device.driver_problem():
        yield Finding("warning", device.driver_problem())
    yield from _shared_memory(device)


def _shared_memory(device: Device) -> Iterator[Finding]:
    """NCCL and HCCL connect the cards of a pod through it."""
    place = Path("/dev/shm")
    if place.is_dir() and device.name != "cpu" and device.count() > 1 and shutil.disk_usage(place).total < GIB:
        found = shutil.disk_usage(place).total / GIB
        yield Finding(
            "warning",
            f"/dev/shm has {found:.2f} GiB, little for several cards: mount memory there",
        )


def _places() -> Iterator[Finding]:
    for name in (tempfile.gettempdir(), os.environ.get("RLHF_PPO_CHECKPOINTS")):
        if not name:
            continue
        try:
            Path(name).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=name):
                free = shutil.disk_usage(name).free
        except OSError as error:
            yield Finding("failed", f"{name} can't be written ({error}): mount a volume there")
            continue
        small = ": little for models and checkpoints" if free < ROOM else ""
        yield Finding("warning" if small else "ok", f"{name} has {free / GIB:.0f} GiB free{small}")
