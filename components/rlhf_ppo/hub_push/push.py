"""The work of push_to_hub: publish the policy as one commit, once."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rlhf_ppo.errors import InputError
from rlhf_ppo.events import emit
from rlhf_ppo.hub_push.card import model_card
from rlhf_ppo.hub_push.kwargs import kwargs_problems
from rlhf_ppo.parameters import RunSettings

KEPT_BACK = {"value_head.safetensors", "training.json", "digest.json"}
"""What the trainer leaves beside the model and nobody needs to use it."""
ADAPTER = "adapter"
"""The folder of a LoRA run's adapters, which are merged into what is pushed."""
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
LOADED = (".safetensors", ".safetensors.index.json", "adapter_config.json", *PICKLED, ".bin.index.json")
"""Files of an earlier push that a model would be loaded from, together with the new ones or instead of them."""
TRANSIENT = {408, 409, 412, 425, 429, 500, 502, 503, 504}
TRIES = 6
LONGEST_PAUSE = 60.0
Result = TypeVar("Result")


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
    revision = _commit_once(branch, files, card, message, run_id)
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


def _token(repo_id: str) -> str:
    token = os.environ.get("HF_TOKEN", "").strip()
    if not token:
        raise InputError(
            f"hub_repo_id={repo_id!r} needs a token that may write there: set HF_TOKEN, on a cluster through the key "
            "HF_TOKEN of the secret hf-token"
        )
    # The client would repeat the token in its complaint.
    if not token.isascii() or not token.isprintable() or " " in token:
        raise InputError("HF_TOKEN holds characters that no token has, a line break perhaps: store the token alone")
    return token


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

    api = HfApi(token=_token(repo_id))
    # The hub completes a name without owner by the token's.
    repo_id = _tried(lambda: api.create_repo(repo_id, private=private, exist_ok=True), repo_id).repo_id
    if name != "main":
        _tried(lambda: api.create_branch(repo_id, branch=name, exist_ok=True), repo_id)
    return Branch(api, repo_id, name)


def _commit_once(branch: Branch, files: dict[str, Path], card: str, message: str, run_id: str) -> str:
    """Commit unless a commit of this run is there; a stale parent or a lost answer is looked at anew."""
    title, _, description = message.strip().partition("\n")

    def attempt() -> str:
        commits = branch.api.list_repo_commits(branch.repo_id, revision=branch.name)
        for commit in commits:
            if commit.title.endswith(mark(run_id)):
                return str(commit.commit_id)
        parent = commits[0].commit_id if commits else None
        made = branch.api.create_commit(
            branch.repo_id,
            _operations(files, card, branch.api.list_repo_files(branch.repo_id, revision=parent)),
            commit_message=f"{title} {mark(run_id)}",
            commit_description=description.strip(),
            revision=branch.name,
            parent_commit=parent,
        )
        return str(made.oid)

    return _tried(attempt, branch.repo_id)


def _operations(files: dict[str, Path], card: str, present: Iterable[str]) -> list[Any]:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    added: list[Any] = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
    added.append(CommitOperationAdd("README.md", card.encode()))
    stale = sorted(name for name in set(present) - set(files) if name.endswith(LOADED))
    return added + [CommitOperationDelete(name) for name in stale]


def _tried(call: Callable[[], Result], repo_id: str) -> Result:
    """The result of ``call``, tried again with growing pauses where the hub may yet answer.

    Raises InputError with the remedy where it never will.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    for number in range(TRIES):
        last = number == TRIES - 1
        wish = None
        try:
            return call()
        except HFValidationError as error:
            raise InputError(f"hub_repo_id={repo_id!r} can't be a repository: {error}") from None
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            if status in (401, 403, 404):
                raise InputError(_remedy(status, repo_id)) from None
            if status not in TRANSIENT or last:
                raise
            wish = error.response.headers.get("Retry-After")
        except _broken_connection():
            # Whether the hub did what it was asked is seen at the next try.
            if last:
                raise
        time.sleep(_pause(number, wish))
    raise AssertionError("unreachable")


def _broken_connection() -> tuple[type[Exception], ...]:
    """What a broken connection raises: huggingface_hub speaks through requests, since 1.0 httpx, since 2.0 httpx2."""
    found: list[type[Exception]] = [ConnectionError, TimeoutError]
    found += [sys.modules[name].TransportError for name in ("httpx", "httpx2") if name in sys.modules]
    found += [sys.modules["requests"].RequestException] if "requests" in sys.modules else []
    return tuple(found)


def _pause(number: int, wish: str | None) -> float:
    """Seconds before the next try: 1, 2, 4 …, and no less than the hub asks for, within a minute."""
    pause = float(os.environ.get("RLHF_PPO_RETRY_PAUSE", "1")) * 2**number
    return min(max(pause, float(wish)) if wish and wish.isdigit() else pause, LONGEST_PAUSE)


def _remedy(status: int, repo_id: str) -> str:
    said = {
        401: "the hub does not know the token in HF_TOKEN: make a new one",
        403: "the token in HF_TOKEN may not write there: give it write access to the repository's owner",
        404: "the hub knows no such owner or repository, or the token in HF_TOKEN may not see it",
    }
    return f"hub_repo_id={repo_id!r}: {said[status]} (HTTP {status})"
