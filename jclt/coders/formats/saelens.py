"""Coders in SAELens's layout: one folder for each layer, with `cfg.json` and `sae_weights.safetensors`."""

import math
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np

from jclt.coders.coder import SparseCoder
from jclt.coders.formats.names import (
    PEER_NAME_OF,
    check_writable,
    clip_threshold_at_zero,
    get_text,
    parse_site,
    published_site_name,
    require_same,
)
from jclt.coders.formats.tensors import (
    Names,
    StoredCoder,
    StoredLayer,
    describe_coder,
    open_file,
    to_published,
    weights_by_name,
)
from jclt.errors import UserError, suggest_name
from jclt.files import read_json

NAMES: Names = {
    "encoder": ("W_enc", "d f -> f d"),
    "encoder_bias": ("b_enc", "f -> f"),
    "threshold": ("threshold", "f -> f"),
    "decoder": ("W_dec", "f d -> f 1 d"),
    "decoder_bias": ("b_dec", "d -> d"),
    "skip": ("W_skip", "o i -> o i"),
}
ARCHITECTURES: dict[str, tuple[str, str, bool]] = {
    "standard": ("sae", "relu", False),
    "jumprelu": ("sae", "jumprelu", False),
    "topk": ("sae", "topk", False),
    "transcoder": ("transcoder", "relu", False),
    "skip_transcoder": ("transcoder", "relu", True),
    "jumprelu_transcoder": ("transcoder", "jumprelu", False),
    "jumprelu_skip_transcoder": ("transcoder", "jumprelu", True),
}
"""SAELens's names, each with our kind, activation and skip."""


def is_saelens(folder: Path) -> bool:
    return any(folder.rglob("cfg.json"))


def read_saelens(folder: Path) -> StoredCoder:
    settings_by_layer, layers = {}, {}
    for path in sorted(folder.rglob("cfg.json")):
        raw = read_json(path)
        known, number = _parse_config(raw, path)
        if number in settings_by_layer:
            raise UserError(f"{path}: a second coder of layer {number}, expected a folder with one")
        settings_by_layer[number] = path, known
        plain = StoredLayer(number, (open_file(path.parent / "sae_weights.safetensors"),), NAMES)
        features, width = plain.shape("encoder")
        if (raw.get("d_sae", features), raw.get("d_in", width)) != (features, width):
            sizes = f"d_sae={short(raw.get('d_sae'))}, d_in={short(raw.get('d_in'))}"
            raise UserError(f"{path}: {sizes}, expected {features} and {width}, those of the weights beside it")
        fold = partial(_fold_weight, raw, path, plain)
        computes = _subtracts_bias(raw) or _rescales(raw) or _read_input_scale(raw, path) != 1
        layers[number] = StoredLayer(number, plain.files, NAMES, fold, computes)
    order = sorted(layers)
    config = require_same(
        [settings_by_layer[number][1] for number in order], [settings_by_layer[number][0] for number in order]
    )
    return describe_coder([layers[number] for number in order], **config)


def _parse_config(raw: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], int]:
    for name in ("metadata", "activation_fn_kwargs"):
        if not isinstance(raw.get(name) or {}, dict):
            raise UserError(f"{path}: '{name}' is {short(raw[name])}, expected settings by name")
    metadata = {**raw, **(raw.get("metadata") or {})}
    architecture = get_text(raw, "architecture", path) or "standard"
    activation = raw.get("activation_fn", raw.get("activation_fn_str", "relu"))
    k = raw.get("k", (raw.get("activation_fn_kwargs") or {}).get("k"))
    if architecture == "standard" and activation == "topk":  # before version 6
        architecture, activation = "topk", "relu"
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{path}: architecture '{architecture}' is unknown; {suggest_name(architecture, ARCHITECTURES)}"
        )
    plain = {
        "activation_fn": (activation, ("relu", "topk") if architecture == "topk" else ("relu",)),
        "normalize_activations": (raw.get("normalize_activations"), (None, "none", False, "expected_average_only_in")),
        "reshape_activations": (raw.get("reshape_activations"), (None, "none")),
        "hook_head_index": (metadata.get("hook_head_index"), (None,)),
        "finetuning_scaling_factor": (raw.get("finetuning_scaling_factor"), (None, False)),
        "d_out": (raw.get("d_out"), (None, raw.get("d_in"))),
    }
    for name, (value, expected) in plain.items():
        if value not in expected:
            raise UserError(f"{path}: {name} is {short(value)}, expected {_format_options(expected)}")
    kind, rule, skip = ARCHITECTURES[architecture]
    hook = str(metadata.get("hook_name") or metadata.get("hook_point"))
    reads, number = _parse_site(metadata.get("hf_hook_name"), hook, path)
    out = metadata.get("hook_name_out") or (hook if kind == "sae" else None)
    if out is None:
        raise UserError(f"{path}: 'hook_name_out' is missing, expected of a {architecture}")
    writes, last = _parse_site(metadata.get("hf_hook_name_out"), str(out), path) if out != hook else (reads, number)
    if number is None or number != last:
        raise UserError(f"{path}: reads '{hook}' and writes '{out}', expected two sites of one layer")
    known = {"kind": kind, "activation": rule, "skip": skip, "reads": reads, "writes": writes}
    if rule == "topk" and not isinstance(k, int):
        raise UserError(f"{path}: k is {short(k)}, expected a whole number under architecture 'topk'")
    return known | {"model": get_text(metadata, "model_name", path), "k": k if rule == "topk" else None}, number


def _format_options(values: tuple[Any, ...]) -> str:
    return " or ".join(str(value) for value in values if value) or "none"


def _parse_site(module: Any, hook: str, path: Path) -> tuple[str, int | None]:
    """By the module, if it is known: the hook name is sometimes that of another site (`hook_mlp_in`)."""
    try:
        return parse_site(str(module), path)
    except UserError:
        return parse_site(hook, path)


def _fold_weight(raw: Mapping[str, Any], path: Path, plain: StoredLayer, weight: str, array: np.ndarray) -> np.ndarray:
    """A weight that includes what SAELens does to inputs and outputs at run time: scales and the subtracted bias."""
    scale = _read_input_scale(raw, path)
    norms = np.ones((), np.float32)
    if _rescales(raw):
        decoder = array if weight == "decoder" else plain.view("decoder")
        norms = np.linalg.norm(decoder[:, 0].astype(np.float32), axis=-1)
    if weight == "encoder_bias" and _subtracts_bias(raw):
        encoder, bias = (plain.view(name).astype(np.float32) for name in ("encoder", "decoder_bias"))
        array = array.astype(np.float32) - encoder @ bias
    if scale == 1 and norms.ndim == 0:
        return clip_threshold_at_zero(weight, array)
    factors = {
        "encoder": norms * scale,
        "encoder_bias": norms,
        "decoder": 1 / (np.maximum(norms, 1e-8) * scale),  # a feature that writes nothing is never active
        "decoder_bias": 1 / scale,
    }
    factor = np.asarray(factors.get(weight, 1.0))
    return clip_threshold_at_zero(
        weight, array * factor.reshape(factor.shape + (1,) * (array.ndim - 1) if factor.ndim else ())
    )


def _subtracts_bias(raw: Mapping[str, Any]) -> bool:
    is_transcoder = ARCHITECTURES.get(raw.get("architecture", "standard"), ("sae",))[0] == "transcoder"
    return bool(raw.get("apply_b_dec_to_input", not is_transcoder))


def _rescales(raw: Mapping[str, Any]) -> bool:
    return bool(raw.get("rescale_acts_by_decoder_norm"))


def _read_input_scale(raw: Mapping[str, Any], path: Path) -> float:
    if raw.get("normalize_activations") != "expected_average_only_in":
        return 1.0
    scaler = path.parent / "activation_scaler.json"
    scale = read_json(scaler).get("scaling_factor") if os.path.lexists(scaler) else None
    if not isinstance(scale, float) or not 0 < scale < math.inf:
        raise UserError(f"{path}: normalize_activations is set, expected a scaling_factor in {scaler.name} beside it")
    return scale


def write_saelens(coder: SparseCoder, dtype: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    config = coder.config
    check_writable(coder, "saelens", clt=False, rules=("relu", "jumprelu", "topk"))
    wanted = (config.kind, config.rule, config.skip)
    architecture = next((name for name, ours in ARCHITECTURES.items() if ours == wanted), None)
    if architecture is None:
        skip = " with a skip" if config.skip else ""
        raise UserError(f"layout saelens: has no {config.rule} {config.kind}{skip}, expected layout jclt")
    sites = [published_site_name(site, PEER_NAME_OF, "saelens") for site in (config.reads, config.writes)]
    cfg = {"architecture": architecture, "d_in": config.size, "d_sae": config.features, "dtype": dtype}
    cfg |= {
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    cfg |= {"d_out": config.size} if config.kind == "transcoder" else {}
    cfg |= {"k": config.k} if config.k is not None else {}
    for number, layer in zip(config.covered, coder.layers, strict=True):
        metadata = {"model_name": config.model, "hook_name": f"blocks.{number}.{sites[0]}"}
        metadata |= {"hook_name_out": f"blocks.{number}.{sites[1]}"} if config.kind == "transcoder" else {}
        folder = f"layer_{number}/" if len(config.covered) > 1 else ""
        yield f"{folder}sae_weights.safetensors", to_published(weights_by_name(layer), NAMES)
        yield f"{folder}cfg.json", cfg | {"metadata": metadata | {"sae_lens_version": "6.0.0"}}
