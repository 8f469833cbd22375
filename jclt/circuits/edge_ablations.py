"""What goes along the edges outside a circuit, by the name of the ablation:

    counterfactual  what the sender writes in the pair's corrupted prompt
    resample        what it writes in another pair's clean prompt of the same length
    mean            the mean of what it writes at that position over the corrupted prompts (over the clean ones without)
    zero            nothing

In scores and in circuits it is the same.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jclt.circuits.edge_runs import Writes, collect_writes, list_write_sites
from jclt.circuits.edges import list_receivers, list_senders
from jclt.circuits.node_runs import Ablation
from jclt.circuits.passes import Prompts, average_positions, pad_prompts, run_pass, split_evenly
from jclt.interventions.patching.pairs import PromptPairs
from jclt.interventions.patching.patch import choose_donors
from jclt.models import ModelConfig
from jclt.shapes import Array, Float, Int, Params, Tokens

BATCH_BYTES = {"cpu": 2**29}
"""Of what senders write and of receivers' gradients, at once."""


class Replacement(NamedTuple):
    """What goes along replaced edges. The axis of prompts may have one entry for all."""

    writes: Writes
    heads: Float[Array, "L P T H K"]  # of the same, what heads have before the output projection


def split_pairs_for_edges(config: ModelConfig, pairs: PromptPairs, devices: int) -> list[Int[np.ndarray, "n"]]:
    """The numbers of the pairs that run at once."""
    vectors = len(list_senders(config)) + 2 * len(list_receivers(config))
    bytes_of_pair = 4 * config.width * vectors * max(map(len, pairs.clean))
    most = max(BATCH_BYTES.get(jax.default_backend(), 2**33) // bytes_of_pair, 1)
    return split_evenly(len(pairs), most, devices)


def prepare_ablation(
    config: ModelConfig,
    params: Params,
    pairs: PromptPairs,
    ablation: Ablation,
    *,
    mean_of: PromptPairs | None = None,
    seed: int = 0,
    placed: NamedSharding | None = None,
) -> Callable[[Int[np.ndarray, "n"]], Replacement]:
    """A function that gives what replaces the writes of the pairs with some numbers; `placed` says on which devices
    these are."""
    prompts = pad_prompts(pairs)
    length = prompts.clean.shape[1]
    if ablation in ("zero", "mean"):
        of_all = (
            make_zero_replacement(config, params, length)
            if ablation == "zero"
            else average_writes(config, params, pairs if mean_of is None else mean_of, length)
        )
        return lambda numbers: of_all
    tokens, last = np.asarray(prompts.corrupted), np.asarray(prompts.last)
    if ablation == "resample":
        tokens = np.asarray(prompts.clean)[choose_donors(pairs, seed)]
    return lambda numbers: run_writes(config, params, *jax.device_put((tokens[numbers], last[numbers]), placed))


@partial(jax.jit, static_argnames=("config",))
def run_writes(config: ModelConfig, params: Params, tokens: Tokens, last: Int[Array, "P"]) -> Replacement:
    """What senders write in the plain pass."""
    _, seen = run_pass(config, params, tokens, last, capture=list_write_sites(config))
    return Replacement(collect_writes(config, params, seen), seen["head_out"])


def make_zero_replacement(config: ModelConfig, params: Params, length: int) -> Replacement:
    dtype, layers = params["token_embedding"].dtype, config.layers
    writes = jnp.zeros((layers, config.heads + 1, 1, length, config.width), dtype)
    heads = jnp.zeros((layers, 1, length, config.heads, config.head_size), dtype)
    return Replacement(Writes(writes[0, 0], writes), heads)


def average_writes(config: ModelConfig, params: Params, pairs: PromptPairs, length: int) -> Replacement:
    """The mean at each position over the corrupted prompts that reach it, 0 where none does; one for all pairs."""

    def read(prompts: Prompts) -> tuple[Array, Array, Array]:
        (embeddings, layers), heads = run_writes(config, params, prompts.corrupted, prompts.last)
        return embeddings[None], layers.reshape(-1, *embeddings.shape), heads

    embeddings, layers, heads = average_positions(read, pairs, split_pairs_for_edges(config, pairs, 1), length)
    return Replacement(Writes(embeddings[0], layers.reshape(config.layers, -1, *layers.shape[1:])), heads)
