"""The model that is published where the policy is to be pushed: what the policy must be better than."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rlhf_ppo.events import emit
from rlhf_ppo.hub import WEIGHTS, tried
from rlhf_ppo.parameters import RunSettings

LOADED = ("*.json", f"*{WEIGHTS}", "*.txt", "*.model", "*.jinja")
"""Files that a model and its tokenizer are loaded from."""


def fetch_champion(settings: RunSettings, directory: Path) -> str | None:
    """Download the published model to ``directory``; returns its commit.

    None where nothing is to be pushed, and where the branch holds no weights in safetensors or can't be seen: what the
    push then finds there makes it fail. Raises InputError where the token is refused.
    """
    if not settings.repo_id:
        return None
    from huggingface_hub import HfApi

    api, branch = HfApi(token=os.environ.get("HF_TOKEN") or False), _branch(settings)
    found = tried(lambda: _seen(api, settings.repo_id, branch), settings.repo_id)
    if found is None or not any(file.rfilename.endswith(WEIGHTS) for file in found.siblings):
        emit("note", step="evaluate_policy", message=f"no model is published as {settings.repo_id} ({branch}) so far")
        return None
    tried(
        lambda: api.snapshot_download(
            settings.repo_id, revision=found.sha, local_dir=directory, allow_patterns=list(LOADED)
        ),
        settings.repo_id,
    )
    return str(found.sha)


def _branch(settings: RunSettings) -> str:
    return str(settings.ppo.push_to_hub_if_best_kwargs.get("revision", "main"))


def _seen(api: Any, repo_id: str, branch: str) -> Any:
    """What the hub says of the branch; None where there is none that the token may see."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return api.model_info(repo_id, revision=branch)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return None
