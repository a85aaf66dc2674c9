"""The push, by the real huggingface_hub, to a hub on localhost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hub_server import Fault, Hub
from rlhf_ppo.parameters import decode
from tiny_models import llama, word_tokenizer

WRITE, READ = "hf_the_writing_token", "hf_the_reading_token"
PUSH = """
import sys
from pathlib import Path
from rlhf_ppo.steps import running_step
from rlhf_ppo.hub_push.push import push_to_hub
with running_step("push_to_hub"):
    print("REVISION", push_to_hub(sys.argv[1], Path("policy"), Path("evaluation"), sys.argv[2]))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub({WRITE: ("me", "write"), READ: ("me", "read")})
    yield server
    server.close()


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """What training and evaluation leave."""
    policy = tmp_path / "policy"
    llama(seed=3).save_pretrained(policy)
    word_tokenizer().save_pretrained(policy)
    (policy / "training.json").write_text("{}")
    (policy / "value_head.safetensors").write_bytes(b"x")
    interval = {"mean": 0.5, "low": 0.4, "high": 0.6}
    results = {
        "prompts": 64,
        "metrics": {"score": {"policy": interval, "reference": interval, "gain": interval}},
        "kl": interval,
        "lineage": {"prompts": "abc"},
    }
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "evaluation.json").write_text(json.dumps(results))
    return tmp_path


def push(
    hub: Hub, outputs: Path, token: str | None = WRITE, run_id: str = "run-1", **parameters: Any
) -> subprocess.CompletedProcess[str]:
    """One run of the step in a process of its own: huggingface_hub reads its endpoint when it is imported."""
    needed = {"model_name": "org/base", "query_dataset": "d", "reward_model": "m:f", "hub_repo_id": "me/film"}
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "RLHF_"))},
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(outputs / "hf"),
        "RLHF_PPO_RETRY_PAUSE": "0.01",
        **({"HF_TOKEN": token} if token else {}),
    }
    config = decode({**needed, **parameters}).to_json()
    command = [sys.executable, "-c", PUSH, config, run_id]
    return subprocess.run(command, cwd=outputs, env=environment, capture_output=True, text=True)


def revision(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr[-2000:]
    return next(line.split(" ")[1] for line in done.stdout.splitlines() if line.startswith("REVISION"))


def failure(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode != 0
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return next(event for event in events if event["kind"] == "step_failed")


def test_what_was_pushed_loads_with_the_same_logits_and_nothing_else_lies_there(hub: Hub, outputs: Path) -> None:
    pushed = revision(push(hub, outputs))
    repository = hub.repositories["me/film"]
    assert repository.private and repository.commits[-1][0] == pushed and len(repository.commits) == 2
    names = set(repository.commits[-1][2])
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= names
    assert not names & {"training.json", "value_head.safetensors"}
    card = repository.commits[-1][2]["README.md"].decode()
    assert "base_model: org/base" in card and "0.500 [0.400, 0.600]" in card
    code = (
        "from transformers import AutoModelForCausalLM as M; import torch;"
        "print('LOGITS', M.from_pretrained('me/film')(torch.tensor([[3, 4, 5]])).logits.sum().item())"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(outputs / "load"),
                   "HF_TOKEN": READ}  # fmt: skip
    loaded = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr[-2000:]
    expected = llama(seed=3)(torch.tensor([[3, 4, 5]])).logits.sum().item()
    assert float(loaded.stdout.split("LOGITS")[1]) == pytest.approx(expected, abs=1e-3)


def test_without_a_repository_nothing_is_pushed_and_the_log_says_why(hub: Hub, outputs: Path) -> None:
    done = push(hub, outputs, hub_repo_id="")
    assert revision(done) == "" and hub.paths == []
    assert '"push_skipped"' in done.stdout and "set hub_repo_id" in done.stdout


def test_an_answer_that_got_lost_makes_no_second_commit(hub: Hub, outputs: Path) -> None:
    hub.faults = [Fault("POST", "/commit/", 500, takes_effect=True)]
    pushed = revision(push(hub, outputs))
    assert [commit[0] for commit in hub.repositories["me/film"].commits][1:] == [pushed]


def test_a_second_run_of_the_step_gives_the_same_revision_and_another_run_a_new_one(hub: Hub, outputs: Path) -> None:
    first = revision(push(hub, outputs))
    assert revision(push(hub, outputs)) == first
    assert revision(push(hub, outputs, run_id="run-2")) != first
    assert len(hub.repositories["me/film"].commits) == 3


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_hub_is_asked_again(hub: Hub, outputs: Path, status: int) -> None:
    hub.faults = [Fault("POST", "/repos/create", status), Fault("POST", "/commit/", status, times=2)]
    revision(push(hub, outputs))
    assert len(hub.repositories["me/film"].commits) == 2


def test_a_commit_in_between_is_built_upon(hub: Hub, outputs: Path) -> None:
    hub.faults = [Fault("POST", "/commit/", 412)]
    revision(push(hub, outputs))
    assert len(hub.repositories["me/film"].commits) == 2


def test_stale_shards_are_deleted_in_the_same_commit(hub: Hub, outputs: Path) -> None:
    revision(push(hub, outputs))
    files = hub.repositories["me/film"].commits[-1][2]
    files["model-00002-of-00002.safetensors"] = b"old"
    revision(push(hub, outputs, run_id="run-2"))
    assert "model-00002-of-00002.safetensors" not in hub.repositories["me/film"].commits[-1][2]


@pytest.mark.parametrize(
    ("token", "parameters", "words"),
    [
        (None, {}, "set HF_TOKEN"),
        ("hf_unknown", {}, "does not know the token"),
        (READ, {}, "may not write"),
        (WRITE, {"hub_repo_id": "somebody/film"}, "may not write"),
        (WRITE, {"push_to_hub_if_best_kwargs": {"repo_id": "me/film", "branch": "x"}}, "branch"),
    ],
)
def test_what_no_repetition_mends_is_said_at_once_with_the_remedy(
    hub: Hub, outputs: Path, token: str | None, parameters: dict[str, Any], words: str
) -> None:
    done = push(hub, outputs, token=token, **parameters)
    failed = failure(done)
    assert failed["input_error"] and words in failed["message"]
    assert sum("create" in path for path in hub.paths) <= 1


def test_the_token_is_in_no_output_and_no_url(hub: Hub, outputs: Path) -> None:
    hub.faults = [Fault("POST", "/commit/", 400)]
    done = push(hub, outputs)
    assert done.returncode != 0
    written = [path.read_bytes() for path in outputs.rglob("*") if path.is_file()]
    for text in [done.stdout, done.stderr, *hub.paths]:
        assert WRITE not in text
    assert not any(WRITE.encode() in content for content in written)


def test_pickled_weights_are_never_pushed(hub: Hub, outputs: Path) -> None:
    torch.save({}, outputs / "policy" / "pytorch_model.bin")
    assert "only safetensors" in failure(push(hub, outputs))["message"]
