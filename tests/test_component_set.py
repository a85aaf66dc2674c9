"""Each component as kubeflow/pipelines-components takes one: metadata by its schema, a README, YAML that loads."""

from __future__ import annotations

import datetime
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_pipelines.compile import COMPONENTS

ROOT = Path(__file__).parent.parent
STEPS = ROOT / "components" / "rlhf_ppo"
METADATA = {path.with_name(path.name.replace("component.yaml", "metadata.yaml")): path for path in COMPONENTS}
EXTRAS: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
PACKAGES = {
    "Pipelines": "kfp",
    "Trainer": "kubeflow-trainer-api",
    "MLflow": "mlflow",
    "Hugging Face Hub": "huggingface_hub",
}
"""What metadata call a service, and the package that asks for a version of it."""


def read(path: Path) -> dict[str, Any]:
    found = yaml.safe_load(path.read_text())
    assert isinstance(found, dict)
    return found


def test_there_is_metadata_for_every_component_and_for_nothing_else() -> None:
    assert set(STEPS.rglob("*metadata.yaml")) == set(METADATA)


@pytest.mark.parametrize("path", METADATA, ids=lambda path: str(path.relative_to(STEPS)))
def test_metadata_are_by_the_schema_of_pipelines_components(path: Path) -> None:
    """kubeflow/pipelines-components, scripts/validate_metadata/metadata_schema.json."""
    found = read(path)
    assert {"name", "stability", "dependencies", "lastVerified"} <= set(found)
    assert set(found) <= {"name", "stability", "dependencies", "lastVerified", "tags", "ci", "links", "description"}
    assert found["name"] == read(METADATA[path])["pipelineInfo"]["name"].replace("-", "_")
    assert found["stability"] in ("alpha", "beta", "stable")
    assert isinstance(found["lastVerified"], datetime.datetime) and found["lastVerified"].tzinfo
    assert all(isinstance(tag, str) and re.fullmatch("[a-z_]+", tag) for tag in found["tags"])
    assert len(set(found["tags"])) == len(found["tags"])
    assert isinstance(found["description"], str)
    dependencies = found["dependencies"]
    assert {"kubeflow"} <= set(dependencies) <= {"kubeflow", "external_services"}
    assert "Pipelines" in [each["name"] for each in dependencies["kubeflow"]]
    for each in (*dependencies["kubeflow"], *dependencies.get("external_services", [])):
        assert set(each) == {"name", "version"}
        assert re.fullmatch(r"(==|>=|<=|~=)?(0|[1-9]\d*)(\.(0|[1-9]\d*)){2}", each["version"])


@pytest.mark.parametrize("path", METADATA, ids=lambda path: str(path.relative_to(STEPS)))
def test_metadata_ask_for_the_versions_that_the_package_asks_for(path: Path) -> None:
    floors = {re.split("[<>=]", text)[0]: text for extra in EXTRAS.values() for text in extra}
    for each in (each for group in read(path)["dependencies"].values() for each in group):
        floor = re.search(r">=([\d.]+)", floors[PACKAGES[each["name"]]])
        assert floor
        assert each["version"] == ">=" + ".".join([*floor[1].split("."), "0", "0"][:3]), each["name"]


@pytest.mark.parametrize("path", COMPONENTS, ids=lambda path: str(path.relative_to(STEPS)))
def test_a_readme_has_the_component_s_name_and_all_its_outputs(path: Path) -> None:
    text, spec = (path.parent / "README.md").read_text(), read(path)
    assert spec["pipelineInfo"]["name"].replace("-", "_") in text.splitlines()[0]
    outputs = [name for kind in spec["root"].get("outputDefinitions", {}).values() for name in kind]
    # KFP calls the only one Output.
    assert [name for name in outputs if name != "Output" and f"`{name}`" not in text] == []
