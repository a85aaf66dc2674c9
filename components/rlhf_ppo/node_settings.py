"""The parameters of the pods that train and evaluate."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from rlhf_ppo.fields import Checked, declare
from rlhf_ppo.images import CPU_IMAGE

_QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?")
_TOLERATION = {"key", "operator", "value", "effect", "tolerationSeconds"}


@dataclass(frozen=True)
class NodeSettings(Checked):
    """What training and evaluation run on; of these one machine reads node_processes, _sharding, _timeout_seconds."""

    node_image: str = declare(
        CPU_IMAGE, "Image of training and evaluation: the one built from images/gpu or images/gaudi on an accelerator."
    )
    node_accelerator: str = declare(
        "", "Kubernetes resource of a card, e.g. nvidia.com/gpu or habana.ai/gaudi; empty for none."
    )
    node_accelerator_count: int = declare(
        0, "Cards of a training pod; evaluation has one.", unit="cards per pod", minimum=0
    )
    node_cpu: str = declare(
        "0", "CPU of a training or evaluation pod, requested and not exceeded, e.g. 8 or 500m; 0 asks for none."
    )
    node_memory: str = declare(
        "0", "Memory of a training or evaluation pod, requested and not exceeded, e.g. 64Gi; 0 asks for none."
    )
    node_selector: dict[str, Any] = declare({}, 'Labels of the nodes to run on, e.g. {"pool": "gaudi2"}.')
    node_tolerations: list[Any] = declare(
        [],
        'Kubernetes tolerations, e.g. [{"key": "habana.ai/gaudi", "operator": "Exists", "effect": "NoSchedule"}].',
    )
    node_timeout_seconds: int = declare(
        0,
        "Longest time of one attempt at training, which then writes a checkpoint and fails; KFP makes three. 0 is no "
        "limit.",
        unit="seconds",
        minimum=0,
    )
    node_processes: int = declare(
        0,
        "Training processes in a pod, connected, each with batch_size samples of its own; 0 is one per card, and one "
        "on a CPU.",
        minimum=0,
    )
    node_sharding: bool = declare(
        False,
        "Spread weights, gradients and Adam's state over all processes (FSDP2), for models that don't fit one card; "
        "needs pad_for_acceleration.",
    )
    node_count: int = declare(
        0,
        "Training pods, as a Kubeflow TrainJob on a volume that all mount (compile --volume); 0 trains in the step's "
        "own pod.",
        minimum=0,
    )
    node_resources: dict[str, Any] = declare(
        {},
        "With node_count: more resources of a training pod, which KFP can't ask for, e.g. "
        '{"hugepages-2Mi": "95000Mi"}.',
    )
    node_runtime: str = declare("torch-distributed", "With node_count: the ClusterTrainingRuntime of the TrainJob.")

    def relations(self) -> list[str]:
        """The problems that concern more than one field."""
        found = []
        if bool(self.node_accelerator) != bool(self.node_accelerator_count):
            found.append(
                f"node_accelerator={self.node_accelerator!r} and node_accelerator_count={self.node_accelerator_count}: "
                "name a resource and give how many, or neither"
            )
        if self.node_processes > self.node_accelerator_count > 0:
            found.append(
                f"node_processes={self.node_processes} exceeds node_accelerator_count={self.node_accelerator_count}: a "
                "process has a card of its own; set as many cards, or 0 for one process on each"
            )
        if self.node_accelerator.startswith("nvidia.com/mig-") and self.node_accelerator_count > 1:
            found.append(
                f"node_accelerator_count={self.node_accelerator_count} of {self.node_accelerator}: parts of a GPU "
                "can't be connected to each other: set 1"
            )
        for name, quantity in (("node_cpu", self.node_cpu), ("node_memory", self.node_memory)):
            if not _QUANTITY.fullmatch(quantity):
                found.append(
                    f"{name}={quantity!r} is no quantity of Kubernetes: give e.g. 8, 500m or 64Gi, or 0 for none"
                )
        found += [
            f"node_selector has {value!r} for {label!r}: a label's value is a text; put it in quotes"
            for label, value in self.node_selector.items()
            if not isinstance(value, str)
        ]
        found += [
            f"node_tolerations holds {toleration!r}: give objects with some of key, operator, value, effect and "
            "tolerationSeconds"
            for toleration in self.node_tolerations
            if not isinstance(toleration, dict) or not toleration.keys() <= _TOLERATION
        ]
        if self.node_resources and not self.node_count:
            found.append(
                f"node_resources={self.node_resources!r} has no effect without node_count, which makes a TrainJob: set "
                "node_count=1, or leave it empty"
            )
        return found
