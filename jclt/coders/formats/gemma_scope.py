"""Coders in the layouts of Gemma Scope 1 (`params.npz`) and 2 (`params.safetensors`, `params_layer_N.safetensors`)."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jclt.coders.coder import SparseCoder
from jclt.coders.formats.names import MODULE_NAME_OF, agreed, check_sayable, our_site, positive, text_of, their_name
from jclt.coders.formats.tensors import Found, LayerSource, Names, found, open_file, published, weights
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


def by_layer(paths: Iterable[Path]) -> dict[int, Path]:
    """Files by the last `layer_N` in their paths, in order."""
    numbered: dict[int, Path] = {}
    for path in sorted(paths):
        # The file itself may be a link to where its content is kept, under another name.
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
"""The published folders whose `params.npz` are SAEs of the residual stream, of MLPs and of attention."""


def read_gemma_scope(folder: Path) -> Found:
    """Nothing in the files names the sites; these are the transcoders', unless the path says that they are none."""
    paths = by_layer(folder.rglob("params.npz"))
    layers = (LayerSource(number, (open_file(path),), GEMMA_SCOPE, positive) for number, path in paths.items())
    if SAES.search(str(folder.resolve())):
        return found(layers, kind="sae", reads="", writes="")
    return found(layers, kind="transcoder", reads="mlp_normalized", writes="mlp_out")


def write_gemma_scope(coder: SparseCoder, dtype: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    check_sayable(coder, "gemma-scope", clt=False, rules=("jumprelu",))
    if coder.config.skip:
        raise UserError("layout gemma-scope: has no place for a skip, expected layout gemma-scope-2")
    for number, layer in zip(coder.config.covered, coder.layers, strict=True):
        yield f"layer_{number}/params.npz", published(weights(layer), GEMMA_SCOPE)


def is_gemma_scope_2(folder: Path) -> bool:
    return any(folder.glob("params_layer_*.safetensors")) or any(folder.rglob("params.safetensors"))


def read_gemma_scope_2(folder: Path) -> Found:
    paths = by_layer(folder.glob("params_layer_*.safetensors"))
    if not paths:
        paths = by_layer(folder.rglob("params.safetensors"))
        layers = [LayerSource(n, (open_file(path),), GEMMA_SCOPE_2, positive) for n, path in paths.items()]
        said = [_gemma_scope_2_config(path.parent / "config.json", number) for number, path in paths.items()]
        return found(layers, **agreed(said, [path.parent / "config.json" for path in paths.values()]))
    first = LayerSource(0, (open_file(folder / "params_layer_0.safetensors"),), GEMMA_SCOPE_2_CLT)
    layers = [_clt_layer(folder, number) for number in range(first.shape("decoder")[1])]
    said = {"reads": "mlp_in", "writes": "mlp_out"} | _gemma_scope_2_config(folder / "config.json", None)
    return found(layers, **said | {"kind": "clt"})


def _clt_layer(folder: Path, number: int) -> LayerSource:
    """Stored are decoder rows for every layer, of which those before the feature's own mean nothing."""
    file = open_file(folder / f"params_layer_{number}.safetensors")
    return LayerSource(number, (file,), GEMMA_SCOPE_2_CLT, positive, first_row=number)


def _gemma_scope_2_config(path: Path, number: int | None) -> dict[str, Any]:
    if not os.path.lexists(path):
        return {"kind": "transcoder"}
    said = read_json(path)
    architecture = text_of(said, "architecture", path) or "jump_relu"
    if architecture != "jump_relu":
        raise UserError(f"{path}: architecture '{architecture}', expected 'jump_relu'")
    known: dict[str, Any] = {"model": text_of(said, "model_name", path)}
    if hook := text_of(said, "hf_hook_point_in", path):
        known["reads"], layer = our_site(hook, path)
        known["writes"] = our_site(text_of(said, "hf_hook_point_out", path) or hook, path)[0]
        if number is not None and layer not in (None, number):
            raise UserError(f"{path}: '{hook}' is in layer {layer}, expected layer {number}")
    return known | {"kind": "sae" if "reads" in known and known["reads"] == known["writes"] else "transcoder"}


def write_gemma_scope_2(coder: SparseCoder, dtype: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    config = coder.config
    check_sayable(coder, "gemma-scope-2", clt=True, rules=("jumprelu",))
    sites = [their_name(site, MODULE_NAME_OF, "gemma-scope-2") for site in (config.reads, config.writes)]
    for number, layer in zip(config.covered, coder.layers, strict=True):
        hooks = [f"model.layers.{number}.{site}" for site in sites]
        said = {"architecture": "jump_relu", "model_name": config.model, "dtype": dtype}
        said |= {"hf_hook_point_in": hooks[0], "affine_connection": config.skip}
        said |= {"hf_hook_point_out": hooks[1]} if config.kind != "sae" else {}
        if config.kind == "clt":
            rows = np.pad(np.asarray(layer.rows), ((0, 0), (number, 0), (0, 0)))
            yield (
                f"params_layer_{number}.safetensors",
                published({**weights(layer), "decoder": rows}, GEMMA_SCOPE_2_CLT),
            )
            if number == 0:
                yield "config.json", said
        else:
            yield f"layer_{number}/params.safetensors", published(weights(layer), GEMMA_SCOPE_2)
            yield f"layer_{number}/config.json", said
