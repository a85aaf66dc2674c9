"""Tiny, randomly initialised language models and a tokenizer for tests."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from rlhf_ppo.ppo import PolicyWithValueHead

VOCABULARY = 64
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, **ENDS,
}  # fmt: skip


def made(name: str, **settings: Any) -> Any:
    """A model of any of transformers' architectures."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")(**settings)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Two layers, grouped attention."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings = {"vocab_size": VOCABULARY, **sizes, "num_key_value_heads": 2, "max_position_embeddings": 64, **ENDS}
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def gpt2(seed: int = 0, dropout: float = 0.1) -> GPT2LMHeadModel:
    """Learned positions and dropout."""
    torch.manual_seed(seed)
    rates = {name: dropout for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, **rates, **ENDS)
    ).eval()


def gemma2(seed: int = 0) -> Gemma2ForCausalLM:
    """Soft-capped logits and sliding windows."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=VOCABULARY, **sizes, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0,
            sliding_window=8, max_position_embeddings=64, **ENDS,
        )
    ).eval()  # fmt: skip


def neox(seed: int = 0) -> GPTNeoXForCausalLM:
    """A head of another name, parallel residuals."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=VOCABULARY, **sizes, max_position_embeddings=64, **ENDS)).eval()


def qwen2(seed: int = 0) -> Qwen2ForCausalLM:
    """Biases in attention, tied embeddings."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY, **sizes, num_key_value_heads=2, tie_word_embeddings=True,
            max_position_embeddings=64, **ENDS,
        )
    ).eval()  # fmt: skip


def t5(seed: int = 0) -> T5ForConditionalGeneration:
    """An encoder-decoder with relative positions, whose decoder's output is scaled before the head."""
    torch.manual_seed(seed)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = T5Config(vocab_size=VOCABULARY, **sizes, decoder_start_token_id=0, **ENDS)
    return T5ForConditionalGeneration(config).eval()


def bart(seed: int = 0) -> BartForConditionalGeneration:
    """An encoder-decoder with learned positions, whose responses start after an end token."""
    torch.manual_seed(seed)
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        **sizes,
        **heads,
        max_position_embeddings=64,
        decoder_start_token_id=2,
        **ENDS,
    )
    return BartForConditionalGeneration(config).eval()


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words w3 .. w63 and the three special tokens."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": number for number in range(3, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def queries(*lengths: int, seed: int = 1) -> list[torch.Tensor]:
    """Random prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]


def policy_of(model: nn.Module) -> PolicyWithValueHead:
    """``model`` with a value head that is not zero."""
    policy = PolicyWithValueHead(model)
    nn.init.normal_(policy.v_head.summary.weight, generator=torch.Generator().manual_seed(1))
    return policy
