"""Make KFP's recurring runs what a file declares: plan first, then as few changes as can be.

KFP can't change a recurring run, only make, delete and switch one on and off; so a changed schedule is a new one in the
place of the old. Three things that KFP does decide the order:

* Two recurring runs of the same name both run: the old one is switched off before the new one is made.
* Deleting a recurring run ends its runs (kubeflow/pipelines#12573): it stays, switched off, until they have ended.
* One that is switched on again at once makes up for the last time that it missed: a new one is made instead.

Whatever is interrupted, the next time goes on from what it finds. What it may touch bears the owner's mark.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_pipelines.kubeflow import Server, called
from rlhf_pipelines.schedules import Schedule
from rlhf_pipelines.submit import ENDED, Source, stored
from rlhf_ppo.errors import InputError

MARK = re.compile(r"\[rlhf-ppo schedule apply: owner (\S+), content ([0-9a-f]{16})\]$")
"""The end of the description of a recurring run that this made: whose it is, and what it was made from."""


@dataclass(frozen=True)
class Declared:
    """A schedule with what its names mean on the server."""

    schedule: Schedule
    source: Source
    owner: str

    @property
    def content(self) -> str:
        """A digest of all that can't be changed once the recurring run is made."""
        s = self.schedule
        what = [s.name, s.trigger, s.concurrency, s.experiment, s.service_account, dict(s.parameters)]
        text = json.dumps([*what, self.source.pipeline_id, self.source.version_id], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Change:
    """What is to be done for one name: ``kind`` says it in a word, ``make`` is new, ``drop`` goes, ``off`` stays."""

    kind: str
    name: str
    why: str = ""
    make: Declared | None = None
    drop: Sequence[Any] = ()
    off: Any = None

    def __str__(self) -> str:
        return f"{self.kind:<9}{self.name}" + (f": {self.why}" if self.why else "")


def plan(server: Server, owner: str, schedules: Sequence[Schedule]) -> list[Change]:
    """What has to change, name by name; nothing is changed yet.

    Raises InputError where a pipeline, a version or a parameter of theirs is not there, or a name is somebody else's;
    KubeflowError.
    """
    problems: list[str] = []
    declared = []
    for schedule in schedules:
        try:
            source = stored(server, schedule.pipeline, schedule.version, schedule.parameters)
            if schedule.version == "latest":  # Resolved anew by each run.
                source = Source(pipeline_id=source.pipeline_id)
            declared.append(Declared(schedule, source, owner))
        except InputError as error:
            problems += [f"schedule {schedule.name}: {problem}" for problem in error.problems]
    there = list(_recurring(server))
    names = {one.schedule.name for one in declared}
    for found in there:
        if found.display_name in names and _owner(found) != owner:
            whose = f"that of {_owner(found)}" if _owner(found) else "not made by rlhf-ppo schedule apply"
            problems.append(
                f"schedule {found.display_name}: a recurring run of this name is {whose}: delete it, or rename yours"
            )
    if problems:
        raise InputError(problems)
    mine = [found for found in there if _owner(found) == owner]
    experiments = _experiments(server, {one.schedule.experiment for one in declared})
    changes = [_change(one, [f for f in mine if f.display_name == one.schedule.name], experiments) for one in declared]
    for name in sorted({found.display_name for found in mine} - names):
        changes.append(Change("delete", name, drop=[found for found in mine if found.display_name == name]))
    return [change for planned in changes if (change := _waiting(server, planned)).kind != "keep"]


def apply(server: Server, changes: Sequence[Change], say: Callable[[str], None]) -> None:
    """Do what was planned. Raises KubeflowError; what was done by then stays, and the next plan goes on from it."""
    api = server.client.recurring_runs
    for change in changes:
        if change.kind == "wait":
            continue
        for found in [*change.drop, *([change.off] if change.off else [])]:
            if _is_on(found):
                doing = f"switch off {change.name}"
                server.ask(
                    doing, api.recurring_run_service_disable_recurring_run, recurring_run_id=found.recurring_run_id
                )
        if change.make:
            _make(server, change.make, {found.recurring_run_id for found in change.drop})
        for found in change.drop:
            run_id = _going_on(server, found)
            if run_id:
                say(f"{change.name}: {_stays(run_id)}")
                continue
            remove = api.recurring_run_service_delete_recurring_run
            server.remove(f"delete {change.name}", remove, recurring_run_id=found.recurring_run_id)
        say(f"done: {change}")


def _change(one: Declared, mine: Sequence[Any], experiments: Mapping[str, str]) -> Change:
    """What is to be done for a declared schedule, of which ``mine`` are the recurring runs by its name."""
    wanted = one.schedule
    experiment = experiments.get(wanted.experiment)
    same = [found for found in mine if _content(found) == one.content and found.experiment_id == experiment]
    on = [found for found in same if _is_on(found)]
    off = [found for found in same if not _is_on(found)]
    kept = next(iter(on if wanted.enabled else [*off, *on]), None)
    drop = [found for found in mine if found is not kept]
    what = f"{wanted.trigger}, {wanted.pipeline} {wanted.version}" + ("" if wanted.enabled else ", switched off")
    if kept is None:
        kind = "create" if not mine else "enable" if off and len(off) == len(mine) else "replace"
        why = what if kind == "create" else ", ".join(_differences(one, mine[0])) if kind == "replace" else ""
        return Change(kind, wanted.name, why, make=one, drop=drop)
    if not wanted.enabled and _is_on(kept):
        return Change("disable", wanted.name, drop=drop, off=kept)
    if drop:
        return Change("delete", wanted.name, "what was replaced", drop=drop)
    return Change("keep", wanted.name)


def _waiting(server: Server, change: Change) -> Change:
    """``change``, or that there is nothing to do but wait for the end of a run."""
    idle = not any(map(_is_on, change.drop)) and not change.make and not change.off
    if idle and change.drop:
        going = [run_id for found in change.drop if (run_id := _going_on(server, found))]
        if len(going) == len(change.drop):
            return Change("wait", change.name, _stays(going[0]))
    return change


def _stays(run_id: str) -> str:
    return f"the old one is switched off, and stays until its run {run_id} has ended; apply again then"


def _differences(one: Declared, found: Any) -> Iterator[str]:
    """What differs, as far as the server tells."""
    wanted = one.schedule
    schedule = found.trigger.cron_schedule if found.trigger else None
    reference = found.pipeline_version_reference
    theirs = dict((found.runtime_config.parameters if found.runtime_config else None) or {})
    pairs = [
        ("cron", schedule.cron if schedule else None, wanted.trigger),
        ("concurrency", str(found.max_concurrency), str(wanted.concurrency)),
        ("service_account", found.service_account or "", wanted.service_account),
        (
            "version",
            (reference.pipeline_version_id if reference else "") or "latest",
            one.source.version_id or "latest",
        ),
        *((name, theirs.get(name), wanted.parameters.get(name)) for name in sorted({*theirs, *wanted.parameters})),
    ]
    told = [f"{name} {json.dumps(old)} → {json.dumps(new)}" for name, old, new in pairs if old != new]
    yield from told or ["experiment or pipeline"]


def _make(server: Server, one: Declared, known: set[str]) -> None:
    from kfp_server_api import V2beta1CronSchedule, V2beta1RecurringRun, V2beta1RuntimeConfig, V2beta1Trigger

    wanted = one.schedule
    experiment_id = server.experiment(wanted.experiment)

    def look() -> Any:
        """What an earlier try made, whose answer was lost."""
        return next(
            (
                found
                for found in _recurring(server, filter=called(wanted.name))
                if (_owner(found), _content(found)) == (one.owner, one.content) and found.recurring_run_id not in known
            ),
            None,
        )

    body = V2beta1RecurringRun(
        display_name=wanted.name,
        description=f"{wanted.trigger} [rlhf-ppo schedule apply: owner {one.owner}, content {one.content}]",
        runtime_config=V2beta1RuntimeConfig(parameters=dict(wanted.parameters)),
        trigger=V2beta1Trigger(cron_schedule=V2beta1CronSchedule(cron=wanted.trigger)),
        max_concurrency=str(wanted.concurrency),
        mode="ENABLE" if wanted.enabled else "DISABLE",
        no_catchup=True,  # A run trains on what there is when it starts: one for each missed time would be the same.
        experiment_id=experiment_id,
        namespace=server.namespace or None,
        service_account=wanted.service_account or None,
        **one.source.body(),
    )
    call = server.client.recurring_runs.recurring_run_service_create_recurring_run
    server.make(f"make {wanted.name}", look, call, recurring_run=body)


def _recurring(server: Server, **filters: str) -> Iterator[Any]:
    scope = {"namespace": server.namespace} if server.namespace else {}
    call = server.client.recurring_runs.recurring_run_service_list_recurring_runs
    return server.all("list the recurring runs", call, "recurring_runs", **scope, **filters)


def _experiments(server: Server, names: set[str]) -> dict[str, str]:
    """The ids of those experiments that there are."""
    found = {name: server.find_experiment(name) for name in sorted(names)}
    return {name: str(one.experiment_id) for name, one in found.items() if one is not None}


def _going_on(server: Server, found: Any) -> str:
    """The id of a run of this recurring run that has not ended, or an empty text."""
    scope = {"namespace": server.namespace} if server.namespace else {}
    only = called(found.recurring_run_id, "recurring_run_id")
    call = server.client.runs.run_service_list_runs
    runs = server.all("look for its runs", call, "runs", filter=only, sort_by="created_at desc", **scope)
    return next((str(run.run_id) for run in runs if run.state not in ENDED), "")


def _is_on(found: Any) -> bool:
    return bool(found.status == "ENABLED" or (found.status != "DISABLED" and found.mode == "ENABLE"))


def _owner(found: Any) -> str:
    marked = MARK.search(found.description or "")
    return marked[1] if marked else ""


def _content(found: Any) -> str:
    marked = MARK.search(found.description or "")
    return marked[2] if marked else ""
