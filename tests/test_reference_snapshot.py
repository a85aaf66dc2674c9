"""The snapshot: from a directory, a GGUF file or a hub, to frozen safetensors; nothing else gets in."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hub_server import Hub, Repository
from rlhf_ppo.artifacts import loadable_by_transformers_4
from rlhf_ppo.errors import InputError
from rlhf_ppo.reference_snapshot.snapshot import snapshot_reference
from tiny_models import gpt2, llama, word_tokenizer

IDS = torch.tensor([[3, 4, 5, 6]])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    llama(seed=3).save_pretrained(directory)
    word_tokenizer().save_pretrained(directory)
    return directory


def snapshot(source: Path | str, tmp_path: Path, revision: str = "") -> dict[str, Any]:
    return snapshot_reference(str(source), revision, tmp_path / "reference", tmp_path / "tokenizer")


def refused(source: Path | str, tmp_path: Path, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        snapshot(source, tmp_path)
    assert "model_name=" in str(caught.value)
    assert not any(path.name.startswith(("reference", "tokenizer")) for path in tmp_path.iterdir())


def test_a_directory_is_copied_with_a_digest_of_every_file(model: Path, tmp_path: Path) -> None:
    found = snapshot(model, tmp_path)
    reference = tmp_path / "reference"
    assert (
        found["sha256"]["model.safetensors"] == hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    )
    assert set(found["sha256"]) == {path.name for path in reference.iterdir()} - {"digest.json"}
    assert json.loads((reference / "digest.json").read_text()) == found
    expected = llama(seed=3)(IDS).logits
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(reference)(IDS).logits, expected)
    facts = json.loads((tmp_path / "tokenizer" / "model.json").read_text())
    assert facts == {"max_length": 64, "eos_token_ids": [2], "has_chat_template": False}
    assert AutoTokenizer.from_pretrained(tmp_path / "tokenizer")("w3 w4").input_ids == [3, 4]


def test_the_digest_is_of_the_content(model: Path, tmp_path: Path) -> None:
    first, again = snapshot(model, tmp_path), snapshot(model, tmp_path)
    assert first["digest"] == again["digest"]
    llama(seed=4).save_pretrained(model)
    assert snapshot(model, tmp_path)["digest"] != first["digest"]


def test_a_tokenizer_without_pad_token_pads_with_the_end_and_is_else_untouched(model: Path, tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(model)
    snapshot(model, tmp_path)
    for directory in ("reference", "tokenizer"):
        loaded = AutoTokenizer.from_pretrained(tmp_path / directory)
        assert (loaded.pad_token, loaded.pad_token_id) == ("</s>", 2)
    before = json.loads((model / "tokenizer_config.json").read_text())
    assert json.loads((tmp_path / "reference" / "tokenizer_config.json").read_text()) == {**before, "pad_token": "</s>"}


def test_a_tokenizer_with_nothing_to_pad_with_is_refused(model: Path, tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(model)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps({**settings, "eos_token_id": None}))
    refused(model, tmp_path, "neither a pad token nor an end of sequence")


def test_pickled_weights_are_refused_and_never_copied(model: Path, tmp_path: Path) -> None:
    torch.save(llama().state_dict(), model / "pytorch_model.bin")
    snapshot(model, tmp_path)
    assert not list((tmp_path / "reference").glob("*.bin"))
    for directory in ("reference", "tokenizer"):
        for file in (tmp_path / directory).iterdir():
            file.unlink()
        (tmp_path / directory).rmdir()
    (model / "model.safetensors").unlink()
    refused(model, tmp_path, "only pickled weights .pytorch_model.bin.*safetensors")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_of_a_models_own_is_refused(name: str, model: Path, tmp_path: Path) -> None:
    settings = json.loads((model / name).read_text())
    (model / name).write_text(json.dumps({**settings, "auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    (model / "evil.py").write_text("raise SystemExit('this ran')")
    refused(model, tmp_path, f"code of its own .auto_map in {name}")


def test_what_is_no_model_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path, "no weights")
    refused(tmp_path / "missing", tmp_path, "does not exist")
    (model / "config.json").unlink()
    refused(model, tmp_path, "no config.json")
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path / "notes.txt", tmp_path, "no GGUF file")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "empty" / name).write_text("x")
    refused(tmp_path / "empty", tmp_path, "2 GGUF files.*a.gguf")
    refused(tmp_path / "empty" / "a.gguf", tmp_path, "can't be read as GGUF")
    (tmp_path / "empty" / "a.gguf").write_bytes(b"")
    refused(tmp_path / "empty" / "a.gguf", tmp_path, "can't be read as GGUF")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "of-my-own"}, "config.json that can't be read"),
        ({"model_type": "vit"}, "is a vit, no language model"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "is a LlamaForSequenceClassification, no language"),
    ],
)
def test_what_is_no_language_model_is_refused(changes: dict[str, Any], words: str, model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))
    refused(model, tmp_path, words)


def test_a_revision_of_what_is_not_on_the_hub_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="model_revision='v1' has no effect"):
        snapshot(model, tmp_path, "v1")


def test_weights_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    llama().save_pretrained(directory, max_shard_size="20KB")
    word_tokenizer().save_pretrained(directory)
    shards = sorted(directory.glob("model-*.safetensors"))
    assert len(shards) > 1
    snapshot(directory, tmp_path)
    shutil.rmtree(tmp_path / "reference")
    shutil.rmtree(tmp_path / "tokenizer")
    whole = shards[0].read_bytes()
    for broken in (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", whole[:-1]):
        shards[0].write_bytes(broken)
        refused(directory, tmp_path, f"{shards[0].name} is broken or only a pointer")
    shards[0].unlink()
    refused(directory, tmp_path, f"has no {shards[0].name}")


def test_a_model_without_tokenizer_is_refused(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path / "bare")
    refused(tmp_path / "bare", tmp_path, "no tokenizer")


def write_gguf(path: Path) -> None:
    """A Llama-type model as llama.cpp would write it, in fp32."""
    import gguf

    model, config = llama(seed=3), llama().config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    words = [token for token, _ in sorted(word_tokenizer().get_vocab().items(), key=lambda item: item[1])]
    words[3:8] = ["w", "3", "w3", "4", "w4"]
    writer.add_token_list(words)
    writer.add_token_types([3, 3, 3] + [1] * (len(words) - 3))
    writer.add_token_merges(["w 3", "w 4"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
             "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
             "model.layers": "blk"}  # fmt: skip
    for name, weight in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        heads = {"attn_q": 4, "attn_k": 2}.get(name.split(".")[-2], 0)
        if heads:  # llama.cpp interleaves the halves of each head's rotary dimensions
            rows, columns = weight.shape
            weight = weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        writer.add_tensor(name, weight.detach().numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_the_same_model_as_safetensors(tmp_path: Path) -> None:
    (tmp_path / "gguf").mkdir()
    write_gguf(tmp_path / "gguf" / "tiny.gguf")
    for source in (tmp_path / "gguf" / "tiny.gguf", tmp_path / "gguf"):
        snapshot(source, tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "reference")
        torch.testing.assert_close(loaded(IDS).logits, llama(seed=3)(IDS).logits, atol=1e-4, rtol=1e-4)
        assert loaded.generation_config.eos_token_id == 2
        assert not hasattr(loaded.config, "quantization_config")


def test_a_gguf_files_tokenizer_adds_no_token_that_the_file_does_not_ask_for(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    snapshot(tmp_path / "tiny.gguf", tmp_path)
    for directory in ("reference", "tokenizer"):
        loaded = AutoTokenizer.from_pretrained(tmp_path / directory)
        assert dict(loaded("w3w4")) == {"input_ids": [3, 4, 3, 6], "attention_mask": [1] * 4}
        assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (1, 2, 0)


def test_tokenizer_files_beside_a_gguf_file_and_weights_as_safetensors_come_first(model: Path, tmp_path: Path) -> None:
    (tmp_path / "gguf").mkdir()
    write_gguf(tmp_path / "gguf" / "tiny.gguf")
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(tmp_path / "gguf")
    snapshot(tmp_path / "gguf", tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path / "reference")("w4 w9").input_ids == [4, 9]
    assert json.loads((tmp_path / "tokenizer" / "model.json").read_text())["has_chat_template"]
    llama(seed=5).save_pretrained(tmp_path / "gguf")
    snapshot(tmp_path / "gguf", tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "reference")
    torch.testing.assert_close(loaded(IDS).logits, llama(seed=5)(IDS).logits)


def test_what_transformers_5_writes_says_what_transformers_4_looks_for(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5, "partial_rotary_factor": 0.5}
    (tmp_path / "config.json").write_text(json.dumps({"dtype": "float32", "rope_parameters": rope}))
    special = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<x>"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(special))
    loadable_by_transformers_4(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["rope_theta"], config["torch_dtype"], config["partial_rotary_factor"]) == (5e5, "float32", 0.5)
    assert config["rope_scaling"]["factor"] == 2.0 and config["rope_parameters"] == rope
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<x>"],
        "model_input_names": ["input_ids", "attention_mask"],
    }


def test_a_converted_gguf_file_loads_with_transformers_4_and_5(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    snapshot(tmp_path / "tiny.gguf", tmp_path)
    config = json.loads((tmp_path / "reference" / "config.json").read_text())
    assert (config["rope_theta"], config["torch_dtype"]) == (10000.0, "float32")
    for directory in ("reference", "tokenizer"):
        written = json.loads((tmp_path / directory / "tokenizer_config.json").read_text())
        assert written["tokenizer_class"] == "PreTrainedTokenizerFast"


SNAPSHOTS = """
import sys
from pathlib import Path
from rlhf_ppo.errors import InputError
from rlhf_ppo.reference_snapshot.snapshot import snapshot_reference
for argument in sys.argv[1:]:
    name, _, revision = argument.partition("@")
    try:
        found = snapshot_reference(name, revision, Path("reference"), Path("tokenizer"))
        print("FOUND", argument, found["revision"])
    except InputError as error:
        print("REFUSED", argument, error)
"""


def snapshots(hub: Hub, tmp_path: Path, *names: str, **environment: str) -> dict[str, str]:
    """What a process that knows ``hub`` says to each name@revision."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", **environment}
    command = [sys.executable, "-c", SNAPSHOTS, *names]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **settings}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FOUND", "REFUSED"))]
    return dict(zip(names, lines, strict=True))


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub({"hf_t": ("me", "write")})
    yield server
    server.close()


def test_a_hub_model_is_taken_at_its_commit_without_pickles_and_code(hub: Hub, model: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    unwanted = ("pytorch_model.bin", "modeling.py", "onnx/model.safetensors", "consolidated.safetensors")
    base = hub.repositories["me/base"] = Repository(private=False)
    commit = base.commit("first", {**files, **{name: b"unwanted" for name in unwanted}})
    base.commit("second", {"config.json": b"{}"})
    assert f"FOUND me/base@{commit} {commit}" in snapshots(hub, tmp_path, f"me/base@{commit}").values()
    assert {path.name for path in (tmp_path / "reference").iterdir()} == {*files, "digest.json"}
    assert not [path for path in hub.paths for name in unwanted if f"/{name}" in path]
    offline = snapshots(hub, tmp_path, f"me/base@{commit}", "me/base2", HF_HUB_OFFLINE="1")
    assert offline[f"me/base@{commit}"].startswith("FOUND"), "a copy in the cache is enough"
    assert "model_name='me/base2'" in offline["me/base2"] and "hub can't be reached" in offline["me/base2"]


def test_a_hub_model_that_can_not_be_taken_is_refused_before_its_weights_are_fetched(
    hub: Hub, model: Path, tmp_path: Path
) -> None:
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    config = json.dumps({**json.loads(files["config.json"]), "auto_map": {"AutoModel": "evil.M"}}).encode()
    pickled = {name: data for name, data in files.items() if not name.endswith(".safetensors")}
    for name, content in (
        ("me/code", {**files, "config.json": config}),
        ("me/pickled", {**pickled, "pytorch_model.bin": b"p"}),
        ("me/secret", files),
    ):
        hub.repositories[name] = Repository(private=name == "me/secret")
        hub.repositories[name].commit("first", content)
    said = snapshots(hub, tmp_path, "me/code", "me/pickled", "me/secret", "me/none", "me/code@v9")
    assert all(words.startswith("REFUSED") for words in said.values())
    assert "auto_map in config.json" in said["me/code"]
    assert "only pickled weights (pytorch_model.bin)" in said["me/pickled"]
    assert "model_name='me/secret'" in said["me/secret"] and "HF_TOKEN" in said["me/secret"]
    assert "model_name='me/none'" in said["me/none"] and "model_revision='v9'" in said["me/code@v9"]
    assert not [path for path in hub.paths if "safetensors" in path or ".bin" in path]
    wrong = snapshots(hub, tmp_path, "me/secret", HF_TOKEN="hf_wrong")
    assert "HTTP 401" in wrong["me/secret"] and "HF_TOKEN" in wrong["me/secret"]
