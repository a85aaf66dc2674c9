"""docs/cluster.md, done as it says: its files, commands and Python, on a strict KFP and a real API server."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kfp_server import Kfp
from test_docs import blocks_of
from test_manifests import Applied, applied, assert_restricted, build, content  # noqa: F401

ROOT = Path(__file__).parent.parent
PAGE = "docs/cluster.md"


@pytest.fixture(scope="module")
def fork(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with the page's files."""
    root = tmp_path_factory.mktemp("fork")
    shutil.copytree(ROOT / "manifests", root / "manifests")
    for block in blocks_of(PAGE, "yaml"):
        (name,) = re.findall(r"^# (deploy/[\w./-]+\w)", block)
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).write_text(block)
    run(root, "\n".join(line for line in commands() if line.startswith("rlhf-ppo compile")))
    return root


def commands() -> list[str]:
    """The lines of the page's shell blocks, continued ones put together."""
    return [line for block in blocks_of(PAGE, "sh") for line in block.replace("\\\n", " ").splitlines()]


def run(root: Path, script: str, **environment: str) -> str:
    """The output of a script in ``root`` that may call rlhf-ppo."""
    ours = f'rlhf-ppo() {{ "{sys.executable}" -m rlhf_pipelines.cli "$@"; }}\nset -e\n'
    done = subprocess.run(
        ["bash", "-c", ours + script], cwd=root, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def kfp(fork: Path) -> Iterator[Kfp]:
    """A server with the pipeline as the page compiles it."""
    found = Kfp()
    resources = yaml.safe_load_all((fork / "manifests/base/pipeline.yaml").read_text())
    (version,) = [each for each in resources if each["kind"] == "PipelineVersion"]
    spec = {"pipeline_spec": version["spec"]["pipelineSpec"], "platform_spec": version["spec"]["platformSpec"]}
    found.upload("rlhf-ppo", version["metadata"]["name"], spec)
    yield found
    found.close()


def without(found: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name not in names}


def test_every_command_of_rlhf_ppo_on_the_page_does_what_it_says(fork: Path, kfp: Kfp) -> None:
    given = [line for line in commands() if line.startswith("rlhf-ppo") and "compile" not in line]
    assert [line.split()[1] for line in given] == ["submit", "schedule", "schedule"]
    said = [run(fork, line, KF_PIPELINES_ENDPOINT=kfp.url) for line in given]
    (started,), (scheduled,) = kfp.runs.values(), kfp.recurring.values()
    parameters = yaml.safe_load((fork / "deploy/parameters.yaml").read_text())
    assert started["runtime_config"]["parameters"] == parameters | {"seed": 1}
    assert scheduled["runtime_config"]["parameters"] == parameters | {"mlflow_skip_unchanged": True}
    assert started["service_account"] == scheduled["service_account"] == "rlhf-ppo-runner"
    assert "succeeded" in said[0] and said[1].startswith("create   nightly") and "done: create" in said[2]
    assert run(fork, "\n".join(given), KF_PIPELINES_ENDPOINT=kfp.url).count("nothing to change") == 2
    assert len(kfp.runs) == len(kfp.recurring) == 1


def test_the_python_of_the_page_starts_a_run_and_compiles_a_dag(
    fork: Path, kfp: Kfp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(fork)
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", kfp.url)
    start, own = blocks_of(PAGE, "python")
    (compiled,) = re.findall(r"`(rlhf-ppo compile -o ppo.yaml .*)`", (ROOT / PAGE).read_text())
    run(fork, compiled)
    exec(start, {})
    (started,) = kfp.runs.values()
    parameters = yaml.safe_load((fork / "deploy/parameters.yaml").read_text())
    assert started["runtime_config"]["parameters"] == parameters and started["service_account"] == "rlhf-ppo-runner"
    assert "registry.example/rlhf-ppo/cpu:0.1.0" in str(started["pipeline_spec"])
    package = 'create_run_from_pipeline_package(\n    "ppo.yaml",'
    assert package in start
    imported = "from rlhf_pipelines import ppo_pipeline\n"
    exec(imported + start.replace(package, "create_run_from_pipeline_func(\n    ppo_pipeline,"), {})
    _, installed = kfp.runs.values()
    assert installed["runtime_config"] == started["runtime_config"]
    script = fork / "mine.py"
    script.write_text(own)
    assert subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=fork).returncode == 0
    spec = next(iter(yaml.safe_load_all((fork / "mine.yaml").read_text())))
    assert set(spec["root"]["dag"]["tasks"]) == {
        "validate-config", "snapshot-reference", "prepare-dataset", "my-trainer",
    }  # fmt: skip


needs_kubectl = pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not on the PATH")


@needs_kubectl
def test_the_page_s_kustomization_has_its_image_volume_and_schedules(fork: Path) -> None:
    found = {(each["kind"], each["metadata"]["name"]): each for each in build(fork / "deploy")}
    (config,) = [each for (kind, _), each in found.items() if kind == "ConfigMap"]
    pod = found["Job", "rlhf-ppo-schedule"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["image"] == "registry.example/rlhf-ppo/cpu:0.1.0"
    assert {each["configMap"]["name"] for each in pod["volumes"] if "configMap" in each} == {config["metadata"]["name"]}
    for name, text in config["data"].items():
        assert text == (fork / "deploy" / name).read_text()
    (version,) = [each for (kind, _), each in found.items() if kind == "PipelineVersion"]
    assert f'"{found["PersistentVolumeClaim", "rlhf-ppo"]["metadata"]["name"]}"' in re.sub(
        r"'", '"', str(version["spec"]["platformSpec"])
    )
    assert "registry.example/rlhf-ppo/cpu:0.1.0" in str(version["spec"]["pipelineSpec"])


@needs_kubectl
@pytest.mark.parametrize("pool", ["gpu", "gaudi"])
def test_in_a_profile_the_job_names_its_namespace_and_the_other_pool_builds_too(fork: Path, pool: str) -> None:
    given = yaml.safe_load((fork / "deploy/kustomization.yaml").read_text())
    given |= {"namespace": "team-a", "patches": [{"path": "job-in-a-profile.yaml"}]}
    given["resources"][0] = f"../manifests/overlays/{pool}"
    place = fork / f"profile-{pool}"
    shutil.copytree(fork / "deploy", place)
    (place / "kustomization.yaml").write_text(yaml.safe_dump(given))
    found = build(place)
    assert {each["metadata"]["namespace"] for each in found} == {"team-a"}
    (job,) = [each for each in found if each["kind"] == "Job"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    base = yaml.safe_load((ROOT / "manifests/base/schedule-job.yaml").read_text())
    (usual,) = base["spec"]["template"]["spec"]["containers"]
    assert container["command"] == [*usual["command"], "--namespace", "team-a"]
    assert without(container, "command", "image") == without(usual, "command", "image")


def test_a_real_server_takes_what_the_page_applies_and_a_second_time_changes_nothing(
    fork: Path,
    applied: Applied,  # noqa: F811
) -> None:
    lines = [line.replace(" kubeflow", f" {applied.namespace}") for line in commands() if line.startswith("kubectl")]
    lines = [line for line in lines if "port-forward" not in line and " wait " not in line]
    assert [line.split()[1] for line in lines] == ["-n", "apply", "-n", "apply", "-n"]
    (fork / "token-file").write_text("no token")
    for directory in ("deploy", "deploy/mlflow", "manifests/mlflow/base"):
        path = fork / directory / "kustomization.yaml"
        path.write_text(path.read_text().replace("namespace: kubeflow", f"namespace: {applied.namespace}"))
    run(fork, "\n".join(lines))
    first = applied.there("overlays/gpu")
    run(fork, f"{lines[1]}\n{lines[3]}")
    second = applied.there("overlays/gpu")
    assert {key: content(each) for key, each in second.items()} == {key: content(each) for key, each in first.items()}
    assert applied.kubectl("get", "secret", "hf-token", "-o", "jsonpath={.data.HF_TOKEN}") == "bm8gdG9rZW4="
    assert "rlhf-ppo" in applied.kubectl("get", "pvc", "-o", "name")
    assert "rlhf-ppo-volume" in applied.kubectl("get", "jobs", "-o", "name")


def test_the_volume_s_job_opens_the_pipeline_s_volume_for_the_images_group(fork: Path) -> None:
    from rlhf_ppo.volume import VOLUME_PATH

    pod = yaml.safe_load((fork / "deploy/volume-job.yaml").read_text())["spec"]["template"]["spec"]
    claim = yaml.safe_load((fork / "deploy/volume.yaml").read_text())["metadata"]["name"]
    assert_restricted(pod)
    (volume,), (container,) = pod["volumes"], pod["containers"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim
    assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": VOLUME_PATH}]
    assert container["command"] == ["test", "-w", VOLUME_PATH]
    for image in ("cpu", "gpu", "gaudi"):
        made = re.search(r"useradd --uid (\d+) --gid (\d+)", (ROOT / "images" / image / "Dockerfile").read_text())
        assert made is not None
        security = pod["securityContext"]
        assert [security[name] for name in ("runAsUser", "runAsGroup")] == [int(each) for each in made.groups()]
        assert security["fsGroup"] == security["runAsGroup"]


APPLIER = """
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: applier}
rules:
  - {apiGroups: [""], resources: [configmaps, serviceaccounts], verbs: [get, create, patch]}
  - {apiGroups: [batch], resources: [jobs], verbs: [get, create, patch, delete]}
  - {apiGroups: [networking.k8s.io], resources: [networkpolicies], verbs: [get, create, patch]}
  - {apiGroups: [pipelines.kubeflow.org], resources: [pipelines, pipelineversions], verbs: [get, create, patch]}
  - {apiGroups: [rbac.authorization.k8s.io], resources: [roles], verbs: [get, create, patch, escalate, bind]}
  - {apiGroups: [rbac.authorization.k8s.io], resources: [rolebindings], verbs: [get, create, patch]}
"""


def test_who_has_the_rights_that_the_page_for_administrators_names_may_apply_it_all(
    tmp_path: Path,
    applied: Applied,  # noqa: F811
) -> None:
    (tmp_path / "role.yaml").write_text(APPLIER)
    applied.kubectl("apply", "-f", str(tmp_path / "role.yaml"))
    applied.kubectl("create", "rolebinding", "applier", "--role=applier", "--user=applier")
    for _ in range(2):
        assert "networkpolicy" in applied.apply("overlays/gpu", "--as=applier")
        applied.kubectl("--as=applier", "delete", "job", "rlhf-ppo-schedule")


def test_an_injected_run_gets_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    from rlhf_ppo.parameters import decode, defaults
    from rlhf_ppo.tracking import Tracker

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = mlflow.MlflowClient(uri)
    experiment = client.create_experiment("of KFP", artifact_location=(tmp_path / "files").as_uri())
    pipeline = client.create_run(experiment).info.run_id
    step = client.create_run(experiment, run_name="evaluate-policy", tags={"mlflow.parentRunId": pipeline}).info.run_id
    for name, value in {
        "MLFLOW_RUN_ID": step,
        "MLFLOW_TRACKING_URI": uri,
        "RLHF_PPO_SPOOL": str(tmp_path / "s"),
    }.items():
        monkeypatch.setenv(name, value)
    given = {
        "model_name": "org/model", "query_dataset": "org/data", "reward_model": "my:reward",
        "mlflow_tracking_uri": "http://elsewhere.invalid", "tracker_project_name": "ours",
        "tracker_kwargs": {"mlflow": {"run_name": "ours", "tags": {"ours": "1"}}},
    }  # fmt: skip
    with Tracker.for_run("evaluate_policy", "run-1", decode({**defaults(), **given})) as tracker:
        tracker.log_params({"learning_rate": 1e-5})
        tracker.log_metrics({"eval/kl": 1.0})
        tracker.log_summary({"kl": 1.0})
        tracker.log_table("samples", [{"prompt": "p"}])
    run = client.get_run(step)
    assert run.data.params == {"ppo/learning_rate": "1e-05"} and run.data.metrics == {"eval/kl": 1.0}
    assert run.data.tags["rlhf_ppo.step"] == "evaluate_policy" and "ours" not in run.data.tags
    assert run.info.run_name == "evaluate-policy" and run.info.status == "RUNNING"
    assert [file.path for file in client.list_artifacts(step)] == ["samples.json"]
    assert client.get_run(pipeline).data.metrics == {"kl": 1.0} and client.get_experiment_by_name("ours") is None
