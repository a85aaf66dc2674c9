"""The model that is published where the policy is to be pushed: what the policy must be better than."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rlhf_ppo.errors import InputError
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
    _download(api, settings.repo_id, found.sha, directory)
    return str(found.sha)


def load_champion(directory: Path, settings: RunSettings, reference: Path) -> Any:
    """The published model in ``directory``; an adapter with its base, which may be the run's own ``reference``.

    Raises InputError where the adapter names no base that can be had, and where weights are missing.
    """
    from rlhf_ppo.ppo.models import load_model

    dtype, config = settings.model.model_dtype, directory / "adapter_config.json"
    named = f"hub_repo_id={settings.repo_id!r}"
    if not config.is_file():
        return load_model(directory, dtype, named)
    from peft import PeftModel

    told = json.loads(config.read_text(encoding="utf-8"))
    base, revision = told.get("base_model_name_or_path"), told.get("revision")
    if not base:
        raise InputError(f"{named} holds an adapter that names no base model")
    if (base, revision) != (settings.ppo.model_name, settings.model.model_revision):
        from huggingface_hub import HfApi

        reference = directory / "base"
        api = HfApi(token=os.environ.get("HF_TOKEN") or False)
        _download(api, base, revision, reference, f"the base of the adapter in {settings.repo_id}")
    model = PeftModel.from_pretrained(load_model(reference, dtype, named), str(directory), use_safetensors=True)
    return model.merge_and_unload()


def _download(api: Any, repo_id: str, revision: str | None, directory: Path, parameter: str = "hub_repo_id") -> None:
    tried(
        lambda: api.snapshot_download(repo_id, revision=revision, local_dir=directory, allow_patterns=list(LOADED)),
        repo_id,
        parameter,
    )


def _branch(settings: RunSettings) -> str:
    return str(settings.ppo.push_to_hub_if_best_kwargs.get("revision", "main"))


def _seen(api: Any, repo_id: str, branch: str) -> Any:
    """What the hub says of the branch; None where there is none that the token may see."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return api.model_info(repo_id, revision=branch)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return None
