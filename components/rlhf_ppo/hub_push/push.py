"""The work of push_to_hub: publish the policy as one commit, once."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from rlhf_ppo.errors import InputError
from rlhf_ppo.events import emit
from rlhf_ppo.hub_push.card import model_card
from rlhf_ppo.parameters import RunSettings

KNOWN_KWARGS = {"repo_id", "private", "commit_message"}
KEPT_BACK = {"value_head.safetensors", "training.json", "digest.json"}
"""What the trainer leaves beside the model and nobody needs to use it."""
TRANSIENT = {408, 409, 412, 425, 429, 500, 502, 503, 504}
TRIES = 6
Result = TypeVar("Result")


def push_to_hub(config: str, policy: Path, evaluation: Path, run_id: str) -> str:
    """Push the directory ``policy`` to the repository that the settings name; returns the commit, or "" for none.

    One atomic commit with the model's files and a card. A commit of the same run is found again by its message, so that
    neither a lost answer nor a second run of the step commits twice. Raises InputError where the token is missing or
    may not write.
    """
    settings = RunSettings.from_json(config)
    repo_id, kwargs = settings.repo_id, settings.ppo.push_to_hub_if_best_kwargs
    if not repo_id:
        emit("push_skipped", reason="no repository is named: set hub_repo_id to push")
        return ""
    unknown = sorted(set(kwargs) - KNOWN_KWARGS)
    if unknown:
        raise InputError(
            f"push_to_hub_if_best_kwargs has {', '.join(unknown)}: it may hold {', '.join(sorted(KNOWN_KWARGS))}"
        )
    token = os.environ.get("HF_TOKEN")
    if not token:
        raise InputError(
            f"hub_repo_id={repo_id!r} needs a token that may write there: set HF_TOKEN, on a cluster through the "
            "secret hf-token"
        )
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    private = bool(kwargs.get("private", settings.hub.hub_private))
    _tried(lambda: api.create_repo(repo_id, private=private, exist_ok=True), repo_id)
    message = f"{kwargs.get('commit_message') or settings.ppo.exp_name} ({marker(run_id)})"
    results = json.loads((evaluation / "evaluation.json").read_text(encoding="utf-8"))
    revision = _commit_once(api, repo_id, policy, message, marker(run_id), model_card(settings, results, repo_id))
    emit("pushed", repo_id=repo_id, revision=revision, url=f"{api.endpoint}/{repo_id}/tree/{revision}")
    return revision


def marker(run_id: str) -> str:
    """The words in a commit's message that tell which run made it."""
    return f"pipeline run {run_id}"


def _commit_once(api: Any, repo_id: str, policy: Path, message: str, mark: str, card: str) -> str:
    """Commit unless a commit with this mark is there; a stale parent or a lost answer is looked at anew."""

    def attempt() -> str:
        commits = api.list_repo_commits(repo_id)
        for commit in commits:
            if mark in commit.title:
                return str(commit.commit_id)
        operations = _operations(policy, card, set(api.list_repo_files(repo_id)))
        made = api.create_commit(
            repo_id, operations, commit_message=message, parent_commit=commits[0].commit_id if commits else None
        )
        return str(made.oid)

    return _tried(attempt, repo_id)


def _operations(policy: Path, card: str, present: set[str]) -> list[Any]:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    files = {
        path.relative_to(policy).as_posix(): path
        for path in sorted(policy.rglob("*"))
        if path.is_file() and path.name not in KEPT_BACK
    }
    pickled = [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    if pickled:
        raise InputError(f"the policy holds {', '.join(pickled)}: only safetensors are pushed")
    added: list[Any] = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
    added.append(CommitOperationAdd("README.md", card.encode()))
    # A shard that an earlier push left would be loaded together with the new ones.
    stale = [name for name in present - set(files) if name.endswith((".safetensors", ".safetensors.index.json"))]
    return added + [CommitOperationDelete(name) for name in sorted(stale)]


def _tried(call: Callable[[], Result], repo_id: str) -> Result:
    """The result of ``call``, tried again with growing pauses where the hub may yet answer.

    Raises InputError with the remedy where it never will.
    """
    from huggingface_hub.errors import HfHubHTTPError

    for number in range(TRIES):
        try:
            return call()
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            if status in (401, 403, 404):
                raise InputError(_remedy(status, repo_id)) from None
            if status not in TRANSIENT or number == TRIES - 1:
                raise
        except OSError:
            # The connection broke; whether the hub did what it was asked is seen at the next try.
            if number == TRIES - 1:
                raise
        time.sleep(float(os.environ.get("RLHF_PPO_RETRY_PAUSE", "1")) * 2**number)
    raise AssertionError("unreachable")


def _remedy(status: int, repo_id: str) -> str:
    said = {
        401: "the hub does not know the token in HF_TOKEN: make a new one",
        403: "the token in HF_TOKEN may not write there: give it write access to the repository's owner",
        404: "the hub knows no such owner or repository, or the token in HF_TOKEN may not see it",
    }
    return f"hub_repo_id={repo_id!r}: {said[status]} (HTTP {status})"
