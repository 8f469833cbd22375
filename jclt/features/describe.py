"""One pass over data, and one over the weights: the files of `columns.py` for every feature of a coder.

The data are cut into blocks of rows. While the device lists where features fire in the next block, threads of the host
count what the last one has, a layer at a time. The counts are saved from time to time; a pass that was interrupted goes
on from there, and ends in the same bytes. Then each layer's folder is written whole.
"""

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
from tqdm import tqdm

from jclt.coders import Coder
from jclt.data.prefetch import map_ahead
from jclt.errors import UserError
from jclt.features.block_events import BlockLister, choose_share
from jclt.features.columns import Sizes
from jclt.features.progress import (
    describe_settings,
    finish_folder,
    open_folder,
    read_saved,
    save_tallies,
    write_layer,
)
from jclt.features.records import Features, load_features
from jclt.features.rows import Data, DataRows, count_block_rows, find_rows, iterate_blocks
from jclt.features.tally import Tally, add_events, finish_tally, make_tally
from jclt.features.weights import describe_weights
from jclt.models import Model

SAVE_SECONDS = 300.0


def describe_features(
    model: Model,
    coder: Coder,
    data: Data = "world",
    *,
    out: str | Path,
    rows: int | None = None,
    length: int | None = None,
    sizes: Sizes | None = None,
    share: float | None = None,
    save_seconds: float = SAVE_SECONDS,
) -> Features:
    """Describes every feature of a coder, in files in the folder `out`.

    `data` is "world" for the small world, a folder of `jclt tokenize`, a text, or token ids `[N, T]`. Of a folder or
    text all rows of `length` tokens are used, or `rows` of them, spread evenly. With `share` a feature fires only at
    this share of the tokens, those with its highest activations: its threshold is measured on the first tokens. By
    default it fires where its activation is above 0; for dense coders such as neurons `share` is 0.01.

    Called again with the same arguments after an interruption, it goes on. Counts are saved every `save_seconds`.
    """
    sizes, folder = sizes or Sizes(), Path(out)
    share = choose_share(coder.config, share)
    check_sizes(sizes)
    found = find_rows(model, data, rows, length)
    settings = describe_settings(model, coder, found, sizes, share)
    if not settings["tokens"]:
        raise UserError(f"data '{found.name}': no token counts, expected at least one")
    if not open_folder(folder, settings):
        return load_features(folder)
    tallies = count_blocks(model, coder, found, sizes, share, folder, save_seconds)
    layers = coder.config.covered
    for index, layer in enumerate(tqdm(layers, desc="writing layers", leave=False, mininterval=0.5)):
        if not (folder / str(layer)).exists():
            columns = finish_tally(tallies[index], sizes.neighbours, found.length)
            columns |= describe_weights(model, coder, index, sizes)
            write_layer(folder, layer, columns, settings)
    finish_folder(folder, model, settings)
    return load_features(folder)


def check_sizes(sizes: Sizes) -> None:
    for name, size in vars(sizes).items():
        if not (isinstance(size, int) and size >= (0 if name == "context" else 1)):
            raise UserError(f"sizes: {name}={size}, expected a whole number from {0 if name == 'context' else 1} on")


def count_blocks(
    model: Model,
    coder: Coder,
    data: DataRows,
    sizes: Sizes,
    share: float | None,
    folder: Path,
    save_seconds: float = SAVE_SECONDS,
) -> Sequence[Tally]:
    """The counts of all layers, over all blocks; those that the folder has already are not counted again."""
    layers, vocabulary = coder.config.covered, model.config.vocabulary
    first, size = coder.config.first_position, count_block_rows(data.length)
    lister = BlockLister(model, coder, data.length, min(size, len(data.numbers)))
    saved = read_saved(folder, layers)
    if saved is None:
        head = next(iterate_blocks(data, first))
        saved = 0, [make_tally(x, sizes, vocabulary) for x in lister.measure_thresholds(head, share)]
    start, tallies = saved
    lister.thresholds = [jnp.asarray(tally["threshold"]) for tally in tallies]
    blocks, done, last = -(-len(data.numbers) // size), start, time.monotonic()
    with (
        tqdm(total=len(data.numbers) * data.length, unit="token", unit_scale=True, mininterval=0.5, leave=False) as bar,
        ThreadPoolExecutor(min(len(layers), os.cpu_count() or 1)) as threads,
        map_ahead(lister.list_events, iterate_blocks(data, first, start), workers=1, depth=2) as results,
    ):
        bar.update(min(start * size, len(data.numbers)) * data.length)
        for block, events in results:
            list(
                threads.map(
                    lambda tally, of_layer, b=block: add_events(tally, of_layer, b, vocabulary), tallies, events
                )
            )
            done += 1
            bar.update(block.tokens.size)
            if done == blocks or time.monotonic() - last >= save_seconds:
                save_tallies(folder, done, layers, tallies)
                last = time.monotonic()
    return tallies
