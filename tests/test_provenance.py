"""Which code and which image made a policy."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import rlhf_ppo
from kube_cluster import KubeCluster, find_cluster
from rlhf_ppo.provenance import code_commit, image, provenance

DIGEST = "registry.example/rlhf-ppo/gpu@sha256:" + "ab" * 32


def git(directory: Path, *arguments: str) -> str:
    names = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}
    command = ["git", "-C", str(directory), *arguments]
    done = subprocess.run(command, env={**os.environ, **names}, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with the package in it, not committed."""
    place = tmp_path / "checkout" / "rlhf_ppo"
    place.mkdir(parents=True)
    for name in ("__init__.py", "provenance.py"):
        shutil.copy(Path(rlhf_ppo.__file__).parent / name, place)
    git(place.parent, "init", "-q")
    return place.parent


def told(checkout: Path, **environment: str) -> str:
    code = "from rlhf_ppo.provenance import code_commit; print(code_commit())"
    given = {**os.environ, "PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=given, cwd=checkout.parent, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_the_commit_is_that_of_the_checkout_and_says_where_files_were_changed(checkout: Path) -> None:
    assert told(checkout) == "", "a virtual environment in somebody's checkout is none of theirs"
    git(checkout, "add", ".")
    git(checkout, "commit", "-qm", "first")
    git(checkout, "tag", "v1")
    head = git(checkout, "rev-parse", "HEAD")
    assert told(checkout) == head
    (checkout / "rlhf_ppo" / "__init__.py").write_text("changed = True\n")
    assert told(checkout) == f"{head}-dirty"


def test_in_an_image_it_is_the_commit_that_the_image_was_built_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_PPO_REVISION", "c0ffee")
    assert code_commit() == "c0ffee"
    monkeypatch.setenv("RLHF_PPO_REVISION", "unknown")
    monkeypatch.delenv("KFP_POD_NAME", raising=False)
    assert provenance() == {}


def test_where_git_is_not_installed_the_commit_is_not_known(checkout: Path) -> None:
    git(checkout, "add", ".")
    git(checkout, "commit", "-qm", "first")
    assert told(checkout, PATH="/nowhere") == ""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[KubeCluster]:
    found = find_cluster(tmp_path)
    yield found
    found.close()


def test_the_image_is_the_one_that_kubernetes_runs_by_its_digest(
    cluster: KubeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    pod = cluster.make_step_pod()
    for name, value in {**pod, "KUBECONFIG": str(cluster.kubeconfig)}.items():
        monkeypatch.setenv(name, value)
    assert image() == "", "nothing runs yet"
    state = {"ready": True, "restartCount": 0, "image": "gpu:latest", "imageID": f"docker-pullable://{DIGEST}"}
    others = {**state, "name": "wait", "imageID": "argoexec@sha256:00"}
    status = {"status": {"containerStatuses": [others, {**state, "name": "main"}]}}
    cluster.core.patch_namespaced_pod_status(pod["KFP_POD_NAME"], cluster.namespace, status)
    assert image() == DIGEST
    cluster.allow([])
    assert image() == "", "a step without the right to read its pod goes on"


def test_a_cluster_that_does_not_answer_holds_nothing_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("rlhf_ppo.provenance.PATIENCE", 0.5)
    (tmp_path / "config").write_text(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{name: c, context: {cluster: c, user: u}}]\n"
        "clusters: [{name: c, cluster: {server: 'http://127.0.0.1:9'}}]\nusers: [{name: u, user: {}}]\n"
    )
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("KFP_POD_NAME", "step")
    assert image() == ""
