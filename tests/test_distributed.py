"""The result does not depend on the number of processes: torchrun with gloo against one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed_worker import policy

HERE = Path(__file__).parent
WORKER = str(HERE / "distributed_worker.py")
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
    "CUDA_VISIBLE_DEVICES": "",
}
STATIC = {"pad_for_acceleration": True, "pad_max_input_len": 6, "pad_max_len": 14}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything on": {
        "minibatch": 2,
        "config": {
            "gradient_accumulation_steps": 2, "whiten_rewards": True, "use_score_scaling": True,
            "use_score_norm": True, "score_clip": 1.0, "max_grad_norm": 0.5, "kl_penalty": "full", "horizon": 50.0,
        },
    },
    "early stopping": {"config": {"early_stopping": True, "target_kl": 0.002, "ppo_epochs": 6}},
    "skipped minibatches": {"minibatch": 2, "spoil": True, "config": {"gradient_accumulation_steps": 2}},
    "skipped optimizer steps": {"minibatch": 2, "spoil": True},
    "adapters": {"lora": True},
    "separate critic": {"critic": True},
    "sharded": {"sharded": True, "config": STATIC},
    "sharded, everything on": {
        "minibatch": 2, "sharded": True,
        "config": {
            **STATIC, "gradient_accumulation_steps": 2, "whiten_rewards": True, "max_grad_norm": 0.5,
            "kl_penalty": "full", "early_stopping": True, "target_kl": 0.002, "ppo_epochs": 6,
        },
    },
    "sharded, skipped optimizer steps": {"minibatch": 2, "spoil": True, "sharded": True, "config": STATIC},
    "sharded adapters": {"lora": True, "sharded": True, "config": STATIC},
    "sharded, ending early on one": {
        "sharded": True, "tokens": 20, "more_ends": 12, "config": {**STATIC, "pad_max_len": 26},
    },
    "sharded, Adam for Gaudi": {"sharded": True, "own_adam": True, "config": STATIC},
    "sharded critic": {"critic": True, "sharded": True, "config": STATIC},
}  # fmt: skip
IN_BF16 = {"sharded": True, "config": {**STATIC, "accelerator_kwargs": {"cpu": True, "mixed_precision": "bf16"}}}


def launch(out: Path, processes: int, cases: dict[str, dict[str, Any]]) -> None:
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *several, WORKER, json.dumps(cases), str(out)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, trained by one process and by two."""
    out = tmp_path_factory.mktemp("found")
    for processes in (1, 2):
        launch(out, processes, CASES)
    return out


@pytest.mark.parametrize("name", CASES)
def test_one_process_and_two_give_the_same_weights_and_every_rank_the_same_figures(found: Path, name: str) -> None:
    place = found / name
    alone, first, second = (torch.load(place / f"weights-{which}.pt") for which in ("1-0", "2-0", "2-1"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    initial, moved = policy(CASES[name])[0].state_dict(), 0.0
    for key, value in alone.items():
        torch.testing.assert_close(first[key], value, atol=1e-5, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
        moved = max(moved, float((value - initial[key]).abs().max()))
    assert moved > 1e-3
    whole, left, right = (json.loads((place / f"reports-{which}.json").read_text()) for which in ("1-0", "2-0", "2-1"))
    assert left["kl"] == right["kl"] == pytest.approx(whole["kl"], rel=1e-6)
    for one, a, b in zip(whole["lines"], left["lines"], right["lines"], strict=True):
        assert a["stats"] == b["stats"]
        assert a["responses"] + b["responses"] == one["responses"]
        assert a["scores"] + b["scores"] == one["scores"]
        for figure, value in one["stats"].items():
            if figure == "ppo/learning_rate":
                # accelerate advances a scheduler once for each process: TRL's rate falls twice as fast on two.
                assert a["stats"][figure] == value
            else:
                assert a["stats"][figure] == pytest.approx(value, abs=2e-4, rel=2e-4), figure
    assert [line["stats"]["ppo/learning_rate"] for line in left["lines"]] == [1e-3, 5e-4, 2.5e-4]
    last = whole["lines"][-1]["stats"]
    assert (last["ppo/policy/skipped_minibatches"] > 0) == ("skipped" in name)
    if "early_stopping" in CASES[name].get("config", {}):
        passes = CASES[name]["config"]["ppo_epochs"]
        assert whole["lines"][0]["stats"]["ppo/policy/minibatches"] < passes * 8 / CASES[name].get("minibatch", 4)


def test_sharded_training_in_bf16_goes_where_that_in_fp32_goes_and_keeps_fp32_weights(found: Path) -> None:
    # accelerate has one precision for each process.
    launch(found, 2, {"bf16": IN_BF16})
    weights = [torch.load(found / name / "weights-2-0.pt") for name in ("sharded", "bf16")]
    initial = policy(IN_BF16)[0].state_dict()
    assert all(value.dtype == torch.float32 for value in weights[1].values())
    moved = [torch.cat([(of[key] - initial[key]).flatten() for key in weights[0]]) for of in weights]
    assert float(torch.cosine_similarity(moved[0], moved[1], dim=0)) > 0.9
    assert not torch.equal(moved[0], moved[1])
