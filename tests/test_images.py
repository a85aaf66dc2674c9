"""The CPU image, built: what it answers, what it holds, and the whole pipeline in it. Runs in make test-images."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

import rlhf_ppo
from rlhf_pipelines.cli import read_parameters
from rlhf_pipelines.compile import packaged
from tiny_models import llama, word_tokenizer

pytestmark = pytest.mark.images
ENGINE, IMAGE = os.environ.get("ENGINE", "docker"), os.environ.get("IMAGE", "")
LOCKED = ["--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--network=none"]
REWARD = """
def high(prompts, responses):
    return [sum(int(w[1:]) > 33 for w in text.split() if w[1:].isdigit()) / 12 for text in responses]

def broken(prompts, responses):
    raise ConnectionError("the reward service went away")
"""


def run(*command: str, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run ``command`` in a container of the image."""
    return subprocess.run([ENGINE, "run", "--rm", *flags, IMAGE, *command], capture_output=True, text=True)


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    """What the image says of itself."""
    done = subprocess.run([ENGINE, "image", "inspect", IMAGE], capture_output=True, text=True)
    assert done.returncode == 0, f"{IMAGE} is not there: run make test-images"
    (found,) = json.loads(done.stdout)
    print(f"\n{IMAGE}: {found['Size'] / 2**30:.2f} GiB")
    settings: dict[str, Any] = found["Config"]
    return settings


def test_it_says_its_version_and_of_which_sources_it_is(config: dict[str, Any]) -> None:
    assert run("--version").stdout == f"rlhf-ppo {rlhf_ppo.__version__}\n"
    labels = config["Labels"]
    assert labels["org.opencontainers.image.version"] == rlhf_ppo.__version__
    assert len(labels["org.opencontainers.image.revision"]) == 40
    assert labels["org.opencontainers.image.title"] == "rlhf-ppo-cpu"
    assert labels["org.opencontainers.image.base.name"]


def test_doctor_finds_nothing_wrong_without_rights_and_on_a_file_system_that_can_not_be_written() -> None:
    done = run("doctor", flags=tuple(LOCKED))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 cpu" in done.stdout and "installed with the image" in done.stdout and "failed" not in done.stdout


def test_it_runs_as_nobody_who_may_change_what_is_installed(config: dict[str, Any]) -> None:
    assert config["User"] == "10001"
    assert run("id", "-u").stdout == "10001\n"
    found = run("find", "/opt/rlhf-ppo", "/usr", "-writable", "-not", "-type", "l").stdout
    assert found == ""
    # Platforms that choose the user give it group 0.
    assert run("touch", "/home/ppo/file", flags=("--user=123456:0",)).returncode == 0


def test_the_job_that_applies_schedules_can_speak_to_kfp() -> None:
    job = yaml.safe_load((Path(__file__).parent.parent / "manifests/base/schedule-job.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    variables = [f"--env={each['name']}={each['value']}" for each in container["env"]]
    command = [*container["command"][:3], "/tmp/schedules.yaml", "--yes"]
    script = f"echo 'owner: a\nschedules: []' > /tmp/schedules.yaml; echo token > /tmp/token; exec {' '.join(command)}"
    given = ("--env=KF_PIPELINES_ENDPOINT=http://localhost:1", "--env=KF_PIPELINES_SA_TOKEN_PATH=/tmp/token")
    done = run("sh", "-c", script, flags=(*LOCKED, *variables, *given, "--env=RLHF_PPO_RETRY_PAUSE=0"))
    assert done.returncode == 1 and "the KFP API server does not answer" in done.stderr, done.stderr


def test_it_holds_nothing_that_is_only_needed_to_build_or_to_test() -> None:
    holds = run("sh", "-c", "ls -d /src /root/.cache/pip /tmp/constraints.txt /opt/rlhf-ppo/bin/pip* 2>/dev/null")
    assert holds.stdout == ""
    packages = run("python3", "-c", "import pytest").stderr
    assert "No module named 'pytest'" in packages


def test_kubernetes_and_kfps_executor_are_there_and_the_pipeline_is_not_compiled_there() -> None:
    code = "import kubernetes, kfp.dsl.executor_main, rlhf_ppo.ppo_training.train"
    assert run("python3", "-c", code).returncode == 0


# The whole pipeline


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A model, prompts and a reward, in the one directory that KFP lets containers see; they may write there."""
    llama(seed=3).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    rows = [json.dumps({"prompt": f"w{3 + i % 60} w{3 + i // 60} w5"}) for i in range(120)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    (tmp_path / "my_reward.py").write_text(REWARD)
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(0o777)
    (tmp_path / "model" / "model.safetensors").chmod(0o644)
    mask = os.umask(0)
    yield tmp_path
    os.umask(mask)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What KFP talks to: docker's own socket, or podman's."""
    if ENGINE != "podman":
        yield
        return
    socket = tmp_path_factory.mktemp("engine") / "podman.sock"
    service = subprocess.Popen(["podman", "system", "service", "--time=0", f"unix://{socket}"])
    while not socket.exists():
        assert service.poll() is None
        time.sleep(0.05)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOCKER_HOST", f"unix://{socket}")
        yield
    service.terminate()
    service.wait()


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a container until its exit code was read.

    KFP has the engine remove it at its end, and takes one that is gone for one that succeeded (and podman's answer
    for an error).
    """
    from docker.models.containers import Container, ContainerCollection

    run_container, wait = ContainerCollection.run, Container.wait

    def run_and_keep(self: Any, *arguments: Any, auto_remove: bool = False, **settings: Any) -> Any:
        return run_container(self, *arguments, **settings)

    def wait_and_remove(self: Any, **settings: Any) -> Any:
        found = wait(self, **settings)
        self.remove(force=True)
        return found

    monkeypatch.setattr(ContainerCollection, "run", run_and_keep)
    monkeypatch.setattr(Container, "wait", wait_and_remove)


def in_containers(place: Path, *changes: str) -> None:
    """Run the pipeline as compile --image writes it, with KFP's DockerRunner; raises where a step fails."""
    from kfp import components, local

    given = [
        f"model_name={place}/model", f"query_dataset={place}/prompts.jsonl", "reward_model=my_reward:high",
        "steps=32", "batch_size=8", "mini_batch_size=4", "ppo_epochs=1", "rollout_max_new_tokens=8",
        "gate_min_prompts=2", "eval_max_prompts=8", *changes,
    ]  # fmt: skip
    parameters = read_parameters(None, None, given)
    # DockerRunner takes an image's name as it is: what is a parameter on a cluster is filled in here.
    text = packaged(image=IMAGE).replace("{{$.inputs.parameters[''pipelinechannel--node_image'']}}", IMAGE)
    documents = list(yaml.safe_load_all(text))
    for dag in (documents[0]["root"], *documents[0]["components"].values()):
        for task in dag.get("dag", {}).get("tasks", {}).values():
            task.pop("retryPolicy", None)
    environment = {
        "PYTHONPATH": str(place),
        "MLFLOW_TRACKING_URI": f"sqlite:///{place}/mlflow.db",
        "RLHF_PPO_EVENTS": f"{place}/events.jsonl",
        "RLHF_PPO_SPOOL": f"{place}/spool",
    }
    runner = local.DockerRunner(environment=environment, network_mode="host")
    local.init(runner, pipeline_root=str(place), workspace_root=str(place / "workspace"))
    components.load_component_from_text(yaml.safe_dump_all(documents))(**parameters)


@pytest.mark.filterwarnings("ignore")
def test_the_whole_pipeline_runs_in_containers(engine: None, kept: None, place: Path, config: dict[str, Any]) -> None:
    started = time.monotonic()
    in_containers(place)
    print(f"the pipeline took {time.monotonic() - started:.0f} s in containers")
    (policy,) = place.glob("rlhf-ppo-*/train-ppo/policy")
    AutoModelForCausalLM.from_pretrained(policy)
    (evaluation,) = place.glob("rlhf-ppo-*/evaluate-policy/evaluation")
    assert {"report.html", "evaluation.json"} <= {path.name for path in evaluation.iterdir()}
    events = [json.loads(line) for line in (place / "events.jsonl").read_text().splitlines()]
    finished = [event["step"] for event in events if event["kind"] == "step_finished"]
    assert finished[0] == "validate_config" and finished[-1] == "conclude_run" and "gate" in finished
    assert policy.stat().st_uid == 10001


@pytest.mark.filterwarnings("ignore")
def test_a_step_that_fails_in_its_container_fails_the_run(engine: None, kept: None, place: Path) -> None:
    with pytest.raises(RuntimeError):
        in_containers(place, "reward_model=my_reward:broken")
    events = [json.loads(line) for line in (place / "events.jsonl").read_text().splitlines()]
    (failed,) = [event for event in events if event["kind"] == "step_failed"]
    assert failed["step"] == "train_ppo" and "the reward service went away" in failed["message"]
