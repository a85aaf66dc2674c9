"""Rewards: a function of the user's, or a sequence-classification model; what they return is checked."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from rlhf_ppo.errors import InputError
from rlhf_ppo.ppo.rewards import load_reward, score
from rlhf_ppo.settings import RewardSettings, is_callable_name
from tiny_models import VOCABULARY, word_tokenizer


def classifier(directory: Path, labels: int) -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_labels=labels, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    model.save_pretrained(directory)
    word_tokenizer().save_pretrained(directory)
    return model


@pytest.mark.parametrize("labels", [1, 2])
def test_a_model_scores_each_text_as_if_it_stood_alone(tmp_path: Path, labels: int) -> None:
    model = classifier(tmp_path, labels)
    reward = load_reward(str(tmp_path), RewardSettings(reward_batch_size=2))
    prompts, responses = ["w3 w4", "w5", "w6 w7 w8", "w9"], [" w10 w11", " w12", " w13", " w14 w15 w16 w17"]
    expected = []
    for prompt, response in zip(prompts, responses, strict=True):
        ids = word_tokenizer()(prompt + response, return_tensors="pt").input_ids
        expected.append(model(input_ids=ids).logits[0, -1].item())
    assert score(reward, prompts, responses) == pytest.approx(expected, abs=1e-5)


def test_a_long_text_loses_its_beginning_not_its_end(tmp_path: Path) -> None:
    classifier(tmp_path, 1)
    reward = load_reward(str(tmp_path), RewardSettings(reward_max_tokens=3))
    assert reward(["w3 w4 w5 w6"], [" w7"]) == pytest.approx(reward(["w5 w6"], [" w7"]), abs=1e-6)


def test_a_model_of_three_labels_is_refused(tmp_path: Path) -> None:
    classifier(tmp_path, 3)
    with pytest.raises(InputError, match="3 labels"):
        load_reward(str(tmp_path), RewardSettings())


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    torch.save(classifier(tmp_path, 1).state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="safetensors"):
        load_reward(str(tmp_path), RewardSettings())


def test_a_function_is_imported_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reward_of_a_user.py").write_text(
        "def by_length(prompts, responses):\n    return map(len, responses)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    reward = load_reward("reward_of_a_user:by_length", RewardSettings())
    assert score(reward, ["a", "b"], ["xx", "yyy"]) == [2.0, 3.0]
    with pytest.raises(InputError, match="has no function by_width"):
        load_reward("reward_of_a_user:by_width", RewardSettings())
    with pytest.raises(InputError, match="reward_model='no_such_module:f' can't be imported"):
        load_reward("no_such_module:f", RewardSettings())


def test_a_name_with_a_function_is_told_from_a_model() -> None:
    assert is_callable_name("package.module:function")
    for name in ("org/model", "models/reward", "/tmp/a:b", "model", "a.b:c-d", "lvwerra/distilbert-imdb"):
        assert not is_callable_name(name)


@pytest.mark.parametrize(
    ("returned", "words"),
    [([1.0], "1 scores for 2 responses"), ([1.0, math.nan], "nan for response 1"), ([math.inf, 1], "inf"), (3, "3")],
)
def test_what_is_not_one_finite_number_each_is_refused(returned: object, words: str) -> None:
    with pytest.raises(InputError, match=f"reward_model returned.*{words}"):
        score(lambda prompts, responses: returned, ["a", "b"], ["c", "d"])  # type: ignore[arg-type,return-value]


def test_tensors_are_numbers_too() -> None:
    assert score(lambda p, r: torch.tensor([1.0, 2.0]), ["a", "b"], ["c", "d"]) == [1.0, 2.0]  # type: ignore[arg-type,return-value]
