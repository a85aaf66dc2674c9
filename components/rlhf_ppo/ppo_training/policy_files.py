"""The policy as files: what any program loads, its adapters, and its value head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf_ppo.artifacts import loadable_by_transformers_4
from rlhf_ppo.errors import InputError
from rlhf_ppo.ppo import PolicyWithValueHead

TRAINING = "training.json"
"""How the policy was made."""
ADAPTER = "adapter"
"""Folder of the adapters, which the model beside it has merged in."""
VALUE_HEAD = "value_head.safetensors"
HEAD_WEIGHT = "v_head.summary.weight"


def save_policy(policy: PolicyWithValueHead, tokenizer: Any, directory: Path) -> None:
    """Write the model, with adapters merged in and also beside, its tokenizer and the value head that reads it."""
    from safetensors.torch import save_file

    model: Any = policy.pretrained_model
    if policy.is_peft_model:
        model.save_pretrained(directory / ADAPTER, safe_serialization=True)
        save_merged(model, directory)
    else:
        model.save_pretrained(directory, safe_serialization=True)
    if policy.critic is None:
        head = {f"v_head.{name}": value.cpu() for name, value in policy.v_head.state_dict().items()}
        save_file(head, str(directory / VALUE_HEAD))
    tokenizer.save_pretrained(directory)
    loadable_by_transformers_4(directory)


def read_value_head(source: str) -> dict[str, Tensor]:
    """The tensors of a value head, TRL's names: from a safetensors file, or a directory of this pipeline or of TRL.

    TRL keeps them among the model's weights, in one file or in shards, and beside adapters in a pickle, which is read
    as tensors only. Raises InputError where there are none.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    path = Path(source)
    files = [path] if path.is_file() else [path / VALUE_HEAD, *sorted(path.glob("*.safetensors"))]
    for file in files:
        if not file.is_file():
            continue
        try:
            with safe_open(file, framework="pt") as weights:
                names = [name for name in weights.keys() if name.startswith("v_head.")]  # noqa: SIM118
                if HEAD_WEIGHT in names:
                    return {name: weights.get_tensor(name) for name in names}
        except (SafetensorError, OSError):
            continue
    pickled = path / "pytorch_model.bin"
    if pickled.is_file():
        found: dict[str, Tensor] = torch.load(pickled, map_location="cpu", weights_only=True)
        if HEAD_WEIGHT in found:
            return {name: value for name, value in found.items() if name.startswith("v_head.")}
    raise InputError(
        f"ppo_value_head={source!r} has no {HEAD_WEIGHT}: give a safetensors file or a directory that holds a value "
        "head, or leave it empty"
    )


def save_merged(model: Any, directory: Path) -> None:
    """Save a PEFT model's base with the adapters' product added to its weights; the model itself is not touched."""
    from peft.tuners.lora import LoraLayer

    base = model.get_base_model()
    weights = {
        name.replace(".base_layer.", "."): value for name, value in base.state_dict().items() if ".lora_" not in name
    }
    layers: list[tuple[str, Any]] = [(n, layer) for n, layer in base.named_modules() if isinstance(layer, LoraLayer)]
    for name, layer in layers:
        if f"{name}.weight" in weights:
            for adapter in model.active_adapters:
                weights[f"{name}.weight"] = weights[f"{name}.weight"] + layer.get_delta_weight(adapter)
    base.save_pretrained(directory, state_dict=weights, safe_serialization=True)
