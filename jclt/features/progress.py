"""The folder of described features while it is written: settings first, counts from time to time, layers whole."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from jclt.array_files import NpzFile, write_tensors
from jclt.coders import Coder, read_fingerprint
from jclt.errors import UserError
from jclt.features.columns import (
    COLUMNS,
    FORMAT,
    SETTINGS,
    UNFINISHED,
    UNFINISHED_SETTINGS,
    VERSION,
    VOCABULARY,
    Sizes,
    find_layout,
)
from jclt.features.rows import BLOCK_TOKENS, DataRows, count_tokens
from jclt.features.tally import Tally
from jclt.files import check_new_folder, create_folder, read_json, write_json
from jclt.models import Model
from jclt.models.model import on_mesh

Settings = dict[str, Any]


def describe_settings(model: Model, coder: Coder, data: DataRows, sizes: Sizes, share: float | None) -> Settings:
    """All that the files depend on. Weights and data are named by fingerprint."""
    config = coder.config
    with on_mesh(model):
        coder_fingerprint = read_fingerprint(coder)
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": {"name": model.name, "fingerprint": model.fingerprint},
        "coder": {
            "name": f"{config.kind} of {config.model or model.name}",
            "fingerprint": coder_fingerprint,
            **{name: getattr(config, name) for name in ("kind", "reads", "writes", "first_position")},
        },
        "data": {"name": data.name, "fingerprint": data.digest, "rows": len(data.numbers), "of_rows": len(data.tokens)},
        "layers": list(config.covered),
        "reach": [config.reach(index) for index in range(len(config.covered))],
        "features": config.features,
        "vocabulary": model.config.vocabulary,
        "length": data.length,
        "tokens": count_tokens(data, config.first_position),
        "fires_above_share": share,
        "block_tokens": BLOCK_TOKENS,
        "sizes": asdict(sizes),
    }


def open_folder(folder: Path, settings: Settings) -> bool:
    """Whether anything is left to do in the folder. One that was begun with anything else is refused."""
    for name in (SETTINGS, UNFINISHED_SETTINGS):
        if (folder / name).exists():
            _check_same(folder, read_json(folder / name), settings)
            return name == UNFINISHED_SETTINGS
    check_new_folder(folder)
    write_json(folder / UNFINISHED_SETTINGS, settings)
    return True


def _check_same(folder: Path, before: Mapping[str, Any], settings: Settings) -> None:
    """Names may differ, since a model or data can have moved."""
    old, new = _flatten(before), _flatten(settings)
    for name, now in new.items():
        if not name.endswith(" name") and old.get(name) != now:
            shown = f"{old.get(name)}, now {now}"
            raise UserError(f"{folder}: was begun with another {name} ({shown}), expected the same or a new folder")


def _flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= {f"{name} {key}": x for key, x in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def save_tallies(folder: Path, blocks: int, layers: Sequence[int], tallies: Sequence[Tally]) -> None:
    """Saves what the first blocks have given, and removes what was saved before."""
    saved = _list_saved(folder)
    if blocks in saved:
        return
    with create_folder(folder / UNFINISHED / str(blocks)) as partial:
        for layer, tally in zip(layers, tallies, strict=True):
            write_tensors(partial / f"{layer}.npz", tally)
    for number in saved:
        shutil.rmtree(folder / UNFINISHED / str(number), ignore_errors=True)


def _list_saved(folder: Path) -> list[int]:
    unfinished = folder / UNFINISHED
    return sorted(int(x.name) for x in unfinished.iterdir() if x.name.isdigit()) if unfinished.is_dir() else []


def read_saved(folder: Path, layers: Sequence[int]) -> tuple[int, list[Tally]] | None:
    """The number of blocks that are counted, and their counts, if any were saved."""
    saved = _list_saved(folder)
    if not saved:
        return None
    tallies = []
    for layer in layers:
        file = NpzFile(folder / UNFINISHED / str(saved[-1]) / f"{layer}.npz", "counts saved by `jclt features`")
        tallies.append({name: np.array(file.read_tensor(name)) for name in file.header})
    return saved[-1], tallies


def write_layer(folder: Path, layer: int, columns: Mapping[str, np.ndarray], settings: Settings) -> None:
    """The folder of one layer."""
    index = settings["layers"].index(layer)
    with create_folder(folder / str(layer)) as partial:
        for name, column in COLUMNS.items():
            dtype, shape = find_layout(column, Sizes(**settings["sizes"]), settings, index)
            assert columns[name].shape == shape, (name, columns[name].shape, shape)
            np.save(partial / f"{name}.npy", columns[name].astype(dtype, copy=False))


def finish_folder(folder: Path, model: Model, settings: Settings) -> None:
    """Settings get their final name last, so that a folder that has it is complete."""
    texts = [] if model.tokenizer is None else [model.tokenizer.text(i) for i in range(model.config.vocabulary)]
    write_json(folder / VOCABULARY, {"tokens": texts})
    write_json(folder / SETTINGS, settings)
    (folder / UNFINISHED_SETTINGS).unlink(missing_ok=True)
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
