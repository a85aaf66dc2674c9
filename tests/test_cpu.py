"""The faster operations of a CPU give the numbers of torch's own, and memory that is kept is not asked for again."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from rlhf_ppo.ppo import cpu, products
from rlhf_ppo.ppo.generation import sample
from rlhf_ppo.ppo.models import PolicyWithValueHead
from rlhf_ppo.ppo.sampling import Sampling, draw
from rlhf_ppo.ppo.sequences import Sequences
from tiny_models import llama, queries, qwen2

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def small_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "LEAST_WEIGHTS", 1)
    monkeypatch.setattr(products, "LEAST_WEIGHTS", 1)


def learned(model: nn.Module, passes: int = 2) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities, and gradients added up over passes."""
    policy = PolicyWithValueHead(model)
    rows = queries(3, 5, 2), queries(4, 2, 6, seed=2)
    rows[0][1][2] = 0  # the token of padding
    for _ in range(passes):
        logprobs, _, _ = policy(Sequences.of(*rows, packed=True))
        (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logprobs.detach(), found


def assert_same(model: nn.Module, passes: int = 2) -> dict[str, Tensor]:
    fused = copy.deepcopy(model)
    cpu.fuse(fused, alone=True)
    logprobs, gradients = learned(model, passes)
    of_fused, by_name = learned(fused, passes)
    assert torch.allclose(of_fused, logprobs, atol=1e-5)
    assert set(by_name) == set(gradients)
    for name, gradient in gradients.items():
        assert (by_name[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name
    return by_name


def calls(monkeypatch: pytest.MonkeyPatch, kind: type) -> list[None]:
    """Grows with each use of an operation of ours."""
    seen: list[None] = []
    apply = kind.apply  # type: ignore[attr-defined]
    monkeypatch.setattr(kind, "apply", lambda *given: (seen.append(None), apply(*given))[1])
    return seen


def test_linear_layers_with_and_without_biases_have_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch, cpu._Linear)
    assert_same(qwen2())
    assert len(seen) == 2 * (2 * 7 + 1)


@pytest.mark.parametrize("passes", (1, 3))
def test_tied_embeddings_have_the_same_gradient_also_where_gradients_add_up(
    passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, model = calls(monkeypatch, cpu._Lookup), qwen2()
    # The row of padding learns as a word that was not said, never as an input.
    assert model.get_input_embeddings().padding_idx == 0
    assert "model.embed_tokens.weight" in assert_same(model, passes)
    assert len(seen) == passes


def test_a_tied_embedding_learns_where_the_head_is_not_used() -> None:
    model = qwen2()
    cpu.fuse(model, alone=True)
    ids = torch.tensor([[5, 9, 5]])
    model.model.embed_tokens(ids).sum().backward()
    gradient = model.model.embed_tokens.weight.grad
    assert gradient[:, 0].nonzero().flatten().tolist() == [5, 9] and gradient[5, 0] == 2


def test_embeddings_of_their_own_and_those_of_many_processes_stay_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch, cpu._Lookup)
    apart, tied = llama(), qwen2()
    cpu.fuse(apart, alone=True)
    cpu.fuse(tied, alone=False)
    learned(apart)
    learned(tied)
    assert not seen


def test_adapters_learn_the_same_and_what_is_frozen_nothing() -> None:
    def adapted() -> nn.Module:
        torch.manual_seed(0)
        found: nn.Module = get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, parameter in found.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
        return found

    assert all("lora" in name for name in assert_same(adapted()))


def test_other_precisions_go_torch_s_way() -> None:
    model = llama().to(torch.bfloat16)
    before = model(torch.arange(3, 9)[None]).logits
    cpu.fuse(model, alone=True)
    assert torch.equal(model(torch.arange(3, 9)[None]).logits, before)
    cast = llama()
    with torch.autocast("cpu", torch.bfloat16):
        before = cast(torch.arange(3, 9)[None]).logits
        cpu.fuse(cast, alone=True)
        assert torch.equal(cast(torch.arange(3, 9)[None]).logits, before)


@pytest.mark.parametrize("rows", (1, 3, 70))
def test_weights_laid_out_for_sampling_sample_the_same(rows: int) -> None:
    model = llama()
    asked = queries(*([4, 2, 7] * 30)[:rows])
    uniform = draw(rows, 9, torch.Generator().manual_seed(0))
    plain = sample(model, asked, Sampling(9), uniform)
    cpu.fuse(model, alone=True)
    packed = sample(model, asked, Sampling(9), uniform)
    for one, two in zip(plain.responses, packed.responses, strict=True):
        assert torch.equal(one, two)
    for one, two in zip(plain.logprobs, packed.logprobs, strict=True):
        assert torch.allclose(one, two, atol=1e-5)


def test_weights_are_laid_out_anew_after_they_changed_and_not_kept() -> None:
    model = llama()
    cpu.fuse(model, alone=True)
    states = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    for factor in (1.0, 2.0):
        with torch.no_grad():
            model.lm_head.weight.mul_(factor)
            expected = states @ model.lm_head.weight.T
            with cpu.prepacked(model, 3):
                assert torch.allclose(model.lm_head(states), expected, atol=1e-5)
                assert model.lm_head._packed.is_mkldnn
            assert "_packed" not in vars(model.lm_head)


@pytest.mark.parametrize(
    ("rows", "threads", "most", "blocks"),
    ((96, 1, 768, 2), (960, 2, 768, 4), (3072, 8, 768, 16), (6400, 2, 768, 10), (258, 2, 768, 6), (257, 2, 768, 1),
     (34, 2, 768, 2), (3072, 2, 96, 32), (576, 2, 96, 6), (1000, 2, 96, 20)),
)  # fmt: skip
def test_few_states_are_multiplied_block_by_block(
    rows: int, threads: int, most: int, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "BLOCK", (32, most))
    assert products._blocks(rows, threads, products.BLOCK) == blocks
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        generator = torch.Generator().manual_seed(0)
        weight, states = (torch.randn(n, 72, generator=generator) for n in (rows, 20))
        whole = products.product_of_few(states, weight)
        exact = (states.double() @ weight.double().t()).float()
        torch.testing.assert_close(whole, exact, atol=2e-5, rtol=1e-5)
        for few in (1, 2, 3, 4, 5, 15):
            found = products.product_of_few(states[:few].t().contiguous().t(), weight)
            torch.testing.assert_close(found, exact[:few], atol=2e-5, rtol=1e-5)
            # Not by the number of others.
            assert blocks == 1 or torch.equal(products.product_of_few(states[:few], weight), whole[:few])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("tokens", "n", "k"), ((24, 40, 72), (40, 96, 16), (2, 600, 5), (14, 40, 72), (16, 16, 16), (0, 8, 8))
)
def test_products_are_those_of_fp64_whichever_library_makes_them(tokens: int, n: int, k: int, processor: str) -> None:
    generator = torch.Generator().manual_seed(0)
    states, weight, gradient, others = (
        torch.randn(shape, generator=generator) for shape in ((tokens, k), (n, k), (tokens, n), (tokens, n))
    )
    by_number, some = states.t().contiguous().t(), torch.cat([others, gradient], 1)[:, n:]
    forth, back = states.double() @ weight.double().t(), gradient.double() @ weight.double()
    of_weight, kept = gradient.double().t() @ states.double(), torch.empty(n, k)
    ways = {
        "by token": (products.times_by_token(states, weight), forth),
        "as it wants": (products.times(states, weight), forth),
        "added": (products.plus_times(others.clone(), states, weight), others.double() + forth),
        "a head's": (products.product_of(states, weight), forth),
        "back": (products.back_times(gradient, weight), back),
        "back by token": (products.back_times_by_token(gradient, weight), back),
        "of weights": (products.weight_gradient(gradient, states), of_weight),
        "of some rows": (products.weight_gradient(some, states), of_weight),
        "by number": (products.weight_gradient(gradient, by_number), of_weight),
        "written": (products.weight_gradient(gradient, states, kept), of_weight),
    }
    for way, (found, exact) in ways.items():
        assert found.shape == exact.shape, way
        assert not found.numel() or (found - exact).abs().max() <= 1e-6 * exact.abs().max() * k**0.5, way
    assert torch.equal(kept, ways["written"][0])
    assert all(ways[way][0].is_contiguous() for way in ("by token", "back by token", "of weights"))


def test_onednn_rounds_a_row_alike_however_many_others_come_with_it() -> None:
    generator = torch.Generator().manual_seed(0)
    for n, k in ((96, 576), (600, 72)):
        states, weight = torch.randn(130, k, generator=generator), torch.randn(n, k, generator=generator)
        whole = products.by_onednn(states, weight)
        for rows in (2, 3, 5, 8, 15, 16, 17, 40, 128):
            assert torch.equal(products.by_onednn(states[:rows], weight), whole[:rows])
            # As columns, too, where training has them so
            if products.BY_ONEDNN and rows % products.MANY == 0:
                assert torch.equal(products.by_onednn(weight, states[:rows]).t(), whole[:rows])


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\n", (False, 25)),
        ("vendor_id\t: GenuineIntel\ncpu family\t: 6\n", (True, 6)),
        ("CPU implementer\t: 0x41\n", (False, 0)),
        (None, (True, 0)),
    ],
)
def test_whose_processor_it_is(told: str | None, found: tuple[bool, int], monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Path) -> str:
        assert path == Path("/proc/cpuinfo")
        if told is None:
            raise FileNotFoundError(path)
        return told

    monkeypatch.setattr(Path, "read_text", read)
    assert products._processor() == found


@pytest.mark.skipif(sys.platform != "linux", reason="only there")
def test_memory_that_was_given_back_is_not_taken_from_the_kernel_again() -> None:
    script = """
import resource, sys, torch
from rlhf_ppo.ppo import cpu
if sys.argv[1] == "kept":
    cpu.keep_memory()
for _ in range(8):
    [torch.zeros(1 << 22) for _ in range(9)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    [torch.zeros(1 << 22) for _ in range(9)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    # glibc's own limits move with what is freed, which is another thing from run to run.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(128 << 10)}

    def count(how: str) -> int:
        command = [sys.executable, "-c", script, how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout)

    faults = {how: count(how) for how in ("kept", "given back")}
    # 16 MiB are 4,096 pages.
    assert faults["kept"] < 100 and faults["kept"] < faults["given back"], faults
