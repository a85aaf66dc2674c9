"""Releases on the hub: how those of a run are known, what they replace, and publishing an earlier one again."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from rlhf_ppo.errors import InputError
from rlhf_ppo.hub import WEIGHTS, tried, weights_of, write_token
from rlhf_ppo.registry import crown, version_at

ADAPTER_CONFIG = "adapter_config.json"
CONFIGS = {"config.json", "generation_config.json", ADAPTER_CONFIG}
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
LOADED = (WEIGHTS, f"{WEIGHTS}.index.json", *PICKLED, ".bin.index.json")
"""Files of an earlier push that a model would be loaded from, together with the new ones or instead of them."""
MARK = re.compile(r"\(pipeline run ([^()]+)\)$")
REPOSITORY = "REPOSITORY"
"""What the command line calls it."""


def mark(run_id: str) -> str:
    """The end of a commit's title that tells which run made it."""
    return f"(pipeline run {run_id})"


def run_of(title: str) -> str | None:
    """The run that made the commit with this title, or None where none of ours did."""
    found = MARK.search(title)
    return found[1] if found else None


def tag_of(run_id: str) -> str:
    """The tag of what a run published; git takes no blanks and few signs."""
    return "run-" + re.sub(r"[^\w-]+", "-", run_id)


def stale(files: Iterable[str], present: Iterable[str]) -> list[str]:
    """Of the files that are ``present`` those to delete so that ``files`` alone decide what is loaded."""
    return sorted(name for name in set(present) - set(files) if name.endswith(LOADED) or name in CONFIGS)


@dataclass(frozen=True)
class RolledBack:
    """What is published now: the files of ``release``, by the commit ``revision``."""

    repo_id: str
    branch: str
    release: str
    tag: str
    revision: str


def roll_back(repo_id: str, to: str = "", branch: str = "main") -> RolledBack:
    """Publish the release ``to`` (a tag or commit; empty: the one before the current) again, as one new commit.

    The weights are not moved: the hub has them. Done twice with the same ``to`` it comes to one commit. Raises
    InputError where there is no such release or the token may not write.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=write_token(repo_id, REPOSITORY))
    found = partial(_commit_named, api, repo_id, to) if to else partial(_release_before, api, repo_id, branch)
    release = tried(found, repo_id, REPOSITORY)

    title = tried(lambda: api.list_repo_commits(repo_id, revision=release)[0].title, repo_id, REPOSITORY)
    run_id = run_of(title)
    tag = tag_of(run_id) if run_id else ""

    def attempt() -> str:
        commits = api.list_repo_commits(repo_id, revision=branch)
        head = str(commits[0].commit_id)
        operations = _operations(_files_at(api, repo_id, release), _files_at(api, repo_id, head), release)
        if not operations:
            return head
        made = api.create_commit(
            repo_id,
            operations,
            commit_message=f"Roll back to {tag or release}",
            revision=branch,
            parent_commit=head,
        )
        return str(made.oid)

    return RolledBack(repo_id, branch, release, tag, tried(attempt, repo_id, REPOSITORY))


def move_champion(release: str, tracking_uri: str) -> str:
    """Make the version of MLflow's registry that was pushed as the commit ``release`` the champion again.

    Returns its name and number, or an empty text where the registry has none. Raises what the server's client raises.
    """
    from rlhf_ppo.delivery import client_of

    client = client_of(tracking_uri)
    found = version_at(client, release)
    if found is None:
        return ""
    crown(client, *found, since=int(time.time() * 1000))
    return f"{found[0]} version {found[1]}"


def tracking_uri_of(given: str) -> str:
    """The MLflow server to tell; empty where none is named."""
    return given or os.environ.get("MLFLOW_TRACKING_URI", "")


def _commit_named(api: Any, repo_id: str, name: str) -> str:
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return str(api.model_info(repo_id, revision=name).sha)
    except RevisionNotFoundError:
        tags = ", ".join(sorted(tag.name for tag in api.list_repo_refs(repo_id).tags)) or "none"
        raise InputError(f"--to={name!r} is no tag, branch or commit of {repo_id}; its tags: {tags}") from None


def _release_before(api: Any, repo_id: str, branch: str) -> str:
    """The latest commit of a run before the one whose weights are published, and with other weights."""
    commits = api.list_repo_commits(repo_id, revision=branch)
    published = weights_of(api, repo_id, commits[0].commit_id)
    releases = [str(commit.commit_id) for commit in commits if run_of(commit.title) is not None]
    same = [weights_of(api, repo_id, release) == published for release in releases]
    # What is published may also come from elsewhere; then every release is one before it.
    for number in range(same.index(True) if True in same else 0, len(releases)):
        if not same[number]:
            return releases[number]
    raise InputError(f"{repo_id} ({branch}) has no release before the current one: name a tag or a commit by --to")


def _files_at(api: Any, repo_id: str, revision: str) -> dict[str, str]:
    """The files at a revision by name, with what tells their content."""
    entries = api.list_repo_tree(repo_id, revision=revision, recursive=True)
    return {entry.path: entry.blob_id for entry in entries if hasattr(entry, "blob_id")}


def _operations(wanted: dict[str, str], present: dict[str, str], release: str) -> list[Any]:
    from huggingface_hub import CommitOperationCopy, CommitOperationDelete

    copied = [name for name, blob in sorted(wanted.items()) if present.get(name) != blob]
    return [
        *(CommitOperationCopy(name, name, src_revision=release) for name in copied),
        *(CommitOperationDelete(name) for name in stale(wanted, present)),
    ]
