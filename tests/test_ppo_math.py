"""The formulas of PPO against numbers that TRL 0.11.4 gave, or that were worked by hand; and where we differ."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf_ppo.ppo.advantages import advantages_and_returns, full_kl, kl_penalty, token_rewards
from rlhf_ppo.ppo.kl_control import KLController, RunningMoments, shape_scores
from rlhf_ppo.ppo.losses import MinibatchLoss, ppo_loss
from rlhf_ppo.ppo.tensors import (
    masked_mean,
    masked_var,
    whiten,
)


def tensor(*rows: object) -> Tensor:
    return torch.tensor(rows if len(rows) > 1 else rows[0], dtype=torch.float32)


def mask(*rows: str) -> Tensor:
    return torch.tensor([[character == "1" for character in row] for row in rows])


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_the_adaptive_coefficient_follows_trl() -> None:
    controller = KLController(0.2, 6, 10000)
    for kl, samples, expected in (
        (12, 256, 0.201024),
        (5.4, 256, 0.20050937856),
        (0, 128, 0.19999607455088642),
        (-3, 256, 0.1989720946491859),
    ):
        controller.update(kl, samples)
        assert controller.value == pytest.approx(expected, rel=1e-12)


def test_the_fixed_coefficient_never_moves() -> None:
    controller = KLController(0.2, 6, 10000, adaptive=False)
    controller.update(100, 256)
    assert controller.value == 0.2


def test_a_kl_that_is_not_finite_leaves_the_coefficient() -> None:
    controller = KLController(0.2, 6, 10000)
    controller.update(math.nan, 256)
    assert controller.value == 0.2


def test_running_moments_follow_trl() -> None:
    moments = RunningMoments()
    moments.update(tensor([1, 2, 3, 4]))
    assert (moments.mean, moments.var, moments.std) == pytest.approx((2.5, 1.25, 1.2909944))
    moments.update(tensor([10, -2, 0.5]))
    assert (moments.mean, moments.var, moments.std) == pytest.approx((2.6428571, 12.1938772, 3.7717621))


def test_one_single_score_has_a_finite_deviation_where_trl_has_none() -> None:
    moments = RunningMoments()
    moments.update(tensor([3]))
    assert moments.std == 1.0


def test_equal_scores_so_far_are_not_scaled_where_trl_multiplies_them_by_eight_million() -> None:
    moments = RunningMoments()
    for scores in ([1.0] * 8, [1.0] * 4):
        shaped, factor = shape_scores(tensor(scores), moments, scaling=True, center=False, clip=None)
        assert factor == pytest.approx(1) and shaped.tolist() == pytest.approx(scores)
    rounded = RunningMoments()
    rounded.update(tensor([0.1] * 7))
    assert rounded.std == 1.0
    rounded.update(tensor([0.2]))
    assert rounded.std == pytest.approx(0.0353553, rel=1e-5)


@pytest.mark.parametrize(
    ("scaling", "center", "clip", "mean", "std"),
    [
        (True, False, None, 0.65947795, 0.9999999),
        (True, True, 1.0, -0.02355278, 0.86016947),
        (False, False, 0.5, 0.2, 0.47609523),
    ],
)
def test_scores_are_scaled_centred_and_clipped_as_trl_does(
    scaling: bool, center: bool, clip: float | None, mean: float, std: float
) -> None:
    scores, _ = shape_scores(tensor([1, -0.5, 0.3, 2]), RunningMoments(), scaling=scaling, center=center, clip=clip)
    assert float(scores.mean()) == pytest.approx(mean, abs=1e-6)
    assert float(scores.std()) == pytest.approx(std, abs=1e-6)


def test_masked_moments_and_whitening_follow_trl() -> None:
    values, keep = tensor([[1, 2, 3, 4]]), mask("1101")
    assert float(masked_mean(values, keep)) == pytest.approx(2.3333333)
    assert float(masked_var(values, keep)) == pytest.approx(2.3333335)
    close(whiten(values, keep), tensor([[-0.8728715, -0.2182178, 0, 1.0910895]]))
    close(whiten(values, keep, center=False), tensor([[1.4604617, 2.1151154, 0, 3.4244227]]))


def test_what_is_masked_never_enters_a_mean_not_even_as_infinity() -> None:
    values = torch.tensor([[1.0, math.inf, math.nan]])
    assert float(masked_mean(values, mask("100"))) == 1.0
    assert float(masked_var(values, mask("100"))) == 0.0


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("kl", [0, 0.1, 1.98, 0]),
        ("abs", [0, -0.1, 1.98, 0]),
        ("mse", [0, -0.025, 1.999, 0]),
    ],
)
def test_rewards_per_token_follow_trl(kind: str, expected: list[float]) -> None:
    logprobs, reference = tensor([[-1, -2, -0.5, -1]]), tensor([[-1.2, -1.5, -0.6, -2]])
    rewards = token_rewards(tensor([2]), kl_penalty(logprobs, reference, kind), mask("0110"), 0.2)
    close(rewards, tensor([expected]))


def test_full_kl_follows_trl() -> None:
    policy, reference = tensor([0.5, 0.3, 0.2], [0.1, 0.8, 0.1]), tensor([0.4, 0.4, 0.2], [0.2, 0.5, 0.3])
    close(full_kl(policy.log(), reference.log()), tensor([0.0252671, 0.1968270]), 1e-6)


def test_an_empty_response_earns_nothing_and_does_not_fail() -> None:
    rewards = token_rewards(tensor([5, 7]), torch.zeros(2, 2), mask("00", "10"), 0.2)
    close(rewards, tensor([0, 0], [7, 0]))


VALUES = tensor([0, 0.5, 0.2, -0.1, 0.3], [0.1, 0.4, 0, 0.6, -0.2])
REWARDS = tensor([0, -0.01, 0.02, 1, 0], [0, 0.05, -0.02, 0.03, -0.5])
MASK = mask("01110", "01111")


@pytest.mark.parametrize(
    ("gamma", "lam", "returns", "advantages"),
    [
        (
            1.0,
            0.95,
            [[0.9167500, 0.9650000, 1.0], [-0.3511375, -0.4222500, -0.4550000, -0.5]],
            [[0.5602047, 0.9918382, 1.4070489], [-0.8873160, -0.4796814, -1.2639340, -0.3281604]],
        ),
        (
            0.9,
            0.5,
            [[0.2712500, 0.4250000, 1.0]],
            [[-0.3104290, 0.4259208, 1.8458791], [-0.4182849, 0.2583658, -1.3753977, -0.4260542]],
        ),
    ],
)
def test_advantages_and_returns_follow_trl(
    gamma: float, lam: float, returns: list[list[float]], advantages: list[list[float]]
) -> None:
    found, found_returns = advantages_and_returns(VALUES, REWARDS, MASK, gamma=gamma, lam=lam)
    for row, expected in enumerate(returns):
        close(found_returns[row][MASK[row]], tensor(expected))
    for row, expected in enumerate(advantages):
        close(found[row][MASK[row]], tensor(expected))


def test_a_gap_in_the_mask_is_no_time_step_unlike_trl() -> None:
    values, rewards = tensor([[0.5, 0.4, 0.3, 0.2]]), tensor([[0, 0, 0, 1]])
    _, with_gap = advantages_and_returns(values, rewards, mask("1011"), gamma=1, lam=0.95)
    _, without = advantages_and_returns(tensor([[0.5, 0.3, 0.2]]), tensor([[0, 0, 1]]), mask("111"), gamma=1, lam=0.95)
    close(with_gap[mask("1011")], without[mask("111")])
    assert float(with_gap[0, 0]) != pytest.approx(0.88065)  # what TRL gives


def test_whitened_rewards_do_not_depend_on_padding_unlike_trl() -> None:
    def padded(table: Tensor, columns: int) -> Tensor:
        return torch.nn.functional.pad(table, (0, columns))

    results = [
        advantages_and_returns(
            padded(VALUES, extra), padded(REWARDS, extra), padded(MASK, extra), gamma=1, lam=0.95, whiten_rewards=True
        )
        for extra in (0, 3)
    ]
    for plain, wide in zip(*results, strict=True):
        close(wide[:, :5], plain)


def example_loss(**changes: object) -> MinibatchLoss:
    arguments: dict[str, object] = {
        "logprobs": tensor([-0.7, -2.1, -0.9], [-1.4, -0.7, -1]),
        "values": tensor([0.5, 0.1, 0.35], [0.1, -0.9, 1.4]),
        "entropy": torch.ones(2, 3),
        "old_logprobs": tensor([-1, -2, -0.5], [-1.5, -0.7, -3]),
        "old_values": tensor([0.1, 0.2, 0.3], [0, -0.5, 0.4]),
        "advantages": tensor([1, -0.5, 0.2], [-1.2, 0.7, 0.9]),
        "returns": tensor([0.6, 0, 0.2], [-0.3, 0.1, 0.8]),
        "mask": mask("110", "111"),
        "cliprange": 0.2,
        "cliprange_value": 0.2,
        "vf_coef": 0.1,
        "ratio_threshold": 10.0,
    }
    return ppo_loss(**{**arguments, **changes})  # type: ignore[arg-type]


def test_the_loss_and_its_statistics_follow_trl() -> None:
    loss = example_loss()
    expected = {
        "ppo/loss/policy": -0.2402752,
        "ppo/loss/value": 0.1620000,
        "ppo/loss/total": -0.2240752,
        "ppo/policy/approxkl": 0.411,
        "ppo/policy/policykl": -0.46,
        "ppo/policy/clipfrac": 0.4,
        "ppo/policy/advantages_mean": 0.18,
        "ppo/policy/ratio_mean": 2.3497847,
        "ppo/val/clipfrac": 0.2,
        "ppo/val/error": 0.308,
        "ppo/val/vpred": 0.24,
        "ppo/val/mean": 0.04,
        "ppo/returns/mean": 0.24,
        "ppo/returns/var": 0.203,
        "ppo/val/var": 0.113,
    }
    for name, value in expected.items():
        assert float(loss.stats[name]) == pytest.approx(value, abs=1e-6), name


def test_a_ratio_above_the_threshold_is_skipped() -> None:
    assert not bool(example_loss().skip)
    assert bool(example_loss(ratio_threshold=1.5).skip)


def test_a_ratio_that_is_not_a_number_is_skipped_unlike_trl() -> None:
    for logprob in (math.nan, 1000.0):
        loss = example_loss(logprobs=torch.full((2, 3), logprob))
        assert bool(loss.skip) and not bool(loss.of_logprobs.any()) and not bool(loss.of_values.any())


def test_what_stands_in_padding_never_changes_loss_or_gradient() -> None:
    losses = [
        example_loss(
            logprobs=tensor([-0.7, -2.1, junk], [-1.4, -0.7, -1]), values=tensor([0.5, 0.1, junk], [0.1, -0.9, 1.4])
        )
        for junk in (0.0, 1e6, math.inf)
    ]
    for loss in losses:
        assert float(loss.stats["ppo/loss/total"]) == pytest.approx(-0.2240752, abs=1e-6)
        close(loss.of_logprobs, losses[0].of_logprobs)
        close(loss.of_values, losses[0].of_values)
        assert loss.of_logprobs[0, 2] == loss.of_values[0, 2] == 0


def test_the_gradients_of_the_loss_are_those_of_the_papers_formula() -> None:
    # Every case: ratios and values within their range, beyond it where that is worse, and where it is better.
    generator = torch.Generator().manual_seed(0)
    old_logprobs, old_values, advantages, returns = torch.randn(4, 8, 50, generator=generator)
    logprobs = (old_logprobs + 0.4 * torch.randn(8, 50, generator=generator)).requires_grad_()
    values = (old_values + 0.4 * torch.randn(8, 50, generator=generator)).requires_grad_()
    counts = torch.rand(8, 50, generator=generator) < 0.8
    ratio = (logprobs - old_logprobs).exp()
    policy = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    within = old_values + (values - old_values).clamp(-0.2, 0.2)
    value = 0.5 * torch.maximum((values - returns) ** 2, (within - returns) ** 2)
    total = policy[counts].mean() + 0.1 * value[counts].mean()
    total.backward()
    given = {"old_logprobs": old_logprobs, "old_values": old_values, "advantages": advantages, "returns": returns}
    loss = example_loss(
        logprobs=logprobs.detach(), values=values.detach(), entropy=ratio.detach(), mask=counts, **given
    )
    close(loss.stats["ppo/loss/total"], total.detach())
    for found, expected in ((loss.of_logprobs, logprobs.grad), (loss.of_values, values.grad)):
        close(found, expected)
        assert 0.1 < float((found[counts] == 0).float().mean()) < 0.5 and not bool(found[~counts].any())
