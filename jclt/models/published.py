"""`config.json` to `ModelConfig` and back."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_type_hints

from jclt.config import MISFIT, describe_type, fit_type
from jclt.errors import UserError, nearest
from jclt.models.config import ModelConfig, RopeScaling
from jclt.models.families import ACTIVATION_NAMES, FAMILIES, REQUIRED, Family


def family_of(config: ModelConfig) -> Family:
    return _family(config.family, f"family '{config.family}'")


def _family(name: str, called: str) -> Family:
    known = {family.name: family for family in FAMILIES}
    if name not in known:
        raise UserError(f"{called} is unknown; {nearest(name, known)}")
    return known[name]


def read_config(raw: Mapping[str, Any], where: str) -> ModelConfig:
    """The `ModelConfig` that a published `config.json` describes; `where` names it in errors."""
    # A model of text and images nests its text model; the stop tokens outside are those of the whole.
    stops = raw.get("eos_token_id")
    raw = raw.get("text_config") or raw
    stops = raw.get("eos_token_id") if stops is None else stops
    kind = raw.get("model_type", "")
    family = _family(kind, f"{where}: architecture '{kind or raw.get('architectures')}'")
    if raw.get("use_bidirectional_attention"):
        raise UserError(f"{where}: use_bidirectional_attention is set, expected a causal language model")

    values: dict[str, Any] = dict(family.fixed)
    for name, (key, absent) in family.keys.items():
        value = raw.get(key, absent)
        if value is REQUIRED:
            raise UserError(f"{where}: '{key}' is missing, expected of every {family.name} model")
        values[name] = value
    values["stop_tokens"] = tuple(stops) if isinstance(stops, list) else () if stops is None else (stops,)
    values["activation"] = _activation(values["activation"], where)
    values["bos_token"] = values["bos_token"] if isinstance(values["bos_token"], int) else None
    if values["mlp_width"] is None and family.name == "gpt2":
        values["mlp_width"] = 4 * values["width"]
    values["window"] = values.get("window") or 0
    for name in ("kv_heads", "head_width"):
        values[name] = values.get(name) or None  # null means: derived from the other sizes
    if "qkv_bias" in family.keys:
        values["attn_out_bias"] = values["qkv_bias"]
    if "attn_scale" in values:
        values["attn_scale"] = values["attn_scale"] ** -0.5
    if family.name == "gpt2" and not raw.get("scale_attn_weights", True):
        values["attn_scale"] = 1.0
    values |= _rope(raw, values, where)
    values = _typed(values, family, where)
    return ModelConfig(family=family.name, **values | _windows(raw, family, values, where))


def write_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` under which other software finds this model; an error if its family cannot express it."""
    family, config = family_of(config), config.explicit()
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
    elif family.name == "gpt2":
        raw["scale_attn_weights"] = config.attn_scale != 1.0
    if family.window_rule is not None:
        local = [
            "sliding_attention" if layer in config.local_layers else "full_attention" for layer in range(config.layers)
        ]
        # Gemma's own code makes the sliding mask even where no layer uses it.
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
    for entry in fields(config):
        want, got = getattr(config, entry.name), getattr(again, entry.name)
        close = isinstance(want, float) and isinstance(got, float) and abs(want - got) < 1e-12
        if want != got and not close:
            raise UserError(
                f"family {family.name}: {entry.name}={want} cannot be written in its layout, expected {got}"
            )
    return raw


def _typed(values: Mapping[str, Any], family: Family, where: str) -> dict[str, Any]:
    """The values as `ModelConfig` has them, or an error that names the first that cannot be."""
    expected, typed = get_type_hints(ModelConfig), {}
    for name, value in values.items():
        typed[name] = fit_type(value, expected[name])
        positive = name in ("vocabulary", "width", "layers", "heads", "mlp_width", "context")
        if typed[name] is MISFIT or (positive and value < 1):
            key = family.keys.get(name, (name, None))[0]
            wanted = "a positive whole number" if positive else describe_type(expected[name])
            raise UserError(f"{where}: '{key}' is {value!r}, expected {wanted}")
    return typed


def _activation(name: Any, where: str) -> str:
    if not isinstance(name, str):
        raise UserError(f"{where}: the activation is {name!r}, expected one of: {', '.join(ACTIVATION_NAMES)}")
    if name not in ACTIVATION_NAMES:
        raise UserError(f"{where}: activation '{name}' is unknown; {nearest(name, ACTIVATION_NAMES)}")
    return ACTIVATION_NAMES[name]


def _windows(raw: Mapping[str, Any], family: Family, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Which layers attend through the sliding window, by the published list or by the family's rule."""
    window, layers, rule = values["window"], range(values["layers"]), family.window_rule
    listed = raw.get("layer_types")
    if listed and (len(listed) != len(layers) or not set(listed) <= {"full_attention", "sliding_attention"}):
        kinds = "full_attention or sliding_attention"
        raise UserError(f"{where}: 'layer_types' is {listed}, expected {kinds} for each of {len(layers)} layers")
    if not window or (rule == "upper" and not raw.get("use_sliding_window", False)):
        local: tuple[int, ...] = ()
    elif listed and rule != "all":
        local = tuple(layer for layer in layers if listed[layer] == "sliding_attention")
    elif rule == "upper":
        local = tuple(layer for layer in layers if layer >= raw.get("max_window_layers", 28))
    elif rule == "even":
        local = tuple(layer for layer in layers if layer % 2 == 0)
    elif rule == "pattern":
        every = raw.get("sliding_window_pattern") or raw.get("_sliding_window_pattern") or 6
        local = tuple(layer for layer in layers if (layer + 1) % every)
    else:
        local = tuple(layers)
    return {"window": window if local else 0, "local_layers": local}


def _rope(raw: Mapping[str, Any], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Rotary settings, from today's `rope_parameters` where present, else from `rope_scaling` beside its base."""
    found: dict[str, Any] = {}
    settings = raw.get("rope_parameters") or {}
    if "full_attention" in settings:
        found["rope_local_base"] = settings.get("sliding_attention", {}).get(
            "rope_theta", values.get("rope_local_base")
        )
        settings = settings["full_attention"]
    for name, key in (("rope_base", "rope_theta"), ("rope_fraction", "partial_rotary_factor")):
        if key in settings:
            found[name] = settings[key]
    scaling = settings or raw.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    keys = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    if kind not in keys:
        raise UserError(f"{where}: rope scaling '{kind}' is unknown; {nearest(kind, keys)}")
    for key in keys[kind]:
        if not isinstance(scaling.get(key), int | float):
            raise UserError(f"{where}: '{key}' of rope scaling '{kind}' is {scaling.get(key)!r}, expected a number")
    if kind != "default":
        factor, *bands = (scaling[key] for key in keys[kind])
        found["rope_scaling"] = RopeScaling(kind, float(factor))
        if bands:
            low, high, original = bands
            found["rope_scaling"] = RopeScaling(kind, float(factor), float(low), float(high), int(original))
    return found
