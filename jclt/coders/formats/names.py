"""Shared by the published layouts: names of sites, checks of what a layout can express, settings that must agree."""

import re
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np

from jclt.coders.coder import SparseCoder
from jclt.coders.config import CoderConfig
from jclt.errors import UserError, suggest_name
from jclt.models import LAYER_SITES, PEER_NAMES

MODULE_NAMES: dict[str, str] = {
    "input": "resid_pre",
    "output": "resid_post",
    "": "resid_post",
    "self_attn.output": "attn_raw_out",
    "pre_feedforward_layernorm.output": "mlp_in",
    "mlp.input": "mlp_in",
    "mlp.output": "mlp_raw_out",
    "post_feedforward_layernorm.output": "mlp_out",
}
"""Our site for each module of a Hugging Face block, by which Gemma Scope 2 and SAELens name hook points."""


def parse_site(name: str, where: Path | str) -> tuple[str, int | None]:
    """Our name of a site, and the layer if the name contains one.

    Names may be like `blocks.3.hook_mlp_out`, `model.layers.3.mlp.output`, circuit-tracer's `hook_mlp_out`, or ours.
    """
    parts = re.fullmatch(r"(?:.*\.)?(blocks|layers|h)\.(\d{1,9})\.?(.*)", name)
    prefix, number, module = parts.groups() if parts else ("", None, name)
    known = PEER_NAMES if prefix == "blocks" else MODULE_NAMES if prefix else PEER_NAMES | {s: s for s in LAYER_SITES}
    if known.get(module) not in LAYER_SITES:
        raise UserError(f"{where}: site '{name}' is unknown; {suggest_name(module, known)}")
    return known[module], None if number is None else int(number)


PEER_NAME_OF = {ours: name for name, ours in reversed(PEER_NAMES.items())}
MODULE_NAME_OF = {ours: name for name, ours in reversed(MODULE_NAMES.items())}


def published_site_name(site: str, names: Mapping[str, str], layout: str) -> str:
    """The name of a site in a layout, or an error if it has none."""
    if site not in names:
        raise UserError(f"layout {layout}: has no name for the site '{site}', expected one of: {', '.join(names)}")
    return names[site]


def clip_threshold_at_zero(weight: str, array: np.ndarray) -> np.ndarray:
    """In these layouts JumpReLU applies a ReLU too, so that a threshold below 0 acts as 0."""
    return np.maximum(array, 0).astype(array.dtype) if weight == "threshold" else array


def reason_against_layers(config: CoderConfig) -> str | None:
    """Why a layout without layer numbers cannot express this coder; None if it can."""
    if config.covered == tuple(range(len(config.covered))):
        return None
    return f"expects all layers from 0 on, got layers={config.covered}"


def check_writable(coder: SparseCoder, layout: str, clt: bool, rules: tuple[str, ...]) -> None:
    """Raises an error if a layout cannot express the coder."""
    config = coder.config
    if config.kind == "clt" and not clt:
        raise UserError(f"layout {layout}: holds no cross-layer transcoders, expected layout jclt or circuit-tracer")
    if config.kind == "clt" and (reason := reason_against_layers(config)):
        raise UserError(f"layout {layout}: {reason}")
    if config.rule not in rules:
        raise UserError(f"layout {layout}: has no rule '{config.rule}', expected one of: {', '.join(rules)}")
    if any(layer.threshold is not None and bool((layer.threshold < 0).any()) for layer in coder.layers):
        raise UserError(f"layout {layout}: a threshold is below 0, expected none: its JumpReLU is never negative")


def get_text(settings: Mapping[str, Any], key: str, where: Path | str) -> str:
    """The text of a setting; empty if it is absent."""
    value = settings.get(key)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: '{key}' is {short(value)}, expected text")
    return value or ""


def require_same(settings: list[dict[str, Any]], paths: list[Path]) -> dict[str, Any]:
    """The settings that the files of all layers share, or an error if two files differ."""
    for other, path in zip(settings, paths, strict=True):
        for name in settings[0]:
            if other.get(name) != settings[0].get(name):
                raise UserError(
                    f"{path}: {name} is {short(other.get(name))}, expected {settings[0][name]!r} as in {paths[0]}"
                )
    return settings[0]
