"""The written-out attention of packed sequences: torch's, one sequence at a time, and its gradient by autograd."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from rlhf_ppo.ppo import attention
from rlhf_ppo.ppo.attention import Attention
from rlhf_ppo.ppo.packing import Layout


def test_sequences_attend_beside_those_of_about_their_length_where_that_saves_more_than_it_costs() -> None:
    assert attention.alike([60, 101, 62, 84], 9) == [[1, 3], [2, 0]]
    assert attention.alike([28, 40, 31, 36], 4) == [[1, 3, 2, 0]]
    assert attention.alike([500, 10, 490, 10], 1) == [[0, 2], [1, 3]]
    assert attention.alike([7], 9) == [[0]]


@pytest.mark.parametrize("columns", (80, 88), ids=("as many columns as tokens", "columns more"))
@pytest.mark.parametrize("short", (0, 20, 1000), ids=("long", "both", "short"))
@pytest.mark.parametrize("worth", (1, 1 << 30), ids=("groups", "padding"))
def test_it_is_that_of_each_sequence_by_itself(
    worth: int, short: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "WORTH", worth)
    monkeypatch.setattr(attention, "SHORT", short)
    lengths, queries, keys, size = [30, 10, 28, 9, 3], 6, 3, 16
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(columns, queries + 2 * keys, size, generator=generator)
    gradient = torch.randn(columns, queries * size, generator=generator)
    # Columns more mean nothing, and get no gradient.
    gradient[sum(lengths) :] = 0
    expected = heads.clone().requires_grad_()
    whole = []
    for part in expected[: sum(lengths)].split(lengths):
        query, key, value = part.transpose(0, 1).split([queries, keys, keys])
        shared = [each.repeat_interleave(queries // keys, 0) for each in (key, value)]
        found = scaled_dot_product_attention(query, *shared, is_causal=True, scale=0.25)
        whole.append(found.transpose(0, 1).flatten(1))
    torch.cat(whole).backward(gradient[: sum(lengths)])
    one = Attention(Layout.of(lengths), columns, queries, keys, 0.25)
    assert (len(one.groups) > 1) is (worth == 1)
    attended, saw = one(heads)
    torch.testing.assert_close(attended[: sum(lengths)], torch.cat(whole).detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one.gradient(saw, attended, gradient), expected.grad, atol=1e-5, rtol=1e-5)
