"""Coders on disk: our own folder, which circuit-tracer loads too, and the layouts that others publish."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jclt.coders.coder import SparseCoder
from jclt.coders.config import CoderConfig
from jclt.coders.formats import circuit_tracer, gemma_scope, saelens
from jclt.coders.formats.names import our_site
from jclt.coders.formats.tensors import Found, place, write_tensors
from jclt.coders.model_fit import check_fit
from jclt.errors import UserError, first_line, nearest
from jclt.files import new_folder, write_json
from jclt.models import Model

DTYPES = ("float32", "bfloat16", "float16")


class Layout(NamedTuple):
    is_in: Callable[[Path], bool]
    read: Callable[[Path], Found]
    write: Callable[[SparseCoder, str], Iterator[tuple[str, Mapping[str, Any]]]]
    """Yields each file's name and content: tensors, or what goes into a JSON file that may name their type."""
    dtypes: tuple[str, ...] = DTYPES


LAYOUTS: dict[str, Layout] = {
    "jclt": Layout(circuit_tracer.is_ours, circuit_tracer.read_ours, circuit_tracer.write_ours),
    "circuit-tracer": Layout(circuit_tracer.is_theirs, circuit_tracer.read_theirs, circuit_tracer.write_theirs),
    "saelens": Layout(saelens.is_saelens, saelens.read_saelens, saelens.write_saelens),
    "gemma-scope-2": Layout(
        gemma_scope.is_gemma_scope_2, gemma_scope.read_gemma_scope_2, gemma_scope.write_gemma_scope_2
    ),
    "gemma-scope": Layout(
        gemma_scope.is_gemma_scope,
        gemma_scope.read_gemma_scope,
        gemma_scope.write_gemma_scope,
        ("float32", "float16"),  # numpy's format has no bfloat16
    ),
}
"""In the order in which a folder is tried for them."""


def load_coder(
    name: str | Path,
    *,
    model: Model | None = None,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    reads: str | None = None,
    writes: str | None = None,
    check: bool = True,
) -> SparseCoder:
    """Loads "demo" or a folder in any of `LAYOUTS`; the folder of a training run stands for the coder in it. On a mesh
    every weight is read straight to its place there.

    With its model at hand the coder must fit it: in layers, width and sites, and, unless `check=False`, in what it
    reconstructs of a short text; one whose files name this very model may do badly, and a warning says so. `reads` and
    `writes` name the sites where the files do not, or are wrong.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype '{dtype}': expected one of: {', '.join(DTYPES)}")
    folder, (config, layers) = _found(name)
    config = _completed(config, reads, writes, model, folder)
    coder = place(config, layers, jnp.dtype(dtype), mesh)
    if model is not None and check:
        check_fit(coder, model, str(name))
    return coder


def coder_model(name: str | Path) -> str:
    """The name of the model that a coder was trained on, empty where its files do not say it; no weight is read."""
    return _found(name)[1].config.model


def _found(name: str | Path) -> tuple[Path, Found]:
    """The folder of a coder and what is in it."""
    folder = find_coder(str(name))
    layout = next((layout for layout in LAYOUTS.values() if layout.is_in(folder)), None)
    if layout is None:
        raise UserError(f"coder '{name}': no coder's files found, expected one of the layouts {', '.join(LAYOUTS)}")
    return folder, layout.read(folder)


def find_coder(name: str) -> Path:
    """The folder that holds the coder of this name; in a training run's it is `coder`."""
    if name == "demo":
        folder = Path(str(resources.files("jclt"))) / "world" / "coder"
        if not folder.is_dir():
            raise UserError("coder 'demo': this installation ships none, expected it in jclt/world/coder")
        return folder
    try:
        folder = Path(name).expanduser()
        is_folder = folder.is_dir()
    except (OSError, RuntimeError) as error:
        raise UserError(f"coder '{name}': cannot be read ({first_line(error)})") from None
    if not is_folder:
        found = "is a file" if os.path.lexists(folder) else "no such folder"
        raise UserError(f"coder '{name}': {found}, expected 'demo' or the folder that holds the coder's files")
    inner = folder / "coder"
    return inner if circuit_tracer.is_ours(inner) and not circuit_tracer.is_ours(folder) else folder


def _completed(
    config: CoderConfig, reads: str | None, writes: str | None, model: Model | None, folder: Path
) -> CoderConfig:
    """The configuration with the sites given in place of those found, checked by itself and against the model."""
    sites = [our_site(given, "coder")[0] if given else None for given in (reads, writes)]
    config = replace(config, reads=sites[0] or config.reads, writes=sites[1] or config.writes)
    if not (config.reads and config.writes):
        raise UserError(
            f"{folder}: no file in it says which sites the coder reads and writes, expected reads= and writes= "
            "(of a transcoder, mlp_in and mlp_out)"
        )
    if any(sites) and config.kind != "clt":
        config = replace(config, kind="sae" if config.reads == config.writes else "transcoder")
    try:
        config.check()
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    if model is None:
        return config
    try:
        return config.fitted(model.config, model.name)
    except UserError as error:
        other = f"was trained on model '{config.model}', not on '{model.name}': "
        said = other if config.model not in ("", model.name) else ""
        raise UserError(f"{folder}: {said}{error}") from None


def save_coder(coder: SparseCoder, folder: str | Path, layout: str = "jclt", dtype: str = "float32") -> None:
    """Writes the coder in one of `LAYOUTS`; "jclt" keeps all of it, the others refuse what they cannot say."""
    if layout not in LAYOUTS:
        raise UserError(f"layout '{layout}' is unknown; {nearest(layout, LAYOUTS)}")
    if dtype not in LAYOUTS[layout].dtypes:
        raise UserError(f"dtype '{dtype}': expected one of: {', '.join(LAYOUTS[layout].dtypes)} in layout {layout}")
    if coder.config.activation == "batchtopk":
        raise UserError("activation 'batchtopk': a rule of training, expected the coder with its rule at inference")
    files = LAYOUTS[layout].write(coder, dtype)
    if jax.process_index() > 0:  # the first process writes, a layer at a time, and the others hand it their pieces
        for _ in files:
            pass
        return
    with new_folder(Path(folder)) as beside:
        for name, content in files:
            path = beside / name
            path.parent.mkdir(exist_ok=True)
            if path.suffix in (".json", ".yaml"):  # JSON is YAML
                write_json(path, content)
            else:
                write_tensors(path, content, jnp.dtype(dtype))
        _check_sayings(coder.config, LAYOUTS[layout].read(beside).config, layout)


def _check_sayings(config: CoderConfig, read: CoderConfig, layout: str) -> None:
    """Refuses a folder out of which another coder would be read."""
    for field in ("kind", "features", "activation", "k", "reads", "writes", "skip", "layers", "width"):
        want, got = getattr(config, field), getattr(read, field)
        if want != got:
            raise UserError(f"layout {layout}: cannot say {field}={want!r}, it would be read as {got!r}")
