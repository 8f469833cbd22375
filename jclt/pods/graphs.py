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

from jclt.attribution.local import Through
from jclt.attribution.sources import TILE, gather_sources, run_pass, skips_of
from jclt.attribution.sweep import Targets, trace_blocks
from jclt.attribution.trace import BLOCK, GRADIENT, length_bucket
from jclt.coders import abstract_coder
from jclt.models import ModelConfig, abstract_params
from jclt.pods.chips import chip_of
from jclt.training.config import TrainConfig

ACTIVE, OUTPUTS, BLOCKS = 100, 16, 4
"""Active features a token over all layers, as published coders have; outputs explained; blocks of targets at once."""


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
    longest, tiles = max(64, 2 * ACTIVE * length // len(c.covered)), length * -(-ACTIVE // TILE)
    size = min(max(16, GRADIENT["tpu"] // (count * model.width) // length), BLOCK["tpu"])
    passed = run_pass.lower(through, params, coder, tokens, lengths, False)
    found = lying(jax.eval_shape(lambda *x: run_pass(through, *x, False), params, coder, tokens, lengths), "prompts")
    gathered = gather_sources.lower(coder, found, longest, tiles)
    active, sources = lying(jax.eval_shape(lambda *x: gather_sources(*x, longest, tiles), coder, found), "prompts")
    one = jax.ShapeDtypeStruct((count, OUTPUTS), jnp.int32)
    others = lying(Targets(one, one, jax.ShapeDtypeStruct((count, OUTPUTS, model.width), jnp.float32)), "prompts")  # type: ignore[arg-type]
    blocks = lying(jax.ShapeDtypeStruct((count, BLOCKS, size), jnp.int32), "prompts")
    joined = lying(jax.ShapeDtypeStruct((model.layers + 1,), jnp.int32))
    skips = lying(jax.eval_shape(lambda x: skips_of(x, model.layers), coder))
    traced = trace_blocks.lower(
        through, c.covered, 0, length, tiles, params, found.held, skips, sources, joined, active, others, blocks
    )
    kept = sum(
        np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves((found, active, sources))
    )
    most = 0.0
    for lowered in (passed, gathered, traced):
        used: Any = lowered.compile().memory_analysis()
        # What it is given is counted already; inputs and outputs of the others stay meanwhile.
        most = max(most, used.peak_memory_in_bytes - used.argument_size_in_bytes + used.generated_code_size_in_bytes)
    total = given + kept + most
    return report | {"fits": total <= limit, "total": total}
