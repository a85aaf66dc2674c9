"""Schedules as a file declares them: what runs when, with which parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from rlhf_pipelines.reading import told
from rlhf_ppo.config import PRESETS
from rlhf_ppo.errors import InputError

OWNER = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?")
MONTHS = dict(zip("jan feb mar apr may jun jul aug sep oct nov dec".split(), range(1, 13), strict=True))
DAYS = dict(zip("sun mon tue wed thu fri sat".split(), range(7), strict=True))
CRON: tuple[tuple[str, int, int, dict[str, int]], ...] = (
    ("seconds", 0, 59, {}),
    ("minutes", 0, 59, {}),
    ("hours", 0, 23, {}),
    ("day of the month", 1, 31, {}),
    ("month", 1, 12, MONTHS),
    ("day of the week", 0, 6, DAYS),
)
"""The fields of KFP's cron (robfig/cron v1): name, smallest and largest number, names for numbers."""
NO_TIME_ZONE = (
    "time_zone is no field of a schedule: KFP reads every cron in the one zone that it is installed with, UTC unless "
    "its pipeline-install-config has a cronScheduleTimezone; write the hours of that"
)
"""robfig/cron v1 has no TZ= in front of the fields, unlike v3: KFP's API server refuses it."""


@dataclass(frozen=True)
class Schedule:
    """One recurring run; ``parameters`` are those that differ from the pipeline's defaults, in KFP's encoding."""

    name: str
    cron: str
    enabled: bool = True
    concurrency: int = 1
    pipeline: str = "rlhf-ppo"
    version: str = "latest"
    experiment: str = "rlhf-ppo"
    service_account: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def trigger(self) -> str:
        """Cron as KFP takes it, one space between fields."""
        return " ".join(self.cron.split())


def read_schedules(file: str) -> tuple[str, list[Schedule]]:
    """The owner and the schedules that the YAML file declares. Raises InputError with everything that is wrong."""
    try:
        found = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{file} can't be read: {error}") from None
    if not isinstance(found, dict) or set(found) != {"owner", "schedules"} or not isinstance(found["schedules"], list):
        raise InputError(f"{file}: give owner (a name) and schedules (a list, empty for none), and nothing else")
    owner, problems = found["owner"], []
    if not isinstance(owner, str) or not OWNER.fullmatch(owner):
        problems.append(f"{file}: owner={owner!r} is no name: give lower-case letters, digits, '-' and '.'")
    schedules = []
    for number, entry in enumerate(found["schedules"], 1):
        try:
            schedules.append(_schedule(entry, Path(file).parent))
        except InputError as error:
            named = entry.get("name") if isinstance(entry, dict) else None
            problems += [f"{file}: schedule {named or number}: {problem}" for problem in error.problems]
    names = [schedule.name for schedule in schedules]
    problems += [
        f"{file}: there are two schedules called {name}" for name in sorted(set(names)) if names.count(name) > 1
    ]
    if problems:
        raise InputError(problems)
    return owner, schedules


def _schedule(entry: Any, directory: Path) -> Schedule:
    if not isinstance(entry, dict):
        raise InputError(f"{entry!r} is no mapping: give name, cron and parameters")
    known = {each.name: each for each in fields(Schedule)}
    problems = [
        NO_TIME_ZONE
        if key == "time_zone"
        else f"{key} is no field of a schedule; there are: {', '.join([*known, 'parameters_file', 'preset'])}"
        for key in entry
        if key not in {*known, "parameters_file", "preset"}
    ]
    plain = {name: entry[name] for name in known if name in entry and name != "parameters"}
    problems += [f"{name} is missing" for name in ("name", "cron") if name not in plain]
    for name, value in plain.items():
        kind = {"bool": bool, "int": int}.get(str(known[name].type), str)
        if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
            problems.append(f"{name}={value!r} is no {kind.__name__}")
    if not problems:
        problems = _problems_of(Schedule(**plain))
    preset, file, given = (entry.get(key) for key in ("preset", "parameters_file", "parameters"))
    parameters: dict[str, Any] = {}
    if preset is not None and preset not in PRESETS:
        problems.append(f"preset={preset!r} is none: give one of {', '.join(PRESETS)}")
    elif given is not None and not isinstance(given, dict):
        problems.append(f"parameters={given!r} is no mapping: give lines like batch_size: 32")
    else:
        try:
            path = str(directory / str(file)) if file else None
            parameters = told(preset, path, (), given or {}, label="parameters_file")
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return Schedule(**plain, parameters=parameters)


def _problems_of(schedule: Schedule) -> list[str]:
    found = []
    if not 0 < len(schedule.name.strip()) <= 120:
        found.append(f"name={schedule.name!r} is none: give 1 to 120 characters")
    if not 1 <= schedule.concurrency <= 10:
        found.append(f"concurrency={schedule.concurrency} is not within 1 and 10, which is what KFP takes")
    for name in ("pipeline", "version", "experiment"):
        if not getattr(schedule, name).strip():
            found.append(f"{name} is empty")
    problem = problem_of_cron(schedule.cron)
    return found + ([f"cron={schedule.cron!r} {problem}"] if problem else [])


def problem_of_cron(cron: str) -> str:
    """What is wrong with a cron expression for KFP, or an empty text."""
    parts = cron.split()
    if len(parts) != len(CRON):
        more = (
            ": with five, KFP would take the first for seconds and run it every hour or more often"
            if len(parts) == 5
            else ""
        )
        return f"has {len(parts)} fields, not six, seconds first ('0 0 2 * * *' is every day at 2:00){more}"
    for part, (name, smallest, largest, names) in zip(parts, CRON, strict=True):
        if not all(_is_range(text, smallest, largest, names) for text in part.split(",")):
            return f"has {part!r} for the {name}: give numbers from {smallest} to {largest}, ranges, lists, */N or *"
    return ""


def _is_range(text: str, smallest: int, largest: int, names: Mapping[str, int]) -> bool:
    span, slash, step = text.partition("/")
    if slash and not (step.isdecimal() and int(step) > 0):
        return False
    if span in ("*", "?"):
        return True
    ends = [names.get(end.lower(), int(end) if end.isdecimal() else -1) for end in span.split("-")]
    return len(ends) <= 2 and all(smallest <= end <= largest for end in ends) and ends == sorted(ends)
