"""Packed sequences: every architecture reads them as it reads each sequence by itself, or is found not to."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf_ppo.config import PPOConfig
from rlhf_ppo.ppo import PolicyWithValueHead, PPOTrainer, Sampling
from rlhf_ppo.ppo import packing as packing_module
from rlhf_ppo.ppo.models import response_logits
from rlhf_ppo.ppo.packing import Layout, attending, packs
from rlhf_ppo.ppo.rollout import response_full_kl, response_logprobs
from rlhf_ppo.ppo.sequences import Sequences
from tiny_models import ENDS, SIZES, VOCABULARY, gpt2, llama, made, neox, queries, qwen2, word_tokenizer

PACKED: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "gpt2": lambda: gpt2(dropout=0.0),
    "gpt_neox": neox,
    "qwen2": qwen2,
    "qwen3": lambda: made("Qwen3", **SIZES, head_dim=8),
    "mistral, window of 4": lambda: made("Mistral", **SIZES, sliding_window=4),
    "gemma3, windows of 4 and none": lambda: made(
        "Gemma3", **SIZES, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    ),
    "cohere, scaled logits": lambda: made("Cohere", **SIZES, logit_scale=0.5),
    "granite, scaled everywhere": lambda: made(
        "Granite", **SIZES, logits_scaling=2.0, attention_multiplier=0.3, embedding_multiplier=2.0
    ),
    "opt": lambda: made("OPT", vocab_size=VOCABULARY, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64,
                        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, **ENDS),
    "mixtral": lambda: made("Mixtral", **SIZES, num_local_experts=4, num_experts_per_tok=2),
}  # fmt: skip
PLAIN: dict[str, Callable[[], Any]] = {
    "gemma2, capped attention": lambda: made(
        "Gemma2", **SIZES, head_dim=8, sliding_window=8, attn_implementation="eager"
    ),
    "bloom, distances in place of positions": lambda: made(
        "Bloom", vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, **ENDS
    ),
    "mamba, states": lambda: made("Mamba", vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, **ENDS),
}


def ragged() -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    lengths = [(3, 5), (1, 1), (7, 2), (2, 9)]
    rows = [torch.randint(3, VOCABULARY, (sum(pair),), generator=generator) for pair in lengths]
    return [row[:q] for row, (q, _) in zip(rows, lengths, strict=True)], [
        row[q:] for row, (q, _) in zip(rows, lengths, strict=True)
    ]


def gradients(policy: PolicyWithValueHead, packed: bool) -> dict[str, Tensor]:
    """Of a sum of log-probabilities and values with weights of their own; and those themselves."""
    policy.zero_grad()
    logprobs, values, entropies = policy(Sequences.of(*ragged(), packed=packed), 0.8)
    weights = torch.linspace(-1, 2, len(logprobs))
    ((logprobs - 0.3 * values) * weights).sum().backward()
    found = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    return {"logprobs": logprobs.detach(), "values": values.detach(), "entropies": entropies, **found}


@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences_give_the_numbers_and_gradients_of_padded_ones(name: str) -> None:
    policy = PolicyWithValueHead(PACKED[name]())
    with torch.no_grad():
        policy.v_head.summary.weight.normal_(generator=torch.Generator().manual_seed(2))
    assert policy.packs
    packed, padded = gradients(policy, True), gradients(policy, False)
    assert set(packed) == set(padded)
    for key, value in padded.items():
        assert torch.allclose(packed[key], value, rtol=1e-4, atol=2e-5), key


@pytest.mark.parametrize("name", PACKED)
def test_a_packed_sequence_never_sees_its_neighbours(name: str) -> None:
    model, (queries, responses) = PACKED[name](), ragged()
    assert packs(model)
    other = [queries[0], (queries[1] + 1) % VOCABULARY, queries[2], queries[3] + 0]
    one, two = (response_logprobs(model, rows, responses) for rows in (queries, other))
    assert not torch.equal(one[1], two[1])
    for row in (0, 2, 3):
        assert torch.allclose(one[row], two[row], atol=1e-6)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_rounding_that_is_allowed_is_that_of_what_a_model_computes_in(
    monkeypatch: pytest.MonkeyPatch, bf16: bool
) -> None:
    said = packing_module._said

    def off_by_a_hundredth(output: Any) -> Tensor:
        found = said(output)
        return found * 1.01 if len(found) == 9 else found  # all three sequences

    monkeypatch.setattr(packing_module, "_said", off_by_a_hundredth)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        assert packs(llama(0)) is bf16


@pytest.mark.parametrize("name", PLAIN)
def test_a_model_that_is_special_takes_the_plain_path(name: str) -> None:
    model, (queries, responses) = PLAIN[name](), ragged()
    assert not packs(model)
    found = response_logprobs(model, queries, responses)
    for row, query in enumerate(queries):
        alone = response_logprobs(model, [query], [responses[row]])[0]
        assert torch.allclose(found[row], alone, atol=1e-5)


def test_a_model_whose_attention_the_user_chose_takes_the_plain_path() -> None:
    model = llama()
    model.set_attn_implementation("eager")
    assert not packs(model)


def test_a_model_that_reads_packed_sequences_otherwise_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    # As one whose positions go on from one sequence to the next.
    of = Layout.of

    def counting(lengths: list[int]) -> Layout:
        layout = of(lengths)
        layout.positions.copy_(torch.arange(sum(lengths)))
        return layout

    monkeypatch.setattr(packing_module.Layout, "of", counting)
    assert not packs(gpt2(dropout=0.0))  # Llama's would not change: it looks at distances alone.


def test_what_a_model_attends_with_is_put_back_also_after_an_error() -> None:
    model = llama()
    with pytest.raises(RuntimeError, match="stop"), attending(model, Layout.of([2, 1])):
        assert model.config._attn_implementation == packing_module.PACKED
        raise RuntimeError("stop")
    assert model.config._attn_implementation == "sdpa"


def test_a_layout_says_where_packed_tokens_lie() -> None:
    layout = Layout.of([2, 3, 1])
    assert layout.starts == [0, 2, 5] and layout.ragged
    assert layout.positions.tolist() == [[0, 1, 0, 1, 2, 0]]
    assert layout.kept.tolist() == [0, 1, 3, 4, 5, 6]
    assert layout.padded.view(3, 3).tolist() == [[0, 1, 0], [2, 3, 4], [5, 0, 0]]
    assert not Layout.of([2, 2]).ragged


def test_minibatches_of_packed_rows_are_those_rows_packed() -> None:
    asked = queries(3, 1, 7, 2, 5), queries(5, 1, 4, 9, 2, seed=2)
    whole = Sequences.of(*asked, packed=True)
    for rows in ([3, 0], [1], [4, 2, 1, 0, 3]):
        found = whole.of_rows(rows)
        expected = Sequences.of(*([part[row] for row in rows] for part in asked), packed=True)
        assert found.layout is not None and expected.layout is not None
        assert found.layout.lengths == expected.layout.lengths and found.lengths == [len(asked[1][row]) for row in rows]
        for name in ("input_ids", "index", "tokens"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
        assert torch.equal(found.layout.positions, expected.layout.positions)
    ordered = whole.of_rows([4, 2, 1, 0, 3])
    for first, last in ((0, 2), (1, 4), (4, 5), (0, 5)):
        part, expected = ordered.between(first, last), whole.of_rows([4, 2, 1, 0, 3][first:last])
        assert part.layout is not None and expected.layout is not None and part.lengths == expected.lengths
        assert (part.layout.lengths, part.layout.starts) == (expected.layout.lengths, expected.layout.starts)
        for one, other in ((part, expected), (part.layout, expected.layout)):
            assert all(torch.equal(t, getattr(other, name)) for name, t in vars(one).items() if isinstance(t, Tensor))


def test_rows_of_equal_lengths_are_packed_as_well() -> None:
    model, rows = llama(), [torch.arange(3, 8), torch.arange(9, 14)]
    split = [row[:2] for row in rows], [row[2:] for row in rows]
    sequences = [Sequences.of(*split, packed=packed) for packed in (True, False)]
    # Packed without the last tokens, after which nothing comes.
    assert sequences[0].input_ids.shape == (1, 8) and sequences[1].input_ids.shape == (2, 5)
    one, two = (response_logits(model, each)[0] for each in sequences)
    assert torch.allclose(one, two, atol=1e-6)


def trained(separate: bool, packed: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Statistics and weights after a PPO step on ragged rows."""
    if not packed:
        monkeypatch.setattr("rlhf_ppo.ppo.models.packs", lambda _: False)
        monkeypatch.setattr("rlhf_ppo.ppo.rollout.packs", lambda _: False)
    policy = PolicyWithValueHead(llama(), copy.deepcopy(llama().model) if separate else None)
    config = PPOConfig(batch_size=4, mini_batch_size=2, ppo_epochs=2, learning_rate=1e-3, kl_penalty="full")
    reference: nn.Module = llama(seed=3)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
    trainer = PPOTrainer(config, policy, reference, word_tokenizer(), sampling=Sampling(9), optimizer=optimizer)
    stats = trainer.step(*ragged(), [0.5, -1.0, 2.0, 0.1])
    return stats, {name: value.detach().clone() for name, value in policy.named_parameters()}


@pytest.mark.parametrize("separate", (False, True), ids=("one trunk", "separate critic"))
def test_a_step_on_packed_sequences_is_the_step_on_padded_ones(separate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, padded = (trained(separate, packed, monkeypatch) for packed in (True, False))
    for name, value in padded[0].items():
        if not name.startswith("time/"):
            assert packed[0][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    for name, weights in padded[1].items():
        assert torch.allclose(packed[1][name], weights, atol=1e-5), name


def test_the_exact_kl_is_plain_where_the_reference_does_not_pack() -> None:
    policy, reference, (queries, responses) = llama(), llama(seed=3), ragged()
    whole = response_full_kl(policy, lambda: _opened(reference), queries, responses)
    reference.set_attn_implementation("eager")
    packing_module._found.clear()
    plain = response_full_kl(policy, lambda: _opened(reference), queries, responses)
    for one, two in zip(whole, plain, strict=True):
        assert torch.allclose(one, two, atol=1e-6)


def _opened(model: nn.Module) -> Any:
    return nullcontext(model)
