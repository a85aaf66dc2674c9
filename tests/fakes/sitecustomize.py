"""Put on PYTHONPATH: the work of every step but the first is light work that writes down how it was called.

But for the modules of work that REAL names, separated by commas.
"""

import importlib.abc
import importlib.util
import os
import sys
from pathlib import Path

WORK = {
    "rlhf_ppo.change_detection.detect",
    "rlhf_ppo.reference_snapshot.snapshot",
    "rlhf_ppo.dataset_preparation.prepare",
    "rlhf_ppo.ppo_training.train",
    "rlhf_ppo.policy_evaluation.evaluate",
    "rlhf_ppo.policy_evaluation.gate",
    "rlhf_ppo.hub_push.push",
    "rlhf_ppo.run_conclusion.conclude",
}


class LightWork(importlib.abc.MetaPathFinder):
    """Finds each work module in light_work.py."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in WORK or fullname.rpartition(".")[2] in os.environ.get("REAL", "").split(","):
            return None
        if fullname.endswith("." + os.environ["NOT_INSTALLED"]):
            raise ModuleNotFoundError("No module named 'torch'")
        return importlib.util.spec_from_file_location(fullname, Path(__file__).parent / "light_work.py")


sys.meta_path.insert(0, LightWork())
