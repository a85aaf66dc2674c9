"""What a training says of its device before it loads anything: against what it then takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_ppo.devices import Device, Memory
from rlhf_ppo.errors import InputError
from rlhf_ppo.parameters import RunSettings, decode
from rlhf_ppo.policy_evaluation import evaluate as evaluating
from rlhf_ppo.ppo_training import train as training
from rlhf_ppo.preflight import GIB, estimate, preflight, versions
from rlhf_ppo.reference_snapshot.snapshot import snapshot_reference
from tiny_models import gpt2, llama, queries, word_tokenizer


class Card(Device):
    """A device with some memory."""

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self._memory = memory

    def memory(self) -> Memory:
        """As it was made."""
        return self._memory


@pytest.fixture
def reference(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLHF_PPO_EVENTS", str(tmp_path / "events.jsonl"))
    getattr(request, "param", llama)(seed=3).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    snapshot_reference(str(tmp_path / "model"), "", tmp_path / "reference", tmp_path / "tokenizer")
    return tmp_path / "reference"


def settings(**changes: Any) -> RunSettings:
    small = {
        "model_name": "tiny", "query_dataset": "rows", "reward_model": "r:r", "batch_size": 4, "mini_batch_size": 2,
        "rollout_max_new_tokens": 8, "rollout_batch_size": 4, "data_max_prompt_tokens": 16,
    }  # fmt: skip
    return decode({**small, **changes})


def told(reference: Path, kind: str) -> list[dict[str, Any]]:
    lines = (reference.parent / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


@pytest.mark.parametrize("reference", [llama, gpt2], indirect=True)
@pytest.mark.parametrize(
    "changes", [{}, {"model_lora_r": 4}, {"ppo_separate_critic": True}, {"ppo_shared_layers": 1},
                {"ppo_separate_critic": True, "model_lora_r": 2}]
)  # fmt: skip
def test_weights_gradients_and_adam_are_what_training_takes(reference: Path, changes: dict[str, Any]) -> None:
    expected = estimate(settings(**changes), reference)
    trainer = training.build_trainer(settings(**changes), reference, word_tokenizer())
    trainer.update(trainer.rollout(queries(3, 4, 5, 6)), [1.0, 2.0, 3.0, 4.0])
    models = [trainer.policy.pretrained_model, trainer.policy.critic, trainer.reference]
    weights = {id(p): p for model in models if model is not None for p in model.parameters()}
    trained = [p for p in weights.values() if p.requires_grad]
    state = trainer.optimizer.state
    assert expected.weights == pytest.approx(sum(4 * p.numel() for p in weights.values()), rel=0.02)
    assert expected.gradients == pytest.approx(sum(4 * p.numel() for p in trained), rel=0.02)
    moments = sum(4 * state[p][name].numel() for p in trained for name in ("exp_avg", "exp_avg_sq"))
    assert expected.optimizer == pytest.approx(moments, rel=0.02)


def test_cache_logits_and_activations_by_hand(reference: Path) -> None:
    needs = estimate(settings(), reference)
    # Two layers, two heads of 8 for keys and for values, 24 tokens, 4 rows; 1024 rows of 64 logits, three times.
    assert needs.rollout == 2 * 2 * 2 * 8 * 24 * 4 * 4 + 1024 * 64 * 4 * 3
    # 68 bytes in fp32 for two layers of 32 units, 2 rows of 24 tokens; 8 tokens' logits and their softmax.
    assert needs.update == 68 * 2 * 32 * 2 * 24 + 2 * 8 * 64 * 4 * 2
    assert needs.total == needs.state + max(needs.rollout, needs.update)
    halved = estimate(settings(model_dtype="bfloat16"), reference)
    assert 2 * halved.state == needs.state and 2 * halved.update == needs.update


def test_autocast_s_copies_of_the_weights_that_learn_are_counted(reference: Path) -> None:
    plain, in_bf16 = (estimate(settings(), reference, 1, each) for each in (False, True))
    learned = plain.gradients // 4
    assert in_bf16.update - plain.update == in_bf16.rollout - plain.rollout == 2 * learned
    for changes in ({"model_dtype": "bfloat16"}, {"model_lora_r": 4}):
        assert estimate(settings(**changes), reference, 1, True) == estimate(settings(**changes), reference)
    assert estimate(settings(), reference, 8, True) == estimate(settings(), reference, 8), "layer by layer"


def test_it_says_what_there_is_and_what_is_needed(reference: Path) -> None:
    needs = preflight(settings(), reference, Card(Memory(0, 0, 80 * GIB)))
    (event,) = told(reference, "preflight")
    assert event["needs"]["total"] == needs.total and event["memory"]["total"] == 80 * GIB
    assert event["versions"] == versions() and {"python", "torch", "transformers"} <= set(versions())
    assert event["message"].startswith("1 cpu, needs about 0.0 of 80.0 GiB per process: weights ")
    assert told(reference, "warning") == []


def test_a_model_that_can_not_fit_is_refused_before_it_is_loaded(
    reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = estimate(settings(), reference)
    card = Card(Memory(0, 0, needs.state - 1))
    monkeypatch.setattr(training, "find_device", lambda use_habana: card)
    monkeypatch.setattr(training, "load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(InputError, match=r"model_name=tiny: weights, .*model_lora_r=16.*model_dtype=bfloat16"):
        training.train_ppo(settings().to_json(), *[reference.parent / n for n in ("p", "reference", "o", "h")], "run")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="take a smaller model"):
        preflight(settings(model_lora_r=4), reference, Card(Memory(0, 0, 1000)))


def test_little_room_and_a_busy_card_are_worth_a_warning(reference: Path) -> None:
    needs = estimate(settings(), reference)
    preflight(settings(), reference, Card(Memory(0, 0, needs.state + 1)))
    preflight(settings(), reference, Card(Memory(0, 0, 80 * GIB, others=9 * GIB)))
    little, busy = (event["message"] for event in told(reference, "warning"))
    with pytest.raises(InputError, match="another process holds 80.0: end it"):
        preflight(settings(), reference, Card(Memory(0, 0, 80 * GIB, others=80 * GIB)))
    assert "lower mini_batch_size" in little
    assert busy.startswith("another process holds 9.0 of the card's 80.0 GiB")


def test_what_is_spread_over_processes_counts_in_part(reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    static = {"pad_for_acceleration": True, "pad_max_input_len": 16, "pad_max_len": 24}
    whole = preflight(settings(**static), reference, Card(Memory(0, 0, 80 * GIB)))
    spread = preflight(settings(**static, node_sharding=True), reference, Card(Memory(0, 0, 80 * GIB)))
    assert spread.state == pytest.approx(whole.state / 4, abs=3) and spread.update == whole.update
    with pytest.raises(InputError, match=r"model_lora_r=16\), spread it over several cards \(node_sharding=True\)"):
        preflight(settings(**static), reference, Card(Memory(0, 0, 1000)))


def test_a_pod_that_asked_for_a_card_does_not_train_on_its_cpu(
    reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = settings(node_accelerator="nvidia.com/gpu", node_accelerator_count=1)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    preflight(asked, reference, Device())  # Without a cluster nobody was asked.
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    with pytest.raises(InputError, match="node_accelerator='nvidia.com/gpu', but this container sees no card"):
        preflight(asked, reference, Device())
    with pytest.raises(InputError, match="sees no card"):
        evaluating._device(asked)
    preflight(settings(), reference, Device())


def test_a_card_that_does_not_answer_ends_the_step_with_the_remedy(
    reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(*_: Any, **__: Any) -> None:
        raise RuntimeError("Device acquire failed.\nand a long trace")

    monkeypatch.setattr("rlhf_ppo.devices.torch.zeros", busy)
    with pytest.raises(InputError, match=r"cpu can't be used \(Device acquire failed\.\): look with ps .*driver"):
        preflight(settings(), reference, Device())


def test_of_several_processes_the_first_tells(reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    preflight(settings(), reference, Card(Memory(0, 0, 80 * GIB)))
    assert not (reference.parent / "events.jsonl").exists() or told(reference, "preflight") == []
