"""Prepares a run for its first step: settings that fit the model, token rows, batches, initial weights."""

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jclt.coders import CoderConfig, SparseCoder
from jclt.data.token_rows import HELD_OUT, TokenRows, count_training_rows
from jclt.errors import UserError
from jclt.memory import check_memory, measure_free_memory
from jclt.mesh import FEATURES_AXIS, shard_by_axes
from jclt.models import Model, ModelConfig
from jclt.models.sites import LAYER_SITES
from jclt.training.coder.abstract import abstract_state
from jclt.training.coder.batches import ReadBatch, harvest_batch, make_store_reader, make_token_reader
from jclt.training.coder.forms import exponentiate_thresholds
from jclt.training.coder.harvest import Harvest, Scaling, find_silent_layers, measure_scaling, scale_tokens
from jclt.training.coder.initial import calibrate_bias, choose_initial_density, make_initial_weights
from jclt.training.coder.sparse import explain_why_not_sparse
from jclt.training.coder.state import CoderState, make_state
from jclt.training.config import TrainConfig
from jclt.training.run_folder import Place, check_settings
from jclt.training.run_rows import find_rows, generate_world_rows, read_row_count

log = logging.getLogger(__name__)


SCALING_BATCHES = 8
"""Batches on which the scales are measured."""
WORLD_ROWS = 32_768
"""The most rows of the small world that are generated. A longer run sees them again in another order."""


def complete_config(config: TrainConfig, model: ModelConfig, mesh: Mesh, fingerprint: str = "") -> TrainConfig:
    """The configuration completed with what follows from the model; an error of one line if it cannot work."""
    config = replace(config, coder=config.coder.fit_to_model(model, config.model, fingerprint))
    check_settings(config, model.context, mesh)
    check_coder_sites(config.coder)
    if config.coder.kind == "neurons":
        raise UserError("setting 'coder.kind': neurons are the model's own, expected clt, transcoder or sae")
    for name in ("micro_batches", "shuffle"):
        if config.length % getattr(config, name):
            raise UserError(f"setting '{name}': {getattr(config, name)}, expected a divisor of length={config.length}")
    if config.length < 2 * config.coder.first_position:
        raise UserError(
            f"setting 'length': {config.length}, expected at least twice coder.first_position="
            f"{config.coder.first_position}"
        )
    if config.sparsity == "l0" and config.coder.activation != "jumprelu":
        raise UserError("setting 'sparsity': l0 counts gates, expected coder.activation=jumprelu")
    if config.end_to_end_steps and (config.store or config.shuffle > 1):
        raise UserError("setting 'end_to_end_steps': needs whole rows, expected store=none and shuffle=1")
    if config.store and config.store_rows < config.batch:
        raise UserError(f"setting 'store_rows': {config.store_rows}, expected at least batch={config.batch}")
    if config.path == "sparse" and (reason := explain_why_not_sparse(config)):
        raise UserError(f"setting 'path': sparse, expected auto or dense, since {reason}")
    if config.coder.features % mesh.shape[FEATURES_AXIS]:
        shards = mesh.shape[FEATURES_AXIS]
        raise UserError(f"setting 'coder.features': {config.coder.features}, expected a multiple of {shards} shards")
    return config


def check_coder_sites(coder: CoderConfig) -> None:
    """Checks that both sites are vectors of the model's width, and that the one read does not come after the other."""
    order = list(LAYER_SITES)
    for name in ("reads", "writes"):
        site = getattr(coder, name)
        if site not in LAYER_SITES or not LAYER_SITES[site].startswith("B T D"):
            vectors = ", ".join(other for other in order if LAYER_SITES[other].startswith("B T D"))
            raise UserError(
                f"setting 'coder.{name}': {site} is no vector of the model's width, expected one of: {vectors}"
            )
    if order.index(coder.reads) > order.index(coder.writes):
        raise UserError(
            f"setting 'coder.reads': {coder.reads} comes after {coder.writes}, which the coder writes, expected a site "
            "before it"
        )


def check_state_memory(config: TrainConfig, mesh: Mesh) -> None:
    """Checks, before anything is begun, that the state and the gradients fit; a batch needs memory in addition."""
    state = abstract_state(config, mesh)
    device_bytes = count_device_bytes(state) + count_device_bytes(state.coder)
    local = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    need = device_bytes * (len(local) if local[0].platform == "cpu" else 1)  # devices of a CPU share its memory
    free = measure_free_memory(local[0])
    fits = "" if free is None else f"{int(free * config.coder.features / need):,} features a layer would fit"
    what = f"setting 'coder.features': {config.coder.features} of {len(config.coder.covered)} layers"
    check_memory(need, what, fits)


def count_device_bytes(tree: Any) -> int:
    """The bytes that these abstract arrays take on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def find_run_rows(config: TrainConfig, model: Model, place: Place) -> TokenRows:
    """The run's token rows; an error if they are too few for a batch."""

    def make_world() -> tuple[np.ndarray, np.ndarray]:
        assert model.tokenizer is not None
        count = read_row_count(place.folder) or min(config.steps * config.batch, WORLD_ROWS) + HELD_OUT
        return generate_world_rows(model.tokenizer, count, config.length, config.seed)

    if config.data == "world" and model.tokenizer is None:
        raise UserError(f"model {model.name}: has no tokenizer, expected another setting 'data' than the small world")
    end = model.config.stop_tokens[:1]
    rows = find_rows(place, config, model.config.vocabulary, model.tokenizer, end, make_world)
    count = count_training_rows(rows, config.data)
    if count < config.batch:
        least = f"expected at least batch={config.batch}"
        raise UserError(f"data '{config.data}': {max(0, count)} of {len(rows)} rows to train on, {least}")
    return rows


class TrainingData(NamedTuple):
    read_batch: ReadBatch  # from a batch's number to its tokens, or to its stored activations
    harvest: Callable[[int], Harvest]  # from a batch's number to its activations
    held_out: np.ndarray  # tokens [N, T] that are not trained on, for evaluations


def prepare_data(config: TrainConfig, model: Model, rows: TokenRows) -> TrainingData:
    """The batches of a run. With a store, this harvests the activations that the store lacks."""
    make_reader = make_store_reader if config.store else make_token_reader
    read_batch = make_reader(config, model, rows, count_training_rows(rows, config.data))
    harvest = jax.jit(partial(harvest_batch, config, model.config))
    return TrainingData(
        read_batch=read_batch,
        harvest=lambda number: harvest(model.params, read_batch(number)),
        held_out=rows.read(np.arange(len(rows) - HELD_OUT, len(rows)))[0],
    )


def init_state(config: TrainConfig, mesh: Mesh, harvest: Callable[[int], Harvest]) -> CoderState:
    """The initial state, with scales and encoder biases measured on the first batches."""
    c = config.coder
    scaling = measure_scaling(harvest, SCALING_BATCHES, config.normalize, (len(c.covered), c.size))
    for index in find_silent_layers(scaling):
        layer = c.covered[index]
        log.warning(
            "layer %d writes only zeros or one constant vector to %s: there is nothing to learn", layer, c.writes
        )
    weights = make_initial_weights(config, mesh)

    @jax.jit
    def calibrate(coder: SparseCoder, scaling: Scaling, first: Harvest) -> SparseCoder:
        x = scale_tokens(first.reads, scaling.read_mean, scaling.read_scale, jnp.float32)
        x = shard_by_axes(x, (None, "tokens", None))
        layers = exponentiate_thresholds(coder).layers
        thresholds = [jnp.zeros(()) if layer.threshold is None else layer.threshold for layer in layers]
        biases = [
            calibrate_bias(
                coder.compute_preactivation(layer, x[layer]), thresholds[layer], choose_initial_density(config)
            )
            for layer in range(len(layers))
        ]
        return eqx.tree_at(lambda c: [layer.encoder_bias for layer in c.layers], coder, biases)

    return make_state(config, calibrate(weights, scaling, harvest(0)), scaling)
