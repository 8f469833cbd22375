"""Models in GGUF files, as llama.cpp reads them: settings from the keys, weights from the tensors.

A file holds a model in other names and layouts than its `config.json` and `.safetensors`, so each architecture becomes
a `Family` whose keys and tensors are those of GGUF; the rest is read as from a folder. What differs besides names:

- Whether a model has biases and its own unembedding is known from the tensors alone.
- Llama's queries and keys are stored for rotation in adjacent pairs, ours for pairs (i, i + half).
- Gemma's norms are stored as what they multiply by, ours as that minus one.
- Llama 3's scaling of rotary frequencies is stored as one factor for each pair.
"""

from dataclasses import replace
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jclt.errors import UserError, suggest_name
from jclt.models.config import ModelConfig, RopeScaling
from jclt.models.formats.config_json import read_settings
from jclt.models.formats.families import GEMMA2, GEMMA3, GPT2, LLAMA, QWEN2, QWEN3, REQUIRED, Family, Tensor
from jclt.models.formats.gguf_file import GgufFile
from jclt.models.formats.weights import read_params
from jclt.models.ops import rotary_frequencies
from jclt.shapes import Array, DTypeLike

ARCHITECTURES = {"llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3, "gemma2": GEMMA2, "gemma3": GEMMA3, "gpt2": GPT2}
KEYS: dict[str, tuple[str, Any]] = {
    "width": ("embedding_length", REQUIRED),
    "layers": ("block_count", REQUIRED),
    "heads": ("attention.head_count", REQUIRED),
    "mlp_width": ("feed_forward_length", REQUIRED),
    "context": ("context_length", REQUIRED),
}
ROTARY_KEYS: dict[str, tuple[str, Any]] = KEYS | {
    "kv_heads": ("attention.head_count_kv", None),
    "head_width": ("attention.key_length", None),
    "norm_epsilon": ("attention.layer_norm_rms_epsilon", REQUIRED),
    "rope_base": ("rope.freq_base", 10000.0),
}
MORE_KEYS: dict[str, dict[str, tuple[str, Any]]] = {
    "gemma2": {
        "window": ("attention.sliding_window", 4096),
        "attn_softcap": ("attn_logit_softcapping", 50.0),
        "logit_softcap": ("final_logit_softcapping", 30.0),
    },
    "gemma3": {
        "window": ("attention.sliding_window", None),
        "logit_softcap": ("final_logit_softcapping", None),
        "rope_local_base": ("rope.freq_base_swa", 10000.0),
    },
}
"""The keys of each architecture after its name, and their values in llama.cpp if they are absent."""
FUSED = (
    Tensor("blk.{}.attn_qkv.weight", "(c H K) D -> c D H K", ("query", "key", "value")),
    Tensor("blk.{}.attn_qkv.bias", "(c H K) -> c H K", ("query_bias", "key_bias", "value_bias")),
)
ADJACENT = (
    Tensor("blk.{}.attn_q.weight", "(H k r) D -> D H (r k)", ("query",)),
    Tensor("blk.{}.attn_k.weight", "(G k r) D -> D G (r k)", ("key",)),
    Tensor("blk.{}.attn_q.bias", "(H k r) -> H (r k)", ("query_bias",)),
    Tensor("blk.{}.attn_k.bias", "(G k r) -> G (r k)", ("key_bias",)),
)
TENSORS = (
    Tensor("token_embd.weight", "V D -> V D", ("token_embedding",)),
    Tensor("position_embd.weight", "P D -> P D", ("position_embedding",)),
    Tensor("blk.{}.attn_norm.weight", "D -> D", ("attn_norm_gain",)),
    Tensor("blk.{}.attn_norm.bias", "D -> D", ("attn_norm_bias",)),
    Tensor("blk.{}.attn_q.weight", "(H K) D -> D H K", ("query",)),
    Tensor("blk.{}.attn_k.weight", "(G K) D -> D G K", ("key",)),
    Tensor("blk.{}.attn_v.weight", "(G K) D -> D G K", ("value",)),
    Tensor("blk.{}.attn_output.weight", "D (H K) -> H K D", ("attn_out",)),
    Tensor("blk.{}.attn_q.bias", "(H K) -> H K", ("query_bias",)),
    Tensor("blk.{}.attn_k.bias", "(G K) -> G K", ("key_bias",)),
    Tensor("blk.{}.attn_v.bias", "(G K) -> G K", ("value_bias",)),
    Tensor("blk.{}.attn_output.bias", "D -> D", ("attn_out_bias",)),
    Tensor("blk.{}.attn_q_norm.weight", "K -> K", ("query_norm_gain",)),
    Tensor("blk.{}.attn_k_norm.weight", "K -> K", ("key_norm_gain",)),
    Tensor("blk.{}.post_attention_norm.weight", "D -> D", ("attn_post_norm_gain",)),
    Tensor("blk.{}.ffn_norm.weight", "D -> D", ("mlp_norm_gain",)),
    Tensor("blk.{}.ffn_norm.bias", "D -> D", ("mlp_norm_bias",)),
    Tensor("blk.{}.ffn_gate.weight", "M D -> D M", ("gate",)),
    Tensor("blk.{}.ffn_up.weight", "M D -> D M", ("up",)),
    Tensor("blk.{}.ffn_down.weight", "D M -> M D", ("down",)),
    Tensor("blk.{}.ffn_gate.bias", "M -> M", ("gate_bias",)),
    Tensor("blk.{}.ffn_up.bias", "M -> M", ("up_bias",)),
    Tensor("blk.{}.ffn_down.bias", "D -> D", ("down_bias",)),
    Tensor("blk.{}.post_ffw_norm.weight", "D -> D", ("mlp_post_norm_gain",)),
    Tensor("output_norm.weight", "D -> D", ("final_norm_gain",)),
    Tensor("output_norm.bias", "D -> D", ("final_norm_bias",)),
    Tensor("output.weight", "V D -> V D", ("unembedding",)),
)
LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}
"""The layers of the models of 27 billion parameters. Their scores are scaled by width / heads, not by the head size."""
GEMMA3_PERIOD = 6


def load_gguf_config(file: GgufFile) -> ModelConfig:
    return _read_gguf(file)[1]


def load_gguf_params(
    file: GgufFile, dtype: DTypeLike, mesh: Mesh | None = None
) -> tuple[ModelConfig, dict[str, Array]]:
    family, config = _read_gguf(file)
    return config, read_params([file], family, config, dtype, mesh, file.path)


def _read_gguf(file: GgufFile) -> tuple[Family, ModelConfig]:
    """The file's layout and settings."""
    name, path, keys = file.keys.get("general.architecture"), file.path, file.keys
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UserError(f"{path}: architecture '{name}' is unknown; {suggest_name(str(name), ARCHITECTURES)}")
    if keys.get("split.count", 1) not in (0, 1):
        raise UserError(
            f"{path}: is one of {short(keys['split.count'])} parts of a model, expected all of it in one file"
        )
    if keys.get(f"{name}.expert_count"):
        raise UserError(
            f"{path}: a mixture of {short(keys[f'{name}.expert_count'])} experts, expected one MLP in each layer"
        )
    if "token_embd.weight" not in file.header:
        raise UserError(f"{path}: tensor 'token_embd.weight' is missing, expected of every model")
    family = _make_family(file, name)
    settings = keys | _make_settings(file, name)
    config = read_settings(settings, family, str(path))
    _check_head(path, keys, name, config)
    config = replace(config, attn_scale=_find_scale(path, keys, name, config))
    if "rope_freqs.weight" in file.header:
        config = replace(config, rope_scaling=_find_llama3_scaling(file, config))
    return family, config


def _make_family(file: GgufFile, name: str) -> Family:
    """The family of an architecture, with the keys and the tensors that it has in GGUF files."""
    base, names = ARCHITECTURES[name], file.header
    keys = KEYS if name == "gpt2" else ROTARY_KEYS | MORE_KEYS.get(name, {})
    epsilon = {"norm_epsilon": ("attention.layer_norm_epsilon", REQUIRED)} if name == "gpt2" else {}
    rearranged = {tensor.weights[0]: tensor for tensor in {"gpt2": FUSED, "llama": ADJACENT}.get(name, ())}
    fused = {weight for tensor in rearranged.values() for weight in tensor.weights}
    offset = base.fixed.get("norm_offset", 0.0)
    tensors = [*rearranged.values(), *(tensor for tensor in TENSORS if not fused & set(tensor.weights))]
    if offset:
        tensors = [x._replace(offset=offset) if x.weights[0].endswith("norm_gain") else x for x in tensors]
    return replace(
        base,
        keys={field: (f"{name}.{key}", absent) for field, (key, absent) in (keys | epsilon).items()}
        | {"bos_token": ("tokenizer.ggml.bos_token_id", None)},
        tensors=tuple(tensors),
        prefixes=("",),
        fixed=base.fixed
        | {
            "vocabulary": names["token_embd.weight"].shape[0],
            "activation": "silu" if base in (LLAMA, QWEN2, QWEN3) else "gelu_new",
            "qkv_bias": bool({"blk.0.attn_q.bias", "blk.0.attn_qkv.bias"} & set(names)),
            "attn_out_bias": "blk.0.attn_output.bias" in names,
            "mlp_bias": "blk.0.ffn_up.bias" in names,
            "tied": "output.weight" not in names,
        },
        window_rule=base.window_rule if "window" in keys else None,
        ignored=("rope_freqs.weight",),
        scaling_switch=None,
        mlp_ratio=None,
    )


def _make_settings(file: GgufFile, name: str) -> dict[str, Any]:
    """What `config.json` says in another form than a GGUF file: stop tokens, windows and scaling of frequencies."""
    keys, settings = file.keys, dict[str, Any]()
    stops = [keys.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    settings["eos_token_id"] = [x for i, x in enumerate(stops) if x is not None and x not in stops[:i]]
    kind = keys.get(f"{name}.rope.scaling.type", "linear")
    factor = keys.get(f"{name}.rope.scaling.factor", keys.get(f"{name}.rope.scale_linear"))
    if kind not in ("none", "linear") or (kind == "linear" and factor):
        settings["rope_scaling"] = {"rope_type": kind, "factor": factor}
    pattern = keys.get(f"{name}.attention.sliding_window_pattern", GEMMA3_PERIOD)
    if isinstance(pattern, list):
        settings["layer_types"] = ["sliding_attention" if local else "full_attention" for local in pattern]
    else:
        settings["sliding_window_pattern"] = pattern
    return settings


def _check_head(path: Path, keys: dict[str, Any], name: str, config: ModelConfig) -> None:
    for key in ("attention.value_length", "rope.dimension_count"):
        size = keys.get(f"{name}.{key}", config.head_size)
        if size != config.head_size and name != "gpt2":
            raise UserError(
                f"{path}: '{name}.{key}' is {short(size)}, expected the size of each head, {config.head_size}"
            )


def _find_scale(path: Path, keys: dict[str, Any], name: str, config: ModelConfig) -> float | None:
    """What scores are multiplied by, if the file or the size of the model says so."""
    scale = keys.get(f"{name}.attention.scale")
    if scale is None:
        return (config.width / config.heads) ** -0.5 if LARGEST_GEMMA.get(name) == config.layers else None
    if not isinstance(scale, float) or not 1e-6 < scale < 1e6:
        raise UserError(f"{path}: '{name}.attention.scale' is {short(scale)}, expected a number between 1e-6 and 1e6")
    square = scale**-2  # mostly a whole number, whose root the file has in float32
    return round(square) ** -0.5 if 0 < abs(square - round(square)) < 1e-6 * square else scale


def _find_llama3_scaling(file: GgufFile, config: ModelConfig) -> RopeScaling | None:
    """The settings of Llama 3's scaling from what it divides each frequency by.

    Between the kept frequencies and those divided by the whole factor, the kept share is a line in the frequency. Only
    the line is stored: settings with the same line scale alike, and those with a low factor of 1 are returned.
    """
    stored = np.asarray(file.read_tensor("rope_freqs.weight"), np.float64)
    frequencies = np.asarray(rotary_frequencies(config.rotary_width, config.rope_base, None), np.float64)
    if stored.shape != frequencies.shape or not np.isfinite(stored).all() or (stored < 1).any():
        shape = f"{list(frequencies.shape)} of at least 1"
        raise UserError(f"{file.path}: tensor 'rope_freqs.weight' has shape {list(stored.shape)}, expected {shape}")
    factor = round(float(stored.max()), 4)
    if factor == 1:
        return None
    share = (1 / stored - 1 / factor) / (1 - 1 / factor)
    between = (share > 1e-4) & (share < 1 - 1e-4)
    guesses = [RopeScaling("llama3", factor), RopeScaling("llama3", factor, original_context=config.context)]
    if between.sum() > 1:
        slope, shift = np.polyfit(frequencies[between] / (2 * np.pi), share[between], 1)
        high = round(1 - 1 / shift, 3) if shift < 0 else 0.0
        guesses.append(RopeScaling("llama3", factor, 1.0, high, round(float(slope) * (high - 1))))
    for guess in guesses:
        if guess.high_frequency_factor > guess.low_frequency_factor and guess.original_context > 0:
            scaled = np.asarray(rotary_frequencies(config.rotary_width, config.rope_base, guess), np.float64)
            if np.allclose(frequencies / scaled, stored, rtol=1e-4):
                return guess
    raise UserError(f"{file.path}: the factors in tensor 'rope_freqs.weight' differ from those of Llama 3's scaling")
