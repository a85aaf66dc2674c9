"""Runs started on a cluster: by the real kfp client, on an API server that checks what the real one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hub_server import CUT, Fault
from kfp_server import Kfp
from rlhf_pipelines import kubeflow, submit
from rlhf_pipelines.compile import packaged
from rlhf_pipelines.kubeflow import KubeflowError, connect
from rlhf_pipelines.submit import Source, Submission, failure_in
from rlhf_ppo.errors import InputError

NEEDED = ["--set", "model_name=org/model", "--set", "query_dataset=org/data", "--set", "reward_model=org/reward"]
GIVEN = {"model_name": "org/model", "query_dataset": "org/data", "reward_model": "org/reward"}


@pytest.fixture
def kfp() -> Iterator[Kfp]:
    server = Kfp()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_PPO_RETRY_PAUSE", "0.001")
    monkeypatch.setattr(submit, "POLL_SECONDS", 0.01)
    for name in ("KF_PIPELINES_ENDPOINT", "KF_PIPELINES_TOKEN", "KF_PIPELINES_COOKIE", "KF_PIPELINES_SA_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


def cli(kfp: Kfp, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rlhf_pipelines.cli", "submit", "--host", kfp.url, *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


def wanted(**parameters: Any) -> Submission:
    return Submission("nightly (42)", "rlhf-ppo", {**GIVEN, **parameters}, Source(packaged()))


def spec() -> dict[str, Any]:
    pipeline, platform = yaml.safe_load_all(packaged())
    return {"pipeline_spec": pipeline, "platform_spec": platform}


def test_a_run_has_the_package_the_given_parameters_and_no_others(kfp: Kfp, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("node_accelerator: nvidia.com/gpu\nnode_accelerator_count: 2\n")
    done = cli(kfp, *NEEDED, "--parameters", str(tmp_path / "p.yaml"), "--set", "seed=0", "--set", "learning_rate=3e-5",
               "--image", "registry.example/ppo:1", "--service-account", "runner")  # fmt: skip
    assert done.returncode == 0, done.stderr
    (run,) = kfp.runs.values()
    assert run["runtime_config"]["parameters"] == {
        **GIVEN, "node_accelerator": "nvidia.com/gpu", "node_accelerator_count": 2, "seed": 0, "learning_rate": 3e-5,
    }  # fmt: skip
    assert run["service_account"] == "runner"
    assert set(run["pipeline_spec"]) == {"pipeline_spec", "platform_spec"}
    image = run["pipeline_spec"]["pipeline_spec"]["root"]["inputDefinitions"]["parameters"]["node_image"]
    assert image["defaultValue"] == "registry.example/ppo:1", "what was not given stays the package's"
    (experiment,) = kfp.experiments.values()
    assert experiment["display_name"] == "rlhf-ppo" and run["experiment_id"] == experiment["experiment_id"]
    assert run["display_name"].startswith("rlhf-ppo 20")
    assert f"{kfp.url}/#/runs/details/{run['run_id']}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "learning_rat=1"], "learning_rat"),
        (["--set", "batch_size=many"], "batch_size='many'"),
        (["--set", "batch_size=7", "--set", "mini_batch_size=3"], "batch_size=7 is not a multiple"),
        (["--image", "no image!"], "--image='no image!' is no name of an image"),
        (["--pipeline", "mine", "--image", "x:1"], "--image and --volume are compiled in"),
    ],
)
def test_what_is_wrong_is_said_before_a_server_is_asked(kfp: Kfp, arguments: list[str], words: str) -> None:
    done = cli(kfp, *NEEDED, *arguments)
    assert done.returncode == 2 and words in done.stderr and kfp.asked == []


def test_the_server_of_the_tests_refuses_what_the_real_one_refuses(kfp: Kfp) -> None:
    server = connect(kfp.url)
    for parameters, words in (
        ({"nope": 1}, "not required by pipeline"),
        ({"seed": "0"}, "requires type NUMBER_INTEGER"),
        ({"seed": True}, "requires type NUMBER_INTEGER"),
        ({"tracker_kwargs": None}, "requires type STRUCT"),
    ):
        with pytest.raises(KubeflowError, match=words):
            submit.submit(server, wanted(**parameters))
    assert kfp.runs == {}


def test_the_same_token_starts_no_second_run(kfp: Kfp) -> None:
    found = [cli(kfp, *NEEDED, "--client-token", "job-7") for _ in range(2)]
    assert [done.returncode for done in found] == [0, 0] and found[0].stdout == found[1].stdout
    (run,) = kfp.runs.values()
    assert run["display_name"] == "rlhf-ppo (job-7)"
    other = cli(kfp, *NEEDED, "--client-token", "job-7", "--set", "seed=3")
    assert other.returncode == 2 and "is there with other parameters (seed)" in other.stderr
    assert cli(kfp, *NEEDED, "--client-token", "job-8").returncode == 0 and len(kfp.runs) == 2


def test_whatever_fails_once_there_is_one_run_in_one_experiment(kfp: Kfp) -> None:
    server = connect(kfp.url)
    kfp.asked.clear()
    submit.submit(server, wanted())
    requests, cases = list(kfp.asked), 0
    for number, request in enumerate(requests):
        for status, takes_effect in ((429, False), (503, False), (CUT, False), (500, True), (CUT, True)):
            for store in (kfp.runs, kfp.experiments, kfp.asked):
                store.clear()
            kfp.fault_at = {number: Fault("", "", status, takes_effect=takes_effect)}
            run_id = submit.submit(server, wanted())
            assert (list(kfp.runs), len(kfp.experiments)) == ([run_id], 1), (request, status, takes_effect)
            assert not kfp.fault_at
            cases += 1
    assert cases == 5 * 4


def test_somebody_else_s_experiment_of_the_same_moment_is_taken(kfp: Kfp, monkeypatch: pytest.MonkeyPatch) -> None:
    server = connect(kfp.url)
    look, looks = kubeflow.Server.find_experiment, []

    def late(self: Any, name: str) -> Any:
        looks.append(name)
        found = look(self, name)
        if len(looks) == 1:
            connect(kfp.url).client.create_experiment(name)
        return found

    monkeypatch.setattr(kubeflow.Server, "find_experiment", late)
    assert server.experiment("rlhf-ppo") in kfp.experiments and len(kfp.experiments) == 1 and len(looks) == 2


def test_a_pipeline_of_the_server_runs_in_its_latest_or_a_named_version(kfp: Kfp) -> None:
    versions = [kfp.upload("mine", name, spec()) for name in ("v1", "v2", "v3")]
    for version, expected in (("latest", versions[2]), ("v1", versions[0]), (versions[1], versions[1])):
        done = cli(kfp, *NEEDED, "--pipeline", "mine", "--version", version)
        assert done.returncode == 0, done.stderr
        run = list(kfp.runs.values())[-1]
        assert run["pipeline_version_reference"]["pipeline_version_id"] == expected and "pipeline_spec" not in run


def test_a_version_without_a_parameter_is_named_before_a_run_is_made(kfp: Kfp) -> None:
    old = spec()
    del old["pipeline_spec"]["root"]["inputDefinitions"]["parameters"]["eval_judge"]
    kfp.upload("mine", "v1", old)
    done = cli(kfp, *NEEDED, "--set", "eval_judge=org/judge", "--pipeline", "mine")
    assert done.returncode == 2 and "eval_judge is no parameter of mine, version v1" in done.stderr
    assert (
        "v2 is no version of mine; there are: v1" in cli(kfp, *NEEDED, "--pipeline", "mine", "--version", "v2").stderr
    )
    assert "is no pipeline of the server" in cli(kfp, *NEEDED, "--pipeline", "yours").stderr
    assert kfp.runs == {}


def task(name: str, state: str, *pods: str, **more: Any) -> dict[str, Any]:
    return {"display_name": name, "state": state, "child_tasks": [{"pod_name": pod} for pod in pods], **more}


def states(state: str, *tasks: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"state": state, "run_details": {"task_details": list(tasks)}, **more}


FAILED = json.dumps(
    {"kind": "step_failed", "step": "train_ppo", "input_error": True, "message": "batch_size=0: give 1"}
)


def test_waiting_tells_each_step_and_ends_as_the_run_does(kfp: Kfp) -> None:
    kfp.script = [
        states("RUNNING", task("validate-config", "RUNNING"), task("validate-config-driver", "SUCCEEDED")),
        states("RUNNING", task("validate-config", "SUCCEEDED"), task("train-ppo", "RUNNING"), task("root", "RUNNING")),
        states("SUCCEEDED", task("validate-config", "SUCCEEDED"), task("train-ppo", "SUCCEEDED")),
    ]
    heard: list[tuple[str, str]] = []
    server = connect(kfp.url)
    outcome = submit.follow(server, submit.submit(server, wanted()), lambda step, state: heard.append((step, state)))
    assert (outcome.state, outcome.reasons) == ("SUCCEEDED", [])
    assert heard == [("validate-config", "RUNNING"), ("validate-config", "SUCCEEDED"), ("train-ppo", "RUNNING"),
                     ("train-ppo", "SUCCEEDED")]  # fmt: skip


@pytest.mark.parametrize("pod", ["ppo-x7-42", "ppo-x7-system-container-impl-42"])
def test_a_failed_run_is_told_in_the_failing_step_s_own_words(kfp: Kfp, pod: str) -> None:
    # KFP's API has no reason (kubeflow/pipelines#14007); the step's log does, whichever way Argo names its pod.
    kfp.logs[pod] = f"I0101 launcher starts\n{FAILED}\nTraceback (most recent call last):\nexit status 1\n"
    failed = [task(name, "FAILED", "ppo-x7-42") for name in ("train-ppo", "the group that it stands in")]
    kfp.script = [states("FAILED", task("validate-config", "SUCCEEDED"), *failed)]
    done = cli(kfp, *NEEDED, "--wait")
    assert done.returncode == 1
    assert done.stderr == "train_ppo: batch_size=0: give 1\nthe run has failed\n"


@pytest.mark.parametrize("name", ["detect-changes", "Detect changes"])
def test_a_run_that_ended_early_is_told_to_whoever_waits_for_a_model(kfp: Kfp, name: str) -> None:
    event = json.dumps({"kind": "unchanged", "time": 1.0, "since": "run-7 of 2026-01-01 02:00 UTC"})
    kfp.logs["ppo-x7-8"] = f'I0101 launcher starts\n{event}\n{{"kind": "step_finished", "step": "detect_changes"}}\n'
    kfp.script = [states("SUCCEEDED", task("validate-config", "SUCCEEDED"), task(name, "SUCCEEDED", "ppo-x7-8"))]
    done = cli(kfp, *NEEDED, "--wait")
    said = "nothing was trained: nothing new since the run run-7 of 2026-01-01 02:00 UTC\nthe run has succeeded\n"
    assert done.returncode == 0 and done.stdout.endswith(said) and done.stderr == ""
    kfp.logs["ppo-x7-8"] = event.replace('"unchanged"', '"note", "message": "unchanged"')
    assert "nothing was trained" not in cli(kfp, *NEEDED, "--wait").stdout


def test_where_there_is_no_log_kfp_s_own_words_are_told_or_that_there_are_none(kfp: Kfp) -> None:
    def outcome() -> list[str]:
        kfp.runs.clear()
        server = connect(kfp.url)
        return submit.follow(server, submit.submit(server, wanted()), lambda step, state: None).reasons

    said = {"error": {"code": 13, "message": "OOMKilled (exit code 137)"}}
    kfp.script = [states("FAILED", task("train-ppo", "FAILED", "a-1", **said), error={"message": "the run failed"})]
    assert outcome() == ["train-ppo: OOMKilled (exit code 137)"]
    kfp.script = [states("FAILED", task("train-ppo", "FAILED", "a-1"), error={"message": "the run failed"})]
    assert outcome() == ["the run failed"]
    kfp.script = [states("FAILED", task("train-ppo", "FAILED", "a-1"))]
    assert outcome() == ["train-ppo failed, and neither a log nor KFP says why: look at its pods"]
    kfp.script = [states("CANCELED")]
    assert outcome() == ["the run failed, and neither a log nor KFP says why: look at its pods"]


def test_a_wait_has_an_end_and_leaves_the_run_alone(kfp: Kfp) -> None:
    kfp.script = [states("RUNNING")]
    done = cli(kfp, *NEEDED, "--wait", "--timeout", "0.2")
    assert done.returncode == 1 and "has not ended within 0.2 s; it goes on" in done.stderr and len(kfp.runs) == 1


@pytest.mark.parametrize("way", ["token", "cookie", "service account"])
def test_credentials_come_from_the_environment(kfp: Kfp, way: str, tmp_path: Path) -> None:
    if way == "cookie":
        kfp.cookie = "secret-7"
    else:
        kfp.token = "secret-7"
    refused = cli(kfp, *NEEDED)
    assert refused.returncode == 1 and "give the token by KF_PIPELINES_TOKEN" in refused.stderr
    (tmp_path / "token").write_text("secret-7")
    given = {
        "token": {"KF_PIPELINES_TOKEN": "secret-7"},
        "cookie": {"KF_PIPELINES_COOKIE": "secret-7"},
        "service account": {"KF_PIPELINES_SA_TOKEN_PATH": str(tmp_path / "token")},
    }[way]
    done = cli(kfp, *NEEDED, **given)
    assert done.returncode == 0, done.stderr
    assert "secret-7" not in done.stdout + done.stderr + refused.stderr


@pytest.mark.parametrize("context", ["", "other"])
def test_a_kubeconfig_leads_to_kfp_through_kubernetes_own_proxy(kfp: Kfp, context: str, tmp_path: Path) -> None:
    kfp.token = "of-the-kubeconfig"
    kfp.prefix = "/api/v1/namespaces/kubeflow/services/ml-pipeline:http/proxy"
    nowhere = {"cluster": {"server": "http://127.0.0.1:9"}}
    here = {"cluster": {"server": kfp.url}}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "users": [{"name": "me", "user": {"token": "of-the-kubeconfig"}}],
        "clusters": [{"name": "here", **here}, {"name": "nowhere", **nowhere}],
        "contexts": [
            {"name": "first", "context": {"cluster": "nowhere" if context else "here", "user": "me"}},
            {"name": "other", "context": {"cluster": "here", "user": "me"}},
        ],
        "current-context": "first",
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    environment = {**os.environ, "KUBECONFIG": str(tmp_path / "kubeconfig"), "HOME": str(tmp_path)}
    environment.pop("KUBERNETES_SERVICE_HOST", None)
    chosen = ["--kube-context", context] if context else []
    command = [sys.executable, "-m", "rlhf_pipelines.cli", "submit", "--namespace", "team", *chosen, *NEEDED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (run,) = kfp.runs.values()
    assert run["run_id"] in done.stdout and kfp.experiments[run["experiment_id"]]["namespace"] == "team"


@pytest.mark.skipif(not os.environ.get("KUBECONFIG"), reason="KUBECONFIG names no cluster")
def test_a_real_api_server_lets_the_kubeconfig_in_and_looks_for_kfp_s_service() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "KUBERNETES_SERVICE_HOST"}
    command = [sys.executable, "-m", "rlhf_pipelines.cli", "submit", *NEEDED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert 'look for the experiment rlhf-ppo: services "ml-pipeline" not found (404)' in done.stderr


def test_in_a_cluster_kfp_s_own_service_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    server = connect()
    host = server.client.runs.run_service_get_run.__self__.api_client.configuration.host
    assert host == "http://ml-pipeline.kubeflow.svc.cluster.local:8888"


def test_a_server_that_is_away_or_not_named_is_said_so(kfp: Kfp, monkeypatch: pytest.MonkeyPatch) -> None:
    server = connect("http://127.0.0.1:9")
    with pytest.raises(KubeflowError, match="look for the experiment rlhf-ppo: the KFP API server does not answer"):
        submit.submit(server, wanted())
    with pytest.raises(InputError, match="begin with http:// or https://"):
        connect("kubeflow.example")
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/nowhere")
    with pytest.raises(InputError, match="no KFP API server is named: give --host"):
        connect()


def test_the_last_failure_in_a_log_is_the_reason() -> None:
    first = json.dumps({"kind": "step_failed", "step": "a", "message": "first"})
    assert failure_in(f"{first}\nx\n  [main] {FAILED}\n") == "train_ppo: batch_size=0: give 1"
    assert failure_in('"step_failed" {broken\n') == "" and failure_in("") == ""
