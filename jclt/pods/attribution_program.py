"""Whether attribution graphs can be made on a slice: their programs, compiled for one prompt a chip.

Each chip holds the whole coder and the whole model, in float32, since exactness is the point of graphs. How long a
graph takes depends on its prompt: the programs' loops run as long as there are targets, so no time is given.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jclt.attribution.edges import Targets, trace_blocks, trace_embeddings
from jclt.attribution.local import Through
from jclt.attribution.nodes import LEAST_TILE, TILE, Layout, gather_sources, groups_of, run_pass, skips_of
from jclt.attribution.sizes import (
    BLOCK,
    GRADIENT,
    IN_FLIGHT,
    blocks_of_call,
    embeddings_at_once,
    length_bucket,
    size_for,
)
from jclt.coders import abstract_coder
from jclt.models import ModelConfig, abstract_params
from jclt.pods.chips import chip_of
from jclt.training.config import TrainConfig

ACTIVE, OUTPUTS = 100, 16
"""Active features a token over all layers, as published coders have; outputs explained."""


def plan_graphs(
    config: TrainConfig, model: ModelConfig, topology: str, devices: list[Any], length: int
) -> dict[str, Any]:
    """Memory a chip of the programs for prompts of this length; `config` is fitted to the model."""
    limit, length = chip_of(topology).memory, length_bucket(length)
    mesh = jax.make_mesh((len(devices),), ("prompts",), axis_types=(AxisType.Auto,), devices=devices)

    def lying(tree: Any, *where: str) -> Any:
        spec = NamedSharding(mesh, P(*where))
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spec), tree)

    c = replace(config.coder, activation=config.coder.rule, k=config.coder.k if config.coder.rule == "topk" else None)
    coder, params = lying(abstract_coder(c)), lying(abstract_params(model))
    given = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((coder, params)))
    report = {"prompt_length": length, "given": given, "limit": limit}
    if given > limit:
        return report | {"fits": False, "total": given}

    count = len(devices)
    through = Through(model, c.reads, c.writes)
    tokens = lying(jax.ShapeDtypeStruct((count, length), jnp.int32), "prompts")
    lengths = lying(jax.ShapeDtypeStruct((count,), jnp.int32), "prompts")
    layers, groups = len(c.covered), groups_of(c)
    tile = TILE if groups == 1 else min(max(size_for(-(-ACTIVE // layers)), LEAST_TILE), TILE)
    layout = Layout(
        longest=size_for(2 * ACTIVE * length // layers, 64),
        groups=groups,
        tiles=size_for(length * -(-ACTIVE // groups // tile)),
        tile=tile,
    )
    size = min(max(16, GRADIENT["tpu"] // (count * model.width) // length), BLOCK["tpu"])
    most = blocks_of_call("tpu", length, model.width, model.layers, layout, size, 1, 4)
    of_call = min(most, size_for(-(-ACTIVE * length // size)))
    at_once = embeddings_at_once("tpu", layout.longest, layers, model.width, 1)
    passed = run_pass.lower(through, params, coder, tokens, lengths, 0)
    found = lying(jax.eval_shape(lambda *x: run_pass(through, *x, 0), params, coder, tokens, lengths), "prompts")
    gathered = gather_sources.lower(coder, found, layout)
    active, sources = lying(jax.eval_shape(lambda *x: gather_sources(*x, layout), coder, found), "prompts")
    kept = found.without_features()
    one = jax.ShapeDtypeStruct((count, OUTPUTS), jnp.int32)
    others = lying(Targets(one, one, jax.ShapeDtypeStruct((count, OUTPUTS, model.width), jnp.float32)), "prompts")  # type: ignore[arg-type]
    blocks = lying(jax.ShapeDtypeStruct((count, of_call, size), jnp.int32), "prompts")
    joined = lying(jax.ShapeDtypeStruct((model.layers + 1,), jnp.int32))
    skips = lying(jax.eval_shape(lambda x: skips_of(x, model.layers), coder))
    which = (skips, kept, active, others)
    embedded = trace_embeddings.lower(through, c.covered, True, at_once, params, *which)
    fixed = lying(
        jax.eval_shape(lambda *x: trace_embeddings(through, c.covered, True, at_once, *x), params, *which), "prompts"
    )
    traced = trace_blocks.lower(
        through, c, 0, length, layout.tiles, params, found.held, skips, sources, joined, active, others, blocks
    )

    def on_chip(*trees: Any) -> int:
        return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(trees))

    # What the programs before left stays meanwhile, and some of the last one's results wait for the host.
    stages = (
        (passed, 0, 0),
        (gathered, on_chip(found), 0),
        (embedded, on_chip(kept, active, sources), 0),
        (traced, on_chip(found.held, active, sources, fixed), IN_FLIGHT),
    )
    peak = 0.0
    for lowered, left, waiting in stages:
        used: Any = lowered.compile().memory_analysis()
        # What it is given is counted already.
        own = used.peak_memory_in_bytes - used.argument_size_in_bytes + used.generated_code_size_in_bytes
        peak = max(peak, left + own + waiting * used.output_size_in_bytes)
    total = given + peak
    return report | {"fits": total <= limit, "total": total}
