"""Prompts: from every kind of source, filtered and split so that nothing leaks and nothing is cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
from datasets import Dataset, DatasetDict

from rlhf_ppo.dataset_preparation.prepare import is_held_out, prepare_dataset
from rlhf_ppo.errors import InputError
from rlhf_ppo.settings import DataSettings
from tiny_models import word_tokenizer

ROWS = [{"prompt": f"w{3 + i % 60} w{3 + i // 60} w5", "id": i} for i in range(300)]
TEMPLATE = "{% for m in messages %}<s> {{ m.role }} {{ m.content }} {% endfor %}</s>"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return save_tokenizer(tmp_path / "tokenizer")


def save_tokenizer(directory: Path, template: str | None = None, max_length: int | None = 64) -> Path:
    saved = word_tokenizer()
    saved.chat_template = template
    saved.save_pretrained(directory)
    facts = {"max_length": max_length, "eos_token_ids": [2], "has_chat_template": bool(template)}
    (directory / "model.json").write_text(json.dumps(facts))
    return directory


def prepare(source: Path | str, tokenizer: Path, keep: bool = False, new: int = 8, **data: Any) -> dict[str, Any]:
    return prepare_dataset(
        query_dataset=str(source),
        data=DataSettings(**data),
        remove_unused_columns=not keep,
        max_new_tokens=new,
        tokenizer=tokenizer,
        prompts=tokenizer.parent / "prompts",
    )


def split(tokenizer: Path, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = parquet.read_table(tokenizer.parent / "prompts" / f"{name}.parquet").to_pylist()
    return rows


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refused(tokenizer: Path, source: Path | str, *words: str, **data: Any) -> None:
    with pytest.raises(InputError) as caught:
        prepare(source, tokenizer, **data)
    for word in words:
        assert word in str(caught.value)
    assert not [path for path in tokenizer.parent.iterdir() if path.name.startswith("prompts")]


def sources(directory: Path) -> dict[str, Path]:
    """The same rows in every format."""
    data = Dataset.from_list(ROWS)
    found = {name: directory / f"rows.{name}" for name in ("jsonl", "json", "csv", "parquet", "txt", "tsv")}
    jsonl(found["jsonl"], ROWS)
    found["json"].write_text(json.dumps(ROWS))
    data.to_csv(found["csv"])
    data.to_csv(found["tsv"], sep="\t")
    data.to_parquet(found["parquet"])
    found["txt"].write_text("\n".join(row["prompt"] for row in ROWS))
    found["saved"], found["saved splits"] = directory / "saved", directory / "splits"
    data.save_to_disk(found["saved"])
    DatasetDict(train=data, other=data.select(range(3))).save_to_disk(found["saved splits"])
    found["directory"] = directory / "parts"
    found["directory"].mkdir()
    jsonl(found["directory"] / "a.jsonl", ROWS[:100])
    jsonl(found["directory"] / "b.jsonl", ROWS[100:])
    return found


KINDS = ["jsonl", "json", "csv", "parquet", "txt", "tsv", "saved", "saved splits", "directory"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_the_same_prompts(kind: str, tokenizer: Path, tmp_path: Path) -> None:
    manifest = prepare(sources(tmp_path)[kind], tokenizer)
    assert manifest["counts"]["read"] == 300 and manifest["train"] + manifest["validation"] == 300
    row = split(tokenizer, "train")[0]
    assert set(row) == {"prompt", "input_ids"}
    assert row["input_ids"] == word_tokenizer()(row["prompt"]).input_ids
    expected = {r["prompt"] for r in ROWS if not is_held_out(r["prompt"], 0.1)}
    assert [r["prompt"] for r in split(tokenizer, "train")] == [r["prompt"] for r in ROWS if r["prompt"] in expected]


def test_a_url_is_read_through_fsspec(tokenizer: Path, tmp_path: Path) -> None:
    source = jsonl(tmp_path / "rows.jsonl", ROWS)
    assert prepare(f"file://{source}", tokenizer)["counts"]["read"] == 300


def test_counts_tell_what_became_of_every_row(tokenizer: Path, tmp_path: Path) -> None:
    rows = [*ROWS, {"prompt": "  "}, {"prompt": None}, ROWS[0], {"prompt": "w3 " * 30}]
    manifest = prepare(jsonl(tmp_path / "r.jsonl", rows), tokenizer, data_max_prompt_tokens=20)
    counts = manifest["counts"]
    assert (counts["read"], counts["empty"], counts["duplicate"], counts["too_long"]) == (304, 2, 1, 1)
    assert counts["train"] + counts["validation"] == 300
    assert manifest["lengths"] == {"min": 3, "median": 3, "max": 3}


def test_no_prompt_is_in_both_splits_and_new_rows_move_no_old_one(tokenizer: Path, tmp_path: Path) -> None:
    prepare(jsonl(tmp_path / "r.jsonl", ROWS[:200]), tokenizer)
    before = {name: {r["prompt"] for r in split(tokenizer, name)} for name in ("train", "validation")}
    prepare(jsonl(tmp_path / "r.jsonl", ROWS[::-1]), tokenizer)
    after = {name: {r["prompt"] for r in split(tokenizer, name)} for name in ("train", "validation")}
    assert not after["train"] & after["validation"]
    for name in before:
        assert before[name] <= after[name]
    assert 15 <= len(after["validation"]) <= 50


def test_two_preparations_are_the_same_to_the_byte(tokenizer: Path, tmp_path: Path) -> None:
    source = jsonl(tmp_path / "r.jsonl", ROWS)
    assert prepare(source, tokenizer)["digest"] == prepare(source, tokenizer)["digest"]


def test_other_columns_stay_where_they_are_wanted(tokenizer: Path, tmp_path: Path) -> None:
    prepare(jsonl(tmp_path / "r.jsonl", ROWS), tokenizer, keep=True)
    assert split(tokenizer, "train")[0]["id"] in range(300)


def test_a_chat_template_frames_texts_and_chats(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer", TEMPLATE)
    chats = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
    for rows in (ROWS, chats):
        source = jsonl(tmp_path / "r.jsonl", rows)
        prepare(source, tokenizer, data_chat_template=True, data_system_prompt="w9")
        first = split(tokenizer, "train")[0]
        assert first["prompt"] == f"<s> system w9 <s> user {ROWS[0]['prompt']} </s>"
        assert first["input_ids"].count(1) == 2


def test_prompts_that_leave_no_room_for_a_response_are_left_out_not_cut(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer", max_length=12)
    rows = [*ROWS, {"prompt": "w3 w4 w5 w6 w7"}]
    manifest = prepare(jsonl(tmp_path / "r.jsonl", rows), tokenizer, new=8)
    assert manifest["counts"]["too_long"] == 1 and manifest["lengths"]["max"] == 3


def test_bad_input_is_refused_with_the_parameter_and_leaves_nothing(tokenizer: Path, tmp_path: Path) -> None:
    source = jsonl(tmp_path / "r.jsonl", ROWS)
    refused(tokenizer, source, "data_prompt_column='question'", "prompt, id", data_prompt_column="question")
    refused(tokenizer, source, "data_prompt_column='id'", "a text", data_prompt_column="id")
    refused(tokenizer, source, "data_chat_template=True", "no chat template", data_chat_template=True)
    refused(tokenizer, source, "every prompt is longer", "data_max_prompt_tokens=2", data_max_prompt_tokens=2)
    refused(tokenizer, source, "rollout_max_new_tokens=64", "64 tokens", new=64)
    refused(tokenizer, jsonl(tmp_path / "one.jsonl", ROWS[:1]), "leaves no prompt for")
    (tmp_path / "empty.jsonl").write_text("")
    refused(tokenizer, tmp_path / "empty.jsonl", "query_dataset=", "is empty")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt"')
    refused(tokenizer, tmp_path / "broken.jsonl", "can't be read as json")
    (tmp_path / "data.xls").write_text("x")
    refused(tokenizer, tmp_path / "data.xls", "of no known kind")
    (tmp_path / "none").mkdir()
    refused(tokenizer, tmp_path / "none", "no data files")
    Dataset.from_list(ROWS)
    DatasetDict(train=Dataset.from_list(ROWS)).save_to_disk(tmp_path / "splits")
    refused(tokenizer, tmp_path / "splits", "data_split='test'", "train", data_split="test")
