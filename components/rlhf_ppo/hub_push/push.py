"""The work of push_to_hub: publish the policy as one commit, once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ppo.errors import InputError
from rlhf_ppo.events import emit
from rlhf_ppo.hub import tried, weights_of, write_token
from rlhf_ppo.hub_push.card import model_card
from rlhf_ppo.hub_push.kwargs import kwargs_problems
from rlhf_ppo.parameters import RunSettings
from rlhf_ppo.registry import CHAMPION, REVISION_TAG
from rlhf_ppo.releases import ADAPTER_CONFIG, CONFIGS, LOADED, PICKLED, mark, stale, tag_of
from rlhf_ppo.tracking import Tracker

ADAPTER = "adapter"
"""The folder of a LoRA run's adapters, which are merged into the model beside it."""
KEPT_BACK = {"value_head.safetensors", "training.json", "digest.json", "README.md"}
"""What the trainer leaves beside the model and nobody needs to use it; the card is ours."""


@dataclass(frozen=True)
class Branch:
    """A branch of a repository on the hub."""

    api: Any
    repo_id: str
    name: str


def push_to_hub(config: str, policy: Path, evaluation: Path, run_id: str, policy_uri: str) -> str:
    """Push the directory ``policy`` to the repository that the settings name; returns the commit, or "" for none.

    MLflow's registry is told who is champion now; ``policy_uri`` is where the weights lie for it. Raises InputError
    where the token is missing or may not write, or where another model was published since the evaluation.
    """
    settings = RunSettings.from_json(config)
    if not settings.repo_id:
        emit("push_skipped", reason="no repository is named: set hub_repo_id")
        return ""
    problems = kwargs_problems(settings.ppo.push_to_hub_if_best_kwargs)
    if problems:
        raise InputError(problems)
    with Tracker.for_run("push_to_hub", run_id, settings) as tracker:
        repo_id, revision = publish(settings, policy, evaluation, run_id, {"MLflow run": tracker.pipeline_run()})
        tags = {"rlhf_ppo.hub_repo_id": repo_id, REVISION_TAG: revision}
        tracker.log_tags(tags)
        tracker.log_model(settings.registered_model, policy_uri, tags, CHAMPION)
    return revision


def publish(
    settings: RunSettings, policy: Path, evaluation: Path, run_id: str, lineage: Mapping[str, str]
) -> tuple[str, str]:
    """Push, and return the repository's full name and the commit.

    One atomic commit with the files and a card, in whose lineage stands ``lineage``, too, and a tag for it. A commit
    of the same run is found again by its title, so that neither a lost answer nor a second run of the step commits
    twice.
    """
    kwargs = settings.ppo.push_to_hub_if_best_kwargs
    results = json.loads((evaluation / "evaluation.json").read_text(encoding="utf-8"))
    results["lineage"] |= lineage
    files = _files(policy, settings)
    branch = _branch(settings.repo_id, kwargs.get("private", settings.hub.hub_private), kwargs.get("revision", "main"))
    model = json.loads((policy / "config.json").read_text(encoding="utf-8"))
    files["README.md"] = model_card(settings, results, branch.repo_id, bool(model.get("is_encoder_decoder"))).encode()
    message = kwargs.get("commit_message") or settings.ppo.exp_name
    champion = results.get("champion") or {}
    revision = _commit_once(branch, files, message, run_id, champion.get("revision"))
    tag = _tag_once(branch, revision, run_id)
    emit(
        "pushed",
        repo_id=branch.repo_id,
        revision=revision,
        tag=tag,
        url=f"{branch.api.endpoint}/{branch.repo_id}/tree/{revision}",
    )
    return branch.repo_id, revision


def _files(policy: Path, settings: RunSettings) -> dict[str, Path | bytes]:
    """The files to push by their names in the repository: the whole model, or the adapter alone."""
    found = {path.relative_to(policy).as_posix(): path for path in sorted(policy.rglob("*")) if path.is_file()}
    files = {name: path for name, path in found.items() if not name.startswith(f"{ADAPTER}/")}
    files = {name: path for name, path in files.items() if path.name not in KEPT_BACK}
    pickled = [name for name in found if name.endswith(PICKLED)]
    if pickled:
        raise InputError(f"the policy holds {', '.join(pickled)}: only safetensors are pushed")
    if not settings.hub.hub_adapter:
        return dict(files)
    whole: dict[str, Path | bytes] = {n: p for n, p in files.items() if not n.endswith(LOADED) and n not in CONFIGS}
    for path in sorted((policy / ADAPTER).iterdir()):
        if path.name not in KEPT_BACK:
            whole[path.name] = path
    return {**whole, ADAPTER_CONFIG: _adapter_config(policy, settings)}


def _adapter_config(policy: Path, settings: RunSettings) -> bytes:
    """The adapter's config with the base as it is known on the hub; in the run's own it is a directory."""
    config = json.loads((policy / ADAPTER / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = settings.ppo.model_name
    config["revision"] = settings.model.model_revision or None
    return json.dumps(config, indent=2).encode()


def _branch(repo_id: str, private: bool, name: str) -> Branch:
    """The branch to push to, made where it is missing."""
    from huggingface_hub import HfApi

    api = HfApi(token=write_token(repo_id))

    def repository() -> str:
        # The hub completes a name without owner by the token's.
        named = str(api.create_repo(repo_id, private=private, exist_ok=True).repo_id)
        if not named:  # a conflict that is not with an existing repository; since 1.0 the client raises
            raise ConnectionError("the hub's answer names no repository")
        return named

    def branch() -> None:
        # Not exist_ok, which takes every conflict for an existing branch.
        if name not in {found.name for found in api.list_repo_refs(full_name).branches}:
            api.create_branch(full_name, branch=name)

    full_name = tried(repository, repo_id)
    if name != "main":
        tried(branch, full_name)
    return Branch(api, full_name, name)


def _commit_once(
    branch: Branch, files: Mapping[str, Path | bytes], message: str, run_id: str, champion: str | None
) -> str:
    """Commit unless a commit of this run is there; a stale parent or a lost answer is looked at anew."""
    title, _, description = message.strip().partition("\n")

    def attempt() -> str:
        commits = branch.api.list_repo_commits(branch.repo_id, revision=branch.name)
        for commit in commits:
            if commit.title.endswith(mark(run_id)):
                return str(commit.commit_id)
        parent = commits[0].commit_id if commits else None
        _check_champion(branch, parent, champion)
        made = branch.api.create_commit(
            branch.repo_id,
            _operations(files, branch.api.list_repo_files(branch.repo_id, revision=parent)),
            commit_message=f"{title} {mark(run_id)}",
            commit_description=description.strip(),
            revision=branch.name,
            parent_commit=parent,
        )
        return str(made.oid)

    return tried(attempt, branch.repo_id)


def _check_champion(branch: Branch, head: str | None, champion: str | None) -> None:
    """Raise InputError unless the weights at ``head`` are those that the policy was compared with."""
    found = weights_of(branch.api, branch.repo_id, head) if head else {}
    known = weights_of(branch.api, branch.repo_id, champion) if champion else {}
    if found != known:
        compared = f"the policy was compared with {champion}" if champion else "the evaluation found no model there"
        raise InputError(
            f"hub_repo_id={branch.repo_id!r}: another model was published since the evaluation ({compared}, {head} is "
            "published now): run the pipeline again, so that the policy is compared with it"
        )


def _operations(files: Mapping[str, Path | bytes], present: Iterable[str]) -> list[Any]:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    added = [CommitOperationAdd(name, str(what) if isinstance(what, Path) else what) for name, what in files.items()]
    return [*added, *(CommitOperationDelete(name) for name in stale(files, present))]


def _tag_once(branch: Branch, revision: str, run_id: str) -> str:
    """Tag the commit; returns the tag's name."""
    name = tag_of(run_id)

    def attempt() -> None:
        # Not exist_ok, as above.
        if name not in {tag.name for tag in branch.api.list_repo_refs(branch.repo_id).tags}:
            branch.api.create_tag(branch.repo_id, tag=name, revision=revision)

    tried(attempt, branch.repo_id)
    return name
