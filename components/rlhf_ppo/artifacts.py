"""Outputs of steps: complete or absent, and known by what they hold."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def complete_directory(path: Path) -> Iterator[Path]:
    """A directory to write into that becomes ``path`` if no error ends the block; else nothing is left.

    An earlier output at ``path`` (a retried step's) is replaced.
    """
    unfinished = path.with_name(path.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
    os.replace(unfinished, path)


def write_whole(path: Path, text: str) -> None:
    """Write a text file under another name and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON as a whole or not at all."""
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    found = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def digests(directory: Path, leave_out: Iterable[str] = ()) -> dict[str, str]:
    """SHA-256 of every file in ``directory`` by its relative name."""
    files = sorted(file for file in directory.rglob("*") if file.is_file() and file.name not in set(leave_out))
    return {file.relative_to(directory).as_posix(): sha256(file) for file in files}


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def loadable_by_transformers_4(directory: Path) -> None:
    """Say in the config and the tokenizer of a model also what transformers 4 looks for, in the places where it looks.

    A directory that transformers 5 wrote fails to load there, or loads with a wrong rotary base and without a word.
    """
    config_file, tokenizer_file = directory / "config.json", directory / "tokenizer_config.json"
    if config_file.is_file():
        config = json.loads(config_file.read_text(encoding="utf-8"))
        rope = config.get("rope_parameters") or {}
        for name in ("rope_theta", "partial_rotary_factor"):
            if name in rope:
                config.setdefault(name, rope[name])
        if rope.get("rope_type", "default") != "default":
            config.setdefault("rope_scaling", rope)
        if "dtype" in config:
            config.setdefault("torch_dtype", config["dtype"])
        write_json(config_file, config)
    if tokenizer_file.is_file():
        tokenizer = json.loads(tokenizer_file.read_text(encoding="utf-8"))
        if tokenizer.get("tokenizer_class") == "TokenizersBackend":
            tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
            tokenizer.setdefault("model_input_names", ["input_ids", "attention_mask"])
        if isinstance(tokenizer.get("extra_special_tokens"), list):
            tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
        write_json(tokenizer_file, tokenizer)
