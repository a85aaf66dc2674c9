"""Who may import whom: by the sources, and by running without the packages that must not be needed."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STEPS = ROOT / "components" / "rlhf_ppo"
PIPELINES = ROOT / "pipelines" / "rlhf_pipelines"

CORE = {
    "config", "parameters", "fields", "settings", "node_settings", "errors", "events", "steps", "descriptions",
    "images", "volume",
}  # fmt: skip
"""Stdlib only: imported by everything, also where neither torch nor kfp is installed."""

HEAVY = {"torch", "transformers", "datasets", "peft", "accelerate", "safetensors"}
TRACKERS = {"mlflow", "wandb", "tensorboard"}


@dataclass(frozen=True)
class Imported:
    """One import: what is imported, from which file, and whether inside a function."""

    name: str
    file: Path
    nested: bool

    @property
    def root(self) -> str:
        """The distribution's top-level name."""
        return self.name.split(".")[0]

    @property
    def layer(self) -> str:
        """The part of rlhf_ppo that is imported: core, ppo, helper, component or work."""
        return layer(self.name.split(".")[1:])


def layer(parts: list[str]) -> str:
    """Where a module of rlhf_ppo, given by the parts of its name after rlhf_ppo, stands."""
    if not parts or parts[0] in CORE or not (STEPS / parts[0]).is_dir() and not (STEPS / f"{parts[0]}.py").is_file():
        return "core"  # rlhf_ppo itself, with __version__
    if parts[0] in ("ppo", "devices"):
        return "ppo"
    if (STEPS / f"{parts[0]}.py").is_file():
        return "helper"
    return "component" if parts[1:2] == ["component"] else "work"


def layer_of_file(file: Path) -> str:
    """Where a file of rlhf_ppo stands."""
    parts = list(file.relative_to(STEPS).with_suffix("").parts)
    return layer([] if parts == ["__init__"] else parts)


def imports(file: Path) -> Iterator[Imported]:
    """Every import in ``file``, except those for type checkers only."""

    def visit(node: ast.AST, nested: bool) -> Iterator[Imported]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Imported(alias.name, file, nested) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{file}: relative import"
                yield from (Imported(f"{child.module}.{alias.name}", file, nested) for alias in child.names)
            elif not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
                inside = nested or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                yield from visit(child, inside)

    yield from visit(ast.parse(file.read_text(encoding="utf-8")), False)


def of_layer(*names: str) -> list[Imported]:
    """All imports in the files of some layers of rlhf_ppo."""
    files = [file for file in sorted(STEPS.rglob("*.py")) if layer_of_file(file) in names]
    assert files
    return [found for file in files for found in imports(file)]


def outside(found: list[Imported], allowed: set[str]) -> list[Imported]:
    """The imports whose top-level name is neither allowed nor of the standard library."""
    return [item for item in found if item.root not in allowed | sys.stdlib_module_names]


def test_config_and_parameters_need_nothing_but_the_standard_library() -> None:
    found = of_layer("core")
    assert outside(found, {"rlhf_ppo"}) == []
    assert [item for item in found if item.root == "rlhf_ppo" and item.layer != "core"] == []


def test_the_algorithm_knows_torch_and_transformers_and_nothing_of_kfp_mlflow_or_steps() -> None:
    found = of_layer("ppo")
    assert (
        outside(found, {"rlhf_ppo", "torch", "transformers", "peft", "safetensors", "numpy", "accelerate", "requests"})
        == []
    )
    assert [item for item in found if item.root == "rlhf_ppo" and item.layer not in ("core", "ppo")] == []


def test_nothing_but_components_knows_kfp() -> None:
    found = of_layer("core", "ppo", "helper", "work")
    assert [item for item in found if item.root in ("kfp", "rlhf_pipelines")] == []
    assert [item for item in found if item.root == "rlhf_ppo" and item.layer == "component"] == []


def test_helpers_know_no_step_and_import_trackers_where_they_use_them() -> None:
    found = of_layer("helper")
    assert [item for item in found if item.root == "rlhf_ppo" and item.layer == "work"] == []
    assert [item for item in found if item.root in TRACKERS and not item.nested] == []


def test_components_import_their_work_inside_the_body_only() -> None:
    found = of_layer("component")
    on_top = [item for item in found if not item.nested]
    assert outside(on_top, {"kfp", "rlhf_ppo"}) == []
    assert {item.name.split(".")[1] for item in on_top if item.root == "rlhf_ppo"} <= {"images", "descriptions"}
    assert outside([item for item in found if item.nested], {"rlhf_ppo"}) == []


def test_the_pipeline_side_never_imports_torch_or_the_work_of_a_step() -> None:
    found = [item for file in sorted(PIPELINES.rglob("*.py")) for item in imports(file)]
    assert found
    assert [item for item in found if item.root in HEAVY] == []
    # The checks of the first step need neither torch nor a server, and are made before a local run, too.
    checks = "rlhf_ppo.config_validation.validate.validate_config"
    work = [item for item in found if item.root == "rlhf_ppo" and item.layer in ("ppo", "work")]
    assert [item.name for item in work if item.name != checks] == []


WITHOUT = """
import importlib, pkgutil, sys
package, blocked = sys.argv[1], set(sys.argv[2].split(","))
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in blocked else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
found = importlib.import_module(package)
names = [module.name for module in pkgutil.walk_packages(found.__path__, package + ".")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""


@pytest.mark.parametrize(
    ("package", "blocked"),
    [
        ("rlhf_pipelines", HEAVY | {"mlflow"}),
        ("rlhf_ppo.ppo", {"kfp", "kfp_kubernetes", "mlflow", "datasets"}),
        ("rlhf_ppo.config_validation", HEAVY | TRACKERS),
    ],
)
def test_it_can_be_imported_where_others_packages_are_not_installed(package: str, blocked: set[str]) -> None:
    command = [sys.executable, "-c", WITHOUT, package, ",".join(sorted(blocked))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3


def test_parameters_can_be_imported_without_any_installed_package() -> None:
    path = str(ROOT / "components")
    script = (
        f"import sys; sys.path.insert(0, {path!r}); import rlhf_ppo.parameters, rlhf_ppo.steps, rlhf_ppo.descriptions"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
