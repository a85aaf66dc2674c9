"""Training by what is written out: gradients, the optimizer and PPO steps are those of autograd and torch's Adam."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf_ppo.config import PPOConfig
from rlhf_ppo.ppo import PPOTrainer, Sampling, generation, gradients, lanes, optimization, rollout
from rlhf_ppo.ppo.gradients import Gradients, takes
from rlhf_ppo.ppo.llama import Llama, written_out
from rlhf_ppo.ppo.passes import Pass
from rlhf_ppo.ppo.sequences import Sequences
from tiny_models import llama, policy_of, queries, qwen2, word_tokenizer


@pytest.fixture(params=(0, gradients.SMALL), ids=("large", "small"))
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that learn one at a time, as large ones do, or together."""
    monkeypatch.setattr(gradients, "SMALL", request.param)


def test_no_norm_of_all_gradients_exceeds_the_bound() -> None:
    # One token: the norm of each product is that of its factors, and the bound of one alone is too small.
    found, weights = Gradients(), [nn.Parameter(torch.zeros(3, 2)) for _ in range(3)]
    found.add_products(weights[:2], torch.ones(1, 6), torch.ones(1, 2))
    found.add_products(weights[2:], torch.ones(1, 3), torch.ones(1, 2))
    assert 18**0.5 <= found.bound() < 2 * 18**0.5
    found.add_rows(weights[2], torch.tensor([1]), torch.full((1, 2), 100.0))
    assert found.bound() >= 20000**0.5


@pytest.mark.parametrize(
    ("step", "threads"),
    ((Gradients.step, 1), (Gradients.step, 3), (Gradients.step_at_once, 2)),
    ids=("1", "3", "at once"),
)
@pytest.mark.parametrize("make", (llama, qwen2))
def test_weights_that_learn_one_at_a_time_or_at_once_are_those_of_torch_s_adam(
    make: Callable[[], Any], step: Callable[..., Tensor], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Matrices are learned in parts of a few rows.
    monkeypatch.setattr(gradients, "PART", 300)
    monkeypatch.setattr(gradients, "SMALL", 0)
    monkeypatch.setattr(gradients, "share", lambda *given: on(threads, lambda: lanes.share(*given)))
    found, expected = policy_of(make()), policy_of(make())
    one, two = (torch.optim.Adam(policy.parameters(), lr=1e-2, fused=True) for policy in (found, expected))
    written = written_out(found.pretrained_model)
    assert written is not None and takes(one)
    for number in range(3):
        sequences = Sequences.of(queries(3, 4, 1), queries(5, 2, 7, seed=number), packed=True)
        taken = Pass(written, found.v_head, sequences, 1.0)
        weights = torch.linspace(-1, 2, len(taken.logprobs))
        learned = taken.learn(weights, weights)
        learned.materialize()
        # The same gradients for both: Adam makes a whole step of one that is nothing but rounding.
        for mine, theirs in zip(found.parameters(), expected.parameters(), strict=True):
            theirs.grad, mine.grad = mine.grad, None
        norm = nn.utils.get_total_norm([p.grad for p in expected.parameters() if p.grad is not None])
        assert norm <= learned.bound() * (1 + 1e-5)
        assert step(learned, one) == pytest.approx(float(norm), rel=1e-5)
        two.step()
        assert not any(p.grad is not None for p in found.parameters())
    for mine, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)
        assert one.state[mine].keys() == two.state[theirs].keys() and one.state[mine]["step"] == 3
        torch.testing.assert_close(one.state[mine]["exp_avg"], two.state[theirs]["exp_avg"], atol=1e-6, rtol=1e-5)


def test_weights_that_learn_at_once_may_be_others_in_the_next_step() -> None:
    found, expected = policy_of(llama()), policy_of(llama())
    one, two = (torch.optim.Adam(policy.parameters(), lr=1e-2, fused=True) for policy in (found, expected))
    written = written_out(found.pretrained_model)
    assert written is not None
    for number, still in enumerate(((), ("k_proj", "layernorm", "summary.bias"), ("q_proj",), ("v_proj",), (), ())):
        if number == 5:
            # As from a checkpoint
            one.load_state_dict(copy.deepcopy(one.state_dict()))
        for policy in (found, expected):
            for name, parameter in policy.named_parameters():
                parameter.requires_grad_(not any(part in name for part in still))
        taken = Pass(written, found.v_head, Sequences.of(queries(3, 4, 1), queries(5, 2, 7), packed=True), 1.0)
        weights = torch.linspace(-1, 2, len(taken.logprobs))
        learned = taken.learn(weights, weights)
        learned.materialize()
        for mine, theirs in zip(found.parameters(), expected.parameters(), strict=True):
            theirs.grad, mine.grad = mine.grad, None
        learned.step_at_once(one)
        two.step()
        for mine, theirs in zip(found.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)
            assert one.state[mine].get("step") == two.state[theirs].get("step")


def on(threads: int, call: Callable[[], Any]) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


def test_an_optimizer_that_is_watched_replaced_or_another_gets_whole_gradients() -> None:
    weight = nn.Parameter(torch.ones(2))
    assert takes(torch.optim.Adam([weight], fused=True))
    scheduled = torch.optim.Adam([weight], fused=True)
    torch.optim.lr_scheduler.LambdaLR(scheduled, lambda step: 1.0)
    assert takes(scheduled)
    watched, replaced = (torch.optim.Adam([weight], fused=True) for _ in range(2))
    watched.register_step_post_hook(lambda *_: None)
    replaced.step = lambda: None  # type: ignore[assignment, method-assign]
    others = [
        torch.optim.Adam([weight]),
        torch.optim.Adam([weight], fused=True, weight_decay=0.1),
        torch.optim.AdamW([weight], fused=True),
        torch.optim.SGD([weight], 0.1),
    ]
    assert not any(takes(optimizer) for optimizer in (watched, replaced, *others))


def trainer(model: nn.Module | None = None, **changes: Any) -> PPOTrainer:
    settings: dict[str, Any] = {"batch_size": 8, "mini_batch_size": 2, "ppo_epochs": 2, "learning_rate": 2e-3}
    config = PPOConfig(**{**settings, "init_kl_coef": 0.1, **changes})
    sampling = Sampling(6, eos_token_ids=(2,))
    return PPOTrainer(config, policy_of(model or llama()), llama(), word_tokenizer(), sampling=sampling)


def stepped(trained: PPOTrainer, steps: int = 2) -> tuple[list[dict[str, Any]], dict[str, Tensor], Any]:
    stats = []
    for _ in range(steps):
        found = trained.rollout(queries(4, 2, 6, 3, 5, 1, 4, 4))
        stats.append(trained.update(found, [float(row % 3) for row in range(8)]))
    weights = {name: p.detach().clone() for name, p in trained.policy.named_parameters()}
    return stats, weights, copy.deepcopy(trained.optimizer.state_dict()["state"])


def assert_same_training(found: Any, expected: Any) -> None:
    for one, two in zip(found[0], expected[0], strict=True):
        for name, value in two.items():
            if not name.startswith("time/"):
                assert one[name] == pytest.approx(value, rel=2e-4, abs=2e-5), name
    for name, weights in expected[1].items():
        assert torch.allclose(found[1][name], weights, atol=1e-4), name
    assert [state["step"] for state in found[2].values()] == [state["step"] for state in expected[2].values()]


@pytest.mark.parametrize(
    "changes",
    (
        {},
        {"max_grad_norm": 0.5},
        {"gradient_accumulation_steps": 2},
        {"ratio_threshold": 1.01},
        {"mini_batch_size": 1, "vf_coef": 0.5},
    ),
    ids=str,
)
def test_training_is_that_of_autograd(
    changes: dict[str, Any], size: None, processor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = trainer(**changes)
    assert trained.optimization._written_out() is not None
    found = stepped(trained)
    for module in (generation, rollout, optimization):
        monkeypatch.setattr(module, "written_out", lambda _: None)
    plain = trainer(**changes)
    assert plain.optimization._written_out() is None
    assert_same_training(found, stepped(plain))
    if "ratio_threshold" in changes:
        assert any(stats["ppo/policy/skipped_minibatches"] > 0 for stats in found[0])


def test_training_goes_on_with_weights_that_were_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    def moved() -> Any:
        trained = trainer()
        stepped(trained, 1)
        for parameter in trained.policy.parameters():
            parameter.data = parameter.data.clone()
        return stepped(trained, 1)

    found = moved()
    for module in (generation, rollout, optimization):
        monkeypatch.setattr(module, "written_out", lambda _: None)
    assert_same_training(found, moved())


def test_a_bound_that_says_nothing_costs_time_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "SMALL", 0)
    found = stepped(trainer())
    materialized: list[None] = []
    materialize = Gradients.materialize
    monkeypatch.setattr(Gradients, "bound", lambda _: torch.tensor(torch.inf))
    monkeypatch.setattr(Gradients, "materialize", lambda self: (materialized.append(None), materialize(self))[1])
    assert_same_training(stepped(trainer()), found)
    assert len(materialized) == 2 * 8


def test_a_gradient_that_is_not_finite_leaves_weights_and_adam_as_they_were(
    size: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = trainer()
    _, before, state = stepped(trained, 1)
    learn = Llama.learn

    def spoiled(self: Llama, tape: Any, gradient: Tensor, into: Gradients) -> None:
        learn(self, tape, gradient, into)
        spoil = next(product for product in into.products if product.weights[0] is self.layers[1].down)
        spoil.of_output[0, 0] = torch.nan

    monkeypatch.setattr(Llama, "learn", spoiled)
    stats, after, state_after = stepped(trained, 1)
    assert stats[0]["ppo/grad_norm"] != stats[0]["ppo/grad_norm"]
    assert all(torch.equal(after[name], weights) for name, weights in before.items())
    for index, values in state.items():
        assert all(torch.equal(state_after[index][name], value) for name, value in values.items())


def test_a_gradient_hook_of_the_user_s_is_called() -> None:
    trained, called = trainer(), []
    trained.policy.pretrained_model.lm_head.weight.register_hook(lambda gradient: called.append(gradient.shape))
    stepped(trained, 1)
    assert len(called) == 8


def test_a_model_that_accelerate_or_the_user_put_in_the_policy_s_place_is_the_one_that_is_called() -> None:
    trained = trainer()
    assert trained.optimization._written_out() is not None
    trained.optimization.model = nn.Sequential(trained.policy)
    assert trained.optimization._written_out() is None


def test_a_scheduler_goes_on_without_a_warning(size: None) -> None:
    trained = trainer()
    trained.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trained.optimizer, lambda step: 0.5**step)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stats, _, _ = stepped(trained)
    assert [one["ppo/learning_rate"] for one in stats] == [2e-3, 1e-3]


def test_every_job_is_done_once_on_threads_that_have_one_core_each_and_errors_come_back() -> None:
    seen: list[tuple[int, int]] = []

    def job(number: int) -> None:
        assert not torch.is_grad_enabled()
        torch.ones(300, 300) @ torch.ones(300, 300) + torch.ones(1 << 18).sum()
        seen.append((number, torch.get_num_threads()))

    def refused(number: int) -> None:
        raise ValueError(f"job {number}")

    on(3, lambda: lanes.share(range(50), job))
    assert sorted(number for number, _ in seen) == list(range(50)) and {threads for _, threads in seen} == {1}
    with pytest.raises(ValueError, match="job"):
        on(3, lambda: lanes.share(range(50), refused))
    assert on(3, torch.get_num_threads) == 3
