"""jclt's layout and circuit-tracer's. jclt's is the same plus a `config.json` with all settings of the coder.

- `W_enc_{i}.safetensors` and `W_dec_{i}.safetensors`: a layer of a cross-layer transcoder.
- `layer_{i}.safetensors`: a layer of any other coder.
- `config.yaml`: the settings that circuit-tracer reads. Our folders lack it if circuit-tracer would misread the coder.
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
from jclt.coders.formats.names import PEER_NAME_OF, get_text, parse_site, reason_against_layers
from jclt.coders.formats.tensors import (
    Names,
    StoredCoder,
    StoredLayer,
    TensorFile,
    describe_coder,
    open_file,
    to_published,
    weights_by_name,
)
from jclt.config import MISFIT, convert_type, describe_type
from jclt.errors import UserError, suggest_name
from jclt.files import read_json, read_yaml
from jclt.models.formats.config_json import is_too_large

FORMAT, VERSION = "jclt-coder", 1

CLT: Names = {
    "encoder": ("W_enc_{}", "f d -> f d"),
    "encoder_bias": ("b_enc_{}", "f -> f"),
    "threshold": ("threshold_{}", "f -> f"),
    "decoder": ("W_dec_{}", "f r d -> f r d"),
    "decoder_bias": ("b_dec_{}", "d -> d"),
    "skip": ("W_skip_{}", "i o -> o i"),  # their name in memory; they neither save nor load it
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
"""Activations that a `config.yaml` may name; if it names none, thresholds mean JumpReLU."""

log = logging.getLogger(__name__)


def is_jclt_folder(folder: Path) -> bool:
    path = folder / "config.json"
    return os.path.lexists(path) and read_json(path).get("format") == FORMAT


def is_circuit_tracer_folder(folder: Path) -> bool:
    return any(any(folder.glob(name)) for name in ("config.yaml", "W_enc_*.safetensors", "layer_*.safetensors"))


def read_jclt(folder: Path) -> StoredCoder:
    config = _read_jclt_config(folder / "config.json")
    open_layers = _open_clt_layers if config.kind == "clt" else _open_layers
    return StoredCoder(config, list(open_layers(folder, config.covered)))


def read_circuit_tracer(folder: Path) -> StoredCoder:
    settings, where = _read_settings(folder)
    clt = any(folder.glob("W_enc_*.safetensors"))
    model_kind = get_text(settings, "model_kind", where) or MODEL_KINDS[clt]
    if model_kind != MODEL_KINDS[clt]:
        raise UserError(f"{where}: model_kind '{model_kind}', but the files are a {MODEL_KINDS[clt]}'s")
    hooks = [get_text(settings, key, where) for key in ("feature_input_hook", "feature_output_hook")]
    reads, writes = (parse_site(hook, where)[0] if hook else "" for hook in hooks)
    kind = "clt" if clt else "sae" if reads == writes else "transcoder"
    known = {"kind": kind, "reads": reads, "writes": writes, "model": get_text(settings, "model_name", where)}
    if clt:
        reach = next(_open_clt_layers(folder, [0])).shape("decoder")[1]
        layers = list(_open_clt_layers(folder, range(reach)))
    elif paths := settings.get("transcoders"):
        layers = list(_open_listed_files(folder, paths, where))
    else:
        layers = list(_open_layers(folder, _find_layer_numbers(folder), ("k",)))
    return describe_coder(layers, **known | _read_activation(settings, layers, where))


def _read_activation(settings: Mapping[str, Any], layers: list[StoredLayer], where: Path) -> dict[str, Any]:
    """The activation, if the settings or a tensor `k` name it.

    circuit-tracer's TopK keeps the k largest whatever their sign, ours only the positive ones among them. Whether that
    makes a difference depends on the inputs.
    """
    activation = get_text(settings, "activation", where)
    if activation and activation not in ACTIVATIONS:
        raise UserError(f"{where}: activation '{activation}' is unknown; {suggest_name(activation, ACTIVATIONS)}")
    stored = {k for layer in layers for file in layer.files if (k := _read_stored_k(file)) is not None}
    if not stored and ACTIVATIONS.get(activation) != "topk":
        return {"activation": ACTIVATIONS[activation]} if activation else {}
    if activation not in ("", "topk"):
        raise UserError(f"{where}: activation '{activation}', but the files hold a tensor 'k', expected topk")
    numbers = [*sorted(stored), *([settings["k"]] if settings.get("k") is not None else [])] or [None]
    if any(number != numbers[0] for number in numbers):
        raise UserError(f"{where}: k is {short(numbers[-1])}, {sorted(stored)} in the files, expected one number")
    k = numbers[0]
    if not isinstance(k, int) or is_too_large(k):
        raise UserError(f"{where}: setting 'coder.k': {short(k)}, expected a number of active features")
    log.warning("%s: circuit-tracer's TopK keeps negative activations among the k largest, here they are 0", where)
    return {"activation": "topk", "k": k}


def _read_stored_k(file: TensorFile) -> int | None:
    """The tensor `k` that circuit-tracer writes for a TopK, if the file has one."""
    if "k" not in file.header:
        return None
    shape, dtype = file.read_shape("k")
    if math.prod(shape) != 1 or not np.issubdtype(dtype, np.integer):
        raise UserError(f"{file.path}: tensor 'k' is of type {dtype} and shape {list(shape)}, expected a whole number")
    return int(file.read_tensor("k").reshape(()))


def misread_by_circuit_tracer(config: CoderConfig) -> str | None:
    """Why circuit-tracer would load another coder from this one's files, since it ignores what it does not know; None
    if it loads the same coder."""
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


def write_jclt(coder: SparseCoder, dtype: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield from _write_tensors(coder)
    if misread_by_circuit_tracer(coder.config) is None:
        yield _circuit_tracer_settings(coder.config)
    header = {"format": FORMAT, "version": VERSION, "rule": coder.config.rule, "dtype": dtype}
    yield "config.json", header | {"coder": asdict(coder.config)}


def write_circuit_tracer(coder: SparseCoder, dtype: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if reason := misread_by_circuit_tracer(coder.config):
        raise UserError(f"layout circuit-tracer: {reason}; layout jclt keeps all of a coder")
    yield from _write_tensors(coder)
    yield _circuit_tracer_settings(coder.config)


def _write_tensors(coder: SparseCoder) -> Iterator[tuple[str, Mapping[str, Any]]]:
    config = coder.config
    for number, layer in zip(config.covered, coder.layers, strict=True):
        arrays = weights_by_name(layer)
        if config.kind == "clt":
            yield f"W_dec_{number}.safetensors", to_published({"decoder": arrays.pop("decoder")}, CLT, number)
            yield f"W_enc_{number}.safetensors", to_published(arrays, CLT, number)
        else:
            yield f"layer_{number}.safetensors", to_published(arrays, PER_LAYER)


def _circuit_tracer_settings(config: CoderConfig) -> tuple[str, Mapping[str, Any]]:
    """The file of settings that circuit-tracer reads."""
    return "config.yaml", {
        "model_kind": MODEL_KINDS[config.kind == "clt"],
        "model_name": config.model,
        "feature_input_hook": PEER_NAME_OF[config.reads],
        "feature_output_hook": PEER_NAME_OF[config.writes],
        "scan": config.model,
    }


def _open_clt_layers(folder: Path, numbers: Iterable[int]) -> Iterator[StoredLayer]:
    for number in numbers:
        files = tuple(open_file(folder / f"{name}_{number}.safetensors") for name in ("W_enc", "W_dec"))
        yield StoredLayer(number, files, CLT)


def _open_layers(folder: Path, numbers: Iterable[int], settings: tuple[str, ...] = ()) -> Iterator[StoredLayer]:
    for number in numbers:
        file = open_file(folder / f"layer_{number}.safetensors")
        yield StoredLayer(number, (file,), PER_LAYER, settings=settings)


def _find_layer_numbers(folder: Path) -> range:
    """All layers up to the last one that has a file."""
    names = [re.fullmatch(r"layer_(\d+)\.safetensors", path.name) for path in folder.iterdir()]
    numbers = [int(name[1]) for name in names if name]
    if not numbers:
        raise UserError(f"{folder}: no layer_0.safetensors found, expected one file a layer")
    return range(max(numbers) + 1)


def _open_listed_files(folder: Path, paths: Any, where: Path) -> Iterator[StoredLayer]:
    """The files that a `config.yaml` lists, one for each layer."""
    for number, path in enumerate(paths if isinstance(paths, list) else [paths]):
        if not isinstance(path, str):
            raise UserError(f"{where}: transcoders lists {short(path)}, expected the path of a file")
        if "://" in path:
            raise UserError(f"{where}: transcoders lists '{path}', expected files on this machine: download it first")
        yield StoredLayer(number, (open_file(folder / path),), PER_LAYER, settings=("k",))


def _read_settings(folder: Path) -> tuple[dict[str, Any], Path]:
    path = folder / "config.yaml"
    if os.path.lexists(path):
        return read_yaml(path), path
    path = folder / "config.json"
    return (read_json(path) if os.path.lexists(path) else {}), path


def _read_jclt_config(path: Path) -> CoderConfig:
    raw = read_json(path)
    if raw.get("version") != VERSION:
        raise UserError(
            f"{path}: version {short(raw.get('version'))}, expected {VERSION}, the one that this jclt reads"
        )
    settings, expected, values = raw.get("coder"), get_type_hints(CoderConfig), {}
    if not isinstance(settings, dict):
        raise UserError(f"{path}: 'coder' is missing, expected the coder's settings")
    for name, value in ({"layers": None, "width": None} | settings).items():
        if name not in expected:
            raise UserError(f"{path}: setting 'coder.{name}' is unknown; {suggest_name(name, expected)}")
        values[name] = MISFIT if is_too_large(value) else convert_type(value, expected[name])
        if values[name] is MISFIT or (value is None and name in ("layers", "width")):
            wanted = describe_type(expected[name]).removesuffix(" or none")
            raise UserError(f"{path}: setting 'coder.{name}' is {short(value)}, expected {wanted}")
    config = CoderConfig(**values)
    if not config.covered or list(config.covered) != sorted(set(config.covered)) or config.covered[0] < 0:
        raise UserError(f"{path}: setting 'coder.layers' is {short(settings['layers'])}, expected layers in order")
    if raw.get("rule") != config.rule or config.activation == "batchtopk":
        raise UserError(
            f"{path}: rule {short(raw.get('rule'))} under activation '{config.activation}', expected the same"
        )
    return config
