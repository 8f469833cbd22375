"""Writes GGUF files from model folders, as llama.cpp's converter does: by the `gguf` package and the names it knows."""

import json
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
from safetensors.numpy import load_file

import jclt
from jclt.models import Model, ModelConfig, declare

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "gpt2": gguf.MODEL_ARCH.GPT2,
}
TRANSPOSED = ("attn.c_attn.weight", "c_proj.weight", "c_fc.weight")


def random_folder(config: ModelConfig, folder: Path) -> Path:
    keys = jax.random.split(jax.random.key(0), 99)
    params = {name: w.init(key, np.float32) for key, (name, w) in zip(keys, declare(config).items(), strict=False)}
    jclt.save_model(Model(config, params, None, "random"), folder)
    return folder


def write_gguf(
    folder: Path,
    path: Path,
    kind: str = "F32",
    *,
    rounded: bool = False,
    tokenizer: dict[str, Any] | None = None,
    keys: dict[str, Any] | None = None,
    without: tuple[str, ...] = (),
) -> Path:
    """Writes the model in a folder with matrices of this type; where rows are no multiple of its block, of type F16.

    With `rounded`, the matrices are stored as F32 after a way through the type. `keys` are written last and replace
    others; tensors `without` are left out.
    """
    raw = json.loads((folder / "config.json").read_text())
    arch = ARCHITECTURES[raw["model_type"]]
    settings = list_keys(raw) | list_special_tokens(raw) | (tokenizer or {}) | (keys or {})
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    for key, value in settings.items():
        if value is None:
            continue
        add_key(
            writer,
            key if "." in key and key.split(".")[0] in ("general", "tokenizer", "split") else f"{writer.arch}.{key}",
            value,
        )
    rng = np.random.default_rng(0)
    for name, array in list_tensors(folder, raw, arch).items():
        if name in without:
            continue
        data, stored = store(array, kind, rng) if array.ndim > 1 else (array, gguf.GGMLQuantizationType.F32)
        if rounded:
            data, stored = gguf.quants.dequantize(data, stored), gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def list_keys(raw: dict[str, Any]) -> dict[str, Any]:
    """The keys of a model with this config.json, without the architecture before them."""
    if raw["model_type"] == "gpt2":
        return {
            "context_length": raw["n_positions"],
            "embedding_length": raw["n_embd"],
            "block_count": raw["n_layer"],
            "feed_forward_length": raw["n_inner"] or 4 * raw["n_embd"],
            "attention.head_count": raw["n_head"],
            "attention.layer_norm_epsilon": raw["layer_norm_epsilon"],
        }
    head = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    keys = {
        "vocab_size": raw["vocab_size"],
        "context_length": raw["max_position_embeddings"],
        "embedding_length": raw["hidden_size"],
        "block_count": raw["num_hidden_layers"],
        "feed_forward_length": raw["intermediate_size"],
        "attention.head_count": raw["num_attention_heads"],
        "attention.head_count_kv": raw["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": raw["rms_norm_eps"],
        "attention.key_length": head,
        "attention.value_length": head,
        "rope.dimension_count": head,
        "rope.freq_base": float(raw["rope_theta"]),
    }
    scaling = raw.get("rope_scaling") or {}
    if scaling.get("rope_type") == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": scaling["factor"]}
    if "gemma" in raw["model_type"]:
        keys |= {"attention.sliding_window": raw["sliding_window"]}
        keys |= (
            {"attention.scale": raw["query_pre_attn_scalar"] ** -0.5} if raw["query_pre_attn_scalar"] != head else {}
        )
        caps = ("final_logit_softcapping", *(["attn_logit_softcapping"] * (raw["model_type"] == "gemma2")))
        keys |= {cap: raw[cap] for cap in caps if raw.get(cap)}
    if raw["model_type"] == "gemma3_text":
        keys |= {"rope.freq_base_swa": float(raw["rope_local_base_freq"])}
        keys |= (
            {"attention.sliding_window_pattern": raw["sliding_window_pattern"]}
            if "sliding_window_pattern" in raw
            else {}
        )
    return keys


def list_special_tokens(raw: dict[str, Any]) -> dict[str, int | None]:
    stops = raw["eos_token_id"] if isinstance(raw["eos_token_id"], list) else [raw["eos_token_id"]]
    ends = dict(zip(("eos", "eot", "eom"), stops, strict=False))
    return {f"tokenizer.ggml.{name}_token_id": x for name, x in ({"bos": raw["bos_token_id"]} | ends).items()}


def list_tensors(folder: Path, raw: dict[str, Any], arch: gguf.MODEL_ARCH) -> dict[str, np.ndarray]:
    """Each tensor in float32, under its name and in its layout in GGUF files."""
    layers = raw["n_layer"] if arch == gguf.MODEL_ARCH.GPT2 else raw["num_hidden_layers"]
    names = gguf.get_tensor_name_map(arch, layers)
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        for published, array in load_file(file).items():
            name = names.get_name(published, try_suffixes=(".weight", ".bias"))
            if arch == gguf.MODEL_ARCH.GEMMA2 and published == "lm_head.weight":
                continue
            assert name is not None, published
            array = array.astype(np.float32)
            if arch == gguf.MODEL_ARCH.LLAMA and ".q_proj." in published:
                array = pair_neighbours(array, raw["num_attention_heads"])
            if arch == gguf.MODEL_ARCH.LLAMA and ".k_proj." in published:
                array = pair_neighbours(array, raw["num_key_value_heads"])
            if "gemma" in raw["model_type"] and published.endswith("norm.weight"):
                array = array + 1
            tensors[name] = array.T if arch == gguf.MODEL_ARCH.GPT2 and published.endswith(TRANSPOSED) else array
    scaling = raw.get("rope_scaling") or {}
    if scaling.get("rope_type") == "llama3":
        tensors["rope_freqs.weight"] = find_rope_factors(raw, scaling)
    return tensors


def pair_neighbours(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from the order first half, second half to pairs of one of each."""
    parts = array.reshape(heads, 2, len(array) // heads // 2, *array.shape[1:])
    return parts.swapaxes(1, 2).reshape(array.shape)


def find_rope_factors(raw: dict[str, Any], scaling: dict[str, Any]) -> np.ndarray:
    """What Llama 3's scaling divides each frequency by."""
    factor, low, high = (scaling[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
    size = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    factors = []
    for pair in range(size // 2):
        wavelength = 2 * np.pi * raw["rope_theta"] ** (2 * pair / size)
        turns = scaling["original_max_position_embeddings"] / wavelength
        kept = (turns - low) / (high - low)
        factors.append(1.0 if turns > high else factor if turns < low else 1 / (kept + (1 - kept) / factor))
    return np.array(factors, np.float32)


def store(array: np.ndarray, kind: str, rng: np.random.Generator) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
    """A matrix in this type. Where the package cannot write it, random bytes that give finite scales."""
    wanted = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[wanted]
    if array.shape[-1] % block:
        wanted = gguf.GGMLQuantizationType.F16
    if "_K" in wanted.name:
        return rng.integers(0, 0x20, (len(array), array.shape[1] // block * size), np.uint8), wanted
    return gguf.quants.quantize(array, wanted), wanted
