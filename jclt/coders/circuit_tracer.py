"""Our own folders, and circuit-tracer's: theirs with a `config.json` beside that says all of a coder.

A cross-layer transcoder is `W_enc_{i}.safetensors` and `W_dec_{i}.safetensors`, any other coder
`layer_{i}.safetensors`; `config.yaml` is what circuit-tracer reads of the rest. A folder of ours has none where
circuit-tracer would make another coder of it.
"""

import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from reprlib import repr as short
from typing import Any, get_type_hints

import numpy as np

from jclt.coders.coder import SparseCoder
from jclt.coders.config import CoderConfig
from jclt.coders.layouts import PEER_NAME_OF, our_site, reason_against_layers, text_of
from jclt.coders.tensors import (
    Found,
    LayerSource,
    Names,
    TensorFile,
    found,
    open_file,
    published,
    stored_shape,
    weights,
)
from jclt.config import MISFIT, describe_type, fit_type
from jclt.errors import UserError, nearest
from jclt.files import read_json, read_yaml
from jclt.models.published import is_beyond

FORMAT, VERSION = "jclt-coder", 1

CLT: Names = {
    "encoder": ("W_enc_{}", "f d -> f d"),
    "encoder_bias": ("b_enc_{}", "f -> f"),
    "threshold": ("threshold_{}", "f -> f"),
    "decoder": ("W_dec_{}", "f r d -> f r d"),
    "decoder_bias": ("b_dec_{}", "d -> d"),
    "skip": ("W_skip_{}", "i o -> o i"),  # theirs while it is in use, though they neither save nor load it
}
PER_LAYER: Names = {
    "encoder": ("W_enc", "f d -> f d"),
    "encoder_bias": ("b_enc", "f -> f"),
    "threshold": ("activation_function.threshold", "f -> f"),
    "decoder": ("W_dec", "f d -> f 1 d"),
    "decoder_bias": ("b_dec", "d -> d"),
    "skip": ("W_skip", "o i -> o i"),
}
MODEL_KINDS = {True: "cross_layer_transcoder", False: "transcoder_set"}


ACTIVATIONS = {"relu": "relu", "jumprelu": "jumprelu", "jump_relu": "jumprelu", "topk": "topk"}
"""What a `config.yaml` may say; where it says nothing, thresholds make a JumpReLU."""

log = logging.getLogger(__name__)


def is_ours(folder: Path) -> bool:
    path = folder / "config.json"
    return os.path.lexists(path) and read_json(path).get("format") == FORMAT


def is_theirs(folder: Path) -> bool:
    return any(any(folder.glob(name)) for name in ("config.yaml", "W_enc_*.safetensors", "layer_*.safetensors"))


def read_ours(folder: Path) -> Found:
    config = _own_config(folder / "config.json")
    layers = _clt_layers if config.kind == "clt" else _per_layer
    return Found(config, list(layers(folder, config.covered)))


def read_theirs(folder: Path) -> Found:
    said, where = _read_settings(folder)
    clt = any(folder.glob("W_enc_*.safetensors"))
    model_kind = text_of(said, "model_kind", where) or MODEL_KINDS[clt]
    if model_kind != MODEL_KINDS[clt]:
        raise UserError(f"{where}: model_kind '{model_kind}', but the files are a {MODEL_KINDS[clt]}'s")
    hooks = [text_of(said, key, where) for key in ("feature_input_hook", "feature_output_hook")]
    reads, writes = (our_site(hook, where)[0] if hook else "" for hook in hooks)
    known = {"kind": "clt" if clt else "sae" if reads == writes else "transcoder", "reads": reads, "writes": writes}
    known |= {"model": text_of(said, "model_name", where)}
    if clt:
        layers = list(_clt_layers(folder, range(next(_clt_layers(folder, [0])).shape("decoder")[1])))
    else:
        listed = said.get("transcoders")
        layers = list(_listed(folder, listed, where) if listed else _per_layer(folder, _all_numbers(folder), ("k",)))
    return found(layers, **known | _rule(said, layers, where))


def _rule(said: Mapping[str, Any], layers: list[LayerSource], where: Path) -> dict[str, Any]:
    """The activation where the settings or a tensor `k` name it.

    Its TopK keeps the k largest whatever their sign, ours those of them that are positive: which the difference
    concerns, if any, only inputs show.
    """
    activation = text_of(said, "activation", where)
    if activation and activation not in ACTIVATIONS:
        raise UserError(f"{where}: activation '{activation}' is unknown; {nearest(activation, ACTIVATIONS)}")
    stored = {k for layer in layers for file in layer.files if (k := _stored_k(file)) is not None}
    if not stored and ACTIVATIONS.get(activation) != "topk":
        return {"activation": ACTIVATIONS[activation]} if activation else {}
    if activation not in ("", "topk"):
        raise UserError(f"{where}: activation '{activation}', but the files hold a tensor 'k', expected topk")
    numbers = [*sorted(stored), *([said["k"]] if said.get("k") is not None else [])] or [None]
    if any(number != numbers[0] for number in numbers):
        raise UserError(f"{where}: k is {short(numbers[-1])}, {sorted(stored)} in the files, expected one number")
    k = numbers[0]
    if not isinstance(k, int) or is_beyond(k):
        raise UserError(f"{where}: setting 'coder.k': {short(k)}, expected a number of active features")
    log.warning("%s: circuit-tracer's TopK keeps negative activations among the k largest, here they are 0", where)
    return {"activation": "topk", "k": k}


def _stored_k(file: TensorFile) -> int | None:
    """What circuit-tracer writes of a TopK beside its weights."""
    if "k" not in file.header:
        return None
    shape, dtype = stored_shape(file, "k")
    if math.prod(shape) != 1 or not np.issubdtype(dtype, np.integer):
        raise UserError(f"{file.path}: tensor 'k' is of type {dtype} and shape {list(shape)}, expected a whole number")
    return int(file.tensor("k").reshape(()))


def misread_by_circuit_tracer(config: CoderConfig) -> str | None:
    """Why circuit-tracer, which passes over what it does not know, would make another coder of this one's files; None
    where it loads what was saved."""
    if config.rule == "topk":
        return "has no TopK: its loaders would read a ReLU"
    if reason := reason_against_layers(config):
        return reason
    if config.kind == "clt" and config.skip:
        return "has no place for a cross-layer transcoder's skip"
    for site in (config.reads, config.writes):
        if site not in PEER_NAME_OF:
            return f"has no name for the site '{site}', expected one of: {', '.join(PEER_NAME_OF)}"
    return None


def write_ours(coder: SparseCoder, dtype: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield from _write(coder)
    if misread_by_circuit_tracer(coder.config) is None:
        yield _settings(coder.config)
    whole = {"format": FORMAT, "version": VERSION, "rule": coder.config.rule, "dtype": dtype}
    yield "config.json", whole | {"coder": asdict(coder.config)}


def write_theirs(coder: SparseCoder, dtype: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if reason := misread_by_circuit_tracer(coder.config):
        raise UserError(f"layout circuit-tracer: {reason}; layout jclt keeps all of a coder")
    yield from _write(coder)
    yield _settings(coder.config)


def _write(coder: SparseCoder) -> Iterator[tuple[str, Mapping[str, Any]]]:
    config = coder.config
    for number, layer in zip(config.covered, coder.layers, strict=True):
        arrays = weights(layer)
        if config.kind == "clt":
            yield f"W_dec_{number}.safetensors", published({"decoder": arrays.pop("decoder")}, CLT, number)
            yield f"W_enc_{number}.safetensors", published(arrays, CLT, number)
        else:
            yield f"layer_{number}.safetensors", published(arrays, PER_LAYER)


def _settings(config: CoderConfig) -> tuple[str, Mapping[str, Any]]:
    """What circuit-tracer reads beside the tensors."""
    return "config.yaml", {
        "model_kind": MODEL_KINDS[config.kind == "clt"],
        "model_name": config.model,
        "feature_input_hook": PEER_NAME_OF[config.reads],
        "feature_output_hook": PEER_NAME_OF[config.writes],
        "scan": config.model,
    }


def _clt_layers(folder: Path, numbers: Iterable[int]) -> Iterator[LayerSource]:
    for number in numbers:
        files = tuple(open_file(folder / f"{name}_{number}.safetensors") for name in ("W_enc", "W_dec"))
        yield LayerSource(number, files, CLT)


def _per_layer(folder: Path, numbers: Iterable[int], settings: tuple[str, ...] = ()) -> Iterator[LayerSource]:
    for number in numbers:
        file = open_file(folder / f"layer_{number}.safetensors")
        yield LayerSource(number, (file,), PER_LAYER, settings=settings)


def _all_numbers(folder: Path) -> range:
    """Every layer up to the last that has a file."""
    names = [re.fullmatch(r"layer_(\d+)\.safetensors", path.name) for path in folder.iterdir()]
    numbers = [int(name[1]) for name in names if name]
    if not numbers:
        raise UserError(f"{folder}: no layer_0.safetensors found, expected one file a layer")
    return range(max(numbers) + 1)


def _listed(folder: Path, paths: Any, where: Path) -> Iterator[LayerSource]:
    """The files that a `config.yaml` lists, one a layer."""
    for number, path in enumerate(paths if isinstance(paths, list) else [paths]):
        if not isinstance(path, str):
            raise UserError(f"{where}: transcoders lists {short(path)}, expected the path of a file")
        if "://" in path:
            raise UserError(f"{where}: transcoders lists '{path}', expected files on this machine: download it first")
        yield LayerSource(number, (open_file(folder / path),), PER_LAYER, settings=("k",))


def _read_settings(folder: Path) -> tuple[dict[str, Any], Path]:
    path = folder / "config.yaml"
    if os.path.lexists(path):
        return read_yaml(path), path
    path = folder / "config.json"
    return (read_json(path) if os.path.lexists(path) else {}), path


def _own_config(path: Path) -> CoderConfig:
    raw = read_json(path)
    if raw.get("version") != VERSION:
        raise UserError(
            f"{path}: version {short(raw.get('version'))}, expected {VERSION}, the one that this jclt reads"
        )
    said, expected, values = raw.get("coder"), get_type_hints(CoderConfig), {}
    if not isinstance(said, dict):
        raise UserError(f"{path}: 'coder' is missing, expected the coder's settings")
    for name, value in ({"layers": None, "width": None} | said).items():
        if name not in expected:
            raise UserError(f"{path}: setting 'coder.{name}' is unknown; {nearest(name, expected)}")
        values[name] = MISFIT if is_beyond(value) else fit_type(value, expected[name])
        if values[name] is MISFIT or (value is None and name in ("layers", "width")):
            wanted = describe_type(expected[name]).removesuffix(" or none")
            raise UserError(f"{path}: setting 'coder.{name}' is {short(value)}, expected {wanted}")
    config = CoderConfig(**values)
    if not config.covered or list(config.covered) != sorted(set(config.covered)) or config.covered[0] < 0:
        raise UserError(f"{path}: setting 'coder.layers' is {short(said['layers'])}, expected layers in order")
    if raw.get("rule") != config.rule or config.activation == "batchtopk":
        raise UserError(
            f"{path}: rule {short(raw.get('rule'))} under activation '{config.activation}', expected the same"
        )
    return config
