"""Step 2 for a dense basis: which of the active features are nodes, by their influence on the outputs to first order.

    score(feature) = sum over outputs o: weight(o) . |activation . d value(o) / d activation|

The derivative is that of the local replacement model with the features put in: patterns, norm denominators and errors
are constant, and so is each feature's activation divided by its pre-activation (the identity rule of RelP; for a gated
neuron this quotient is the gate). So it is consistent with a graph: in the graph of all active features it is the sum,
over all paths from a feature to an output, of the product of their edges, each edge into a feature divided by the value
of that feature. But it takes no graph, only one pass forward and one backward.

The backward pass goes through the layers from the last to the first. In each, the coder's part is computed where the
coder lies, as in `active.py`. No array has features and the model's width but the weights of one layer.
"""

from collections.abc import Iterable
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jclt.attribution.active import take_layer
from jclt.attribution.gradients import Gradients, begin_at_outputs, pull_to_input, pull_to_vectors, pull_to_write
from jclt.attribution.local import LocalModel, Weights
from jclt.attribution.sizes import OUTPUTS_AT_ONCE
from jclt.attribution.sweep.nodes import TargetNodes
from jclt.attribution.targets import Outputs
from jclt.attribution.true_pass import TruePass
from jclt.coders import Coder
from jclt.coders.activations import find_largest_reached
from jclt.errors import UserError
from jclt.kernels.matmuls import apply_weight, widen_for_product
from jclt.mesh import find_place, use_mesh
from jclt.shapes import Array, Bool, Float, Int


class Scores(NamedTuple):
    """The scores of one layer's features, 0 where a feature is not active; and how many are active."""

    values: Float[Array, "B T F"]
    active: Int[Array, "B"]


class Chosen(NamedTuple):
    """Which of the active features of a batch of prompts are nodes."""

    features: list[Bool[Array, "B T F"]]  # by covered layer
    nodes: Int[np.ndarray, "B"]
    active: Int[np.ndarray, "B"]
    shares: Float[np.ndarray, "B"]  # of the sum of all scores

    def describe(self, prompt: int) -> dict[str, Any]:
        """For a graph's provenance; nothing where all active features are nodes."""
        nodes, active = int(self.nodes[prompt]), int(self.active[prompt])
        share = round(float(self.shares[prompt]), 4)
        return {} if nodes == active else {"chosen": {"nodes": nodes, "of": active, "share_of_score": share}}


def score_features(
    coder: Coder,
    local: LocalModel,
    weights: Weights,
    true_pass: TruePass,
    has_nodes: Bool[np.ndarray, "B T"],
    outputs: list[Outputs],
    targets: TargetNodes,
    by_prompt: NamedSharding,
    for_vectors: bool = False,
) -> tuple[list[Scores], Gradients | None]:
    """By covered layer, for a batch of prompts: `outputs` are those of all but the prompts that only fill it up, and
    `targets` the same in arrays. `for_vectors` asks for the gradients, too."""
    config, frozen = coder.config, true_pass.frozen
    output_weights = np.zeros(targets.layers.shape, true_pass.logits.dtype)
    for row, prompt_outputs in enumerate(outputs):
        output_weights[row, : len(prompt_outputs.weights)] = prompt_outputs.weights
    stream = begin_at_outputs(local, weights, frozen, targets)
    scores: list[Scores] = []
    gradients: list[Gradients] = []
    to_writes: list[Array] = []  # gradients of what the MLPs write, of this covered layer and those above it
    for layer in reversed(range(local.model.layers)):
        index, number = config.index(layer), np.int64(layer)
        to_read = jnp.zeros_like(stream)
        if index is not None:
            to_writes = [pull_to_write(local, weights, frozen, number, stream), *to_writes][: config.reach(index)]
            encoder, read = coder.load_encoder(index), take_layer(true_pass.reads, number)
            mesh, place = find_place(encoder)
            with use_mesh(mesh):
                arrays = jax.device_put((read, has_nodes, tuple(to_writes), output_weights), place)
                *of_layer, to_read = score_layer(encoder, coder.decoder_rows(index), *arrays)
            scores.insert(0, Scores(*of_layer))
            to_read = jax.device_put(to_read, by_prompt)
        if for_vectors:
            arrays = jax.device_put(output_weights, by_prompt), stream, to_read
            gradients.insert(0, pull_to_vectors(local, weights, frozen, number, targets, *arrays))
        stream = pull_to_input(local, weights, frozen, number, targets, stream, to_read)
    return scores, jax.tree.map(lambda *x: jnp.stack(x, axis=1), *gradients) if for_vectors else None


@jax.jit
@jax.named_scope("score_layer")
def score_layer(
    encoder: Coder,
    decoder: Float[Array, "F R D"],
    x: Float[Array, "B T D"],
    has_nodes: Bool[Array, "B T"],
    to_writes: tuple[Float[Array, "B k T D"], ...],
    output_weights: Float[Array, "B k"],
) -> tuple[Float[Array, "B T F"], Int[Array, "B"], Float[Array, "B k T D"]]:
    """The scores of a layer's features and how many are active; and the gradients of the outputs with respect to what
    the features read. `to_writes` are those of what the MLPs write, in each layer that the features write to."""
    rows, biases = encoder.encoder(0)

    def score_prompt(arguments: tuple[Array, ...]) -> tuple[Array, Array, Array]:
        x, has_nodes, to_writes, output_weights = arguments
        activations = jnp.where(has_nodes[:, None], encoder.encode(0, x), 0)

        def write(factors: Float[Array, "T F"], x: Float[Array, "T D"]) -> Float[Array, "T R D"]:
            h = apply_weight("td,fd->tf", widen_for_product(x, rows), rows)
            h = h + biases.astype(h.dtype)[None]
            quotients = jnp.where(h == 0, 0, activations.astype(h.dtype) / jnp.where(h == 0, 1, h))
            linear = factors * jax.lax.stop_gradient(quotients) * h
            return apply_weight("tf,frd->trd", linear, decoder)

        outputs, pull = jax.vjp(write, jnp.ones_like(activations), x)

        def add_outputs(scores: Array, some: tuple[Array, Array]) -> tuple[Array, Array]:
            gradients, weights = some
            to_factors, to_read = jax.vmap(pull)(gradients.astype(outputs.dtype))
            weighted = jnp.abs(to_factors) * weights.astype(to_factors.dtype)[:, None, None]
            return scores + weighted.sum(axis=0).astype(scores.dtype), to_read

        scores, to_read = jax.lax.scan(
            add_outputs,
            jnp.zeros_like(activations, jnp.float32),
            jax.tree.map(lambda x: x.reshape(-1, OUTPUTS_AT_ONCE, *x.shape[1:]), (to_writes, output_weights)),
        )
        return scores, jnp.sum(activations != 0), to_read.reshape(-1, *x.shape)

    return jax.lax.map(score_prompt, (x, has_nodes, jnp.stack(to_writes, axis=3), output_weights))


def choose_features(scores: list[Scores], nodes: int | float, prompts: int) -> Chosen:
    """Of each prompt the features with the highest scores: so many, or the fewest with this share of the sum of all
    scores. Those with the same score as the last of them are nodes, too; those of score 0 are none. But where at most
    so many are active, all are nodes. Beyond so many `prompts` the others only fill the batch up."""
    values = tuple(layer.values for layer in scores)
    mesh, place = find_place(values)
    with use_mesh(mesh):
        active = sum_layers(layer.active for layer in scores)
        wanted = jnp.asarray(min(nodes, np.iinfo(np.int32).max) if isinstance(nodes, int) else np.float32(nodes))
        features, counts, sums = choose_highest(values, *jax.device_put((active, wanted), place))
    total, chosen = map(np.asarray, sums)
    if not total[:prompts].all():
        raise UserError("prompt: no feature of the coder has any influence on the outputs, expected at least one")
    return Chosen(list(features), np.asarray(counts), np.asarray(active), chosen / np.maximum(total, 1e-30))


@jax.jit
@jax.named_scope("choose_highest")
def choose_highest(
    values: tuple[Float[Array, "B T F"], ...], active: Int[Array, "B"], nodes: Int[Array, ""] | Float[Array, ""]
) -> tuple[tuple[Bool[Array, "B T F"], ...], Int[Array, "B"], tuple[Float[Array, "B"], Float[Array, "B"]]]:
    """Which features are chosen, and how many; the sum of all scores, and that of those chosen."""

    def count(threshold: Float[Array, "B 1 1"]) -> Int[Array, "B 1 1"]:
        return sum_layers((x >= threshold).sum(axis=(1, 2), keepdims=True) for x in values)

    def add_up(threshold: Float[Array, "B 1 1"]) -> Float[Array, "B 1 1"]:
        reached = [jnp.where(x >= threshold, x, 0) for x in values]
        # A long sum loses digits, so it is summed in pieces.
        return sum_layers(x.sum(axis=2, keepdims=True).sum(axis=1, keepdims=True) for x in reached)

    nothing = jnp.zeros_like(values[0].sum(axis=(1, 2), keepdims=True))
    total, zero = add_up(nothing), nothing.astype(jnp.int32)
    if jnp.issubdtype(nodes.dtype, jnp.integer):
        threshold = find_largest_reached(lambda value: count(value) >= nodes, zero)
        takes_all = active <= nodes
    else:
        threshold = find_largest_reached(lambda value: add_up(value) >= nodes * total, zero)
        threshold = jnp.where(nodes == 1, nothing, threshold)
        takes_all = jnp.zeros_like(active, bool)
    threshold = jnp.maximum(threshold, jnp.finfo(jnp.float32).tiny)
    counts = jnp.where(takes_all, active, count(threshold)[:, 0, 0])
    sums = total[:, 0, 0], add_up(threshold)[:, 0, 0]
    threshold = jnp.where(takes_all[:, None, None], -1, threshold)
    return tuple(x >= threshold for x in values), counts, sums


def sum_layers(arrays: Iterable[Array]) -> Array:
    return reduce(jnp.add, arrays)
