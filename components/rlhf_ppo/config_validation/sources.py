"""What a source names (a path, a URL or a hub id), whether it is there, and what it holds at this moment."""

from __future__ import annotations

import importlib.util
import re
import uuid
from pathlib import Path
from typing import Any, Literal

from rlhf_ppo.artifacts import digest_of, digests, sha256
from rlhf_ppo.errors import InputError
from rlhf_ppo.parameters import RunSettings
from rlhf_ppo.settings import is_callable_name, is_endpoint, split_revision

Kind = Literal["path", "url", "hub"]

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FILES = frozenset(".gguf .safetensors .bin .pt .json .jsonl .csv .tsv .parquet .txt .text .gz .zst .arrow".split())
_VERSIONS = frozenset("etag md5 sha256 checksum digest modified mtime updated generation version blob_id".split())
_TIMEOUT = 20.0
_UNKNOWN = "unknown-"


def kind(source: str) -> Kind:
    """Whether ``source`` is a path, a URL or a hub id; what exists here is a path."""
    if "://" in source:
        return "url"
    path = Path(source)
    looks_like_path = source.startswith(("/", ".", "~")) or source.count("/") > 1 or path.suffix.lower() in _FILES
    return "path" if looks_like_path or path.exists() else "hub"


def problem_of_model(source: str) -> str | None:
    """What is wrong with ``source`` as a model to fine-tune, or None."""
    valid = "give a hub id, a directory with *.safetensors, or a GGUF file (or a directory that holds one)"
    if kind(source) == "url":
        return f"is a URL, which can't be a model: {valid}"
    problem = _problem_of_path(source, valid)
    if problem or kind(source) == "hub":
        return problem
    path = Path(source)
    if path.is_file():
        return None if path.suffix.lower() == ".gguf" else f"is a file, but no GGUF file: {valid}"
    if any(path.glob("*.gguf")):
        return None
    return _problem_of_directory(path, valid)


def problem_of_classifier(source: str) -> str | None:
    """What is wrong with ``source`` as a reward model, or None."""
    valid = "give a hub id, a directory with config.json and *.safetensors, or package.module:function"
    if kind(source) == "url":
        return f"is a URL, which can't be a reward: {valid}"
    problem = _problem_of_path(source, valid)
    if problem or kind(source) == "hub":
        return problem
    if Path(source).is_file():
        return f"is a file, not a model directory: {valid}"
    return _problem_of_directory(Path(source), valid)


def problem_of_dataset(source: str) -> str | None:
    """What is wrong with ``source`` as a dataset, or None; a URL is looked at by the step that reads it."""
    if kind(source) == "url":
        return None
    return _problem_of_path(source, "give a hub id, a file or directory that exists, or a URL")


def _problem_of_path(source: str, valid: str) -> str | None:
    if kind(source) == "path":
        return None if Path(source).exists() else f"does not exist (seen from {Path.cwd()}): {valid}"
    return None if _HUB_ID.fullmatch(source) else f"is neither a path that exists nor a hub id: {valid}"


def _problem_of_directory(path: Path, valid: str) -> str | None:
    if not (path / "config.json").is_file():
        return f"has no config.json: {valid}"
    if not any(path.glob("*.safetensors")):
        return f"has no weights as *.safetensors (pickled weights, *.bin and *.pt, are never loaded): {valid}"
    return None


def is_commit(revision: str) -> bool:
    """Whether ``revision`` is a full commit, which can't come to mean something else."""
    return _COMMIT.fullmatch(revision) is not None


def commit_of(parameter: str, source: str, revision_parameter: str, revision: str, repo_type: str) -> str:
    """The commit that ``revision`` (empty: the latest) of ``source`` is on the hub now.

    Gives ``revision`` back where the hub can't be reached: the step that loads it says so, if it has no copy.
    Raises InputError where the hub knows no such repository or revision.
    """
    if is_commit(revision):
        return revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        found = HfApi().repo_info(source, revision=revision or None, repo_type=repo_type, timeout=_TIMEOUT)
    except RevisionNotFoundError as error:
        raise InputError(
            f"{revision_parameter}={revision!r} is no commit, tag or branch of the {repo_type} {source} on the hub"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{parameter}={source!r} is neither a path that exists nor a {repo_type} that can be read on the hub: "
            "check the spelling, or set HF_TOKEN if it is private"
        ) from error
    except Exception:  # requests' or httpx' errors, by version; none of them says anything about the user's input
        return revision
    return str(found.sha)


def digest(source: str, revision: str) -> str:
    """What ``source`` holds now: equal only if the content is; empty for a commit, which says it all.

    A value used only once stands for content that can't be told, so that nothing is taken from a cache for it.
    """
    found = kind(source)
    if found == "path":
        return digest_of_path(Path(source))
    if found == "url":
        return digest_of_url(source)
    return "" if is_commit(revision) else unknown()


def digest_of_reward(reward: str, settings: RunSettings, code: str = "*") -> str:
    """What the reward of this name holds now; empty where a commit says it, and for a server, which nobody can tell.

    Of a user's function it is the files of the pattern ``code``.
    """
    if is_callable_name(reward):
        return digest_of_code(reward, code)
    if is_endpoint(reward):
        return ""
    model, revision = split_revision(reward)
    return digest(model, settings.reward.reward_revision if reward == settings.ppo.reward_model else revision)


def digest_of_code(function: str, pattern: str = "*") -> str:
    """A digest of the module, or of the whole package, files of this ``pattern``, that a user's function comes from."""
    spec = importlib.util.find_spec(function.partition(":")[0].partition(".")[0])
    if spec is None:
        return unknown()
    if spec.submodule_search_locations is None:
        origin = Path(spec.origin or "")
        return sha256(origin) if origin.is_file() else unknown()
    places = [Path(place) for place in spec.submodule_search_locations]
    files = [(file, place) for place in places for file in sorted(place.rglob(pattern)) if file.is_file()]
    return digest_of([[str(f.relative_to(p)), sha256(f)] for f, p in files if f.parent.name != "__pycache__"])


def unknown() -> str:
    """A value that is never the same twice, in the place of a digest that can't be told."""
    return f"{_UNKNOWN}{uuid.uuid4().hex}"


def is_known(digest: str) -> bool:
    """Whether ``digest`` tells anything: a later one of the same content is equal."""
    return bool(digest) and not digest.startswith(_UNKNOWN)


def digest_of_path(path: Path) -> str:
    """SHA-256 of a file, or over the names and the content of all files in a directory."""
    return sha256(path) if path.is_file() else digest_of(digests(path))


def digest_of_url(url: str) -> str:
    """SHA-256 over what the store says of each file's version (ETag, checksum, time of change)."""
    try:
        from fsspec.core import url_to_fs

        filesystem, path = url_to_fs(url)
        info = filesystem.info(path)
        if info.get("type") == "directory":
            entries = sorted(filesystem.find(path, detail=True).items())
        else:
            entries = [(path, info)]
    except Exception:  # by protocol; the step that reads it says what is wrong
        return unknown()
    versions = [(name, _version(info)) for name, info in entries]
    return digest_of(versions) if versions and all(version for _, version in versions) else unknown()


def _version(info: dict[str, Any]) -> list[tuple[str, str]]:
    kept = [(key, str(value)) for key, value in info.items() if value is not None and _tells_version(key)]
    return sorted([*kept, ("size", str(info.get("size")))]) if kept else []


def _tells_version(key: str) -> bool:
    return any(word in key.lower() for word in _VERSIONS)
