"""What the pods of training and evaluation ask Kubernetes for, read from the compiled pipeline as KFP's driver does."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from kfp import compiler, dsl, kubernetes
from kfp.kubernetes import kubernetes_executor_config_pb2

from rlhf_pipelines.cli import read_parameters
from rlhf_pipelines.compile import COMPILED, packaged
from rlhf_ppo.config_validation import validate
from rlhf_ppo.errors import InputError
from rlhf_ppo.images import CPU_IMAGE
from rlhf_ppo.node_settings import NodeSettings
from rlhf_ppo.parameters import decode

OVERLAYS = Path(__file__).parent.parent / "manifests" / "overlays"
NEEDED = ["model_name=org/model", "query_dataset=org/data", "reward_model=my_reward:score"]
CHANNEL = re.compile(r"\{\{\$\.inputs\.parameters\['pipelinechannel--(.+?)'\]\}\}")


class Pod:
    """What one task asks for when the pipeline is started with ``parameters``."""

    def __init__(self, task: str, parameters: dict[str, Any], text: str | None = None) -> None:
        self.spec, self.platform = yaml.safe_load_all(text or COMPILED.read_text())
        config = decode(parameters).to_json()
        outputs = dict(zip(validate.TrainingPod._fields, validate.training_pod(config), strict=True))
        self.values = parameters | {f"validate-config-train_{name}": value for name, value in outputs.items()}
        container = self.spec["deploymentSpec"]["executors"][f"exec-{task}"]["container"]
        self.image = self._value(container["image"])
        resources = container["resources"]
        self.accelerator = tuple(
            self._value(resources["accelerator"][name]) for name in ("resourceType", "resourceCount")
        )
        self.cpu = {self._value(resources[f"resourceCpu{kind}"]) for kind in ("Limit", "Request")}
        self.memory = {self._value(resources[f"resourceMemory{kind}"]) for kind in ("Limit", "Request")}
        found = self.platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"][f"exec-{task}"]
        self.config = json_format.ParseDict(found, kubernetes_executor_config_pb2.KubernetesExecutorConfig())
        self.node_selector = self._input(self.config.node_selector.node_selector_json)
        (toleration,) = self.config.tolerations
        self.tolerations = self._input(toleration.toleration_json)

    def _value(self, text: str) -> str:
        return CHANNEL.sub(lambda found: str(self.values[found[1]]), text)

    def _input(self, given: Any) -> Any:
        """The value of an input that names a parameter of the run or an output of validate_config."""
        if given.HasField("task_output_parameter"):
            assert given.task_output_parameter.producer_task == "validate-config"
            return self.values[f"validate-config-{given.task_output_parameter.output_parameter_key}"]
        return self.values[given.component_input_parameter.removeprefix("pipelinechannel--")]


def overlay(name: str) -> dict[str, Any]:
    """The parameters of a run that is started with a file of manifests/overlays."""
    return read_parameters(None, str(OVERLAYS / name), NEEDED)


def test_without_parameters_a_pod_asks_for_nothing_and_runs_on_any_node() -> None:
    parameters = read_parameters(None, None, NEEDED)
    for task in ("train-ppo", "evaluate-policy"):
        pod = Pod(task, parameters)
        assert pod.image == CPU_IMAGE
        assert pod.accelerator[0] == "" and pod.cpu == pod.memory == {"0"}
        assert pod.node_selector == {} and pod.tolerations == []


@pytest.mark.parametrize(
    ("name", "resource", "cpu", "memory"),
    [("gpu", "nvidia.com/gpu", "8", "64Gi"), ("gaudi", "habana.ai/gaudi", "10", "80Gi")],
)
def test_a_preset_puts_training_and_evaluation_on_its_pool(name: str, resource: str, cpu: str, memory: str) -> None:
    for task in ("train-ppo", "evaluate-policy"):
        pod = Pod(task, overlay(f"{name}/parameters.yaml"))
        assert pod.image == f"rlhf-ppo/{name}:0.1.0"
        assert pod.accelerator == (resource, "1")
        assert pod.cpu == {cpu} and pod.memory == {memory}
        assert pod.tolerations == [{"key": resource, "operator": "Exists", "effect": "NoSchedule"}]
    assert overlay(f"{name}/parameters.yaml")["use_habana"] is (name == "gaudi")


@pytest.mark.parametrize(("name", "resource"), [("gpu", "nvidia.com/gpu"), ("gaudi", "habana.ai/gaudi")])
def test_a_step_that_waits_for_a_train_job_takes_no_card_from_it(name: str, resource: str) -> None:
    parameters = overlay(f"{name}/parameters-nodes.yaml")
    waiting = Pod("train-ppo", parameters)
    assert waiting.accelerator == ("", "0") and waiting.cpu == waiting.memory == {"0"}
    assert waiting.node_selector == {} and waiting.tolerations == []
    assert waiting.image == f"rlhf-ppo/{name}:0.1.0"
    assert Pod("evaluate-policy", parameters).accelerator == (resource, "1")


def test_every_setting_of_the_pool_reaches_the_pod() -> None:
    given = read_parameters(
        None,
        None,
        [
            *NEEDED,
            "node_image=registry.example/mine:2",
            "node_accelerator=nvidia.com/gpu",
            "node_accelerator_count=4",
            "node_cpu=500m",
            "node_memory=1.5Gi",
            'node_selector={"pool": "a"}',
            'node_tolerations=[{"key": "k"}]',
        ],
    )
    pod = Pod("train-ppo", given)
    assert pod.image == "registry.example/mine:2"
    assert pod.accelerator == ("nvidia.com/gpu", "4") and Pod("evaluate-policy", given).accelerator[1] == "1"
    assert pod.cpu == {"500m"} and pod.memory == {"1.5Gi"}
    assert pod.node_selector == {"pool": "a"} and pod.tolerations == [{"key": "k"}]


def test_processes_in_a_pod_have_shared_memory() -> None:
    (mount,) = Pod("train-ppo", read_parameters(None, None, NEEDED)).config.empty_dir_mounts
    assert (mount.mount_path, mount.medium, mount.size_limit) == ("/dev/shm", "Memory", "")


def test_an_image_replaces_every_steps_and_is_the_default_of_node_image() -> None:
    text = packaged(image="registry.example/ppo@sha256:0123")
    assert CPU_IMAGE not in text
    spec, _ = yaml.safe_load_all(text)
    images = {executor["container"]["image"] for executor in spec["deploymentSpec"]["executors"].values()}
    assert images == {"registry.example/ppo@sha256:0123", "{{$.inputs.parameters['pipelinechannel--node_image']}}"}
    default = spec["root"]["inputDefinitions"]["parameters"]["node_image"]["defaultValue"]
    assert default == "registry.example/ppo@sha256:0123"


def test_a_volume_is_mounted_as_kfp_mounts_it_and_holds_the_checkpoints(tmp_path: Path) -> None:
    spec, platform = yaml.safe_load_all(packaged(volume="training"))
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]

    @dsl.component(base_image="image")
    def work() -> None: ...

    @dsl.pipeline(name="reference")
    def reference() -> None:
        kubernetes.mount_pvc(work(), "training", "/mnt/rlhf-ppo")

    compiler.Compiler().compile(reference, str(tmp_path / "reference.yaml"))
    _, theirs = yaml.safe_load_all((tmp_path / "reference.yaml").read_text())
    expected = theirs["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-work"]["pvcMount"]
    assert executors["exec-train-ppo"]["pvcMount"] == expected
    assert [name for name, found in executors.items() if "pvcMount" in found] == ["exec-train-ppo"]
    environment = {
        variable["name"]: variable["value"]
        for variable in spec["deploymentSpec"]["executors"]["exec-train-ppo"]["container"]["env"]
    }
    assert environment["RLHF_PPO_CHECKPOINTS"] == "/mnt/rlhf-ppo/checkpoints"
    assert environment["RLHF_PPO_VOLUME"] == "training"
    # Nothing else differs from what ships.
    spec["deploymentSpec"]["executors"]["exec-train-ppo"]["container"]["env"] = [
        {"name": "PYTHONUNBUFFERED", "value": "1"}
    ]
    del executors["exec-train-ppo"]["pvcMount"]
    assert [spec, platform] == list(yaml.safe_load_all(COMPILED.read_text()))


@pytest.mark.parametrize("wrong", [{"image": "a b"}, {"volume": "Has_Capitals"}, {"volume": "-x"}])
def test_a_name_that_kubernetes_would_refuse_is_refused_here(wrong: dict[str, str]) -> None:
    with pytest.raises(InputError):
        packaged(**wrong)


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"node_accelerator": "nvidia.com/gpu"}, "node_accelerator_count=0"),
        ({"node_accelerator_count": 2}, "node_accelerator=''"),
        ({"node_accelerator": "nvidia.com/mig-1g.10gb", "node_accelerator_count": 2}, "set 1"),
        (
            {"node_accelerator": "nvidia.com/gpu", "node_accelerator_count": 2, "node_processes": 4},
            "node_processes=4 exceeds node_accelerator_count=2",
        ),
        ({"node_cpu": "eight"}, "node_cpu='eight'"),
        ({"node_memory": ""}, "node_memory=''"),
        ({"node_memory": "64 GB"}, "node_memory='64 GB'"),
        ({"node_selector": {"gpu": True}}, "node_selector has True for 'gpu'"),
        ({"node_tolerations": ["gpu"]}, "node_tolerations holds 'gpu'"),
        ({"node_tolerations": [{"kee": "gpu"}]}, "node_tolerations holds {'kee': 'gpu'}"),
        ({"node_resources": {"hugepages-2Mi": "1Gi"}}, "node_count"),
    ],
)
def test_what_kubernetes_would_not_understand_is_said_at_once(wrong: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError) as caught:
        NodeSettings(**wrong)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (["node_accelerator=habana.ai/gaudi", "node_accelerator_count=1"], "use_habana=False contradicts"),
        (["node_accelerator=nvidia.com/gpu", "node_accelerator_count=1", "use_habana=true"], "use_habana=True contra"),
        (["node_sharding=true"], "needs pad_for_acceleration=True"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(wrong: list[str], problem: str) -> None:
    with pytest.raises(InputError) as caught:
        read_parameters(None, None, [*NEEDED, *wrong])
    assert problem in str(caught.value)
