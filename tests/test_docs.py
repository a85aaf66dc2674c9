"""The documentation names only what there is: files, lines, commands, flags, parameters; its sums are right."""

from __future__ import annotations

import argparse
import functools
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import rlhf_pipelines
from rlhf_pipelines.cli import _parser
from rlhf_ppo import preflight
from rlhf_ppo.parameters import PARAMETERS, decode, defaults

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "manifests/*.md", "components/**/*.md", "examples/**/*.md")
    for path in ROOT.glob(pattern)
)
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]
GROUPS = "model data reward rollout ppo checkpoint node eval gate hub mlflow".split()
STEPS = ROOT / "components" / "rlhf_ppo"
OTHER_NAMES = (
    {path.name for path in STEPS.iterdir()}
    | set(rlhf_pipelines.__all__)
    | {
        name
        for path in STEPS.glob("*/*component.yaml")
        for name in re.findall(r"^ +(\w+):$", path.read_text(), re.M)  # Inputs and outputs of steps among them.
    }
)
"""What looks like a parameter and is none."""


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def prose_of(name: str) -> str:
    """The text without its blocks of code."""
    return re.sub(r"^( *)```.*?^\1```", "", text_of(name), flags=re.S | re.M)


def blocks_of(name: str, language: str) -> list[str]:
    found: list[str] = re.findall(rf"^ *```{language}\n(.*?)^ *```", text_of(name), flags=re.S | re.M)
    return found


# 1. Links


def slug(heading: str) -> str:
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_there_are_pages_to_look_at() -> None:
    assert {"README.md", "CONTRIBUTING.md", "manifests/README.md", "docs/devices.md", "docs/rights.md"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_relative_link_points_to_something_that_exists(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(name)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, part = target.partition("#")
        found = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert found.exists() and found.is_relative_to(ROOT), target
        if line := re.fullmatch(r"L(\d+)", part):
            assert int(line[1]) <= len(found.read_text().splitlines()), target
        elif part:
            headings = re.findall(r"^#+ (.*)$", prose_of(str(found.relative_to(ROOT))), re.M)
            assert part in map(slug, headings), target


# 2. Commands and flags


def flags() -> dict[str, set[str]]:
    """The flags of each command of rlhf-ppo, by the command."""

    def visit(parser: argparse.ArgumentParser, words: tuple[str, ...]) -> Iterator[tuple[str, set[str]]]:
        inner = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
        yield " ".join(words), {flag for each in parser._actions for flag in each.option_strings}
        for each in inner:
            for word, child in each.choices.items():
                yield from visit(child, (*words, word))

    return dict(visit(_parser(), ()))


FLAGS = flags()


def commands_in(name: str) -> Iterator[str]:
    """Every command that begins with rlhf-ppo, in blocks and in lines of text, its continued lines put together."""
    for block in blocks_of(name, "(?:sh|bash|console|text|yaml)"):
        for line in block.replace("\\\n", " ").splitlines():
            found = re.search(r"(?:^|[\s\"'(])(rlhf-ppo [a-z].*)", line)
            if found:
                yield found[1]
    yield from (found for found in re.findall(r"`([^`]+)`", prose_of(name)) if found.startswith("rlhf-ppo "))


@pytest.mark.parametrize("name", NAMES)
def test_a_command_of_rlhf_ppo_is_one_that_there_is_with_flags_that_it_has(name: str) -> None:
    for command in commands_in(name):
        words = shlex.split(command.replace("$(", "").replace("…", "x"), comments=True)[1:]
        if not re.fullmatch(r"[a-z]+|--version", words[0]):
            continue  # a name, as in rlhf-ppo/cpu
        known = words[0] if " ".join(words[:2]) not in FLAGS else " ".join(words[:2])
        assert known in FLAGS or known == "--version", command
        given = {word.partition("=")[0] for word in words if word.startswith("-") and len(word) > 1}
        assert given <= FLAGS.get(known, set()) | {"--version"}, command


@pytest.mark.parametrize("name", NAMES)
def test_a_flag_that_stands_alone_is_one_of_rlhf_ppo(name: str) -> None:
    known = {flag for each in FLAGS.values() for flag in each}
    for flag in re.findall(r"`(--[a-z][a-z-]*)(?:[ =][A-Z_=]+)?`", prose_of(name)):
        assert flag in known, flag


# 3. Parameters


@pytest.mark.parametrize("name", NAMES)
def test_what_looks_like_a_parameter_is_one(name: str) -> None:
    found = re.findall(
        rf"(?<![\w/.-])(?:{'|'.join(GROUPS)})_[a-z0-9_]*[a-z0-9](?![\w/-]|\.py|\.yaml|\.safe)", text_of(name)
    )
    assert set(found) <= {*PARAMETERS, *OTHER_NAMES}


@functools.cache
def words_of_the_code() -> set[str]:
    trees = ("components", "pipelines", "manifests", "examples", "tests", "images")
    files = [path for tree in trees for kind in ("*.py", "*.yaml", "*.sh") for path in (ROOT / tree).rglob(kind)]
    return {word for path in files if path.name != "test_docs.py" for word in re.findall(r"\w+", path.read_text())}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_in_code_marks_is_a_word_of_the_code(name: str) -> None:
    named = re.findall(r"`([a-z][a-z0-9]*(?:_[a-z0-9]+)+)(?:=[^`]*)?`", prose_of(name))
    assert set(named) <= words_of_the_code()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_set_is_a_parameter_and_has_a_value_that_it_takes(name: str) -> None:
    from rlhf_ppo.parameters import parse_text

    for given, value in re.findall(r"--set[= ]([\w-]+)=(\S+)", text_of(name)):
        assert given in PARAMETERS, given
        if "…" not in value and "$" not in value:
            parse_text(given, value.strip("`'\"),.;"))
    for given, value in re.findall(r"`([a-z][a-z0-9_]*)=([^`\s]+)`", prose_of(name)):
        if given in PARAMETERS and re.fullmatch(r"[\w.{}:\"/-]+", value) and len(value) > 1:
            parse_text(given, value if PARAMETERS[given].type is not bool else value.lower())


# 4. Sums


class Sizes:
    """The model of docs/administration.md: Llama's shape with 7 B parameters, as the headers of its files would say."""

    hidden, layers, inner, vocabulary = 4096, 32, 11008, 32000

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.shapes = {name: [self.vocabulary, self.hidden] for name in ("model.embed_tokens.weight", "lm_head.weight")}
        self.shapes["model.norm.weight"] = [self.hidden]
        for layer in range(self.layers):
            for name, shape in {
                **{f"self_attn.{each}_proj": [self.hidden, self.hidden] for each in "qkvo"},
                **{f"mlp.{each}_proj": [self.inner, self.hidden] for each in ("gate", "up")},
                "mlp.down_proj": [self.hidden, self.inner],
                **{each: [self.hidden] for each in ("input_layernorm", "post_attention_layernorm")},
            }.items():
                self.shapes[f"model.layers.{layer}.{name}.weight"] = shape
        config = {"num_hidden_layers": self.layers, "hidden_size": self.hidden, "num_attention_heads": 32}
        (directory / "config.json").write_text(json.dumps(config | {"vocab_size": self.vocabulary}))
        monkeypatch.setattr(preflight, "_shapes", lambda directory: self.shapes)

    @property
    def parameters(self) -> int:
        return sum(preflight._count(shape) for shape in self.shapes.values())

    def needs(self, spread: int = 1, **given: Any) -> preflight.Needs:
        names = {"model_name": "m", "query_dataset": "d", "reward_model": "m:r"}
        return preflight.estimate(decode({**defaults(), **names, **given}), self.directory, spread, True)


def gib(size: float) -> str:
    return f"{size / 2**30:.1f}"


def rows_of(name: str, first: str) -> dict[str, list[str]]:
    """The table whose head begins with ``first``, by its first column, up to the first comma."""
    (table,) = re.findall(rf"^\| {first}.*\n\|[-|]+\n((?:\|.*\n)+)", text_of(name), re.M)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {row[0].partition(",")[0].partition(":")[0]: row[1:] for row in rows}


LORA = {"model_lora_r": 16, "model_dtype": "bfloat16"}


def test_the_sizes_for_7_b_are_those_that_preflight_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, usual = Sizes(tmp_path, monkeypatch), defaults()
    assert f"P = {model.parameters:,} parameters" in text_of("docs/administration.md")
    whole, half, lora = model.needs(), model.needs(model_dtype="bfloat16"), model.needs(**LORA)
    # Of LoRA's state all but the frozen model is adapters, their gradients and Adam.
    assert f"adapters, {lora.gradients // 4:,} parameters of 4 bytes" in text_of("docs/administration.md").replace(
        "\n", " "
    )
    found = rows_of("docs/administration.md", "What \\| Formula")
    reference, policies = 2 * model.parameters, [size * model.parameters for size in (4, 2, 2)]
    checkpoints = [needs.gradients + needs.optimizer for needs in (whole, half, lora)]
    kept = usual["checkpoint_keep"] + 1
    assert {name: row[1:] for name, row in found.items()} == {
        "reference": [gib(reference)] * 3,
        "policy": list(map(gib, policies)),
        "one checkpoint": list(map(gib, checkpoints)),
        "checkpoints on the volume": [gib(kept * size) for size in checkpoints],
        "disk of `snapshot_reference`": [gib(2 * reference)] * 3,
        "disk of `train_ppo`": [gib(reference + size) for size in policies],
        "disk of `evaluate_policy`": [gib(reference + 2 * size) for size in policies],
        "disk of `push_to_hub`": list(map(gib, policies)),
    }
    best = usual["checkpoint_keep"] * usual["checkpoint_every"] // usual["compare_steps"] + 1
    assert f"({best} with the defaults" in text_of("docs/administration.md")


def test_the_memory_for_7_b_is_what_preflight_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Sizes(tmp_path, monkeypatch)
    fixed = {"node_sharding": True, "pad_for_acceleration": True, "pad_max_input_len": 512, "pad_max_len": 576}
    columns = [model.needs(), model.needs(8, **fixed), model.needs(model_dtype="bfloat16"), model.needs(**LORA)]
    found = rows_of("docs/administration.md", r"\| float32 \| float32 on 8 cards")
    names = ["weights", "gradients", "optimizer", "state", "rollout", "total"]
    assert list(found.values()) == [[gib(getattr(column, name)) for column in columns] for name in names]


def test_a_checkpoint_is_as_large_as_the_page_says() -> None:
    """Weights and Adam's two moments of what is trained: three times its size."""
    from rlhf_ppo.config import PPOConfig
    from rlhf_ppo.ppo import PolicyWithValueHead, PPOTrainer
    from tiny_models import llama, word_tokenizer

    model, reference = llama(), llama()
    trainer = PPOTrainer(PPOConfig(batch_size=2), PolicyWithValueHead(model), reference, word_tokenizer())
    queries = [torch.tensor([5, 6]), torch.tensor([7, 8, 9])]
    trainer.step(queries, trainer.generate(queries), [1.0, 0.0])

    def size(tree: Any) -> int:
        if isinstance(tree, torch.Tensor):
            return tree.numel() * tree.element_size()
        inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else []
        return sum(map(size, inner))

    trained = sum(4 * each.numel() for each in trainer.policy.parameters())
    assert 3 * trained < size(trainer.state_dict()) < 3.01 * trained + 20_000


def test_the_example_of_costs_is_what_its_formula_gives() -> None:
    text = text_of("docs/cost.md").replace("\n", " ")
    names: dict[str, Any] = {}
    for block in blocks_of("docs/cost.md", "python"):
        exec(block, names)
    rollout, scoring, update = names["step"]
    total = sum(names["step"])
    parts = f"{rollout:.0f} s of rollout, {scoring:.0f} s of scoring and {update:.0f} s of update"
    assert f"{parts}, {total:.0f} s for a PPO step" in text
    assert f"79 of them take {names['hours']:.1f} card-hours" in text and names["hours"] == 79 * total / 3600
    given = {"N": 6.74e9, "N_R": 0.4e9, "B": 256, "E": 4, "p": 256, "r": 64, "F": 0.3 * 400e12, "w": 0.03}
    assert f"(k = 6) it is {79 * sum(names['seconds'](**given, k=6)) / 3600:.1f}" in text
    slower = names["seconds"](**(given | {"F": 0.1 * 400e12}), k=4)
    assert f"arithmetic: {79 * sum(slower) / 3600:.1f}." in text
    # The four lines of the text are the three of the code.
    assert scoring == pytest.approx(2 * (6.74e9 + 0.4e9) * 256 * 320 / 1.2e14)
    assert update == pytest.approx(4 * 4 * 6.74e9 * 256 * 320 / 1.2e14)
    assert rollout == pytest.approx(2 * 6.74e9 * 256 * 256 / 1.2e14 + 64 * 0.03 * 4)


def test_steps_are_cached_and_tried_as_often_as_the_page_says() -> None:
    import yaml

    spec, _ = yaml.safe_load_all((ROOT / "pipelines/rlhf_pipelines/compiled/ppo.yaml").read_text())
    found = rows_of("docs/cost.md", "Step \\| Runs on")
    tasks = {}
    for dag in [spec["root"], *spec["components"].values()]:
        for name, task in dag.get("dag", {}).get("tasks", {}).items():
            if "retryPolicy" in task or "cachingOptions" in task:
                tries = task.get("retryPolicy", {}).get("maxRetryCount", 0) + 1
                cached = "yes" if task.get("cachingOptions", {}).get("enableCache") else "no"
                tasks[f"`{name.replace('-', '_')}`"] = [cached, str(tries)]
    assert {name: row[-2:] for name, row in found.items()} == tasks


@pytest.mark.parametrize("name", NAMES)
def test_a_metric_that_is_named_is_logged(name: str) -> None:
    sources = "".join(path.read_text() for path in STEPS.rglob("*.py"))
    for metric in re.findall(r"`((?:time|tokens|objective|ppo|env)/[a-z_/]+)`", prose_of(name)):
        assert metric.rpartition("/")[2] in sources and f'"{metric.partition("/")[0]}/' in sources, metric
