"""What a trainer runs on: processes, devices and trackers through accelerate, and its optimizer."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from torch import Tensor

from rlhf_ppo.config import PPOConfig
from rlhf_ppo.errors import InputError
from rlhf_ppo.ppo.models import PolicyWithValueHead


def make_accelerator(config: PPOConfig) -> Accelerator:
    """accelerate's view of this process, with the trackers that log_with names. Raises InputError for fp16."""
    project = ProjectConfiguration(**config.project_kwargs) if config.project_kwargs else None
    accelerator = Accelerator(log_with=config.log_with, project_config=project, **config.accelerator_kwargs)
    if accelerator.mixed_precision == "fp16":
        raise InputError(
            "accelerator_kwargs has mixed_precision='fp16', whose gradients overflow without a scaled loss: use bf16"
        )
    if config.log_with is not None:
        settings = {
            name: value if isinstance(value, (int, float)) else str(value) for name, value in config.to_dict().items()
        }
        accelerator.init_trackers(config.tracker_project_name, config=settings, init_kwargs=config.tracker_kwargs)
    return accelerator


def adam(policy: PolicyWithValueHead, learning_rate: float, critic_learning_rate: float | None) -> torch.optim.Adam:
    """Adam on what is trained; a separate critic (and its value head) may have a rate of its own."""
    of_critic = [] if policy.critic is None else [*policy.critic.parameters(), *policy.v_head.parameters()]
    apart = {id(parameter) for parameter in of_critic}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in policy.parameters() if p.requires_grad and id(p) not in apart]},
        {"params": [p for p in of_critic if p.requires_grad], "lr": critic_learning_rate or learning_rate},
    ]
    groups = [group for group in groups if group["params"]]
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in policy.parameters())
    return torch.optim.Adam(groups, lr=learning_rate, fused=fused or None)


def step_unless(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """One step of ``optimizer``, left out without a trace where the 0-d ``skip`` is true.

    A fused optimizer leaves it out on the device; for another the host reads ``skip``.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        fused: Any = optimizer
        fused.grad_scale, fused.found_inf = None, skip.float()
        try:
            optimizer.step()
        finally:
            del fused.grad_scale, fused.found_inf
    elif not bool(skip):
        optimizer.step()
