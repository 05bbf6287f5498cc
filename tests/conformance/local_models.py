"""Tiny random models in one folder, under the names that stand in PEFT's tests instead of ids of the hub.

``from_pretrained("tiny-decoder")`` finds them while that folder is the working directory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from helpers import tiny_gpt2, tiny_llama, tiny_qwen2

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def _t5() -> PreTrainedModel:
    config = T5Config(
        vocab_size=128, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    )
    return T5ForConditionalGeneration(config)


def _bart() -> PreTrainedModel:
    config = BartConfig(
        vocab_size=128,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
    )
    return BartForConditionalGeneration(config)


def _bert() -> PreTrainedModel:
    return BertForSequenceClassification(BertConfig(vocab_size=128, max_position_embeddings=64, **SIZES))


def _roberta() -> PreTrainedModel:
    return RobertaForSequenceClassification(RobertaConfig(vocab_size=128, max_position_embeddings=64, **SIZES))


def _roberta_encoder() -> PreTrainedModel:
    return RobertaModel(RobertaConfig(vocab_size=128, max_position_embeddings=64, **SIZES))


def _llama_classifier() -> PreTrainedModel:
    config = LlamaConfig(vocab_size=128, num_key_value_heads=2, num_labels=1, pad_token_id=0, **SIZES)
    return LlamaForSequenceClassification(config)


def _opt(layers: int = 2) -> PreTrainedModel:
    config = OPTConfig(
        vocab_size=128,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    )
    return OPTForCausalLM(config)


def _bloom() -> PreTrainedModel:
    return BloomForCausalLM(BloomConfig(vocab_size=128, hidden_size=32, n_layer=5, n_head=4))


# "conv1d" and not "gpt2", "decoder" and not "llama": PEFT's tests skip what is called gpt2 for methods that they do not
# know to support Conv1D, and merging what is called llama altogether (by a slip in a check that is meant for BEFT).
DECODERS: dict[str, Callable[[], PreTrainedModel]] = {
    "tiny-decoder": lambda: tiny_llama(hidden=32, intermediate=48),
    "tiny-conv1d": lambda: tiny_gpt2(hidden=32),
    "tiny-qwen-2": lambda: tiny_qwen2(hidden=32, intermediate=48),
}
ENCODER_DECODERS = {"tiny-t5": _t5, "tiny-bart": _bart}
ENCODERS = {"tiny-bert": _bert, "tiny-roberta-encoder": _roberta_encoder}
HEADED_ENCODERS = {"tiny-bert": _bert, "tiny-roberta": _roberta}
CLASSIFIERS = {**HEADED_ENCODERS, "tiny-llama-classifier": _llama_classifier}
# Names that stand in the bodies of PEFT's tests.
BY_HUB_NAME = {
    "peft-internal-testing/opt-125m": lambda: _opt(layers=12),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": _bart,
    "peft-internal-testing/tiny-random-BertModel": _bert,
    "peft-internal-testing/tiny-random-BloomForCausalLM": _bloom,
    "peft-internal-testing/tiny-random-LlamaForCausalLM": DECODERS["tiny-decoder"],
    "peft-internal-testing/tiny-random-OPTForCausalLM": _opt,
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": _roberta,
    "peft-internal-testing/tiny-random-RobertaModel": _roberta,
    "peft-internal-testing/tiny-random-t5": _t5,
    "trl-internal-testing/tiny-random-LlamaForCausalLM": DECODERS["tiny-decoder"],
}


def save_all(folder: Path) -> Path:
    """Write every model into ``folder``, with the same random weights each time."""
    for name, build in {**DECODERS, **ENCODER_DECODERS, **ENCODERS, **CLASSIFIERS, **BY_HUB_NAME}.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            build().save_pretrained(folder / name)
    LoraConfig(target_modules=["q_proj"]).save_pretrained(str(folder / "peft-internal-testing/tiny-opt-lora-revision"))
    return folder
