"""The command line: ``rlhf-ppo run | fields | compile | rollback``."""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from rlhf_ppo import __version__
from rlhf_ppo.config import PRESETS, preset
from rlhf_ppo.errors import InputError
from rlhf_ppo.fields import parameters_of, runtime_fields_of
from rlhf_ppo.parameters import (
    GROUPS,
    PARAMETERS,
    decode,
    defaults,
    encode,
    from_kfp,
    parse_text,
    to_kfp,
    unknown_names,
)

RUN_HELP = """\
Run the whole pipeline on this machine: the compiled package, with KFP's own local runner. All parameters are
checked before anything starts. The exit code is 0 also when the gate holds the policy back, 2 when the input is
wrong, 1 when a step fails, 130 when interrupted.

example:
  rlhf-ppo run --set model_name=HuggingFaceTB/SmolLM2-135M-Instruct --set query_dataset=prompts.jsonl \\
      --set reward_model=my_reward:score --set batch_size=32 --set mini_batch_size=8 --set steps=480
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without arrows must not cost a run its summary
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
    commands = parser.add_subparsers(required=True, metavar="run | fields | compile | rollback")
    run = commands.add_parser(
        "run",
        help="run the whole pipeline on this machine",
        description=RUN_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("--preset", choices=list(PRESETS), help="start from these values instead of the defaults")
    run.add_argument("--parameters", metavar="FILE", help="YAML file of parameters; paths in it are seen from here")
    run.add_argument(
        "--set", metavar="NAME=VALUE", action="append", default=[], help="one parameter; wins over the file; repeatable"
    )
    run.add_argument("--run-dir", metavar="DIR", help="new directory for the run; default: runs/DATE-TIME")
    run.add_argument("--quiet", action="store_true", help="no progress: only the summary, or what went wrong")
    run.set_defaults(command=_run)
    fields = commands.add_parser("fields", help="explain every parameter")
    form = fields.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="as Markdown tables")
    form.add_argument("--json", action="store_true", help="as a JSON list, one object for each parameter")
    fields.set_defaults(command=_fields)
    compiled = commands.add_parser("compile", help="write the compiled pipeline for a cluster")
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
    compiled.set_defaults(command=_compile)
    back = commands.add_parser(
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
    back.set_defaults(command=_rollback)
    return parser


def read_parameters(preset_name: str | None, file: str | None, texts: Sequence[str]) -> dict[str, Any]:
    """All parameters in KFP's encoding: preset, then file, then NAME=VALUE texts.

    Raises InputError with everything that is wrong.
    """
    problems: list[str] = []
    rejected: set[str] = set()
    values = {name: to_kfp(PARAMETERS[name], value) for name, value in preset(preset_name or "itrex").items()}
    found = _load(file, problems) if file else {}
    values |= _from_file(found or {}, problems, rejected)
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


def _load(file: str, problems: list[str]) -> dict[Any, Any] | None:
    """What a YAML file holds, or None where it can't be used."""
    try:
        found = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problems.append(f"--parameters={file} can't be read: {error}")
        return None
    if not isinstance(found, dict):
        problems.append(f"--parameters={file} holds no parameters: give lines like batch_size: 32")
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


def _compile(given: argparse.Namespace) -> int:
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
        Path(given.output).write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return 0


def _rollback(given: argparse.Namespace) -> int:
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


if __name__ == "__main__":
    sys.exit(main())
