"""Reads a published `config.json` as a `ModelConfig`, and writes it back."""

import math
from collections.abc import Mapping
from dataclasses import fields
from reprlib import repr as short
from typing import Any, cast, get_type_hints

from jclt.config import MISFIT, convert_type, describe_type
from jclt.errors import UserError, suggest_name
from jclt.models.config import ModelConfig, RopeScaling
from jclt.models.formats.families import ACTIVATION_NAMES, FAMILIES, REQUIRED, Family


def find_family(config: ModelConfig) -> Family:
    return _find_family(config.family, f"family '{config.family}'")


def _find_family(name: str, description: str) -> Family:
    known = {family.name: family for family in FAMILIES}
    if name not in known:
        raise UserError(f"{description} is unknown; {suggest_name(name, known)}")
    return known[name]


def read_config(raw: Mapping[str, Any], where: str) -> ModelConfig:
    """The `ModelConfig` for the content of a `config.json`; `where` names the file in errors."""
    # A model for text and images nests the settings of its text model. Stop tokens outside them have precedence.
    stops = raw.get("eos_token_id")
    raw = {**(_get_settings(raw, "text_config", where) or raw)}
    if stops is not None:
        raw["eos_token_id"] = stops
    kind = raw.get("model_type", "")
    name = kind if kind and isinstance(kind, str) else short(kind or raw.get("architectures"))
    family = _find_family(str(kind), f"{where}: architecture '{name}'")
    if raw.get("use_bidirectional_attention"):
        raise UserError(f"{where}: use_bidirectional_attention is set, expected a causal language model")
    return read_settings(raw, family, where)


def read_settings(raw: Mapping[str, Any], family: Family, where: str) -> ModelConfig:
    """The `ModelConfig` for settings under the keys of this family; `where` names their file in errors."""
    stops = raw.get("eos_token_id")
    values: dict[str, Any] = dict(family.fixed)
    for name, (key, absent) in family.keys.items():
        value = raw.get(key, absent)
        if value is REQUIRED:
            raise UserError(f"{where}: '{key}' is missing, expected of every {family.name} model")
        values[name] = value
    values["stop_tokens"] = tuple(stops) if isinstance(stops, list) else () if stops is None else (stops,)
    values["activation"] = _read_activation(values["activation"], where)
    values["bos_token"] = values["bos_token"] if isinstance(values["bos_token"], int) else None
    if family.scaling_switch and not raw.get(family.scaling_switch, True):
        values["attn_scale"] = 1.0
    for name in ("kv_heads", "head_width", "window"):
        values[name] = values.get(name) or None  # null: derived from the other sizes
    if values["mlp_width"] is None and family.mlp_ratio and isinstance(values["width"], int):
        values["mlp_width"] = family.mlp_ratio * values["width"]
    values["window"] = values["window"] or 0
    values |= _read_rope(raw, values, where)
    values = _convert_types(values, family, where)
    if "qkv_bias" in family.keys:
        values["attn_out_bias"] = values["qkv_bias"]
    if "attn_scale" in family.keys:
        values["attn_scale"] = values["attn_scale"] ** -0.5
    values |= _read_windows(raw, family, values, where)
    try:
        return ModelConfig(family=family.name, **values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _get_settings(raw: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """The settings under a key; empty if it is absent or null."""
    settings = raw.get(key) or {}
    if not isinstance(settings, Mapping):
        raise UserError(f"{where}: '{key}' is {short(settings)}, expected settings by name")
    return settings


def write_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` from which other software reads this model; an error if its family cannot express it."""
    family, config = find_family(config), config.explicit()
    raw: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.name, "dtype": dtype}
    raw |= {key: getattr(config, name) for name, (key, _) in family.keys.items()}
    keys = {name: key for name, (key, _) in family.keys.items()}
    published_names = {ours: name for name, ours in reversed(ACTIVATION_NAMES.items())}
    raw[keys["activation"]] = published_names[config.activation]
    raw["eos_token_id"] = (
        list(config.stop_tokens) if len(config.stop_tokens) > 1 else next(iter(config.stop_tokens), None)
    )
    if "attn_scale" in keys:
        scalar = config.score_scale**-2
        raw[keys["attn_scale"]] = round(scalar) if abs(scalar - round(scalar)) < 1e-6 * scalar else scalar
    elif family.scaling_switch:
        raw[family.scaling_switch] = config.attn_scale != 1.0
    if family.window_rule is not None:
        local = [
            "sliding_attention" if layer in config.local_layers else "full_attention" for layer in range(config.layers)
        ]
        # Gemma's published code computes the sliding mask even if no layer uses it.
        raw["sliding_window"] = config.window or (4096 if family.window_rule in ("even", "pattern") else None)
        raw |= {"layer_types": local} if family.window_rule != "all" else {}
        raw |= {"use_sliding_window": bool(config.local_layers)} if family.window_rule == "upper" else {}
    if scaling := config.rope_scaling:
        raw["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            raw["rope_scaling"] |= {
                "low_freq_factor": scaling.low_frequency_factor,
                "high_freq_factor": scaling.high_frequency_factor,
                "original_max_position_embeddings": scaling.original_context,
            }
    again = read_config(raw, "config.json").explicit()
    for field in fields(config):
        want, got = getattr(config, field.name), getattr(again, field.name)
        close = isinstance(want, float) and isinstance(got, float) and abs(want - got) < 1e-12
        if want != got and not close:
            raise UserError(
                f"family {family.name}: {field.name}={want} cannot be written in its layout, expected {got}"
            )
    return raw


MOST = 2**31 - 1
"""The largest whole number of any setting."""
MOST_LAYERS = 10_000
POSITIVE = ("vocabulary", "width", "layers", "heads", "mlp_width", "context")
ABOVE_ZERO = (
    "norm_epsilon",
    "rope_base",
    "rope_local_base",
    "rope_fraction",
    "attn_scale",
    "attn_softcap",
    "logit_softcap",
)


def _convert_types(values: Mapping[str, Any], family: Family, where: str) -> dict[str, Any]:
    """The values in the types of `ModelConfig`; an error for the first that has no such type or is out of range."""
    expected, typed = get_type_hints(ModelConfig), {}
    for name, value in values.items():
        key = family.keys.get(name, (name, None))[0]
        typed[name] = MISFIT if is_too_large(value) else convert_type(value, expected[name])
        if typed[name] is MISFIT or (name in POSITIVE and value < 1):
            wanted = "a positive whole number" if name in POSITIVE else describe_type(expected[name])
            raise UserError(f"{where}: '{key}' is {short(value)}, expected {wanted}")
        if name in ABOVE_ZERO and (typed[name] is not None or name == "attn_scale") and not (value and value > 0):
            raise UserError(f"{where}: '{key}' is {short(value)}, expected a number above 0")
    if typed["layers"] > MOST_LAYERS:
        raise UserError(f"{where}: '{family.keys['layers'][0]}' is {typed['layers']}, expected at most {MOST_LAYERS}")
    return typed


def is_too_large(value: Any) -> bool:
    """Whether it is, or contains, a number that no model has: not finite, or a whole number that is too large."""
    if isinstance(value, tuple | list):
        return any(map(is_too_large, value))
    return abs(value) > MOST if isinstance(value, int) else isinstance(value, float) and not math.isfinite(value)


def _read_activation(name: Any, where: str) -> str:
    if not isinstance(name, str):
        raise UserError(f"{where}: the activation is {short(name)}, expected one of: {', '.join(ACTIVATION_NAMES)}")
    if name not in ACTIVATION_NAMES:
        raise UserError(f"{where}: activation '{name}' is unknown; {suggest_name(name, ACTIVATION_NAMES)}")
    return ACTIVATION_NAMES[name]


def _read_windows(raw: Mapping[str, Any], family: Family, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The layers that attend through the sliding window, from the file's list or by the family's rule."""
    window, layers, rule = values["window"], range(values["layers"]), family.window_rule
    layer_types = raw.get("layer_types")
    kinds = ("full_attention", "sliding_attention")
    if layer_types and not (
        isinstance(layer_types, list) and len(layer_types) == len(layers) and all(kind in kinds for kind in layer_types)
    ):
        wanted = f"{' or '.join(kinds)} for each of {len(layers)} layers"
        raise UserError(f"{where}: 'layer_types' is {short(layer_types)}, expected {wanted}")

    def check_whole(key: str, value: Any) -> int:
        if not isinstance(value, int) or value < 0 or is_too_large(value):
            raise UserError(f"{where}: '{key}' is {short(value)}, expected a whole number")
        return value

    if not window or (rule == "upper" and not raw.get("use_sliding_window", False)):
        local: tuple[int, ...] = ()
    elif layer_types and rule != "all":
        local = tuple(layer for layer in layers if layer_types[layer] == "sliding_attention")
    elif rule == "upper":
        first = check_whole("max_window_layers", raw.get("max_window_layers", 28))
        local = tuple(layer for layer in layers if layer >= first)
    elif rule == "even":
        local = tuple(layer for layer in layers if layer % 2 == 0)
    elif rule == "pattern":
        key = "sliding_window_pattern"
        period = check_whole(key, raw.get(key) or raw.get(f"_{key}") or 6)
        local = tuple(layer for layer in layers if (layer + 1) % period)
    else:
        local = tuple(layers)
    return {"window": window if local else 0, "local_layers": local}


def _read_rope(raw: Mapping[str, Any], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Rotary settings, from `rope_parameters` if present (newer files), otherwise from `rope_scaling`."""
    rope: dict[str, Any] = {}
    settings = _get_settings(raw, "rope_parameters", where)
    if "full_attention" in settings:
        local = _get_settings(settings, "sliding_attention", where)
        rope["rope_local_base"] = local.get("rope_theta", values.get("rope_local_base"))
        settings = _get_settings(settings, "full_attention", where)
    for name, key in (("rope_base", "rope_theta"), ("rope_fraction", "partial_rotary_factor")):
        if key in settings:
            rope[name] = settings[key]
    scaling = settings or _get_settings(raw, "rope_scaling", where)
    kind: Any = scaling.get("rope_type", scaling.get("type", "default"))
    keys = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    if not isinstance(kind, str) or kind not in keys:
        name = kind if isinstance(kind, str) else short(kind)
        raise UserError(f"{where}: rope scaling '{name}' is unknown; {suggest_name(str(name), keys)}")
    for key in keys[kind]:
        value = scaling.get(key)
        if not isinstance(value, int | float) or is_too_large(value) or value <= 0:
            raise UserError(f"{where}: '{key}' of rope scaling '{kind}' is {short(value)}, expected a number above 0")
    if kind != "default":
        factor, *bands = (scaling[key] for key in keys[kind])
        rope["rope_scaling"] = RopeScaling(cast(Any, kind), float(factor))
        if bands:
            low, high, original = bands
            if low == high:
                raise UserError(f"{where}: low_freq_factor and high_freq_factor are both {low}, expected two numbers")
            rope["rope_scaling"] = RopeScaling(cast(Any, kind), float(factor), float(low), float(high), int(original))
    return rope
