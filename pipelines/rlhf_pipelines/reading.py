"""Parameters as users give them: a preset, a YAML file, and texts NAME=VALUE."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rlhf_ppo.config import preset
from rlhf_ppo.errors import InputError
from rlhf_ppo.parameters import PARAMETERS, decode, defaults, encode, from_kfp, parse_text, to_kfp, unknown_names


def read_parameters(
    preset_name: str | None,
    file: str | None,
    texts: Sequence[str],
    given: Mapping[Any, Any] | None = None,
    label: str = "--parameters",
) -> dict[str, Any]:
    """All parameters in KFP's encoding: preset, then file, then ``given`` as from YAML, then NAME=VALUE texts.

    Raises InputError with everything that is wrong; ``label`` is what it calls the file.
    """
    problems: list[str] = []
    rejected: set[str] = set()
    values = {name: to_kfp(PARAMETERS[name], value) for name, value in preset(preset_name or "itrex").items()}
    found = _load(file, problems, label) if file else {}
    values |= _from_file({**(found or {}), **(given or {})}, problems, rejected)
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            problems.append(f"--set {text}: give NAME=VALUE")
            continue
        try:
            values[name] = parse_text(name, value)
            rejected.discard(name)
        except InputError as error:
            problems += error.problems
            rejected.add(name)
    try:
        settings = decode({**defaults(), **values})
    except InputError as error:
        # What is said of a value that stands in for a rejected or unread one would mislead.
        problems += [] if found is None else [text for text in error.problems if not _names_any(text, rejected)]
    if problems:
        raise InputError(problems)
    return encode(settings)


def _names_any(problem: str, names: set[str]) -> bool:
    return not names.isdisjoint(re.findall(r"\w+", problem))


def _load(file: str, problems: list[str], label: str) -> dict[Any, Any] | None:
    """What a YAML file holds, or None where it can't be used."""
    try:
        found = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problems.append(f"{label}={file} can't be read: {error}")
        return None
    if not isinstance(found, dict):
        problems.append(f"{label}={file} holds no parameters: give lines like batch_size: 32")
        return None
    return found


def _from_file(found: dict[Any, Any], problems: list[str], rejected: set[str]) -> dict[str, Any]:
    values = {}
    for name, value in found.items():
        wrong = unknown_names([str(name)])
        if wrong:
            problems += wrong
            continue
        parameter = PARAMETERS[name]
        try:
            # YAML takes 1e-5 for a text.
            carried = parse_text(name, value) if isinstance(value, str) else to_kfp(parameter, value)
            problem = parameter.problem(value if value is None else from_kfp(parameter, carried))
        except (InputError, TypeError, ValueError) as error:
            problem = str(error) if isinstance(error, InputError) else parameter.problem(value)
        if problem:
            problems.append(problem)
            rejected.add(name)
        else:
            values[name] = carried
    return values


def told(
    preset_name: str | None,
    file: str | None,
    texts: Sequence[str],
    given: Mapping[Any, Any] | None = None,
    label: str = "--parameters",
) -> dict[str, Any]:
    """The parameters to send to a cluster, as read_parameters reads them: those that are named, or differ from the
    defaults. A package may have other defaults, an image, so what was not given stays away.
    """
    usual, values = defaults(), read_parameters(preset_name, file, texts, given, label)
    named = {text.partition("=")[0] for text in texts} | {*(given or {})}
    named |= set((_load(file, [], label) if file else None) or {})
    return {name: value for name, value in values.items() if name in named or value != usual[name]}
