"""The trainer's promises, on tiny models."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from rlhf_ppo.config import PPOConfig
from rlhf_ppo.errors import InputError
from rlhf_ppo.ppo import PolicyWithValueHead, PPOTrainer, Prompt, Sampling, generation, train
from rlhf_ppo.ppo import rollout as rollout_module
from rlhf_ppo.ppo.experience import Update
from rlhf_ppo.ppo.loop import batch_rows
from rlhf_ppo.ppo.models import decoder_start, response_logits
from rlhf_ppo.ppo.responses import Generated
from rlhf_ppo.ppo.rollout import Rollout, batches_by_length, response_logprobs, score_with_policy
from rlhf_ppo.ppo.sampling import draw
from rlhf_ppo.ppo.sequences import Sequences
from tiny_models import bart, gemma2, gpt2, llama, neox, queries, qwen2, t5, word_tokenizer

ARCHITECTURES = [llama, gpt2, gemma2, neox, qwen2, t5, bart]
SAMPLING = Sampling(12, eos_token_ids=(2,))


def settings(**changes: Any) -> PPOConfig:
    small = {"batch_size": 8, "mini_batch_size": 4, "ppo_epochs": 2, "learning_rate": 1e-3, "steps": 8}
    return PPOConfig(**{**small, **changes})


def trainer(model: nn.Module | None = None, reference: nn.Module | None = None, **changes: Any) -> PPOTrainer:
    policy = PolicyWithValueHead(model or llama(0))
    torch.manual_seed(5)
    nn.init.normal_(policy.v_head.summary.weight, std=0.2)
    return PPOTrainer(settings(**changes), policy, reference or llama(1), word_tokenizer(), sampling=SAMPLING)


def sample(model: nn.Module, asked: list[Tensor], sampling: Sampling, seed: int = 0, batch_size: int = 64) -> Generated:
    uniform = draw(len(asked), sampling.max_new_tokens, torch.Generator().manual_seed(seed))
    return generation.sample(model, asked, sampling, uniform, batch_size)


def begun(trained: PPOTrainer, rollout: Rollout, scores: list[float]) -> Update:
    """The update of a batch before its first optimizer step."""
    return trained._begin(rollout, scores)


def weights(trained: PPOTrainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trained.policy.state_dict().items()}


def largest_difference(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    return max(float((before[name] - after[name]).abs().max()) for name in before)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_response_positions_reach_the_head_and_give_the_models_own_logits(
    architecture: Callable[[], nn.Module],
) -> None:
    model = architecture()
    asked, answers = queries(3, 5, 2), queries(4, 1, 6, seed=2)
    start = decoder_start(model)
    logits, hidden = response_logits(model, Sequences.of(asked, answers, decoder_start=start))
    assert logits.shape[0] == hidden.shape[0] == 11
    expected = []
    for query, answer in zip(asked, answers, strict=True):
        if start is None:
            row = model(input_ids=torch.cat([query, answer])[None]).logits[0]
            expected.append(row[len(query) - 1 : -1])
        else:
            decoded = torch.cat([torch.tensor([start]), answer[:-1]])
            expected.append(model(input_ids=query[None], decoder_input_ids=decoded[None]).logits[0])
    torch.testing.assert_close(logits, torch.cat(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_rollouts_logprobs_and_values_are_those_of_a_second_pass(architecture: Callable[[], nn.Module]) -> None:
    asked = queries(3, 5, 4, 6, 2, 7, 3, 5)
    model = architecture()
    trained = trainer(model, model)
    first = trained.rollout(asked, Sampling(12, eos_token_ids=tuple(range(2, 9))))
    second = score_with_policy(trained.policy, asked, first.responses)
    for name in ("logprobs", "values"):
        for row, again in zip(getattr(first, name), getattr(second, name), strict=True):
            torch.testing.assert_close(row, again, atol=1e-5, rtol=1e-5)
    assert len({len(response) for response in first.responses}) > 1


def test_sampled_tokens_have_the_models_probabilities() -> None:
    model = llama()
    query = queries(3)[0]
    drawn = sample(model, [query] * 4000, Sampling(1), batch_size=4000)
    counted = torch.bincount(torch.cat(drawn.responses), minlength=64) / 4000
    expected = model(input_ids=query[None]).logits[0, -1].softmax(-1).detach()
    assert float((counted - expected).abs().max()) < 4 * math.sqrt(0.05 * 0.95 / 4000)


def test_a_response_ends_with_the_first_end_token_and_rows_that_leave_disturb_no_other() -> None:
    asked = queries(3, 5, 4, 6, 2, 7, 3, 5)
    ends = tuple(range(2, 12))
    found = sample(llama(), asked, Sampling(12, eos_token_ids=ends), seed=3)
    assert any(len(response) < 12 for response in found.responses)
    for query, response, logprobs in zip(asked, found.responses, found.logprobs, strict=True):
        assert not set(response[:-1].tolist()) & set(ends)
        assert len(response) == 12 or int(response[-1]) in ends
        again = response_logprobs(llama(), [query], [response])[0]
        torch.testing.assert_close(logprobs, again, atol=1e-5, rtol=1e-5)


def test_an_end_token_inside_the_prompt_ends_nothing_unlike_trl() -> None:
    query = torch.tensor([5, 2, 7])
    found = sample(llama(), [query], Sampling(6))
    assert len(found.responses[0]) == 6


def test_logprobs_are_those_of_the_tempered_policy() -> None:
    asked, sampling = queries(4), Sampling(8, temperature=0.5)
    found = sample(llama(), asked, sampling)
    again = response_logprobs(llama(), asked, found.responses, temperature=0.5)
    torch.testing.assert_close(found.logprobs[0], again[0], atol=1e-5, rtol=1e-5)


def test_top_k_and_top_p_restrict_what_is_drawn() -> None:
    model, query = llama(), queries(3)[0]
    order = model(input_ids=query[None]).logits[0, -1].argsort(descending=True)
    for sampling in (Sampling(1, top_k=3), Sampling(1, top_p=0.05)):
        drawn = sample(model, [query] * 200, sampling, batch_size=200)
        assert set(torch.cat(drawn.responses).tolist()) <= set(order[:3].tolist())
    # The smallest number that can be drawn: nothing that is left out comes before it.
    lowest = generation.sample(model, [query], Sampling(1, top_k=1), torch.zeros(1, 1, dtype=torch.float64))
    assert lowest.responses[0].tolist() == [int(order[0])]
    greedy = sample(model, [query], Sampling(1, do_sample=False))
    assert greedy.responses[0].tolist() == [int(order[0])]


def test_rollouts_have_no_dropout_and_leave_the_mode_as_it_was_unlike_trl() -> None:
    model = gpt2(dropout=0.5).train()
    asked = queries(3, 4)
    first, second = (sample(model, asked, Sampling(6, do_sample=False)).logprobs for _ in range(2))
    torch.testing.assert_close(first, second)
    assert model.training


def test_step_and_update_from_the_rollout_give_the_same_weights() -> None:
    asked, scores = queries(3, 5, 4, 6, 2, 7, 3, 5), [0.5, -1, 2, 0.1, 0, 1, -0.5, 3]
    results = []
    for with_rollout in (True, False):
        trained = trainer()
        rollout = trained.rollout(asked)
        stats = trained.update(rollout, scores) if with_rollout else trained.step(asked, rollout.responses, scores)
        results.append((weights(trained), stats))
    assert largest_difference(results[0][0], results[1][0]) < 1e-5
    assert results[0][1]["objective/kl"] == pytest.approx(results[1][1]["objective/kl"], abs=1e-4)


def test_fixed_shapes_give_the_same_numbers() -> None:
    asked, scores = queries(3, 5, 4, 6, 2, 7, 3, 5), [0.5, -1, 2, 0.1, 0, 1, -0.5, 3]
    results = []
    for shapes in ({}, {"pad_for_acceleration": True, "pad_max_input_len": 10, "pad_max_len": 30}):
        trained = trainer(**shapes)
        rollout = trained.rollout(asked)
        trained.update(rollout, scores)
        results.append((rollout.responses, weights(trained)))
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))
    assert largest_difference(results[0][1], results[1][1]) < 1e-5


def test_what_does_not_fit_the_fixed_shapes_is_refused_rather_than_cropped_unlike_intel() -> None:
    trained = trainer(pad_for_acceleration=True, pad_max_input_len=4, pad_max_len=10)
    with pytest.raises(InputError, match="pad_max_input_len=4"):
        trained.rollout(queries(5))
    with pytest.raises(InputError, match="pad_max_len=10"):
        trained.step(queries(*[4] * 8), queries(*[7] * 8), [0.0] * 8)


@pytest.mark.parametrize(
    ("changes", "optimizer_steps"),
    [({}, 4), ({"mini_batch_size": 2, "gradient_accumulation_steps": 2}, 4), ({"mini_batch_size": 1}, 16)],
)
def test_the_optimizer_steps_once_for_every_accumulated_minibatch(
    changes: dict[str, int], optimizer_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, steps = trainer(**changes), []
    step = trained.optimizer.step
    monkeypatch.setattr(trained.optimizer, "step", lambda: (steps.append(1), step()))
    trained.update(trained.rollout(queries(*[4] * 8)), [float(row) for row in range(8)])
    assert len(steps) == optimizer_steps


def test_gradients_are_clipped_on_every_step_unlike_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    trained, norms = trainer(max_grad_norm=0.01), []
    step = trained.optimizer.step

    def record() -> None:
        norms.append(float(nn.utils.get_total_norm([p.grad for p in trained.policy.parameters()])))  # type: ignore[misc]
        step()

    monkeypatch.setattr(trained.optimizer, "step", record)
    trained.update(trained.rollout(queries(*[4] * 8)), [float(row) for row in range(8)])
    assert len(norms) == 4
    assert all(norm == pytest.approx(0.01, rel=1e-3) for norm in norms)


@pytest.mark.parametrize("fused", [True, False])
def test_a_skipped_minibatch_moves_nothing_unlike_trl(fused: bool) -> None:
    trained = trainer()
    trained.optimizer = trained.optimization.optimizer = torch.optim.Adam(trained.policy.parameters(), fused=fused)
    rollout = trained.rollout(queries(*[4] * 8))
    trained.update(rollout, [1.0] * 8)  # Adam now has momentum, with which TRL's skipped steps still move
    before, moments = weights(trained), copy.deepcopy(trained.optimizer.state_dict()["state"])
    bad = copy.copy(rollout)
    object.__setattr__(bad, "logprobs", [row - 50 for row in rollout.logprobs])
    stats = trained.update(bad, [1.0] * 8)
    assert stats["ppo/policy/skipped_minibatches"] == 4
    assert largest_difference(before, weights(trained)) == 0
    after = trained.optimizer.state_dict()["state"]
    assert all(torch.equal(after[key][name], value) for key, kept in moments.items() for name, value in kept.items())


def test_the_gradients_norm_is_the_mean_over_steps_that_counted() -> None:
    trained = trainer(ppo_epochs=1, mini_batch_size=4)
    trained.current = begun(trained, trained.rollout(queries(*[4] * 8)), [float(row) for row in range(8)])
    trained.current.experience.logprobs[0] -= 50
    stats = trained.finish_update()
    assert trained.last_update is not None and stats["ppo/policy/skipped_minibatches"] == 1
    norms = {bool(counted): float(norm) for norm, counted in trained.last_update.norms}
    assert norms == {False: 0.0, True: pytest.approx(stats["ppo/grad_norm"])} and stats["ppo/grad_norm"] > 0


def test_an_update_that_was_given_up_leaves_nothing_to_the_next() -> None:
    first, second = trainer(), trainer()
    first.begin_update(first.rollout(queries(*[4] * 8)), [1.0, 0, 2, 0, 3, 0, 1, 0])
    assert first.current is not None and first.optimization.advance(first.current)
    first.begin_update(first.rollout(queries(*[5] * 8, seed=9)), [float(row) for row in range(8)])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    first.finish_update()
    second.finish_update()
    assert largest_difference(weights(first), weights(second)) == 0


def gradients(trained: PPOTrainer) -> dict[str, Tensor]:
    if trained.optimization.learned is not None:
        trained.optimization.learned.materialize()
    return {name: value.grad.clone() for name, value in trained.policy.named_parameters() if value.grad is not None}


def test_accumulated_gradients_are_the_mean_over_minibatches_and_a_skipped_one_adds_nothing() -> None:
    found = {}
    for case, rows, spoiled in (("both", range(8), ()), ("one", range(4), ()), ("spoiled", range(8), range(4, 8))):
        trained = trainer(gradient_accumulation_steps=2 if case != "one" else 1, mini_batch_size=4, batch_size=8)
        rollout = trained.rollout(queries(*[4] * 8))
        update = begun(trained, rollout, [float(row) for row in range(8)])
        for row in spoiled:
            update.experience.logprobs[row] -= 50
        update.order = list(rows)
        used = trained.optimization._accumulate(update, len(rows))
        assert used == (1 if case != "both" else 2)
        found[case] = gradients(trained)
    for name, gradient in found["spoiled"].items():
        torch.testing.assert_close(gradient, found["one"][name] / 2, atol=1e-6, rtol=1e-4)
    halves = [gradients_of_rows(list(rows)) for rows in (range(4), range(4, 8))]
    for name, gradient in found["both"].items():
        torch.testing.assert_close(gradient, (halves[0][name] + halves[1][name]) / 2, atol=1e-6, rtol=1e-4)


def gradients_of_rows(rows: list[int]) -> dict[str, Tensor]:
    trained = trainer()
    rollout = trained.rollout(queries(*[4] * 8))
    update = begun(trained, rollout, [float(row) for row in range(8)])
    update.order = rows
    trained.optimization._accumulate(update, len(rows))
    return gradients(trained)


def test_a_tempered_policy_is_updated_at_its_own_temperature() -> None:
    trained = trainer(ppo_epochs=1, mini_batch_size=8)
    trained.sampling = Sampling(8, temperature=0.5, eos_token_ids=(2,))
    experience_rollout = trained.rollout(queries(*[4] * 8))
    again = score_with_policy(trained.policy, experience_rollout.queries, experience_rollout.responses, temperature=0.5)
    for row, expected in zip(again.logprobs, experience_rollout.logprobs, strict=True):
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-5)
    stats = trained.update(experience_rollout, [float(row) for row in range(8)])
    assert stats["ppo/policy/ratio_mean"] == pytest.approx(1, abs=1e-4)


def test_the_kl_coefficient_follows_the_kl_of_the_step() -> None:
    trained = trainer(target=1.0, horizon=80.0, init_kl_coef=0.1)
    rollout = trained.rollout(queries(*[4] * 8))
    surer = copy.copy(rollout)
    object.__setattr__(surer, "logprobs", [row + 1 for row in rollout.logprobs])
    stats = trained.update(surer, [0.0] * 8)
    error = min(max(stats["objective/kl"] / 1.0 - 1, -0.2), 0.2)
    assert stats["objective/kl_coef"] == 0.1
    assert trained.kl_controller.value == pytest.approx(0.1 * (1 + error * 8 / 80))
    assert error == 0.2


def test_another_seed_samples_other_responses() -> None:
    first, second = (trainer(seed=seed).generate(queries(4, 4)) for seed in (0, 1))
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_scheduler_advances_once_per_step() -> None:
    trained = trainer()
    trained.lr_scheduler = torch.optim.lr_scheduler.StepLR(trained.optimizer, 1, 0.5)
    rollout = trained.rollout(queries(*[4] * 8))
    rates = [trained.update(rollout, [0.0] * 8)["ppo/learning_rate"] for _ in range(2)]
    assert rates == [pytest.approx(1e-3), pytest.approx(5e-4)]


def test_early_stopping_ends_after_the_pass_that_went_too_far() -> None:
    for target_kl, minibatches in ((1e-9, 2), (1e9, 8)):
        trained = trainer(early_stopping=True, target_kl=target_kl, ppo_epochs=4)
        stats = trained.update(trained.rollout(queries(*[4] * 8)), [float(row) for row in range(8)])
        assert stats["ppo/policy/minibatches"] == minibatches


def test_early_stopping_takes_the_mean_of_the_pass_times_one_and_a_half() -> None:
    def passes(target_kl: float, early: bool = True) -> tuple[int, Tensor]:
        trained = trainer(early_stopping=early, target_kl=target_kl, ppo_epochs=2, mini_batch_size=2)
        trained.update(trained.rollout(queries(*[4] * 8)), [float(row) for row in range(8)])
        update = trained.last_update
        assert update is not None
        kl = torch.stack([stats[update.names.index("ppo/policy/kl3")] for stats in update.seen[:4]])
        return len(update.seen) // 4, kl

    _, kl = passes(1.0, early=False)
    assert abs(float(kl.mean() - kl[-1])) > 0.2 * float(kl.mean()), "the last minibatch alone would tell another story"
    for share, expected in ((0.99, 1), (1.01, 2)):
        assert passes(share * float(kl.mean()) / 1.5)[0] == expected


def test_a_gradient_that_is_not_finite_is_not_applied() -> None:
    trained = trainer()
    rollout = trained.rollout(queries(*[4] * 8))
    trained.update(rollout, [1.0] * 8)
    before = weights(trained)
    trained.policy.v_head.summary.weight.register_hook(lambda gradient: gradient / 0)
    stats = trained.update(rollout, [1.0] * 8)
    assert not math.isfinite(stats["ppo/grad_norm"]) and largest_difference(before, weights(trained)) == 0


def test_empty_responses_are_allowed_unlike_trl() -> None:
    answers = queries(*[4] * 7) + [torch.empty(0, dtype=torch.long)]
    stats = trainer(mini_batch_size=1).step(queries(*[4] * 8), answers, [1.0] * 8)
    assert all(math.isfinite(value) for value in stats.values())


def test_one_token_responses_give_finite_statistics_unlike_trl() -> None:
    stats = trainer(mini_batch_size=1).step(queries(*[4] * 8), queries(*[1] * 8, seed=3), [1.0] * 8)
    assert all(math.isfinite(value) for value in stats.values())


def with_adapters(model: nn.Module) -> Any:
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


def test_with_adapters_the_reference_is_the_policy_without_them_and_only_they_are_trained() -> None:
    model = with_adapters(llama(0))
    policy = PolicyWithValueHead(model)
    trained = PPOTrainer(settings(learning_rate=1e-2), policy, None, word_tokenizer(), sampling=SAMPLING)
    assert trained.config.is_peft_model
    before = weights(trained)
    asked = queries(*[4] * 8)
    first = trained.update(trained.rollout(asked), [float(row) for row in range(8)])
    assert first["objective/kl"] == pytest.approx(0, abs=1e-4)
    moved = {name for name, value in weights(trained).items() if not torch.equal(value, before[name])}
    assert moved and all("lora_" in name or "v_head" in name for name in moved)
    rollout = trained.rollout(asked)
    reference_rows = trained._reference_rows(rollout, full=False)["ref"]
    plain = response_logprobs(llama(0), asked, rollout.responses)
    for row, expected in zip(reference_rows, plain, strict=True):
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-5)
    assert trained.update(rollout, [0.0] * 8)["objective/kl"] != pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("kind", ["kl", "abs", "mse", "full"])
def test_every_kl_penalty_keeps_objective_kl_as_it_is(kind: str) -> None:
    trained = trainer(kl_penalty=kind)
    rollout = trained.rollout(queries(*[4] * 8))
    stats = trained.update(rollout, [0.0] * 8)
    reference = response_logprobs(llama(1), rollout.queries, rollout.responses)
    expected = sum(float((a - b).sum()) for a, b in zip(rollout.logprobs, reference, strict=True)) / 8
    assert stats["objective/kl"] == pytest.approx(expected, abs=1e-4)
    nll = -sum(float(row.sum()) for row in rollout.logprobs) / 8
    assert stats["objective/entropy"] == pytest.approx(nll, abs=1e-3) and nll > 0
    if kind != "kl":
        assert stats["ppo/mean_non_score_reward"] < 0


def test_the_same_seed_gives_the_same_weights_and_another_seed_does_not() -> None:
    def final(seed: int) -> dict[str, Tensor]:
        trained = trainer(seed=seed)
        trained.update(trained.rollout(queries(*[4] * 8)), [float(row) for row in range(8)])
        return weights(trained)

    assert largest_difference(final(0), final(0)) == 0
    assert largest_difference(final(0), final(1)) > 0


def test_step_refuses_what_is_not_a_batch() -> None:
    with pytest.raises(InputError, match="batch_size=8"):
        trainer().step(queries(3), queries(2), [1.0])


def test_habana_without_a_gaudi_is_an_error_with_the_remedy() -> None:
    with pytest.raises(InputError, match="use_habana=True.*habana_frameworks"):
        trainer(use_habana=True)


def test_a_plain_policy_needs_a_reference() -> None:
    with pytest.raises(InputError, match="reference=None"):
        PPOTrainer(settings(), PolicyWithValueHead(llama()), None, word_tokenizer())


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"prompt {row}", query) for row, query in enumerate(queries(*[4] * count))]


def wants_high_tokens(_: list[str], responses: list[str]) -> list[float]:
    return [sum(int(word[1:]) > 33 for word in response.split() if word[1:].isdigit()) / 12 for response in responses]


def test_training_raises_the_score_and_the_kl() -> None:
    trained = trainer(llama(0), llama(0), learning_rate=1e-2, steps=240, init_kl_coef=0.02)
    reports: list[dict[str, Any]] = []
    train(trained, prompts(40), wants_high_tokens, on_step=lambda report: reports.append(report.stats))
    assert len(reports) == 30
    assert reports[-1]["env/reward_mean"] > reports[0]["env/reward_mean"] + 0.2
    assert abs(reports[0]["objective/kl"]) < 1e-3 < reports[-1]["objective/kl"]


def test_the_last_batch_of_a_pass_accumulates_like_any_other_unlike_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate ends accumulation on a DataLoader's last batch, and TRL then steps once for every minibatch."""
    trained, taken = trainer(mini_batch_size=2, gradient_accumulation_steps=2, steps=24), []
    step = trained.optimizer.step
    monkeypatch.setattr(trained.optimizer, "step", lambda: (taken.append(trained.steps_done), step()))
    train(trained, prompts(8), wants_high_tokens)
    assert taken == [0] * 4 + [1] * 4 + [2] * 4


def test_every_pass_over_the_prompts_has_its_own_order_and_uses_each_once() -> None:
    trained = trainer()
    passes = [[row for step in steps for row in batch_rows(trained, 17, step)] for steps in ((0, 1), (2, 3), (4, 5))]
    assert all(len(set(rows)) == 16 and set(rows) <= set(range(17)) for rows in passes)
    assert passes[0] != passes[1] != passes[2]


def test_too_few_prompts_are_refused_before_anything_is_sampled() -> None:
    with pytest.raises(InputError, match="batch_size=8.*but there are 7"):
        train(trainer(), prompts(7), wants_high_tokens)


@pytest.mark.parametrize(("kind", "rows"), [("cpu", [51, 51, 51, 51, 46]), ("cuda", [204, 46])])
def test_a_gpu_scores_four_times_the_tokens_at_a_time(
    monkeypatch: pytest.MonkeyPatch, kind: str, rows: list[int]
) -> None:
    monkeypatch.setattr(rollout_module, "device_of", lambda model: torch.device(kind))
    monkeypatch.setattr(Sequences, "to", lambda self, device: self)
    asked = [torch.arange(3, 13)] * 250
    assert [len(batch) for batch, _ in rollout_module._batches(asked, asked, None, llama(), True)] == rows


def test_rows_are_batched_by_length_within_the_budget() -> None:
    lengths = [3, 9, 4, 10, 2, 8]
    batches = list(batches_by_length(lengths, 20))
    assert sorted(row for batch in batches for row in batch) == list(range(6))
    assert all(len(batch) * max(lengths[row] for row in batch) <= 20 for batch in batches)
    assert list(batches_by_length([30], 20)) == [[0]]
