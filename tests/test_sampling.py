"""What a token's log-probability and entropy are, and which token a number names."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf_ppo.ppo.sampling import Sampling, _block, _where_cumulative, choose
from rlhf_ppo.ppo.tensors import AT_ONCE, logprob_and_entropy, softmax_of, token_logprobs


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_the_entropy_over_a_large_vocabulary_is_that_in_double_precision_unlike_trl() -> None:
    logits = torch.randn(16, 49152, generator=torch.Generator().manual_seed(0)) * 3 + 20
    exact = logits.double().log_softmax(-1)
    whole = -(exact.exp() * exact).sum(-1)
    logprobs, entropy = logprob_and_entropy(logits, torch.zeros(16, dtype=torch.long))
    assert (entropy - whole).abs().max() < 5e-6 and (logprobs - exact[:, 0]).abs().max() < 5e-6
    # TRL's sum is over logits that are not shifted, which fp32 can't hold: off by 4e-5 with AVX-512, 2e-4 with AVX2.
    assert (torch.logsumexp(logits, -1) - (logits.softmax(-1) * logits).sum(-1) - whole).abs().max() > 1e-5


@pytest.mark.parametrize("at_once", (1, 22, 1 << 19))
def test_logprob_entropy_and_gradient_agree_with_autograd(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AT_ONCE, "cpu", at_once)
    torch.manual_seed(0)
    logits = torch.randn(5, 11, dtype=torch.float32).requires_grad_()
    tokens = torch.tensor([0, 10, 3, 3, 7])
    weights = torch.randn(5)
    plain = torch.log_softmax(logits, -1)
    (plain[range(5), tokens] * weights).sum().backward()
    expected, logits.grad = logits.grad, None
    logprobs, entropy = logprob_and_entropy(logits, tokens)
    (logprobs * weights).sum().backward()
    close(logprobs, plain[range(5), tokens], 1e-6)
    close(entropy, -(plain.exp() * plain).sum(-1), 1e-6)
    close(logits.grad, expected, 1e-6)
    close(token_logprobs(logits, tokens), logprobs, 1e-6)
    # Spare logits become the softmax, after all of them were read.
    spare, plain_softmax = logits.detach().clone(), softmax_of(logits.detach(), tokens)
    found = softmax_of(spare, tokens, spare=True)
    assert torch.equal(found[0], plain_softmax[0]) and torch.equal(found[1], plain_softmax[1])
    assert found[2].weights is spare and torch.equal(spare, plain_softmax[2].weights)


class Sizes(TorchDispatchMode):
    """The most numbers in fp32 that an operation made."""

    most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        wide = [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, Tensor) and leaf.dtype == torch.float32]
        self.most = max([self.most, *wide])
        return made


def test_log_probabilities_of_logits_in_halves_are_read_in_parts_and_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits, tokens = torch.randn(20, 5000).bfloat16(), torch.randint(5000, (20,))
    whole = token_logprobs(logits.float(), tokens)
    monkeypatch.setitem(AT_ONCE, "cpu", 3 * 5000)
    with Sizes() as sizes:
        found = token_logprobs(logits, tokens)
    assert sizes.most == 3 * 5000 and torch.equal(found, whole)


@pytest.mark.parametrize("kind", (torch.bfloat16, torch.float16))
def test_of_logits_in_halves_only_parts_are_in_fp32_and_sums_lose_nothing(
    kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(20, 5000, generator=generator) * 4).to(kind).requires_grad_()
    tokens, weights = torch.randint(5000, (20,), generator=generator), torch.randn(20, generator=generator)
    tokens[:10] = logits[:10].argmax(-1)
    exact = logits.detach().double().log_softmax(-1)
    slope = -exact.exp() * weights[:, None]
    slope[range(20), tokens] += weights
    found = []
    for at_once in (3 * 5000, 1 << 25):
        monkeypatch.setitem(AT_ONCE, "cpu", at_once)
        logits.grad = None
        with Sizes() as sizes:
            logprobs, entropy = logprob_and_entropy(logits, tokens)
            (logprobs * weights).sum().backward()
        assert sizes.most == min(at_once, logits.numel())
        assert logprobs.dtype == entropy.dtype == torch.float32 and logits.grad is not None
        assert (logprobs - exact[range(20), tokens]).abs().max() < 5e-6
        assert (entropy + (exact.exp() * exact).sum(-1)).abs().max() < 5e-6
        # Twice what the precision rounds to: the softmax, and the gradient.
        apart = (logits.grad - slope).abs() / slope.abs()
        assert apart[slope.abs() > 1e-4].max() < 2.1 * torch.finfo(kind).eps / 2
        found.append(logits.grad.clone())
    assert torch.equal(*found)


def test_a_token_is_where_the_sum_of_the_distribution_passes_its_number() -> None:
    generator = torch.Generator().manual_seed(0)
    probs = (torch.randn(40, 1300, generator=generator) * 3).softmax(-1)
    probs[:, 500:700] = 0
    uniform = torch.rand(40, generator=generator, dtype=torch.float64)
    sums = probs.double().cumsum(-1)
    expected = [int((row <= number * row[-1]).sum()) for row, number in zip(sums, uniform, strict=True)]
    assert _where_cumulative(probs, uniform).squeeze(1).tolist() == expected
    # Places come in 26 blocks of 50.
    assert len({place // 50 for place in expected}) > 10
    ends = _where_cumulative(probs[:2], torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert ends.flatten().tolist() == [0, 1299]


def test_words_that_are_ruled_out_count_nothing() -> None:
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([2, 0, 5])
    expected = logprob_and_entropy(logits, tokens)
    ruled_out = torch.cat([logits, torch.full((3, 2), -math.inf)], 1)
    for found, plain in zip(logprob_and_entropy(ruled_out, tokens), expected, strict=True):
        close(found, plain)


def test_blocks_of_places_divide_the_vocabulary_where_they_can() -> None:
    assert [_block(places) for places in (2000, 49152, 128256, 1300)] == [50, 256, 384, 50]
    # 50257 = 29 * 1733, and a prime
    assert [_block(places) for places in (50257, 101)] == [512, 512] and [_block(places) for places in (1, 2)] == [1, 1]


def test_a_token_of_no_probability_is_never_taken_also_where_sums_round() -> None:
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(2000, 1024, generator=generator)
    probs[:, 400:] = 0
    probs /= probs.sum(-1, keepdim=True)
    # A card without fp64 draws in fp32; just below 1 is where its two sums disagree.
    taken = _where_cumulative(probs, torch.full((2000,), 1 - 2.0**-24))
    assert bool((probs.gather(1, taken) > 0).all())


@pytest.mark.parametrize("places", [64, 101, 512, 1300])
def test_where_probabilities_are_nan_the_token_is_still_one_of_the_vocabulary(places: int) -> None:
    probs = torch.full((2, places), 1 / places)
    probs[0] = torch.nan
    probs[1, 3] = torch.nan
    taken = _where_cumulative(probs, torch.full((2,), 0.5, dtype=torch.float64))
    assert taken.flatten().tolist() == [places - 1] * 2


@pytest.mark.parametrize("places", [101, 1300])
def test_a_token_s_log_probability_is_that_among_all_words_also_where_few_may_be_taken(places: int) -> None:
    logits = torch.randn(40, places, generator=torch.Generator().manual_seed(0)) * 3
    uniform = torch.rand(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for sampling in (Sampling(1), Sampling(1, top_k=5), Sampling(1, do_sample=False)):
        taken, logprobs = choose(logits, sampling, uniform)
        close(logprobs, token_logprobs(logits, taken), 1e-6)
        if sampling.top_k:
            assert bool((logits.gather(1, taken[:, None]) >= logits.topk(5).values[:, -1:]).all())
