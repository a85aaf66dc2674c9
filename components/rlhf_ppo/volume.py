"""The volume that outlives training's pods, where the pipeline was compiled with one."""

from __future__ import annotations

VOLUME_PATH = "/mnt/rlhf-ppo"
"""Where it is mounted."""
CLAIM_VARIABLE = "RLHF_PPO_VOLUME"
"""Environment variable with the name of its persistent volume claim."""
PATH_VARIABLE = "RLHF_PPO_VOLUME_PATH"
"""Environment variable with the place where it is mounted."""
CHECKPOINTS_VARIABLE = "RLHF_PPO_CHECKPOINTS"
"""Environment variable with the directory of checkpoints where checkpoint_dir is empty."""


def volume_environment(claim: str) -> dict[str, str]:
    """What a step finds in its environment where the claim ``claim`` is mounted."""
    return {
        CLAIM_VARIABLE: claim,
        PATH_VARIABLE: VOLUME_PATH,
        CHECKPOINTS_VARIABLE: f"{VOLUME_PATH}/checkpoints",
    }
