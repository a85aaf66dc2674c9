"""Stands in for the work of the steps: files as small as can be, and a line in CALLS for each call."""

import json
import os
from pathlib import Path


def _called(step, **arguments):
    line = json.dumps({"step": step, "environment": os.environ.get("PYTHONUNBUFFERED"), **arguments}, default=str)
    with open(os.environ["CALLS"], "a", encoding="utf-8") as stream:
        stream.write(line + "\n")
    if os.environ.get("FAILS") == step:
        raise RuntimeError(f"{step} has no luck")


def _write(directory, name, content):
    Path(directory).mkdir(parents=True, exist_ok=True)
    (Path(directory) / name).write_text(content)


def detect_changes(config, run_id, model_digest, data_digest):
    _called("detect_changes", config=config, run_id=run_id, model_digest=model_digest, data_digest=data_digest)
    return os.environ.get("CHANGED", "true") == "true"


def snapshot_reference(model_name, model_revision, reference, tokenizer):
    _called("snapshot_reference", model_name=model_name, model_revision=model_revision)
    _write(reference, "model.safetensors", "reference")
    _write(tokenizer, "tokenizer.json", "tokenizer")
    return {"source": model_name, "revision": None, "sha256": {}, "digest": "d1"}


def prepare_dataset(*, query_dataset, data, remove_unused_columns, max_new_tokens, tokenizer, prompts):
    _called(
        "prepare_dataset",
        query_dataset=query_dataset,
        data=vars(data),
        remove_unused_columns=remove_unused_columns,
        max_new_tokens=max_new_tokens,
        tokenizer=(tokenizer / "tokenizer.json").read_text(),
    )
    _write(prompts, "train.parquet", "prompts")
    return {"source": query_dataset, "revision": None, "digest": "d2", "train": 9, "validation": 1}


def train_on_cards(config, prompts, reference, policy, history, run_id):
    _called(
        "train_ppo",
        config=config,
        run_id=run_id,
        prompts=(prompts / "train.parquet").read_text(),
        reference=(reference / "model.safetensors").read_text(),
    )
    _write(policy, "model.safetensors", "policy")
    history.write_text("history")
    return {"objective/kl": 1.5, "ppo/mean_scores": float("nan")}


def evaluate_policy(config, prompts, reference, policy, history, evaluation, report, run_id, policy_uri):
    _called(
        "evaluate_policy",
        config=config,
        run_id=run_id,
        prompts=(prompts / "train.parquet").read_text(),
        reference=(reference / "model.safetensors").read_text(),
        policy=(policy / "model.safetensors").read_text(),
        history=history.read_text(),
        policy_uri=policy_uri,
    )
    _write(evaluation, "evaluation.json", "evaluation")
    report.write_text("<h1>report</h1>")
    return {"score_gain": 0.5}


def gate(evaluation):
    _called("gate", evaluation=(evaluation / "evaluation.json").read_text())
    return os.environ["GATE"] == "true"


def push_to_hub(config, policy, evaluation, run_id, policy_uri):
    _called(
        "push_to_hub",
        config=config,
        run_id=run_id,
        policy=(policy / "model.safetensors").read_text(),
        evaluation=(evaluation / "evaluation.json").read_text(),
        policy_uri=policy_uri,
    )
    return "revision"


def conclude_run(run_id, state, failed_step_message, **where):
    _called("conclude_run", run_id=run_id, state=state, message=failed_step_message, **where)
