"""The commands that have to do with clusters and the hub; each gets the parsed command line."""

from __future__ import annotations

import argparse
import secrets
import sys
import time
from pathlib import Path

from rlhf_pipelines.reading import told
from rlhf_ppo.errors import InputError
from rlhf_ppo.parameters import defaults


def compile(given: argparse.Namespace) -> int:
    """Write the compiled pipeline, or check the file that holds it. Returns the exit code."""
    from rlhf_pipelines.compile import packaged
    from rlhf_pipelines.manifest import manifest, problems_of

    text = packaged(image=given.image, volume=given.volume)
    if given.kubernetes:
        text = manifest(text)
    if given.check:
        if not given.output:
            raise InputError("--check needs a file to look at: add -o FILE")
        given_flags = [f"--{name} {value}" for name in ("image", "volume") if (value := getattr(given, name))]
        command = " ".join(
            ["rlhf-ppo compile", *(["--kubernetes"] if given.kubernetes else []), *given_flags, f"-o {given.output}"]
        )
        problems = problems_of(Path(given.output), text, command)
        for problem in problems:
            print(problem, file=sys.stderr)
        return 1 if problems else 0
    if given.output:
        try:
            Path(given.output).write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(f"-o {given.output} can't be written: {error.strerror}; name a YAML file") from error
    else:
        print(text, end="")
    return 0


def submit(given: argparse.Namespace) -> int:
    """Start a run on a cluster, and follow it where that is asked for. Returns the exit code."""
    parameters = told(given.preset, given.parameters, given.set)
    from rlhf_pipelines import submit as work
    from rlhf_pipelines.compile import packaged
    from rlhf_pipelines.kubeflow import KubeflowError, connect

    if given.pipeline and (given.image or given.volume):
        raise InputError("--image and --volume are compiled in, and --pipeline is compiled already: leave them out")
    package = "" if given.pipeline else packaged(given.image, given.volume)
    label = given.name or str(parameters.get("exp_name") or defaults()["exp_name"])
    name = f"{label} ({given.client_token})" if given.client_token else f"{label} {_now()}"
    try:
        server = connect(given.host, given.namespace, given.kube_context, given.ca_cert)
        source = work.stored(server, given.pipeline, given.version, parameters) if given.pipeline else None
        wanted = work.Submission(
            name, given.experiment, parameters, source or work.Source(package), given.service_account
        )
        run_id = work.submit(server, wanted)
        print(f"run {run_id} of {name}" + (f": {server.pages}/runs/details/{run_id}" if server.pages else ""))
        if not given.wait:
            return 0
        outcome = work.follow(server, run_id, lambda step, state: print(f"{step:<40}{state.lower()}"), given.timeout)
    except (KubeflowError, TimeoutError) as error:
        print(f"rlhf-ppo: {error}", file=sys.stderr)
        return 1
    succeeded = outcome.state == "SUCCEEDED"
    for line in (*outcome.reasons, f"the run has {outcome.state.lower()}"):
        print(line, file=sys.stdout if succeeded else sys.stderr)
    return 0 if succeeded else 1


def _now() -> str:
    return f"{time.strftime('%Y-%m-%d %H:%M:%S')}-{secrets.token_hex(2)}"


def schedule(given: argparse.Namespace) -> int:
    """Make the recurring runs of a cluster what a file declares. Returns the exit code."""
    from rlhf_pipelines import reconcile
    from rlhf_pipelines.kubeflow import KubeflowError, connect
    from rlhf_pipelines.schedules import read_schedules

    owner, schedules = read_schedules(given.file)
    try:
        server = connect(given.host, given.namespace, given.kube_context, given.ca_cert)
        changes = reconcile.plan(server, owner, schedules)
        print("\n".join(map(str, changes)) or "nothing to change")
        if given.dry_run or all(change.kind == "wait" for change in changes):
            return 0
        if not given.yes:
            if not sys.stdin.isatty():
                raise InputError("nobody can be asked here: add --yes to make these changes")
            if input("make these changes? [y/N] ").strip().lower() not in ("y", "yes"):
                print("nothing was changed")
                return 1
        reconcile.apply(server, changes, print)
    except KubeflowError as error:
        print(f"rlhf-ppo: {error}", file=sys.stderr)
        return 1
    return 0


def rollback(given: argparse.Namespace) -> int:
    """Publish an earlier release again. Returns the exit code."""
    from rlhf_ppo.hub import HubUnreachable
    from rlhf_ppo.releases import move_champion, roll_back, tracking_uri_of

    try:
        done = roll_back(given.repository, given.to, given.branch)
    except HubUnreachable as error:
        print(f"rlhf-ppo: {error}", file=sys.stderr)
        return 1
    print(f"{done.repo_id} ({done.branch}) holds again {done.tag or done.release}: commit {done.revision}")
    uri = tracking_uri_of(given.mlflow_tracking_uri)
    if not uri:
        print("MLflow was not told: name it by --mlflow-tracking-uri or MLFLOW_TRACKING_URI")
        return 0
    try:
        champion = move_champion(done.release, uri)
    except Exception as error:  # of the server, its database or its client
        print(f"rlhf-ppo: MLflow was not told: {type(error).__name__}: {error}", file=sys.stderr)
        print(f"say it later: rlhf-ppo rollback {done.repo_id} --to {done.release}", file=sys.stderr)
        return 1
    print(f"MLflow: {champion} is champion" if champion else f"MLflow has no version of {done.release}")
    return 0
