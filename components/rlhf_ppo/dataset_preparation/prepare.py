"""The work of prepare_dataset: from any data set to tokenised, filtered, deduplicated prompts in two splits."""

from __future__ import annotations

import hashlib
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rlhf_ppo.artifacts import complete_directory, digest_of, sha256, write_json
from rlhf_ppo.dataset_preparation.sources import read
from rlhf_ppo.errors import InputError
from rlhf_ppo.settings import DataSettings

SPLITS = ("train", "validation")


def prepare_dataset(
    *,
    query_dataset: str,
    data: DataSettings,
    remove_unused_columns: bool,
    max_new_tokens: int,
    tokenizer: Path,
    prompts: Path,
) -> dict[str, Any]:
    """Write the directory ``prompts``; returns its manifest.

    Prompts keep their order. Empty ones, repeated ones and those too long for data_max_prompt_tokens or, with a
    response, for the model are left out and counted; none is cut. Raises InputError where nothing is left to work with.
    """
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    facts = json.loads((tokenizer / "model.json").read_text(encoding="utf-8"))
    longest = _longest(data, facts["max_length"], max_new_tokens)
    if data.data_chat_template and not loaded.chat_template:
        raise InputError("data_chat_template=True but the model's tokenizer has no chat template: set it to False")
    with complete_directory(prompts) as unfinished, tempfile.TemporaryDirectory() as cache:
        rows, columns, revision = read(query_dataset, data, cache)
        counts = {"read": len(rows)}
        kept = _texts(rows, columns, data, loaded, counts)
        kept = _within(kept, loaded, data, longest, counts)
        splits = _split(kept, data, counts)
        _check_counts(query_dataset, data, counts, longest)
        for name in SPLITS:
            _write_split(unfinished / f"{name}.parquet", splits[name], remove_unused_columns)
        manifest = _manifest(query_dataset, data, revision, counts, splits, unfinished, tokenizer)
        write_json(unfinished / "manifest.json", manifest)
        (unfinished / "README.md").write_text(_readme(manifest), encoding="utf-8")
    return manifest


Row = dict[str, Any]


def _longest(data: DataSettings, max_length: int | None, max_new_tokens: int) -> int:
    """The longest prompt, in tokens, that may be used."""
    if max_length is None:
        return data.data_max_prompt_tokens
    if max_new_tokens >= max_length:
        raise InputError(
            f"rollout_max_new_tokens={max_new_tokens} leaves no room for a prompt: the model reads {max_length} tokens"
        )
    return min(data.data_max_prompt_tokens, max_length - max_new_tokens)


def _texts(
    rows: list[Row], columns: list[str], data: DataSettings, tokenizer: Any, counts: dict[str, int]
) -> list[Row]:
    """Rows with their final text under "prompt", without empty and repeated ones."""
    column = data.data_prompt_column
    if column not in columns:
        raise InputError(f"data_prompt_column={column!r} is no column of the data: give one of {', '.join(columns)}")
    counts["empty"] = counts["duplicate"] = 0
    seen: set[str] = set()
    kept: list[Row] = []
    for number, row in enumerate(rows):
        text = _text(row[column], number, data, tokenizer)
        if not text:
            counts["empty"] += 1
        elif text in seen:
            counts["duplicate"] += 1
        elif not data.data_max_prompts or len(kept) < data.data_max_prompts:
            seen.add(text)
            kept.append({**row, "prompt": text})
    return kept


def _text(value: Any, number: int, data: DataSettings, tokenizer: Any) -> str:
    if isinstance(value, str) or value is None:
        if not value or not value.strip():
            return ""
        if not data.data_chat_template:
            return str(value)
        messages = [{"role": "user", "content": value}]
    elif _is_chat(value) and data.data_chat_template:
        messages = [{"role": message["role"], "content": message["content"]} for message in value]
        if not messages:
            return ""
    else:
        kinds = (
            "a text or chat messages"
            if data.data_chat_template
            else "a text (or set data_chat_template=True for chats)"
        )
        raise InputError(
            f"data_prompt_column={data.data_prompt_column!r} holds {str(value)[:60]!r} in row {number}: give {kinds}"
        )
    if data.data_system_prompt:
        messages = [{"role": "system", "content": data.data_system_prompt}, *messages]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in value
    )


def _within(rows: list[Row], tokenizer: Any, data: DataSettings, longest: int, counts: dict[str, int]) -> list[Row]:
    """Rows with token ids under "input_ids" that are no longer than ``longest``."""
    texts = [row["prompt"] for row in rows]
    # A chat template writes the special tokens itself.
    ids = tokenizer(texts, add_special_tokens=not data.data_chat_template)["input_ids"] if texts else []
    kept = [{**row, "input_ids": tokens} for row, tokens in zip(rows, ids, strict=True) if 0 < len(tokens) <= longest]
    counts["too_long"] = len(rows) - len(kept)
    return kept


def is_held_out(prompt: str, fraction: float) -> bool:
    """Whether a prompt belongs to validation: by its own hash, so that rows added later move no other."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") < fraction * 2**64


def _split(rows: list[Row], data: DataSettings, counts: dict[str, int]) -> dict[str, list[Row]]:
    splits: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for row in rows:
        splits["validation" if is_held_out(row["prompt"], data.data_eval_fraction) else "train"].append(row)
    counts.update({name: len(part) for name, part in splits.items()})
    return splits


def _check_counts(query_dataset: str, data: DataSettings, counts: dict[str, int], longest: int) -> None:
    said = ", ".join(f"{name} {count}" for name, count in counts.items())
    if counts["read"] == 0:
        raise InputError(f"query_dataset={query_dataset!r} is empty: give at least two prompts")
    if counts["train"] + counts["validation"] == 0 and counts["too_long"]:
        raise InputError(
            f"query_dataset={query_dataset!r}: every prompt is longer than {longest} tokens, the most that "
            f"data_max_prompt_tokens={data.data_max_prompt_tokens} and the model's length allow ({said})"
        )
    for name in SPLITS:
        if counts[name] == 0:
            raise InputError(
                f"query_dataset={query_dataset!r} leaves no prompt for {name} ({said}): give more prompts or "
                f"another data_eval_fraction (now {data.data_eval_fraction})"
            )


def _write_split(path: Path, rows: list[Row], remove_unused_columns: bool) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    columns = {
        "prompt": pyarrow.array([row["prompt"] for row in rows], pyarrow.string()),
        "input_ids": pyarrow.array([row["input_ids"] for row in rows], pyarrow.list_(pyarrow.int64())),
    }
    if not remove_unused_columns:
        for name in rows[0]:
            if name not in columns:
                columns[name] = pyarrow.array([row[name] for row in rows])
    parquet.write_table(pyarrow.table(columns), path)


def _manifest(
    query_dataset: str,
    data: DataSettings,
    revision: str | None,
    counts: dict[str, int],
    splits: dict[str, list[Row]],
    directory: Path,
    tokenizer: Path,
) -> dict[str, Any]:
    lengths = [len(row["input_ids"]) for rows in splits.values() for row in rows]
    hashes = {f"{name}.parquet": sha256(directory / f"{name}.parquet") for name in SPLITS}
    return {
        "source": query_dataset,
        "revision": revision,
        "column": data.data_prompt_column,
        "chat_template": data.data_chat_template,
        "counts": counts,
        "train": counts["train"],
        "validation": counts["validation"],
        "lengths": {"min": min(lengths), "median": statistics.median(lengths), "max": max(lengths)},
        "tokenizer_digest": digest_of({f.name: sha256(f) for f in sorted(tokenizer.iterdir()) if f.is_file()}),
        "sha256": hashes,
        "digest": digest_of(hashes),
    }


def _readme(manifest: dict[str, Any]) -> str:
    counts = "\n".join(f"- {name}: {count}" for name, count in manifest["counts"].items())
    return f"# Prompts\n\nMade from `{manifest['source']}`.\n\n{counts}\n\nDigest: `{manifest['digest']}`\n"
