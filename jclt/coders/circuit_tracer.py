"""Our own folders, and circuit-tracer's: theirs with a `config.json` beside that says all of a coder.

A cross-layer transcoder is `W_enc_{i}.safetensors` and `W_dec_{i}.safetensors`, any other coder
`layer_{i}.safetensors`; `config.yaml` is what circuit-tracer reads of the rest.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_type_hints

from jclt.coders.coder import SparseCoder
from jclt.coders.config import CoderConfig
from jclt.coders.layouts import PEER_NAME_OF, our_site, their_name
from jclt.coders.tensors import Found, LayerSource, Names, found, open_file, published, weights
from jclt.config import MISFIT, describe_type, fit_type
from jclt.errors import UserError, nearest
from jclt.files import read_json

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


def is_ours(folder: Path) -> bool:
    path = folder / "config.json"
    return path.exists() and read_json(path).get("format") == FORMAT


def is_theirs(folder: Path) -> bool:
    return any(any(folder.glob(name)) for name in ("config.yaml", "W_enc_*.safetensors", "layer_*.safetensors"))


def read_ours(folder: Path) -> Found:
    config = _own_config(folder / "config.json")
    layers = _clt_layers if config.kind == "clt" else _per_layer
    return Found(config, list(layers(folder, config.covered)))


def read_theirs(folder: Path) -> Found:
    said, where = _read_settings(folder)
    clt = any(folder.glob("W_enc_*.safetensors"))
    if said.get("model_kind", MODEL_KINDS[clt]) != MODEL_KINDS[clt]:
        raise UserError(f"{where}: model_kind '{said['model_kind']}', but the files are a {MODEL_KINDS[clt]}'s")
    reads, writes = (
        our_site(str(said[key]), where)[0] if key in said else ""
        for key in ("feature_input_hook", "feature_output_hook")
    )
    known = {"kind": "clt" if clt else "sae" if reads == writes else "transcoder", "reads": reads, "writes": writes}
    known |= {"model": str(said.get("model_name", ""))}
    known |= {"activation": "topk", "k": said.get("k")} if said.get("activation") == "topk" else {}
    if clt:
        first = next(_clt_layers(folder, [0]))
        return found(_clt_layers(folder, range(first["decoder"].array.shape[1])), **known)
    listed = said.get("transcoders")
    return found(_listed(folder, listed, where) if listed else _per_layer(folder, _all_numbers(folder)), **known)


def write_ours(coder: SparseCoder, dtype: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield from _write(coder)
    whole = {"format": FORMAT, "version": VERSION, "rule": coder.config.rule, "dtype": dtype}
    yield "config.json", whole | {"coder": asdict(coder.config)}


def write_theirs(coder: SparseCoder, dtype: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    config = coder.config
    for site in (config.reads, config.writes):
        their_name(site, PEER_NAME_OF, "circuit-tracer")
    if config.covered != tuple(range(len(config.covered))):
        raise UserError(f"layout circuit-tracer: expected all layers from 0 on, got layers={config.covered}")
    if config.kind == "clt" and config.skip:
        raise UserError("layout circuit-tracer: has no place for a cross-layer transcoder's skip, expected layout jclt")
    yield from _write(coder)


def _write(coder: SparseCoder) -> Iterator[tuple[str, Mapping[str, Any]]]:
    config = coder.config
    for number, layer in zip(config.covered, coder.layers, strict=True):
        arrays = weights(layer)
        if config.kind == "clt":
            yield f"W_dec_{number}.safetensors", published({"decoder": arrays.pop("decoder")}, CLT, number)
            yield f"W_enc_{number}.safetensors", published(arrays, CLT, number)
        else:
            yield f"layer_{number}.safetensors", published(arrays, PER_LAYER)
    settings = {
        "model_kind": MODEL_KINDS[config.kind == "clt"],
        "model_name": config.model,
        "feature_input_hook": PEER_NAME_OF.get(config.reads, config.reads),
        "feature_output_hook": PEER_NAME_OF.get(config.writes, config.writes),
        "scan": config.model,
    }
    yield "config.yaml", settings | ({"activation": "topk", "k": config.k} if config.rule == "topk" else {})


def _clt_layers(folder: Path, numbers: Iterable[int]) -> Iterator[LayerSource]:
    for number in numbers:
        files = tuple(open_file(folder / f"{name}_{number}.safetensors") for name in ("W_enc", "W_dec"))
        yield LayerSource(number, files, CLT)


def _per_layer(folder: Path, numbers: Iterable[int]) -> Iterator[LayerSource]:
    for number in numbers:
        yield LayerSource(number, (open_file(folder / f"layer_{number}.safetensors"),), PER_LAYER)


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
        if "://" in str(path):
            raise UserError(f"{where}: transcoders lists '{path}', expected files on this machine: download it first")
        yield LayerSource(number, (open_file(folder / str(path)),), PER_LAYER)


def _read_settings(folder: Path) -> tuple[dict[str, Any], Path]:
    path = folder / "config.yaml"
    if not path.exists():
        path = folder / "config.json"
        return (read_json(path) if path.exists() else {}), path
    import yaml  # imported where it is needed: our own folders do not wait for it

    try:
        said = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(said, dict):
        raise UserError(f"{path}: expected `name: value` lines")
    return said, path


def _own_config(path: Path) -> CoderConfig:
    raw = read_json(path)
    if raw.get("version") != VERSION:
        raise UserError(f"{path}: version {raw.get('version')}, expected {VERSION}, the one that this jclt reads")
    said, expected, values = raw.get("coder"), get_type_hints(CoderConfig), {}
    if not isinstance(said, dict):
        raise UserError(f"{path}: 'coder' is missing, expected the coder's settings")
    for name, value in ({"layers": None, "width": None} | said).items():
        if name not in expected:
            raise UserError(f"{path}: setting 'coder.{name}' is unknown; {nearest(name, expected)}")
        values[name] = fit_type(value, expected[name])
        if values[name] is MISFIT or (value is None and name in ("layers", "width")):
            wanted = describe_type(expected[name]).removesuffix(" or none")
            raise UserError(f"{path}: setting 'coder.{name}' is {value!r}, expected {wanted}")
    config = CoderConfig(**values)
    if not config.covered or list(config.covered) != sorted(set(config.covered)):
        raise UserError(f"{path}: setting 'coder.layers' is {said['layers']}, expected layers in order")
    if raw.get("rule") != config.rule or config.activation == "batchtopk":
        raise UserError(f"{path}: rule '{raw.get('rule')}' under activation '{config.activation}', expected the same")
    return config
