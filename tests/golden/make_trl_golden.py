"""Numbers of the classic trainer, TRL 0.11.4: writes trl_0_11_4.json and trl_0_11_4.safetensors beside this file.

In an environment of its own (the trainer is gone from later versions, and needs transformers 4):

    python -m venv .venv-trl
    .venv-trl/bin/pip install trl==0.11.4 torch transformers==4.45.2 "accelerate<1.1" "datasets<3.2" peft==0.13.2 rich

The one command that renews both files, from the repository's root:

    .venv-trl/bin/python tests/golden/make_trl_golden.py

The json holds the models' sizes, queries, responses, scores and, by case, the settings, TRL's order of the rows in each
pass and its statistics; the safetensors the weights before and after, and what TRL computed per token. Sums of
parameters that were once noted for some of these cases came from a set-up that is gone: these tensors replace them.
"""

from __future__ import annotations

import copy
import json
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false")

import accelerate  # noqa: E402
import numpy  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from tokenizers.models import WordLevel  # noqa: E402
from torch import Tensor  # noqa: E402

HERE = Path(__file__).parent
VOCABULARY = 40
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "class": "GPT2",
        "config": {
            "vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 32, "n_positions": 24, **ENDS
        },
    },
    "llama": {
        "class": "Llama",
        "config": {
            "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, **ENDS,
        },
    },
    "t5": {
        "class": "T5",
        "config": {
            "vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2,
            "decoder_start_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
        },
    },
}  # fmt: skip
LORA: dict[str, Any] = {
    "r": 2,
    "lora_alpha": 4,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
}

# Lengths of query and response of each of the four rows, for two consecutive steps.
LENGTHS = {
    "ragged": [((3, 5, 4, 6), (4, 2, 5, 3)), ((2, 6, 3, 5), (5, 3, 2, 7))],
    "even": [((3, 5, 4, 6), (6, 4, 5, 3)), ((2, 6, 3, 5), (7, 3, 6, 4))],
}
SCORES = [(1.0, -0.5, 0.3, 2.0), (0.2, 1.5, -1.0, 0.7)]

SETTINGS: dict[str, Any] = {
    "batch_size": 4, "mini_batch_size": 2, "gradient_accumulation_steps": 1, "ppo_epochs": 2, "learning_rate": 3e-3,
    "init_kl_coef": 0.2, "target": 1.0, "horizon": 100.0, "gamma": 0.95, "lam": 0.9, "cliprange": 0.1,
    "cliprange_value": 0.05, "vf_coef": 0.3,
}  # fmt: skip
# Adam is blind to the gradient's scale, so that clipping, and what accumulation divides by, show with plain gradient
# descent alone.
ONE_CLIPPED_STEP = {"max_grad_norm": 0.5, "mini_batch_size": 4, "ppo_epochs": 1, "learning_rate": 0.05}
CASES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {"model": "llama"},
    "lora": {"model": "llama", "lora": True, "settings": {"learning_rate": 1e-2}},
    "t5": {"model": "t5"},
    "default_discount": {"settings": {"gamma": 1.0, "lam": 0.95, "cliprange": 0.2, "cliprange_value": 0.2}},
    "accumulated": {"settings": {"mini_batch_size": 1, "gradient_accumulation_steps": 2}},
    "whole_batch": {"settings": {"mini_batch_size": 4}},
    "fixed_coefficient": {"settings": {"adap_kl_ctrl": False}},
    "abs": {"settings": {"kl_penalty": "abs"}},
    "mse": {"settings": {"kl_penalty": "mse"}},
    "full": {"settings": {"kl_penalty": "full"}},
    "scaled": {"settings": {"use_score_scaling": True}},
    "scaled_centred_clipped": {"settings": {"use_score_scaling": True, "use_score_norm": True, "score_clip": 1.0}},
    "clipped_scores": {"settings": {"score_clip": 0.5}},
    "whitened_even": {"rollout": "even", "settings": {"whiten_rewards": True}},
    "whitened_ragged": {"settings": {"whiten_rewards": True}},
    "clipped_gradient": {"optimizer": "SGD", "steps": 1, "settings": ONE_CLIPPED_STEP},
    "clipped_gradient_twice": {"optimizer": "SGD", "settings": ONE_CLIPPED_STEP},
    "early_stopping_never": {"settings": {"early_stopping": True, "target_kl": 1e9, "ppo_epochs": 3}},
    "early_stopping_at_once": {"settings": {"early_stopping": True, "target_kl": 1e-9, "ppo_epochs": 3}},
    "accumulated_descent": {
        "optimizer": "SGD",
        "settings": {"mini_batch_size": 1, "gradient_accumulation_steps": 2, "learning_rate": 0.05},
    },
}


def tokenizer(side: str = "right") -> Any:
    """Words w3 .. w39 and three special tokens."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": number for number in range(3, VOCABULARY)}}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side=side,
    )


def make_rollouts() -> dict[str, list[dict[str, Any]]]:
    """Random tokens of the lengths above."""
    generator = torch.Generator().manual_seed(11)

    def rows(lengths: tuple[int, ...]) -> list[list[int]]:
        return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]

    return {
        name: [
            {"queries": rows(queries), "responses": rows(responses), "scores": list(scores)}
            for (queries, responses), scores in zip(steps, SCORES, strict=True)
        ]
        for name, steps in LENGTHS.items()
    }  # fmt: skip


def perturb(module: torch.nn.Module, scale: float, seed: int) -> None:
    """Add noise to every parameter, so that none is at a special point (biases of 0, norms of 1)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def make_models() -> dict[str, tuple[Any, Any]]:
    """A policy and its reference for each kind of model, wrapped by TRL."""
    found = {}
    for seed, (name, given) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        seq2seq = given["class"] == "T5"
        head = "ForConditionalGeneration" if seq2seq else "LMHeadModel" if name == "gpt2" else "ForCausalLM"
        config = getattr(transformers, f"{given['class']}Config")(**given["config"])
        model = getattr(transformers, given["class"] + head)(config)
        perturb(model, 0.05 if seq2seq else 0.2, seed)
        wrapper = trl.AutoModelForSeq2SeqLMWithValueHead if seq2seq else trl.AutoModelForCausalLMWithValueHead
        policy, reference = (wrapper.from_pretrained(copy.deepcopy(model)) for _ in range(2))
        perturb(policy.v_head, 0.3, seed)
        perturb(reference.pretrained_model, 0.05, 10 + seed)
        found[name] = (policy, reference)
    return found


def with_adapters(policy: Any) -> Any:
    """The policy with LoRA, whose second factor isn't 0, so that policy and reference differ from the start."""
    torch.manual_seed(21)
    model = peft.get_peft_model(copy.deepcopy(policy.pretrained_model), peft.LoraConfig(**LORA, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    wrapped = trl.AutoModelForCausalLMWithValueHead.from_pretrained(model)
    wrapped.v_head.load_state_dict(policy.v_head.state_dict())
    return wrapped


class TensorMoments:
    """TRL's running moments as step() expects them: it calls .to() on the floats that they are, and fails."""

    def __init__(self, moments: Any) -> None:
        self.moments = moments

    def update(self, scores: Tensor) -> Any:
        return self.moments.update(scores)

    @property
    def mean(self) -> Tensor:
        return torch.tensor(self.moments.mean)

    @property
    def std(self) -> Tensor:
        return torch.tensor(self.moments.std)


def make_trainer(case: dict[str, Any], policy: Any, reference: Any, seed: int, side: str = "right") -> Any:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    config = trl.PPOConfig(**{**SETTINGS, **case.get("settings", {})}, seed=seed)
    optimizer = None
    if "optimizer" in case:
        optimizer = getattr(torch.optim, case["optimizer"])(policy.parameters(), lr=config.learning_rate)
    trainer = trl.PPOTrainer(config, policy, reference, tokenizer(side), optimizer=optimizer)
    trainer.running = TensorMoments(trainer.running)
    return trainer


def rows_of(rollout: dict[str, Any], start: int | None) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Queries, responses and scores for TRL, whose encoder-decoder responses begin with the start token."""
    first = [] if start is None else [start]
    return (
        [torch.tensor(row) for row in rollout["queries"]],
        [torch.tensor(first + row) for row in rollout["responses"]],
        [torch.tensor(score) for score in rollout["scores"]],
    )


def one_step(trainer: Any, rollout: dict[str, Any], start: int | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """TRL's step: its numbers for the json, and its arrays (batch, T - 1) for the safetensors."""
    orders: list[list[int]] = []
    arrays: dict[str, Tensor] = {}
    permutation, advantages = numpy.random.permutation, trainer.compute_advantages

    def recorded_permutation(size: int) -> Any:
        order = permutation(size)
        orders.append(order.tolist())
        return order

    def recorded_advantages(values: Tensor, rewards: Tensor, mask: Tensor) -> Any:
        result = advantages(values, rewards, mask)
        arrays.update(mask=mask.bool(), rewards=rewards, values=result[0], advantages=result[1], returns=result[2])
        return result

    with (
        mock.patch("numpy.random.permutation", recorded_permutation),
        mock.patch.object(trainer, "compute_advantages", recorded_advantages),
        mock.patch.object(trainer, "train_minibatch", wraps=trainer.train_minibatch) as minibatch,
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("error", message="The average ratio")  # a skipped minibatch differs by intention
        stats = trainer.step(*rows_of(rollout, start))
    arrays["logprobs"] = torch.as_tensor(stats.pop("objective/logprobs"))
    arrays["ref_logprobs"] = torch.as_tensor(stats.pop("objective/ref_logprobs"))
    numbers = {
        name: float(value) for name, value in stats.items() if not name.startswith("time/") and numpy.ndim(value) == 0
    }
    coefficient = float(trainer.kl_ctl.value)
    return {
        "orders": orders, "minibatches": minibatch.call_count, "kl_coef_after": coefficient, "stats": numbers
    }, arrays  # fmt: skip


def forward_passes(policy: Any, rollout: dict[str, Any], start: int | None) -> dict[str, Tensor]:
    """Log-probabilities, values and masks of TRL's scoring pass, by minibatch size, extra padding and padding side."""
    found: dict[str, Tensor] = {}
    queries, responses, _ = rows_of(rollout, start)
    for name, size, extra, side in (
        ("by_1", 1, 0, "right"), ("by_2", 2, 0, "right"), ("by_4", 4, 0, "right"), ("padded", 2, 5, "right"),
        ("left", 2, 0, "left"),
    ):  # fmt: skip
        trainer = make_trainer({"settings": {"mini_batch_size": size, "batch_size": 4}}, policy, None, 0, side)
        inputs = trainer.prepare_model_inputs(queries, responses)
        inputs = {key: torch.nn.functional.pad(value, (0, extra)) for key, value in inputs.items()}
        with torch.no_grad():
            logprobs, _, values, masks = trainer.batched_forward_pass(policy, queries, responses, inputs)
        found |= {f"{name}/logprobs": logprobs, f"{name}/values": values, f"{name}/mask": masks.bool()}
    return found


def trained(policy: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in policy.named_parameters() if value.requires_grad}


def saved_head(policy: Any) -> tuple[list[str], dict[str, Tensor]]:
    """What TRL's save_pretrained writes: all names, and the value head's tensors.

    Also checks the other way: TRL loads a file of a plain model's names and ``v_head.summary.weight`` and ``.bias``.
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as ours:
        policy.save_pretrained(folder)
        weights = load_file(Path(folder) / "model.safetensors")
        policy.pretrained_model.save_pretrained(ours)
        head = {"v_head.summary.weight": torch.randn(1, 16), "v_head.summary.bias": torch.randn(1)}
        trunk = load_file(Path(ours) / "model.safetensors")
        save_file({**trunk, **head}, str(Path(ours) / "model.safetensors"), {"format": "pt"})
        loaded = trl.AutoModelForCausalLMWithValueHead.from_pretrained(ours)
    for name, value in head.items():
        assert torch.equal(loaded.state_dict()[name], value), name
    for name, value in policy.pretrained_model.named_parameters():
        assert torch.equal(loaded.pretrained_model.get_parameter(name), value), name
    return sorted(weights), {name: value for name, value in weights.items() if name.startswith("v_head.")}


def play(case: dict[str, Any], policy: Any, reference: Any, seed: int, rollouts: list[dict[str, Any]]) -> Any:
    """All steps of a case: the case with TRL's numbers, and what goes into the safetensors."""
    trainer = make_trainer(case, policy, reference, seed)
    start = MODELS[case["model"]]["config"].get("decoder_start_token_id")
    steps: list[dict[str, Any]] = []
    found: dict[str, Tensor] = {}
    for number in range(case["steps"]):
        numbers, arrays = one_step(trainer, rollouts[number], start)
        steps.append(numbers)
        found |= {f"step{number}/{name}": value for name, value in arrays.items()}
    found |= {f"after/{name}": value for name, value in trained(policy).items()}
    return {**case, "settings": {**SETTINGS, **case.get("settings", {})}, "steps": steps}, found


def main() -> None:
    """Play all cases and write both files."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    models, rollouts = make_models(), make_rollouts()
    tensors: dict[str, Tensor] = {}

    def put(prefix: str, named: dict[str, Tensor]) -> None:
        tensors.update({f"{prefix}/{name}": value.detach().clone().contiguous() for name, value in named.items()})

    for name, (policy, reference) in models.items():
        put(f"{name}/policy", trained(policy))
        put(f"{name}/reference", dict(reference.pretrained_model.named_parameters()))
    adapted = with_adapters(models["llama"][0])
    put("lora/policy", trained(adapted))
    for name in ("gpt2", "t5"):
        start = MODELS[name]["config"].get("decoder_start_token_id")
        put(f"forward/{name}", forward_passes(copy.deepcopy(models[name][0]), rollouts["ragged"][0], start))
    cases = {}
    for seed, (name, given) in enumerate(CASES.items()):
        case = {"model": "gpt2", "rollout": "ragged", "steps": 2, "lora": False, **given}
        policy, reference = copy.deepcopy((adapted, None) if case["lora"] else models[case["model"]])
        cases[name], found = play(case, policy, reference, seed, rollouts[case["rollout"]])
        put(name, found)
    names, head = saved_head(models["gpt2"][0])
    put("saved", head)
    versions = {package.__name__: package.__version__ for package in (trl, torch, transformers, accelerate, peft)}
    content = {
        "versions": versions, "models": MODELS, "lora": LORA, "rollouts": rollouts, "cases": cases, "saved": names
    }  # fmt: skip
    write(content, tensors)


def write(content: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Both files; lists of numbers on one line each."""
    save_file(tensors, str(HERE / "trl_0_11_4.safetensors"))
    (HERE / "trl_0_11_4.safetensors").chmod(0o644)
    text = re.sub(r"\[[-+.\de,\s]+\]", lambda found: " ".join(found[0].split()), json.dumps(content, indent=1))
    (HERE / "trl_0_11_4.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
