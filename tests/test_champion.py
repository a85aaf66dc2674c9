"""The published model, which the policy is compared with: from a hub on localhost, by the real huggingface_hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
import torch

from hub_server import CUT, SILENT, Fault, Hub, Repository
from rlhf_ppo.parameters import decode
from rlhf_ppo.ppo import PolicyWithValueHead
from rlhf_ppo.ppo_training.policy_files import save_policy
from rlhf_ppo.ppo_training.train import with_adapters
from rlhf_ppo.settings import ModelSettings
from test_policy_evaluation import EACH, PROMPTS, events, inputs, strictly, told
from tiny_models import VOCABULARY, llama, word_tokenizer

EVALUATE = """
import sys
from pathlib import Path
from rlhf_ppo import hub
from rlhf_ppo.policy_evaluation.evaluate import evaluate_policy
hub.LONGEST_SILENCE = 2.0
place, out = Path(sys.argv[2]), Path(sys.argv[3])
evaluate_policy(sys.argv[1], place / "prompts", place / "reference", place / "policy", place / "history",
                out / "evaluation", out / "report", "run-1", "s3://store/policy")
"""
TOKEN = "hf_the_writing_token"


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub({TOKEN: ("me", "write")})
    yield server
    server.close()


def publish(hub: Hub, directory: Path) -> str:
    """Put the files of ``directory`` into the repository me/film; returns the commit."""
    hub.repositories["me/film"] = Repository(private=True)
    files = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    return hub.repositories["me/film"].commit("published", files)


def evaluate_with(hub: Hub, inputs: Path, out: Path, token: str = TOKEN, **parameters: Any) -> dict[str, Any]:
    """Evaluate in a process of its own: huggingface_hub reads its endpoint when it is imported."""
    given = {
        "model_name": "org/base", "query_dataset": "prompts.jsonl", "reward_model": "test_policy_evaluation:word_count",
        "rollout_max_new_tokens": 8, "eval_max_prompts": PROMPTS, "eval_samples_per_prompt": EACH,
        "gate_min_prompts": 2, "hub_repo_id": "me/film", "mlflow_tracking_uri": f"sqlite:///{out}/mlflow.db",
        **parameters,
    }  # fmt: skip
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(out / "hf"), "HF_TOKEN": token,
        "PYTHONPATH": os.pathsep.join(sys.path), "RLHF_PPO_RETRY_PAUSE": "0.01",
    }  # fmt: skip
    command = [sys.executable, "-c", EVALUATE, decode(given).to_json(), str(inputs), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = strictly(out / "evaluation" / "evaluation.json")
    return found


def test_the_policy_is_compared_with_what_is_published_on_the_same_prompts_and_seeds(
    hub: Hub, inputs: Path, tmp_path: Path
) -> None:
    commit = publish(hub, inputs / "policy")
    found = evaluate_with(hub, inputs, tmp_path)
    champion = found["champion"]
    # The published model is the policy itself: the same responses, no gain, no win.
    assert (champion["repo_id"], champion["revision"]) == ("me/film", commit)
    zero = {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert champion["metrics"].keys() == found["metrics"].keys() and champion["win_rate"]["mean"] == 0.5
    for name, of in champion["metrics"].items():
        assert of["champion"] == of["policy"] == found["metrics"][name]["policy"] and of["gain"] == zero
    assert all(abs(end) < 1e-4 for kind in ("kl", "kl3") for end in champion[kind].values())
    assert abs(found["kl"]["mean"]) > 0.01, "the reference is another"
    rows = parquet.read_table(tmp_path / "evaluation" / "samples.parquet").to_pylist()
    assert [row["champion"] for row in rows] == [row["policy"] for row in rows]
    assert not found["verdict"]["passed"]
    (reason,) = [text for text in found["verdict"]["reasons"] if "gate_min_champion_gain=0" in text]
    assert reason.startswith("held: score gain 0 [0, 0] over the published model")
    assert "me/film as published" in (tmp_path / "report").read_text()


def test_a_published_model_with_other_tokens_reads_and_says_the_same_texts(
    hub: Hub, inputs: Path, tmp_path: Path
) -> None:
    """The published model is the policy with its words numbered the other way round."""
    other = tmp_path / "other"
    policy, words = llama(seed=7), word_tokenizer()
    order = torch.tensor([0, 1, 2, *range(VOCABULARY - 1, 2, -1)])
    with torch.no_grad():
        for layer in (policy.get_input_embeddings(), policy.get_output_embeddings()):
            layer.weight.copy_(layer.weight[order].clone())
    policy.save_pretrained(other)
    words.save_pretrained(other)
    numbered = json.loads((other / "tokenizer.json").read_text())
    vocabulary = numbered["model"]["vocab"]
    numbered["model"]["vocab"] = {word: int(order[number]) for word, number in vocabulary.items()}
    (other / "tokenizer.json").write_text(json.dumps(numbered))
    publish(hub, other)
    # All but greedy: a sampled choice depends on the order of the words.
    found = evaluate_with(hub, inputs, tmp_path, rollout_temperature=1e-6)
    rows = parquet.read_table(tmp_path / "evaluation" / "samples.parquet").to_pylist()
    assert [row["champion"] for row in rows] == [row["policy"] for row in rows]
    assert len({row["policy"] for row in rows}) > 1 and found["champion"]["metrics"]["score"]["gain"]["mean"] == 0
    # Probabilities of other tokens are not comparable.
    assert "nll" not in found["champion"]["metrics"] and "kl" not in found["champion"]


@pytest.mark.parametrize("case", ["no repository", "no weights", "no rights"])
def test_where_no_model_is_published_nothing_is_compared_with(
    hub: Hub, inputs: Path, tmp_path: Path, events: Path, case: str
) -> None:
    if case != "no repository":
        publish(hub, inputs / "policy")
    if case == "no weights":
        del hub.repositories["me/film"].commits[-1][2]["model.safetensors"]
    found = evaluate_with(hub, inputs, tmp_path, token="" if case == "no rights" else TOKEN)
    assert "champion" not in found
    assert told(events, "note")[-1]["message"] == "no model is published as me/film (main) so far"


def test_a_hub_that_fails_for_a_moment_is_asked_again(hub: Hub, inputs: Path, tmp_path: Path) -> None:
    commit = publish(hub, inputs / "policy")
    looked_at = "/api/models/me/film/revision"
    hub.faults = [Fault("GET", looked_at, how, times=2) for how in (503, SILENT)] + [Fault("GET", "/api/models", CUT)]
    assert evaluate_with(hub, inputs, tmp_path)["champion"]["revision"] == commit
    assert not any(fault.times for fault in hub.faults)


@pytest.mark.parametrize("base", ["the run's own", "another"])
def test_a_published_adapter_is_compared_with_on_its_base(hub: Hub, inputs: Path, tmp_path: Path, base: str) -> None:
    torch.manual_seed(0)
    trunk = llama(seed=0 if base == "the run's own" else 5)
    adapted = with_adapters(trunk, ModelSettings(model_lora_r=4), "CAUSAL_LM")
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    save_policy(PolicyWithValueHead(adapted), word_tokenizer(), tmp_path / "published")
    config = json.loads((tmp_path / "published" / "adapter" / "adapter_config.json").read_text())
    bases = hub.repositories["org/another"] = Repository(private=True)
    llama(seed=5).save_pretrained(tmp_path / "base")
    commit = bases.commit("base", {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()})
    bases.commit("other weights", {})
    named = ("org/base", "a" * 40) if base == "the run's own" else ("org/another", commit)
    config["base_model_name_or_path"], config["revision"] = named
    champions = {}
    for kind in ("merged", "adapter"):
        published = hub.repositories["me/film"] = Repository(private=True)
        where = tmp_path / "published" / ("adapter" if kind == "adapter" else "")
        files = {path.name: path.read_bytes() for path in where.iterdir() if path.is_file()}
        if kind == "adapter":
            tokenizer = {p.name: p.read_bytes() for p in where.parent.glob("*token*")}
            files |= {**tokenizer, "adapter_config.json": json.dumps(config).encode()}
        published.commit(kind, files)
        out = tmp_path / kind
        out.mkdir()
        evaluate_with(hub, inputs, out, model_revision="a" * 40)
        rows = parquet.read_table(out / "evaluation" / "samples.parquet").to_pylist()
        champions[kind] = [row["champion"] for row in rows]
    assert champions["adapter"] == champions["merged"]
    assert champions["adapter"] != [row["reference"] for row in rows]
    assert any("/org/another" in path for path in hub.paths) == (base == "another")


def test_an_adapter_that_names_no_base_is_an_error_that_says_so(hub: Hub, inputs: Path, tmp_path: Path) -> None:
    hub.repositories["me/film"] = Repository(private=True)
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}
    for path in inputs.joinpath("policy").glob("*token*"):
        files[path.name] = path.read_bytes()
    hub.repositories["me/film"].commit("adapter", files)
    with pytest.raises(AssertionError, match="holds an adapter that names no base model"):
        evaluate_with(hub, inputs, tmp_path)
