"""What others' layouts have in common: their names of sites, what they cannot say, files that must agree."""

import re
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np

from jclt.coders.coder import SparseCoder
from jclt.coders.config import CoderConfig
from jclt.errors import UserError, nearest
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
"""Modules of Hugging Face's models relative to the block, as Gemma Scope 2 and SAELens name hook points."""


def our_site(name: str, where: Path | str) -> tuple[str, int | None]:
    """Our name of a site, and the layer if the name has one: `blocks.3.hook_mlp_out`, `model.layers.3.mlp.output`,
    circuit-tracer's `hook_mlp_out` or ours."""
    parts = re.fullmatch(r"(?:.*\.)?(blocks|layers|h)\.(\d{1,9})\.?(.*)", name)
    prefix, number, rest = parts.groups() if parts else ("", None, name)
    known = PEER_NAMES if prefix == "blocks" else MODULE_NAMES if prefix else PEER_NAMES | {s: s for s in LAYER_SITES}
    if known.get(rest) not in LAYER_SITES:
        raise UserError(f"{where}: site '{name}' is unknown; {nearest(rest, known)}")
    return known[rest], None if number is None else int(number)


PEER_NAME_OF = {ours: name for name, ours in reversed(PEER_NAMES.items())}
MODULE_NAME_OF = {ours: name for name, ours in reversed(MODULE_NAMES.items())}


def their_name(site: str, names: Mapping[str, str], layout: str) -> str:
    """The site's name there, or one line on what a layout cannot name."""
    if site not in names:
        raise UserError(f"layout {layout}: has no name for the site '{site}', expected one of: {', '.join(names)}")
    return names[site]


def positive(weight: str, array: np.ndarray) -> np.ndarray:
    """These layouts' JumpReLU is a ReLU behind its gate: below 0 a threshold is 0."""
    return np.maximum(array, 0).astype(array.dtype) if weight == "threshold" else array


def reason_against_layers(config: CoderConfig) -> str | None:
    """Why a layout that has no place for the layers' numbers cannot say this coder; None where it can."""
    if config.covered == tuple(range(len(config.covered))):
        return None
    return f"expects all layers from 0 on, got layers={config.covered}"


def check_sayable(coder: SparseCoder, layout: str, clt: bool, rules: tuple[str, ...]) -> None:
    """Refuses what a layout cannot say."""
    config = coder.config
    if config.kind == "clt" and not clt:
        raise UserError(f"layout {layout}: holds no cross-layer transcoders, expected layout jclt or circuit-tracer")
    if config.kind == "clt" and (reason := reason_against_layers(config)):
        raise UserError(f"layout {layout}: {reason}")
    if config.rule not in rules:
        raise UserError(f"layout {layout}: has no rule '{config.rule}', expected one of: {', '.join(rules)}")
    if any(layer.threshold is not None and bool((layer.threshold < 0).any()) for layer in coder.layers):
        raise UserError(f"layout {layout}: a threshold is below 0, expected none: its JumpReLU is never negative")


def text_of(said: Mapping[str, Any], key: str, where: Path | str) -> str:
    """The text that a setting holds, empty where it is absent."""
    value = said.get(key)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: '{key}' is {short(value)}, expected text")
    return value or ""


def agreed(said: list[dict[str, Any]], paths: list[Path]) -> dict[str, Any]:
    """What the files of all layers say alike."""
    for other, path in zip(said, paths, strict=True):
        for name in said[0]:
            if other.get(name) != said[0].get(name):
                raise UserError(
                    f"{path}: {name} is {short(other.get(name))}, expected {said[0][name]!r} as in {paths[0]}"
                )
    return said[0]
