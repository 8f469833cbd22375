"""Gradients of the metric at a site: at one run, or averaged between two runs (integrated gradients).

Averages are over a way from the clean run (0) to the reference (1):

    ig inputs        the token embeddings move, and all else follows
    ig activations   the site's values of one layer move, with the rest of the clean run around them
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jclt.circuits.passes import Prompts, measure_metric, run_pass
from jclt.circuits.rules import make_activate, make_rules_edit
from jclt.errors import UserError
from jclt.interventions.patching.metrics import Metric
from jclt.models import LAYER_SITES, Compose, Edit, ModelConfig, Place
from jclt.shapes import Array, Float, Int, Params, Tokens

T = TypeVar("T")  # a tree of arrays
QUADRATURES = ("gauss", "midpoint", "left", "right")


class Setting(NamedTuple):
    """What programs are compiled for."""

    model: ModelConfig
    site: str
    metric: Metric
    rules: tuple[str, ...]
    reads: tuple[str, ...] = ()  # further sites whose values are wanted


class Shift(eqx.Module):
    """Adds to the values of one site. In a scan over layers each layer has its own part."""

    value: Array
    site: str = eqx.field(static=True)

    def __call__(self, place: Place, value: Array) -> Array:
        return value + self.value if place.site == self.site else value


def find_points(quadrature: str, steps: int) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """Points between 0 (clean) and 1 (reference), and their weights.

    left    0, 1/n ... (n-1)/n: sparse feature circuits; the points of EAP-IG's paper, which counts from the other end
    right   1/n ... 1: the points of EAP-IG's code
    """
    if quadrature not in QUADRATURES:
        raise UserError(f"quadrature '{quadrature}': expected one of: {', '.join(QUADRATURES)}")
    if steps < 1:
        raise UserError(f"steps={steps}: expected at least 1")
    if quadrature == "gauss":
        points, weights = np.polynomial.legendre.leggauss(steps)
        return (points + 1) / 2, weights / 2
    offset = {"midpoint": 0.5, "left": 0.0, "right": 1.0}[quadrature]
    return (np.arange(steps) + offset) / steps, np.full(steps, 1 / steps)


def read_values(
    setting: Setting, params: Params, tokens: Tokens, last: Int[Array, "P"], extra: tuple[str, ...] = ()
) -> dict[str, Float[Array, "L P T ..."]]:
    """The values of a run at the sites; outside the layers with an axis of one layer."""
    _, seen = run_pass(setting.model, params, tokens, last, capture=list_read_sites(setting, extra))
    return add_layer_axis(seen)


def list_read_sites(setting: Setting, extra: tuple[str, ...] = ()) -> tuple[str, ...]:
    return tuple(dict.fromkeys((setting.site, *setting.reads, *extra)))


def add_layer_axis(seen: Mapping[str, Array]) -> dict[str, Float[Array, "L P T ..."]]:
    return {name: value if name in LAYER_SITES else value[None] for name, value in seen.items()}


def differentiate(
    setting: Setting,
    params: Params,
    prompts: Prompts,
    tokens: Tokens,
    like: Float[Array, "L P ..."],
    embeddings: Float[Array, "P T D"] | None = None,
) -> Float[Array, "L P ..."]:
    """The gradient of each pair's metric at the site, in a run over these tokens. `embeddings` go to the place of
    theirs; `like` has the shape of the site's values."""
    return read_and_differentiate(setting, params, prompts, tokens, like, embeddings, ())[1]


def read_and_differentiate(
    setting: Setting,
    params: Params,
    prompts: Prompts,
    tokens: Tokens,
    like: Float[Array, "L P ..."] | jax.ShapeDtypeStruct,
    embeddings: Float[Array, "P T D"] | None,
    capture: tuple[str, ...],
) -> tuple[dict[str, Float[Array, "L P T ..."]], Float[Array, "L P ..."]]:
    """The values of the same run at some sites, too."""
    config, layered = setting.model, setting.site in LAYER_SITES

    def put(place: Place, value: Array) -> Array:
        return embeddings if embeddings is not None and place.site == "token_embedding" else value

    def total(shift: Array) -> tuple[Array, dict[str, Array]]:
        own = Shift(shift if layered else shift[0], setting.site)
        edits: tuple[Edit, ...] = (put, make_rules_edit(config, setting.rules))
        edit = Compose(edits if layered else (put, own, *edits[1:]))
        options: Any = {"edit": edit, "activate": make_activate(setting.rules), "capture": capture}
        logits, seen = run_pass(config, params, tokens, prompts.last, layer_edit=own if layered else None, **options)
        return measure_metric(setting.metric, logits, prompts.answers).sum(), add_layer_axis(seen)

    gradient, values = jax.grad(total, has_aux=True)(jnp.zeros(like.shape, like.dtype))
    return values, gradient


def sum_weighted(compute: Callable[[Array], T], points: Array, weights: Float[Array, "n"]) -> T:
    """The sum of weight x compute(point), one after the other."""

    def add(total: T, point_and_weight: tuple[Array, Array]) -> tuple[T, None]:
        point, weight = point_and_weight
        return jax.tree.map(lambda total, x: total + weight * x, total, compute(point)), None

    if len(points) == 1:
        return jax.tree.map(lambda x: weights[0] * x, compute(points[0]))
    like = jax.eval_shape(compute, points[0])
    return jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like), (points, weights))[0]


def average_over_inputs(
    setting: Setting,
    params: Params,
    prompts: Prompts,
    like: Float[Array, "L P T ..."],
    ends: tuple[Float[Array, "P T D"], Float[Array, "P T D"]],
    points: Float[Array, "n"],
    weights: Float[Array, "n"],
) -> Float[Array, "L P T ..."]:
    """The average while the embeddings move from the first to the second of `ends`."""
    start, stop = ends

    def differentiate_at(point: Array) -> Array:
        return differentiate(setting, params, prompts, prompts.clean, like, start + point * (stop - start))

    return sum_weighted(differentiate_at, points, weights)


def average_over_activations(
    setting: Setting,
    params: Params,
    prompts: Prompts,
    streams: Float[Array, "L P T D"],
    ends: tuple[Float[Array, "L P T ..."], Float[Array, "L P T ..."]],
    points: Float[Array, "n"],
    weights: Float[Array, "n"],
) -> Float[Array, "L P T ..."]:
    """The average while one layer's values at the site move from the first to the second of `ends`. The pass begins at
    that layer, whose residual stream of the clean run is in `streams`."""
    config = setting.model

    def average_layer(of_layer: tuple[Array, Array, tuple[Array, Array]]) -> Array:
        layer, stream, (start, stop) = of_layer

        def total(values: Array) -> Array:
            def put(place: Place, value: Array) -> Array:
                return jnp.where(place.layer == layer, values, value) if place.site == setting.site else value

            edit = Compose((put, make_rules_edit(config, setting.rules)))
            options: Any = {"edit": edit, "activate": make_activate(setting.rules), "begin": (stream, layer)}
            logits, _ = run_pass(config, params, prompts.clean, prompts.last, **options)
            return measure_metric(setting.metric, logits, prompts.answers).sum()

        return sum_weighted(lambda point: jax.grad(total)(start + point * (stop - start)), points, weights)

    return jax.lax.map(average_layer, (jnp.arange(config.layers), streams, ends))


def change_values(
    values: Mapping[str, Float[Array, "L P T ..."]], other: Mapping[str, Float[Array, "L P T ..."]] | None
) -> dict[str, Float[Array, "L P T ..."]]:
    """What the other run's values add to those of a run; without another run, what zero adds."""
    return {name: (-value if other is None else other[name] - value) for name, value in values.items()}
