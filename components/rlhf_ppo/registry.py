"""MLflow's model registry: versions by reference to where the weights lie, and which of them is published."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

CHALLENGER, CHAMPION, PREVIOUS = "challenger", "champion", "previous"
"""Aliases: what passed the gate and is not published, what is published, and what was before it."""
RUN_TAG, REVISION_TAG, SINCE_TAG = "rlhf_ppo.run_id", "rlhf_ppo.hub_revision", "rlhf_ppo.champion_since"
"""Tags of a version: the pipeline run that made it, its commit on the hub, and when it became champion (ms, UTC)."""


def source_of(uri: str, store: str) -> str:
    """Where a version's weights lie, ``uri``, in words that the MLflow at ``store`` takes and understands.

    KFP calls its object store minio, which is S3. A server refuses the paths of other machines, which it can't read.
    """
    if uri.startswith("minio://"):
        return f"s3://{uri.removeprefix('minio://')}"
    if uri.startswith("/") and store.startswith("http"):
        return f"local://{socket.gethostname()}{uri}"
    return uri


def registered(
    client: Any, name: str, run_id: str, source: str, mlflow_run: str | None, tags: Mapping[str, str]
) -> str:
    """The number of the version that the pipeline run ``run_id`` made of the model ``name``, made where there is none.

    It refers to ``source``; nothing is copied.
    """
    from mlflow.exceptions import MlflowException

    version = _found(client, f"name = '{name}' and tags.`{RUN_TAG}` = '{run_id}'")
    if version is None:
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        version = client.create_model_version(name, source, run_id=mlflow_run, tags={RUN_TAG: run_id})
    for tag, value in tags.items():
        client.set_model_version_tag(name, version.version, tag, value)
    return str(version.version)


def challenge(client: Any, name: str, version: str) -> None:
    """Make ``version`` the challenger, unless it was champion already or a later one is challenger."""
    there = client.get_registered_model(name).aliases.get(CHALLENGER)
    known = client.get_model_version(name, version)
    if SINCE_TAG not in known.tags and int(there or 0) < int(version):
        client.set_registered_model_alias(name, CHALLENGER, version)


def crown(client: Any, name: str, version: str, since: int) -> None:
    """Make ``version`` the champion and the one before it previous, unless another became champion after ``since``.

    ``since`` is in milliseconds, UTC. Done twice, or broken off and done again, it comes to the same.
    """
    aliases = {alias: str(number) for alias, number in client.get_registered_model(name).aliases.items()}
    before = aliases.get(CHAMPION)
    if before not in (None, version):
        if int(client.get_model_version(name, before).tags.get(SINCE_TAG, 0)) > since:
            return
        client.set_registered_model_alias(name, PREVIOUS, before)
    if before != version:
        client.set_registered_model_alias(name, CHAMPION, version)
    client.set_model_version_tag(name, version, SINCE_TAG, str(since))
    if aliases.get(CHALLENGER) == version:
        client.delete_registered_model_alias(name, CHALLENGER)


def version_at(client: Any, revision: str) -> tuple[str, str] | None:
    """Name and number of the version that was pushed as the commit ``revision``."""
    version = _found(client, f"tags.`{REVISION_TAG}` = '{revision}'")
    return None if version is None else (str(version.name), str(version.version))


def _found(client: Any, condition: str) -> Any:
    found = client.search_model_versions(condition, max_results=1)
    return found[0] if found else None
