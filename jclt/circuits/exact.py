"""The exact effect of each node of a site: one pass for each, which gives it alone its value of the other run."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jclt.circuits.gradients import Setting, read_values
from jclt.circuits.passes import Prompts, measure_metric
from jclt.interventions.batches import choose_size, limit_rows
from jclt.interventions.patching.metrics import AnswerSets
from jclt.interventions.resume import KeptPass, keep_pass, make_rows_mesh, resume_pass
from jclt.models import LAYER_SITES, Place
from jclt.shapes import Array, Float, Int, Params, Tokens


def patch_nodes(
    setting: Setting, params: Params, prompts: Prompts, whole: bool, zero: bool
) -> Float[np.ndarray, "P L T U"]:
    """How the metric of each pair changes by each node. Nodes that are the same in both runs are not run."""
    mesh, results = make_rows_mesh(), []
    padded = prompts.clean.shape[1]
    for pair in range(len(prompts.last)):
        length = int(prompts.last[pair]) + 1
        clean, corrupted = (np.asarray(side)[None, pair, :length] for side in (prompts.clean, prompts.corrupted))
        answers = AnswerSets(*(np.asarray(column)[pair : pair + 1] for column in prompts.answers))
        kept, change = read_change(setting, params, clean, corrupted, zero)
        units = np.asarray(change).reshape(*change.shape[:2], -1, change.shape[-1] if whole else 1)
        layer, position, unit = np.nonzero(np.abs(units).max(axis=-1))
        effects = np.zeros((change.shape[0], padded, units.shape[2]), units.dtype)
        most = max(limit_rows(setting.model, length) * mesh.size, 2)
        size = choose_size(max(len(layer), 1) + 1, most, mesh.size)  # one row changes nothing
        for first in range(0, len(layer), size - 1):  # sorted by layer: a batch needs no layer below its first
            part = slice(first, first + size - 1)
            rows = np.stack([layer[part], position[part], unit[part]], axis=1).astype(np.int32)
            found = run_rows(setting, mesh, params, kept, units, np.resize(rows, (size - 1, 3)), answers)
            effects[layer[part], position[part], unit[part]] = np.asarray(found)[: len(rows)]
        results.append(effects)
    return np.stack(results)


@partial(jax.jit, static_argnames=("setting", "zero"))
def read_change(
    setting: Setting, params: Params, clean: Tokens, corrupted: Tokens, zero: bool
) -> tuple[KeptPass, Float[Array, "L T ..."]]:
    """The clean pass, and what the other run adds to the values of the site."""
    last = jnp.full(1, clean.shape[1] - 1, jnp.int32)
    value = read_values(setting, params, clean, last)[setting.site]
    other = jnp.zeros_like(value) if zero else read_values(setting, params, corrupted, last)[setting.site]
    kept, _ = keep_pass(setting.model, params, clean)
    return kept, (other - value)[:, 0]


@partial(jax.jit, static_argnames=("setting", "mesh"))
@jax.named_scope("patch_nodes")
def run_rows(
    setting: Setting,
    mesh: Mesh,
    params: Params,
    kept: KeptPass,
    units: Float[Array, "L T U w"],
    rows: Int[Array, "R 3"],
    answers: AnswerSets,
) -> Float[Array, "R"]:
    """How the metric changes in each row, which changes one node. It is compared with an extra row that changes
    nothing, at no position: the kept pass rounds differently, so that against it a node without effect would seem to
    have one. The embeddings' nodes are changed in the residual stream of the first layer, to which they add."""
    rows = jnp.concatenate([rows[:1].at[:, 1].set(-1), rows])
    rows = jax.lax.with_sharding_constraint(rows, NamedSharding(mesh, P("rows")))
    layers, positions, numbers = rows.T
    site = setting.site if setting.site in LAYER_SITES else "resid_pre"

    def edit(place: Place, value: Array) -> Array:
        if place.site != site:
            return value
        change = units[layers, positions, numbers]  # [R w]
        of_unit = jnp.arange(units.shape[2], dtype=jnp.int32)[None] == numbers[:, None]
        of_position = jnp.arange(value.shape[1], dtype=jnp.int32)[None] == positions[:, None]
        at = of_position & (jnp.asarray(place.layer, jnp.int32) == layers)[:, None]
        spread = of_unit[:, None, :, None] & at[:, :, None, None]
        added = jnp.where(spread, change[:, None, None], 0)
        return value + added.reshape(value.shape).astype(value.dtype)

    logits = resume_pass(setting.model, params, kept, layers.min(), 0, rows.shape[0], edit)[:, 0]
    wide = AnswerSets(*(jnp.broadcast_to(column, (len(logits), *column.shape[1:])) for column in answers))
    measured = measure_metric(setting.metric, logits, wide)
    return measured[1:] - measured[0]
