"""The published families of models: the keys of their `config.json`, and the names and layouts of their tensors.

A family is data, and the same data serves reading and writing. How to add one:

1. Find a small published model of the family: its `config.json`, and the names and shapes of its tensors.
2. Write a `Family` at the end of this file: `name` is the `model_type`, `architecture` the class in transformers.
3. `keys`: for each field of `ModelConfig` that the file sets, its key and the value when the key is absent (`REQUIRED`
   if that is an error). Start from `COMMON` or `ROTARY`.
4. `fixed`: the fields of `ModelConfig` that are the same in every model of the family.
5. `tensors`: for each published tensor an einops pattern from its axes to the axes in `weights.py`. The letters are
   those of `shapes.py`; `c` counts weights that share one tensor. Start from `LLAMA_TENSORS`.
6. `prefixes`: what stands before the tensors' names, such as "model.". `^` before a name means no prefix.
7. Add it to `FAMILIES`. If its arithmetic is new, add a field to `ModelConfig` and the computation to `transformer.py`.
8. Add a random model to `tests/golden`: every test of the families then covers it. `tests/models/test_families.py`
   adds a small family in this way.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

ACTIVATION_NAMES = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}
REQUIRED = object()


class Tensor(NamedTuple):
    """A published tensor and the weights in it."""

    published: str  # its name; `{}` is the layer's number
    pattern: str  # from its axes to those of the weights
    weights: tuple[str, ...]  # several are stacked along axis `c`
    offset: float = 0.0  # how much larger the published numbers are than the weights


@dataclass(frozen=True)
class Family:
    name: str  # `model_type`
    architecture: str
    keys: dict[str, tuple[str, Any]]  # field of ModelConfig -> its key in config.json, its value if the key is absent
    tensors: tuple[Tensor, ...]
    prefixes: tuple[str, ...]  # prefixes of tensor names that are read; the first is written
    fixed: dict[str, Any] = field(default_factory=dict)
    window_rule: str | None = None  # the layers with a sliding window if `layer_types` is absent: see `_read_windows`
    ignored: tuple[str, ...] = ()  # endings of the names of tensors that are not learned
    scaling_switch: str | None = None  # a key of config.json; if false, attention scores are not scaled
    mlp_ratio: int | None = None  # mlp_width / width if config.json does not give mlp_width


COMMON = {
    "vocabulary": ("vocab_size", REQUIRED),
    "width": ("hidden_size", REQUIRED),
    "layers": ("num_hidden_layers", REQUIRED),
    "heads": ("num_attention_heads", REQUIRED),
    "mlp_width": ("intermediate_size", REQUIRED),
    "context": ("max_position_embeddings", REQUIRED),
    "bos_token": ("bos_token_id", None),
    "tied": ("tie_word_embeddings", False),
}
ROTARY = COMMON | {
    "kv_heads": ("num_key_value_heads", None),
    "head_width": ("head_dim", None),
    "norm_epsilon": ("rms_norm_eps", 1e-6),
    "rope_base": ("rope_theta", 10000.0),
    "activation": ("hidden_act", "silu"),
}
GEMMA = ROTARY | {
    "activation": ("hidden_activation", "gelu_pytorch_tanh"),
    "head_width": ("head_dim", 256),
    "kv_heads": ("num_key_value_heads", 4),
    "attn_scale": ("query_pre_attn_scalar", 256),
    "window": ("sliding_window", 4096),
    "qkv_bias": ("attention_bias", False),
    "tied": ("tie_word_embeddings", True),
}
GEMMA_FIXED = {"norm_offset": 1.0, "post_norms": True, "scaled_embedding": True}

LLAMA_TENSORS = (
    Tensor("embed_tokens.weight", "V D -> V D", ("token_embedding",)),
    Tensor("layers.{}.input_layernorm.weight", "D -> D", ("attn_norm_gain",)),
    Tensor("layers.{}.self_attn.q_proj.weight", "(H K) D -> D H K", ("query",)),
    Tensor("layers.{}.self_attn.k_proj.weight", "(G K) D -> D G K", ("key",)),
    Tensor("layers.{}.self_attn.v_proj.weight", "(G K) D -> D G K", ("value",)),
    Tensor("layers.{}.self_attn.o_proj.weight", "D (H K) -> H K D", ("attn_out",)),
    Tensor("layers.{}.self_attn.q_proj.bias", "(H K) -> H K", ("query_bias",)),
    Tensor("layers.{}.self_attn.k_proj.bias", "(G K) -> G K", ("key_bias",)),
    Tensor("layers.{}.self_attn.v_proj.bias", "(G K) -> G K", ("value_bias",)),
    Tensor("layers.{}.self_attn.o_proj.bias", "D -> D", ("attn_out_bias",)),
    Tensor("layers.{}.self_attn.q_norm.weight", "K -> K", ("query_norm_gain",)),
    Tensor("layers.{}.self_attn.k_norm.weight", "K -> K", ("key_norm_gain",)),
    Tensor("layers.{}.post_attention_layernorm.weight", "D -> D", ("mlp_norm_gain",)),
    Tensor("layers.{}.mlp.gate_proj.weight", "M D -> D M", ("gate",)),
    Tensor("layers.{}.mlp.up_proj.weight", "M D -> D M", ("up",)),
    Tensor("layers.{}.mlp.down_proj.weight", "D M -> M D", ("down",)),
    Tensor("layers.{}.mlp.gate_proj.bias", "M -> M", ("gate_bias",)),
    Tensor("layers.{}.mlp.up_proj.bias", "M -> M", ("up_bias",)),
    Tensor("layers.{}.mlp.down_proj.bias", "D -> D", ("down_bias",)),
    Tensor("norm.weight", "D -> D", ("final_norm_gain",)),
    Tensor("^lm_head.weight", "V D -> V D", ("unembedding",)),
)
GEMMA_NORMS = {
    "layers.{}.post_attention_layernorm.weight": ("attn_post_norm_gain",),
    "layers.{}.pre_feedforward_layernorm.weight": ("mlp_norm_gain",),
    "layers.{}.post_feedforward_layernorm.weight": ("mlp_post_norm_gain",),
}
GEMMA_TENSORS = (
    *(tensor for tensor in LLAMA_TENSORS if tensor.published not in GEMMA_NORMS),
    *(Tensor(published, "D -> D", weights) for published, weights in GEMMA_NORMS.items()),
)
ROTARY_BUFFERS = ("rotary_emb.inv_freq",)
TEXT_PREFIXES = ("model.", "language_model.model.", "model.language_model.", "")

GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    {
        "vocabulary": ("vocab_size", REQUIRED),
        "width": ("n_embd", REQUIRED),
        "layers": ("n_layer", REQUIRED),
        "heads": ("n_head", REQUIRED),
        "mlp_width": ("n_inner", None),
        "context": ("n_positions", REQUIRED),
        "norm_epsilon": ("layer_norm_epsilon", 1e-5),
        "activation": ("activation_function", "gelu_new"),
        "attn_scale_by_layer": ("scale_attn_by_inverse_layer_idx", False),
        "bos_token": ("bos_token_id", None),
        "tied": ("tie_word_embeddings", True),
    },
    (
        Tensor("wte.weight", "V D -> V D", ("token_embedding",)),
        Tensor("wpe.weight", "P D -> P D", ("position_embedding",)),
        Tensor("h.{}.ln_1.weight", "D -> D", ("attn_norm_gain",)),
        Tensor("h.{}.ln_1.bias", "D -> D", ("attn_norm_bias",)),
        Tensor("h.{}.attn.c_attn.weight", "D (c H K) -> c D H K", ("query", "key", "value")),
        Tensor("h.{}.attn.c_attn.bias", "(c H K) -> c H K", ("query_bias", "key_bias", "value_bias")),
        Tensor("h.{}.attn.c_proj.weight", "(H K) D -> H K D", ("attn_out",)),
        Tensor("h.{}.attn.c_proj.bias", "D -> D", ("attn_out_bias",)),
        Tensor("h.{}.ln_2.weight", "D -> D", ("mlp_norm_gain",)),
        Tensor("h.{}.ln_2.bias", "D -> D", ("mlp_norm_bias",)),
        Tensor("h.{}.mlp.c_fc.weight", "D M -> D M", ("up",)),
        Tensor("h.{}.mlp.c_fc.bias", "M -> M", ("up_bias",)),
        Tensor("h.{}.mlp.c_proj.weight", "M D -> M D", ("down",)),
        Tensor("h.{}.mlp.c_proj.bias", "D -> D", ("down_bias",)),
        Tensor("ln_f.weight", "D -> D", ("final_norm_gain",)),
        Tensor("ln_f.bias", "D -> D", ("final_norm_bias",)),
        Tensor("^lm_head.weight", "V D -> V D", ("unembedding",)),
    ),
    ("transformer.", ""),
    {
        "norm": "layer",
        "gated": False,
        "learned_positions": True,
        "qkv_bias": True,
        "attn_out_bias": True,
        "mlp_bias": True,
    },
    ignored=("attn.bias", "attn.masked_bias"),
    scaling_switch="scale_attn_weights",
    mlp_ratio=4,
)

NEOX = Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    COMMON
    | {
        "norm_epsilon": ("layer_norm_eps", 1e-5),
        "activation": ("hidden_act", "gelu"),
        "rope_fraction": ("rotary_pct", 0.25),
        "rope_base": ("rotary_emb_base", 10000.0),
        "parallel": ("use_parallel_residual", True),
        "qkv_bias": ("attention_bias", True),
    },
    (
        Tensor("embed_in.weight", "V D -> V D", ("token_embedding",)),
        Tensor("layers.{}.input_layernorm.weight", "D -> D", ("attn_norm_gain",)),
        Tensor("layers.{}.input_layernorm.bias", "D -> D", ("attn_norm_bias",)),
        Tensor("layers.{}.attention.query_key_value.weight", "(H c K) D -> c D H K", ("query", "key", "value")),
        Tensor(
            "layers.{}.attention.query_key_value.bias", "(H c K) -> c H K", ("query_bias", "key_bias", "value_bias")
        ),
        Tensor("layers.{}.attention.dense.weight", "D (H K) -> H K D", ("attn_out",)),
        Tensor("layers.{}.attention.dense.bias", "D -> D", ("attn_out_bias",)),
        Tensor("layers.{}.post_attention_layernorm.weight", "D -> D", ("mlp_norm_gain",)),
        Tensor("layers.{}.post_attention_layernorm.bias", "D -> D", ("mlp_norm_bias",)),
        Tensor("layers.{}.mlp.dense_h_to_4h.weight", "M D -> D M", ("up",)),
        Tensor("layers.{}.mlp.dense_h_to_4h.bias", "M -> M", ("up_bias",)),
        Tensor("layers.{}.mlp.dense_4h_to_h.weight", "D M -> M D", ("down",)),
        Tensor("layers.{}.mlp.dense_4h_to_h.bias", "D -> D", ("down_bias",)),
        Tensor("final_layer_norm.weight", "D -> D", ("final_norm_gain",)),
        Tensor("final_layer_norm.bias", "D -> D", ("final_norm_bias",)),
        Tensor("^embed_out.weight", "V D -> V D", ("unembedding",)),
    ),
    ("gpt_neox.",),
    {"norm": "layer", "gated": False, "mlp_bias": True},
    ignored=("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
)

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    ROTARY | {"qkv_bias": ("attention_bias", False), "mlp_bias": ("mlp_bias", False)},
    LLAMA_TENSORS,
    ("model.",),
    ignored=ROTARY_BUFFERS,
)
MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    ROTARY | {"kv_heads": ("num_key_value_heads", 8), "window": ("sliding_window", 4096)},
    LLAMA_TENSORS,
    ("model.",),
    window_rule="all",
    ignored=ROTARY_BUFFERS,
)
QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    ROTARY | {"kv_heads": ("num_key_value_heads", 32), "window": ("sliding_window", 4096)},
    LLAMA_TENSORS,
    ("model.",),
    {"qkv_bias": True},
    window_rule="upper",
    ignored=ROTARY_BUFFERS,
)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    ROTARY
    | {
        "kv_heads": ("num_key_value_heads", 32),
        "head_width": ("head_dim", 128),
        "window": ("sliding_window", 4096),
        "qkv_bias": ("attention_bias", False),
    },
    LLAMA_TENSORS,
    ("model.",),
    {"qk_norm": True},
    window_rule="upper",
    ignored=ROTARY_BUFFERS,
)
GEMMA2 = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    GEMMA | {"attn_softcap": ("attn_logit_softcapping", 50.0), "logit_softcap": ("final_logit_softcapping", 30.0)},
    GEMMA_TENSORS,
    ("model.",),
    GEMMA_FIXED,
    window_rule="even",
    ignored=ROTARY_BUFFERS,
)
GEMMA3 = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    GEMMA
    | {
        # The files of models for text and images omit the keys whose values are those of the smallest model.
        "vocabulary": ("vocab_size", 262208),
        "width": ("hidden_size", 2304),
        "layers": ("num_hidden_layers", 26),
        "heads": ("num_attention_heads", 8),
        "mlp_width": ("intermediate_size", 9216),
        "context": ("max_position_embeddings", 131072),
        "logit_softcap": ("final_logit_softcapping", None),
        "rope_base": ("rope_theta", 1e6),
        "rope_local_base": ("rope_local_base_freq", 10000.0),
    },
    GEMMA_TENSORS,
    TEXT_PREFIXES,
    GEMMA_FIXED | {"qk_norm": True},
    window_rule="pattern",
    ignored=ROTARY_BUFFERS,
)
FAMILIES = (GPT2, NEOX, LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3)
