"""What a coder's steps read, as a function of the step's number: tokens, or activations stored once for many epochs."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jclt.data.activation_store import ActivationStore, create_store
from jclt.data.batches import batch_rows, place
from jclt.data.token_rows import TokenRows
from jclt.mesh import sharding
from jclt.models import Model, ModelConfig
from jclt.shapes import Array, Params, Tokens
from jclt.training.coder.harvest import Harvest, harvest
from jclt.training.config import TrainConfig

log = logging.getLogger(__name__)
Source = Callable[[int], Any]
"""From a step's number to the arrays of its batch, each process having read its own rows of them."""


def token_source(config: TrainConfig, model: Model, rows: TokenRows, count: int) -> Source:
    """Token rows, of the first `count`."""
    assert model.mesh is not None
    placement = sharding(model.mesh, (config.batch, config.length), ("batch", None))
    return lambda number: place(
        lambda index: rows.read(index)[0], batch_rows(count, config.seed, number, config.batch), placement
    )


def stored_source(config: TrainConfig, model: Model, rows: TokenRows, count: int) -> Source:
    """Activations of the first `count` rows, harvested now where the store does not hold them yet."""
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
    }
    shape = (len(c.covered), config.length, c.size)
    store = create_store(config.store, description, count, shape, config.compute)
    fill(config, model, rows, store)
    placement = sharding(model.mesh, (config.batch, *shape), ("batch", None, None, None))
    return lambda number: Harvest(*place(store.read, batch_rows(count, config.seed, number, config.batch), placement))


def fill(config: TrainConfig, model: Model, rows: TokenRows, store: ActivationStore) -> None:
    """Harvests the rows that the store lacks, in their own order; each process writes what its devices hold."""
    assert model.mesh is not None
    placement = sharding(model.mesh, (config.batch, config.length), ("batch", None))
    start = store.finished // config.batch * config.batch
    if start == len(store):
        return
    log.info("harvesting activations into %s, from row %d of %d", store.path, start, len(store))
    harvested = jax.jit(partial(_by_row, config, model.config))
    for first in tqdm(range(start, len(store), config.batch), unit="batch", disable=jax.process_index() > 0):
        tokens = place(lambda index: rows.read(index)[0], np.arange(first, first + config.batch), placement)
        found = harvested(model.params, tokens)
        for reads, writes in zip(found.reads.addressable_shards, found.writes.addressable_shards, strict=True):
            if reads.replica_id == 0:
                store.write(first + (reads.index[0].start or 0), reads.data, writes.data)


def _by_row(config: TrainConfig, model: ModelConfig, params: Params, tokens: Tokens) -> Harvest:
    """The rows first, as a store has them."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), harvest(model, config.coder, params, tokens))


def activations(config: TrainConfig, model: ModelConfig, params: Params, batch: Array | Harvest) -> Harvest:
    """Of a source's batch, whichever it is."""
    if isinstance(batch, Harvest):
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), batch)
    return harvest(model, config.coder, params, batch)
