"""What a run needs before its first step: settings that fit the model, rows, first weights."""

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jclt.coders import CoderConfig, SparseCoder
from jclt.data.token_rows import HELD_OUT, TokenRows
from jclt.errors import UserError
from jclt.memory import check_memory, free_memory
from jclt.mesh import placed
from jclt.models import Model, ModelConfig
from jclt.models.sites import LAYER_SITES
from jclt.training.coder.abstract import abstract_state
from jclt.training.coder.forms import with_thresholds
from jclt.training.coder.harvest import Harvest, Scaling, as_tokens, measure_scaling, silent_layers
from jclt.training.coder.initial import calibrated_bias, first_density, initial_weights
from jclt.training.coder.sparse import reason_against
from jclt.training.coder.state import CoderState, fresh_state
from jclt.training.config import TrainConfig
from jclt.training.run_folder import Place, check_settings
from jclt.training.run_rows import find_rows, rows_begun_with, world_rows

log = logging.getLogger(__name__)


SCALING_BATCHES = 8


WORLD_ROWS = 32_768
"""Rows of the small world that are generated at most; beyond that they come again in another order."""


def fitted(config: TrainConfig, model: ModelConfig, mesh: Mesh, fingerprint: str = "") -> TrainConfig:
    """The configuration with what follows from the model filled in, or one line on what cannot work."""
    config = replace(config, coder=config.coder.fitted(model, config.model, fingerprint))
    check_settings(config, model.context, mesh)
    check_coder_sites(config.coder)
    if config.coder.kind == "neurons":
        raise UserError("setting 'coder.kind': neurons are the model's own, expected clt, transcoder or sae")
    for name in ("micro_batches", "shuffle"):
        if config.length % getattr(config, name):
            raise UserError(f"setting '{name}': {getattr(config, name)}, expected a divisor of length={config.length}")
    if config.sparsity == "l0" and config.coder.activation != "jumprelu":
        raise UserError("setting 'sparsity': l0 counts gates, expected coder.activation=jumprelu")
    if config.end_to_end_steps and (config.store or config.shuffle > 1):
        raise UserError("setting 'end_to_end_steps': needs whole rows, expected store=none and shuffle=1")
    if config.store and config.store_rows < config.batch:
        raise UserError(f"setting 'store_rows': {config.store_rows}, expected at least batch={config.batch}")
    if config.path == "sparse" and (reason := reason_against(config)):
        raise UserError(f"setting 'path': sparse, expected auto or dense, since {reason}")
    if config.coder.features % mesh.shape["features"]:
        shards = mesh.shape["features"]
        raise UserError(f"setting 'coder.features': {config.coder.features}, expected a multiple of {shards} shards")
    return config


def check_coder_sites(coder: CoderConfig) -> None:
    """That both sites are vectors of the model's width, and that what is read is there before what is written."""
    order = list(LAYER_SITES)
    for name in ("reads", "writes"):
        site = getattr(coder, name)
        if site not in LAYER_SITES or not LAYER_SITES[site].startswith("B T D"):
            wide = ", ".join(own for own in order if LAYER_SITES[own].startswith("B T D"))
            raise UserError(
                f"setting 'coder.{name}': {site} is no vector of the model's width, expected one of: {wide}"
            )
    if order.index(coder.reads) > order.index(coder.writes):
        raise UserError(
            f"setting 'coder.reads': {coder.reads} comes after {coder.writes}, which the coder writes, expected a site "
            "before it"
        )


def check_state_memory(config: TrainConfig, mesh: Mesh) -> None:
    """That the training state and the gradients fit, before anything is begun; what a batch takes comes on top."""
    state = abstract_state(config, mesh)
    each = device_bytes(state) + device_bytes(state.coder)
    local = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    need = each * (len(local) if local[0].platform == "cpu" else 1)  # devices of a CPU share its memory
    free = free_memory(local[0])
    fits = "" if free is None else f"{int(free * config.coder.features / need):,} features a layer would fit"
    what = f"setting 'coder.features': {config.coder.features} of {len(config.coder.covered)} layers"
    check_memory(need, what, fits)


def device_bytes(tree: Any) -> int:
    """What lies on one device of arrays that are known by their shapes."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def init_state(config: TrainConfig, mesh: Mesh, harvested: Callable[[int], Harvest]) -> CoderState:
    """Fresh weights, with scales and encoder biases measured on the first batches."""
    c = config.coder
    scaling = measure_scaling(harvested, SCALING_BATCHES, config.normalize, (len(c.covered), c.size))
    for index in silent_layers(scaling):
        layer = c.covered[index]
        log.warning("layer %d writes one constant vector to %s: there is nothing to learn of it", layer, c.writes)
    weights = initial_weights(config, mesh)

    @jax.jit
    def calibrated(coder: SparseCoder, scaling: Scaling, found: Harvest) -> SparseCoder:
        x = as_tokens(found.reads, scaling.read_mean, scaling.read_scale, jnp.float32)
        x = placed(x, (None, "tokens", None))
        zero = jnp.zeros(())
        thresholds = [zero if own.threshold is None else own.threshold for own in with_thresholds(coder).layers]
        biases = [
            calibrated_bias(coder.preactivation(layer, x[layer]), thresholds[layer], first_density(config))
            for layer in range(len(coder.layers))
        ]
        return eqx.tree_at(lambda t: [own.encoder_bias for own in t.layers], coder, biases)

    return fresh_state(config, calibrated(weights, scaling, harvested(0)), scaling)


def run_rows(config: TrainConfig, model: Model, home: Place) -> TokenRows:
    def world() -> tuple[np.ndarray, np.ndarray]:
        assert model.tokenizer is not None
        count = rows_begun_with(home.folder) or min(config.steps * config.batch, WORLD_ROWS) + HELD_OUT
        return world_rows(model.tokenizer, count, config.length, config.seed)

    if config.data == "world" and model.tokenizer is None:
        raise UserError(f"model {model.name}: has no tokenizer, expected another setting 'data' than the small world")
    return find_rows(
        home.folder,
        config,
        model.config.vocabulary,
        model.tokenizer,
        model.config.stop_tokens[:1],
        world,
        shared=home.url is None,
        reached=home.reached,
    )
