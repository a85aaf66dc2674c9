"""The snapshot: from a directory, a GGUF file or a hub, to frozen safetensors; nothing else gets in."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hub_server import Hub
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


def test_a_tokenizer_without_pad_token_pads_with_the_end(model: Path, tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(model)
    snapshot(model, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path / "reference").pad_token == "</s>"
    assert AutoTokenizer.from_pretrained(tmp_path / "tokenizer").pad_token == "</s>"


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


def test_code_of_a_models_own_is_refused(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    (model / "evil.py").write_text("raise SystemExit('this ran')")
    refused(model, tmp_path, "code of its own .auto_map")


def test_what_is_no_model_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path, "no weights")
    (model / "config.json").unlink()
    refused(model, tmp_path, "no config.json")
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path / "notes.txt", tmp_path, "no GGUF file")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "empty" / name).write_text("x")
    refused(tmp_path / "empty", tmp_path, "2 GGUF files")


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


SNAPSHOT = """
import sys
from pathlib import Path
from rlhf_ppo.reference_snapshot.snapshot import snapshot_reference
print("FOUND", snapshot_reference(sys.argv[1], sys.argv[2], Path("reference"), Path("tokenizer"))["revision"])
"""


def test_a_hub_model_is_taken_at_its_commit_without_pickles_and_code(model: Path, tmp_path: Path) -> None:
    hub = Hub({"hf_t": ("me", "write")})
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    from hub_server import Repository

    hub.repositories["me/base"] = Repository(private=False)
    commit = hub.repositories["me/base"].commit("first", {**files, "pytorch_model.bin": b"p", "modeling.py": b"x"})
    hub.repositories["me/base"].commit("second", {"config.json": b"{}"})
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}

    def run(name: str, revision: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", SNAPSHOT, name, revision]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    done = run("me/base", commit)
    assert f"FOUND {commit}" in done.stdout, done.stderr[-2000:]
    taken = {path.name for path in (tmp_path / "reference").iterdir()}
    assert "model.safetensors" in taken and not taken & {"pytorch_model.bin", "modeling.py"}
    assert not any("pytorch_model" in path or "modeling.py" in path for path in hub.paths)
    for name, revision, words in (("me/none", "", "model_name='me/none'"), ("me/base", "v9", "model_revision='v9'")):
        assert words in run(name, revision).stderr
    hub.close()
