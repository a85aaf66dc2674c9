"""From a GGUF file, quantised or not, to a plain fp32 model that every version of transformers loads alike."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_ppo.artifacts import loadable_by_transformers_4
from rlhf_ppo.errors import InputError


def convert(model_name: str, source: Path, directory: Path) -> None:
    """Write the model and the tokenizer in the file ``source`` to ``directory``.

    Tokenizer files that lie beside the GGUF file are taken instead of the tokenizer that is built from it.
    Raises InputError where the file is broken or of an architecture that transformers can't read.
    """
    try:
        import gguf  # noqa: F401  (transformers asks for it deep inside)
    except ImportError as error:
        raise InputError(
            f'model_name={model_name!r} is a GGUF file: pip install "rlhf-ppo[train]" to read it'
        ) from error
    try:
        with _read_once():
            tokenizer, ends = _tokenizer(source)
            _save_model(source, ends, directory)
    except (ValueError, KeyError, IndexError, NotImplementedError) as error:
        raise InputError(
            f"model_name={model_name!r} can't be read as GGUF ({error}): give a whole file of an architecture that "
            "transformers reads as GGUF, or the model's *.safetensors"
        ) from error
    tokenizer.save_pretrained(directory)
    loadable_by_transformers_4(directory)


@contextmanager
def _read_once() -> Iterator[None]:
    """Let transformers share one parsed file between config, tokenizer and weights, and one map of tensor names.

    It parses the file for each of them and builds the map for each layer: three times the work on a small model.
    Parsing looks at the mapped file piece by piece, and a piece of numpy's memmap takes several times as long as one of
    a plain array of the same memory.
    """
    import gguf
    import numpy

    reader, name_map = gguf.GGUFReader, gguf.get_tensor_name_map

    class Plain(reader):  # type: ignore[misc,valid-type]
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, numpy.asarray(value) if name == "data" else value)

    gguf.GGUFReader = functools.cache(Plain)  # type: ignore[assignment,misc]
    gguf.get_tensor_name_map = functools.cache(name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, name_map  # type: ignore[misc]


def _tokenizer(source: Path) -> tuple[Any, dict[str, int]]:
    """The tokenizer, and the ids of its special tokens by their names in a config."""
    from transformers import AutoTokenizer

    folder = source.parent
    if (folder / "tokenizer.json").is_file() and (folder / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    else:
        tokenizer = _built_tokenizer(source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return tokenizer, {name: value for name, value in ids.items() if value is not None}


def _built_tokenizer(source: Path) -> Any:
    """The tokenizer that the file describes; transformers 4 takes BOS for EOS and adds it whatever the file says."""
    import gguf
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # transformers wants the folder and the file's name apart; the file may be a link.
    built: Any = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    reader = gguf.GGUFReader(str(source))
    settings = {
        key.removeprefix("tokenizer.ggml."): field.contents()
        for key, field in reader.fields.items()
        if key.endswith(("_token_id", "add_bos_token"))
    }
    if "add_bos_token" in settings and hasattr(built, "add_bos_token"):
        built.add_bos_token = bool(settings["add_bos_token"])
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    special = {
        name: built.convert_ids_to_tokens(int(settings[f"{key}_token_id"]))
        for name, key in names.items()
        if f"{key}_token_id" in settings
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=built.backend_tokenizer,
        chat_template=built.chat_template,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **special,
    )


def _save_model(source: Path, ends: dict[str, int], directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    loaded = AutoModelForCausalLM.from_pretrained(str(source.parent), gguf_file=source.name)
    config = loaded.config
    # transformers 5 takes the dequantised model for a quantised one and won't save it: a plain one gets its weights.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for name, value in ends.items():
        setattr(config, name, value)
    weights = {name: value.float() for name, value in loaded.state_dict().items()}
    with torch.device("meta"):
        plain = type(loaded)(config)
    missing, unexpected = plain.load_state_dict(weights, strict=False, assign=True)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"its weights don't fit: missing {missing}, unexpected {unexpected}")
    plain.tie_weights()
    plain.generation_config = GenerationConfig(**ends)
    plain.save_pretrained(directory, safe_serialization=True)
