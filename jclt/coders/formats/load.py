"""Loading and saving coders: in jclt's layout, which circuit-tracer loads too, and in the layouts that others publish.

How to add a coder format, say "mylab" (`gemma_scope.py` is a short example, a test in
tests/coders/test_add_a_coder_format.py follows these steps):

1. In a new file of this folder, list in a `Names` table each of our weights with its published name and axes.
2. `is_mylab(folder)` tells by file names whether a folder has this format.
3. `read_mylab(folder)` opens the files and makes one `StoredLayer` for each layer (views: no weight is read yet).
   It returns `describe_coder(layers, kind=..., reads=..., writes=...)`, which takes sizes from the tensors.
4. `write_mylab(coder, dtype)` refuses what the format cannot express (`check_writable`). Then it yields the name and
   the content of each file: tensors (`to_published`), or settings for JSON and YAML.
5. Add `"mylab": Layout(is_mylab, read_mylab, write_mylab)` to `LAYOUTS`, before layouts that would claim its folders.
6. Add its cases to `ELSEWHERE` and `FAULTS` in tests/coders/test_coder_formats.py.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jclt.coders.coder import SparseCoder
from jclt.coders.config import CoderConfig
from jclt.coders.formats import circuit_tracer, gemma_scope, saelens
from jclt.coders.formats.names import parse_site
from jclt.coders.formats.tensors import DTYPES, StoredCoder, declare_stored, load_weights, write_tensors
from jclt.coders.model_fit import check_fit
from jclt.coders.neurons import Neurons, load_neurons
from jclt.coders.streamed import StreamedCoder, load_on_host
from jclt.errors import UserError, first_line, suggest_name
from jclt.files import create_folder, write_json
from jclt.memory import check_memory, format_size, measure_free_host_memory, measure_free_memory
from jclt.models import Model
from jclt.models.weights import count_local_bytes

log = logging.getLogger(__name__)


class Layout(NamedTuple):
    """The functions of one coder format."""

    is_in: Callable[[Path], bool]
    read: Callable[[Path], StoredCoder]
    write: Callable[[SparseCoder, str], Iterator[tuple[str, Mapping[str, Any]]]]
    """Yields the name and the content of each file: tensors, or settings for JSON. Its second argument is the type in
    which tensors are stored."""
    dtypes: tuple[str, ...] = DTYPES


LAYOUTS: dict[str, Layout] = {
    "jclt": Layout(circuit_tracer.is_jclt_folder, circuit_tracer.read_jclt, circuit_tracer.write_jclt),
    "circuit-tracer": Layout(
        circuit_tracer.is_circuit_tracer_folder, circuit_tracer.read_circuit_tracer, circuit_tracer.write_circuit_tracer
    ),
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
"""A folder has the first of these layouts whose `is_in` is true."""


SHIPPED = {"demo": "coder", "demo-transcoders": "transcoders"}
"""The coders of the shipped model: a CLT, and a transcoder of each layer; with their folders in jclt/world."""

PLACES = ("device", "host", "disk")
"""Where a coder's weights may be kept: in a device's memory, in the host's, or in its files."""

COMFORTABLE_SHARE = 0.5
"""The share of free memory that a coder may take where nobody has said where to keep it."""


@overload
def load_coder(
    name: Literal["neurons"],
    *,
    keep: str | Mesh | None = None,
    model: Model | None = None,
    dtype: str | None = None,
    reads: str | None = None,
    writes: str | None = None,
    check: bool = True,
) -> Neurons: ...


@overload
def load_coder(
    name: str | Path,
    *,
    keep: Literal["device"] | Mesh,
    model: Model | None = None,
    dtype: str | None = None,
    reads: str | None = None,
    writes: str | None = None,
    check: bool = True,
) -> SparseCoder: ...


@overload
def load_coder(
    name: str | Path,
    *,
    keep: str | Mesh | None = None,
    model: Model | None = None,
    dtype: str | None = None,
    reads: str | None = None,
    writes: str | None = None,
    check: bool = True,
) -> SparseCoder | StreamedCoder | Neurons: ...


def load_coder(
    name: str | Path,
    *,
    keep: str | Mesh | None = None,
    model: Model | None = None,
    dtype: str | None = None,
    reads: str | None = None,
    writes: str | None = None,
    check: bool = True,
) -> SparseCoder | StreamedCoder | Neurons:
    """Loads one of `SHIPPED`, a folder in any of `LAYOUTS`, or the coder of a training run's folder; "neurons" are
    those of the `model`, with its own weights.

    `keep` says where the weights are kept. On a mesh each device has its shard of every weight. Those of a coder that
    is kept on the "host" or on "disk" are on the device while they are used; only graphs can be made with it. By
    default it is the first of "device", "host" and "disk" that has room.

    `dtype` is the type of the weights, by default the stored one. With `model` the coder must fit it: in layers, width
    and sites, and, unless `check=False`, by its reconstruction of a short text (`check_fit`). `reads` and `writes` give
    the sites where the files do not name them, or name wrong ones.
    """
    if name == "neurons":
        return load_neurons(model, keep=None if keep == "device" else keep, dtype=dtype, reads=reads, writes=writes)
    if dtype not in (None, *DTYPES):
        raise UserError(f"dtype '{dtype}': expected one of: {', '.join(DTYPES)}")
    mesh = keep if isinstance(keep, Mesh) else None
    if mesh is None and keep not in (None, *PLACES):
        raise UserError(f"keep '{keep}': expected one of: {', '.join(PLACES)}, or a mesh")
    folder, (config, layers) = _read_folder(name)
    stored = StoredCoder(_complete_config(config, reads, writes, model, folder), layers)
    declared = declare_stored(stored, None if dtype is None else jnp.dtype(dtype), mesh)
    size = count_local_bytes(jax.tree.leaves(declared))
    place = _choose_place(size, folder) if keep is None else keep
    if place == "disk":
        coder = StreamedCoder(declared, layers, "disk")
    elif place == "host" and jax.default_backend() != "cpu":
        remedy = "dtype='bfloat16' takes half of float32, keep='disk' takes none"
        check_memory(size, f"coder {folder}", remedy, host=True)
        coder = load_on_host(declared, layers)
    else:
        remedy = "dtype='bfloat16' takes half of float32, a mesh spreads it, keep='disk' takes none"
        check_memory(size, f"coder {folder}", remedy)
        coder = load_weights(stored, declared)
    if model is not None and check:
        check_fit(coder, model, str(name))
    return coder


def _choose_place(size: int, folder: Path) -> str:
    on_device, on_host = measure_free_memory(), measure_free_host_memory()
    places = [("device", on_device)]
    if jax.default_backend() != "cpu":
        places.append(("host", on_host))
    place = next((place for place, free in places if free is None or size <= COMFORTABLE_SHARE * free), "disk")
    rooms = ", ".join(f"{'?' if free is None else format_size(free)} free on the {place}" for place, free in places)
    level = logging.DEBUG if place == "device" else logging.INFO
    log.log(level, "coder %s: its %s of weights are kept on %s (%s)", folder, format_size(size), place, rooms)
    return place


def coder_model(name: str | Path) -> str:
    """The name of the model that a coder was trained on; empty if its files do not name it. No weight is read."""
    return _read_folder(name)[1].config.model


def _read_folder(name: str | Path) -> tuple[Path, StoredCoder]:
    """The folder of a coder, and the coder in it with its weights still on disk."""
    folder = find_coder(str(name))
    layout = next((layout for layout in LAYOUTS.values() if layout.is_in(folder)), None)
    if layout is None:
        raise UserError(f"coder '{name}': no coder's files found, expected one of the layouts {', '.join(LAYOUTS)}")
    return folder, layout.read(folder)


def find_coder(name: str) -> Path:
    """The folder that holds the coder of this name: in the folder of a training run, its `coder`."""
    if name in SHIPPED:
        folder = Path(str(resources.files("jclt"))) / "world" / SHIPPED[name]
        if not folder.is_dir():
            raise UserError(f"coder '{name}': this installation ships none, expected it in jclt/world/{folder.name}")
        return folder
    try:
        folder = Path(name).expanduser()
        is_folder = folder.is_dir()
    except (OSError, RuntimeError) as error:
        raise UserError(f"coder '{name}': cannot be read ({first_line(error)})") from None
    if not is_folder:
        problem = "is a file" if os.path.lexists(folder) else "no such folder"
        raise UserError(
            f"coder '{name}': {problem}, expected 'demo', 'demo-transcoders', 'neurons' or the folder that holds the "
            "coder's files"
        )
    inner = folder / "coder"
    return inner if circuit_tracer.is_jclt_folder(inner) and not circuit_tracer.is_jclt_folder(folder) else folder


def _complete_config(
    config: CoderConfig, reads: str | None, writes: str | None, model: Model | None, folder: Path
) -> CoderConfig:
    """The settings with the sites that the caller gave, checked by themselves and against the model."""
    sites = [parse_site(site, "coder")[0] if site else None for site in (reads, writes)]
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
        return config.fit_to_model(model.config, model.name)
    except UserError as error:
        other = f"was trained on model '{config.model}', not on '{model.name}': "
        reason = other if config.model not in ("", model.name) else ""
        raise UserError(f"{folder}: {reason}{error}") from None


def save_coder(coder: SparseCoder, folder: str | Path, layout: str = "jclt", dtype: str = "float32") -> None:
    """Writes the coder in one of `LAYOUTS`. "jclt" keeps all of it; the others refuse what they cannot express."""
    if layout not in LAYOUTS:
        raise UserError(f"layout '{layout}' is unknown; {suggest_name(layout, LAYOUTS)}")
    if dtype not in LAYOUTS[layout].dtypes:
        raise UserError(f"dtype '{dtype}': expected one of: {', '.join(LAYOUTS[layout].dtypes)} in layout {layout}")
    if coder.config.activation == "batchtopk":
        raise UserError("activation 'batchtopk': a rule of training, expected the coder with its rule at inference")
    files = LAYOUTS[layout].write(coder, dtype)
    if jax.process_index() > 0:  # the first process writes; the others take part in gathering each layer
        for _ in files:
            pass
        return
    with create_folder(Path(folder)) as new:
        for name, content in files:
            path = new / name
            path.parent.mkdir(exist_ok=True)
            if path.suffix in (".json", ".yaml"):  # JSON is YAML
                write_json(path, content)
            else:
                write_tensors(path, content, jnp.dtype(dtype))
        _check_reread(coder.config, LAYOUTS[layout].read(new).config, layout)


def _check_reread(config: CoderConfig, read: CoderConfig, layout: str) -> None:
    """Refuses to save files from which another coder would be read."""
    for field in ("kind", "features", "activation", "k", "reads", "writes", "skip", "layers", "width"):
        want, got = getattr(config, field), getattr(read, field)
        if want != got:
            raise UserError(f"layout {layout}: cannot say {field}={want!r}, it would be read as {got!r}")
