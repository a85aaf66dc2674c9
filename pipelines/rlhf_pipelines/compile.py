"""Compile the pipeline, and each component by itself, to what KFP reads."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from kfp import compiler, dsl

import rlhf_ppo
from rlhf_pipelines.ppo import ppo
from rlhf_ppo.change_detection.component import detect_changes
from rlhf_ppo.config_validation.component import validate_config
from rlhf_ppo.dataset_preparation.component import prepare_dataset
from rlhf_ppo.errors import InputError
from rlhf_ppo.hub_push.component import push_to_hub
from rlhf_ppo.images import CPU_IMAGE
from rlhf_ppo.policy_evaluation.component import evaluate_policy, gate
from rlhf_ppo.ppo_training.component import train_ppo
from rlhf_ppo.reference_snapshot.component import snapshot_reference
from rlhf_ppo.run_conclusion.component import conclude_run
from rlhf_ppo.volume import VOLUME_PATH, volume_environment

COMPILED = Path(__file__).parent / "compiled" / "ppo.yaml"
"""The compiled pipeline as it ships."""

_STEPS = Path(rlhf_ppo.__file__).parent

COMPONENTS: dict[Path, dsl.base_component.BaseComponent] = {
    _STEPS / "config_validation" / "component.yaml": validate_config,
    _STEPS / "change_detection" / "component.yaml": detect_changes,
    _STEPS / "reference_snapshot" / "component.yaml": snapshot_reference,
    _STEPS / "dataset_preparation" / "component.yaml": prepare_dataset,
    _STEPS / "ppo_training" / "component.yaml": train_ppo,
    _STEPS / "policy_evaluation" / "component.yaml": evaluate_policy,
    _STEPS / "policy_evaluation" / "gate.component.yaml": gate,
    _STEPS / "hub_push" / "component.yaml": push_to_hub,
    _STEPS / "run_conclusion" / "component.yaml": conclude_run,
}
"""Where each component's compiled form stands."""


def packaged(image: str | None = None, volume: str | None = None) -> str:
    """The compiled pipeline as YAML, with ``image`` for its steps and the claim ``volume`` mounted where it trains.

    Raises InputError where one of them is no name.
    """
    text = COMPILED.read_text(encoding="utf-8")
    if image:
        if not re.fullmatch(r"[\w./:@-]+", image):
            raise InputError(f"--image={image!r} is no name of an image: give e.g. registry.example/rlhf-ppo/cpu:0.1.0")
        text = text.replace(CPU_IMAGE, image)  # Of every step, and the default of node_image.
    return _with_volume(text, volume) if volume else text


def _with_volume(text: str, claim: str) -> str:
    if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", claim):
        raise InputError(f"--volume={claim!r} is no name of a claim: use lower-case letters, digits, '-' and '.'")
    comments = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    spec, platform = yaml.safe_load_all(text)
    container = spec["deploymentSpec"]["executors"]["exec-train-ppo"]["container"]
    container["env"] += [{"name": name, "value": value} for name, value in volume_environment(claim).items()]
    mounted = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-train-ppo"]
    # As kfp.kubernetes.mount_pvc writes it.
    name = {"runtimeValue": {"constant": claim}}
    mounted["pvcMount"] = [{"constant": claim, "mountPath": VOLUME_PATH, "pvcNameParameter": name}]
    return comments + yaml.safe_dump_all([spec, platform], sort_keys=True)


def compile_pipeline(path: Path) -> None:
    """Write the compiled pipeline to ``path``, a YAML file."""
    compiler.Compiler().compile(ppo, str(path))


def compile_component(component: dsl.base_component.BaseComponent, path: Path) -> None:
    """Write a compiled component to ``path``, a YAML file."""
    compiler.Compiler().compile(component, str(path))
