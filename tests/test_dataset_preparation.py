"""Prompts: from every kind of source, filtered and split so that nothing leaks and nothing is cut."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
from datasets import Dataset, DatasetDict, load_dataset
from tokenizers.processors import TemplateProcessing

import hub_server
from rlhf_ppo.dataset_preparation.prepare import is_held_out, prepare_dataset
from rlhf_ppo.dataset_preparation.sources import read
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


def starting_with_a_special_token(tokenizer: Path) -> None:
    saved = word_tokenizer()
    saved.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    saved.chat_template = TEMPLATE
    saved.save_pretrained(tokenizer)


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


@pytest.mark.parametrize("kind", ["csv", "tsv", "txt"])
@pytest.mark.parametrize("in_a_directory", [False, True])
def test_a_mark_at_the_beginning_is_no_part_of_a_prompt_and_words_for_nothing_are_words(
    kind: str, in_a_directory: bool, tmp_path: Path
) -> None:
    place = tmp_path / "data"
    place.mkdir()
    separator = "\t" if kind == "tsv" else ","
    words = ["w3 w4", "NA", "null", "None", "nan", "w5"]
    rows = words if kind == "txt" else [separator.join(["prompt", "n"]), *(f"{word}{separator}1" for word in words)]
    (place / f"rows.{kind}").write_text("\n".join(rows), encoding="utf-8-sig")
    source = place if in_a_directory else place / f"rows.{kind}"
    found = read(str(source), DataSettings(), str(tmp_path / "cache")).rows
    assert found["prompt"][:] == words
    assert kind == "txt" or found["n"][:] == [1] * len(words)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def test_a_url_is_read_through_fsspec(tokenizer: Path, tmp_path: Path) -> None:
    source = jsonl(tmp_path / "rows.jsonl", ROWS)
    assert prepare(f"file://{source}", tokenizer)["counts"]["read"] == 300
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    assert prepare(f"{url}/rows.jsonl?download=true", tokenizer)["counts"]["read"] == 300
    for path in (tmp_path / "prompts").iterdir():
        path.unlink()
    (tmp_path / "prompts").rmdir()
    refused(tokenizer, f"{url}/none.jsonl", "query_dataset=", "none.jsonl")
    refused(tokenizer, f"{url}/none", "of no known kind", ".jsonl")
    server.shutdown()
    server.server_close()


@pytest.mark.skipif(importlib.util.find_spec("s3fs") is not None, reason="s3fs is installed")
def test_a_url_whose_protocol_needs_a_package_names_it(tokenizer: Path) -> None:
    refused(tokenizer, "s3://bucket/rows.jsonl", "query_dataset='s3://bucket/rows.jsonl'", "s3fs")
    refused(tokenizer, "nonsense://bucket/rows.jsonl", "query_dataset=", "nonsense")


def test_a_directorys_files_are_the_splits_that_they_are_named_after(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "d" / "data").mkdir(parents=True)
    jsonl(tmp_path / "d" / "data" / "train-0.jsonl", ROWS[:100])
    jsonl(tmp_path / "d" / "data" / "train-1.jsonl", ROWS[100:150])
    jsonl(tmp_path / "d" / "data" / "test.jsonl", ROWS[150:])
    (tmp_path / "d" / "README.md").write_text("what this is")
    assert prepare(tmp_path / "d", tokenizer)["counts"]["read"] == 150
    texts = {row["prompt"] for name in ("train", "validation") for row in split(tokenizer, name)}
    assert texts == {row["prompt"] for row in ROWS[:150]}
    assert prepare(tmp_path / "d", tokenizer, data_split="test[:100]")["counts"]["read"] == 100


def test_prepared_prompts_are_themselves_a_data_set_with_these_splits(tokenizer: Path, tmp_path: Path) -> None:
    first = prepare(jsonl(tmp_path / "r.jsonl", ROWS), tokenizer)
    (tmp_path / "prompts").rename(tmp_path / "first")
    loaded = load_dataset(str(tmp_path / "first"), cache_dir=str(tmp_path / "cache"))
    assert {name: len(part) for name, part in loaded.items()} == {
        "train": first["train"],
        "validation": first["validation"],
    }
    # What the hash held out at 0.1 is not in this split: only a larger share finds more.
    assert prepare(tmp_path / "first", tokenizer, data_eval_fraction=0.3)["counts"]["read"] == first["train"]


def test_counts_tell_what_became_of_every_row(tokenizer: Path, tmp_path: Path) -> None:
    rows = [*ROWS, {"prompt": "  "}, {"prompt": None}, ROWS[0], {"prompt": "w3 " * 30}]
    manifest = prepare(jsonl(tmp_path / "r.jsonl", rows), tokenizer, data_max_prompt_tokens=20)
    counts = manifest["counts"]
    assert (counts["read"], counts["empty"], counts["duplicate"], counts["too_long"]) == (304, 2, 1, 1)
    assert counts["train"] + counts["validation"] == 300
    assert manifest["lengths"] == {"min": 3, "median": 3, "max": 3}


def test_what_is_left_out_is_told(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_PPO_EVENTS", str(tmp_path / "events"))
    prepare(jsonl(tmp_path / "r.jsonl", ROWS), tokenizer)
    assert not (tmp_path / "events").exists()
    rows = [*ROWS, {"prompt": "  "}, ROWS[0], ROWS[1], {"prompt": "w3 " * 30}]
    prepare(jsonl(tmp_path / "r.jsonl", rows), tokenizer, data_max_prompt_tokens=20)
    told = json.loads((tmp_path / "events").read_text())
    message = "300 of 304 prompts; 1 empty, 2 repeated, 1 longer than 20 tokens"
    assert (told["kind"], told["step"], told["message"]) == ("note", "prepare_dataset", message)


def test_no_prompt_is_in_both_splits_and_new_rows_move_no_old_one(tokenizer: Path, tmp_path: Path) -> None:
    prepare(jsonl(tmp_path / "r.jsonl", ROWS[:200]), tokenizer)
    before = {name: {r["prompt"] for r in split(tokenizer, name)} for name in ("train", "validation")}
    prepare(jsonl(tmp_path / "r.jsonl", ROWS[::-1]), tokenizer)
    after = {name: {r["prompt"] for r in split(tokenizer, name)} for name in ("train", "validation")}
    assert not after["train"] & after["validation"]
    for name in before:
        assert before[name] <= after[name]
    assert 15 <= len(after["validation"]) <= 50


def test_prompts_that_the_tokenizer_reads_alike_are_one_and_never_in_both_splits(
    tokenizer: Path, tmp_path: Path
) -> None:
    spaced = [{"prompt": text} for row in ROWS for text in (row["prompt"], row["prompt"].replace(" ", "  ") + "\n")]
    counts = prepare(jsonl(tmp_path / "r.jsonl", spaced), tokenizer)["counts"]
    assert (counts["read"], counts["duplicate"], counts["too_long"]) == (600, 300, 0)
    read = [tuple(row["input_ids"]) for name in ("train", "validation") for row in split(tokenizer, name)]
    assert len(read) == len(set(read)) == 300
    texts = {row["prompt"] for name in ("train", "validation") for row in split(tokenizer, name)}
    assert texts == {row["prompt"] for row in ROWS}, "the first of them stays"


def test_the_first_n_distinct_prompts_are_taken_in_their_order(tokenizer: Path, tmp_path: Path) -> None:
    rows = [ROWS[9], ROWS[9], {"prompt": ""}, *ROWS]
    manifest = prepare(jsonl(tmp_path / "r.jsonl", rows), tokenizer, data_max_prompts=50)
    counts = manifest["counts"]
    assert counts["train"] + counts["validation"] == 50
    assert (counts["read"], counts["empty"], counts["duplicate"], counts["beyond_max_prompts"]) == (303, 1, 2, 250)
    texts = {row["prompt"] for name in ("train", "validation") for row in split(tokenizer, name)}
    assert texts == {row["prompt"] for row in ROWS[:50]}


def test_every_row_is_counted_once(tokenizer: Path, tmp_path: Path) -> None:
    rows = [*ROWS, {"prompt": " "}, ROWS[4], {"prompt": "w3 " * 30}, {"prompt": "w3 w3 w3 w3"}]
    for limit in (0, 100):
        counts = prepare(
            jsonl(tmp_path / "r.jsonl", rows), tokenizer, data_max_prompts=limit, data_max_prompt_tokens=20
        )["counts"]
        assert counts["read"] == sum(count for name, count in counts.items() if name != "read") == 304


PREPARE = """
import json, sys
from pathlib import Path
from rlhf_ppo.dataset_preparation.prepare import prepare_dataset
from rlhf_ppo.dataset_preparation.sources import read
from rlhf_ppo.errors import InputError
from rlhf_ppo.settings import DataSettings
for number, argument in enumerate(sys.argv[1:]):
    query_dataset, _, settings = argument.partition(" ")
    data = DataSettings(**json.loads(settings or "{}"))
    try:
        made = prepare_dataset(query_dataset=query_dataset, data=data, remove_unused_columns=True, max_new_tokens=8,
                               tokenizer=Path("tokenizer"), prompts=Path(f"prompts{number}"))
        print("MADE", json.dumps(made))
    except InputError as error:
        print("REFUSED", error)
"""


def preparations(directory: Path, *arguments: str, **environment: str) -> list[str]:
    """What a process of its own says to each query_dataset with settings."""
    settings = {"HF_HOME": str(directory / "hf"), "HF_HUB_DISABLE_XET": "1", **environment}
    command = [sys.executable, "-c", PREPARE, *arguments]
    done = subprocess.run(command, cwd=directory, env={**os.environ, **settings}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Generating" not in done.stderr and "%|" not in done.stderr, "no bars where nobody looks"
    return [line for line in done.stdout.splitlines() if line.startswith(("MADE", "REFUSED"))]


def test_two_preparations_are_the_same_to_the_byte_and_leave_nothing_behind(tokenizer: Path, tmp_path: Path) -> None:
    here = prepare(jsonl(tmp_path / "r.jsonl", ROWS), tokenizer)
    (line,) = preparations(tmp_path, "r.jsonl", PYTHONHASHSEED="7")
    made = json.loads(line.removeprefix("MADE "))
    assert (made["sha256"], made["digest"]) == (here["sha256"], here["digest"])
    files = {path.name for path in (tmp_path / "prompts0").rglob("*")}
    assert files == {"train.parquet", "validation.parquet", "manifest.json", "README.md"}
    assert not [path for path in (tmp_path / "hf").rglob("*") if path.is_file()]


class DataHub(hub_server._Handler):
    """Serves the repositories of models as data sets."""

    def _route(self, path: str, body: bytes) -> Any:
        path = path.replace("/api/datasets/", "/api/models/", 1).removeprefix("/datasets")
        if "/paths-info/" in path:
            return []
        return super()._route(path, body)


def test_a_hub_data_set_is_read_at_its_commit(tokenizer: Path, tmp_path: Path) -> None:
    hub = hub_server.Hub({"hf_t": ("me", "write")})
    hub.server.RequestHandlerClass = type("Bound", (DataHub,), {"hub": hub})
    data = hub.repositories["me/data"] = hub_server.Repository(private=False)
    hub.repositories["me/secret"] = hub_server.Repository(private=True)
    commits = [
        data.commit(str(number), {"train.jsonl": jsonl(tmp_path / "r.jsonl", ROWS[:number]).read_bytes()})
        for number in (100, 200)
    ]
    settings = [{"data_revision": commits[0]}, {}, {"data_split": "test"}, {"data_config": "de"}]
    known = [f"me/data {json.dumps(setting)}" for setting in settings]
    said = preparations(tmp_path, *known, "me/secret", "me/none", HF_ENDPOINT=hub.url)
    for line, commit, number in zip(said[:2], commits, (100, 200), strict=True):
        made = json.loads(line.removeprefix("MADE "))
        assert (made["revision"], made["counts"]["read"]) == (commit, number)
    for line, *words in (
        (said[2], "data_split='test'", "'train'"),
        (said[3], "data_config='de'", "default"),
        (said[4], "query_dataset='me/secret'", "HF_TOKEN"),
        (said[5], "query_dataset='me/none'", "HF_TOKEN"),
    ):
        assert line.startswith("REFUSED") and all(word in line for word in words), line
    (line,) = preparations(tmp_path, "me/other", HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    assert "query_dataset='me/other'" in line and "can't be reached" in line
    hub.server.shutdown()
    hub.server.server_close()


def test_other_columns_stay_where_they_are_wanted(tokenizer: Path, tmp_path: Path) -> None:
    rows = [{"question": row["prompt"], "prompt": "old", "id": row["id"], "note": None} for row in ROWS]
    rows[0]["note"] = "only here"
    prepare(jsonl(tmp_path / "r.jsonl", rows), tokenizer, keep=True, data_prompt_column="question")
    for name in ("train", "validation"):
        table = parquet.read_table(tmp_path / "prompts" / f"{name}.parquet")
        assert table.column_names == ["prompt", "input_ids", "question", "id", "note"]
        assert [str(table.schema.field(column).type) for column in ("id", "note")] == ["int64", "string"]
        for row in table.to_pylist():
            assert row["prompt"] == row["question"] == ROWS[row["id"]]["prompt"]


def test_special_tokens_are_the_tokenizers_for_texts_and_the_templates_for_chats(
    tokenizer: Path, tmp_path: Path
) -> None:
    starting_with_a_special_token(tokenizer)
    source = jsonl(tmp_path / "r.jsonl", ROWS)
    prepare(source, tokenizer)
    assert split(tokenizer, "train")[0]["input_ids"] == [1, 3, 3, 5]
    prepare(source, tokenizer, data_chat_template=True)
    assert split(tokenizer, "train")[0]["input_ids"].count(1) == 1


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
    tokenizer = save_tokenizer(tmp_path / "tokenizer", max_length=11)
    rows = [*ROWS, {"prompt": "w3 w4 w5 w6"}]
    manifest = prepare(jsonl(tmp_path / "r.jsonl", rows), tokenizer, new=8)
    assert manifest["counts"]["too_long"] == 1 and manifest["lengths"]["max"] == 3


def test_a_chat_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('no system turn here') }}{% endif %}" + TEMPLATE
    tokenizer = save_tokenizer(tmp_path / "tokenizer", strict)
    source = jsonl(tmp_path / "r.jsonl", ROWS)
    settings = {"data_chat_template": True, "data_system_prompt": "w9"}
    refused(tokenizer, source, "data_chat_template=True", "row 0", "no system turn here", **settings)


def test_settings_that_a_local_source_has_no_use_for_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    source = jsonl(tmp_path / "r.jsonl", ROWS)
    refused(tokenizer, source, "data_revision='v1' has no effect", data_revision="v1")
    refused(tokenizer, source, "data_split='test'", "one file", data_split="test")
    refused(tokenizer, source, "data_config='de'", "one file", data_config="de")


def test_a_directory_whose_files_can_be_meant_in_two_ways_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    jsonl(tmp_path / "d" / "train.jsonl", ROWS)
    refused(tokenizer, tmp_path / "d", "data_split='test'", "train", data_split="test")
    jsonl(tmp_path / "d" / "more.jsonl", ROWS)
    refused(tokenizer, tmp_path / "d", "named after splits", "more.jsonl")
    (tmp_path / "d" / "more.csv").write_text("prompt\nw3\n")
    refused(tokenizer, tmp_path / "d", "mixes .csv, .jsonl")
    refused(tokenizer, tmp_path / "missing" / "d.jsonl", "does not exist")


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
    refused(tokenizer, tmp_path / "broken.jsonl", "can't be read")
    (tmp_path / "data.xls").write_text("x")
    refused(tokenizer, tmp_path / "data.xls", "of no known kind")
    (tmp_path / "none").mkdir()
    refused(tokenizer, tmp_path / "none", "no data files")
    DatasetDict(train=Dataset.from_list(ROWS)).save_to_disk(tmp_path / "splits")
    refused(tokenizer, tmp_path / "splits", "data_split='test'", "train", data_split="test")
