"""Which code a step runs, and in which image: what a published model's card says of its making."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

REVISION_VARIABLE = "RLHF_PPO_REVISION"
"""Set in the images: the commit that they were built from."""
PATIENCE = 10.0
"""Seconds for which a cluster that doesn't answer is asked."""


def provenance() -> dict[str, str]:
    """The commit of the code, and on a cluster the image with its digest; what can't be known is left out."""
    found = {"code": code_commit(), "image": image()}
    return {name: value for name, value in found.items() if value}


def code_commit() -> str:
    """The commit of this package, with -dirty where files were changed since; empty where nothing tells."""
    built_from = os.environ.get(REVISION_VARIABLE, "")
    if built_from:
        return "" if built_from == "unknown" else built_from
    here = Path(__file__).parent
    try:
        # Only a checkout that has this file: a virtual environment may lie in somebody else's.
        subprocess.run(["git", "ls-files", "--error-unmatch", __file__], cwd=here, check=True, capture_output=True)
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, cwd=here, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def image() -> str:
    """The image of this step's pod as name@digest, which Kubernetes alone knows; empty where it may not be asked."""
    if not os.environ.get("KFP_POD_NAME"):
        return ""
    from rlhf_ppo.cluster import Cluster, ClusterError
    from rlhf_ppo.errors import InputError

    try:
        cluster = Cluster.find()
        cluster.patience = PATIENCE
        pod = cluster.own_pod()
    except (ClusterError, InputError):
        return ""
    running = (pod.status.container_statuses or []) if pod else []
    main = next((container for container in running if container.name == "main"), None)
    return (main.image_id or "").removeprefix("docker-pullable://") if main else ""
