"""A strict stand-in for Intel's Gaudi modules: the names and signatures that exist, and an error for all others.

After gaudi-pytorch-bridge 1.19 and the Gaudi documentation of 1.23. Tensors stay on the CPU. A test switches it on for
itself; nothing else does.
"""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate.utils import is_hpu_available
from transformers.utils import is_torch_hpu_available

CARD = 96 * 2**30


class Strict(ModuleType):
    """A module that has what it is given, and says what it was asked for."""

    def __init__(self, name: str, **known: Any) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        self.__path__: list[str] = []
        vars(self).update(known)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{self.__name__} of the Gaudi stand-in has no {name}")


def install(monkeypatch: pytest.MonkeyPatch, *, cards: int = 1, lazy: str | None = "0") -> list[str]:
    """Put the stand-in in the place of Intel's modules; returns the list in which calls appear."""
    calls: list[str] = []
    # Both remember their first answer, for the whole process: to them there is no Gaudi.
    assert not is_hpu_available() and not is_hpu_available(init_hccl=True) and not is_torch_hpu_available()

    def mark_step(device_str: str = "", sync: bool = False) -> None:
        calls.append("mark_step")

    def synchronize() -> None:
        calls.append("synchronize")

    def memory_stats(device: Any = None) -> dict[str, int]:
        return {"Limit": CARD, "InUse": 2**30, "MaxInUse": 2**31, "NumAllocs": 0, "NumFrees": 0, "ActiveAllocs": 0}

    def get_rng_state_all() -> list[torch.Tensor]:
        calls.append("get_rng_state_all")
        return [torch.tensor([number], dtype=torch.uint8) for number in range(cards)]

    def set_rng_state_all(new_states: list[torch.Tensor]) -> None:
        calls.append(f"set_rng_state_all {[state.tolist() for state in new_states]}")

    hpu = Strict(
        "torch.hpu",
        is_available=lambda: cards > 0,
        device_count=lambda: cards,
        synchronize=synchronize,
        memory_stats=memory_stats,
        get_rng_state_all=get_rng_state_all,
        set_rng_state_all=set_rng_state_all,
    )
    def wrap_in_hpu_graph(
        module: Any, asynchronous: bool = False, disable_tensor_cache: bool = False, dry_run: bool = False,
        max_graphs: Any = None,
    ) -> Any:
        module.forward = _Replayed(module.forward, calls)
        return module

    core = Strict("habana_frameworks.torch.core", mark_step=mark_step)
    graphs = Strict("habana_frameworks.torch.hpu", wrap_in_hpu_graph=wrap_in_hpu_graph)
    bridge = Strict("habana_frameworks.torch", core=core, hpu=graphs)
    # Only what is importable is installed: the bridge counts as imported when somebody imports it.
    monkeypatch.setitem(sys.modules, "habana_frameworks", Strict("habana_frameworks"))
    monkeypatch.setattr(sys, "meta_path", [_Finder({m.__name__: m for m in (bridge, core, graphs)}), *sys.meta_path])
    for name in (bridge.__name__, core.__name__, graphs.__name__):
        monkeypatch.delitem(sys.modules, name, raising=False)
        # What the test imports is forgotten after it.
        monkeypatch.setitem(sys.modules, name, bridge)
        del sys.modules[name]
    monkeypatch.setattr(torch, "hpu", hpu, raising=False)
    if lazy is None:
        monkeypatch.delenv("PT_HPU_LAZY_MODE", raising=False)
    else:
        monkeypatch.setenv("PT_HPU_LAZY_MODE", lazy)
    return calls


def install_optimum(monkeypatch: pytest.MonkeyPatch, calls: list[str], *, pinned: bool = True) -> None:
    """Stand in for optimum-habana 1.21.2, as far as Llama's RMSNorm; ``pinned`` is whether transformers fits it."""

    def gaudi_llama_rmsnorm_forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        calls.append("rmsnorm")
        kept = hidden_states.float()
        scaled = kept * torch.rsqrt(kept.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * scaled.to(hidden_states.dtype)

    name = "optimum.habana.transformers.models.llama.modeling_llama"
    known = {name: Strict(name, gaudi_llama_rmsnorm_forward=gaudi_llama_rmsnorm_forward)}
    for _ in range(5):
        name = name.rpartition(".")[0]
        known[name] = Strict(name)
    monkeypatch.setattr(sys, "meta_path", [_Finder(known, fails=not pinned), *sys.meta_path])
    for name in known:
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setitem(sys.modules, name, known[name])
        del sys.modules[name]


class _Replayed:
    """A captured graph: for the same shapes it runs again on the first call's tensors, and answers in the same place."""

    def __init__(self, forward: Any, calls: list[str]) -> None:
        self.forward, self.calls = forward, calls
        self.graphs: dict[Any, tuple[list[Any], torch.Tensor]] = {}

    def __call__(self, *inputs: Any) -> torch.Tensor:
        key = tuple(tuple(given.shape) if torch.is_tensor(given) else hash(given) for given in inputs)
        if key not in self.graphs:
            self.calls.append("capture")
            self.graphs[key] = (list(inputs), self.forward(*inputs))
            return self.graphs[key][1]
        self.calls.append("replay")
        kept, answer = self.graphs[key]
        for place, given in zip(kept, inputs, strict=True):
            if torch.is_tensor(given):
                place.copy_(given)
        return answer.copy_(self.forward(*kept))


class _Finder:
    def __init__(self, modules: dict[str, ModuleType], *, fails: bool = False) -> None:
        self.modules, self.fails = modules, fails

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in self.modules:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: Any) -> ModuleType:
        return self.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        if self.fails and module.__name__.endswith("modeling_llama"):
            raise ImportError("cannot import name 'Unpack' from 'transformers.processing_utils'")
