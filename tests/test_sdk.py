"""For people's own code: the pipeline and its components by import, with the real kfp client, and in their own DAGs."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from kfp import Client, compiler, components, dsl, local
from kfp_server_api import ApiException

import rlhf_pipelines
from kfp_server import Kfp
from rlhf_pipelines.compile import COMPILED, COMPONENTS
from tiny_models import llama, word_tokenizer

NEEDED = {"model_name": "org/model", "query_dataset": "org/prompts", "reward_model": "org/reward"}


def names_after(code: str) -> set[str]:
    """The distributions that are loaded after ``code``."""
    script = f"{code}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    )


def test_importing_the_package_loads_nothing_heavy_and_its_names_load_kfp_and_no_torch() -> None:
    assert not {"kfp", "yaml", "torch", "mlflow"} & names_after("import rlhf_pipelines")
    loaded = names_after("from rlhf_pipelines import *\nassert ppo_pipeline.name == 'rlhf-ppo'\nassert train_ppo")
    assert "kfp" in loaded and not {"torch", "transformers", "datasets", "mlflow"} & loaded


def test_every_component_has_its_name_and_a_name_that_is_none_is_an_import_error() -> None:
    by_name = {component.name.replace("-", "_"): component for component in COMPONENTS.values()}
    assert set(rlhf_pipelines.__all__) == {"ppo_pipeline", *by_name}
    for name, component in by_name.items():
        assert getattr(rlhf_pipelines, name) is component
    with pytest.raises(ImportError, match="train_dpo"):
        from rlhf_pipelines import train_dpo  # noqa: F401


@pytest.fixture
def kfp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kfp]:
    monkeypatch.setenv("HOME", str(tmp_path))  # KFP's client writes there.
    server = Kfp()
    yield server
    server.close()


def test_kfp_s_client_starts_the_pipeline_as_it_ships_and_the_server_checks_the_arguments(kfp: Kfp) -> None:
    client = Client(host=kfp.url, namespace="team")
    given = {**NEEDED, "learning_rate": 3e-5, "node_tolerations": [{"key": "pool"}]}
    start = client.create_run_from_pipeline_func
    result = start(rlhf_pipelines.ppo_pipeline, arguments=given, experiment_name="mine")
    run = kfp.runs[result.run_id]
    spec, platform = yaml.safe_load_all(COMPILED.read_text())
    assert run["pipeline_spec"] == {"pipeline_spec": spec, "platform_spec": platform}
    assert run["runtime_config"]["parameters"] == given
    for wrong in ({"batchsize": 3}, {"batch_size": "3"}, {"seed": None}):
        with pytest.raises(ApiException):
            start(rlhf_pipelines.ppo_pipeline, arguments={**NEEDED, **wrong}, experiment_name="mine")
    assert len(kfp.runs) == 1


def from_files() -> SimpleNamespace:
    """The components as their YAML gives them."""
    loaded = [components.load_component_from_file(str(path)) for path in COMPONENTS]
    return SimpleNamespace(**{component.name.replace("-", "_"): component for component in loaded})


def prompts_of_mine(ours: Any) -> Any:
    """A pipeline of somebody's own, with a step of theirs after two of ours."""

    @dsl.component(base_image="python:3.11", install_kfp_package=False)
    def count(prompts: dsl.Input[dsl.Dataset]) -> int:
        return int(prompts.metadata["train"]) + int(prompts.metadata["validation"])

    @dsl.pipeline(name="prompts-of-mine")
    def pipeline(model_name: str, query_dataset: str) -> int:
        snapshot = ours.snapshot_reference(model_name=model_name, model_revision="", model_digest="")
        snapshot.set_caching_options(False)
        prepared = ours.prepare_dataset(
            tokenizer=snapshot.outputs["tokenizer"],
            tokenizer_digest=snapshot.outputs["Output"],
            data_digest="",
            query_dataset=query_dataset,
            rollout_max_new_tokens=8,
        )
        return count(prompts=prepared.outputs["prompts"]).output  # type: ignore[no-any-return]

    return pipeline


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("source", ["import", "component.yaml"])
def test_a_pipeline_of_one_s_own_reuses_two_steps_compiled_and_run(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    rows = [json.dumps({"prompt": f"w{3 + number} w5"}) for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows, rows[0]]))
    package = tmp_path / "mine.yaml"
    compiler.Compiler().compile(prompts_of_mine(rlhf_pipelines if source == "import" else from_files()), str(package))
    monkeypatch.chdir(tmp_path)
    local.init(
        local.SubprocessRunner(use_venv=False),
        pipeline_root=str(tmp_path / "out"),
        workspace_root=str(tmp_path / "workspace"),
    )
    mine = components.load_component_from_file(str(package))
    task = mine(model_name=str(tmp_path / "model"), query_dataset=str(tmp_path / "rows.jsonl"))
    assert task.output == 40, "of 41 rows one is there twice"
