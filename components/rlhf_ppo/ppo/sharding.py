"""Models spread over all processes (FSDP2; Zhao et al. 2023): each holds a part of every weight.

A pass collects one layer's weights at a time, so that all processes must make the same passes in the same order.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from rlhf_ppo.errors import InputError
from rlhf_ppo.ppo.models import PolicyWithValueHead, decoder_start, layers_of


class Sharding:
    """Spreads ``policy`` and ``reference`` over the processes of ``accelerator``.

    Weights are collected in bf16 where ``accelerator`` computes in it, and gradients averaged in fp32. Raises
    InputError for an encoder-decoder, whose encoder is called by itself.
    """

    def __init__(self, accelerator: Accelerator, policy: PolicyWithValueHead, reference: nn.Module | None) -> None:
        if decoder_start(policy.pretrained_model) is not None:
            raise InputError("node_sharding=True: an encoder-decoder model can't be spread: set it to False")
        self.accelerator = accelerator
        self.mesh: DeviceMesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        in_bf16 = accelerator.mixed_precision == "bf16"
        self.precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if in_bf16 else MixedPrecisionPolicy()
        self.empty = _without_weights(policy)
        for model in (policy.pretrained_model, policy.critic, reference):
            if model is not None:
                self._spread(model)
        # By itself, since sampling calls it by itself; it stays fp32.
        fully_shard(policy.v_head, mesh=self.mesh)

    def _spread(self, model: nn.Module) -> None:
        """Layer by layer, so that no device ever holds all of ``model``."""
        for layer in layers_of(model):
            fully_shard(layer, mesh=self.mesh, mp_policy=self.precision)
        fully_shard(model, mesh=self.mesh, mp_policy=self.precision, reshard_after_forward=True)

    def agreed(self, here: Tensor) -> bool:
        """Whether ``here``, 0-d, is true on all processes, which must all call it."""
        return bool(self.accelerator.reduce(here.float(), reduction="sum") == self.accelerator.num_processes)

    def whole(self, policy: PolicyWithValueHead) -> Any:
        """A copy of ``policy`` with all of its weights on the CPU, but for a separate critic's; all processes call it.

        None on processes other than the main one.
        """
        own = dict(policy.named_parameters(remove_duplicate=False))
        found: dict[int, Tensor] = {}
        for name, parameter in policy.named_parameters():
            if not name.startswith("critic."):
                collected = everywhere(parameter.detach())
                if self.accelerator.is_main_process:
                    found[id(parameter)] = collected.cpu()
        if not self.accelerator.is_main_process:
            return None
        made = copy.deepcopy(self.empty)
        for name, _ in list(made.named_parameters(remove_duplicate=False)):
            place, _, leaf = name.rpartition(".")
            if id(own[name]) in found:
                setattr(made.get_submodule(place), leaf, nn.Parameter(found[id(own[name])], own[name].requires_grad))
        return made


def local(tensor: Tensor) -> Tensor:
    """This process' part of a tensor that is spread; another is itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def everywhere(tensor: Tensor) -> Tensor:
    """The whole of a tensor that is spread; all processes must call it. Another is itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(part: Tensor, model: Tensor) -> Tensor:
    """The tensor of which ``part`` is this process' part, spread as ``model`` is; scalars are nowhere spread."""
    if not isinstance(model, DTensor) or part.dim() == 0:
        return part
    on = part.to(model.device)
    return DTensor.from_local(
        on, model.device_mesh, model.placements, run_check=False, shape=model.shape, stride=model.stride()
    )


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy that takes no memory for weights."""
    nothing = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, nothing)
