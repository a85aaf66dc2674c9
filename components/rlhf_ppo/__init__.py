"""What runs inside the containers: the steps of the pipeline and the PPO algorithm."""

__version__ = "0.1.0"
