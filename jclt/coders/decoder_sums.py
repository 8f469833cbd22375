"""The running sum of decoder outputs in one pass through the layers."""

import jax

from jclt.coders.coder import Coder, SparseCoder
from jclt.kernels.active import SPARSE_BELOW, ActivePairs, all_fit, gather_values, list_active
from jclt.kernels.matmuls import apply_weight, sharded_einsum, token_letters, widen_for_product
from jclt.kernels.row_lists import GroupedRows
from jclt.kernels.row_sums import sum_rows
from jclt.kernels.row_sums_xla import MAX_PASSES, PAIRS_PER_PASS
from jclt.mesh import TOKENS_SPEC, map_over_devices, shard_shape, sum_over_feature_shards
from jclt.shapes import Array, Float


class DecoderSums:
    """Receives each layer's activations once, from the first layer on, and gives the coder's output at each layer.

    Where few features are active it sums up the decoder rows of these alone. With `dense` it computes outputs as
    `Coder.write` does, and so with gradients.
    """

    def __init__(self, coder: Coder, *, dense: bool = False):
        self.coder = coder
        self.capacity = 0.0 if dense else choose_capacity(coder)
        self.activations: list[Array] = []
        self.sums: dict[int, Array] = {}

    def add(self, layer: int, a: Float[Array, "*N F"]) -> None:
        """Adds what one layer's features write, at activations a."""
        self.activations.append(a)
        if self.capacity:
            written = decode_layer(self.coder.decoder_rows(layer), a, self.capacity)
            for i in range(written.shape[-2]):
                target, to_target = layer + i, written[..., i, :]
                self.sums[target] = self.sums[target] + to_target if target in self.sums else to_target

    def output(self, layer: int, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        """The coder's output at a layer with input x, once the activations of all layers up to it are added."""
        if not self.capacity:
            return self.coder.write(layer, self.activations, x)
        written, skip = self.sums.pop(layer), self.coder.skip(layer)
        written = written + self.coder.decoder_bias(layer).astype(written.dtype)[(None,) * (x.ndim - 1)]
        if skip is None:
            return written
        n = token_letters(x)
        return written + apply_weight(f"{n}d,ed->{n}e", widen_for_product(x, skip), skip).astype(written.dtype)


def choose_capacity(coder: Coder) -> float:
    """Active features per token and device up to which it pays to read their rows alone; 0 where it never does."""
    if not isinstance(coder, SparseCoder):
        return 0.0
    capacity = SPARSE_BELOW.get(jax.default_backend(), 0.0) * shard_shape(coder.layers[0].encoder)[0]
    return capacity if capacity >= MAX_PASSES * PAIRS_PER_PASS else 0.0


def decode_layer(decoder: Float[Array, "F R D"], a: Float[Array, "*N F"], capacity: float) -> Float[Array, "*N R D"]:
    """What one layer's features write to each layer of their reach; a dense product if more are active than fit."""
    flat = a.reshape(-1, a.shape[-1])
    active_pairs = list_active(flat != 0, capacity)

    def decode_dense() -> Array:
        return sharded_einsum("nf,frd->nrd", widen_for_product(flat, decoder), decoder)

    def decode_active_pairs() -> Array:
        def decode_on_device(pairs: ActivePairs, values: Array, decoder: Array) -> Array:
            rows = GroupedRows(pairs.token_starts, pairs.feature, decoder)
            return sum_over_feature_shards(sum_rows((rows,), (values,), decoder.shape[1]))

        values = gather_values(active_pairs, flat)
        return map_over_devices(decode_on_device, TOKENS_SPEC)(active_pairs, values, decoder)

    written = jax.lax.cond(all_fit((active_pairs,)), decode_active_pairs, decode_dense)
    return written.reshape(*a.shape[:-1], *decoder.shape[1:])
