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
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from hub_server import CUT, Commit, Fault, Hub, Repository
from rlhf_ppo.hub_push.card import model_card, shown
from rlhf_ppo.parameters import decode
from rlhf_ppo.ppo import PolicyWithValueHead
from rlhf_ppo.ppo_training.policy_files import save_policy
from rlhf_ppo.ppo_training.train import with_adapters
from rlhf_ppo.settings import ModelSettings
from tiny_models import llama, word_tokenizer

WRITE, READ = "hf_the_writing_token", "hf_the_reading_token"
PUSH = """
import sys
from pathlib import Path
from rlhf_ppo.steps import running_step
from rlhf_ppo.hub_push.push import push_to_hub
with running_step("push_to_hub"):
    print("REVISION", push_to_hub(sys.argv[1], Path("policy"), Path("evaluation"), sys.argv[2], "s3://store/policy"))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub({WRITE: ("me", "write"), READ: ("me", "read")})
    yield server
    server.close()


@pytest.fixture(scope="module", autouse=True)
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One MLflow store for all pushes: to make one takes longer than a push."""
    with pytest.MonkeyPatch.context() as patch:
        store = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
        patch.setenv("MLFLOW_TRACKING_URI", store)
        yield store


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """What training and evaluation leave."""
    policy = tmp_path / "policy"
    llama(seed=3).save_pretrained(policy)
    word_tokenizer().save_pretrained(policy)
    (policy / "training.json").write_text("{}")
    (policy / "value_head.safetensors").write_bytes(b"x")
    (policy / "adapter").mkdir()
    (policy / "adapter" / "adapter_model.safetensors").write_bytes(b"x")
    found = {
        "policy": {"mean": 0.5},
        "reference": {"mean": -0.25},
        "gain": {"mean": 0.75, "low": 0.4, "high": 1.125},
    }
    results = {
        "prompts": 64,
        "metrics": {"score": found, "response_length": found},
        "kl": {"mean": 3.0},
        "distinct2_ratio": 0.97,
        "win_rate": {"mean": 0.8, "low": 0.7, "high": 0.9},
        "lineage": {"model": "org/base", "model revision": "c0ffee", "prompts digest": "abc", "best PPO step": 0},
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


def compared_with(outputs: Path, champion: str) -> None:
    """Let the evaluation have compared the policy with what a commit published."""
    path = outputs / "evaluation" / "evaluation.json"
    results = json.loads(path.read_text())
    gain = {"mean": 0.25, "low": 0.125, "high": 0.375}
    against = {"repo_id": "me/film", "revision": champion, "metrics": {"score": {"gain": gain}}}
    path.write_text(json.dumps({**results, "champion": against}))


def revision(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr[-2000:]
    return next(line.split(" ")[1] for line in done.stdout.splitlines() if line.startswith("REVISION"))


def failure(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode != 0
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return next(event for event in events if event["kind"] == "step_failed")


def test_what_was_pushed_loads_with_the_same_logits_and_the_usage_in_its_card_runs(hub: Hub, outputs: Path) -> None:
    pushed = revision(push(hub, outputs))
    repository = hub.repositories["me/film"]
    assert repository.private and repository.commits[-1][0] == pushed and len(repository.commits) == 2
    usage = repository.commits[-1][2]["README.md"].decode().split("```python\n")[1].split("```")[0]
    logits = (
        "from transformers import AutoModelForCausalLM as M; import torch\n"
        "print('LOGITS', M.from_pretrained('me/film')(torch.tensor([[3, 4, 5]])).logits.flatten().tolist())"
    )
    text, _, found = load(hub, outputs, f"{usage}\n{logits}").partition("LOGITS")
    expected = llama(seed=3)(torch.tensor([[3, 4, 5]])).logits.flatten().tolist()
    assert json.loads(found) == pytest.approx(expected, abs=1e-5)
    assert "Once upon a time" in text


def test_only_the_model_its_tokenizer_and_a_card_with_results_are_pushed(hub: Hub, outputs: Path) -> None:
    revision(push(hub, outputs))
    files = hub.repositories["me/film"].commits[-1][2]
    needed = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert needed <= set(files)
    assert set(files) - needed <= {".gitattributes", "README.md", "special_tokens_map.json"}
    card = ModelCard(files["README.md"].decode())
    assert card.data.get("base_model") == "org/base"
    assert {result.metric_type: result.metric_value for result in card.data.get("eval_results") or []} == {
        "score": 0.5,
        "win_rate": 0.8,
        "kl": 3.0,
    }
    assert "| score | -0.250 | 0.500 | 0.750 [0.400, 1.125] |" in card.text
    assert "- model revision: `c0ffee`" in card.text and "- best PPO step: `0`" in card.text


def load(hub: Hub, outputs: Path, code: str) -> str:
    """What a user's script prints, who may read the repository and has nothing cached."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(outputs / "load"),
                   "HF_TOKEN": READ}  # fmt: skip
    loaded = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr[-2000:]
    return loaded.stdout


def trained_with_adapters(outputs: Path) -> None:
    """Let the policy be one that was trained with LoRA, on a base that lies in a directory of the run."""
    torch.manual_seed(0)
    base = llama(seed=3)
    base.name_or_path = "/runs/steps/reference"
    policy = with_adapters(base, ModelSettings(model_lora_r=4), "CAUSAL_LM")
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    save_policy(PolicyWithValueHead(policy), word_tokenizer(), outputs / "policy")


LOGITS = "(torch.tensor([[3, 4, 5]])).logits.flatten().tolist())"
ADAPTER = {"hub_adapter": True, "model_lora_r": 4}


def test_an_adapter_is_pushed_alone_by_choice_and_its_card_s_usage_runs(hub: Hub, outputs: Path) -> None:
    trained_with_adapters(outputs)
    base = hub.repositories["org/base"] = Repository(private=False)
    llama(seed=3).save_pretrained(outputs / "base")
    commit = base.commit("base", {path.name: path.read_bytes() for path in (outputs / "base").iterdir()})
    base.commit("broken since", {"config.json": b""})
    revision(push(hub, outputs, model_revision=commit, **ADAPTER))
    files = hub.repositories["me/film"].commits[-1][2]
    assert {name for name in files if name.endswith(".safetensors")} == {"adapter_model.safetensors"}
    assert "config.json" not in files and "tokenizer.json" in files
    config = json.loads(files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", commit)
    card = ModelCard(files["README.md"].decode())
    assert (card.data.get("library_name"), card.data.get("base_model_relation")) == ("peft", "adapter")
    usage = card.text.split("```python\n")[1].split("```")[0]
    logits = f"import torch\nprint('LOGITS', model{LOGITS}"
    text, _, found = load(hub, outputs, f"{usage}\n{logits}").partition("LOGITS")
    merged = AutoModelForCausalLM.from_pretrained(outputs / "policy")
    expected = merged(torch.tensor([[3, 4, 5]])).logits.flatten().tolist()
    assert json.loads(found) == pytest.approx(expected, abs=1e-5) and "Once upon a time" in text


def test_a_merged_model_takes_the_place_of_an_adapter_and_the_other_way_round(hub: Hub, outputs: Path) -> None:
    trained_with_adapters(outputs)
    found = []
    for number, adapter in enumerate((True, False, True)):
        commit = revision(push(hub, outputs, run_id=f"run-{number}", model_lora_r=4, hub_adapter=adapter))
        compared_with(outputs, commit)
        found.append(set(hub.repositories["me/film"].commits[-1][2]))
    only_adapter = {"adapter_config.json", "adapter_model.safetensors"}
    assert found[0] == found[2] and found[0] - found[1] == only_adapter
    assert found[1] - found[0] == {"config.json", "generation_config.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("source", "seen"),
    [
        ("org/base", "org/base"),
        ("/home/anna/models/base", "base"),
        ("s3://key:secret@store/prompts.jsonl", "s3://store/prompts.jsonl"),
        ("my_reward:score", "my_reward:score"),
    ],
)
def test_the_card_shows_no_directories_and_no_credentials(source: str, seen: str) -> None:
    assert shown(source) == seen


def test_a_model_that_is_not_from_the_hub_is_no_base_model_of_the_card() -> None:
    settings = decode({"model_name": "models/base", "query_dataset": "d", "reward_model": "m:f"})
    found = {"policy": {"mean": 0.5}, "reference": {"mean": 0.5}, "gain": {"mean": 0.0, "low": 0.0, "high": 0.0}}
    results = {
        "prompts": 1,
        "metrics": {"score": found, "response_length": found},
        "kl": {"mean": 0.0},
        "distinct2_ratio": 1.0,
        "win_rate": found["policy"] | {"low": 0.5, "high": 0.5},
        "lineage": {"model": "models/base", "model revision": None},
    }
    assert "base_model" not in model_card(settings, results, "me/film")


def test_without_a_repository_nothing_is_pushed_and_the_log_says_why(hub: Hub, outputs: Path) -> None:
    done = push(hub, outputs, hub_repo_id="")
    assert revision(done) == "" and hub.paths == []
    assert '"push_skipped"' in done.stdout and "set hub_repo_id" in done.stdout


REQUESTS = [
    ("POST", "/repos/create"),
    ("GET", "/commits/"),
    ("GET", "/tree/"),
    ("POST", "/preupload/"),
    ("POST", "/objects/batch"),
    ("PUT", "/blobs/"),
    ("POST", "/commit/"),
]


@pytest.mark.parametrize("takes_effect", [False, True])
@pytest.mark.parametrize("status", [503, CUT])
def test_whichever_request_or_answer_gets_lost_there_is_one_complete_commit(
    hub: Hub, outputs: Path, status: int, takes_effect: bool
) -> None:
    hub.faults = [Fault(method, path, status, takes_effect=takes_effect) for method, path in REQUESTS]
    pushed = revision(push(hub, outputs))
    assert all(fault.times == 0 for fault in hub.faults)
    assert [commit[0] for commit in hub.repositories["me/film"].commits][1:] == [pushed]
    assert {"model.safetensors", "config.json", "README.md"} <= set(hub.repositories["me/film"].commits[-1][2])


def test_a_second_run_of_the_step_gives_the_same_revision_and_another_run_a_new_one(hub: Hub, outputs: Path) -> None:
    # The name of the second begins with that of the first.
    first = revision(push(hub, outputs, run_id="run-10"))
    compared_with(outputs, first)
    second = revision(push(hub, outputs, run_id="run-1"))
    assert first != second
    assert [revision(push(hub, outputs, run_id=run_id)) for run_id in ("run-10", "run-1")] == [first, second]
    assert len(hub.repositories["me/film"].commits) == 3


def test_the_keyword_arguments_are_honoured(hub: Hub, outputs: Path) -> None:
    given = {"repo_id": "film", "private": False, "revision": "candidate", "commit_message": "Kinder\nand shorter."}
    pushed = [revision(push(hub, outputs, hub_repo_id="", push_to_hub_if_best_kwargs=given)) for _ in range(2)]
    repository = hub.repositories["me/film"]  # the hub knows whose token it is
    assert not repository.private and len(repository.commits) == 1
    assert pushed == [repository.branches["candidate"][-1][0]] * 2
    assert [commit[1] for commit in repository.branches["candidate"][1:]] == ["Kinder (pipeline run run-1)"]


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_hub_is_asked_again(hub: Hub, outputs: Path, status: int) -> None:
    hub.faults = [Fault("POST", "/repos/create", status), Fault("POST", "/commit/", status, times=2)]
    revision(push(hub, outputs))
    assert len(hub.repositories["me/film"].commits) == 2


class Busy(Repository):
    """A repository where somebody else commits ``added`` right after it was looked at for the first time."""

    busy = True
    added: dict[str, bytes] = {}

    def until(self, revision: str) -> list[Commit]:
        found = super().until(revision)
        if revision != "main" and self.busy:
            self.busy = False
            self.commit("theirs", {**found[-1][2], **self.added})
        return found


def busy(hub: Hub, outputs: Path, added: dict[str, bytes]) -> Busy:
    """One with a model that the policy was compared with."""
    repository = hub.repositories["me/film"] = Busy(private=True)
    repository.added = added
    files = {"pytorch_model.bin": b"x", "model-00002-of-00002.safetensors": b"x"}
    compared_with(outputs, repository.commit("initial", files))
    return repository


def test_a_commit_in_between_is_built_upon(hub: Hub, outputs: Path) -> None:
    repository = busy(hub, outputs, {"LICENSE": b"theirs"})
    revision(push(hub, outputs))
    assert [commit[1] for commit in repository.commits] == ["initial", "theirs", "rlhf-ppo (pipeline run run-1)"]
    files = repository.commits[-1][2]
    assert "LICENSE" in files and not {"model-00002-of-00002.safetensors", "pytorch_model.bin"} & set(files)


@pytest.mark.parametrize("added", [{"model-00002-of-00002.safetensors": b"y"}, {"model.safetensors": b"theirs"}])
def test_a_model_that_was_published_since_the_evaluation_is_not_pushed_over(
    hub: Hub, outputs: Path, added: dict[str, bytes]
) -> None:
    repository = busy(hub, outputs, added)
    failed = failure(push(hub, outputs))
    assert failed["input_error"] and "another model was published since the evaluation" in failed["message"]
    assert [commit[1] for commit in repository.commits] == ["initial", "theirs"]


def test_a_model_that_the_evaluation_did_not_see_is_not_pushed_over(hub: Hub, outputs: Path) -> None:
    hub.repositories["me/film"] = Repository(private=True)
    hub.repositories["me/film"].commit("initial", {"model.safetensors": b"x"})
    assert "the evaluation found no model there" in failure(push(hub, outputs))["message"]
    assert len(hub.repositories["me/film"].commits) == 1


@pytest.mark.parametrize(
    ("token", "parameters", "words"),
    [
        (None, {}, "set HF_TOKEN"),
        ("hf_unknown", {}, "does not know the token"),
        (READ, {}, "may not write"),
        (WRITE, {"hub_repo_id": "somebody/film"}, "may not write"),
        (WRITE, {"hub_repo_id": "a/b/c"}, "can't be a repository"),
        (WRITE, {"push_to_hub_if_best_kwargs": {"repo_id": "me/film", "branch": "x"}}, "has branch: it may hold"),
        (WRITE, {"push_to_hub_if_best_kwargs": {"repo_id": "me/film", "private": "false"}}, "private is a str"),
        (WRITE, {"push_to_hub_if_best_kwargs": {"repo_id": "me/film", "token": "hf_x"}}, "set HF_TOKEN instead"),
    ],
)
def test_what_no_repetition_mends_is_said_at_once_with_the_remedy(
    hub: Hub, outputs: Path, token: str | None, parameters: dict[str, Any], words: str
) -> None:
    done = push(hub, outputs, token=token, **parameters)
    failed = failure(done)
    assert failed["input_error"] and words in failed["message"]
    assert sum("create" in path for path in hub.paths) <= 1


@pytest.mark.parametrize(
    ("token", "parameters"),
    [
        (WRITE, {}),
        (WRITE + "\n", {}),
        (WRITE[:6] + "\n" + WRITE[6:], {}),
        (WRITE, {"push_to_hub_if_best_kwargs": {"repo_id": "me/film", "token": WRITE}}),
    ],
)
def test_the_token_is_in_no_output_no_error_and_no_url(
    hub: Hub, outputs: Path, token: str, parameters: dict[str, Any]
) -> None:
    hub.faults = [Fault("POST", "/commit/", 400)]
    done = push(hub, outputs, token=token, **parameters)
    assert done.returncode != 0
    written = [path.read_text(errors="replace") for path in outputs.rglob("*") if path.is_file()]
    assert not any(
        secret in text for text in [done.stdout, done.stderr, *hub.paths, *written] for secret in (WRITE, WRITE[6:])
    )


def test_a_token_with_a_line_break_at_its_end_as_secrets_have_it_works(hub: Hub, outputs: Path) -> None:
    revision(push(hub, outputs, token=WRITE + "\n"))


def test_pickled_weights_are_never_pushed(hub: Hub, outputs: Path) -> None:
    torch.save({}, outputs / "policy" / "pytorch_model.bin")
    assert "only safetensors" in failure(push(hub, outputs))["message"]
