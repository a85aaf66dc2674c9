"""One of several training processes; rlhf_ppo.launch starts them."""

import sys

from rlhf_ppo.launch import in_process
from rlhf_ppo.ppo_training.train import train_from_names

if __name__ == "__main__":
    in_process(train_from_names, sys.argv[1])
