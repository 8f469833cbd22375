"""Coders in the layouts of Gemma Scope 1 (`params.npz`) and 2 (`params.safetensors`, `params_layer_N.safetensors`)."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jclt.coders.coder import SparseCoder
from jclt.coders.formats.names import (
    MODULE_NAME_OF,
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
from jclt.errors import UserError
from jclt.files import read_json

GEMMA_SCOPE: Names = {
    "encoder": ("W_enc", "d f -> f d"),
    "encoder_bias": ("b_enc", "f -> f"),
    "threshold": ("threshold", "f -> f"),
    "decoder": ("W_dec", "f d -> f 1 d"),
    "decoder_bias": ("b_dec", "d -> d"),
}
GEMMA_SCOPE_2: Names = {
    "encoder": ("w_enc", "d f -> f d"),
    "encoder_bias": ("b_enc", "f -> f"),
    "threshold": ("threshold", "f -> f"),
    "decoder": ("w_dec", "f d -> f 1 d"),
    "decoder_bias": ("b_dec", "d -> d"),
    "skip": ("affine_skip_connection", "i o -> o i"),
}
GEMMA_SCOPE_2_CLT: Names = GEMMA_SCOPE_2 | {"decoder": ("w_dec", "f l d -> f l d")}


def sort_by_layer(paths: Iterable[Path]) -> dict[int, Path]:
    """Files by layer, which is the last `layer_N` in their paths, in order."""
    numbered: dict[int, Path] = {}
    for path in sorted(paths):
        # The file itself may be a link to its content, which is stored under another name.
        numbers = re.findall(r"layer_(\d+)", str(path.parent.resolve() / path.name))
        if not numbers:
            raise UserError(f"{path}: nothing in its path says which layer it is of, expected 'layer_N' in it")
        if int(numbers[-1]) in numbered:
            first = numbered[int(numbers[-1])]
            raise UserError(f"{path}: a second coder of layer {numbers[-1]} beside {first}, expected a folder with one")
        numbered[int(numbers[-1])] = path
    return dict(sorted(numbered.items()))


def is_gemma_scope(folder: Path) -> bool:
    return any(folder.rglob("params.npz"))


SAES = re.compile(r"gemma-scope-[\w.]+-\w+-(res|mlp|att)\b")
"""Names of published folders whose `params.npz` are SAEs of the residual stream, the MLPs or attention."""


def read_gemma_scope(folder: Path) -> StoredCoder:
    """The files do not name the sites. They are those of the transcoders, unless the path is that of SAEs."""
    paths = sort_by_layer(folder.rglob("params.npz"))
    layers = (
        StoredLayer(number, (open_file(path),), GEMMA_SCOPE, clip_threshold_at_zero) for number, path in paths.items()
    )
    if SAES.search(str(folder.resolve())):
        return describe_coder(layers, kind="sae", reads="", writes="")
    return describe_coder(layers, kind="transcoder", reads="mlp_normalized", writes="mlp_out")


def write_gemma_scope(coder: SparseCoder, dtype: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    check_writable(coder, "gemma-scope", clt=False, rules=("jumprelu",))
    if coder.config.skip:
        raise UserError("layout gemma-scope: has no place for a skip, expected layout gemma-scope-2")
    for number, layer in zip(coder.config.covered, coder.layers, strict=True):
        yield f"layer_{number}/params.npz", to_published(weights_by_name(layer), GEMMA_SCOPE)


def is_gemma_scope_2(folder: Path) -> bool:
    return any(folder.glob("params_layer_*.safetensors")) or any(folder.rglob("params.safetensors"))


def read_gemma_scope_2(folder: Path) -> StoredCoder:
    paths = sort_by_layer(folder.glob("params_layer_*.safetensors"))
    if not paths:
        paths = sort_by_layer(folder.rglob("params.safetensors"))
        layers = [
            StoredLayer(n, (open_file(path),), GEMMA_SCOPE_2, clip_threshold_at_zero) for n, path in paths.items()
        ]
        settings = [_read_config(path.parent / "config.json", number) for number, path in paths.items()]
        return describe_coder(
            layers, **require_same(settings, [path.parent / "config.json" for path in paths.values()])
        )
    first = StoredLayer(0, (open_file(folder / "params_layer_0.safetensors"),), GEMMA_SCOPE_2_CLT)
    layers = [_open_clt_layer(folder, number) for number in range(first.shape("decoder")[1])]
    settings = {"reads": "mlp_in", "writes": "mlp_out"} | _read_config(folder / "config.json", None)
    return describe_coder(layers, **settings | {"kind": "clt"})


def _open_clt_layer(folder: Path, number: int) -> StoredLayer:
    """The files hold decoder rows for every layer; those before the feature's layer have no meaning."""
    file = open_file(folder / f"params_layer_{number}.safetensors")
    return StoredLayer(number, (file,), GEMMA_SCOPE_2_CLT, clip_threshold_at_zero, first_row=number)


def _read_config(path: Path, number: int | None) -> dict[str, Any]:
    if not os.path.lexists(path):
        return {"kind": "transcoder"}
    settings = read_json(path)
    architecture = get_text(settings, "architecture", path) or "jump_relu"
    if architecture != "jump_relu":
        raise UserError(f"{path}: architecture '{architecture}', expected 'jump_relu'")
    known: dict[str, Any] = {"model": get_text(settings, "model_name", path)}
    if hook := get_text(settings, "hf_hook_point_in", path):
        known["reads"], layer = parse_site(hook, path)
        known["writes"] = parse_site(get_text(settings, "hf_hook_point_out", path) or hook, path)[0]
        if number is not None and layer not in (None, number):
            raise UserError(f"{path}: '{hook}' is in layer {layer}, expected layer {number}")
    return known | {"kind": "sae" if "reads" in known and known["reads"] == known["writes"] else "transcoder"}


def write_gemma_scope_2(coder: SparseCoder, dtype: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    config = coder.config
    check_writable(coder, "gemma-scope-2", clt=True, rules=("jumprelu",))
    sites = [published_site_name(site, MODULE_NAME_OF, "gemma-scope-2") for site in (config.reads, config.writes)]
    for number, layer in zip(config.covered, coder.layers, strict=True):
        hooks = [f"model.layers.{number}.{site}" for site in sites]
        settings = {"architecture": "jump_relu", "model_name": config.model, "dtype": dtype}
        settings |= {"hf_hook_point_in": hooks[0], "affine_connection": config.skip}
        settings |= {"hf_hook_point_out": hooks[1]} if config.kind != "sae" else {}
        if config.kind == "clt":
            rows = np.pad(np.asarray(layer.decoder_rows), ((0, 0), (number, 0), (0, 0)))
            yield (
                f"params_layer_{number}.safetensors",
                to_published({**weights_by_name(layer), "decoder": rows}, GEMMA_SCOPE_2_CLT),
            )
            if number == 0:
                yield "config.json", settings
        else:
            yield f"layer_{number}/params.safetensors", to_published(weights_by_name(layer), GEMMA_SCOPE_2)
            yield f"layer_{number}/config.json", settings
