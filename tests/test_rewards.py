"""Rewards: a function of the user's, or a sequence-classification model; what they return is checked."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from rlhf_ppo.errors import InputError
from rlhf_ppo.ppo.rewards import RewardFailed, load_reward, score, totals
from rlhf_ppo.settings import RewardSettings, is_callable_name
from tiny_models import VOCABULARY, llama, word_tokenizer

IDS = [[5], [6, 7]]


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


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("labels", [1, 2])
def test_a_model_scores_each_text_as_if_it_stood_alone(
    tmp_path: Path, labels: int, static: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = classifier(tmp_path, labels)
    reward = load_reward(str(tmp_path), RewardSettings(reward_batch_size=3, reward_max_tokens=12), static=static)
    seen: list[tuple[int, ...]] = []
    forward = reward.model.forward  # type: ignore[attr-defined]

    def watched(input_ids: torch.Tensor, **given: Any) -> Any:
        seen.append(tuple(input_ids.shape))
        return forward(input_ids=input_ids, **given)

    monkeypatch.setattr(reward.model, "forward", watched)  # type: ignore[attr-defined]
    prompts, responses = ["w3 w4", "w5", "w6 w7 w8", "w9"], [" w10 w11", " w12", " w13", " w14 w15 w16 w17"]
    expected = []
    for prompt, response in zip(prompts, responses, strict=True):
        ids = word_tokenizer()(prompt + response, return_tensors="pt").input_ids
        expected.append(model(input_ids=ids).logits[0, -1].item())
    assert score(reward, prompts, responses, IDS) == pytest.approx(expected, abs=1e-5)
    assert len(seen) == 2 and (seen == [(3, 12)] * 2) is static


def test_a_long_text_loses_its_beginning_not_its_end(tmp_path: Path) -> None:
    classifier(tmp_path, 1)
    reward = load_reward(str(tmp_path), RewardSettings(reward_max_tokens=3))
    assert reward(["w3 w4 w5 w6"], [" w7"]) == pytest.approx(reward(["w5 w6"], [" w7"]), abs=1e-6)


def test_a_model_of_three_labels_is_refused(tmp_path: Path) -> None:
    classifier(tmp_path, 3)
    with pytest.raises(InputError, match="3 labels"):
        load_reward(str(tmp_path), RewardSettings())


def test_a_language_model_is_no_reward_for_its_head_would_be_random(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="^reward_model='.*lacks score.weight of a LlamaForSequenceClassification"):
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
    assert score(reward, ["a", "b"], ["xx", "yyy"], IDS) == [2.0, 3.0]
    with pytest.raises(InputError, match="has no function by_width"):
        load_reward("reward_of_a_user:by_width", RewardSettings())
    with pytest.raises(InputError, match="reward_model='no_such_module:f' can't be imported"):
        load_reward("no_such_module:f", RewardSettings())


def test_what_a_function_raises_is_told_with_its_name_and_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "failing_reward.py").write_text(
        "import json\n\n\ndef looks_up(prompts, responses):\n    return [{}['x'] for _ in responses]\n"
        "def one_by_one(prompts, responses):\n    yield json.loads('not')\n"
        "def takes_one(prompts):\n    return [1.0]\n"
        "def keys(prompts, responses):\n    return {1.0: 2.0, 2.0: 3.0}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, words, cause in (
        ("looks_up", rf"raised KeyError: 'x' \(at {tmp_path}/failing_reward.py:5\)$", KeyError),
        ("one_by_one", rf"raised JSONDecodeError: .* \(at {tmp_path}/failing_reward.py:7\)$", ValueError),
        ("takes_one", "raised TypeError: takes_one.. takes 1 positional argument but 2 were given$", TypeError),
    ):
        reward = load_reward(f"failing_reward:{name}", RewardSettings())
        with pytest.raises(RewardFailed, match=f"^reward_model='failing_reward:{name}' {words}") as raised:
            score(reward, ["a", "b"], ["c", "d"], IDS)
        assert isinstance(raised.value.__cause__, cause)
    with pytest.raises(InputError, match="^reward_model='failing_reward:keys' returned .*a dict is no list"):
        score(load_reward("failing_reward:keys", RewardSettings()), ["a", "b"], ["c", "d"], IDS)


def test_a_function_gets_lists_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "greedy_reward.py").write_text(
        "def score(prompts, responses, response_ids):\n    scores = [1.0] * len(responses)\n"
        "    response_ids[0].clear()\n    prompts.clear(); responses.clear(); response_ids.clear()\n"
        "    return scores\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    prompts, responses, ids = ["a", "b"], ["c", "d"], [[5], [6, 7]]
    assert score(load_reward("greedy_reward:score", RewardSettings()), prompts, responses, ids) == [1.0, 1.0]
    assert (prompts, responses, ids) == (["a", "b"], ["c", "d"], IDS)


def test_a_name_with_a_function_is_told_from_a_model() -> None:
    assert is_callable_name("package.module:function")
    for name in ("org/model", "models/reward", "/tmp/a:b", "model", "a.b:c-d", "lvwerra/distilbert-imdb"):
        assert not is_callable_name(name)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ([1.0], "1 scores for 2 responses"),
        ([1.0, math.nan], "nan for response 1"),
        ([math.inf, 1], "inf"),
        (3, "3"),
        ({1.0: "c", 2.0: "d"}, "a dict is no list.*must return one number"),
        ({1.0, 2.0}, "a set is no list"),
        ("12", "a str is no list"),
        (b"12", "a bytes is no list"),
    ],  # fmt: skip
)
def test_what_is_not_one_finite_number_each_is_refused(returned: object, words: str) -> None:
    with pytest.raises(InputError, match=f"reward_model returned.*{words}"):
        score(lambda prompts, responses: returned, ["a", "b"], ["c", "d"], IDS)  # type: ignore[arg-type,return-value]


def test_tensors_are_numbers_too() -> None:
    assert score(lambda p, r: torch.tensor([1.0, 2.0]), ["a", "b"], ["c", "d"], IDS) == [1.0, 2.0]  # type: ignore[arg-type,return-value]


def two_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "parts_of_a_user.py").write_text(
        "def long(prompts, responses):\n    return [float(len(text)) for text in responses]\n"
        "def tokens(prompts, responses, response_ids):\n"
        "    return [[float(token) for token in ids] for ids in response_ids]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))


def test_scores_by_token_have_one_number_for_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_parts(tmp_path, monkeypatch)
    reward = load_reward("parts_of_a_user:tokens", RewardSettings())
    assert score(reward, ["a", "b"], ["xx", "yyy"], IDS) == [[5.0], [6.0, 7.0]]
    assert totals([[5.0], [6.0, 7.0], 2.0]) == [5.0, 13.0, 2.0]
    with pytest.raises(InputError, match="response 1 .*1 numbers for 2 tokens"):
        score(lambda p, r: [1.0, [2.0]], ["a", "b"], ["c", "d"], IDS)
    with pytest.raises(InputError, match="response 1 .*must be finite"):
        score(lambda p, r: [1.0, [2.0, math.nan]], ["a", "b"], ["c", "d"], IDS)


def test_a_weighted_sum_adds_its_parts_and_shows_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_parts(tmp_path, monkeypatch)
    classifier(tmp_path / "model", 1)
    long, model = "parts_of_a_user:long", str(tmp_path / "model")
    alone = score(load_reward(model, RewardSettings()), ["w3", "w4"], ["w5", "w6 w7"], IDS)
    for weights, expected in (
        ({model: 0.5}, [2 + 0.5 * alone[0], 5 + 0.5 * alone[1]]),  # type: ignore[operator]
        ({model: -2.0, long: 3.0}, [6 - 2 * alone[0], 15 - 2 * alone[1]]),  # type: ignore[operator]
    ):
        reward = load_reward(long, RewardSettings(reward_sum=weights))
        assert score(reward, ["w3", "w4"], ["w5", "w6 w7"], IDS) == pytest.approx(expected, abs=1e-5)
        assert reward.parts == {long: 3.5, model: pytest.approx(sum(alone) / 2)}  # type: ignore[attr-defined]


def test_a_number_for_the_response_is_added_on_the_last_token_of_a_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_parts(tmp_path, monkeypatch)
    reward = load_reward("parts_of_a_user:long", RewardSettings(reward_sum={"parts_of_a_user:tokens": 2.0}))
    assert score(reward, ["a", "b", "c"], ["xx", "yyy", ""], [*IDS, []]) == [[12.0], [12.0, 17.0], 0.0]


@pytest.mark.parametrize("weight", [0, math.inf, "2", True, None])
def test_a_weight_that_is_no_finite_number_other_than_zero_is_refused(weight: object) -> None:
    with pytest.raises(InputError, match="reward_sum has the weight"):
        RewardSettings(reward_sum={"a.b:c": weight})
