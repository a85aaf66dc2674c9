"""Models of Llama's type, written out: they say and learn what torch's autograd finds, or are found not to be one."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from rlhf_ppo.ppo import (
    PolicyWithValueHead,
    Sampling,
    attention,
    decoding,
    generation,
    products,
    rollout,
)
from rlhf_ppo.ppo import llama as llama_module
from rlhf_ppo.ppo.generation import sample
from rlhf_ppo.ppo.llama import written_out
from rlhf_ppo.ppo.models import load_model, shared_reference
from rlhf_ppo.ppo.packing import Layout
from rlhf_ppo.ppo.passes import Pass
from rlhf_ppo.ppo.rollout import response_entropies, response_logprobs
from rlhf_ppo.ppo.sampling import draw
from rlhf_ppo.ppo.sequences import Sequences
from tiny_models import SIZES, VOCABULARY, gpt2, llama, made, policy_of, queries, qwen2


def turned(**how: Any) -> dict[str, Any]:
    """Rotary settings, as transformers 5 and as 4 name them."""
    return {"rope_parameters": {"rope_theta": 10000.0, **how}, "rope_scaling": how}


WRITTEN: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama, tied": lambda: llama(tie_word_embeddings=True),
    "llama, no padding token": lambda: llama(pad_token_id=None),
    "llama, as many keys as queries, heads of another size": lambda: llama(num_key_value_heads=4, head_dim=16),
    "llama 3's rotation": lambda: llama(
        **turned(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
                 original_max_position_embeddings=16)
    ),
    "llama, yarn": lambda: llama(**turned(rope_type="yarn", factor=2.0, original_max_position_embeddings=32)),
    "mistral, no window": lambda: made("Mistral", **SIZES, sliding_window=None),
    "qwen2, biases and tied": qwen2,
}  # fmt: skip
PLAIN: dict[str, Callable[[], Any]] = {
    "mistral, window of 4": lambda: made("Mistral", **SIZES, sliding_window=4),
    "qwen2, window of 4": lambda: made(
        "Qwen2", **SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=0
    ),
    "llama, biases everywhere": lambda: llama(attention_bias=True, mlp_bias=True),
    "llama, gelu": lambda: llama(hidden_act="gelu"),
    "llama, a rotation that depends on the length": lambda: llama(**turned(rope_type="dynamic", factor=2.0)),
    "llama in bf16": lambda: llama().to(torch.bfloat16),
    "llama with adapters": lambda: get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear")),
    "granite, scaled everywhere": lambda: made("Granite", **SIZES, logits_scaling=2.0, embedding_multiplier=2.0),
    "qwen3, normed heads": lambda: made("Qwen3", **SIZES, head_dim=8),
    "gpt2": gpt2,
}


def rows(*, ragged: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    asked, answers = queries(3, 1, 7, 2), queries(5, 4, 1, 9, seed=2)
    if not ragged:
        asked, answers = queries(3, 3, 3), queries(4, 4, 4, seed=2)
    asked[0][1], answers[0][2] = 0, 0  # the padding token, which is an id like others in a text
    return asked, answers


def by_autograd(policy: PolicyWithValueHead, sequences: Sequences, temperature: float) -> dict[str, Tensor]:
    outputs = policy(sequences, temperature)
    weights = torch.linspace(-1, 2, len(outputs[0]))
    torch.autograd.backward(outputs[:2], [weights, 0.3 * weights.flip(0)])
    found = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    return {**dict(zip(("logprobs", "values", "entropy"), (o.detach() for o in outputs), strict=True)), **found}


def by_hand(policy: PolicyWithValueHead, sequences: Sequences, temperature: float) -> dict[str, Tensor]:
    written = written_out(policy.pretrained_model)
    assert written is not None
    one = Pass(written, policy.v_head, sequences, temperature)
    weights = torch.linspace(-1, 2, len(one.logprobs))
    outputs = {name: getattr(one, name).clone() for name in ("logprobs", "values", "entropy")}
    one.learn(weights, 0.3 * weights.flip(0)).materialize()
    return {**outputs, **{name: p.grad for name, p in policy.named_parameters() if p.grad is not None}}


@pytest.fixture(params=("short", "long"))
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type:
    """Attention of short sequences, or of long ones, for all."""
    monkeypatch.setattr(attention, "SHORT", 1000 if request.param == "short" else 0)
    monkeypatch.setattr(attention, "WORTH", 1)
    return {"short": attention.Products, "long": attention.Flash}[request.param]


@pytest.mark.parametrize("ragged", (True, False))
@pytest.mark.parametrize("temperature", (1.0, 0.8))
@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_out_says_and_learns_what_autograd_finds(
    name: str, temperature: float, ragged: bool, kernel: type, processor: str
) -> None:
    model = WRITTEN[name]()
    other, sequences = copy.deepcopy(model), Sequences.of(*rows(ragged=ragged), packed=True)
    expected = by_autograd(policy_of(other), sequences, temperature)
    found = by_hand(policy_of(model), sequences, temperature)
    assert sequences.layout is not None
    groups = written_out(model).attention(sequences.layout).groups  # type: ignore[union-attr]
    assert {type(group) for group in groups} == {kernel} and (len(groups) > 1) is ragged
    assert found.keys() == expected.keys() and len(found) > 20
    for part, value in expected.items():
        assert (found[part] - value).abs().max() <= 1e-5 * max(1.0, float(value.abs().max())), part
        assert bool((value != 0).any()), part


@pytest.mark.parametrize("name", ("llama", "qwen2, biases and tied"))
def test_few_places_that_predict_a_token_learn_the_same_from_large_weights(
    name: str, processor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, few = WRITTEN[name](), []
    product = products.product_of_few
    monkeypatch.setattr(products, "LEAST_WEIGHTS", 1)
    monkeypatch.setattr(
        products, "product_of_few", lambda states, weight: (few.append(len(states)), product(states, weight))[1]
    )
    sequences = Sequences.of(queries(9, 12), queries(3, 4, seed=2), packed=True)
    expected = by_autograd(policy_of(copy.deepcopy(model)), sequences, 1.0)
    found = by_hand(policy_of(model), sequences, 1.0)
    # The last layer's three products of states, and the head's
    assert few.count(7) == (0 if products.BY_ONEDNN else 4) and found.keys() == expected.keys()
    for part, value in expected.items():
        assert (found[part] - value).abs().max() <= 1e-5 * max(1.0, float(value.abs().max())), part


def test_the_place_that_fills_up_learns_what_it_predicts(processor: str) -> None:
    model = llama()
    # A query of one token: the row's first place predicts one, and three places come up to a multiple of four.
    sequences = Sequences.of(queries(1, 5), queries(2, 1, seed=2), packed=True)
    assert sequences.index.tolist() == [0, 1, 6]
    expected = by_autograd(policy_of(copy.deepcopy(model)), sequences, 1.0)
    found = by_hand(policy_of(model), sequences, 1.0)
    for part, value in expected.items():
        assert (found[part] - value).abs().max() <= 1e-5 * max(1.0, float(value.abs().max())), part


def test_minibatches_of_many_lengths_have_few_shapes_for_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"BY_ONEDNN": True, "LEAST_BY_ONEDNN": 0, "GRADIENTS_BY_ONEDNN": True}.items():
        monkeypatch.setattr(products, name, value)
    shapes, product = set(), products.by_onednn
    monkeypatch.setattr(
        products, "by_onednn", lambda *given: (shapes.add(tuple(part.shape for part in given)), product(*given))[1]
    )
    model = llama()
    for length in range(3, 33):
        by_hand(policy_of(model), Sequences.of(queries(length, 20), queries(length, 3, seed=2), packed=True), 1.0)
    # 26 to 85 tokens, of which 6 to 35 predict one, would have 30 times 24.
    assert len(shapes) <= 5 * 12 + 6 * 12


@pytest.mark.parametrize(("least", "gradients"), ((0, True), (2000, False)))
def test_onednn_has_the_weights_that_are_worth_its_calls(
    least: int, gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"BY_ONEDNN": True, "LEAST_BY_ONEDNN": least, "GRADIENTS_BY_ONEDNN": gradients}.items():
        monkeypatch.setattr(products, name, value)
    factors: set[tuple[int, ...]] = set()
    product = products.by_onednn
    monkeypatch.setattr(products, "by_onednn", lambda *given: (factors.add(tuple(given[1].shape)), product(*given))[1])
    by_hand(policy_of(llama()), Sequences.of(queries(9, 12), queries(3, 4, seed=2), packed=True), 1.0)
    # Queries, keys and values; gate and up; down; and what goes back through these
    assert {(64, 32), (128, 32), (32, 64), (32, 128)} <= factors
    # Attention's output is small. Eight tokens predict one, and the last layer's weights learn from them.
    assert ((32, 32) in factors) is (least == 0) and ((32, 8) in factors) is gradients


@pytest.mark.parametrize("onednn", (True, False))
def test_more_tokens_are_columns_for_larger_weights(onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"LEAST_WEIGHTS": 1, "LARGER": 1920, "COLUMNS_OF_LARGER": 96, "LAID_ANEW": 64 * 48}
    for name, value in {"BY_ONEDNN": onednn, "LEAST_BY_ONEDNN": 0, "BY_TOKEN": True, **sizes}.items():
        monkeypatch.setattr(products, name, value)
    columns, by_number = [], products._by_number
    monkeypatch.setattr(products, "_by_number", lambda *given: (columns.append(given), by_number(*given))[1])
    ways: list[Callable[[Tensor, Tensor], Tensor]] = [
        products.times_by_token,
        products.times,
        lambda states, weight: products.plus_times(torch.ones(len(states), len(weight)), states, weight) - 1,
    ]
    # Weight and tokens, and how many of the three ways have them as columns
    for shape, tokens, expected in (((48, 40), 64, 3), ((48, 40), 112, 0), ((48, 39), 64, 0), ((49, 40), 64, 2)):
        states, weight = torch.randn(tokens, shape[1]), torch.randn(shape)
        columns.clear()
        for way in ways:
            torch.testing.assert_close(way(states, weight), states @ weight.T, atol=1e-4, rtol=1e-5)
        assert len(columns) == expected, (shape, tokens)
        assert products.times_by_token(states, weight).is_contiguous()


@pytest.mark.parametrize("narrow", (True, False))
def test_states_lie_as_the_processor_wants_them(processor: str, narrow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen, wide = llama(), [], []
    if narrow:
        # Those as wide as that lie token by token on any.
        monkeypatch.setattr(products, "NARROW", model.config.hidden_size)
    norm_gradient, back_times = llama_module._norm_gradient, llama_module.back_times

    def seeing(normed: Any, norm: Any, gradient: Tensor, *more: Any) -> Tensor:
        found = norm_gradient(normed, norm, gradient, *more)
        seen.extend([gradient, found])
        return found

    def seeing_products(gradient: Tensor, weight: Tensor) -> Tensor:
        found = back_times(gradient, weight)
        (wide if found.shape[1] > model.config.hidden_size else seen).append(found)
        return found

    monkeypatch.setattr(llama_module, "_norm_gradient", seeing)
    monkeypatch.setattr(llama_module, "back_times", seeing_products)
    one = Pass(written_out(model), policy_of(model).v_head, Sequences.of(*rows(), packed=True), 1.0)  # type: ignore[arg-type]
    assert one.tape is not None
    for kept in one.tape.layers:
        seen += [kept.before.scaled, kept.after.scaled]
        wide += [kept.gate_and_up, kept.active]
    one.learn(torch.ones(len(one.logprobs)), torch.ones(len(one.logprobs)))
    assert len(seen) == 5 * 2 + 2 * 2 + 2 * 2 and {states.is_contiguous() for states in seen} == {
        processor != "by number" or narrow
    }
    assert len(wide) == 2 + 2 * 2 and {states.is_contiguous() for states in wide} == {processor != "by number"}


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_not_of_that_type_takes_the_other_way(name: str) -> None:
    assert written_out(PLAIN[name]()) is None


def test_a_model_of_the_type_that_says_something_else_is_found_out() -> None:
    model = llama()
    model.model.norm.forward = lambda states: 2 * states  # type: ignore[method-assign]
    assert written_out(model) is None


def test_autocast_new_embeddings_and_another_precision_are_seen_after_the_trial() -> None:
    model = llama()
    first = written_out(model)
    assert first is not None and written_out(model) is first
    with torch.autocast("cpu", torch.bfloat16):
        assert written_out(model) is None
    model.resize_token_embeddings(VOCABULARY + 8)
    again = written_out(model)
    assert again is not None and again is not first and len(again.head) == VOCABULARY + 8
    model.to(torch.bfloat16)
    assert written_out(model) is None


@pytest.mark.parametrize("moved", ("q_proj", "v_proj", "up_proj", "all"))
@pytest.mark.parametrize("name", ("llama", "qwen2, biases and tied"))
def test_weights_that_lie_elsewhere_than_before_are_seen(name: str, moved: str) -> None:
    model = WRITTEN[name]()
    first = written_out(model)
    assert first is not None and first.is_still(model)
    for part, parameter in model.named_parameters():
        if moved == "all" or (moved in part and "layers.1" in part):
            parameter.data = parameter.data + 0.1
    again = written_out(model)
    assert again is not None and again is not first and written_out(model) is again
    ids, index = torch.arange(1, 9), torch.arange(8)
    with torch.no_grad():
        said = again.logits(again.read(ids, Layout.of([8]), index)[0])
    torch.testing.assert_close(said, model(input_ids=ids[None]).logits[0].detach(), atol=1e-5, rtol=1e-5)


def test_weights_in_one_piece_are_shared_copied_and_saved_as_any(tmp_path: Path) -> None:
    model = WRITTEN["qwen2, biases and tied"]()
    model.save_pretrained(tmp_path / "before")
    reference = shared_reference(model, 1)
    of_model, of_reference = written_out(model), written_out(reference)
    assert of_model is not None and of_reference is not None and of_model.is_still(model)
    shared, own = (one.projections.whole.data_ptr() == two.projections.whole.data_ptr() for one, two in zip(
        of_model.layers, of_reference.layers, strict=True))  # fmt: skip
    assert shared and not own
    model.save_pretrained(tmp_path / "after")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("before", "after")]
    assert files[0] == files[1]
    alone = copy.deepcopy(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.add_(1)
    one, two = (each.model.layers[0].self_attn.k_proj.weight for each in (model, alone))
    torch.testing.assert_close(one, two + 1)


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of a process' memory")
def test_the_file_that_weights_were_read_from_does_not_stay_in_memory(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    model = load_model(tmp_path)
    if str(tmp_path) not in Path("/proc/self/maps").read_text():
        pytest.skip("this transformers reads files into memory")
    assert written_out(model) is not None
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_layers_that_are_shared_with_the_reference_learn_nothing() -> None:
    model = llama()
    shared_reference(model, 1)
    other, sequences = copy.deepcopy(model), Sequences.of(*rows(), packed=True)
    one = Pass(written_out(model), policy_of(model).v_head, sequences, 1.0)  # type: ignore[arg-type]
    assert one.tape is not None and len(one.tape.layers) == 1
    found, expected = by_hand(policy_of(model), sequences, 1.0), by_autograd(policy_of(other), sequences, 1.0)
    assert found.keys() == expected.keys() and not any("layers.0" in name or "embed" in name for name in found)
    for part, value in expected.items():
        torch.testing.assert_close(found[part], value, atol=1e-5, rtol=1e-5)


def test_of_weights_in_one_piece_those_that_are_frozen_learn_nothing() -> None:
    model = llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("0.self_attn.k" not in name and "1.mlp.gate" not in name)
    other, sequences = copy.deepcopy(model), Sequences.of(*rows(), packed=True)
    found, expected = by_hand(policy_of(model), sequences, 1.0), by_autograd(policy_of(other), sequences, 1.0)
    assert found.keys() == expected.keys() and not any("k_proj" in name and "layers.0" in name for name in found)
    for part, value in expected.items():
        assert (found[part] - value).abs().max() <= 1e-5 * max(1.0, float(value.abs().max())), part


@pytest.mark.parametrize("large", (True, False))
@pytest.mark.parametrize("lengths", ((4, 2, 7, 1, 5), (3, 3, 3), (2,)))
@pytest.mark.parametrize("name", ("llama", "qwen2, biases and tied"))
def test_it_samples_and_scores_as_the_model_does(
    name: str, lengths: tuple[int, ...], large: bool, processor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked = WRITTEN[name](), queries(*(lengths * (6 if len(lengths) > 1 else 1)))
    # Large weights are multiplied by few states in a way of its own.
    few: list[int] = []
    product = products.product_of_few
    monkeypatch.setattr(products, "LEAST_WEIGHTS", 1 if large else 1 << 30)
    # A token attends by torch's kernel on one kind of processors, by two products on the others.
    monkeypatch.setattr(decoding, "BY_PRODUCTS", processor != "by token")
    monkeypatch.setattr(
        products, "product_of_few", lambda states, weight: (few.append(len(states)), product(states, weight))[1]
    )
    # Many end early: rows leave the batch.
    settings = Sampling(12, temperature=0.9, eos_token_ids=tuple(range(40, 64)))
    uniform, head = draw(len(asked), 12, torch.Generator().manual_seed(0)), policy_of(model).v_head
    found = sample(model, asked, settings, uniform, value_head=head)
    assert (len({rows for rows in few if rows < products.MANY}) > 2) is (
        large and len(asked) > 1 and not products.BY_ONEDNN
    )
    # Logits of five tokens at a time
    monkeypatch.setattr(rollout, "LOGITS", 5 * len(model.lm_head.weight))
    scores = response_logprobs(model, asked, found.responses, temperature=0.9)
    entropies = response_entropies(model, asked, found.responses, temperature=0.9)
    for module in (generation, rollout):
        monkeypatch.setattr(module, "written_out", lambda _: None)
    plain = sample(model, asked, settings, uniform, value_head=head)
    assert len({len(row) for row in plain.responses}) > 3 or len(asked) == 1
    assert [row.tolist() for row in found.responses] == [row.tolist() for row in plain.responses]
    for part in ("logprobs", "values"):
        for one, two in zip(getattr(found, part), getattr(plain, part), strict=True):
            torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    plain_scores = response_logprobs(model, asked, found.responses, temperature=0.9)
    for one, two in zip(scores, plain_scores, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    plain_entropies = response_entropies(model, asked, found.responses, temperature=0.9)
    for each, plain_each in zip(entropies, plain_entropies, strict=True):
        for one, two in zip(each, plain_each, strict=True):
            torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ("llama", "qwen2, biases and tied"))
def test_a_query_of_several_rows_is_read_once(name: str, processor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = WRITTEN[name](), []
    one, two, three = queries(4, 2, 4)
    asked = [one, two, one, three, two, one]
    embedded = llama_module.Llama.embedded
    monkeypatch.setattr(
        llama_module.Llama, "embedded", lambda *given: (read.append(len(given[1])), embedded(*given))[1]
    )
    settings, uniform = Sampling(8, eos_token_ids=tuple(range(56, 64))), draw(6, 8, torch.Generator().manual_seed(1))
    found = sample(model, asked, settings, uniform)
    assert read[-1] == 4 + 2 + 4
    monkeypatch.setattr(generation, "written_out", lambda _: None)
    plain = sample(model, asked, settings, uniform)
    assert len({tuple(row.tolist()) for row in plain.responses}) == 6
    assert [row.tolist() for row in found.responses] == [row.tolist() for row in plain.responses]
    for mine, theirs in zip(found.logprobs, plain.logprobs, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_nothing_is_read_once_all_responses_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked, read = llama(), queries(4, 2, 7), []
    following = decoding.Decoder.next
    monkeypatch.setattr(decoding.Decoder, "next", lambda *given: (read.append(None), following(*given))[1])
    found = sample(model, asked, Sampling(9, eos_token_ids=tuple(range(64))), draw(3, 9, torch.Generator()))
    assert [len(row) for row in found.responses] == [1, 1, 1] and not read
    found = sample(model, asked, Sampling(9, eos_token_ids=tuple(range(32))), draw(3, 9, torch.Generator()))
    assert len(read) == max(len(row) for row in found.responses) - 1 < 8
