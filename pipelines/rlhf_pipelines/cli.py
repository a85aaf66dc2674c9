"""The command line: ``rlhf-ppo run | submit | schedule | fields | compile | rollback``."""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from rlhf_pipelines import commands
from rlhf_pipelines.reading import read_parameters
from rlhf_ppo import __version__
from rlhf_ppo.config import PRESETS
from rlhf_ppo.errors import InputError
from rlhf_ppo.fields import parameters_of, runtime_fields_of
from rlhf_ppo.parameters import (
    GROUPS,
    PARAMETERS,
    defaults,
)

RUN_HELP = """\
Run the whole pipeline on this machine: the compiled package, with KFP's own local runner. All parameters are
checked before anything starts. The exit code is 0 also when the gate holds the policy back, 2 when the input is
wrong, 1 when a step fails, 130 when interrupted.

example:
  rlhf-ppo run --set model_name=HuggingFaceTB/SmolLM2-135M-Instruct --set query_dataset=prompts.jsonl \\
      --set reward_model=my_reward:score --set batch_size=32 --set mini_batch_size=8 --set steps=480
"""


SUBMIT_HELP = """\
Start a run on a cluster. Names, types and values of the parameters are checked before a server is asked; what they
name is looked at by the run's first step. The server is --host, else KF_PIPELINES_ENDPOINT, else the one of this
cluster, else the kubeconfig's, through its proxy. KF_PIPELINES_TOKEN holds a token, or KF_PIPELINES_COOKIE a login's
cookie; in a pod KF_PIPELINES_SA_TOKEN_PATH names the file with the service account's token.

example:
  rlhf-ppo submit --host https://kubeflow.example/pipeline --namespace team --wait \\
      --image registry.example/rlhf-ppo/cpu:0.1.0 --parameters manifests/overlays/gpu/parameters.yaml \\
      --set model_name=org/model --set query_dataset=org/prompts --set reward_model=org/reward
"""


SCHEDULE_HELP = """\
Make the recurring runs of a Kubeflow what FILE declares: create, replace, switch on and off, and delete those that bear
the file's owner. Says what it will do first; a second time changes nothing. A recurring run whose run goes on is
switched off and stays until that has ended, since KFP would end the run with it. The server is found as by submit.

example of FILE:
  owner: team-a
  schedules:
    - name: nightly
      cron: "0 0 2 * * *"           # six fields, seconds first; in KFP's time zone, UTC unless it was set
      version: latest               # or a version's name; default: latest, as of each run
      enabled: true                 # default: true
      concurrency: 1                # runs at the same time, 1 to 10; default: 1
      pipeline: rlhf-ppo            # default: rlhf-ppo
      experiment: rlhf-ppo          # default: rlhf-ppo; made where it is missing
      service_account: ""           # of the runs' pods; default: KFP's
      parameters_file: gpu.yaml     # seen from FILE; and preset, as in submit
      parameters:                   # win over parameters_file
        model_name: org/model
        query_dataset: org/prompts
        reward_model: org/reward
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without arrows must not cost a run its summary
    os.environ.pop("_KFP_RUNTIME", None)  # Set in the images for the steps; kfp then comes without its client.
    given = _parser().parse_args(arguments)
    try:
        code: int = given.command(given)
        return code
    except InputError as error:
        for problem in error.problems:
            print(f"rlhf-ppo: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was started", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rlhf-ppo", description="Fine-tune a language model with PPO.")
    parser.add_argument("--version", action="version", version=f"rlhf-ppo {__version__}")
    kinds = parser.add_subparsers(required=True, metavar="run | submit | schedule | fields | compile | rollback")
    for add in (_add_run, _add_submit, _add_schedule, _add_fields, _add_compile, _add_rollback):
        add(kinds)
    return parser


def _add_run(kinds: Any) -> None:
    run = kinds.add_parser(
        "run",
        help="run the whole pipeline on this machine",
        description=RUN_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_parameters(run)
    run.add_argument("--run-dir", metavar="DIR", help="new directory for the run; default: runs/DATE-TIME")
    run.add_argument("--quiet", action="store_true", help="no progress: only the summary, or what went wrong")
    run.set_defaults(command=_run)


def _add_submit(kinds: Any) -> None:
    start = kinds.add_parser(
        "submit",
        help="start a run on a cluster",
        description=SUBMIT_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_parameters(start)
    _add_server(start)
    start.add_argument("--experiment", metavar="NAME", default="rlhf-ppo", help="made where it is missing")
    start.add_argument("--name", metavar="NAME", help="what the run's name begins with; default: exp_name")
    start.add_argument(
        "--client-token",
        metavar="TOKEN",
        help="stands in the run's name; the same command with the same token starts no second run",
    )
    start.add_argument("--image", help="image for all steps, as in compile; not with --pipeline")
    start.add_argument("--volume", metavar="CLAIM", help="claim for checkpoints, as in compile; not with --pipeline")
    start.add_argument("--pipeline", metavar="NAME", help="run a pipeline that the server has, not this package's")
    start.add_argument("--version", metavar="NAME", default="latest", help="of --pipeline; default: latest")
    start.add_argument("--service-account", metavar="NAME", default="", help="of the run's pods; default: KFP's")
    start.add_argument("--wait", action="store_true", help="follow the run; exit with 1 where it does not succeed")
    start.add_argument("--timeout", metavar="SECONDS", type=float, default=0.0, help="end --wait after so long")
    start.set_defaults(command=commands.submit)


def _add_fields(kinds: Any) -> None:
    fields = kinds.add_parser("fields", help="explain every parameter")
    form = fields.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="as Markdown tables")
    form.add_argument("--json", action="store_true", help="as a JSON list, one object for each parameter")
    fields.set_defaults(command=_fields)


def _add_compile(kinds: Any) -> None:
    compiled = kinds.add_parser("compile", help="write the compiled pipeline for a cluster")
    compiled.add_argument("-o", "--output", metavar="FILE", help="YAML file to write; default: standard output")
    compiled.add_argument(
        "--image",
        help="image of your registry that all steps run in, built from images/cpu; training and evaluation run in the "
        "one that the parameter node_image names, whose default becomes this one, too",
    )
    compiled.add_argument(
        "--volume",
        metavar="CLAIM",
        help="persistent volume claim, in the namespace of the runs, that training keeps its checkpoints on, so that a "
        "retry goes on; for node_count it must be one that many nodes can write to (ReadWriteMany)",
    )
    compiled.add_argument(
        "--kubernetes",
        action="store_true",
        help="as the resources Pipeline and PipelineVersion, for KFP's Kubernetes-native mode and for GitOps",
    )
    compiled.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit with 1 if FILE is not what would be written, or holds a version that was edited",
    )
    compiled.set_defaults(command=commands.compile)


def _add_rollback(kinds: Any) -> None:
    back = kinds.add_parser(
        "rollback",
        help="publish again what was published before",
        description="Publish an earlier release again, as one new commit, and make it the champion in MLflow's "
        "registry. HF_TOKEN holds the token.",
    )
    back.add_argument("repository", metavar="REPOSITORY", help="on the hub, e.g. me/my-model")
    back.add_argument(
        "--to", metavar="RELEASE", default="", help="its tag or commit; default: the release before the current one"
    )
    back.add_argument("--branch", default="main", help="default: main")
    back.add_argument(
        "--mlflow-tracking-uri", metavar="URI", default="", help="MLflow server or store; default: MLFLOW_TRACKING_URI"
    )
    back.set_defaults(command=commands.rollback)


def _add_schedule(kinds: Any) -> None:
    schedule = kinds.add_parser("schedule", help="make a cluster's recurring runs what a file declares")
    apply = schedule.add_subparsers(required=True, metavar="apply").add_parser(
        "apply",
        help="create, replace, switch and delete what the file's owner owns",
        description=SCHEDULE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    apply.add_argument("file", metavar="FILE", help="YAML file with the schedules")
    _add_server(apply)
    apply.add_argument("--dry-run", action="store_true", help="only say what would be done")
    apply.add_argument("--yes", action="store_true", help="don't ask before the changes are made")
    apply.set_defaults(command=commands.schedule)


def _add_parameters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=list(PRESETS), help="start from these values instead of the defaults")
    parser.add_argument("--parameters", metavar="FILE", help="YAML file of parameters; paths in it are seen from here")
    parser.add_argument(
        "--set", metavar="NAME=VALUE", action="append", default=[], help="one parameter; wins over the file; repeatable"
    )


def _add_server(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", metavar="URL", default="", help="KFP API server; default: KF_PIPELINES_ENDPOINT")
    parser.add_argument("--namespace", default="", help="the profile's, on a multi-user Kubeflow")
    parser.add_argument("--kube-context", metavar="NAME", default="", help="of the kubeconfig, where no host is given")
    parser.add_argument("--ca-cert", metavar="FILE", default="", help="certificates that the server's is checked with")


def _run(given: argparse.Namespace) -> int:
    parameters = read_parameters(given.preset, given.parameters, given.set)
    from rlhf_pipelines import local, summary
    from rlhf_pipelines.progress import Progress
    from rlhf_ppo.config_validation.validate import validate_config

    # The pipeline's first step does the same; here it comes before anything is written. Users' modules lie around here.
    sys.path.insert(0, "")
    validate_config(parameters)
    directory = local.make_run_directory(given.run_dir)
    progress = Progress(quiet=given.quiet)
    try:
        code = local.run(parameters, directory, progress.show)
    except KeyboardInterrupt:
        progress.close()
        print(f"\ninterrupted; the run is in {directory}", file=sys.stderr)
        if any(event["kind"] == "checkpoint_written" for event in local.follow(directory / "events.jsonl", bool)):
            print("the same command goes on with the training from its last checkpoint", file=sys.stderr)
        return 130
    progress.close()
    failure = progress.last.get("step_failed")
    if code == 0 and failure is None and not progress.open_steps:
        (directory / "summary.json").write_text(json.dumps(progress.last, indent=1), encoding="utf-8")
        print("\n" + summary.succeeded(progress.last, directory))
        return 0
    print("\n" + summary.failed(failure, progress.open_steps, code, directory), file=sys.stderr)
    return 2 if failure and failure["input_error"] else 1


def _fields(given: argparse.Namespace) -> int:
    if given.markdown:
        from rlhf_pipelines.generate import table

        print(table())
        return 0
    from rlhf_ppo.descriptions import describe

    if given.json:
        print(json.dumps(_listed(), indent=1, ensure_ascii=False))
        return 0
    width = max(60, min(110, shutil.get_terminal_size().columns))
    values = defaults()
    for group in GROUPS.values():
        print(f"\n{(group.__doc__ or '').splitlines()[0]}\n")
        for parameter in parameters_of(group):
            print(f"  {parameter.name} ({parameter.type.__name__}, {json.dumps(values[parameter.name])})")
            print(textwrap.fill(describe(parameter), width, initial_indent="      ", subsequent_indent="      "))
    print("\nFilled by the trainer, can't be set\n")
    for name, meaning in runtime_fields_of(GROUPS["ppo"]):
        print(f"  {name}: {meaning}")
    return 0


def _listed() -> list[dict[str, Any]]:
    from rlhf_ppo.descriptions import describe

    values = defaults()
    return [
        {"name": name, "type": parameter.type.__name__, "default": values[name], "meaning": describe(parameter)}
        for name, parameter in PARAMETERS.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
