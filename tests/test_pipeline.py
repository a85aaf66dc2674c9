"""The compiled pipeline as it ships: its wiring in a local run, and what it says of itself."""

import inspect
import json
import os
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from kfp import components, local
from kfp.kubernetes import kubernetes_executor_config_pb2
from kfp.pipeline_spec import pipeline_spec_pb2

from rlhf_pipelines.compile import COMPILED, COMPONENTS
from rlhf_pipelines.ppo import HF_SECRET, TRAINING_POD
from rlhf_ppo.config import PPO_PARAMETERS
from rlhf_ppo.descriptions import describe
from rlhf_ppo.fields import Parameter
from rlhf_ppo.parameters import PARAMETERS, RunSettings, decode, defaults, encode

FAKES = Path(__file__).parent / "fakes"
TYPES = {
    str: "STRING",
    int: "NUMBER_INTEGER",
    float: "NUMBER_DOUBLE",
    bool: "BOOLEAN",
    dict: "STRUCT",
    list: "LIST",
}
STEPS = ["detect_changes", "snapshot_reference", "prepare_dataset", "train_ppo", "evaluate_policy", "gate"]


def documents() -> list[dict[str, Any]]:
    """The pipeline's specification and what it asks of Kubernetes."""
    return list(yaml.safe_load_all(COMPILED.read_text()))


def inner_tasks(spec: dict[str, Any]) -> dict[str, Any]:
    """Every task by name, whatever group it stands in."""
    dags = [spec["root"], *spec["components"].values()]
    return {name: task for dag in dags for name, task in dag.get("dag", {}).get("tasks", {}).items()}


class Run:
    """One local run of the compiled pipeline in which only the first step does its real work."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.monkeypatch = root, monkeypatch
        self.calls, self.events = root / "calls", root / "events"
        self.model, self.data = root / "model", root / "prompts.jsonl"
        self.model.mkdir()
        (self.model / "config.json").write_text("{}")
        (self.model / "model.safetensors").write_text("weights")
        self.data.write_text('{"prompt": "hello"}\n')
        (root / "my_reward.py").write_text("def length(prompts, responses):\n    return [1.0] * len(responses)\n")

    def sources(self) -> dict[str, str]:
        """The parameters that every run must be given."""
        return {
            "model_name": str(self.model),
            "query_dataset": str(self.data),
            "reward_model": "my_reward:length",
        }

    def start(
        self,
        *,
        changed: str = "true",
        gate: str = "true",
        fails: str = "",
        not_installed: str = "-",
        **parameters: Any,
    ) -> dict[str, dict[str, Any]]:
        """Run the pipeline; the calls of its steps, in their order, by name."""
        self.monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
        path = os.pathsep.join([str(FAKES), *sys.path, str(self.root)])
        for name, value in {
            "PYTHONPATH": path,
            "CALLS": self.calls,
            "RLHF_PPO_EVENTS": self.events,
            "CHANGED": changed,
            "GATE": gate,
            "FAILS": fails,
            "NOT_INSTALLED": not_installed,
        }.items():
            self.monkeypatch.setenv(name, str(value))
        spec, platform = documents()
        for task in inner_tasks(spec).values():
            task.pop("retryPolicy", None)
        pipeline = components.load_component_from_text(yaml.safe_dump_all([spec, platform]))
        local.init(
            local.SubprocessRunner(use_venv=False),
            pipeline_root=str(self.root / "out"),
            workspace_root=str(self.root / "workspace"),
            raise_on_error=False,
        )
        pipeline(**{**self.sources(), **parameters})
        calls = [json.loads(line) for line in self.calls.read_text().splitlines()]
        assert len({call["step"] for call in calls}) == len(calls), "a step ran twice"
        return {call["step"]: call for call in calls}

    def failures(self) -> list[dict[str, Any]]:
        """The events of failed steps."""
        events = [json.loads(line) for line in self.events.read_text().splitlines()]
        return [event for event in events if event["kind"] == "step_failed"]

    def outputs_of(self, task: str) -> dict[str, Any]:
        """What the executor of a task wrote."""
        (path,) = (self.root / "out").glob(f"*/{task}/executor_output.json")
        outputs: dict[str, Any] = json.loads(path.read_text())
        return outputs


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "work",
    [
        "rlhf_ppo.change_detection.detect.detect_changes",
        "rlhf_ppo.reference_snapshot.snapshot.snapshot_reference",
        "rlhf_ppo.dataset_preparation.prepare.prepare_dataset",
        "rlhf_ppo.ppo_training.train.train_on_cards",
        "rlhf_ppo.policy_evaluation.evaluate.evaluate_policy",
        "rlhf_ppo.policy_evaluation.gate.gate",
        "rlhf_ppo.hub_push.push.push_to_hub",
    ],
)
def test_the_stand_ins_take_what_the_steps_take(work: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FAKES)
    light = pkgutil.resolve_name(f"light_work:{work.rpartition('.')[2]}")
    real = pkgutil.resolve_name(work)
    assert list(inspect.signature(light).parameters) == list(inspect.signature(real).parameters)


@pytest.mark.filterwarnings("ignore")
def test_a_policy_that_passes_the_gate_is_pushed(run: Run) -> None:
    calls = run.start(gate="true")
    assert list(calls) == [*STEPS, "push_to_hub", "conclude_run"]
    assert calls["prepare_dataset"]["tokenizer"] == "tokenizer"
    assert calls["train_ppo"]["prompts"] == calls["evaluate_policy"]["prompts"] == "prompts"
    assert calls["train_ppo"]["reference"] == calls["evaluate_policy"]["reference"] == "reference"
    assert calls["evaluate_policy"]["policy"] == calls["push_to_hub"]["policy"] == "policy"
    assert calls["evaluate_policy"]["policy_uri"] == calls["push_to_hub"]["policy_uri"] != ""
    assert calls["evaluate_policy"]["history"] == "history"
    assert calls["gate"]["evaluation"] == calls["push_to_hub"]["evaluation"] == "evaluation"
    with_config = ("detect_changes", "train_ppo", "evaluate_policy", "push_to_hub")
    assert len({calls[step]["config"] for step in with_config}) == 1
    ids = {calls[step]["run_id"] for step in (*with_config, "conclude_run")}
    assert len(ids) == 1 and "{" not in ids.pop()
    assert calls["conclude_run"]["state"] == "SUCCEEDED"
    assert {call["environment"] for call in calls.values()} == {"1"}


@pytest.mark.filterwarnings("ignore")
def test_a_policy_that_fails_the_gate_is_not_pushed(run: Run) -> None:
    calls = run.start(gate="false")
    assert list(calls) == [*STEPS, "conclude_run"]
    assert calls["conclude_run"]["state"] == "SUCCEEDED"
    # Artifacts say what they hold; only finite numbers stand in metrics, since others break KFP's launcher.
    metrics = run.outputs_of("train-ppo")["artifacts"]["metrics"]["artifacts"][0]["metadata"]
    assert metrics == {"final_objective/kl": 1.5}
    policy = run.outputs_of("train-ppo")["artifacts"]["policy"]["artifacts"][0]["metadata"]
    assert policy == {"reference_digest": "d1", "prompts_digest": "d2"}


@pytest.mark.filterwarnings("ignore")
def test_a_run_without_anything_new_trains_nothing_and_succeeds(run: Run) -> None:
    calls = run.start(changed="false")
    assert list(calls) == ["detect_changes", "conclude_run"]
    assert calls["conclude_run"]["state"] == "SUCCEEDED"
    digests = [calls["detect_changes"][name] for name in ("model_digest", "data_digest")]
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests) and digests[0] != digests[1]


@pytest.mark.filterwarnings("ignore")
def test_a_failing_step_ends_the_run_and_is_concluded(run: Run) -> None:
    calls = run.start(fails="train_ppo")
    assert list(calls) == [*STEPS[:4], "conclude_run"]
    assert calls["conclude_run"]["state"] == "FAILED" and calls["conclude_run"]["message"]
    assert calls["conclude_run"]["experiment"] == "trl"
    (failure,) = run.failures()
    assert failure["step"] == "train_ppo" and failure["message"] == "RuntimeError: train_ppo has no luck"
    assert failure["input_error"] is False


@pytest.mark.filterwarnings("ignore")
def test_a_step_that_lacks_a_package_says_so_in_plain_words(run: Run) -> None:
    run.start(not_installed="train")
    (failure,) = run.failures()
    assert failure["step"] == "train_ppo" and failure["message"] == "ModuleNotFoundError: No module named 'torch'"


@pytest.mark.filterwarnings("ignore")
def test_bad_input_ends_the_run_before_anything_else_starts(run: Run) -> None:
    calls = run.start(batch_size=3, mini_batch_size=2, model_name="/no/such/model")
    assert list(calls) == ["conclude_run"]
    assert calls["conclude_run"]["state"] == "FAILED"
    (failure,) = run.failures()
    assert failure["input_error"] is True
    assert "batch_size=3" in failure["message"] and "model_name='/no/such/model'" in failure["message"]


def something_else(parameter: Parameter) -> Any:
    """A valid value, in KFP's encoding, that is not the default."""
    default, declaration = parameter.default, parameter.declaration
    if declaration.choices:
        return next(choice for choice in declaration.choices if choice != default)
    if parameter.type is bool:
        return not default
    if parameter.type is str:
        return f"another {parameter.name}"
    if parameter.type is dict:
        return {"repo_id": "me/model", "deep": {"count": 3, "rate": 0.5}}
    if parameter.type is list:
        return [{"key": "pool", "tolerationSeconds": 2}]
    if declaration.maximum is not None and declaration.maximum <= 1:
        return 0.25
    return default * 2 if default else parameter.type(2)


@pytest.mark.filterwarnings("ignore")
def test_every_parameter_reaches_the_steps_as_it_was_given(run: Run) -> None:
    given = {name: something_else(parameter) for name, parameter in PARAMETERS.items()}
    given |= run.sources()
    given |= {"model_revision": "", "data_revision": "", "reward_revision": "", "hub_repo_id": "me/model"}
    given |= {"push_to_hub_if_best_kwargs": {"repo_id": "me/model", "private": False}}
    given |= {"pad_max_input_len": 1024, "pad_max_len": 2048, "log_with": "mlflow", "eval_seed": 2**31}
    given |= {"checkpoint_name": "mine", "ppo_shared_layers": 0, "ppo_value_head": given["model_name"]}
    given |= {"reward_sum": {given["reward_model"]: 0.5}, "eval_judge": given["reward_model"]}
    given |= {"node_cpu": "500m", "node_memory": "64Gi", "node_selector": {"pool": "a"}}
    given |= {"use_habana": False, "hub_adapter": False}
    calls = run.start(**given)
    expected = encode(decode(given))
    arrived = encode(RunSettings.from_json(calls["train_ppo"]["config"]))
    assert arrived == expected
    of_data = {name: value for name, value in expected.items() if name.startswith("data_")}
    assert calls["prepare_dataset"]["data"] == of_data
    assert calls["prepare_dataset"]["max_new_tokens"] == expected["rollout_max_new_tokens"]
    assert calls["prepare_dataset"]["remove_unused_columns"] is False
    assert calls["conclude_run"]["experiment"] == expected["tracker_project_name"]
    assert calls["conclude_run"]["mlflow_tracking_uri"] == expected["mlflow_tracking_uri"]


def test_the_pipeline_has_one_typed_described_parameter_for_each_settable_field() -> None:
    inputs = documents()[0]["root"]["inputDefinitions"]["parameters"]
    assert set(inputs) == set(PARAMETERS)
    assert len(PPO_PARAMETERS) == 43
    for name, parameter in PARAMETERS.items():
        assert inputs[name]["parameterType"] == TYPES[parameter.type], name
        assert inputs[name]["defaultValue"] == defaults()[name], name
        assert isinstance(inputs[name]["defaultValue"], bool) == (parameter.type is bool), name
        assert inputs[name]["description"] == describe(parameter), name


def test_descriptions_say_unit_valid_values_and_how_to_leave_a_parameter_out() -> None:
    inputs = documents()[0]["root"]["inputDefinitions"]["parameters"]
    assert inputs["target"]["description"].endswith("Unit: nats per response. Valid: > 0.")
    assert inputs["max_grad_norm"]["description"].endswith("Valid: > 0, or 0.0 for off.")
    assert inputs["log_with"]["description"].endswith(
        "Valid: one of 'mlflow', 'wandb', 'tensorboard', or \"\" for none."
    )


def test_nothing_optional_or_null_crosses_a_component_boundary() -> None:
    spec, _ = documents()

    def nulls(value: Any, where: str = "") -> Iterator[str]:
        if value is None:
            yield where
        pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in pairs:
            yield from nulls(inner, f"{where}/{key}")

    assert list(nulls(spec)) == []
    for name, component in {**spec["components"], "root": spec["root"]}.items():
        definitions = component.get("inputDefinitions", {})
        for parameter, definition in definitions.get("parameters", {}).items():
            if definition["parameterType"] != "TASK_FINAL_STATUS":  # which KFP itself fills
                assert not definition.get("isOptional") or "defaultValue" in definition, (name, parameter)
        for artifact, definition in definitions.get("artifacts", {}).items():
            assert not definition.get("isOptional"), (name, artifact)


def test_the_compiled_files_are_what_kfp_and_kubernetes_understand() -> None:
    spec, platform = documents()
    json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())
    parsed = json_format.ParseDict(platform, pipeline_spec_pb2.PlatformSpec())
    executors = json_format.MessageToDict(parsed)["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for settings in executors.values():
        config = json_format.ParseDict(settings, kubernetes_executor_config_pb2.KubernetesExecutorConfig())
        assert config.secret_as_env[0].secret_name == HF_SECRET and config.secret_as_env[0].optional
    with_token = ("validate-config", "snapshot-reference", "prepare-dataset", "train-ppo", "evaluate-policy")
    assert set(executors) == {f"exec-{name}" for name in (*with_token, "push-to-hub")}
    for path in COMPONENTS:
        (component,) = yaml.safe_load_all(path.read_text())
        json_format.ParseDict(component, pipeline_spec_pb2.PipelineSpec())
        assert components.load_component_from_file(str(path)).name == component["pipelineInfo"]["name"]


def test_only_steps_that_their_inputs_decide_are_cached() -> None:
    tasks = inner_tasks(documents()[0])
    cached = {name for name, task in tasks.items() if task.get("cachingOptions", {}).get("enableCache")}
    assert cached == {"snapshot-reference", "prepare-dataset"}
    # KFP's cache knows artifacts by name only: what they and the sources hold must come in as parameters.
    snapshot = tasks["snapshot-reference"]["inputs"]["parameters"]
    prepare = tasks["prepare-dataset"]["inputs"]["parameters"]
    (outer,) = [task for task in tasks.values() if "detect-changes" in task.get("dependentTasks", [])]
    for parameters, name in (
        (snapshot, "model_revision"),
        (snapshot, "model_digest"),
        (prepare, "data_revision"),
        (prepare, "data_digest"),
    ):
        handed_down = parameters[name]["componentInputParameter"]
        assert outer["inputs"]["parameters"][handed_down]["taskOutputParameter"] == {
            "producerTask": "validate-config",
            "outputParameterKey": name,
        }
    assert prepare["tokenizer_digest"]["taskOutputParameter"]["producerTask"] == "snapshot-reference"
    for parameters in (snapshot, prepare):
        assert not any("pipeline_job" in str(value) for value in parameters.values())


def test_the_conditions_are_on_the_single_bools_of_detect_changes_and_gate() -> None:
    tasks = inner_tasks(documents()[0])
    conditions = [task["triggerPolicy"]["condition"] for name, task in tasks.items() if name.startswith("condition")]
    assert sorted(conditions) == [
        f"inputs.parameter_values['pipelinechannel--{task}-Output'] == true" for task in ("detect-changes", "gate")
    ]


def test_every_value_is_handed_down_to_the_task_that_reads_it() -> None:
    """Also those that only a pod's resources read, which KFP's compiler leaves out of a condition by itself."""
    spec, platform = documents()
    on_kubernetes = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    checked = set()
    for dag in (spec["root"], *(each for each in spec["components"].values() if "dag" in each)):
        there = dag["inputDefinitions"]["parameters"]
        for name, task in dag["dag"]["tasks"].items():
            read = task.get("inputs", {}).get("parameters", {})
            for given in read.values():
                if "taskOutputParameter" in given:
                    producer = dag["dag"]["tasks"][given["taskOutputParameter"]["producerTask"]]["componentRef"]["name"]
                    outputs = spec["components"][producer]["outputDefinitions"]["parameters"]
                    assert given["taskOutputParameter"]["outputParameterKey"] in outputs, name
                elif "componentInputParameter" in given:
                    assert given["componentInputParameter"] in there, name
            executor = spec["components"][task["componentRef"]["name"]].get("executorLabel", "")
            pod = json.dumps([spec["deploymentSpec"]["executors"].get(executor), read])
            asked = set(re.findall(r"inputs\.parameters\['(.+?)'\]", pod))
            assert asked <= set(read), name
            placed = re.findall(r'"componentInputParameter": "(.+?)"', json.dumps(on_kubernetes.get(executor)))
            assert set(placed) <= set(there), name
            checked |= asked | set(placed)
    pod_of_training = {f"pipelinechannel--validate-config-{name}" for name in TRAINING_POD}
    assert pod_of_training | {"pipelinechannel--node_image", "pipelinechannel--node_memory"} <= checked


def test_steps_that_may_fail_by_bad_luck_are_retried() -> None:
    tasks = inner_tasks(documents()[0])
    retried = {name for name, task in tasks.items() if task.get("retryPolicy", {}).get("maxRetryCount")}
    once = {"validate-config", "gate", "conclude-run"}
    assert retried == {name for name in tasks if "handler" not in name and "condition" not in name} - once
