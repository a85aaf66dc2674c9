"""When a run ends early, with a real MLflow server: what counts as new, which runs count, and where nobody can tell."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlflow_server import MLflowServer
from rlhf_ppo.change_detection import detect
from rlhf_ppo.config_validation import validate
from rlhf_ppo.parameters import PARAMETERS, RunSettings, decode, encode
from rlhf_ppo.run_conclusion.conclude import conclude_run
from test_config_validation import Hub, hub  # noqa: F401
from test_local_run import NEEDED, environment, here  # noqa: F401
from test_pipeline import something_else

COMMIT = "0123456789abcdef" * 2 + "01234567"
REWARD = "def score(prompts, responses):\n    return [1.0] * len(responses)\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MLflowServer]:
    started = MLflowServer(tmp_path_factory.mktemp("mlflow")).start()
    yield started
    started.kill()


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user's reward lies; no test sees what the one before imported."""
    for name in ("MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI", "RLHF_PPO_SPOOL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    monkeypatch.setenv("RLHF_PPO_EVENTS", str(tmp_path / "events"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_reward", raising=False)
    (tmp_path / "my_reward.py").write_text(REWARD)
    return tmp_path


def settings(**changes: Any) -> RunSettings:
    given = {"model_name": "org/model", "query_dataset": "org/prompts", "reward_model": "my_reward:score"}
    return decode({**given, "mlflow_skip_unchanged": True, **changes})


class Pipeline:
    """Runs of the pipeline as far as MLflow hears of them, in an experiment of their own."""

    def __init__(self, server: MLflowServer, place: Path) -> None:
        self.server, self.place, self.experiment = server, place, place.name
        self.client = server.client()

    def detects(self, run_id: str, data: str = "d", **changes: Any) -> bool:
        """What the step says."""
        where = {"mlflow_tracking_uri": self.server.url, "tracker_project_name": self.experiment}
        return detect.detect_changes(settings(**{**where, **changes}).to_json(), run_id, "m", data)

    def concludes(self, run_id: str, state: str = "SUCCEEDED") -> None:
        conclude_run(run_id, state, "", mlflow_tracking_uri=self.server.url, experiment=self.experiment)

    def run(self, run_id: str) -> Any:
        """What MLflow has of the pipeline's run."""
        experiment = self.client.get_experiment_by_name(self.experiment)
        (found,) = self.client.search_runs([experiment.experiment_id], f"tags.`rlhf_ppo.run_id` = '{run_id}'")
        return found

    def events(self, kind: str) -> list[dict[str, Any]]:
        lines = (self.place / "events").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["kind"] == kind]


@pytest.fixture
def pipeline(server: MLflowServer, place: Path) -> Pipeline:
    return Pipeline(server, place)


# 1. Which runs count


def test_a_run_with_nothing_new_ends_early_and_says_since_when(
    pipeline: Pipeline, capfd: pytest.CaptureFixture[str]
) -> None:
    assert pipeline.detects("first")
    pipeline.concludes("first")
    for run_id in ("second", "third"):
        assert not pipeline.detects(run_id)
        pipeline.concludes(run_id)
        tags = pipeline.run(run_id).data.tags
        assert tags["rlhf_ppo.unchanged_since"].startswith("first of 20"), "the one that trained, not the one before"
        assert tags["rlhf_ppo.outcome"] == "unchanged" and pipeline.run(run_id).info.status == "FINISHED"
    assert pipeline.run("first").data.tags["rlhf_ppo.outcome"] == "succeeded"
    assert [event["since"].split()[0] for event in pipeline.events("unchanged")] == ["first", "first"]
    assert pipeline.events("note")[0]["message"].startswith("nothing new since the run first of 20")
    assert capfd.readouterr().out.count("nothing was trained: nothing new since the run first of 20") == 2


def test_new_prompts_are_something_to_learn_from(pipeline: Pipeline) -> None:
    assert pipeline.detects("first")
    pipeline.concludes("first")
    assert pipeline.detects("second", data="e")
    pipeline.concludes("second")
    assert not pipeline.detects("third", data="d") and not pipeline.detects("fourth", data="e")


def test_a_run_that_did_not_ask_trains_and_counts_for_those_that_ask(pipeline: Pipeline) -> None:
    for run_id in ("first", "second"):
        assert pipeline.detects(run_id, mlflow_skip_unchanged=False)
        pipeline.concludes(run_id)
    assert not pipeline.detects("third")
    assert "rlhf_ppo.unchanged_since" not in pipeline.run("second").data.tags


@pytest.mark.parametrize("how", ["failed", "goes on", "was deleted", "is another experiment's"])
def test_a_run_does_not_count_that(pipeline: Pipeline, how: str) -> None:
    assert pipeline.detects("first")
    if how != "goes on":
        pipeline.concludes("first", "FAILED" if how == "failed" else "SUCCEEDED")
    if how == "was deleted":
        pipeline.client.delete_run(pipeline.run("first").info.run_id)
    if how == "is another experiment's":
        pipeline.experiment += " 2"
    assert pipeline.detects("second")
    pipeline.concludes("second")
    assert pipeline.run("second").data.tags["rlhf_ppo.outcome"] == "succeeded"
    assert not pipeline.detects("third")


def test_a_repeated_attempt_is_not_ended_by_its_own_mark(pipeline: Pipeline) -> None:
    assert pipeline.detects("first") and pipeline.detects("first")
    assert pipeline.run("first").info.status == "RUNNING"


@pytest.mark.parametrize("moved", ["models", "datasets"])
def test_a_new_commit_of_model_or_prompts_on_the_hub_is_something_to_learn_from(
    pipeline: Pipeline,
    hub: type[Hub],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    moved: str,
) -> None:
    """Two scheduled runs with the same parameters, which name no revision: the commits of the moment decide."""
    given = {"model_name": "me/thing", "query_dataset": "me/thing", "reward_model": "my_reward:score"}
    where = {"mlflow_tracking_uri": pipeline.server.url, "tracker_project_name": pipeline.experiment}

    def run(run_id: str) -> bool:
        config = validate.validate_config({**given, **where, "mlflow_skip_unchanged": True})
        keys = validate.cache_keys(config)
        changed = detect.detect_changes(config, run_id, keys.model_digest, keys.data_digest)
        pipeline.concludes(run_id)
        return changed

    assert [run("first"), run("second")] == [True, False]
    answer = hub.answer

    def with_a_new_commit(self: Hub, code: int, body: dict[str, str], error: str = "") -> None:
        answer(self, code, {**body, "sha": "f" * 40} if f"/api/{moved}/" in self.path else body, error)

    monkeypatch.setattr(hub, "answer", with_a_new_commit)
    assert [run("third"), run("fourth")] == [True, False]


# 2. With KFP's MLflow plugin, which has a run for the pipeline and one for each task, at any depth


class WithPlugin(Pipeline):
    """KFP makes and ends the runs; the step's pod knows that of its own task alone."""

    def __init__(self, server: MLflowServer, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(server, place)
        self.monkeypatch = monkeypatch
        self.of_kfp = self.client.create_experiment(f"{self.experiment} of kfp")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)

    def start(self, run_id: str) -> str:
        """Make the run; returns its id in MLflow."""
        return str(self.client.create_run(self.of_kfp, tags={"kfp.pipeline_run_id": run_id}).info.run_id)

    def task(self, root: str) -> str:
        """Make a task's run, in that of the group that it stands in, and inject it."""
        for _ in range(2):
            root = self.client.create_run(self.of_kfp, tags={"mlflow.parentRunId": root}).info.run_id
        self.monkeypatch.setenv("MLFLOW_RUN_ID", root)
        return root


def test_with_the_plugin_it_is_kfp_s_run_of_the_pipeline_that_counts_and_not_the_task_s(
    server: MLflowServer, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pipeline = WithPlugin(server, place, monkeypatch)
    for run_id, status, expected in (("a", "FAILED", True), ("b", "FINISHED", True), ("c", "FINISHED", False)):
        root = pipeline.start(run_id)
        task = pipeline.task(root)
        assert pipeline.detects(run_id) is expected, run_id
        pipeline.client.set_terminated(task, "FINISHED")
        pipeline.task(root)
        pipeline.concludes(run_id)
        run = pipeline.client.get_run(root)
        assert run.info.status == "RUNNING", "its end is left to KFP"
        assert run.data.tags.get("rlhf_ppo.unchanged_since", "").startswith("b of 20") is not expected
        pipeline.client.set_terminated(root, status)
    assert pipeline.client.get_experiment_by_name(pipeline.experiment) is None
    assert capfd.readouterr().out.count("nothing was trained") == 1


# 3. What counts as new


def mark(**changes: Any) -> str:
    return detect.fingerprint(settings(**changes), "m", "d")


def test_what_a_run_is_called_where_it_runs_and_how_it_is_kept_does_not_count_and_all_else_does() -> None:
    base = settings()
    values = encode(base)

    def with_value(name: str, value: Any) -> str:
        given: Any = SimpleNamespace(**vars(base), to_json=lambda: json.dumps({**values, name: value}))
        return detect.fingerprint(given, "m", "d")

    counted = {name for name, p in PARAMETERS.items() if with_value(name, something_else(p)) != mark()}
    names = "exp_name task_name log_with tracker_kwargs project_kwargs tracker_project_name mlflow_tracking_uri"
    left = {*names.split(), "mlflow_skip_unchanged", "optimize_device_cache", "reward_deadline_seconds"}
    left |= {name for name in PARAMETERS if name.startswith(("checkpoint_", "node_"))}
    # Processes each have batch_size samples, and the image holds the code.
    left -= {"node_image", "node_accelerator_count", "node_processes", "node_count"}
    assert set(PARAMETERS) - counted == left


def test_model_and_data_count_by_what_they_hold() -> None:
    marks = [detect.fingerprint(settings(), *digests) for digests in (("m", "d"), ("n", "d"), ("m", "e"), ("d", "m"))]
    assert len(set(marks)) == 4


@pytest.mark.parametrize("name", ["__version__", "code_commit"])
def test_the_code_of_this_package_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = mark()
    monkeypatch.setattr(detect, name, "9" if name == "__version__" else lambda: "another commit")
    assert mark() != before


def test_the_code_of_a_reward_counts_and_of_a_package_all_of_it(place: Path) -> None:
    package = place / "my_rewards"
    (package / "words").mkdir(parents=True)
    for file in ("__init__.py", "length.py", "words/__init__.py", "words/bad.txt"):
        (package / file).write_text("")
    changes: dict[str, Any] = {"reward_sum": {"my_rewards.length:score": 2.0}}
    marks = [mark(**changes)]
    for file, counts in (("length.py", True), ("words/bad.txt", True), ("words/__pycache__/bad.pyc", False)):
        (package / file).parent.mkdir(exist_ok=True)
        (package / file).write_text("changed = 1\n")
        marks.append(mark(**changes))
        assert (marks[-1] != marks[-2]) is counts, file
    (place / "my_reward.py").write_text(REWARD + "\n")
    assert mark(**changes) not in marks


@pytest.mark.parametrize("parameter", ["reward_model", "reward_sum", "eval_judge", "ppo_value_head"])
def test_local_weights_count_by_what_they_hold(place: Path, parameter: str) -> None:
    weights = place / "weights"
    weights.mkdir()
    (weights / "model.safetensors").write_text("one")
    given = {str(weights): 1.0} if parameter == "reward_sum" else str(weights)
    before = mark(**{parameter: given})
    assert mark(**{parameter: given}) == before
    (weights / "model.safetensors").write_text("two")
    assert mark(**{parameter: given}) != before


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"reward_model": "org/reward", "reward_revision": COMMIT}, True),
        ({"reward_model": "org/reward", "reward_revision": "main"}, False),
        ({"reward_model": "org/reward"}, False),
        ({"reward_sum": {f"org/other@{COMMIT}": 1.0}}, True),
        ({"reward_sum": {"org/other": 1.0}}, False),
        ({"eval_judge": f"org/judge@{COMMIT}"}, True),
        ({"eval_judge": "org/judge"}, False),
        ({"reward_model": "https://rewards.example/score"}, True),
        ({"reward_model": "not_there:score"}, False),
        ({"reward_model": "sys:exit"}, False),
    ],
)
def test_what_can_not_be_told_is_never_the_same(changes: dict[str, Any], told: bool) -> None:
    """A branch may be another commit tomorrow; of an endpoint the documentation says that it is not looked at."""
    assert (mark(**changes) == mark(**changes)) is told


# 4. Where nobody can tell


def test_without_a_server_a_run_trains_and_says_why(pipeline: Pipeline, capfd: pytest.CaptureFixture[str]) -> None:
    nowhere = {"mlflow_tracking_uri": "http://127.0.0.1:9"}
    assert pipeline.detects("first", **nowhere)
    (note,) = pipeline.events("note")
    assert note["message"].startswith("nobody can tell whether there is something new, so there is (")
    assert pipeline.detects("second", mlflow_skip_unchanged=False, **nowhere)
    assert len(pipeline.events("note")) == 1 and "[tracking] the run is not marked" in capfd.readouterr().out


def test_a_server_that_hangs_keeps_no_run(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "DEADLINE", 0.1)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "600")
    pipeline.server.signal(signal.SIGSTOP)
    try:
        assert pipeline.detects("first")
    finally:
        pipeline.server.signal(signal.SIGCONT)
    assert "MLflow does not answer" in pipeline.events("note")[0]["message"]


# 5. The pipeline


@pytest.mark.slow
def test_a_local_run_ends_early_only_after_one_that_succeeded(here: Path) -> None:  # noqa: F811
    command = [sys.executable, "-m", "rlhf_pipelines.cli", "run", *NEEDED, "--set", "mlflow_skip_unchanged=true"]

    def run(**changes: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        (here / "calls").write_text("")
        real = environment(here, REAL="detect,conclude", MLFLOW_HTTP_REQUEST_TIMEOUT="30", **changes)
        done = subprocess.run(command, cwd=here, env=real, capture_output=True, text=True)
        return done, [json.loads(line)["step"] for line in (here / "calls").read_text().splitlines()]

    all_steps = ["snapshot_reference", "prepare_dataset", "train_ppo", "evaluate_policy", "gate"]
    assert run(FAILS="train_ppo")[1] == all_steps[:3]
    done, steps = run(GATE="false")  # What was held back would be held back again.
    assert (done.returncode, steps) == (0, all_steps) and "Model    runs/" in done.stdout
    done, steps = run()
    assert (done.returncode, steps) == (0, [])
    assert "detect_changes      nothing new since the run " in done.stdout
    summary = done.stdout.partition("\nEnded    early, with nothing new since the run ")[2]
    assert "Log      runs/" in summary and "MLflow   experiment trl, run " in summary
    assert "Model" not in summary and "Report" not in summary
    (here / "prompts.jsonl").write_text('{"prompt": "another"}\n')
    assert run(GATE="true")[1] == [*all_steps, "push_to_hub"]
