"""What this trainer can do that the classic ones can't; each against numbers worked by hand or an independent way."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rlhf_ppo.config import PPOConfig
from rlhf_ppo.errors import InputError
from rlhf_ppo.ppo import PolicyWithValueHead, PPOTrainer, Sampling
from rlhf_ppo.ppo import diagnosis as diagnosis_module
from rlhf_ppo.ppo.advantages import kl_penalty
from rlhf_ppo.ppo.models import load_critic, load_model, shared_reference
from rlhf_ppo.ppo.rollout import Rollout, response_logprobs, score_with_policy
from rlhf_ppo.ppo_training.policy_files import read_value_head, save_policy
from tiny_models import gpt2, llama, queries, qwen2, t5, word_tokenizer

SAMPLING = Sampling(12, eos_token_ids=(2,))
ASKED = queries(*[4] * 8)
SCORES = [0.5, -1.0, 2.0, 0.1, 0.0, 1.0, -0.5, 3.0]


def trainer(
    model: nn.Module | None = None,
    reference: nn.Module | None = None,
    critic: nn.Module | None = None,
    beyond: dict[str, Any] | None = None,
    **changes: Any,
) -> PPOTrainer:
    policy = PolicyWithValueHead(model or llama(0), critic)
    torch.manual_seed(5)
    nn.init.normal_(policy.v_head.summary.weight, std=0.2)
    small = {"batch_size": 8, "mini_batch_size": 4, "ppo_epochs": 2, "learning_rate": 1e-3}
    return PPOTrainer(
        PPOConfig(**{**small, **changes}),
        policy,
        reference or llama(1),
        word_tokenizer(),
        **{"sampling": SAMPLING, **(beyond or {})},
    )


def weights(trained: PPOTrainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trained.policy.state_dict().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


# KL estimators


def test_k3_is_never_negative_and_has_the_mean_of_k1() -> None:
    found = kl_penalty(torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -1.0, -0.5]), "k3")
    torch.testing.assert_close(found, torch.tensor([0.1065307, 0.7182818, 0.0]))
    policy, reference = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.4, 0.4, 0.2]).log()
    exact = 0.0252671  # KL(policy || reference), as TRL computes it
    for kind in ("kl", "k3"):
        assert float((policy.exp() * kl_penalty(policy, reference, kind)).sum()) == pytest.approx(exact, abs=1e-6)


@pytest.mark.parametrize("penalty", ["kl", "full"])
@pytest.mark.parametrize("controller", ["kl", "abs", "mse", "k3", "full"])
def test_penalty_and_controller_have_their_own_estimators(penalty: str, controller: str) -> None:
    trained = trainer(kl_penalty=penalty, beyond={"controller_kl": controller}, target=0.01, horizon=100.0)
    rollout = trained.rollout(ASKED)
    ref = response_logprobs(llama(1), rollout.queries, rollout.responses)
    differences = [a - b for a, b in zip(rollout.logprobs, ref, strict=True)]
    by_hand = {
        "kl": sum(float(d.sum()) for d in differences) / 8,
        "abs": sum(float(d.abs().sum()) for d in differences) / 8,
        "mse": sum(float((d * d).sum()) for d in differences) / 16,
        "k3": sum(float((torch.exp(-d) - 1 + d).sum()) for d in differences) / 8,
        "full": sum(exact_kl(q, r) for q, r in zip(rollout.queries, rollout.responses, strict=True)) / 8,
    }
    stats = trained.update(rollout, SCORES)
    assert stats["objective/kl"] == pytest.approx(by_hand["kl"], abs=1e-4)
    assert stats["objective/kl_controller"] == pytest.approx(by_hand[controller], abs=1e-4)
    step = 0.2 if by_hand[controller] > 0 else -0.2
    assert trained.kl_controller.value == pytest.approx(0.2 * (1 + step * 8 / 100))
    tokens = sum(len(row) for row in rollout.responses)
    assert stats["ppo/mean_non_score_reward"] == pytest.approx(-0.2 * by_hand[penalty] * 8 / tokens, abs=1e-4)


def exact_kl(query: Tensor, response: Tensor) -> float:
    """KL(policy || reference) over the response, from the models' whole logits."""
    ids = torch.cat([query, response])[None]
    with torch.no_grad():
        p, q = (model(input_ids=ids).logits[0, len(query) - 1 : -1].log_softmax(-1) for model in (llama(0), llama(1)))
    return float((p.exp() * (p - q)).sum())


# Ends


def test_a_response_that_does_not_end_pays_the_penalty_and_the_raw_score_stays() -> None:
    answers = [torch.tensor([5, 6, 2]), torch.tensor([5, 6, 7]), *[torch.tensor([9, 2])] * 5, torch.tensor([2, 9])]
    plain, fined = (trainer(beyond={"missing_eos_penalty": fine}).step(ASKED, answers, [1.0] * 8) for fine in (0, 4))
    assert plain["ppo/mean_scores"] == pytest.approx(1.0)
    assert fined["ppo/mean_scores"] == pytest.approx((6 * 1 + 2 * -3) / 8)
    assert fined["env/reward_mean"] == pytest.approx(1.0)
    assert fined["tokens/responses_ended"] == pytest.approx(6 / 8)


def test_a_missing_end_costs_the_last_token_where_tokens_have_their_own_scores() -> None:
    answers = [torch.tensor([5, 6, 7])] * 4 + [torch.tensor([5, 6, 2])] * 4
    trained, mine = trainer(init_kl_coef=0.0, beyond={"missing_eos_penalty": 4.0}), torch.tensor([1.0, 0.0, 2.0])
    stats = trained.step(ASKED, answers, [mine] * 8)
    assert trained.last_update is not None
    rewards = trained.last_update.experience.rewards
    assert rewards[0].tolist() == [1.0, 0.0, -2.0] and rewards[7].tolist() == [1.0, 0.0, 2.0]
    assert stats["ppo/mean_scores"] == pytest.approx(1.0) and stats["env/reward_mean"] == pytest.approx(3.0)
    assert mine.tolist() == [1.0, 0.0, 2.0], "what the caller gave stays as it was"


def test_the_last_own_token_pays_for_a_missing_end_and_earns_the_score_of_the_response() -> None:
    answers, masks = [torch.tensor([5, 6, 7, 8])] * 8, [torch.tensor([True, True, True, False])] * 8
    trained = trainer(init_kl_coef=0.0, beyond={"missing_eos_penalty": 4.0})
    trained.step(ASKED, answers, [[1.0, 0.0, 2.0, 0.0], *[3.0] * 7], masks)
    assert trained.last_update is not None
    rewards = trained.last_update.experience.rewards
    assert rewards[0].tolist() == [1.0, 0.0, -2.0, 0.0] and rewards[1].tolist() == [0.0, 0.0, -1.0, 0.0]


def test_a_penalty_for_a_missing_end_needs_a_model_that_can_end() -> None:
    with pytest.raises(InputError, match="ppo_missing_eos_penalty=1.0.*eos_token_id"):
        trainer(beyond={"missing_eos_penalty": 1.0, "sampling": Sampling(4)})


# Scores by token


def test_a_score_by_token_on_the_last_token_is_a_score_of_the_response() -> None:
    answers = trainer().generate(ASKED)
    by_token = [[0.0] * (len(row) - 1) + [score] for row, score in zip(answers, SCORES, strict=True)]
    for scaling in (False, True):
        one, other = trainer(use_score_scaling=scaling), trainer(use_score_scaling=scaling)
        stats, again = one.step(ASKED, answers, SCORES), other.step(ASKED, answers, by_token)
        assert_equal(weights(one), weights(other))
        assert stats["ppo/mean_scores"] == again["ppo/mean_scores"]


def test_scores_by_token_are_earned_where_they_are_given() -> None:
    trained = trainer(init_kl_coef=0.0, gamma=1.0, lam=1.0)
    answers = [torch.tensor([5, 6, 7])] * 8
    scores: list[Any] = [[1.0, 0.0, 2.0], torch.tensor([0.0, 0.0, 3.0]), *[0.5] * 6]
    trained.step(ASKED, answers, scores)
    assert trained.last_update is not None
    experience = trained.last_update.experience
    torch.testing.assert_close(experience.rewards[:3], torch.tensor([[1, 0, 2], [0, 0, 3], [0, 0, 0.5]]))
    # With gamma and lambda 1 the return is what is still to come.
    torch.testing.assert_close(experience.returns[:3], torch.tensor([[3, 2, 2], [3, 3, 3], [0.5, 0.5, 0.5]]))
    assert trained.last_update.raw_scores[:3].tolist() == [3.0, 3.0, 0.5]


@pytest.mark.parametrize(
    ("scores", "changes", "words"),
    [
        ([[1.0, 2.0]] + [0.0] * 7, {}, r"row 0 has shape \(2,\)"),
        ([[1.0, 2.0, 3.0]] + [0.0] * 7, {"score_clip": 1.0}, "score_clip=1.0"),
        ([[1.0, 2.0, 3.0]] + [0.0] * 7, {"use_score_scaling": True, "use_score_norm": True}, "use_score_norm=True"),
    ],
)
def test_scores_by_token_that_make_no_sense_are_refused(scores: list[Any], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        trainer(**changes).step(ASKED, [torch.tensor([5, 6, 7])] * 8, scores)


# Turns


def test_a_turn_that_is_not_the_policys_own_is_no_step_and_is_not_trained() -> None:
    answers = [torch.tensor([5, 6, 30, 31, 7])] * 8
    masks = [torch.tensor([True, True, False, False, True])] * 8
    trained = trainer(ppo_epochs=1, mini_batch_size=8, gamma=0.9, lam=0.5)
    values = score_with_policy(trained.policy, ASKED, answers).values[0].detach()
    stats = trained.step(ASKED, answers, SCORES, masks)
    assert trained.last_update is not None
    experience = trained.last_update.experience
    assert experience.mask.tolist() == [mask.tolist() for mask in masks]
    ref = torch.stack(response_logprobs(llama(1), ASKED, answers))
    own = torch.stack(response_logprobs(llama(0), ASKED, answers))
    assert stats["objective/kl"] == pytest.approx(float((own - ref)[torch.stack(masks)].sum()) / 8, abs=1e-4)
    assert stats["tokens/responses_len_mean"] == 5.0
    # By hand, over the three own tokens of the first row: the second is followed by the last.
    kl = 0.2 * (own - ref)[0]
    rewards = [-kl[0], -kl[1], -kl[4] + 0.5]
    kept = [values[0], values[1], values[4]]
    last = rewards[2] - kept[2]
    middle = rewards[1] + 0.9 * kept[2] - kept[1] + 0.45 * last
    first = rewards[0] + 0.9 * kept[1] - kept[0] + 0.45 * middle
    expected = torch.stack([first + kept[0], middle + kept[1], last + kept[2]])
    torch.testing.assert_close(experience.returns[0][masks[0]], expected, atol=1e-5, rtol=1e-5)
    assert not bool(experience.returns[0][~masks[0]].any())


def test_what_stands_in_another_turn_moves_nothing_but_through_the_context() -> None:
    """The last tokens are masked: nothing of the loss comes from them, whatever they are."""
    masks = [torch.tensor([True, True, True, False, False])] * 8
    results = []
    for others in ([30, 31], [40, 41]):
        trained = trainer()
        trained.step(ASKED, [torch.tensor([5, 6, 7, *others])] * 8, SCORES, masks)
        results.append(weights(trained))
    assert_equal(*results)


def test_masks_and_scores_that_do_not_fit_are_refused() -> None:
    answers = [torch.tensor([5, 6, 7])] * 8
    with pytest.raises(InputError, match="response_masks: row 0 has 2 entries, its response 3 tokens"):
        trainer().step(ASKED, answers, SCORES, [torch.tensor([True, False])] * 8)
    with pytest.raises(InputError, match="response_masks leaves out earned something"):
        trainer().step(ASKED, answers, [[1.0, 1.0, 1.0]] * 8, [torch.tensor([True, False, True])] * 8)


def test_a_batch_without_any_own_token_changes_nothing() -> None:
    trained = trainer(use_score_scaling=True, whiten_rewards=True, max_grad_norm=1.0)
    before = weights(trained)
    stats = trained.step(ASKED, [torch.tensor([5, 6])] * 8, SCORES, [torch.tensor([False, False])] * 8)
    assert all(math.isfinite(value) for value in stats.values())
    assert_equal(before, weights(trained))


def test_a_minibatch_without_any_own_token_moves_nothing_by_adams_momentum_unlike_trl() -> None:
    trained, none = trainer(mini_batch_size=1, ppo_epochs=1), torch.zeros(2, dtype=torch.bool)
    trained.step(ASKED, [torch.tensor([5, 6])] * 8, SCORES)
    before = weights(trained)
    stats = trained.step(ASKED, [torch.tensor([5, 6])] * 8, SCORES, [none] * 8)
    assert_equal(before, weights(trained))
    assert stats["ppo/policy/skipped_minibatches"] == 8


# Diagnosis


def from_reference(count: int = 64) -> tuple[list[Tensor], list[Tensor]]:
    """Responses that another model sampled."""
    asked = queries(*[4] * count)
    other = trainer(llama(1), llama(0), batch_size=count)
    return asked, other.generate(asked)


def diagnosis(trained: PPOTrainer, asked: list[Tensor], answers: list[Tensor]) -> str:
    stats = trained.step(asked, answers, [0.0] * len(asked))
    assert stats["objective/kl"] < 0
    found: str = stats["objective/kl_diagnosis"]
    return found


def test_a_negative_kl_is_diagnosed_responses_of_another_model() -> None:
    found = diagnosis(trainer(batch_size=64), *from_reference())
    assert "less likely under the policy" in found and "another model" in found and "minimum length" in found


def test_a_negative_kl_is_diagnosed_a_restricted_distribution() -> None:
    restricted = Sampling(12, eos_token_ids=(2,), top_k=5)
    found = diagnosis(trainer(batch_size=64, beyond={"sampling": restricted}), *from_reference())
    assert "top_k=5" in found and "use do_sample=True, top_k=0, top_p=1" in found


def test_a_negative_kl_is_diagnosed_responses_that_are_too_likely() -> None:
    # The reference is sure of what the policy likes best, and the responses are the policy's best alone.
    policy, asked = trainer(batch_size=64), queries(*[4] * 64)
    greedy = policy.generate(asked, Sampling(12, do_sample=False))
    sure = copy.deepcopy(llama(0))
    sure.get_output_embeddings().weight.data.mul_(3)
    assert "more likely under the policy" in diagnosis(trainer(reference=sure, batch_size=64), asked, greedy)


def test_a_negative_kl_is_diagnosed_logprobs_of_another_pass() -> None:
    trained = trainer(batch_size=64)
    rollout = trained.rollout(queries(*[4] * 64))
    other = Rollout(rollout.queries, rollout.responses, [row - 1 for row in rollout.logprobs], rollout.values)
    stats = trained.update(other, [0.0] * 64)
    assert "differ from a second pass by 1.000 nats per token" in stats["objective/kl_diagnosis"]


def test_a_cause_that_stays_is_told_in_every_tenth_step(monkeypatch: pytest.MonkeyPatch) -> None:
    trained, passes = trainer(batch_size=64, learning_rate=1e-12), []
    second_pass = diagnosis_module._second_pass
    monkeypatch.setattr(diagnosis_module, "_second_pass", lambda *given: (passes.append(None), second_pass(*given))[1])
    rollout = trained.rollout(queries(*[4] * 64))
    other = Rollout(rollout.queries, rollout.responses, [row - 1 for row in rollout.logprobs], rollout.values)
    told = ["objective/kl_diagnosis" in trained.update(other, [0.0] * 64) for _ in range(12)]
    assert told == [True, *[False] * 9, True, False] and len(passes) == 2
    resumed = trainer(batch_size=64, learning_rate=1e-12)
    resumed.load_state_dict(trained.state_dict())
    assert "objective/kl_diagnosis" not in resumed.update(other, [0.0] * 64), "nor sooner after a resume"


def test_chance_is_told_as_chance() -> None:
    """Of the policy's own responses, two at a time, a few pairs happen to be alike and unlikely."""
    whole = trainer(batch_size=400)
    rollout = whole.rollout(queries(*[4] * 400))
    trained = trainer(batch_size=2, mini_batch_size=2, learning_rate=1e-12, cliprange=1e-9, vf_coef=0.0)
    found = []
    for row in range(0, 400, 2):
        trained.next_diagnosis = 0
        pair = (column[row : row + 2] for column in vars(rollout).values() if column is not None)
        found.append(trained.update(Rollout(*pair), [0.0, 0.0]).get("objective/kl_diagnosis", ""))
    told = [text for text in found if text]
    assert 0 < len(told) < 20
    assert sum("this is chance" in text for text in told) > len(told) / 2


@pytest.mark.parametrize(("whose", "value"), [("policy", math.nan), ("reference", math.nan), ("policy", -math.inf)])
def test_a_kl_that_is_no_number_is_not_told_as_chance(whose: str, value: float) -> None:
    trained = trainer()
    rollout = trained.rollout(ASKED)
    if whose == "policy":
        rollout.logprobs[1][0] = value
    else:
        assert trained.reference is not None
        trained.reference.get_output_embeddings().weight.data.fill_(value)  # type: ignore[operator]
    trained.begin_update(rollout, [0.0] * 8)
    assert trained.current is not None
    note = trained.current.extra["objective/kl_diagnosis"]
    share = {"policy": "the policy's in 1 of 8", "reference": "the reference's in 8 of 8"}[whose]
    assert note.startswith(
        f"objective/kl is no finite number, for log-probabilities are not finite ({share} responses)"
    )
    assert "too large for the precision" in note and "chance" not in note


def test_a_rollout_of_another_temperature_than_the_updates_is_refused() -> None:
    trained = trainer()
    with pytest.raises(InputError, match="temperature=0.5 is not the trainer's, 1, with which the update goes on"):
        trained.rollout(ASKED, Sampling(4, 0.5))
    assert len(trained.generate(ASKED, Sampling(4, 0.5))) == 8


def test_a_kl_that_is_not_negative_needs_no_diagnosis() -> None:
    trained = trainer(batch_size=64)
    assert "objective/kl_diagnosis" not in trained.update(trained.rollout(queries(*[4] * 64)), [0.0] * 64)
    same = trainer(reference=llama(0))
    assert "objective/kl_diagnosis" not in same.update(same.rollout(ASKED), SCORES)


# A critic of its own


def test_a_separate_critic_learns_the_value_and_leaves_the_policys_layers_alone() -> None:
    answers = trainer().generate(ASKED)
    found = {}
    for vf_coef in (0.0, 5.0):
        shared, apart = trainer(vf_coef=vf_coef), trainer(critic=llama(0).model, vf_coef=vf_coef)
        before = {name: value.clone() for name, value in apart.policy.named_parameters()}
        for trained in (shared, apart):
            trained.step(ASKED, answers, SCORES)
        found[vf_coef] = (weights(shared), weights(apart), before)
    trunk = "pretrained_model.model.layers.0.mlp.up_proj.weight"
    critic = "critic.layers.0.mlp.up_proj.weight"
    assert not torch.equal(found[0.0][0][trunk], found[5.0][0][trunk])
    assert torch.equal(found[0.0][1][trunk], found[5.0][1][trunk])
    assert torch.equal(found[0.0][1][critic], found[0.0][2][critic])
    assert not torch.equal(found[5.0][1][critic], found[5.0][2][critic])


def test_a_critic_that_equals_the_trunk_gives_the_shared_values_also_in_a_rollout() -> None:
    for model, base in ((llama(0), llama(0).model), (gpt2(0), gpt2(0).transformer), (t5(0), t5_base())):
        shared, apart = trainer(model, model), trainer(copy.deepcopy(model), model, critic=base)
        one, other = shared.rollout(ASKED), apart.rollout(ASKED)
        for row, again in zip(one.values, other.values, strict=True):
            torch.testing.assert_close(row, again, atol=1e-5, rtol=1e-5)


def t5_base() -> nn.Module:
    from transformers import T5Model

    base = T5Model(t5(0).config).eval()
    missing, _ = base.load_state_dict(t5(0).state_dict(), strict=False)
    assert missing == []
    return base


def test_a_separate_critic_has_its_own_learning_rate() -> None:
    trained = trainer(critic=llama(0).model, beyond={"critic_learning_rate": 0.5})
    rates = {group["lr"]: {id(p) for p in group["params"]} for group in trained.optimizer.param_groups}
    assert set(rates) == {1e-3, 0.5}
    assert rates[0.5] == {id(p) for p in (*trained.policy.critic.parameters(), *trained.policy.v_head.parameters())}  # type: ignore[union-attr]
    assert rates[1e-3] == {id(p) for p in trained.policy.pretrained_model.parameters()}


def test_the_critic_starts_as_the_model_in_a_directory(tmp_path: Path) -> None:
    llama(3).save_pretrained(tmp_path)
    critic = load_critic(tmp_path)
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(critic(ids).last_hidden_state, llama(3).model(ids).last_hidden_state)
    assert type(load_model(tmp_path)).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("architecture", "lost"),
    [(llama, "lm_head.weight"), (gpt2, "transformer.h.1.ln_1.bias"), (qwen2, "model.embed_tokens.weight")],
)
def test_a_model_without_some_of_its_weights_is_refused_and_one_with_tied_weights_is_not(
    architecture: Any, lost: str, tmp_path: Path
) -> None:
    architecture(0).save_pretrained(tmp_path)
    load_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"^model_name='x': the weights lack {lost}.*at random: give a whole model"):
        load_model(tmp_path, named="model_name='x'")


# Shared layers


@pytest.mark.parametrize("architecture", [llama, gpt2])
def test_shared_layers_are_one_memory_and_frozen_unlike_trl(architecture: Any) -> None:
    """TRL freezes the policy's layers but copies them: none of its tensors is shared."""
    policy = architecture(0)
    reference = shared_reference(policy, 1)
    own, theirs = dict(policy.named_parameters()), dict(reference.named_parameters())
    shared = {name for name in own if own[name].data_ptr() == theirs[name].data_ptr()}
    frozen = {name for name, value in own.items() if not value.requires_grad}
    assert shared == frozen and not any(value.requires_grad for value in theirs.values())
    assert any(".0." in name for name in shared) and not any(".1." in name for name in shared)
    embeddings = {"transformer.wte.weight", "transformer.wpe.weight", "model.embed_tokens.weight"} & set(own)
    assert embeddings and embeddings <= shared
    trained = trainer(policy, reference)
    before = [row.clone() for row in response_logprobs(reference, ASKED, ASKED)]
    moved = weights(trained)
    trained.update(trained.rollout(ASKED), SCORES)
    assert any(not torch.equal(value, moved[name]) for name, value in weights(trained).items())
    for row, again in zip(response_logprobs(reference, ASKED, ASKED), before, strict=True):
        assert torch.equal(row, again)


def test_without_shared_layers_the_reference_is_a_copy() -> None:
    policy = llama(0)
    reference = shared_reference(policy, 0)
    pairs = zip(policy.parameters(), reference.parameters(), strict=True)
    assert all(own.data_ptr() != other.data_ptr() and own.requires_grad for own, other in pairs)


def test_too_many_shared_layers_are_refused() -> None:
    with pytest.raises(InputError, match="ppo_shared_layers=2.*2 layers"):
        shared_reference(llama(0), 2)
    with pytest.raises(InputError, match="ppo_shared_layers=1.*encoder-decoder"):
        shared_reference(t5(0), 1)


# Value heads


def head(size: int = 32) -> dict[str, Tensor]:
    return {"v_head.summary.weight": torch.randn(1, size), "v_head.summary.bias": torch.ones(1)}


def test_a_value_head_is_found_wherever_trl_or_this_pipeline_puts_it(tmp_path: Path) -> None:
    found = head()
    save_file(found, str(tmp_path / "head.safetensors"))
    for name in ("own", "whole", "sharded", "adapters"):
        (tmp_path / name).mkdir()
    save_file(found, str(tmp_path / "own" / "value_head.safetensors"))
    save_file({"lm_head.weight": torch.ones(2), **found}, str(tmp_path / "whole" / "model.safetensors"))
    save_file({"lm_head.weight": torch.ones(2)}, str(tmp_path / "sharded" / "model-00001-of-00002.safetensors"))
    save_file(found, str(tmp_path / "sharded" / "model-00002-of-00002.safetensors"))
    save_file({"lora_A": torch.ones(2)}, str(tmp_path / "adapters" / "adapter_model.safetensors"))
    torch.save(found, tmp_path / "adapters" / "pytorch_model.bin")
    for name in ("head.safetensors", "own", "whole", "sharded", "adapters"):
        policy = PolicyWithValueHead(llama(0))
        policy.set_value_head(read_value_head(str(tmp_path / name)))
        assert torch.equal(policy.v_head.summary.weight, found["v_head.summary.weight"])
        assert torch.equal(policy.v_head.summary.bias, found["v_head.summary.bias"])


def test_a_missing_value_head_is_an_error_not_a_random_one_unlike_trl(tmp_path: Path) -> None:
    llama(0).save_pretrained(tmp_path)
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="ppo_value_head=.*has no v_head.summary.weight"):
        read_value_head(str(tmp_path))
    with pytest.raises(InputError, match=r"v_head.summary.weight is \(1, 16\); \(1, 32\) is needed"):
        PolicyWithValueHead(llama(0)).set_value_head(head(16))
    with pytest.raises(InputError, match="v_head.summary.bias is not there"):
        PolicyWithValueHead(llama(0)).set_value_head({"v_head.summary.weight": torch.zeros(1, 32)})


def test_a_saved_policy_loads_by_itself_and_its_value_head_starts_the_next_training(tmp_path: Path) -> None:
    trained = trainer()
    trained.step(ASKED, trained.generate(ASKED), SCORES)
    save_policy(trained.policy, trained.tokenizer, tmp_path)
    again = PolicyWithValueHead(AutoModelForCausalLM.from_pretrained(tmp_path))
    again.set_value_head(read_value_head(str(tmp_path)))
    assert_equal(weights(trained), {name: value.clone() for name, value in again.state_dict().items()})


# Statistics that are what they say


def test_the_entropy_is_the_policys_and_explained_variance_is_one_minus_what_is_left() -> None:
    trained = trainer(ppo_epochs=1, mini_batch_size=8)
    answers = [torch.tensor([5, 6, 7])] * 8
    with torch.no_grad():
        rows = [llama(0)(torch.cat([q, a])[None]).logits[0, 3:6] for q, a in zip(ASKED, answers, strict=True)]
    entropy = torch.distributions.Categorical(logits=torch.cat(rows)).entropy().mean()
    stats = trained.step(ASKED, answers, SCORES)
    assert stats["ppo/policy/entropy"] == pytest.approx(float(entropy), abs=1e-5)
    assert trained.last_update is not None
    experience = trained.last_update.experience
    returns, values = experience.returns.flatten().double(), experience.values.flatten().double()
    expected = 1 - float(torch.var(returns - values) / torch.var(returns))
    assert stats["ppo/val/var_explained"] == pytest.approx(expected, abs=1e-5)


# State


def test_a_trainer_goes_on_from_its_state_with_the_same_bits() -> None:
    def schedule(trained: PPOTrainer) -> PPOTrainer:
        trained.lr_scheduler = torch.optim.lr_scheduler.StepLR(trained.optimizer, 1, 0.5)
        return trained

    def step(trained: PPOTrainer) -> None:
        trained.update(trained.rollout(ASKED), SCORES)

    made = {"use_score_scaling": True, "horizon": 50.0}
    first = schedule(trainer(**made))
    step(first)
    state = copy.deepcopy(first.state_dict())
    step(first)
    second = schedule(trainer(llama(7), **{**made, "seed": 9}))
    second.load_state_dict(state)
    step(second)
    assert_equal(weights(first), weights(second))
    assert first.kl_controller.value == second.kl_controller.value and first.moments == second.moments
    assert first.optimizer.param_groups[0]["lr"] == second.optimizer.param_groups[0]["lr"] == pytest.approx(2.5e-4)


def test_the_state_of_another_policy_is_refused() -> None:
    lora = get_peft_model(llama(0), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    with pytest.raises(InputError, match="the state is of another policy: pretrained_model"):
        trainer(lora).load_state_dict(trainer().state_dict())


def test_an_update_that_was_not_begun_cannot_be_finished() -> None:
    with pytest.raises(RuntimeError, match="no PPO step is under way"):
        trainer().finish_update()


def test_fp16_without_a_scaled_loss_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_ppo.ppo import setup

    class Half:
        mixed_precision, num_processes = "fp16", 1

    monkeypatch.setattr(setup, "Accelerator", lambda **_: Half())
    with pytest.raises(InputError, match="mixed_precision='fp16'.*use bf16"):
        trainer()
