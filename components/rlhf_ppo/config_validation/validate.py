"""Check every parameter of a run, look at what they name, and pin it: seconds on a CPU, all errors at once."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from rlhf_ppo.config_validation import sources
from rlhf_ppo.errors import InputError
from rlhf_ppo.events import emit
from rlhf_ppo.hub_push.kwargs import kwargs_problems
from rlhf_ppo.parameters import RunSettings, decode
from rlhf_ppo.settings import is_callable_name, is_endpoint, split_revision


class CacheKeys(NamedTuple):
    """What decides the results of the steps that KFP may take from its cache."""

    model_revision: str
    model_digest: str
    data_revision: str
    data_digest: str


class TrainingPod(NamedTuple):
    """What the pod of train_ppo asks Kubernetes for; KFP reads an empty accelerator, and "0", as no wish."""

    accelerator: str
    accelerator_count: str
    cpu: str
    memory: str
    node_selector: dict[str, str]
    tolerations: list[dict[str, Any]]


def validate_config(parameters: Mapping[str, Any]) -> str:
    """The settings that ``parameters``, in KFP's encoding, stand for, as JSON, with branches of the hub made commits.

    Raises InputError with everything that is wrong; asks the hub only where nothing else is.
    """
    problems: list[str] = []
    try:
        settings = decode(parameters)
    except InputError as error:
        problems = error.problems
    problems += _problems_of_sources({name: value for name, value in parameters.items() if isinstance(value, str)})
    problems += _problems_of_sum(parameters.get("reward_sum"))
    kwargs = parameters.get("push_to_hub_if_best_kwargs")
    problems += kwargs_problems(kwargs) if isinstance(kwargs, dict) else []
    best = kwargs.get("repo_id") if isinstance(kwargs, dict) else None
    problems += _problems_of_repository("hub_repo_id", parameters.get("hub_repo_id"))
    problems += _problems_of_repository("push_to_hub_if_best_kwargs' repo_id", best)
    model = parameters.get("model_name")
    if parameters.get("hub_adapter") is True and isinstance(model, str) and model and not _on_hub(model):
        problems.append(
            f"hub_adapter=True needs a model that the adapter can refer to, and model_name={model!r} is not on the "
            "hub: set hub_adapter=False"
        )
    if problems:
        raise InputError(problems)
    return _pinned(settings).to_json()


def cache_keys(config: str) -> CacheKeys:
    """What the model and the data named in ``config`` hold now, by commit or by digest."""
    settings = RunSettings.from_json(config)
    assert settings.ppo.model_name and settings.ppo.query_dataset
    model, data = settings.model.model_revision, settings.data.data_revision
    return CacheKeys(
        model_revision=model,
        model_digest=sources.digest(settings.ppo.model_name, model),
        data_revision=data,
        data_digest=sources.digest(settings.ppo.query_dataset, data),
    )


def training_pod(config: str) -> TrainingPod:
    """The pod for ``config``: with node_count it only waits for a TrainJob, whose pods have the cards."""
    node = RunSettings.from_json(config).node
    if node.node_count:
        return TrainingPod("", "0", "0", "0", {}, [])
    return TrainingPod(
        node.node_accelerator,
        str(node.node_accelerator_count),
        node.node_cpu,
        node.node_memory,
        node.node_selector,
        node.node_tolerations,
    )


def _problems_of_sources(texts: Mapping[str, str]) -> list[str]:
    """A sentence for each name of a model, dataset, reward or tracker behind which there is nothing."""
    found = []
    for parameter, revision, check in (
        ("model_name", "model_revision", sources.problem_of_model),
        ("query_dataset", "data_revision", sources.problem_of_dataset),
        ("reward_model", "reward_revision", _problem_of_reward),
    ):
        value = texts.get(parameter, "")
        if not value:
            continue
        problem = check(value)
        if problem:
            found.append(f"{parameter}={value!r} {problem}")
        elif texts.get(revision) and not _on_hub(value):
            found.append(
                f"{revision}={texts[revision]!r} has no effect on {parameter}={value!r}, which is not on the hub: "
                "leave it empty"
            )
    head = texts.get("ppo_value_head", "")
    if head and not Path(head).exists():
        found.append(
            f"ppo_value_head={head!r} does not exist (seen from {Path.cwd()}): give a safetensors file or a directory "
            "that holds a value head, or leave it empty"
        )
    judge = texts.get("eval_judge", "")
    problem = _problem_of_reward(split_revision(judge)[0]) if judge else None
    if problem:
        found.append(f"eval_judge={judge!r} {problem}")
    return found + _problems_of_tracker(texts.get("log_with", ""))


def _on_hub(name: str) -> bool:
    return not is_callable_name(name) and sources.kind(name) == "hub"


def _problems_of_sum(weights: Any) -> list[str]:
    """A sentence for each name in reward_sum behind which there is nothing."""
    found = []
    for name in weights if isinstance(weights, dict) else ():
        problem = _problem_of_reward(split_revision(name)[0])
        if problem:
            found.append(f"reward_sum has {name!r}, which {problem}")
    return found


def _problems_of_repository(parameter: str, name: Any) -> list[str]:
    """Why the hub would take no repository of this name; what it knows of it is asked later."""
    if not name or not isinstance(name, str) or importlib.util.find_spec("huggingface_hub") is None:
        return []
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        return [f"{parameter}={name!r} can't be a repository: {error}"]
    return []


def _problem_of_reward(value: str) -> str | None:
    if is_endpoint(value):
        return None if urlsplit(value).hostname else "names no server: give an address like https://host/path"
    return _problem_of_callable(value) if is_callable_name(value) else sources.problem_of_classifier(value)


def _problem_of_callable(value: str) -> str | None:
    module_name, _, function_name = value.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the user's own code: whatever it raises is the answer
        return (
            f"can't be imported ({type(error).__name__}: {error}): start in the directory that holds "
            f"{module_name.split('.')[0]}, or install it"
        )
    function = getattr(module, function_name, None)
    if function is None:
        return f"is not there: {module.__file__ or module_name} has no {function_name}"
    if not callable(function):
        return f"is {function!r}: give a function that maps (prompts, responses) to one float each"
    return None


def _problems_of_tracker(log_with: str) -> list[str]:
    package = {"mlflow": "mlflow", "wandb": "wandb", "tensorboard": "tensorboard"}.get(log_with)
    if package is None or importlib.util.find_spec(package) is not None:
        return []
    return [f"log_with={log_with!r} needs the package {package}: install rlhf-ppo[{package}], or leave log_with empty"]


def _pinned(settings: RunSettings) -> RunSettings:
    """``settings`` with a commit for every revision on the hub. Raises InputError for what is not there."""
    problems: list[str] = []
    groups: dict[str, Any] = {}
    for group, parameter, revision, kind in (
        ("model", "model_name", "model_revision", "model"),
        ("data", "query_dataset", "data_revision", "dataset"),
        ("reward", "reward_model", "reward_revision", "model"),
    ):
        name, values = getattr(settings.ppo, parameter), getattr(settings, group)
        if not _on_hub(name):
            continue
        try:
            commit = sources.commit_of(parameter, name, revision, getattr(values, revision), kind)
        except InputError as error:
            problems += error.problems
            continue
        if commit != getattr(values, revision):
            emit("pinned", parameter=revision, source=name, value=commit)
            groups[group] = dataclasses.replace(values, **{revision: commit})
    try:
        reward = groups.get("reward", settings.reward)
        weights = {_pinned_name(n, settings.ppo.reward_model): w for n, w in reward.reward_sum.items()}
        groups["reward"] = dataclasses.replace(reward, reward_sum=weights)
        judge = settings.evaluation.eval_judge
        if judge:
            pinned = _pinned_name(judge, None, "eval_judge")
            groups["evaluation"] = dataclasses.replace(settings.evaluation, eval_judge=pinned)
    except InputError as error:
        problems += error.problems
    if problems:
        raise InputError(problems)
    return dataclasses.replace(settings, **groups)


def _pinned_name(name: str, reward_model: str | None, parameter: str = "reward_sum") -> str:
    """``name`` of a further reward with a commit, where it is on the hub and is not reward_model itself."""
    model, revision = split_revision(name)
    if name == reward_model or is_callable_name(name) or sources.kind(model) != "hub":
        return name
    return f"{model}@{sources.commit_of(parameter, model, parameter, revision, 'model')}".rstrip("@")
