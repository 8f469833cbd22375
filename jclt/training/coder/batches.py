"""The batch of each step: tokens, or activations that are stored once for several epochs."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jclt.data.activation_store import ActivationStore, create_store
from jclt.data.batches import choose_batch_rows, place_rows
from jclt.data.token_rows import TokenRows
from jclt.mesh import make_sharding
from jclt.models import Model, ModelConfig
from jclt.shapes import Array, Params, Tokens
from jclt.training.coder.harvest import Harvest, harvest
from jclt.training.config import TrainConfig

log = logging.getLogger(__name__)
ReadBatch = Callable[[int], Any]
"""A function from a batch's number to its arrays. Each process reads the rows of its own devices."""


def make_token_reader(config: TrainConfig, model: Model, rows: TokenRows, count: int) -> ReadBatch:
    """Batches of tokens, of the first `count` rows."""
    assert model.mesh is not None
    placement = make_sharding(model.mesh, (config.batch, config.length), ("batch", None))
    return lambda number: place_rows(
        lambda index: rows.read(index)[0], choose_batch_rows(count, config.seed, number, config.batch), placement
    )


def make_store_reader(config: TrainConfig, model: Model, rows: TokenRows, count: int) -> ReadBatch:
    """Batches of activations of the first `count` rows. Activations that the store lacks are harvested now."""
    assert config.store is not None and model.mesh is not None
    c = config.coder
    count = min(count, config.store_rows) // config.batch * config.batch
    description = {
        "model": config.model,
        "model_weights": c.model_fingerprint,
        "data": rows.digest,
        "reads": c.reads,
        "writes": c.writes,
        "layers": list(c.covered),
        "first_position": c.first_position,
    }
    shape = (len(c.covered), config.length, c.size)
    store = create_store(config.store, description, count, shape, config.compute)
    fill_store(config, model, rows, store)
    placement = make_sharding(model.mesh, (config.batch, *shape), ("batch", None, None, None))
    return lambda number: Harvest(
        *place_rows(store.read, choose_batch_rows(count, config.seed, number, config.batch), placement)
    )


def fill_store(config: TrainConfig, model: Model, rows: TokenRows, store: ActivationStore) -> None:
    """Harvests the rows that the store lacks, in order. Each process writes the rows of its own devices."""
    assert model.mesh is not None
    placement = make_sharding(model.mesh, (config.batch, config.length), ("batch", None))
    start = store.count_written() // config.batch * config.batch
    if start == len(store):
        return
    log.info("harvesting activations into %s, from row %d of %d", store.path, start, len(store))
    harvest_rows = jax.jit(partial(_harvest_by_row, config, model.config))
    for first in tqdm(range(start, len(store), config.batch), unit="batch", disable=jax.process_index() > 0):
        tokens = place_rows(lambda index: rows.read(index)[0], np.arange(first, first + config.batch), placement)
        rows_first = harvest_rows(model.params, tokens)
        shards = zip(rows_first.reads.addressable_shards, rows_first.writes.addressable_shards, strict=True)
        for reads, writes in shards:
            if reads.replica_id == 0:
                store.write(first + (reads.index[0].start or 0), reads.data, writes.data)


def _harvest_by_row(config: TrainConfig, model: ModelConfig, params: Params, tokens: Tokens) -> Harvest:
    """Activations with the axis of rows first, as in the store."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), harvest(model, config.coder, params, tokens))


def harvest_batch(config: TrainConfig, model: ModelConfig, params: Params, batch: Array | Harvest) -> Harvest:
    """The activations of a batch of tokens or of stored activations."""
    if isinstance(batch, Harvest):
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), batch)
    return harvest(model, config.coder, params, batch)
