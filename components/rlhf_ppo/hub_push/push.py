"""The work of push_to_hub: publish the policy as one commit, once."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ppo.errors import InputError
from rlhf_ppo.events import emit
from rlhf_ppo.hub import WEIGHTS, tried, weights_of, write_token
from rlhf_ppo.hub_push.card import model_card
from rlhf_ppo.hub_push.kwargs import kwargs_problems
from rlhf_ppo.parameters import RunSettings

KEPT_BACK = {"value_head.safetensors", "training.json", "digest.json"}
"""What the trainer leaves beside the model and nobody needs to use it."""
ADAPTER = "adapter"
"""The folder of a LoRA run's adapters, which are merged into what is pushed."""
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
LOADED = (WEIGHTS, f"{WEIGHTS}.index.json", "adapter_config.json", *PICKLED, ".bin.index.json")
"""Files of an earlier push that a model would be loaded from, together with the new ones or instead of them."""


@dataclass(frozen=True)
class Branch:
    """A branch of a repository on the hub."""

    api: Any
    repo_id: str
    name: str


def push_to_hub(config: str, policy: Path, evaluation: Path, run_id: str) -> str:
    """Push the directory ``policy`` to the repository that the settings name; returns the commit, or "" for none.

    One atomic commit with the model's files and a card. A commit of the same run is found again by its title, so that
    neither a lost answer nor a second run of the step commits twice. Raises InputError where the token is missing or
    may not write.
    """
    settings = RunSettings.from_json(config)
    repo_id, kwargs = settings.repo_id, settings.ppo.push_to_hub_if_best_kwargs
    if not repo_id:
        emit("push_skipped", reason="no repository is named: set hub_repo_id")
        return ""
    problems = kwargs_problems(kwargs)
    if problems:
        raise InputError(problems)
    results = json.loads((evaluation / "evaluation.json").read_text(encoding="utf-8"))
    files = _files(policy)
    branch = _branch(repo_id, kwargs.get("private", settings.hub.hub_private), kwargs.get("revision", "main"))
    model = json.loads((policy / "config.json").read_text(encoding="utf-8"))
    card = model_card(settings, results, branch.repo_id, bool(model.get("is_encoder_decoder")))
    message = kwargs.get("commit_message") or settings.ppo.exp_name
    champion = results.get("champion") or {}
    revision = _commit_once(branch, files, card, message, run_id, champion.get("revision"))
    emit(
        "pushed",
        repo_id=branch.repo_id,
        revision=revision,
        url=f"{branch.api.endpoint}/{branch.repo_id}/tree/{revision}",
    )
    return revision


def mark(run_id: str) -> str:
    """The end of a commit's title that tells which run made it."""
    return f"(pipeline run {run_id})"


def _files(policy: Path) -> dict[str, Path]:
    """The files to push by their names in the repository."""
    files = {path.relative_to(policy).as_posix(): path for path in sorted(policy.rglob("*")) if path.is_file()}
    pushed = {name: path for name, path in files.items() if not _kept_back(path.relative_to(policy))}
    pickled = [name for name in pushed if name.endswith(PICKLED)]
    if pickled:
        raise InputError(f"the policy holds {', '.join(pickled)}: only safetensors are pushed")
    return pushed


def _kept_back(path: Path) -> bool:
    return path.name in KEPT_BACK or path.parts[0] == ADAPTER or path.as_posix() == "README.md"


def _branch(repo_id: str, private: bool, name: str) -> Branch:
    """The branch to push to, made where it is missing."""
    from huggingface_hub import HfApi

    api = HfApi(token=write_token(repo_id))
    # The hub completes a name without owner by the token's.
    repo_id = tried(lambda: api.create_repo(repo_id, private=private, exist_ok=True), repo_id).repo_id
    if name != "main":
        tried(lambda: api.create_branch(repo_id, branch=name, exist_ok=True), repo_id)
    return Branch(api, repo_id, name)


def _commit_once(
    branch: Branch, files: dict[str, Path], card: str, message: str, run_id: str, champion: str | None
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
            _operations(files, card, branch.api.list_repo_files(branch.repo_id, revision=parent)),
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


def _operations(files: dict[str, Path], card: str, present: Iterable[str]) -> list[Any]:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    added: list[Any] = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
    added.append(CommitOperationAdd("README.md", card.encode()))
    stale = sorted(name for name in set(present) - set(files) if name.endswith(LOADED))
    return added + [CommitOperationDelete(name) for name in stale]
