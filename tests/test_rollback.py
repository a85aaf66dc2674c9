"""An earlier release published again, by the real huggingface_hub, on a hub on localhost and in MLflow's registry."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from hub_server import Fault, Hub, Repository
from rlhf_ppo.parameters import decode
from test_hub_push import READ, WRITE, compared_with, load, outputs, tracked
from test_hub_push_faults import CASES
from tiny_models import llama

__all__ = ["outputs", "tracked"]  # fixtures

WORK = """
import sys, time
from pathlib import Path
sleep = time.sleep
time.sleep = lambda seconds: sleep(seconds / 100)
from rlhf_ppo import hub
from rlhf_ppo.hub_push.push import publish
from rlhf_ppo.releases import roll_back
from rlhf_ppo.parameters import RunSettings
settings = RunSettings.from_json(sys.argv[1])
hub.LONGEST_SILENCE = 0.3
for line in sys.stdin:
    name, what = line.split()
    try:
        if name == "push":
            answer = publish(settings, Path("policy"), Path("evaluation"), what, {})[1]
        else:
            answer = roll_back("me/film", what).revision
    except Exception as error:
        answer = f"{type(error).__name__}: {error}".splitlines()[0]
    print("ANSWER", answer, flush=True)
"""


class Releases:
    """A repository with three releases, of different weights, and a process that pushes and rolls back."""

    def __init__(self, hub: Hub, place: Path) -> None:
        self.hub, self.place = hub, place
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "RLHF_"))},
            "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(place / "hf"), "HF_TOKEN": WRITE,
            "RLHF_PPO_RETRY_PAUSE": "0.001", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }  # fmt: skip
        needed = {"model_name": "org/base", "query_dataset": "d", "reward_model": "m:f", "hub_repo_id": "me/film"}
        command = [sys.executable, "-c", WORK, decode(needed).to_json()]
        self.process = subprocess.Popen(
            command, cwd=place, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.commits: list[str] = []
        for number in (1, 2, 3):
            llama(seed=number).save_pretrained(place / "policy")
            if self.commits:
                compared_with(place, self.commits[-1])
            self.commits.append(self.ask("push", f"run-{number}"))

    @property
    def repository(self) -> Repository:
        return self.hub.repositories["me/film"]

    def ask(self, name: str, what: str) -> str:
        """Have the process push for a run, or roll back to a release; what it answers."""
        assert self.process.stdin and self.process.stdout
        print(name, what, file=self.process.stdin, flush=True)
        while not (line := self.process.stdout.readline()).startswith("ANSWER "):
            assert line, "the process has ended"
        return line.removeprefix("ANSWER ").strip()

    def cli(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """The command as a user gives it."""
        command = [sys.executable, "-m", "rlhf_pipelines.cli", "rollback", "me/film", *arguments]
        return subprocess.run(command, env={**self.environment, **environment}, capture_output=True, text=True)


@pytest.fixture
def releases(outputs: Path) -> Iterator[Releases]:
    hub = Hub({WRITE: ("me", "write"), READ: ("me", "read")})
    found = Releases(hub, outputs)
    yield found
    found.process.kill()
    found.process.wait()
    hub.close()


def test_a_rollback_publishes_the_release_before_and_then_the_one_before_that(releases: Releases) -> None:
    repository = releases.repository
    first, second, third = (repository.until(commit)[-1][2] for commit in releases.commits)
    repository.commit("Add a licence", {**third, "LICENSE": b"theirs"})
    blobs, requests = dict(releases.hub.blobs), len(releases.hub.paths)
    done = releases.cli()
    assert done.returncode == 0, done.stderr
    head, title, files = repository.commits[-1]
    assert files == {**second, "LICENSE": b"theirs"} and title == "Roll back to run-run-2"
    said = done.stdout.splitlines()
    assert said[0] == f"me/film (main) holds again run-run-2: commit {head}"
    assert "MLflow has no version of" in said[1]
    # The weights stay where they are.
    assert releases.hub.blobs == blobs
    assert not any("/resolve/" in path and "safetensors" in path for path in releases.hub.paths[requests:])
    assert releases.cli().returncode == 0
    assert repository.commits[-1][2] == {**first, "LICENSE": b"theirs"}
    none_left = releases.cli()
    assert none_left.returncode == 2 and "has no release before the current one" in none_left.stderr
    assert len(repository.commits) == 7


def test_what_was_rolled_back_to_loads_with_the_same_logits(releases: Releases) -> None:
    assert releases.cli("--to", "run-run-1").returncode == 0
    code = (
        "from transformers import AutoModelForCausalLM as M; import torch\n"
        "print(M.from_pretrained('me/film')(torch.tensor([[3, 4, 5]])).logits.flatten().tolist())"
    )
    expected = llama(seed=1)(torch.tensor([[3, 4, 5]])).logits.flatten().tolist()
    assert json.loads(load(releases.hub, releases.place, code)) == pytest.approx(expected, abs=1e-5)


def test_files_that_the_release_did_not_have_and_would_be_loaded_are_gone(releases: Releases) -> None:
    repository = releases.repository
    only = {"adapter_model.safetensors": b"x", "adapter_config.json": b"{}", "README.md": b"an adapter"}
    repository.commit("an adapter (pipeline run run-4)", only)
    assert releases.ask("rollback", releases.commits[2]) == repository.commits[-1][0]
    assert repository.commits[-1][2] == repository.until(releases.commits[2])[-1][2]


def test_the_same_rollback_twice_is_one_commit_and_a_rollback_can_be_undone(releases: Releases) -> None:
    back = [releases.ask("rollback", "run-run-1") for _ in range(2)]
    assert back[0] == back[1] == releases.repository.commits[-1][0]
    assert len(releases.repository.commits) == 5
    releases.ask("rollback", "run-run-3")
    assert releases.repository.commits[-1][2] == releases.repository.until(releases.commits[2])[-1][2]


def test_after_a_rollback_a_retried_push_gives_its_old_revision_and_a_new_run_is_compared_with_it(
    releases: Releases,
) -> None:
    back = releases.ask("rollback", "run-run-2")
    assert releases.ask("push", "run-3") == releases.commits[2]
    assert releases.repository.commits[-1][0] == back
    llama(seed=4).save_pretrained(releases.place / "policy")
    compared_with(releases.place, releases.commits[2])
    assert "another model was published since the evaluation" in releases.ask("push", "run-4")
    compared_with(releases.place, back)
    assert releases.ask("push", "run-4") == releases.repository.commits[-1][0]


def test_whatever_fails_once_a_rollback_is_one_whole_commit(releases: Releases) -> None:
    hub, repository = releases.hub, releases.repository
    wanted, before = repository.until(releases.commits[0])[-1][2], list(repository.commits)
    hub.paths.clear()
    releases.ask("rollback", "run-run-1")
    requests = list(hub.paths)
    wrong, cases = [], 0
    for number, request in enumerate(requests):
        for status, takes_effect in CASES:
            repository.branches["main"] = list(before)
            hub.paths.clear()
            hub.fault_at = {number: Fault("", "", status, takes_effect=takes_effect)}
            answer = releases.ask("rollback", "run-run-1")
            commits = repository.commits
            if hub.fault_at or len(commits) != len(before) + 1 or commits[-1][2] != wanted or answer != commits[-1][0]:
                wrong.append((request, status, takes_effect, answer, len(commits)))
            cases += 1
    print(f"{cases} cases")
    assert wrong == [], "\n".join(map(str, wrong))


def test_what_can_not_be_rolled_back_is_said_with_the_remedy(releases: Releases) -> None:
    cases: list[tuple[list[str], dict[str, str], str]] = [
        (["--to", "v9"], {}, "is no tag, branch or commit of me/film; its tags: run-run-1, run-run-2, run-run-3"),
        (["--branch", "candidate"], {}, "knows no such owner, repository or branch"),
        ([], {"HF_TOKEN": ""}, "needs a token that may write there: set HF_TOKEN"),
        ([], {"HF_TOKEN": READ}, "may not write there"),
        ([], {"HF_TOKEN": "hf_unknown"}, "does not know the token"),
    ]
    for arguments, environment, words in cases:
        done = releases.cli(*arguments, **environment)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert len(releases.repository.commits) == 4


def test_the_registry_s_champion_goes_back_too(releases: Releases, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/registry.db"
    client = MlflowClient(store)
    client.create_registered_model("me--film")
    for number, commit in enumerate(releases.commits, 1):
        tags = {"rlhf_ppo.run_id": f"run-{number}", "rlhf_ppo.hub_revision": commit}
        client.create_model_version("me--film", f"s3://store/{number}", tags=tags)
    client.set_registered_model_alias("me--film", "champion", "3")
    done = releases.cli("--mlflow-tracking-uri", store)
    assert done.stdout.splitlines()[1] == "MLflow: me--film version 2 is champion", done.stderr
    aliases = client.get_registered_model("me--film").aliases
    assert {alias: str(number) for alias, number in aliases.items()} == {"champion": "2", "previous": "3"}


def test_a_registry_that_does_not_answer_is_named_with_what_to_do(releases: Releases) -> None:
    done = releases.cli(MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert done.returncode == 1 and "MLflow was not told" in done.stderr
    assert f"rlhf-ppo rollback me/film --to {releases.commits[1]}" in done.stderr
    # Said later, it finds the hub as it is, and tells the registry alone.
    assert releases.cli("--to", releases.commits[1], MLFLOW_TRACKING_URI="").returncode == 0
    assert len(releases.repository.commits) == 5
