"""The work of snapshot_reference: freeze a model as safetensors, with its tokenizer and a digest of every file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from rlhf_ppo.artifacts import complete_directory, digest_of, digests, write_json
from rlhf_ppo.errors import InputError

HUB_FILES = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*", "vocab*",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.model", "*.tiktoken",
)  # fmt: skip
"""What is taken from a repository: never pickled weights, never code."""
VOCABULARIES = ("tokenizer.json", "*.model", "vocab*", "*.tiktoken")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def snapshot_reference(model_name: str, model_revision: str, reference: Path, tokenizer: Path) -> dict[str, Any]:
    """Write the directories ``reference`` (model and tokenizer) and ``tokenizer``; returns what digest.json holds.

    ``model_name`` is a local directory, a GGUF file or a directory that holds one, or else a hub id at
    ``model_revision``. Raises InputError where there is no such model, or only pickled weights or code of its own.
    """
    with complete_directory(reference) as unfinished, complete_directory(tokenizer) as small:
        gguf = _gguf_file(model_name)
        revision = None
        if gguf is not None:
            _convert_gguf(gguf, unfinished)
        elif Path(model_name).is_dir():
            _copy(model_name, Path(model_name), unfinished)
        else:
            revision = _download(model_name, model_revision, unfinished)
        _check(model_name, unfinished)
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


def _gguf_file(model_name: str) -> Path | None:
    path = Path(model_name)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise InputError(f"model_name={model_name!r} is a file but no GGUF file: give a GGUF file or a directory")
        return path
    files = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if len(files) > 1:
        raise InputError(f"model_name={model_name!r} holds {len(files)} GGUF files: name the one to use")
    return files[0] if files else None


def _convert_gguf(source: Path, directory: Path) -> None:
    """Dequantise a GGUF file to plain fp32 weights."""
    try:
        import gguf  # noqa: F401  (transformers asks for it deep inside)
    except ImportError as error:
        raise InputError(
            f'model_name={str(source)!r} is a GGUF file: pip install "rlhf-ppo[train]" to read it'
        ) from error
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    # transformers wants the folder and the file's name apart; the file may be a link.
    folder, name = str(source.parent), source.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name)
    config = loaded.config
    # transformers 5 takes the dequantised model for a quantised one and won't save it.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    ends = _special_tokens(source)
    for key, value in ends.items():
        setattr(config, key, value)
        # transformers 4 takes the beginning for the end here.
        setattr(tokenizer, key.removesuffix("_id"), tokenizer.convert_ids_to_tokens(value))
    plain = type(loaded)(config)
    weights = {name: value.float() for name, value in loaded.state_dict().items()}
    missing, unexpected = plain.float().load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise InputError(f"model_name={str(source)!r}: weights don't fit: missing {missing}, unexpected {unexpected}")
    plain.tie_weights()
    plain.generation_config = GenerationConfig(**ends)
    plain.save_pretrained(directory, safe_serialization=True)
    tokenizer.save_pretrained(directory)


def _special_tokens(source: Path) -> dict[str, int]:
    """The ids of the special tokens as the file itself says; what pads is the end where nothing else is named."""
    from gguf import GGUFReader

    reader = GGUFReader(source)
    found = {}
    for name, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        field = reader.get_field(f"tokenizer.ggml.{key}_token_id")
        if field is not None:
            found[name] = int(field.contents())
    if "eos_token_id" in found:
        found.setdefault("pad_token_id", found["eos_token_id"])
    return found


def _copy(model_name: str, source: Path, directory: Path) -> None:
    for pattern in HUB_FILES:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, directory / file.name)
    _refuse_pickles(model_name, source, directory)


def _refuse_pickles(model_name: str, source: Path, directory: Path) -> None:
    if any(directory.glob("*.safetensors")):
        return
    pickled = sorted(file.name for pattern in PICKLED for file in source.glob(pattern))
    what = f"only pickled weights ({', '.join(pickled[:3])}), which are never loaded" if pickled else "no weights"
    raise InputError(f"model_name={model_name!r} has {what}: give a model with *.safetensors weights, or a GGUF file")


def _download(model_name: str, revision: str, directory: Path) -> str:
    """Fetch a hub model; returns the commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        cached = Path(snapshot_download(model_name, revision=revision or None, allow_patterns=list(HUB_FILES)))
    except RevisionNotFoundError as error:
        raise InputError(
            f"model_revision={revision!r} does not exist in {model_name}: give a commit, tag or branch"
        ) from error
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise InputError(
            f"model_name={model_name!r} is neither a path that exists nor a hub model that can be read: check the "
            "spelling, or set HF_TOKEN to a token that may read it"
        ) from error
    except Exception as error:
        raise InputError(
            f"model_name={model_name!r} is no path that exists, and the hub can't be reached "
            f"({type(error).__name__}): give a directory or a GGUF file, or check the network"
        ) from error
    _copy(model_name, cached, directory)
    # The cache keeps a repository's commit as the name of the folder.
    return cached.name


def _check(model_name: str, directory: Path) -> None:
    config_file = directory / "config.json"
    if not config_file.exists():
        raise InputError(
            f"model_name={model_name!r} has no config.json: give a model in Hugging Face's format, or GGUF"
        )
    config = json.loads(config_file.read_text(encoding="utf-8"))
    if "auto_map" in config:
        raise InputError(
            f"model_name={model_name!r} needs code of its own (auto_map in config.json), which is never run: "
            "give a model of an architecture that transformers knows"
        )
    if config.get("is_encoder_decoder"):
        raise InputError(f"model_name={model_name!r} is an encoder-decoder model: give a causal language model")


def _write_tokenizer(model_name: str, reference: Path, tokenizer: Path) -> None:
    """Give the tokenizer a pad token where it has none, and write it both beside the model and by itself."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    if not any(file for pattern in VOCABULARIES for file in reference.glob(pattern)):
        raise InputError(f"model_name={model_name!r} has no tokenizer: put tokenizer.json beside the weights")
    try:
        loaded = AutoTokenizer.from_pretrained(reference)
    except (OSError, ValueError) as error:
        raise InputError(f"model_name={model_name!r} has no tokenizer that can be loaded ({error})") from error
    if loaded.pad_token is None:
        loaded.pad_token = loaded.eos_token
        loaded.save_pretrained(reference)
    loaded.save_pretrained(tokenizer)
    config = AutoConfig.from_pretrained(reference)
    if not (reference / "generation_config.json").exists():
        GenerationConfig.from_model_config(config).save_pretrained(reference)
    generation = GenerationConfig.from_pretrained(reference)
    ends = generation.eos_token_id if generation.eos_token_id is not None else loaded.eos_token_id
    write_json(
        tokenizer / "model.json",
        {
            "max_length": getattr(config, "max_position_embeddings", None),
            "eos_token_ids": [ends] if isinstance(ends, int) else list(ends or []),
            "has_chat_template": bool(loaded.chat_template),
        },
    )
