"""What is installed where: a training image without kfp's pins, the pipeline side without torch."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def name_of(requirement: str) -> str:
    """The normalised name that a requirement begins with."""
    found = re.match(r"[\w.-]+", requirement)
    assert found
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def pins(file: str) -> dict[str, str]:
    """Version by name, of a constraints file."""
    return {name_of(line): line.split("==")[1] for line in (ROOT / file).read_text().split()}


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
    pinned = set(pins("constraints.txt"))
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
    assert any(line.startswith("ARG BASE_IMAGE") for line in lines[:first_from])
    assert not any(":latest" in line for line in lines)
    # Versions stand in the constraints and nowhere else.
    assert not any("==" in line for line in lines if not line.startswith("#"))
    (install,) = [line for line in lines if "images/install.sh" in line]
    assert install.split()[3] == ("constraints-4.55.txt" if device == "gaudi" else "constraints.txt")


@pytest.mark.parametrize("device", ["cpu", "gpu", "gaudi"])
def test_images_are_hadolint_clean(device: str) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, ROOT / "images" / device / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_pins_fit_the_ranges_and_the_older_ones_hold_what_optimum_habana_asks_for() -> None:
    groups = PROJECT["optional-dependencies"]
    current, older = pins("constraints.txt"), pins("constraints-4.55.txt")
    for file, extras in (
        (current, ("train", "cluster", "pipeline", "wandb", "tensorboard", "dev")),
        (older, ("train", "cluster", "gaudi", "dev")),
    ):
        for requirement in map(Requirement, (text for name in extras for text in groups[name])):
            assert file[name_of(requirement.name)] in requirement.specifier, requirement
    assert older["transformers"].startswith("4.55.") and current["transformers"].startswith("5.")


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy to build in: building leaves traces."""
    for name in ("components", "pipelines"):
        shutil.copytree(ROOT / name, tmp_path / "src" / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "src")
    return tmp_path / "src"


def test_the_wheel_holds_both_packages_whole_and_no_other_and_the_command_starts(sources: Path, tmp_path: Path) -> None:
    built = ["pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path), str(sources)]
    needed = {
        path.relative_to(root).as_posix()
        for root in (sources / "components", sources / "pipelines")
        for path in root.rglob("*")
        if path.suffix in (".py", ".yaml", ".css", ".html")
    }
    subprocess.run([sys.executable, "-m", *built], check=True)
    (wheel,) = tmp_path.glob("rlhf_ppo-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
        names = set(archive.namelist())
    (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
    assert {name.split("/")[0] for name in names} == {"rlhf_ppo", "rlhf_pipelines", info}
    assert {"rlhf_pipelines/compiled/ppo.yaml", "rlhf_ppo/policy_evaluation/report.css"} <= needed <= names
    script = PROJECT["scripts"]["rlhf-ppo"].split(":")
    code = f"import sys; sys.path.insert(0, 'installed'); from {script[0]} import {script[1]} as f; f(['fields'])"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "init_kl_coef" in done.stdout, done.stderr


@pytest.mark.index
@pytest.mark.parametrize(
    ("extras", "file", "unwanted"),
    [
        ("train,cluster", "constraints.txt", {"kfp"}),
        ("pipeline", "constraints.txt", {"torch", "mlflow"}),
        ("local,wandb,tensorboard,dev", "constraints.txt", {"optimum-habana"}),
        ("train,cluster", "constraints.txt", {"kfp"}),
        ("train,cluster,gaudi,dev", "constraints-4.55.txt", {"kfp"}),
    ],
)
def test_pip_installs_exactly_the_pins(sources: Path, extras: str, file: str, unwanted: set[str]) -> None:
    flags = ["-q", "--dry-run", "--ignore-installed", "--report", "-", "-c", str(ROOT / file)]
    command = [sys.executable, "-m", "pip", "install", *flags, f"{sources}[{extras}]"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    chosen = [package["metadata"] for package in json.loads(done.stdout)["install"]]
    # A local version, as in 2.13.0+cpu, names a build of the same release; CUDA's packages follow torch's own pins.
    found = {name_of(package["name"]): package["version"].split("+")[0] for package in chosen}
    found = {name: version for name, version in found.items() if not re.match("nvidia-|cuda-|triton|rlhf-ppo", name)}
    assert not unwanted & set(found)
    assert found.items() <= pins(file).items()
