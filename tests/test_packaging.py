"""What is installed where: a training image without kfp's pins, the pipeline side without torch."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")
)


def name_of(requirement: str) -> str:
    """The normalised name that a requirement begins with."""
    found = re.match(r"[\w.-]+", requirement)
    assert found
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def closure(requirements: list[str]) -> set[str]:
    """The names of everything that is installed with ``requirements``, by the metadata of what is installed here."""
    found: set[str] = set()
    open_names = [name_of(requirement) for requirement in requirements]
    while open_names:
        name = open_names.pop()
        if name in found:
            continue
        found.add(name)
        try:
            needed = requires(name) or []
        except PackageNotFoundError:
            continue
        open_names += [name_of(requirement) for requirement in needed if "extra ==" not in requirement]
    return found


def extra(name: str) -> list[str]:
    return [*PROJECT["dependencies"], *PROJECT["optional-dependencies"][name]]


def test_the_training_side_does_not_bring_kfp() -> None:
    names = closure(extra("train"))
    assert "torch" in names and "mlflow" in names
    assert not {"kfp", "kfp-kubernetes", "kubernetes"} & names


def test_the_pipeline_side_does_not_bring_torch() -> None:
    names = closure(extra("pipeline"))
    assert "kfp" in names
    assert not {"torch", "transformers", "mlflow", "accelerate", "datasets"} & names


def test_optional_things_stay_optional() -> None:
    names = closure(extra("train")) | closure(extra("pipeline"))
    assert not {"wandb", "tensorboard", "optimum-habana"} & names
    assert {"wandb", "tensorboard", "gaudi", "dev"} <= set(PROJECT["optional-dependencies"])


def test_everything_that_is_installed_is_pinned() -> None:
    pinned = {name_of(name) for name in PINS}
    needed = closure(extra("train")) | closure(extra("pipeline")) | closure(extra("dev"))
    installed = {name for name in needed if _is_installed(name)}
    assert installed - pinned == set()


def _is_installed(name: str) -> bool:
    try:
        requires(name)
    except PackageNotFoundError:
        return False
    return True


@pytest.mark.parametrize("device", ["cpu", "gpu", "gaudi"])
def test_images_are_pinned_run_as_nobody_and_take_their_base_as_argument(device: str) -> None:
    lines = (ROOT / "images" / device / "Dockerfile").read_text().splitlines()
    assert lines.index("USER 10001") > max(i for i, line in enumerate(lines) if line.startswith(("FROM", "RUN")))
    first_from = next(i for i, line in enumerate(lines) if line.startswith("FROM"))
    assert any(line.startswith("ARG BASE_IMAGE=") for line in lines[:first_from])
    assert not any(":latest" in line for line in lines)
