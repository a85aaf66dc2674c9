"""Whole steps of the classic trainer, TRL 0.11.4, and ours: the same rollout gives the same numbers and weights.

The numbers are TRL's own (golden/make_trl_golden.py). Where we differ by intention, a test says so by name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf_ppo.config import PPOConfig
from rlhf_ppo.ppo import PolicyWithValueHead, PPOTrainer, Sampling
from rlhf_ppo.ppo.experience import Experience
from rlhf_ppo.ppo.models import ValueHead
from rlhf_ppo.ppo.rollout import score_with_policy
from rlhf_ppo.ppo.sequences import Padding, Sequences
from rlhf_ppo.ppo.tensors import pad_rows
from rlhf_ppo.ppo_training.policy_files import read_value_head
from tiny_models import word_tokenizer

GOLDEN = Path(__file__).parent / "golden"
TRL: dict[str, Any] = json.loads((GOLDEN / "trl_0_11_4.json").read_text())
TENSORS = load_file(GOLDEN / "trl_0_11_4.safetensors")
TOLERANCE = 1e-5

# In these both do the same; the others are the subject of a test of their own.
DIFFERENT = ("whitened_ragged", "clipped_gradient_twice")
SAME = [name for name in TRL["cases"] if name not in DIFFERENT]
# TRL: 1 - mean of (value - return)² over Var(return), by minibatch, so that a constant error counts as unexplained.
OTHERWISE_DEFINED = {"ppo/val/var_explained"}
MODELS = {
    "GPT2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
    "Llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "T5": (transformers.T5Config, transformers.T5ForConditionalGeneration),
}


@dataclass(frozen=True)
class Played:
    """What our trainer made of a case, step by step."""

    policy: PolicyWithValueHead
    stats: list[dict[str, Any]]
    experiences: list[Experience]
    coefficients: list[float]


def tensors(prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in TENSORS.items() if name.startswith(prefix)}


def take(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put ``weights`` in; they must be the module's trained parameters, no more and no less."""
    parameters = {name: value for name, value in module.named_parameters() if value.requires_grad}
    assert set(parameters) == set(weights)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def plain(kind: str) -> Any:
    given = TRL["models"][kind]
    config, model = MODELS[given["class"]]
    return model(config(**given["config"])).eval()  # type: ignore[arg-type]


def policy_of(kind: str) -> PolicyWithValueHead:
    policy = PolicyWithValueHead(plain(kind))
    take(policy, tensors(f"{kind}/policy/"))
    return policy


def with_adapters(policy: PolicyWithValueHead) -> PolicyWithValueHead:
    model: Any = get_peft_model(policy.pretrained_model, LoraConfig(**TRL["lora"], task_type="CAUSAL_LM"))  # type: ignore[arg-type]
    adapted = PolicyWithValueHead(model)
    take(adapted, tensors("lora/policy/"))
    return adapted


def reference_of(kind: str) -> nn.Module:
    reference = plain(kind)
    take(reference, tensors(f"{kind}/reference/"))
    return reference


def rows(case: dict[str, Any], step: int) -> tuple[list[Tensor], list[Tensor], list[float]]:
    rollout = TRL["rollouts"][case["rollout"]][step]
    queries, responses = ([torch.tensor(row) for row in rollout[name]] for name in ("queries", "responses"))
    return queries, responses, rollout["scores"]


@cache
def play(name: str, controller_kl: str | None = None, padding_side: str = "right") -> Played:
    """Our trainer on the case's rollouts, with TRL's order of the rows."""
    case = TRL["cases"][name]
    policy, reference = policy_of(case["model"]), reference_of(case["model"])
    if case["lora"]:
        policy = with_adapters(policy)
    config, tokenizer = PPOConfig(**case["settings"]), word_tokenizer()
    tokenizer.padding_side = padding_side
    trainer = PPOTrainer(
        config,
        policy,
        None if case["lora"] else reference,
        tokenizer,
        sampling=Sampling(8),
        optimizer=torch.optim.SGD(policy.parameters(), lr=config.learning_rate) if "optimizer" in case else None,
        controller_kl=controller_kl or config.kl_penalty,
    )
    played = Played(policy, [], [], [])
    for number, step in enumerate(case["steps"]):
        orders = iter(step["orders"])
        trainer.optimization._permutation = lambda _, orders=orders: list(next(orders))  # type: ignore[method-assign, misc]
        queries, responses, scores = rows(case, number)
        masks = trained_by_trl(responses) if case["model"] == "t5" else None
        played.stats.append(trainer.step(queries, responses, scores, masks))
        assert next(orders, None) is None, "TRL made more passes"
        assert trainer.last_update is not None
        played.experiences.append(trainer.last_update.experience)
        played.coefficients.append(trainer.kl_controller.value)
    return played


def trained_by_trl(responses: list[Tensor]) -> list[Tensor]:
    """TRL never trains the first token of an encoder-decoder's response."""
    return [torch.arange(len(response)) > 0 for response in responses]


def by_token(case: str, step: int, name: str) -> Tensor:
    """TRL's array (batch, length - 1) as ours is: (batch, response), 0 where nothing counts."""
    mask = TENSORS[f"{case}/step{step}/mask"]
    found = [row[keep] for row, keep in zip(TENSORS[f"{case}/step{step}/{name}"], mask, strict=True)]
    if TRL["cases"][case]["model"] == "t5":
        found = [torch.cat([torch.zeros(1), row]) for row in found]
    return pad_rows(found)


def distances(case: str, played: Played) -> dict[str, float]:
    """By parameter, how far our weights are from TRL's at the end of the case."""
    expected = tensors(f"{case}/after/")
    found = {name: value.detach() for name, value in played.policy.named_parameters() if value.requires_grad}
    assert set(found) == set(expected)
    apart = {name: (value - expected[name]).abs() for name, value in found.items()}
    for name, value in apart.items():
        if name.endswith("c_attn.bias") and "optimizer" not in TRL["cases"][case]:
            # A bias of all keys changes no attention: its gradient is rounding alone, of which Adam makes whole steps.
            value[value.shape[0] // 3 : 2 * value.shape[0] // 3] = 0
    return {name: float(value.max()) for name, value in apart.items()}


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("case", SAME)
def test_consecutive_steps_end_with_trls_weights(case: str) -> None:
    apart = distances(case, play(case))
    worst = max(apart, key=lambda name: apart[name])
    assert apart[worst] < TOLERANCE, worst


@pytest.mark.parametrize("case", SAME)
def test_every_statistic_of_a_step_is_trls(case: str) -> None:
    played, kind = play(case), TRL["cases"][case]["settings"].get("kl_penalty", "kl")
    for number, step in enumerate(TRL["cases"][case]["steps"]):
        found = played.stats[number]
        for name, expected in step["stats"].items():
            ours = found["objective/kl_controller"] if name == "objective/kl" and kind != "kl" else found[name]
            if name == "tokens/responses_len_mean" and case == "t5":
                expected -= 1  # the start token, which TRL counts as part of the response
            if name not in OTHERWISE_DEFINED:
                assert ours == pytest.approx(expected, abs=TOLERANCE, rel=TOLERANCE), f"step {number}: {name}"
        assert found["ppo/policy/minibatches"] == step["minibatches"]
        assert played.coefficients[number] == pytest.approx(step["kl_coef_after"], rel=1e-6)


@pytest.mark.parametrize("case", SAME)
def test_what_a_step_computes_per_token_is_trls(case: str) -> None:
    for number, experience in enumerate(play(case).experiences):
        assert experience.mask.sum(1).tolist() == TENSORS[f"{case}/step{number}/mask"].sum(1).tolist()
        for name in ("logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns"):
            close(getattr(experience, name), by_token(case, number, name))


@pytest.mark.parametrize(
    ("case", "passes"), [("early_stopping_never", [3, 3]), ("early_stopping_at_once", [1, 1]), ("gpt2", [2, 2])]
)
def test_as_many_passes_are_made_as_by_trl(case: str, passes: list[int]) -> None:
    assert [stats["ppo/policy/minibatches"] // 2 for stats in play(case).stats] == passes
    assert [len(step["orders"]) for step in TRL["cases"][case]["steps"]] == passes


def test_a_left_padding_tokenizer_changes_nothing_unlike_trl() -> None:
    apart = distances("gpt2", play("gpt2", padding_side="left"))
    assert max(apart.values()) < TOLERANCE
    forward = tensors("forward/gpt2/")
    right, left = (forward[f"{side}/logprobs"][forward[f"{side}/mask"]] for side in ("by_2", "left"))
    assert right.shape == left.shape and float((right - left).abs().max()) > 0.1


def test_positions_of_ragged_rows_are_those_of_trls_mask() -> None:
    queries, responses, _ = rows(TRL["cases"]["gpt2"], 0)
    sequences = Sequences.of(queries, responses)
    positions = torch.zeros(sequences.input_ids.numel(), dtype=torch.bool)
    positions[sequences.index] = True
    mask = positions.view(sequences.input_ids.shape)[:, :-1]
    assert torch.equal(mask, TENSORS["forward/gpt2/by_2/mask"])
    written = ["".join(str(int(here)) for here in row) for row in mask]
    assert written == ["00111100", "00001100", "00011111", "00000111"]


@pytest.mark.parametrize("padding", [None, Padding(8, 14)])
@pytest.mark.parametrize("how", ["by_1", "by_2", "by_4", "padded"])
def test_logprobs_and_values_of_ragged_rows_are_trls(how: str, padding: Padding | None) -> None:
    queries, responses, _ = rows(TRL["cases"]["gpt2"], 0)
    found, forward = score_with_policy(policy_of("gpt2"), queries, responses, padding=padding), tensors("forward/gpt2/")
    keep = forward[f"{how}/mask"]
    close(torch.cat(found.logprobs), forward[f"{how}/logprobs"][keep])
    close(torch.cat(found.values), forward[f"{how}/values"][keep])


@pytest.mark.parametrize("how", ["by_1", "by_2", "by_4", "padded"])
def test_an_encoder_decoders_logprobs_and_values_are_trls(how: str) -> None:
    queries, responses, _ = rows(TRL["cases"]["t5"], 0)
    found, forward = score_with_policy(policy_of("t5"), queries, responses), tensors("forward/t5/")
    for row, response in enumerate(responses):
        close(found.logprobs[row], forward[f"{how}/logprobs"][row, : len(response)])
        close(found.values[row], forward[f"{how}/values"][row, : len(response)])


def test_an_encoder_decoders_first_token_is_trained_unlike_trl() -> None:
    queries, responses, scores = rows(TRL["cases"]["t5"], 0)
    trainer = PPOTrainer(
        PPOConfig(**TRL["cases"]["t5"]["settings"]),
        policy_of("t5"),
        reference_of("t5"),
        word_tokenizer(),
        sampling=Sampling(8),
    )
    trainer.step(queries, responses, scores)
    assert trainer.last_update is not None
    assert trainer.last_update.experience.mask.sum(1).tolist() == [4, 2, 5, 3]
    assert TENSORS["t5/step0/mask"].sum(1).tolist() == [3, 1, 4, 2]


@pytest.mark.parametrize("kind", ["abs", "mse", "full"])
def test_objective_kl_stays_k1_where_trl_shows_the_penalty(kind: str) -> None:
    k1 = TRL["cases"]["gpt2"]["steps"][0]["stats"]["objective/kl"]
    assert play(kind).stats[0]["objective/kl"] == pytest.approx(k1, abs=TOLERANCE)
    assert abs(TRL["cases"][kind]["steps"][0]["stats"]["objective/kl"] - k1) > 0.03


def test_the_coefficient_follows_k1_unless_told_to_follow_the_penalty_as_trl_does() -> None:
    # The second step's k1 is negative and its mean of |logp - ref_logp| is 1.68: one lowers 0.2016, the other raises it
    # by 0.2 · 4 samples / horizon 100.
    assert play("abs").coefficients == pytest.approx([0.2016, 0.2016 * 1.008])
    assert play("abs", controller_kl="kl").coefficients == pytest.approx([0.2016, 0.2016 * 0.992])
    assert TRL["cases"]["abs"]["steps"][1]["kl_coef_after"] == pytest.approx(0.2016 * 1.008)


def test_whitened_rewards_do_not_leak_into_padding_unlike_trl() -> None:
    # Without padding there is nothing to leak into: the case whitened_even is one of those that agree.
    ours, theirs = play("whitened_ragged").experiences[0], by_token("whitened_ragged", 0, "returns")
    close(ours.rewards, by_token("whitened_ragged", 0, "rewards"))
    longest = [row for row, length in enumerate((7, 7, 9, 9)) if length == 9]
    close(ours.returns[longest], theirs[longest])
    padded = [row for row in range(4) if row not in longest]
    assert float((ours.returns[padded] - theirs[padded]).abs().max()) > 0.01


def test_every_gradient_is_clipped_unlike_trls_second_one() -> None:
    rate, limit = 0.05, 0.5
    played = play("clipped_gradient_twice")
    assert all(stats["ppo/grad_norm"] > 2 * limit for stats in played.stats)
    first = tensors("clipped_gradient/after/")
    ours = {name: value.detach() for name, value in played.policy.named_parameters()}
    theirs = tensors("clipped_gradient_twice/after/")
    moved = [float(torch.cat([(end[name] - first[name]).flatten() for name in first]).norm()) for end in (ours, theirs)]
    assert moved[0] == pytest.approx(rate * limit, rel=1e-3)
    assert moved[1] > 2 * rate * limit


def test_trls_value_head_is_read_and_has_our_names(tmp_path: Path) -> None:
    head = tensors("saved/")
    assert {name for name in TRL["saved"] if name.startswith("v_head.")} == set(head)
    assert {f"v_head.{name}" for name in ValueHead(16).state_dict()} == set(head)
    trunk = {name.removeprefix("pretrained_model."): value for name, value in tensors("gpt2/policy/").items()}
    assert set(TRL["saved"]) - set(trunk) <= {"lm_head.weight"}  # tied to the embeddings
    save_file({**trunk, **head}, tmp_path / "model.safetensors")
    policy = PolicyWithValueHead(plain("gpt2"))
    policy.set_value_head(read_value_head(str(tmp_path)))
    assert policy.v_head.summary.weight.tolist() == TENSORS["gpt2/policy/v_head.summary.weight"].tolist()
    assert policy.v_head.summary.bias.tolist() == TENSORS["gpt2/policy/v_head.summary.bias"].tolist()
