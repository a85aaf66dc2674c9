"""What a trainer runs on: processes, devices and trackers through accelerate; its optimizer, and what is trained."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, ProjectConfiguration
from torch import Tensor, nn

from rlhf_ppo.config import PPOConfig
from rlhf_ppo.devices import Device
from rlhf_ppo.errors import InputError
from rlhf_ppo.ppo.models import PolicyWithValueHead
from rlhf_ppo.ppo.sharding import local, spread_like

PATIENCE = timedelta(hours=2)
"""How long processes wait for each other, e.g. while the first reads a large checkpoint; NCCL's own is ten minutes."""


def make_accelerator(config: PPOConfig, device: Device) -> Accelerator:
    """accelerate's view of this process, with the trackers that log_with names.

    Raises InputError for fp16.
    """
    project = ProjectConfiguration(**config.project_kwargs) if config.project_kwargs else None
    # A language model's buffers are constants: nothing of them has to be sent with every pass.
    connected = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    handlers = [connected, InitProcessGroupKwargs(timeout=PATIENCE)]
    precision = precision_of(config, device)
    settings = {"kwargs_handlers": handlers, **config.accelerator_kwargs, "mixed_precision": precision}
    accelerator = Accelerator(log_with=config.log_with, project_config=project, **settings)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started:
        raise InputError(
            f"{started} processes were started, and accelerate connects {accelerator.num_processes}: on CPUs it wants "
            "ACCELERATE_USE_CPU=true in the environment"
        )
    if accelerator.mixed_precision == "fp16":
        raise InputError(
            "accelerator_kwargs has mixed_precision='fp16', whose gradients overflow without a scaled loss: use bf16"
        )
    if config.log_with is not None:
        told = {
            name: value if isinstance(value, (int, float)) else str(value) for name, value in config.to_dict().items()
        }
        accelerator.init_trackers(config.tracker_project_name, config=told, init_kwargs=config.tracker_kwargs)
    return accelerator


def precision_of(config: PPOConfig, device: Device) -> str:
    """What models compute in, in accelerate's words: what accelerator_kwargs says, or the environment as accelerate
    reads it, or else the device's own.
    """
    own = os.environ.get("ACCELERATE_MIXED_PRECISION", device.precision)
    return str(config.accelerator_kwargs.get("mixed_precision") or own)


class Adam(torch.optim.Optimizer):
    """Adam (Kingma and Ba 2015) where torch has no fused one: it needs no host, and steps can be skipped on the device.

    Its state is that of torch.optim.Adam.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None, *, skip: Tensor | None = None) -> None:  # type: ignore[override]
        """One step; where the 0-d boolean ``skip`` is true nothing changes, whatever the gradients are."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._step(
                    group, parameters, local(parameters[0]).new_zeros((), dtype=torch.bool) if skip is None else skip
                )

    def _step(self, group: dict[str, Any], parameters: list[Tensor], skip: Tensor) -> None:
        for p in parameters:
            if not self.state[p]:
                zeros = [torch.zeros_like(p), torch.zeros_like(p)]
                self.state[p].update(step=local(p).new_zeros(()), exp_avg=zeros[0], exp_avg_sq=zeros[1])
        steps, means, squares = (
            [self.state[p][name] for p in parameters] for name in ("step", "exp_avg", "exp_avg_sq")
        )
        gradients = [torch.where(skip, 0, local(p.grad)) for p in parameters if p.grad is not None]
        # What is spread over processes is computed part by part.
        parameters, means, squares = ([local(t) for t in tensors] for tensors in (parameters, means, squares))
        beta1, beta2 = group["betas"]
        taken = (~skip).to(steps[0].dtype)
        # A number that changes is a tensor: a graph compiled for it as a constant would be compiled again.
        rate = torch.full_like(taken, group["lr"])
        torch._foreach_add_(steps, [taken] * len(steps))
        for kept, new, beta in ((means, gradients, beta1), (squares, torch._foreach_mul(gradients, gradients), beta2)):
            change = torch._foreach_sub(new, kept)
            torch._foreach_mul_(change, [taken * (1 - beta)] * len(change))
            torch._foreach_add_(kept, change)
        # A first step that is skipped leaves 0 in the correction and in what it divides.
        corrections = [[(1 - beta**step).clamp(min=1 - beta) for step in steps] for beta in (beta1, beta2)]
        below = torch._foreach_sqrt(squares)
        torch._foreach_div_(below, [correction.sqrt() for correction in corrections[1]])
        torch._foreach_add_(below, group["eps"])
        change = torch._foreach_div(means, below)
        torch._foreach_mul_(change, [rate * taken / correction for correction in corrections[0]])
        torch._foreach_sub_(parameters, change)


def adam(
    policy: PolicyWithValueHead, learning_rate: float, critic_learning_rate: float | None
) -> torch.optim.Optimizer:
    """Adam on what is trained; a separate critic (and its value head) may have a rate of its own."""
    of_critic = [] if policy.critic is None else [*policy.critic.parameters(), *policy.v_head.parameters()]
    apart = {id(parameter) for parameter in of_critic}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in policy.parameters() if p.requires_grad and id(p) not in apart]},
        {"params": [p for p in of_critic if p.requires_grad], "lr": critic_learning_rate or learning_rate},
    ]
    groups = [group for group in groups if group["params"]]
    if all(parameter.device.type in ("cpu", "cuda") for parameter in policy.parameters()):
        return torch.optim.Adam(groups, lr=learning_rate, fused=True)
    return Adam(groups, lr=learning_rate)


def step_unless(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """One step of ``optimizer``, left out without a trace where the 0-d ``skip`` is true.

    Adam leaves it out on the device, as torch's fused optimizers do; for another the host reads ``skip``.
    """
    if isinstance(optimizer, Adam):
        optimizer.step(skip=skip)
    elif getattr(optimizer, "_step_supports_amp_scaling", False):
        fused: Any = optimizer
        fused.grad_scale, fused.found_inf = None, skip.float()
        try:
            optimizer.step()
        finally:
            del fused.grad_scale, fused.found_inf
    elif not bool(skip):
        optimizer.step()


def state_of(policy: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> dict[str, Any]:
    """What is trained, and the state of what trains it."""
    return {
        "policy": {name: value.detach() for name, value in _trained(policy).items()},
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": None if scheduler is None else scheduler.state_dict(),
    }


def restore(state: dict[str, Any], policy: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """The inverse of ``state_of``; of what is spread, ``state`` has this process' part.

    Raises InputError where it is of another policy.
    """
    trained = _trained(policy)
    other = sorted(set(trained) ^ set(state["policy"]))
    if other:
        raise InputError(f"the state is of another policy: {', '.join(other[:3])} in only one of the two")
    with torch.no_grad():
        for name, parameter in trained.items():
            local(parameter).copy_(state["policy"][name])
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    of_parameters = {
        index: {
            name: spread_like(value, parameters[index]) if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        for index, values in state["optimizer"]["state"].items()
    }
    optimizer.load_state_dict({**state["optimizer"], "state": of_parameters})
    if scheduler is not None:
        scheduler.load_state_dict(state["lr_scheduler"])


def _trained(policy: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in policy.named_parameters() if value.requires_grad}
