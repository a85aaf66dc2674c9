"""What restates the parameters can't drift from their declaration: each drift, tried on a copy of the sources."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_pipelines import generate
from rlhf_pipelines.manifest import manifest
from rlhf_ppo.config import PPOConfig
from rlhf_ppo.fields import runtime_fields_of
from rlhf_ppo.parameters import PARAMETERS

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- parameters:begin -->", "<!-- parameters:end -->"


class Copy:
    """A copy of the repository's sources, with a README that holds nothing but the table."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for tree in ("components", "pipelines", "manifests"):
            shutil.copytree(ROOT / tree, root / tree, ignore=shutil.ignore_patterns("__pycache__"))
        (root / "README.md").write_text(f"# Title\n\n{BEGIN}\n\n{generate.table()}\n\n{END}\n\nMore.\n")

    def edit(self, path: str, old: str, new: str) -> None:
        """Replace the first ``old``, which must be there."""
        text = (self.root / path).read_text()
        assert old in text
        (self.root / path).write_text(text.replace(old, new, 1))

    def generate(self, *arguments: str) -> tuple[int, str]:
        """Exit code and messages of the generator."""
        environment = os.environ | {"PYTHONPATH": f"{self.root / 'components'}{os.pathsep}{self.root / 'pipelines'}"}
        command = [sys.executable, "-m", "rlhf_pipelines.generate", *arguments]
        done = subprocess.run(command, env=environment, cwd=self.root, capture_output=True, text=True)
        return done.returncode, done.stderr

    def stale(self) -> set[str]:
        """The files that the check names, relative to the copy."""
        code, messages = self.generate("--check")
        found = {str(Path(path).relative_to(self.root)) for path in re.findall(r"^(.*) is stale: run", messages, re.M)}
        assert code == (1 if found else 0), messages
        return found


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


CONFIG = "components/rlhf_ppo/config.py"
SIGNATURES = {"pipelines/rlhf_pipelines/ppo.py", "components/rlhf_ppo/config_validation/component.py"}
PREPARE = "components/rlhf_ppo/dataset_preparation/component.py"
MANIFEST = "manifests/base/pipeline.yaml"
COMPILED = {"pipelines/rlhf_pipelines/compiled/ppo.yaml", "components/rlhf_ppo/config_validation/component.yaml"}


def test_what_is_committed_is_fresh() -> None:
    assert generate.stale(generate.expected_texts()) == []
    assert generate.stale(generate.expected_yaml()) == []
    assert generate.stale(generate.expected_manifest()) == []


def test_the_readme_has_the_table() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count(BEGIN) == text.count(END) == 1


def test_the_check_passes_on_a_fresh_copy(copy: Copy) -> None:
    assert copy.stale() == set()


def test_a_changed_default_makes_signatures_and_table_stale_and_one_command_renews_all(copy: Copy) -> None:
    copy.edit(CONFIG, "learning_rate: float = declare(1e-5,", "learning_rate: float = declare(3e-5,")
    assert copy.stale() == SIGNATURES | {"README.md"}
    assert copy.generate()[0] == 0
    assert copy.stale() == set()
    for path in (*SIGNATURES, *COMPILED, MANIFEST, "README.md"):
        assert "3e-05" in (copy.root / path).read_text(), path


def test_a_new_field_makes_signatures_and_table_stale(copy: Copy) -> None:
    copy.edit(CONFIG, "    # Loop sizes\n", '    # Loop sizes\n    extra: int = declare(7, "One more.")\n')
    assert copy.stale() == SIGNATURES | {"README.md"}
    assert copy.generate()[0] == 0
    assert "extra: int = 7," in (copy.root / "pipelines/rlhf_pipelines/ppo.py").read_text()
    assert "extra:" in (copy.root / "pipelines/rlhf_pipelines/compiled/ppo.yaml").read_text()


def test_a_changed_type_makes_signatures_stale(copy: Copy) -> None:
    copy.edit(
        "components/rlhf_ppo/settings.py",
        "data_max_prompts: int = declare(0,",
        "data_max_prompts: float = declare(0.0,",
    )
    assert copy.stale() == SIGNATURES | {PREPARE, "README.md"}


def test_a_changed_meaning_makes_table_and_compiled_files_stale(copy: Copy) -> None:
    copy.edit(CONFIG, "KL coefficient at the start.", "KL coefficient to start with.")
    assert copy.stale() == COMPILED | {"README.md"}


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("pipelines/rlhf_pipelines/ppo.py", "    lam: float = 0.95,\n", ""),
        ("components/rlhf_ppo/config_validation/component.py", "lam: float = 0.95,", "lam: float = 0.9,"),
        (PREPARE, 'data_split: str = "train"', 'data_split: str = "test"'),
        ("pipelines/rlhf_pipelines/compiled/ppo.yaml", "defaultValue: 0.95", "defaultValue: 0.9"),
        (
            "components/rlhf_ppo/policy_evaluation/gate.component.yaml",
            "parameterType: BOOLEAN",
            "parameterType: STRING",
        ),
        (MANIFEST, "defaultValue: 0.95", "defaultValue: 0.9"),
        ("README.md", "| `lam` | float | `0.95` |", "| `lam` | float | `0.9` |"),
    ],
)
def test_an_edit_by_hand_is_named(copy: Copy, path: str, old: str, new: str) -> None:
    copy.edit(path, old, new)
    assert copy.stale() == {path}


def test_a_component_body_that_was_not_compiled_again_is_named(copy: Copy) -> None:
    copy.edit(
        "components/rlhf_ppo/hub_push/component.py", "Push the policy to the hub", "Publish the policy on the hub"
    )
    assert copy.stale() == {
        "components/rlhf_ppo/hub_push/component.yaml",
        "pipelines/rlhf_pipelines/compiled/ppo.yaml",
    }


def test_missing_markers_are_an_error_and_not_silence(copy: Copy) -> None:
    copy.edit(PREPARE, "    # parameters: end\n", "")
    code, messages = copy.generate("--check")
    assert code == 1 and "dataset_preparation/component.py" in messages and "are missing" in messages


def test_the_version_of_kfp_alone_makes_nothing_stale(copy: Copy) -> None:
    path = "pipelines/rlhf_pipelines/compiled/ppo.yaml"
    text = re.sub(r"(?m)^sdkVersion: .*$", "sdkVersion: kfp-2.99.0", (copy.root / path).read_text())
    (copy.root / path).write_text(text)
    (copy.root / MANIFEST).write_text(manifest(text))
    assert copy.stale() == set()


def test_the_table_has_a_row_for_each_parameter_and_run_time_field() -> None:
    rows = re.findall(r"(?m)^\| `(\w+)` \|", generate.table())
    assert rows == [*PARAMETERS, *(name for name, _ in runtime_fields_of(PPOConfig))]
    assert "| `max_grad_norm` | float | `0.0` | Clip the gradient's global norm" in generate.table()


def test_every_test_that_the_documents_name_is_there() -> None:
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = [name for page in (ROOT / "docs").glob("*.md") for name in re.findall(r"`(test_\w+)`", page.read_text())]
    assert len(named) > 15
    assert [name for name in named if f"def {name}(" not in tests] == []
