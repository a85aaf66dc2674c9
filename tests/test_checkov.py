"""checkov has nothing to say of the manifests but what .checkov.yaml waives, with a reason each."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / ".checkov.yaml"
CHECKOV = Path(f"{sys.prefix}-checkov") / "bin" / "checkov"


@pytest.mark.skipif(not CHECKOV.exists(), reason="checkov has an environment of its own, which make test sets up")
def test_checkov_finds_what_is_waived_and_nothing_else(tmp_path: Path) -> None:
    """A waiver that nothing needs is found out, too."""
    rendered, config = tmp_path / "rendered", yaml.safe_load(CONFIG.read_text())
    rendered.mkdir()
    for path in (ROOT / "manifests").rglob("kustomization.yaml"):
        name = "-".join(path.parent.relative_to(ROOT / "manifests").parts)
        with (rendered / f"{name}.yaml").open("w") as stream:
            subprocess.run(["kubectl", "kustomize", str(path.parent)], check=True, stdout=stream)
    waived = config.pop("skip-check")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = [CHECKOV, "-d", "rendered", "--config-file", "config.yaml", "--output", "json"]
    environment = {**os.environ, "HOME": str(tmp_path)}  # The user's configuration may waive more.
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    found = json.loads(done.stdout)
    reports = found if isinstance(found, list) else [found]
    assert sum(report["summary"]["passed"] for report in reports) > 500
    assert sum(report["summary"]["parsing_errors"] for report in reports) == 0
    failed = {each["check_id"] for report in reports for each in report["results"]["failed_checks"]}
    assert failed == set(waived)


def test_every_waiver_has_its_reason() -> None:
    lines = CONFIG.read_text().split("skip-check:\n")[1].splitlines()
    waivers = [number for number, line in enumerate(lines) if re.fullmatch(r"  - CKV\w+", line)]
    assert len(waivers) == len(yaml.safe_load(CONFIG.read_text())["skip-check"])
    assert all(re.match(r"  # \w.{20,}", lines[number - 1]) for number in waivers)
