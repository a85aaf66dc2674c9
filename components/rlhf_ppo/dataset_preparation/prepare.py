"""The work of prepare_dataset: from any data set to tokenised, filtered, deduplicated prompts in two splits."""

from __future__ import annotations

import hashlib
import json
import statistics
import tempfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_ppo.artifacts import complete_directory, digest_of, sha256, write_json
from rlhf_ppo.dataset_preparation.sources import read
from rlhf_ppo.errors import InputError
from rlhf_ppo.events import emit
from rlhf_ppo.settings import DataSettings

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

SPLITS = ("train", "validation")
BATCH = 1000


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
    with complete_directory(prompts) as unfinished, tempfile.TemporaryDirectory(dir=unfinished) as cache:
        source = read(query_dataset, data, cache)
        counts = {"read": len(source.rows)}
        texts, numbers = _texts(source.rows, data, loaded, counts)
        table = _within(texts, numbers, loaded, data, longest, counts)
        splits = _split(table, data, counts)
        _check_counts(query_dataset, data, counts, longest)
        for name in SPLITS:
            rest = None if remove_unused_columns else source.rows
            _write_split(unfinished / f"{name}.parquet", splits[name], rest)
        manifest = _manifest(query_dataset, data, source.revision, counts, splits, unfinished, tokenizer)
        write_json(unfinished / "manifest.json", manifest)
        (unfinished / "README.md").write_text(_readme(manifest), encoding="utf-8")
    _tell_what_was_left_out(counts, longest)
    return manifest


def _longest(data: DataSettings, max_length: int | None, max_new_tokens: int) -> int:
    """The longest prompt, in tokens, that may be used."""
    if max_length is None:
        return data.data_max_prompt_tokens
    if max_new_tokens >= max_length:
        raise InputError(
            f"rollout_max_new_tokens={max_new_tokens} leaves no room for a prompt: the model reads {max_length} tokens"
        )
    return min(data.data_max_prompt_tokens, max_length - max_new_tokens)


def _texts(rows: Dataset, data: DataSettings, tokenizer: Any, counts: dict[str, int]) -> tuple[list[str], list[int]]:
    """The final texts, without empty and repeated ones, and the number of the row that each was first found in."""
    column = data.data_prompt_column
    if column not in rows.column_names:
        raise InputError(
            f"data_prompt_column={column!r} is no column of the data: give one of {', '.join(rows.column_names)}"
        )
    counts.update({"empty": 0, "duplicate": 0})
    seen: dict[str, int] = {}
    number = -1
    for number, value in enumerate(_values(rows, column)):
        text = _text(value, number, data, tokenizer)
        if not text:
            counts["empty"] += 1
        elif text in seen:
            counts["duplicate"] += 1
        else:
            seen[text] = number
            if len(seen) == data.data_max_prompts:
                break
    counts["beyond_max_prompts"] = counts["read"] - number - 1
    return list(seen), list(seen.values())


def _values(rows: Dataset, column: str) -> Iterator[Any]:
    """One column's values, with no more than a batch of them in memory."""
    for batch in rows.select_columns([column]).iter(BATCH):
        yield from batch[column]


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
    return _templated(messages, number, data, tokenizer)


def _templated(messages: list[dict[str, str]], number: int, data: DataSettings, tokenizer: Any) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        raise InputError(
            f"data_chat_template=True: the model's chat template refuses row {number} of "
            f"data_prompt_column={data.data_prompt_column!r} ({error}): give chats that it takes, or set it to False"
        ) from error


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in value
    )


def _within(
    texts: list[str], numbers: list[int], tokenizer: Any, data: DataSettings, longest: int, counts: dict[str, int]
) -> pa.Table:
    """A table of the texts of no more than ``longest`` tokens: prompt, input_ids, and the number of the row.

    Texts that the tokenizer reads alike (it may fold case or spaces) are one prompt, the first of them.
    """
    import pyarrow as pa

    kinds = {"prompt": pa.string(), "input_ids": pa.list_(pa.int64()), "row": pa.int64()}
    parts = [pa.table({name: pa.array([], kind) for name, kind in kinds.items()})]
    known: set[bytes] = set()
    counts["too_long"] = 0
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]
        # A chat template writes the special tokens itself.
        ids = tokenizer(batch, add_special_tokens=not data.data_chat_template, verbose=False)["input_ids"]
        fits = [0 < len(tokens) <= longest for tokens in ids]
        counts["too_long"] += fits.count(False)
        for place, tokens in enumerate(ids):
            digest = hashlib.sha256(array("q", tokens).tobytes()).digest()
            if fits[place] and digest in known:
                fits[place] = False
                counts["duplicate"] += 1
            known.add(digest)
        columns = {"prompt": batch, "input_ids": ids, "row": numbers[start : start + BATCH]}
        parts.append(
            pa.table({name: pa.array(columns[name], kind) for name, kind in kinds.items()}).filter(pa.array(fits))
        )
    return pa.concat_tables(parts)


def is_held_out(prompt: str, fraction: float) -> bool:
    """Whether a prompt belongs to validation: by its own hash, so that rows added later move no other."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") < fraction * 2**64


def _split(table: pa.Table, data: DataSettings, counts: dict[str, int]) -> dict[str, pa.Table]:
    import pyarrow as pa

    held_out = [is_held_out(text, data.data_eval_fraction) for text in table["prompt"].to_pylist()]
    masks = {"train": [not held for held in held_out], "validation": held_out}
    splits = {name: table.filter(pa.array(masks[name], pa.bool_())) for name in SPLITS}
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


def _tell_what_was_left_out(counts: dict[str, int], longest: int) -> None:
    kinds = {"empty": "empty", "duplicate": "repeated", "too_long": f"longer than {longest} tokens"}
    left_out = [f"{counts[name]} {word}" for name, word in kinds.items() if counts[name]]
    if left_out:
        kept = counts["train"] + counts["validation"]
        emit("note", step="prepare_dataset", message=f"{kept} of {counts['read']} prompts; {', '.join(left_out)}")


def _write_split(path: Path, prompts: pa.Table, rest: Dataset | None) -> None:
    """Write prompts, with the other columns of ``rest`` where it is given."""
    import pyarrow.parquet as parquet

    table = prompts.select(["prompt", "input_ids"])
    if rest is not None:
        taken = rest.select(prompts["row"].to_pylist()).with_format("arrow")[:]
        for name in taken.column_names:
            if name not in table.column_names:
                table = table.append_column(name, taken[name])
    parquet.write_table(table, path)


def _manifest(
    query_dataset: str,
    data: DataSettings,
    revision: str | None,
    counts: dict[str, int],
    splits: dict[str, pa.Table],
    directory: Path,
    tokenizer: Path,
) -> dict[str, Any]:
    import pyarrow.compute as compute

    lengths = [n for part in splits.values() for n in compute.list_value_length(part["input_ids"]).to_pylist()]
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
    files = "\n".join(f"  - split: {name}\n    path: {name}.parquet" for name in SPLITS)
    counts = "\n".join(f"- {name}: {count}" for name, count in manifest["counts"].items())
    return (
        f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}\n---\n\n# Prompts\n\n"
        f"Made from `{manifest['source']}`.\n\n{counts}\n\nDigest: `{manifest['digest']}`\n"
    )
