"""Tracking against a real MLflow server that is dead at first, dies in between, or is dead at the end."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import rlhf_ppo.tracking as tracking
from mlflow_server import MLflowServer
from rlhf_ppo.errors import InputError
from rlhf_ppo.run_conclusion.conclude import conclude_run
from rlhf_ppo.tracking import Tracker, resend


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MLflowServer]:
    started = MLflowServer(tmp_path_factory.mktemp("mlflow"))
    yield started
    started.kill()


@pytest.fixture
def running(server: MLflowServer) -> Iterator[MLflowServer]:
    if server._process is None:
        server.start()
    yield server
    server.signal(signal.SIGCONT)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sqlite") / "mlflow.db"


@pytest.fixture(autouse=True)
def short_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "DEADLINE", 2.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    for name in ("MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


def track(uri: str, spool: Path, run_id: str, step: str = "train_ppo") -> Tracker:
    return Tracker.for_step(step, run_id, tracking_uri=uri, experiment="tests", spool=spool)


def eventually(holds: Callable[[], bool], what: str) -> None:
    for _ in range(300):
        if holds():
            return
        time.sleep(0.2)
    raise AssertionError(f"never so: {what}")


def run_of(client: Any, run_id: str, step: str = "train_ppo") -> Any:
    experiment = client.get_experiment_by_name("tests")
    condition = f"tags.`rlhf_ppo.run_id` = '{run_id}' and tags.`rlhf_ppo.step` = '{step}'"
    runs = client.search_runs([experiment.experiment_id], condition)
    assert len(runs) == 1, f"{len(runs)} runs of {step} in {run_id}"
    return runs[0]


def history(client: Any, run: Any, name: str) -> dict[int, float]:
    return {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, name)}


def spooled(spool: Path, step: str = "train_ppo") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (spool / step / "spool.jsonl").read_text().splitlines()]


def test_one_run_for_the_pipeline_and_one_in_it_for_the_step(running: MLflowServer, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("<p>fine</p>")
    with track(running.url, tmp_path / "spool", "a") as tracker:
        tracker.log_params({"learning_rate": 1e-5, "tracker_kwargs/a@b": "x", "long": "y" * 7000})
        tracker.log_metrics({"ppo/loss/total": 0.5, "words": "no number", "bad": math.nan, "far": math.inf}, step=3)
        tracker.log_table("samples", [{"prompt": "p", "score": math.nan}, {"prompt": "q", "note": "late"}])
        tracker.log_table("others", [{"prompt": "p"}])
        tracker.log_artifact(tmp_path / "report.html", "reports")
        tracker.log_dataset("prompts", "d" * 64, "prompts.jsonl", "training")
        tracker.log_summary({"score_gain": 0.25})
    conclude_run("a", "SUCCEEDED", "", mlflow_tracking_uri=running.url, experiment="tests")
    client = running.client()
    step, parent = run_of(client, "a"), run_of(client, "a", "pipeline")
    assert step.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert (step.info.status, parent.info.status) == ("FINISHED", "FINISHED")
    assert step.data.params == {"learning_rate": "1e-05", "tracker_kwargs/a_b": "x"}
    assert history(client, step, "ppo/loss/total") == {3: 0.5}
    assert parent.data.metrics == {"score_gain": 0.25} and "score_gain" not in step.data.metrics
    experiment = client.get_experiment(step.info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert math.isnan(step.data.metrics["bad"]) and step.data.metrics["far"] > 1e308
    assert "words" not in step.data.metrics
    names = {file.path for file in client.list_artifacts(step.info.run_id)}
    assert names == {"samples.json", "others.json", "reports", "params"}
    tables = [table["path"] for table in json.loads(step.data.tags["mlflow.loggedArtifacts"])]
    assert tables == ["samples.json", "others.json"]
    samples = Path(client.download_artifacts(step.info.run_id, "samples.json", str(tmp_path))).read_text()
    expected = {"columns": ["prompt", "score", "note"], "data": [["p", None, None], ["q", None, "late"]]}
    assert json.loads(samples, parse_constant=pytest.fail) == expected
    used = step.inputs.dataset_inputs[0]
    assert (used.dataset.name, used.dataset.digest, used.tags[0].value) == ("prompts", "d" * 36, "training")


def test_a_server_that_hangs_holds_no_call_up(running: MLflowServer, tmp_path: Path) -> None:
    """Stopped, it accepts connections and answers none; all calls return and stand in the spool before it goes on."""
    tracker = track(running.url, tmp_path, "hangs")
    tracker.log_metrics({"x": 0.0}, step=0)
    eventually(lambda: not tracker._delivery.unsent(), "the run is there")
    sent = (tmp_path / "train_ppo" / "sent").read_text()
    running.signal(signal.SIGSTOP)

    def log() -> None:
        for step in range(1, 400):
            tracker.log_metrics({"x": float(step), "y": 1.0}, step=step)

    training = threading.Thread(target=log, daemon=True)
    training.start()
    training.join(60)
    assert not training.is_alive() and (tmp_path / "train_ppo" / "sent").read_text() == sent
    assert len(spooled(tmp_path)) == 401
    tracker.finish()
    assert (tmp_path / "train_ppo" / "sent").read_text() == sent
    running.signal(signal.SIGCONT)
    assert resend(tmp_path) == []
    assert history(running.client(), run_of(running.client(), "hangs"), "x") == {s: float(s) for s in range(400)}


def test_a_server_killed_in_the_middle_of_a_run_loses_no_metric(server: MLflowServer, tmp_path: Path) -> None:
    server.kill()
    tracker = track(server.url, tmp_path, "killed")
    for step in range(50):
        tracker.log_metrics({"x": float(step)}, step=step)
    server.start()
    client = server.client()
    eventually(lambda: not tracker._delivery.unsent(), "what was logged before the server came up is delivered")
    server.kill()
    for step in range(50, 100):
        tracker.log_metrics({"x": float(step)}, step=step)
    server.start()
    for step in range(100, 120):
        tracker.log_metrics({"x": float(step)}, step=step)
    eventually(lambda: not tracker._delivery.unsent(), "what was logged while it was dead is delivered")
    tracker.finish()
    assert resend(tmp_path) == []
    run = run_of(client, "killed")
    assert history(client, run, "x") == {step: float(step) for step in range(120)}
    assert run.info.status == "FINISHED"


def test_a_server_that_lost_its_runs_gets_everything_again(running: MLflowServer, tmp_path: Path) -> None:
    tracker = track(running.url, tmp_path, "again")
    tracker.log_metrics({"x": 0.0}, step=0)
    tracker.log_table("samples", [{"prompt": "p"}])
    eventually(lambda: not tracker._delivery.unsent(), "delivered")
    client = running.client()
    lost = [run_of(client, "again", step).info.run_id for step in ("train_ppo", "pipeline")]
    with sqlite3.connect(running.directory / "server.db") as connection:
        for table in ("tags", "metrics", "latest_metrics", "runs"):
            connection.executemany(f"DELETE FROM {table} WHERE run_uuid = ?", [(run,) for run in lost])
    connection.close()
    tracker.log_metrics({"x": 1.0}, step=1)
    tracker.finish()
    assert resend(tmp_path) == []
    run = run_of(client, "again")
    assert run.info.run_id not in lost and run.info.status == "FINISHED"
    assert history(client, run, "x") == {0: 0.0, 1: 1.0}
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["samples.json"]


def test_what_a_dead_server_missed_at_the_end_is_delivered_later(
    server: MLflowServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server.kill()
    (tmp_path / "file.txt").write_text("content")
    with pytest.raises(ValueError), track(server.url, tmp_path / "spool", "late") as tracker:
        tracker.log_metrics({"x": 1.0}, step=1)
        tracker.log_artifact(tmp_path / "file.txt")
        raise ValueError
    (tmp_path / "file.txt").unlink()
    assert "python -m rlhf_ppo.tracking" in capfd.readouterr().err
    tracker._thread.join(30)
    assert not tracker._thread.is_alive(), "two would send at once"
    server.start()
    command = [sys.executable, "-m", "rlhf_ppo.tracking", str(tmp_path / "spool")]
    for _ in range(2):
        assert subprocess.run(command, env={**os.environ}).returncode == 0
    client = server.client()
    run = run_of(client, "late")
    assert run.info.status == "FAILED"
    assert history(client, run, "x") == {1: 1.0}
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["file.txt"]


def test_the_conclusion_delivers_what_the_steps_left_and_waits_for_no_dead_server(
    server: MLflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RLHF_PPO_SPOOL", str(tmp_path))
    server.kill()
    with track(server.url, tmp_path, "concluded") as tracker:
        tracker.log_params({"p": 1})
        tracker.log_tags({"note": "kept"})
        tracker.log_dataset("prompts", "d", "prompts.jsonl", "training")
        tracker.log_table("samples", [{"prompt": "p"}])
    conclude_run("concluded", "FAILED", "it broke", mlflow_tracking_uri=server.url, experiment="tests")
    said = capfd.readouterr().out
    assert f"not delivered: {tmp_path / 'train_ppo'}" in said and '"kind": "run_concluded"' in said
    server.start()
    conclude_run("concluded", "SUCCEEDED", "", mlflow_tracking_uri=server.url, experiment="tests")
    client = server.client()
    run, parent = run_of(client, "concluded"), run_of(client, "concluded", "pipeline")
    assert (run.data.params, run.data.tags["note"], run.info.status) == ({"p": "1"}, "kept", "FINISHED")
    assert len(run.inputs.dataset_inputs) == 1
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["samples.json"]
    assert (parent.info.status, parent.data.tags["rlhf_ppo.outcome"]) == ("FINISHED", "succeeded")


def test_a_retried_step_goes_on_in_its_run(running: MLflowServer, tmp_path: Path) -> None:
    for attempt in range(2):
        with track(running.url, tmp_path / str(attempt), "retried") as tracker:
            tracker.log_params({"learning_rate": 1e-5})
            tracker.log_metrics({"x": 1.0}, step=attempt)
    client = running.client()
    run = run_of(client, "retried")
    assert history(client, run, "x") == {0: 1.0, 1: 1.0}
    assert run.info.status == "FINISHED"


def test_what_mlflow_refuses_does_not_hold_up_the_rest(running: MLflowServer, tmp_path: Path) -> None:
    with track(running.url, tmp_path, "refused") as tracker:
        tracker.log_params({"p": 1})
        tracker.log_params({"a": 1, "p": 2, "z": 3})
        tracker.log_metrics({"x": 1.0}, step=0)
    run = run_of(running.client(), "refused")
    assert run.data.params == {"p": "1", "a": "1", "z": "3"} and run.data.metrics == {"x": 1.0}


def test_a_store_of_artifacts_that_fails_holds_up_nothing_else(
    running: MLflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    def refuse(*values: object) -> None:
        raise PermissionError("no credentials for the bucket")

    with monkeypatch.context() as broken:
        broken.setattr(MlflowClient, "log_artifact", refuse)
        with track(running.url, tmp_path, "bucket") as tracker:
            tracker.log_table("samples", [{"prompt": "p"}])
            tracker.log_metrics({"x": 1.0}, step=0)
        assert resend(tmp_path) == [tmp_path / "train_ppo"]
    run = run_of(running.client(), "bucket")
    assert run.data.metrics == {"x": 1.0} and run.info.status == "FINISHED"
    assert resend(tmp_path) == []
    client = running.client()
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["samples.json"]
    assert client.get_run(run.info.run_id).info.status == "FINISHED"


def test_a_name_that_mlflow_refuses_is_changed_and_costs_no_other(running: MLflowServer, tmp_path: Path) -> None:
    names = ["fine", "kl[0]", "a//b", "/root", "../up", "./here", "..", "", "x" * 300, "end/"]
    with track(running.url, tmp_path, "names") as tracker:
        tracker.log_metrics(dict.fromkeys(names, 1.0), step=0)
        tracker.log_params(dict.fromkeys(names, "v"))
        tracker.log_tags(dict.fromkeys(names, "t"))
    data = run_of(running.client(), "names").data
    changed = {"fine", "kl_0_", "a/b", "root", "up", "here", "_", "x" * 249, "end"}
    assert set(data.metrics) == changed and set(data.params) == changed and changed <= set(data.tags)


def test_an_injected_run_is_adopted_and_its_end_left_to_kfp(
    running: MLflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = running.client()
    experiment = client.create_experiment("of kfp")
    injected = client.create_run(experiment).info.run_id
    client.log_param(injected, "learning_rate", '"0.00001"')
    monkeypatch.setenv("MLFLOW_RUN_ID", injected)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", running.url)
    with track("http://another.invalid", tmp_path, "kfp") as tracker:
        tracker.log_params({"learning_rate": 1e-5})
        tracker.log_metrics({"x": 2.0}, step=0)
    conclude_run("kfp", "SUCCEEDED", "", mlflow_tracking_uri=running.url, experiment="of kfp")
    run = client.get_run(injected)
    assert run.info.status == "RUNNING"
    assert run.data.params["ppo/learning_rate"] == "1e-05" and run.data.metrics == {"x": 2.0}
    assert len(client.search_runs([experiment])) == 1


def test_with_kfp_s_plugin_what_stands_for_the_pipeline_goes_to_kfp_s_run_of_it(
    running: MLflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plugin has a run for the pipeline, in it one for the group of tasks, in that one for the task."""
    client = running.client()
    experiment = client.create_experiment("of kfp, with tasks")
    root = client.create_run(experiment).info.run_id
    group = client.create_run(experiment, tags={"mlflow.parentRunId": root}).info.run_id
    task = client.create_run(experiment, tags={"mlflow.parentRunId": group}).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", task)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", running.url)
    with track("", tmp_path, "kfp", "evaluate_policy") as tracker:
        tracker.log_metrics({"x": 1.0}, step=0)
        tracker.log_summary({"score_gain": 0.5})
        tracker.log_model("of-kfp", "s3://store/policy", {}, "challenger")
        assert tracker.pipeline_run() == root
    assert client.get_run(task).data.metrics == {"x": 1.0}
    assert client.get_run(root).data.metrics == {"score_gain": 0.5}
    assert client.get_run(group).data.metrics == {}
    assert client.get_model_version_by_alias("of-kfp", "challenger").run_id == root
    assert len(client.search_runs([experiment])) == 3, "none is made beside KFP's"


def test_sqlite_needs_no_server_and_keeps_artifacts_beside_the_database(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.chdir(database.parent)
    with track("", tmp_path / "spool", "local") as tracker:
        tracker.log_table("samples", [{"prompt": "p"}])
    assert resend(tmp_path / "spool") == []
    uri = f"sqlite:///{database}"
    assert spooled(tmp_path / "spool")[0]["uri"] == uri, "what is left can be delivered from anywhere"
    conclude_run("local", "FAILED", "it broke", mlflow_tracking_uri=uri, experiment="tests")
    client = MlflowClient(uri)
    run = run_of(client, "local")
    assert run_of(client, "local", "pipeline").info.status == "FAILED"
    stored = list((database.parent / "mlflow-artifacts").rglob("samples.json"))
    assert len(stored) == 1 and json.loads(stored[0].read_text())["data"] == [["p"]]
    assert run.info.artifact_uri.startswith((database.parent / "mlflow-artifacts").as_uri())


def test_a_spool_line_that_was_cut_off_is_not_sent_and_not_lost(database: Path, tmp_path: Path) -> None:
    tracker = track(f"sqlite:///{database}", tmp_path, "cut")
    eventually(lambda: not tracker._delivery.unsent(), "delivered")
    line = json.dumps({"kind": "metrics", "values": [["x", "1.0", 1, 0]]})
    with tracker._file.open("a") as stream:
        stream.write(line[:20])
        stream.flush()
        assert tracker._delivery.attempt()
        stream.write(line[20:] + "\n")
    tracker.finish()
    assert resend(tmp_path) == []
    from mlflow import MlflowClient

    assert run_of(MlflowClient(f"sqlite:///{database}"), "cut").data.metrics == {"x": 1.0}


def test_a_retry_delivers_what_a_killed_attempt_left(database: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{database}"
    track(uri, tmp_path, "torn").finish()
    with (tmp_path / "train_ppo" / "spool.jsonl").open("a") as stream:
        stream.write(json.dumps({"kind": "metrics", "values": [["x", "1.0", 1, 0]]}) + '\n{"kind": "metr')
    with track(uri, tmp_path, "torn") as tracker:
        tracker.log_metrics({"y": 2.0}, step=0)
    assert resend(tmp_path) == []
    assert run_of(MlflowClient(uri), "torn").data.metrics == {"x": 1.0, "y": 2.0}


def test_a_spool_directory_used_again_mixes_no_runs(database: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{database}"
    for number, run_id in enumerate(("first", "second")):
        with track(uri, tmp_path, run_id) as tracker:
            tracker.log_metrics({"x": float(number)}, step=0)
    assert resend(tmp_path) == []
    client = MlflowClient(uri)
    assert [run_of(client, run_id).data.metrics for run_id in ("first", "second")] == [{"x": 0.0}, {"x": 1.0}]


def test_a_full_disk_and_odd_values_stop_no_step(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tracker = track("http://127.0.0.1:9", tmp_path, "full")
    tracker.log_metrics(dict.fromkeys(map(str, range(500)), 1.0), step=0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = (tmp_path / "train_ppo" / "spool.jsonl").stat().st_size + 20
    resource.setrlimit(resource.RLIMIT_FSIZE, (full, before[1]))
    try:
        for step in (1, 2):
            tracker.log_metrics({"lost": 1.0}, step=step)
        tracker.log_table("samples", [{"text": "x" * full}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    tracker.log_artifact(tmp_path / "not there")
    tracker.log_metrics({"huge": 10**400, "none": None, "kept": 1}, step=3)
    tracker.finish()
    lines = [line for line in spooled(tmp_path) if line["kind"] == "metrics"]
    assert [[value[0] for value in line["values"]] for line in lines[1:]] == [["kept"]]
    assert capfd.readouterr().err.count("takes no more") == 1


def test_the_users_own_mlflow_timeouts_stand_and_its_patience_does_not_bite(
    running: MLflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    track(running.url, tmp_path, "patience").finish()
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "3", "set by the fixture, as a user would"


def test_where_mlflow_is_missing_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install "rlhf-ppo\[train\]"'):
        track("", tmp_path, "bare")
