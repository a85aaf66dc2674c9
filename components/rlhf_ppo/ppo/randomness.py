"""The global random streams of a process, which rewards, dropout and data code may use."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch

from rlhf_ppo.devices import Device


def random_state(device: Device) -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's global generators, of the CPU and of ``device``'s kind."""
    version, words, gauss = random.getstate()
    legacy: Any = numpy.random.get_state(legacy=True)
    name, keys, position, has_gauss, cached = legacy
    return {
        "python": {"version": version, "words": list(words), "gauss": gauss},
        "numpy": {
            "name": name,
            "keys": torch.from_numpy(keys.astype("int64")),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
        "device": device.random_states(),
    }


def set_random_state(state: dict[str, Any], device: Device) -> None:
    """The inverse of ``random_state``."""
    python, legacy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"]), python["gauss"]))
    keys = legacy["keys"].numpy().astype("uint32")
    numpy.random.set_state((legacy["name"], keys, legacy["position"], legacy["has_gauss"], legacy["cached"]))
    torch.set_rng_state(state["torch"].cpu())
    device.set_random_states(state["device"])
