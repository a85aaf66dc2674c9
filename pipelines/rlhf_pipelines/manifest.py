"""The pipeline as Kubernetes resources, for KFP's Kubernetes-native mode, and whether what lies in git is still it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from rlhf_ppo import __version__
from rlhf_ppo.errors import InputError

API = "pipelines.kubeflow.org/v2beta1"


def manifest(package: str) -> str:
    """A Pipeline and a PipelineVersion with the compiled pipeline ``package``, as YAML, without a namespace.

    The cluster refuses a version whose content changed, so that content decides the name.
    """
    spec, platform = yaml.safe_load_all(package)
    info, content = spec["pipelineInfo"], {"pipelineSpec": spec, "platformSpec": platform}
    name, about = info["name"], {"description": info["description"]}
    pipeline = {"displayName": info["displayName"], **about}
    version = {"displayName": version_name(name, content), "pipelineName": name, **about, **content}
    resources = [
        {"apiVersion": API, "kind": "Pipeline", "metadata": {"name": name}, "spec": pipeline},
        {
            "apiVersion": API,
            "kind": "PipelineVersion",
            "metadata": {"name": version_name(name, content)},
            "spec": version,
        },
    ]
    return "# Written by rlhf-ppo compile --kubernetes.\n" + yaml.safe_dump_all(resources, sort_keys=True)


def version_name(pipeline: str, content: dict[str, Any]) -> str:
    """The name of the version of ``pipeline`` with these ``pipelineSpec`` and ``platformSpec``."""
    canonical = json.dumps({key: content.get(key) for key in ("pipelineSpec", "platformSpec")}, sort_keys=True)
    return f"{pipeline}-{__version__.replace('.', '-')}-{hashlib.sha256(canonical.encode()).hexdigest()[:10]}"


def problems_of(path: Path, expected: str, command: str) -> list[str]:
    """What is wrong with the file ``path`` that ``command`` writes as ``expected``.

    Raises InputError where it can't be read.
    """
    if not path.is_file():
        return [f"{path} does not exist: run {command}"]
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"-o {path} can't be read: {error}; name a file that {command} wrote") from error
    found = [] if text == expected else [f"{path} is stale: run {command}"]
    try:
        resources = [found for found in yaml.safe_load_all(text) if isinstance(found, dict)]
    except yaml.YAMLError as error:
        return [*found, f"{path} is no YAML: {error}"]
    for resource in resources:
        if resource.get("kind") == "PipelineVersion":
            name, spec = resource["metadata"]["name"], resource["spec"]
            # The middle of the name is the version of this package, which an older file doesn't have.
            if name.rpartition("-")[2] != version_name("", spec).rpartition("-")[2]:
                found.append(
                    f"{path}: the content of PipelineVersion {name} is not what its name stands for; clusters refuse "
                    f"to change a version: run {command}, which names a new one"
                )
    return found
