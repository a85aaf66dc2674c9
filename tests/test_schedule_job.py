"""The job that applies schedules, with the packages, the command and the environment that it has in its image."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import distribution, distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as canonical

from kfp_server import Kfp

ROOT = Path(__file__).parent.parent
BASE = ROOT / "manifests" / "base"
ONLY = """
import runpy, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if ".".join(name.split(".")[:2]) in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
sys.argv = {command!r}
runpy.run_module("rlhf_pipelines.cli", run_name="__main__")
"""


def installed_by(package: str, extras: frozenset[str], seen: set[tuple[str, frozenset[str]]]) -> set[str]:
    """The packages that pip brings for one with its extras."""
    if (package, extras) in seen:
        return set()
    seen.add((package, extras))
    found = {canonical(package)}
    for requirement in map(Requirement, distribution(package).requires or []):
        wanted = requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in ("", *extras))
        if wanted:
            found |= installed_by(requirement.name, frozenset(requirement.extras), seen)
    return found


def modules_of(packages: set[str]) -> set[str]:
    """The modules of packages by name, and those directly in them: several packages share google, and kfp."""
    found = set()
    for package in packages:
        for file in distribution(package).files or []:
            if file.suffix in (".py", ".so") and not file.parts[0].startswith(".."):
                parts = [part.partition(".")[0] for part in file.parts[:2]]
                found |= {parts[0], ".".join(part for part in parts if part != "__init__")}
    return found


def in_the_image() -> set[str]:
    """The packages of the CPU image, as its Dockerfile and install.sh say."""
    (arguments,) = re.findall(r"^RUN sh images/install.sh (.*)$", (ROOT / "images/cpu/Dockerfile").read_text(), re.M)
    _, extras, *more = arguments.split()
    (always,) = re.findall(r"--no-deps -c \S+ ([\w -]+)", (ROOT / "images/install.sh").read_text(), re.M)
    found = installed_by("rlhf-ppo", frozenset(extras.split(",")), set())
    return found | {canonical(name) for name in (*always.split(), *more)}


@pytest.fixture
def kfp() -> Iterator[Kfp]:
    found = Kfp(token="of the job")
    spec = next(iter(yaml.safe_load_all((ROOT / "pipelines/rlhf_pipelines/compiled/ppo.yaml").read_text())))
    found.upload("rlhf-ppo", "v1", spec)
    yield found
    found.close()


def test_the_job_applies_an_overlay_with_what_is_in_its_image_and_with_its_token(kfp: Kfp, tmp_path: Path) -> None:
    job = yaml.safe_load((BASE / "schedule-job.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["image"].startswith("rlhf-ppo/cpu:") and container["command"][0] == "rlhf-ppo"
    place = {"/etc/rlhf-ppo/schedules.yaml": str(ROOT / "manifests/overlays/gpu/schedules.yaml")}
    command = [place.get(word, word) for word in container["command"]]
    of_image = re.findall(
        r"(\w+)=(\S+)", re.findall(r"^ENV (.*)$", (ROOT / "images/cpu/Dockerfile").read_text(), re.M)[0]
    )
    (tmp_path / "token").write_text("of the job")
    here = {
        "KF_PIPELINES_ENDPOINT": kfp.url,
        "KF_PIPELINES_SA_TOKEN_PATH": str(tmp_path / "token"),
        "HOME": str(tmp_path),
    }
    environment = {name: value for name, value in of_image if name != "PATH"}
    environment |= {each["name"]: each["value"] for each in container["env"]} | here
    inside = in_the_image()
    absent = modules_of({canonical(each.name) for each in distributions()} - inside) - modules_of(inside)
    assert {"pytest", "kfp.kubernetes"} <= absent and "kfp" not in absent
    done = subprocess.run(
        [sys.executable, "-c", ONLY.format(absent=absent, command=command)],
        env=environment | {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [each["display_name"] for each in kfp.recurring.values()] == ["rlhf-ppo-gpu-nightly"]
