"""The PPO algorithm on torch and transformers: no pipeline, no tracking server, no files."""

from rlhf_ppo.ppo.loop import Prompt, StepReport, train
from rlhf_ppo.ppo.models import PolicyWithValueHead
from rlhf_ppo.ppo.sampling import Sampling
from rlhf_ppo.ppo.trainer import PPOTrainer

__all__ = ["PPOTrainer", "PolicyWithValueHead", "Prompt", "Sampling", "StepReport", "train"]
