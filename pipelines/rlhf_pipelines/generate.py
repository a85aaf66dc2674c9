"""Write what restates the parameters from their one declaration: ``python -m rlhf_pipelines.generate [--check]``.

Restated are: the signatures of the pipeline and of two components, the compiled YAML, the table in README.md, and the
pipeline as Kubernetes resources; and docs/rights.md, from the Roles and the code that needs them.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import rlhf_ppo
from rlhf_ppo.artifacts import write_whole
from rlhf_ppo.config import PPOConfig
from rlhf_ppo.descriptions import describe
from rlhf_ppo.fields import Parameter, parameters_of, runtime_fields_of
from rlhf_ppo.parameters import GROUPS, PARAMETERS, defaults
from rlhf_ppo.settings import DataSettings

COMMAND = "python -m rlhf_pipelines.generate"

_PIPELINES = Path(__file__).parent
_STEPS = Path(rlhf_ppo.__file__).parent
_README = _STEPS.parent.parent / "README.md"
_MANIFEST = _README.parent / "manifests" / "base" / "pipeline.yaml"
_RIGHTS = _README.parent / "docs" / "rights.md"
_SIGNATURE = ("    # parameters: begin", "    # parameters: end\n")
_TABLE = ("<!-- parameters:begin -->", "<!-- parameters:end -->")


def signatures() -> dict[Path, list[str]]:
    """The source files that hold a generated signature, and the parameters in it."""
    of_data = [parameter.name for parameter in parameters_of(DataSettings)]
    return {
        _PIPELINES / "ppo.py": list(PARAMETERS),
        _STEPS / "config_validation" / "component.py": list(PARAMETERS),
        _STEPS / "dataset_preparation" / "component.py": [
            "query_dataset",
            "remove_unused_columns",
            "rollout_max_new_tokens",
            *of_data,
        ],
    }


def signature(names: Iterable[str]) -> str:
    """One line of Python for each parameter: name, type and default as KFP takes them."""
    values = defaults()
    lines = []
    for name in names:
        default = json.dumps(values[name]) if PARAMETERS[name].type is str else repr(values[name])
        note = "  # noqa: B006" if PARAMETERS[name].type in (dict, list) else ""
        lines.append(f"    {name}: {PARAMETERS[name].type.__name__} = {default},{note}\n")
    return "".join(lines)


def table() -> str:
    """The parameters as Markdown, a table for each group, and the fields that are filled at run time."""
    parts = []
    for group in GROUPS.values():
        parts += [f"**{_title(group)}**", "", "| Parameter | Type | Default | Meaning |", "|---|---|---|---|"]
        parts += [_row(parameter) for parameter in parameters_of(group)] + [""]
    parts += ["**PPOConfig, filled by the trainer** (can't be set)", "", "| Field | Meaning |", "|---|---|"]
    parts += [f"| `{name}` | {_cell(meaning)} |" for name, meaning in runtime_fields_of(PPOConfig)]
    return "\n".join(parts)


def _title(group: type) -> str:
    summary = (inspect.getdoc(group) or "").splitlines()[0]
    return f"{group.__name__}: {summary}" if group is PPOConfig else summary


def _row(parameter: Parameter) -> str:
    default = json.dumps(defaults()[parameter.name])
    return f"| `{parameter.name}` | {parameter.type.__name__} | `{default}` | {_cell(describe(parameter))} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def between(text: str, begin: str, end: str, new: str) -> str | None:
    """``text`` with ``new`` between the line that holds ``begin`` and ``end``; None where they are not there."""
    head, found_begin, rest = text.partition(begin)
    line, newline, rest = rest.partition("\n")
    _, found_end, tail = rest.partition(end)
    if not found_begin or not newline or not found_end:
        return None
    return head + begin + line + "\n" + new + end + tail


def expected_texts() -> dict[Path, str]:
    """What each source file with a generated region, and the README, should be."""
    expected = {}
    for path, names in signatures().items():
        text = between(path.read_text(encoding="utf-8"), *_SIGNATURE, signature(names))
        if text is None:
            raise SystemExit(f"{path}: the lines {' … '.join(mark.strip() for mark in _SIGNATURE)} are missing")
        expected[path] = text
    if _README.is_file():
        text = between(_README.read_text(encoding="utf-8"), *_TABLE, f"\n{table()}\n\n")
        if text is not None:
            expected[_README] = text
    return expected


def expected_yaml() -> dict[Path, str]:
    """What each compiled file should be; the signatures must be fresh, and not yet imported."""
    from rlhf_pipelines import compile as compiling

    expected = {}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "compiled.yaml"
        compiling.compile_pipeline(path)
        expected[compiling.COMPILED] = path.read_text(encoding="utf-8")
        for target, component in compiling.COMPONENTS.items():
            compiling.compile_component(component, path)
            expected[target] = path.read_text(encoding="utf-8")
    return expected


def expected_manifest() -> dict[Path, str]:
    """What the pipeline's resources should be, by the compiled pipeline as it lies there."""
    from rlhf_pipelines.compile import COMPILED
    from rlhf_pipelines.manifest import manifest

    return {_MANIFEST: manifest(COMPILED.read_text(encoding="utf-8"))} if _README.is_file() else {}


def expected_rights() -> dict[Path, str]:
    """What the page of rights should be. Ends the program where Roles and code don't agree."""
    from rlhf_pipelines.rights import page, problems_of

    root = _README.parent
    if not _RIGHTS.parent.is_dir():
        return {}
    problems = problems_of(root)
    if problems:
        raise SystemExit("\n".join(problems))
    return {_RIGHTS: page(root)}


def stale(expected: dict[Path, str]) -> list[Path]:
    """The files that are not as expected; which version of KFP compiled them doesn't count."""
    return [path for path, text in expected.items() if _comparable(path) != _without_version(text)]


def _comparable(path: Path) -> str | None:
    return _without_version(path.read_text(encoding="utf-8")) if path.is_file() else None


def _without_version(text: str) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("sdkVersion: "))


def main(arguments: list[str] | None = None) -> int:
    """Write what is stale; with ``--check`` only name it. Returns the exit code."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Write what restates the parameters.")
    parser.add_argument("--check", action="store_true", help="write nothing; name what is stale and exit with 1")
    check = parser.parse_args(arguments).check
    outdated: list[Path] = []
    # 1. Sources and README. 2. What is compiled from these sources. 3. What is made of that.
    # None tells anything new while the one before is stale.
    for expected in (expected_texts, expected_yaml, expected_manifest, expected_rights):
        if check and any(path.suffix in (".py", ".yaml") for path in outdated):
            break
        texts = expected()
        for path in stale(texts):
            outdated.append(path)
            print(f"{path} is stale: run {COMMAND}" if check else f"{path} written", file=sys.stderr)
            if not check:
                write_whole(path, texts[path])
    return 1 if check and outdated else 0


if __name__ == "__main__":
    sys.exit(main())
