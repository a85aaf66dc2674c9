"""A local run that is interrupted while it trains, and the same command again: the real pipeline on a tiny model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tiny_models import llama, word_tokenizer

COMMAND = [
    sys.executable, "-m", "rlhf_pipelines.cli", "run", "--set", "model_name=model", "--set", "query_dataset=rows.txt",
    "--set", "reward_model=slow_reward:score", "--set", "steps=48", "--set", "batch_size=8", "--set",
    "mini_batch_size=4", "--set", "rollout_max_new_tokens=8", "--set", "data_eval_fraction=0.3",
]  # fmt: skip
REWARD = """
import pathlib, time
calls = 0

def score(prompts, responses):
    global calls
    calls += 1
    if calls == 5 and len(responses) == 8 and not pathlib.Path("waiting").exists():
        pathlib.Path("waiting").touch()
        time.sleep(600)
    return [float(len(text.split())) for text in responses]
"""


def test_an_interrupted_run_goes_on_with_its_training_when_the_command_is_given_again(tmp_path: Path) -> None:
    llama(seed=3).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "rows.txt").write_text("".join(f"w{3 + i % 60} w{3 + i // 60} w5\n" for i in range(60)))
    (tmp_path / "slow_reward.py").write_text(REWARD)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(COMMAND, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while run.poll() is None and not (tmp_path / "waiting").exists():
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    out, said = run.communicate(timeout=120)
    assert run.returncode == 130, out + said
    assert "the same command goes on with the training from its last checkpoint" in said
    (place,) = (tmp_path / "runs" / "checkpoints").iterdir()
    (checkpoint,) = place.iterdir()
    assert checkpoint.name.startswith("step-00000003-")
    again = subprocess.run(COMMAND, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "goes on after 3 PPO steps, from" in again.stdout
    # The bar of a run that goes on starts where the first one stopped.
    assert "4/6 PPO steps" in again.stdout and "3/6 PPO steps" not in again.stdout
    assert list((tmp_path / "runs" / "checkpoints").iterdir()) == []
