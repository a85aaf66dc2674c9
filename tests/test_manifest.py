"""The pipeline as Kubernetes resources: KFP's own form, versions named by content, and a check for what lies in git."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import compiler
from kfp.compiler import KubernetesManifestOptions

from rlhf_pipelines.compile import packaged
from rlhf_pipelines.manifest import manifest
from rlhf_pipelines.ppo import ppo


def rlhf_ppo(here: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rlhf_pipelines.cli", *arguments]
    return subprocess.run(command, cwd=here, capture_output=True, text=True)


def resources(text: str) -> dict[str, Any]:
    return {found["kind"]: found for found in yaml.safe_load_all(text)}


def test_the_resources_are_those_that_kfps_own_compiler_writes(tmp_path: Path) -> None:
    ours = resources(manifest(packaged()))
    options = KubernetesManifestOptions(
        pipeline_name="rlhf-ppo",
        pipeline_display_name="RLHF with PPO",
        pipeline_version_name=ours["PipelineVersion"]["metadata"]["name"],
        include_pipeline_manifest=True,
    )
    path = str(tmp_path / "theirs.yaml")
    compiler.Compiler().compile(ppo, path, kubernetes_manifest_format=True, kubernetes_manifest_options=options)
    theirs = resources(Path(path).read_text())
    for found in (*ours.values(), *theirs.values()):
        found["spec"].get("pipelineSpec", {}).pop("sdkVersion", None)
    assert ours == theirs


def test_a_version_is_named_by_its_content_as_kubernetes_takes_names() -> None:
    texts = (packaged(), packaged(), packaged(image="registry.example/ppo:1"), packaged(volume="training"))
    names = [resources(manifest(text))["PipelineVersion"]["metadata"]["name"] for text in texts]
    assert names[0] == names[1] and len(set(names)) == 3
    assert all(re.fullmatch(r"rlhf-ppo-\d+-\d+-\d+-[0-9a-f]{10}", name) for name in names)


FLAGS = ["compile", "--kubernetes", "--image", "registry.example/ppo:1", "--volume", "training", "-o", "pipeline.yaml"]


def test_what_was_compiled_passes_the_check_and_only_with_the_same_flags(tmp_path: Path) -> None:
    missing = rlhf_ppo(tmp_path, *FLAGS, "--check")
    assert missing.returncode == 1 and "pipeline.yaml does not exist: run rlhf-ppo compile" in missing.stderr
    assert rlhf_ppo(tmp_path, *FLAGS).returncode == 0
    assert rlhf_ppo(tmp_path, *FLAGS, "--check").returncode == 0
    other = rlhf_ppo(tmp_path, "compile", "--kubernetes", "-o", "pipeline.yaml", "--check")
    assert other.returncode == 1
    assert other.stderr == "pipeline.yaml is stale: run rlhf-ppo compile --kubernetes -o pipeline.yaml\n"
    before = (tmp_path / "pipeline.yaml").read_text()
    plain = rlhf_ppo(tmp_path, "compile", "-o", "pipeline.yaml", "--check")
    assert plain.returncode == 1 and (tmp_path / "pipeline.yaml").read_text() == before, "a check writes nothing"


@pytest.mark.parametrize("edited", ["pipelineSpec", "platformSpec"])
def test_a_version_that_was_edited_under_its_name_is_named_also_where_it_is_old(tmp_path: Path, edited: str) -> None:
    rlhf_ppo(tmp_path, *FLAGS)
    path = tmp_path / "pipeline.yaml"
    pipeline, version = yaml.safe_load_all(path.read_text())
    old = version["metadata"]["name"].replace("rlhf-ppo-", "rlhf-ppo-0-")
    version["metadata"]["name"] = old
    path.write_text(yaml.safe_dump_all([pipeline, version]))
    assert "is not what its name stands for" not in rlhf_ppo(tmp_path, *FLAGS, "--check").stderr
    version["spec"][edited]["more"] = 1
    path.write_text(yaml.safe_dump_all([pipeline, version]))
    done = rlhf_ppo(tmp_path, *FLAGS, "--check")
    assert done.returncode == 1
    assert f"the content of PipelineVersion {old} is not what its name stands for" in done.stderr
    assert "run rlhf-ppo compile --kubernetes --image registry.example/ppo:1 --volume training -o" in done.stderr


def test_a_check_needs_a_file_and_takes_what_is_no_yaml_for_stale(tmp_path: Path) -> None:
    done = rlhf_ppo(tmp_path, "compile", "--check")
    assert done.returncode == 2 and "--check needs a file to look at: add -o FILE" in done.stderr
    (tmp_path / "broken.yaml").write_text("a: [")
    done = rlhf_ppo(tmp_path, "compile", "--check", "-o", "broken.yaml")
    assert done.returncode == 1 and "broken.yaml is no YAML" in done.stderr
