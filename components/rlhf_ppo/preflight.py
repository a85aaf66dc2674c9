"""What a training would need of its device, told and checked before anything is loaded."""

from __future__ import annotations

import json
import os
import platform
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rlhf_ppo.devices import Device, Memory
from rlhf_ppo.errors import InputError
from rlhf_ppo.events import emit
from rlhf_ppo.parameters import RunSettings
from rlhf_ppo.ppo.rollout import SCORING_TOKENS
from rlhf_ppo.ppo.setup import precision_of

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
GIB = 2**30
ACTIVATIONS = 34
"""Bytes per layer, token and hidden unit that a 16-bit forward pass keeps for its backward pass (Korthikanti et al.
2022, equation 2, without attention's own, which fused kernels don't keep).
"""
HEADS = ("lm_head.weight", "embed_out.weight")
PACKAGES = ("torch", "transformers", "accelerate", "rlhf-ppo", "optimum-habana", "habana-torch-plugin")


@dataclass(frozen=True)
class Needs:
    """Bytes of one process. ``state`` is exact, the rest is an estimate."""

    weights: int
    gradients: int
    optimizer: int
    rollout: int
    update: int

    @property
    def state(self) -> int:
        """What is there all the time."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """At the worst moment: rollout and update don't meet."""
        return self.state + max(self.rollout, self.update)


def preflight(settings: RunSettings, reference: Path, device: Device) -> Needs:
    """Tell what there is and what is needed; of several processes the first does.

    Raises InputError where a card that the pod was to have is missing or can't be used, and where weights, gradients
    and the optimizer's state alone are more than is free on it.
    """
    check_cards(settings, device)
    spread = int(os.environ.get("WORLD_SIZE", "1")) if settings.node.node_sharding else 1
    in_bf16, memory = precision_of(settings.ppo, device) == "bf16", device.memory()
    needs = estimate(settings, reference, spread, in_bf16)
    _tell(
        "preflight",
        device=device.name,
        cards=device.count(),
        memory=None if memory is None else vars(memory),
        needs={**vars(needs), "state": needs.state, "total": needs.total},
        versions={**versions(), **({"driver": device.driver()} if device.driver() else {})},
        message=_told(needs, memory, device),
    )
    if memory is not None:
        _check(needs, memory, settings, device.tool)
    return needs


def check_cards(settings: RunSettings, device: Device, step: str = "train_ppo") -> None:
    """Raises InputError where the pod should have cards and ``device`` is none, or where it doesn't answer.

    Without a cluster nothing is asked of one.
    """
    wanted = settings.node.node_accelerator
    if wanted and device.name == "cpu" and "KUBERNETES_SERVICE_HOST" in os.environ:
        raise InputError(
            f"node_accelerator={wanted!r}, but this container sees no card: node_image="
            f"{settings.node.node_image!r} must be the image for such cards, built from images/gpu or images/gaudi"
        )
    device.acquire()
    if device.driver_problem():
        _tell("warning", step=step, message=device.driver_problem())


def _told(needs: Needs, memory: Memory | None, device: Device) -> str:
    has = "" if memory is None else f" of {memory.total / GIB:.1f}"
    return (
        f"{device.count()} {device.name}, needs about {needs.total / GIB:.1f}{has} GiB per process: weights "
        f"{needs.weights / GIB:.1f}, gradients {needs.gradients / GIB:.1f}, Adam {needs.optimizer / GIB:.1f}, rollout "
        f"{needs.rollout / GIB:.1f} or update {needs.update / GIB:.1f}"
    )


def _check(needs: Needs, memory: Memory, settings: RunSettings, tool: str) -> None:
    remedy = "train adapters (model_lora_r=16)" if not settings.model.model_lora_r else "take a smaller model"
    if not settings.node.node_sharding:
        remedy += ", spread it over several cards (node_sharding=True)"
    if needs.state > memory.total:
        raise InputError(
            f"model_name={settings.ppo.model_name}: weights, gradients and Adam's state take {needs.state / GIB:.1f} "
            f"GiB, and a card has {memory.total / GIB:.1f}: {remedy}, or store weights in less (model_dtype=bfloat16)"
        )
    if needs.state > memory.total - memory.others:
        raise InputError(
            f"weights, gradients and Adam's state take {needs.state / GIB:.1f} GiB, and of the card's "
            f"{memory.total / GIB:.1f} another process holds {memory.others / GIB:.1f}: end it, or run on another "
            f"card; {tool} shows who it is"
        )
    if needs.total > memory.total:
        _tell(
            "warning",
            message=f"about {needs.total / GIB:.1f} GiB are needed and a card has {memory.total / GIB:.1f}: if memory "
            "runs out, lower mini_batch_size (with gradient_accumulation_steps), rollout_batch_size or "
            "rollout_max_new_tokens",
        )
    if memory.others > 0.1 * memory.total:
        _tell(
            "warning",
            message=f"another process holds {memory.others / GIB:.1f} of the card's {memory.total / GIB:.1f} GiB: look "
            f"for it with {tool}",
        )


def _tell(kind: str, step: str = "train_ppo", **what: Any) -> None:
    if os.environ.get("RANK", "0") == "0":
        emit(kind, step=step, **what)


def versions() -> dict[str, str]:
    """Of Python and the packages that decide how a training runs."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def estimate(settings: RunSettings, reference: Path, spread: int = 1, in_bf16: bool = False) -> Needs:
    """What one process needs to train the model in the directory ``reference``, from its files' headers alone.

    ``spread`` is the number of processes that weights, gradients and the optimizer's state are spread over. Where
    models compute ``in_bf16``, autocast keeps a copy of the weights that learn, for a rollout and for a minibatch.
    """
    shapes = _shapes(reference)
    config = json.loads((reference / "config.json").read_text(encoding="utf-8"))
    size = BYTES[settings.model.model_dtype]
    whole = sum(_count(shape) for shape in shapes.values())
    # A critic has no head of its own, unless it is tied to what it reads with.
    critics = int(settings.algorithm.ppo_separate_critic)
    critic = critics * (whole - sum(_count(shape) for name, shape in shapes.items() if name in HEADS))
    trunks, lora = 1 + critics, settings.model.model_lora_r
    if lora:
        # The reference is the policy without its adapters, which peft keeps in fp32.
        adapters = trunks * lora * sum(sum(shape) for name, shape in shapes.items() if _adapted(name, shape))
        weights, trained = (whole + critic) * size + 4 * adapters, 4 * adapters
    else:
        shared = sum(_count(s) for n, s in shapes.items() if _is_shared(n, settings.algorithm.ppo_shared_layers))
        weights = (2 * whole + critic - shared) * size
        trained = (whole + critic - shared) * size
    copies = trained // 2 if in_bf16 and size == BYTES["float32"] and not lora and spread == 1 else 0
    tokens = settings.rollout.rollout_max_new_tokens
    length = settings.ppo.pad_max_len or settings.data.data_max_prompt_tokens + tokens
    return Needs(
        weights=weights // spread,
        gradients=trained // spread,
        optimizer=2 * trained // spread,
        rollout=copies + _rollout(config, settings.rollout.rollout_batch_size, length, size),
        update=copies + _update(config, settings.ppo.mini_batch_size * trunks, length, tokens, size),
    )


def _shapes(directory: Path) -> dict[str, list[int]]:
    """Every tensor's shape."""
    from safetensors import safe_open

    found: dict[str, list[int]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return found


def _count(shape: list[int]) -> int:
    product = 1
    for extent in shape:
        product *= extent
    return product


def _adapted(name: str, shape: list[int]) -> bool:
    """Whether LoRA on all linear layers adapts it."""
    return len(shape) == 2 and _layer(name) is not None


def _is_shared(name: str, layers: int) -> bool:
    if not layers:
        return False
    layer = _layer(name)
    return layer < layers if layer is not None else bool(re.search(r"embed|wte|wpe", name))


def _layer(name: str) -> int | None:
    found = re.search(r"\.(\d+)\.", name)
    return int(found.group(1)) if found else None


def _of(config: dict[str, Any], *names: str) -> int:
    """The first of ``names`` that the model's config has; 0 where there is none."""
    return next((int(config[name]) for name in names if config.get(name)), 0)


def _rollout(config: dict[str, Any], rows: int, length: int, size: int) -> int:
    """Keys and values of a whole batch, and a token's logits in fp32 with the copies that sampling makes."""
    heads = _of(config, "num_attention_heads", "n_head", "num_heads")
    hidden = _of(config, "hidden_size", "n_embd", "d_model")
    width = _of(config, "head_dim", "d_kv") or (hidden // heads if heads else 0)
    kept = 2 * _layers(config) * (_of(config, "num_key_value_heads") or heads) * width * length * rows * size
    return kept + max(rows, SCORING_TOKENS) * _of(config, "vocab_size") * 4 * 3


def _update(config: dict[str, Any], rows: int, length: int, response: int, size: int) -> int:
    """What a minibatch's forward pass keeps, and its responses' logits with their softmax, as precise as the model."""
    hidden = _of(config, "hidden_size", "n_embd", "d_model")
    kept = ACTIVATIONS * size // 2 * _layers(config) * rows * length * hidden
    return kept + rows * response * _of(config, "vocab_size") * size * 2


def _layers(config: dict[str, Any]) -> int:
    return _of(config, "num_hidden_layers", "n_layer", "num_layers")
