"""Compile the pipeline, and each component by itself, to what KFP reads."""

from __future__ import annotations

from pathlib import Path

from kfp import compiler, dsl

import rlhf_ppo
from rlhf_pipelines.ppo import ppo
from rlhf_ppo.config_validation.component import validate_config
from rlhf_ppo.dataset_preparation.component import prepare_dataset
from rlhf_ppo.hub_push.component import push_to_hub
from rlhf_ppo.policy_evaluation.component import evaluate_policy, gate
from rlhf_ppo.ppo_training.component import train_ppo
from rlhf_ppo.reference_snapshot.component import snapshot_reference
from rlhf_ppo.run_conclusion.component import conclude_run

COMPILED = Path(__file__).parent / "compiled" / "ppo.yaml"
"""The compiled pipeline as it ships."""

_STEPS = Path(rlhf_ppo.__file__).parent

COMPONENTS: dict[Path, dsl.base_component.BaseComponent] = {
    _STEPS / "config_validation" / "component.yaml": validate_config,
    _STEPS / "reference_snapshot" / "component.yaml": snapshot_reference,
    _STEPS / "dataset_preparation" / "component.yaml": prepare_dataset,
    _STEPS / "ppo_training" / "component.yaml": train_ppo,
    _STEPS / "policy_evaluation" / "component.yaml": evaluate_policy,
    _STEPS / "policy_evaluation" / "gate.component.yaml": gate,
    _STEPS / "hub_push" / "component.yaml": push_to_hub,
    _STEPS / "run_conclusion" / "component.yaml": conclude_run,
}
"""Where each component's compiled form stands."""


def compile_pipeline(path: Path) -> None:
    """Write the compiled pipeline to ``path``, a YAML file."""
    compiler.Compiler().compile(ppo, str(path))


def compile_component(component: dsl.base_component.BaseComponent, path: Path) -> None:
    """Write a compiled component to ``path``, a YAML file."""
    compiler.Compiler().compile(component, str(path))
