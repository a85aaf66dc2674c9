"""The work of snapshot_reference: freeze a model as safetensors, with its tokenizer and a digest of every file."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rlhf_ppo.artifacts import complete_directory, digest_of, digests, loadable_by_transformers_4, write_json
from rlhf_ppo.config_validation.sources import commit_of, kind
from rlhf_ppo.errors import InputError
from rlhf_ppo.reference_snapshot import gguf_file

SMALL_FILES = (
    "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*", "vocab*", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.model", "*.tiktoken",
)  # fmt: skip
TAKEN = ("*.safetensors", *SMALL_FILES)
"""What is taken from a repository: never pickled weights, never code."""
LEFT = ("*/*", "consolidated*", "adapter_*", "*.py")
"""What matches and is left even so: other formats of the same weights, adapters, and code."""
VOCABULARIES = ("tokenizer.json", "*.model", "vocab*", "*.tiktoken")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def snapshot_reference(model_name: str, model_revision: str, reference: Path, tokenizer: Path) -> dict[str, Any]:
    """Write the directories ``reference`` (model and tokenizer) and ``tokenizer``; returns what digest.json holds.

    ``model_name`` is a local directory, a GGUF file or a directory that holds one, or else a hub id at
    ``model_revision``. Raises InputError where there is no such model, or only pickled weights or code of its own.
    """
    with complete_directory(reference) as unfinished, complete_directory(tokenizer) as small:
        revision = _take(model_name, model_revision, unfinished)
        _check_weights(model_name, unfinished)
        _write_tokenizer(model_name, unfinished, small)
        hashes = digests(unfinished)
        found = {
            "source": model_name,
            "revision": revision,
            "sha256": hashes,
            "digest": digest_of(hashes),
        }
        write_json(unfinished / "digest.json", found)
        return found


def _take(model_name: str, model_revision: str, directory: Path) -> str | None:
    """Bring the model's files to ``directory``; returns the commit of a hub model."""
    if kind(model_name) == "hub":
        return _download(model_name, model_revision, directory)
    if model_revision:
        raise InputError(
            f"model_revision={model_revision!r} has no effect on model_name={model_name!r}, which is not on the hub: "
            "leave it empty"
        )
    path = Path(model_name)
    if kind(model_name) == "url" or not path.exists():
        raise InputError(f"model_name={model_name!r} does not exist: give a hub id, a directory, or a GGUF file")
    gguf = _gguf_of(model_name, path)
    if gguf is not None:
        gguf_file.convert(model_name, gguf, directory)
        _check_config(model_name, directory)
    else:
        names = [file.name for file in path.iterdir()]
        _refuse_pickles(model_name, names)
        _check_config(model_name, path)
        _copy(path, directory)
    return None


def _gguf_of(model_name: str, path: Path) -> Path | None:
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise InputError(f"model_name={model_name!r} is a file but no GGUF file: give a GGUF file or a directory")
        return path
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf")
    if not files or any(path.glob("*.safetensors")):
        return None
    if len(files) > 1:
        raise InputError(
            f"model_name={model_name!r} holds {len(files)} GGUF files: name the one to use, e.g. {files[0]}"
        )
    return files[0]


def _is_taken(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in TAKEN) and not any(fnmatch(name, pattern) for pattern in LEFT)


def _copy(source: Path, directory: Path) -> None:
    for file in source.iterdir():
        if file.is_file() and _is_taken(file.name):
            shutil.copyfile(file, directory / file.name)


def _refuse_pickles(model_name: str, names: list[str]) -> None:
    if any(name.endswith(".safetensors") and _is_taken(name) for name in names):
        return
    pickled = sorted(name for name in names for pattern in PICKLED if fnmatch(name, pattern))
    what = f"only pickled weights ({', '.join(pickled[:3])}), which are never loaded" if pickled else "no weights"
    raise InputError(f"model_name={model_name!r} has {what}: give a model with *.safetensors weights, or a GGUF file")


def _download(model_name: str, model_revision: str, directory: Path) -> str:
    """Fetch a hub model, what can speak against it before its weights; returns the commit."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    revision = commit_of("model_name", model_name, "model_revision", model_revision, "model") or None
    try:
        cached = Path(snapshot_download(model_name, revision=revision, allow_patterns=[*SMALL_FILES],
                                        ignore_patterns=[*LEFT]))  # fmt: skip
        # The cache keeps a repository's commit as the name of the folder.
        commit = cached.name
        _check_config(model_name, cached)
        snapshot_download(model_name, revision=commit, allow_patterns=[*TAKEN], ignore_patterns=[*LEFT])
        names = [file.name for file in cached.iterdir()]
        if not any(name.endswith(".safetensors") for name in names):
            names = HfApi().list_repo_files(model_name, revision=commit)
        _refuse_pickles(model_name, names)
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError) as error:
        raise InputError(_why_not_downloaded(model_name, error)) from error
    _copy(cached, directory)
    return commit


def _why_not_downloaded(model_name: str, error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    status = status or getattr(getattr(error.__cause__, "response", None), "status_code", None)
    if status in (401, 403, 404):
        return (
            f"model_name={model_name!r} can't be read from the hub (HTTP {status}): check the spelling, or set "
            "HF_TOKEN to a token that may read it"
        )
    return (
        f"model_name={model_name!r} is no path that exists, and the hub can't be reached "
        f"({type(error.__cause__ or error).__name__}): give a directory or a GGUF file, or check the network and "
        "HF_ENDPOINT"
    )


def _check_config(model_name: str, directory: Path) -> None:
    """Refuse what is no language model of transformers' own, before its weights are touched."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, AutoConfig

    valid = "give a language model, decoder-only or encoder-decoder, of an architecture that transformers knows"
    if not (directory / "config.json").exists():
        raise InputError(
            f"model_name={model_name!r} has no config.json: give a model in Hugging Face's format, or GGUF"
        )
    for name in ("config.json", "tokenizer_config.json"):
        if (directory / name).exists() and "auto_map" in _json(model_name, directory / name):
            raise InputError(
                f"model_name={model_name!r} needs code of its own (auto_map in {name}), which is never run: {valid}"
            )
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"model_name={model_name!r} has a config.json that can't be read ({error}): {valid}"
        ) from error
    heads = config.architectures or []
    known: Any = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if config.is_encoder_decoder else MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in known:
        raise InputError(f"model_name={model_name!r} is a {config.model_type}, no language model: {valid}")
    if any("Classification" in head or "QuestionAnswering" in head for head in heads):
        raise InputError(f"model_name={model_name!r} is a {heads[0]}, no language model: {valid}")


def _json(model_name: str, file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"model_name={model_name!r}: {file.name} is no JSON ({error}): give a whole model") from error
    return found


def _check_weights(model_name: str, directory: Path) -> None:
    """Refuse weights that are missing or cut short; reads the head of each file only."""
    from safetensors import SafetensorError, safe_open

    index = directory / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if not (directory / "model.safetensors").exists() and index.exists():
        names = set(_json(model_name, index)["weight_map"].values())
    for name in sorted(names):
        try:
            with safe_open(directory / name, framework="pt"):
                pass
        except FileNotFoundError as error:
            raise InputError(f"model_name={model_name!r} has no {name}: give a whole model") from error
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"model_name={model_name!r}: {name} is broken or only a pointer to a file elsewhere ({error}): "
                "fetch it again"
            ) from error


def _write_tokenizer(model_name: str, reference: Path, tokenizer: Path) -> None:
    """Give the tokenizer a pad token where it has none, and write it both beside the model and by itself."""
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(reference)
    if not (reference / "generation_config.json").exists():
        GenerationConfig.from_model_config(config).save_pretrained(reference)
    generation = GenerationConfig.from_pretrained(reference)
    loaded = _tokenizer(model_name, reference)
    ends = loaded.eos_token_id if generation.eos_token_id is None else generation.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    if loaded.pad_token is None:
        padding = loaded.eos_token or (loaded.convert_ids_to_tokens(ends[0]) if ends else None)
        if padding is None:
            raise InputError(
                f"model_name={model_name!r} has a tokenizer with neither a pad token nor an end of sequence: name one "
                "in tokenizer_config.json"
            )
        file = reference / "tokenizer_config.json"
        write_json(file, {**(_json(model_name, file) if file.exists() else {}), "pad_token": padding})
        loaded = _tokenizer(model_name, reference)
    loaded.save_pretrained(tokenizer)
    loadable_by_transformers_4(tokenizer)
    facts = {
        "max_length": getattr(config.get_text_config(), "max_position_embeddings", None),
        "eos_token_ids": ends,
        "has_chat_template": bool(loaded.chat_template),
    }
    write_json(tokenizer / "model.json", facts)


def _tokenizer(model_name: str, reference: Path) -> Any:
    from transformers import AutoTokenizer

    if not any(file for pattern in VOCABULARIES for file in reference.glob(pattern)):
        raise InputError(f"model_name={model_name!r} has no tokenizer: put tokenizer.json beside the weights")
    try:
        return AutoTokenizer.from_pretrained(reference, trust_remote_code=False)
    except Exception as error:  # whatever a broken file makes a tokenizer of some kind raise
        raise InputError(f"model_name={model_name!r} has no tokenizer that can be loaded ({error})") from error
