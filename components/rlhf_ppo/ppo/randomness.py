"""The global random streams of a process, which rewards, dropout and data code may use."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch


def random_state() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's global generators, on every device of this process."""
    version, words, gauss = random.getstate()
    legacy: Any = numpy.random.get_state(legacy=True)
    name, keys, position, has_gauss, cached = legacy
    found: dict[str, Any] = {
        "python": {"version": version, "words": list(words), "gauss": gauss},
        "numpy": {
            "name": name,
            "keys": torch.from_numpy(keys.astype("int64")),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        found["cuda"] = list(torch.cuda.get_rng_state_all())
    return found


def set_random_state(state: dict[str, Any]) -> None:
    """The inverse of ``random_state``."""
    python, legacy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"]), python["gauss"]))
    keys = legacy["keys"].numpy().astype("uint32")
    numpy.random.set_state((legacy["name"], keys, legacy["position"], legacy["has_gauss"], legacy["cached"]))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([generator.cpu() for generator in state["cuda"]])
