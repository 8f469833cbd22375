"""The shapes of some published models, so that a run can be planned without weights and without network."""

from typing import Any

from jclt.models.config import ModelConfig
from jclt.models.formats.config_json import read_config
from jclt.models.loading import find_config


def _llama3(factor: float) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 128256,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    }


def _gemma2() -> dict[str, Any]:
    return {
        "model_type": "gemma2",
        "vocab_size": 256000,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "bos_token_id": 2,
        "eos_token_id": 1,
    }


SMOLLM2_CONFIG = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

KNOWN: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    },
    **dict.fromkeys(("smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"), SMOLLM2_CONFIG),
    "meta-llama/Llama-3.2-1B": _llama3(32.0)
    | {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "intermediate_size": 8192,
        "tie_word_embeddings": True,
    },
    "meta-llama/Llama-3.1-8B": _llama3(8.0)
    | {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336},
    "google/gemma-2-2b": _gemma2()
    | {
        "hidden_size": 2304,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 9216,
    },
    "google/gemma-2-9b": _gemma2()
    | {
        "hidden_size": 3584,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
    },
    "Qwen/Qwen3-8B": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 12288,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    },
}
"""The part of each model's `config.json` that gives its shape, by the name that `load_model` takes."""


def known_config(name: str) -> ModelConfig:
    """The settings of a model: one of `KNOWN`, or those of a folder, a GGUF file or a hub name."""
    if name in KNOWN:
        return read_config(KNOWN[name], name)
    return find_config(name)
