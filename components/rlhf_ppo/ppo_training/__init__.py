"""The step train_ppo."""
