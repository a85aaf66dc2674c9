"""The device that a process trains on: a CPU, an NVIDIA GPU or a Gaudi card (HPU), behind one small interface."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn

from rlhf_ppo.errors import InputError

LAZY_MODE = "PT_HPU_LAZY_MODE"
"""Gaudi's switch: 0 runs operation by operation and compiles with torch.compile, 1 collects operations into graphs."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a device: in use by this process, the most that ever was, what it has, and what other processes hold."""

    allocated: int
    peak: int
    total: int
    others: int = 0


class Device:
    """A CPU. The others add to it."""

    name = "cpu"
    backend = "gloo"
    """What torch.distributed connects processes on such devices with."""
    cache = "a CPU has no cache of device memory: optimize_device_cache does nothing"
    """What optimize_device_cache does here."""
    tool = "ps"
    """What shows who uses it."""
    precision = "no"
    """What models compute in where the user does not say: accelerate's name for fp32, or bf16."""
    capture: Callable[[Callable[[], None]], Callable[[], None]] | None = None
    """Call a function once, and give one that lets the device repeat what it did, without the host.

    It repeats it on the same tensors. RuntimeError where the host waited for the device. None where a device can't.
    """

    def __init__(self) -> None:
        self.device = torch.device(self.name)

    def count(self) -> int:
        """How many of them this process sees."""
        return 1

    def acquire(self) -> None:
        """Use it once. Raises InputError, with the remedy, where it is held by another process or doesn't answer."""
        try:
            self.choose()
            torch.zeros(1, device=self.device)
            self.synchronize()
        except RuntimeError as error:
            raise InputError(
                f"{self.device} can't be used ({str(error).splitlines()[0]}): look with {self.tool} whether another "
                f"process holds it, and whether its driver fits the image ({self.driver() or 'driver unknown'})"
            ) from error

    def choose(self) -> None:
        """Let it be the one that is meant where none is named."""

    def driver(self) -> str:
        """The driver's version and that of the software that was made for it, in words; empty where there is none."""
        return ""

    def driver_problem(self) -> str:
        """What is to be said where the two don't fit each other but the device answers; else empty."""
        return ""

    def memory(self) -> Memory | None:
        """Its memory; None on a CPU, whose memory is the machine's."""
        return None

    def synchronize(self) -> None:
        """Wait until the device has done all it was given."""

    def mark_step(self) -> None:
        """Let a device that collects operations run them."""

    def release_cache(self) -> None:
        """Give memory that is kept for later use back to the device, where that can be done."""

    def random_states(self) -> list[torch.Tensor]:
        """The states of the generators of what this process uses."""
        return []

    def set_random_states(self, states: list[torch.Tensor]) -> None:
        """The inverse of ``random_states``."""

    def fuse(self, model: nn.Module, *, alone: bool = False) -> None:
        """Give layers of ``model`` the device's own faster code, a drop-in; ``alone`` where one process trains."""
        if self.device.type == "cpu":
            from rlhf_ppo.ppo import cpu

            cpu.keep_memory()
            cpu.fuse(model, alone=alone)

    def training(self, model: nn.Module) -> nn.Module:
        """``model`` as it is called in updates with static shapes."""
        return model

    def inference(self, model: nn.Module) -> nn.Module:
        """``model``, tensors in and tensors out, as it is called without gradients with static shapes."""
        return model


class Cuda(Device):
    """An NVIDIA GPU."""

    name = "cuda"
    backend = "nccl"
    cache = "optimize_device_cache returns cached memory to the GPU after every PPO step"
    tool = "nvidia-smi"

    def __init__(self) -> None:
        self.device = torch.device(self.name, int(os.environ.get("LOCAL_RANK", "0")))
        # torch prefers it on H100 and later, and it makes a plan of tens of milliseconds for each new shape.
        torch.backends.cuda.enable_cudnn_sdp(False)

    def choose(self) -> None:
        """Let it be the one that is meant where none is named: else each process would open the first one, too."""
        torch.cuda.set_device(self.device)

    @property
    def precision(self) -> str:  # type: ignore[override]
        """bf16 where the GPU has it."""
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"

    def count(self) -> int:
        """How many of them this process sees."""
        return torch.cuda.device_count()

    def driver(self) -> str:
        """The driver's version, and the CUDA that torch was built for."""
        return f"{_nvidia_driver()}, torch for CUDA {torch.version.cuda}"

    def memory(self) -> Memory:
        """Its memory, as this process sees it."""
        free, total = torch.cuda.mem_get_info(self.device)
        own = torch.cuda.memory_reserved(self.device)
        allocated, peak = torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device)
        return Memory(allocated, peak, total, max(total - free - own, 0))

    def synchronize(self) -> None:
        """Wait until the device has done all it was given."""
        torch.cuda.synchronize(self.device)

    def release_cache(self) -> None:
        """Give cached memory back to the GPU."""
        torch.cuda.empty_cache()

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:  # type: ignore[override]
        """As a CUDA graph, whose memory is given back with what repeats it."""
        before = torch.cuda.get_sync_debug_mode()
        # A capture that fails leaves traces in torch: what would fail is seen here, where it does not matter.
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
        graph = torch.cuda.CUDAGraph()
        # What other threads ask of the GPU is theirs; and a capture that fails does not put the current stream back.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, capture_error_mode="thread_local"),
        ):
            step()
        return graph.replay

    def random_states(self) -> list[torch.Tensor]:
        """The state of its generator."""
        return [torch.cuda.get_rng_state(self.device)]

    def set_random_states(self, states: list[torch.Tensor]) -> None:
        """The inverse of ``random_states``."""
        torch.cuda.set_rng_state(states[0].cpu(), self.device)


class Hpu(Device):
    """A Gaudi card, in one of its two modes.

    Names and signatures are those of Intel's gaudi-pytorch-bridge 1.19 and of the Gaudi documentation of 1.23. No line
    of this class has run on Gaudi hardware: tests run it against a strict stand-in for Intel's modules.
    """

    name = "hpu"
    backend = "hccl"
    tool = "hl-smi"
    cache = "a Gaudi process holds all memory of its card: optimize_device_cache does nothing"
    precision = "bf16"

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device(self.name)
        self.lazy = os.environ[LAZY_MODE] == "1"
        self.hpu: Any = getattr(torch, self.name)
        self.core: Any = importlib.import_module("habana_frameworks.torch.core")

    def count(self) -> int:
        """How many of them this process sees."""
        found: int = self.hpu.device_count()
        return found

    def driver(self) -> str:
        """The driver's version, and that of Intel's software in the image; they must agree in the first two numbers."""
        return f"driver {_gaudi_driver() or 'unknown'}, habana-torch-plugin {_plugin() or 'unknown'}"

    def driver_problem(self) -> str:
        """What is to be said where the driver and the image's software are not of one version; else empty."""
        driver, plugin = _gaudi_driver(), _plugin()
        if not driver or not plugin or driver.split(".")[:2] == plugin.split(".")[:2]:
            return ""
        return f"the node's Gaudi driver is {driver} and the image's software {plugin}: take an image of its version"

    def memory(self) -> Memory:
        """Its memory, as this process sees it."""
        stats = self.hpu.memory_stats()
        return Memory(stats["InUse"], stats["MaxInUse"], stats["Limit"])

    def synchronize(self) -> None:
        """Wait until the device has done all it was given."""
        self.hpu.synchronize()

    def mark_step(self) -> None:
        """In lazy mode: run what was collected."""
        if self.lazy:
            self.core.mark_step()

    def random_states(self) -> list[torch.Tensor]:
        """The states of all cards' generators."""
        return list(self.hpu.get_rng_state_all())

    def set_random_states(self, states: list[torch.Tensor]) -> None:
        """The inverse of ``random_states``."""
        self.hpu.set_rng_state_all([state.cpu() for state in states])

    def fuse(self, model: nn.Module, *, alone: bool = False) -> None:
        """RMSNorm from optimum-habana, where that is installed; its other fused code changes what a forward pass takes.

        Raises InputError where it is installed but can't be imported.
        """
        if not _has("optimum.habana"):
            return
        for module in model.modules():
            kind = type(module)
            if kind.__name__.endswith("RMSNorm") and kind.__module__.startswith("transformers.models."):
                forward = _fused_norm(kind.__module__.split(".")[2])
                if forward is not None:
                    module.forward = MethodType(forward, module)

    def training(self, model: nn.Module) -> nn.Module:
        """In compile mode: ``model`` compiled, for these shapes alone."""
        return model if self.lazy else self._compiled(model)

    def inference(self, model: nn.Module) -> nn.Module:
        """In lazy mode: ``model`` as a graph that is captured once and replayed; else compiled."""
        if not self.lazy:
            return self._compiled(model)
        wrapped: nn.Module = importlib.import_module("habana_frameworks.torch.hpu").wrap_in_hpu_graph(model)
        return wrapped

    def _compiled(self, model: nn.Module) -> nn.Module:
        compiled: Any = torch.compile(model, backend="hpu_backend", dynamic=False)
        return compiled  # type: ignore[no-any-return]


def has_habana() -> bool:
    """Whether Intel's PyTorch bridge is installed; the namespace alone may be that of a media package."""
    return _has("habana_frameworks.torch")


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _fused_norm(architecture: str) -> Any:
    """optimum-habana's forward of an architecture's RMSNorm, or None where it has none."""
    name = f"optimum.habana.transformers.models.{architecture}.modeling_{architecture}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and name.startswith(error.name):
            return None  # It doesn't know the architecture.
        raise InputError(f"optimum-habana is installed and lacks {error.name}: install that, or remove it") from error
    except ImportError as error:
        raise InputError(
            f"optimum-habana is installed and can't be imported ({error}): install the transformers that it pins "
            "(rlhf-ppo[gaudi]), or remove it"
        ) from error
    return getattr(module, f"gaudi_{architecture}_rmsnorm_forward", None)


def _cards_of_nvidia() -> bool:
    """Whether this process was given GPUs: the driver shows in every container of a machine, their devices don't."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def _nvidia_driver() -> str:
    """Its version as the kernel tells it."""
    try:
        told = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return "driver unknown"
    found = re.search(r"\d+\.\d+(\.\d+)?", told)
    return f"driver {found[0]}" if found else "driver unknown"


def _plugin() -> str:
    """The version of Intel's bridge to torch; empty where it can't be told."""
    try:
        return importlib.metadata.version("habana-torch-plugin")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _gaudi_driver() -> str:
    """The driver's version as hl-smi tells it, e.g. 1.23.0; empty where there is no hl-smi."""
    command = ["hl-smi", "-Q", "driver_version", "-f", "csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return told.strip().splitlines()[0].partition("-")[0].strip() if told.strip() else ""


def find_device(use_habana: bool) -> Device:
    """The device of this process.

    Raises InputError with the remedy where ``use_habana`` asks for a Gaudi card and there is none, or there are cards
    and it does not ask for them: nothing falls back to another device.
    """
    if use_habana:
        return _find_hpu()
    if torch.cuda.is_available():
        return Cuda()
    if _cards_of_nvidia() and os.environ.get("CUDA_VISIBLE_DEVICES") is None:
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        raise InputError(
            f"an NVIDIA GPU is here and torch can't use it ({_nvidia_driver()}; {built}): run in the GPU image, of a "
            "CUDA version that the driver knows, or set CUDA_VISIBLE_DEVICES to nothing to train on the CPU"
        )
    if has_habana():
        raise InputError(
            "use_habana=False on a machine with Gaudi's software and no NVIDIA GPU: set use_habana=True to train on "
            "its cards, or take the CPU image to train on its CPU"
        )
    return Device()


def _find_hpu() -> Hpu:
    if not has_habana():
        raise InputError(
            "use_habana=True, but habana_frameworks.torch is not installed here: run in the Gaudi image on a Gaudi "
            "node, or set use_habana=False"
        )
    if os.environ.get(LAZY_MODE) not in ("0", "1"):
        if "habana_frameworks.torch" in sys.modules:
            raise InputError(
                f"use_habana=True, but habana_frameworks was imported before {LAZY_MODE} was chosen: set {LAZY_MODE}=0 "
                "(torch.compile, recommended) or 1 (lazy graphs) in the environment"
            )
        os.environ[LAZY_MODE] = "0"
    importlib.import_module("habana_frameworks.torch")
    hpu: Any = getattr(torch, "hpu", None)
    if hpu is None or not hpu.is_available():
        raise InputError(
            "use_habana=True, but no Gaudi card is available to this process: ask for one (habana.ai/gaudi in the "
            "pod's resources), look with hl-smi whether another process holds it, and compare the driver's version "
            "with the image's"
        )
    return Hpu()
