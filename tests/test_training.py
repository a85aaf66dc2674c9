"""The step that trains: from files to files, with everything a later step reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from rlhf_ppo.dataset_preparation.prepare import prepare_dataset
from rlhf_ppo.devices import Device
from rlhf_ppo.errors import InputError
from rlhf_ppo.parameters import RunSettings, decode
from rlhf_ppo.policy_evaluation.evaluate import evaluate_policy
from rlhf_ppo.ppo_training import train as training
from rlhf_ppo.ppo_training.record import Recorder
from rlhf_ppo.reference_snapshot.snapshot import snapshot_reference
from rlhf_ppo.settings import DataSettings
from rlhf_ppo.steps import running_step
from tiny_models import bart, llama, t5, word_tokenizer

IDS = torch.tensor([[3, 4, 5, 6]])
REWARD = """
def high(prompts, responses):
    return [sum(int(word[1:]) > 33 for word in text.split() if word[1:].isdigit()) / 12 for text in responses]
def too_few(prompts, responses):
    return [1.0]
def not_a_number(prompts, responses):
    return [float("nan")] * len(responses)
def spoils_later(prompts, responses):
    return [1.0 if len(responses) == 2 else float("nan")] * len(responses)
"""


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A tiny model, prompts and rewards, prepared by the real steps."""
    getattr(request, "param", llama)(seed=3).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    snapshot_reference(str(tmp_path / "model"), "", tmp_path / "reference", tmp_path / "tokenizer")
    rows = [json.dumps({"prompt": f"w{3 + i % 60} w{3 + i // 60} w5"}) for i in range(120)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    prepare_dataset(
        query_dataset=str(tmp_path / "rows.jsonl"),
        data=DataSettings(),
        remove_unused_columns=True,
        max_new_tokens=8,
        tokenizer=tmp_path / "tokenizer",
        prompts=tmp_path / "prompts",
    )
    (tmp_path / "tiny_reward.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLHF_PPO_EVENTS", str(tmp_path / "events.jsonl"))
    monkeypatch.setenv("RLHF_PPO_SPOOL", str(tmp_path / "spool"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return tmp_path


def config(**changes: Any) -> str:
    small = {
        "model_name": "model", "query_dataset": "rows.jsonl", "reward_model": "tiny_reward:high", "steps": 24,
        "batch_size": 8, "mini_batch_size": 4, "ppo_epochs": 2, "learning_rate": 1e-2, "rollout_max_new_tokens": 8,
    }  # fmt: skip
    return decode({**small, **changes}).to_json()


def run(inputs: Path, **changes: Any) -> dict[str, float]:
    with running_step("train_ppo"):
        return training.train_ppo(
            config(**changes), inputs / "prompts", inputs / "reference", inputs / "policy", inputs / "history", "run-1"
        )


def events(inputs: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (inputs / "events.jsonl").read_text().splitlines()]
    return [event for event in found if event["kind"] == kind]


def test_training_leaves_a_policy_that_loads_and_the_history_of_every_step(inputs: Path) -> None:
    metrics = run(inputs)
    assert metrics["ppo_steps"] == 3.0
    lines = [json.loads(line) for line in (inputs / "history").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0.0, 1.0, 2.0]
    assert {"env/reward_mean", "objective/kl", "ppo/loss/total", "ppo/policy/clipfrac"} <= set(lines[0])
    policy = AutoModelForCausalLM.from_pretrained(inputs / "policy")
    assert not torch.allclose(policy(IDS).logits, llama(seed=3)(IDS).logits)
    head = load_file(inputs / "policy" / "value_head.safetensors")
    assert {name: tuple(value.shape) for name, value in head.items()} == {
        "v_head.summary.weight": (1, 32),
        "v_head.summary.bias": (1,),
    }
    lineage = json.loads((inputs / "policy" / "training.json").read_text())
    assert lineage["reference_digest"] == json.loads((inputs / "reference" / "digest.json").read_text())["digest"]
    assert [event["done"] for event in events(inputs, "progress")] == [1, 2, 3]
    assert not list(inputs.glob("*.unfinished"))


def test_what_cannot_be_done_about_the_cache_is_said(inputs: Path) -> None:
    run(inputs, optimize_device_cache=True, steps=8)
    assert [event["message"] for event in events(inputs, "note")] == [Device.cache]


def test_the_tracker_has_every_step_and_the_config(inputs: Path) -> None:
    from mlflow import MlflowClient

    from rlhf_ppo.tracking import resend

    commits = {"model_revision": "a" * 40, "data_revision": "b" * 40}  # As validate_config found them.
    run(inputs, **commits)
    assert resend(inputs / "spool") == []
    client = MlflowClient(f"sqlite:///{inputs}/mlflow.db")
    experiment = client.get_experiment_by_name("trl")
    (step,) = client.search_runs([experiment.experiment_id], "tags.`rlhf_ppo.step` = 'train_ppo'")
    assert len(client.get_metric_history(step.info.run_id, "objective/kl")) == 3
    assert step.data.params["batch_size"] == "8" and step.data.params["world_size"] == "1"
    assert step.data.params["rollout_max_new_tokens"] == "8"
    assert commits.items() <= step.data.params.items()
    manifest = json.loads((inputs / "prompts" / "manifest.json").read_text())
    assert step.inputs.dataset_inputs[0].dataset.digest == manifest["digest"][:36]
    assert step.data.tags["prompts.train"] == str(manifest["train"])
    parent = client.get_run(step.data.tags["mlflow.parentRunId"])
    assert parent.info.run_name == "rlhf-ppo run-1"


def test_the_same_seed_trains_the_same_policy(inputs: Path) -> None:
    run(inputs)
    first = load_file(inputs / "policy" / "model.safetensors")
    run(inputs)
    again = load_file(inputs / "policy" / "model.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_adapters_are_merged_exactly_and_also_kept(inputs: Path) -> None:
    from peft import PeftModel

    run(inputs, model_lora_r=4)
    merged = AutoModelForCausalLM.from_pretrained(inputs / "policy")
    apart = PeftModel.from_pretrained(llama(seed=3), str(inputs / "policy" / "adapter")).eval()
    torch.testing.assert_close(merged(IDS).logits, apart(IDS).logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(merged(IDS).logits, llama(seed=3)(IDS).logits, atol=1e-4)


@pytest.mark.parametrize("inputs", [t5, bart], indirect=True)
def test_encoder_decoders_go_through_all_steps(inputs: Path) -> None:
    metrics = run(inputs, eval_max_prompts=8)
    figures = evaluate_policy(
        config(eval_max_prompts=8), inputs / "prompts", inputs / "reference", inputs / "policy", inputs / "history",
        inputs / "evaluation", inputs / "report", "run-1", "/steps/policy",
    )  # fmt: skip
    assert metrics["ppo_steps"] == 3.0 and figures["kl3"] > 0
    policy = AutoModelForSeq2SeqLM.from_pretrained(inputs / "policy")
    reference = AutoModelForSeq2SeqLM.from_pretrained(inputs / "reference")
    logits = [model(input_ids=IDS, decoder_input_ids=IDS).logits for model in (policy, reference)]
    assert not torch.allclose(*logits, atol=1e-3)


def test_the_best_policy_is_the_one_that_was_scored_best(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    means = iter([0.5, 2.0, 1.0])
    saved: list[tuple[int, torch.Tensor]] = []

    def scripted(reward: Any, prompts: list[str], responses: list[str], ids: list[list[int]]) -> list[float]:
        return [0.0, 0.0] if len(responses) == 2 else [next(means)] * len(responses)

    monkeypatch.setattr("rlhf_ppo.ppo.loop.score", scripted)
    keep = training.Keeper.before_update

    def watched(self: training.Keeper, step: int, mean_score: float) -> None:
        weight = self.trainer.policy.pretrained_model.get_input_embeddings().weight  # type: ignore[operator]
        saved.append((step, weight.detach().clone()))
        keep(self, step, mean_score)

    monkeypatch.setattr(training.Keeper, "before_update", watched)
    run(inputs, push_to_hub_if_best_kwargs={"repo_id": "me/m"})
    kept = load_file(inputs / "policy" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(kept, saved[1][1]) and not torch.equal(kept, saved[2][1])
    assert json.loads((inputs / "policy" / "training.json").read_text())["best_step"] == 1


def test_a_model_whose_file_lacks_weights_is_refused(inputs: Path) -> None:
    file = inputs / "reference" / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="^model_name='model': the weights lack model.layers.0.mlp.up_proj.weight "):
        training.build_trainer(RunSettings.from_json(config()), inputs / "reference", word_tokenizer())


def test_reference_and_policy_begin_alike_and_share_no_memory(inputs: Path) -> None:
    trainer = training.build_trainer(RunSettings.from_json(config()), inputs / "reference", word_tokenizer())
    assert trainer.reference is not None
    of_policy, of_reference = trainer.policy.pretrained_model.state_dict(), trainer.reference.state_dict()
    assert all(torch.equal(of_policy[name], of_reference[name]) for name in of_policy)
    with torch.no_grad():
        next(trainer.policy.pretrained_model.parameters()).add_(1)
    assert not all(torch.equal(of_policy[name], of_reference[name]) for name in of_policy)


@pytest.mark.parametrize(
    ("compare_steps", "means", "best"),
    [(1, [1, 0.5, 2], [0, 2]), (2, [1, 0.5, 2, 9, 1.5, 3], [0, 2]), (1, [1, 1, 1], [0])],
)
def test_the_best_is_sought_on_every_nth_step_as_trl_does(
    inputs: Path, compare_steps: int, means: list[float], best: list[int]
) -> None:
    asked = {"push_to_hub_if_best_kwargs": {"repo_id": "me/m"}, "compare_steps": compare_steps}
    for changes, expected in ((asked, best), ({"compare_steps": compare_steps}, [])):
        settings = RunSettings.from_json(config(**changes))
        trainer = training.build_trainer(settings, inputs / "reference", word_tokenizer())
        recorder = Recorder(settings, trainer, None, "run-1")
        assert [step for step, mean in enumerate(means) if recorder.is_best(step, mean)] == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reward_model": "tiny_reward:too_few"}, "1 scores for 2 responses"),
        ({"reward_model": "tiny_reward:not_a_number"}, "nan for response 0"),
        ({"reward_model": "tiny_reward:spoils_later"}, "nan for response 0"),
        ({"reward_model": "tiny_reward:missing"}, "has no function missing"),
        ({"batch_size": 512}, "batch_size=512"),
        (
            {"model_lora_r": 4, "model_lora_target_modules": "no_such_layer"},
            "model_lora_target_modules='no_such_layer'",
        ),
        ({"rollout_max_new_tokens": 64}, "rollout_max_new_tokens=64"),
        ({"use_habana": True}, "use_habana=True"),
    ],
)
def test_bad_input_is_said_with_its_name_and_leaves_no_output(
    inputs: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        run(inputs, **changes)
    (failed,) = events(inputs, "step_failed")
    assert failed["input_error"] and words.split()[0] in failed["message"]
    assert not [path for path in inputs.iterdir() if path.name.startswith(("policy", "history"))]


def test_too_few_prompts_are_said_before_a_model_is_loaded(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "build_trainer", None)
    with pytest.raises(InputError, match="batch_size=512 on 1 processes needs 512 prompts, but there are 1"):
        run(inputs, batch_size=512)
