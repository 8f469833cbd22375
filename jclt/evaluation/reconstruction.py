"""How well a coder reconstructs what it replaces, how sparsely, and with how many of its features.

| figure | definition, over the tokens measured |
|---|---|
| normalised MSE | sum of squared error / sum of squared distance of the target from its mean |
| explained variance | 1 - the same ratio without the error's mean: a constant offset is not counted |
| L0 | mean number of active features of a token |
| density | share of tokens at which a feature is active |
| dead | share of features that are active at no token |

For all layers together, ratios are means over layers (as in Circuit Tracing, 2025), and L0 is the sum. A layer whose
target is the same at every token has no ratios, and is left out of the means.
"""

from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from jclt.coders import Coder
from jclt.coders.decoder_sums import DecoderSums
from jclt.evaluation.batches import (
    check_finite,
    choose_batch_size,
    iterate_batches,
    mask_first_positions,
    to_host,
)
from jclt.mesh import replicate, shard_by_axes
from jclt.models import Model, ModelConfig, forward
from jclt.models.model import on_mesh
from jclt.shapes import Array, ArrayLike, Bool, Float, Params, Tokens

DENSITY_EDGES = np.array([0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0])
"""Edges of the histogram of densities, by decade; densities of 0 have a separate bin."""


class Moments(NamedTuple):
    """For vectors at one or more layers: their number, their mean, and the sum of their squared distances from it."""

    number: Array | np.ndarray  # []
    mean: Array | np.ndarray  # [L, D]
    spread: Array | np.ndarray  # [L]


def measure_moments(x: Float[Array, "L B T D"], mask: Bool[Array, "B T"]) -> Moments:
    weight = mask.astype(jnp.float32)
    count = jnp.sum(weight)
    x = x.astype(jnp.float32)
    mean = jnp.sum(x * weight[None, :, :, None], axis=(1, 2)) / jnp.maximum(count, 1.0)
    away = jnp.square(x - mean[:, None, None]) * weight[None, :, :, None]
    return Moments(count, mean, jnp.sum(away, axis=(1, 2, 3)))


def merge_moments(a: Moments, b: Moments) -> Moments:
    """The moments of both sets together. No large sums are subtracted, which would lose digits."""
    count = a.number + b.number
    share, between = b.number / np.maximum(count, 1), b.mean - a.mean
    spread = a.spread + b.spread + a.number * share * np.sum(between**2, axis=-1)
    return Moments(count, a.mean + share * between, spread)


class Sums(NamedTuple):
    """The sums over one or more batches that all figures follow from."""

    target: Moments
    error: Moments
    active: Array | np.ndarray  # [L, F], tokens at which a feature is active
    activation: Array | np.ndarray  # [L, F], summed over tokens


def sum_batch(config: ModelConfig, params: Params, coder: Coder, tokens: Tokens, mask: Bool[Array, "B T"]) -> Sums:
    """One pass of the model; at every layer the coder reads what the unchanged model computes."""
    sites, covered = (coder.config.reads, coder.config.writes), coder.config.covered
    _, seen, _ = forward(config, params, tokens, capture=sites)
    mask = shard_by_axes(mask, ("tokens", None))
    reads, targets = (shard_by_axes(seen[site], (None, "tokens", None, None)) for site in sites)
    decoder_sums = DecoderSums(coder)
    errors: list[Array] = []
    for index, layer in enumerate(covered):
        decoder_sums.add(index, coder.encode(index, reads[layer]))
        reconstruction = decoder_sums.output(index, reads[layer])
        errors.append(reconstruction.astype(jnp.float32) - targets[layer].astype(jnp.float32))
    weight, activations = mask.astype(jnp.float32)[:, :, None], decoder_sums.activations
    return Sums(
        measure_moments(jnp.stack([targets[layer] for layer in covered]), mask),
        measure_moments(jnp.stack(errors), mask),
        replicate(jnp.stack([jnp.sum((a != 0).astype(jnp.float32) * weight, axis=(0, 1)) for a in activations])),
        replicate(jnp.stack([jnp.sum(a.astype(jnp.float32) * weight, axis=(0, 1)) for a in activations])),
    )


_sum_batch = eqx.filter_jit(sum_batch)


def merge_sums(a: Sums, b: Sums) -> Sums:
    """The sums over both."""
    return Sums(
        merge_moments(a.target, b.target),
        merge_moments(a.error, b.error),
        a.active + b.active,
        a.activation + b.activation,
    )


@dataclass(frozen=True)
class Reconstruction:
    """The results by covered layer, from which every figure follows."""

    layers: tuple[int, ...]
    tokens: int
    error: np.ndarray  # [L], sum of squared error
    centred_error: np.ndarray  # [L], without the error's mean
    spread: np.ndarray  # [L], sum of squared distance of the target from its mean
    density: np.ndarray  # [L, F]
    mean_activation: np.ndarray  # [L, F], over all tokens

    @property
    def nmse(self) -> np.ndarray:
        """NaN where the target has no spread."""
        return _divide(self.error, self.spread)

    @property
    def explained_variance(self) -> np.ndarray:
        return 1 - _divide(self.centred_error, self.spread)

    @property
    def l0(self) -> np.ndarray:
        return self.density.sum(axis=1)

    @property
    def dead(self) -> np.ndarray:
        return np.mean(self.density == 0, axis=1)

    @property
    def histogram(self) -> np.ndarray:
        """`[L, 7]`: how many features are dead, and how many have a density up to each further edge."""
        bins = np.searchsorted(DENSITY_EDGES, self.density)  # a density on an edge counts in the decade below
        return np.stack([np.bincount(row, minlength=len(DENSITY_EDGES)) for row in bins])

    def summary(self) -> dict[str, float]:
        figures = {
            "nmse": _average(self.nmse),
            "explained_variance": _average(self.explained_variance),
            "l0": float(self.l0.sum()),
            "dead": float(self.dead.mean()),
            **{f"nmse_{layer}": float(x) for layer, x in zip(self.layers, self.nmse, strict=True)},
            **{f"l0_{layer}": float(x) for layer, x in zip(self.layers, self.l0, strict=True)},
            **{f"dead_{layer}": float(x) for layer, x in zip(self.layers, self.dead, strict=True)},
        }
        return {name: x for name, x in figures.items() if not np.isnan(x)}

    def table(self) -> str:
        total = (
            "all",
            _average(self.nmse),
            _average(self.explained_variance),
            self.l0.sum(),
            self.dead.mean(),
            self.histogram.sum(axis=0),
        )
        columns = zip(
            map(str, self.layers), self.nmse, self.explained_variance, self.l0, self.dead, self.histogram, strict=True
        )
        names = ["0", *(f"<={edge:g}" for edge in DENSITY_EDGES[1:])]
        widths = [max(len(name), len(str(count))) for name, count in zip(names, total[-1], strict=True)]
        head = "  ".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))
        lines = [f"layer      NMSE  explained      L0    dead  features of density {head}"]
        for layer, nmse, explained, l0, dead, histogram in [*columns, total]:
            ratios = "       -          -" if np.isnan(nmse) else f"{nmse:8.2g}  {explained:9.4f}"
            counts = "  ".join(f"{count:>{width}}" for count, width in zip(histogram, widths, strict=True))
            lines.append(f"{layer:5}  {ratios}  {l0:6.1f}  {dead:6.1%}  {'':19} {counts}")
        return "\n".join(lines)


def _divide(error: np.ndarray, spread: np.ndarray) -> np.ndarray:
    return np.where(spread > 0, error, np.nan) / np.where(spread > 0, spread, 1)


def _average(ratios: np.ndarray) -> float:
    return float(np.mean(ratios[~np.isnan(ratios)])) if not np.isnan(ratios).all() else float("nan")


def evaluate_reconstruction(
    model: Model, coder: Coder, rows: ArrayLike, *, mask: ArrayLike | None = None, batch: int | None = None
) -> Reconstruction:
    """Measures on token rows `[N, T]`, `batch` rows at once or as many as fit in memory. A mask of the same shape can
    leave tokens out, such as padding. Positions before the coder's first one are always left out."""
    mask = mask_first_positions(coder.config, rows, mask)
    batch = batch or choose_batch_size(model, coder.config, rows, mask)
    with on_mesh(model):
        sums = reduce(
            merge_sums,
            (
                to_host(_sum_batch(model.config, model.params, coder, tokens, token_mask))
                for tokens, token_mask in iterate_batches(model, rows, mask, batch)
            ),
        )
    count = float(sums.target.number)
    check_finite(
        np.isfinite(sums.target.spread), f"model {model.name}: what its layers write at '{coder.config.writes}' is"
    )
    check_finite(np.isfinite(sums.error.spread), "coder: what it reconstructs is")
    return Reconstruction(
        layers=coder.config.covered,
        tokens=round(count),
        error=np.asarray(sums.error.spread + count * np.sum(np.asarray(sums.error.mean) ** 2, axis=-1)),
        centred_error=np.asarray(sums.error.spread),
        spread=np.asarray(sums.target.spread),
        density=np.asarray(sums.active) / count,
        mean_activation=np.asarray(sums.activation) / count,
    )
