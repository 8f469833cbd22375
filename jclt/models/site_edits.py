"""Changes of one site: `Set`, `Scale`, `Add` and `Noise`, at some layers, positions, heads and indices, or along
directions."""
# JAX's types are partial, hence the exceptions.
# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from abc import abstractmethod
from typing import TypedDict, Unpack

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jclt.errors import UserError, suggest_name
from jclt.models.ranges import Index, Ranges, is_known, select
from jclt.models.sites import SITE_AXES, Place
from jclt.numerics import einsum
from jclt.shapes import Array, ArrayLike, Float


class Where(TypedDict, total=False):
    """Where a site edit acts: where all of its ranges meet.

    layer, position, head, key, index
                an index, a slice or range, or None for all. `slice(5, None)` also covers positions that are generated
                later.
                `key` is the position attended to; `index` counts along the last axis (a neuron, a token)
    feature     the same as `index` at the site "features", which `jclt.intervene` has
    direction   a vector [D] or several [k, D]: only the part of the value along them changes. Their length does not
                count. Of several, an orthonormal basis is made (Gram-Schmidt, in the order given), in which `value` [k]
                are the coordinates
    """

    site: str
    layer: Index
    position: Index
    head: Index
    key: Index
    index: Index
    feature: Index
    direction: ArrayLike | None


class SiteEdit(eqx.Module):
    """A change of one site: `Set`, `Scale`, `Add` or `Noise`. Its `value` is a number, or an array that broadcasts to
    the last axes of the site's value."""

    value: ArrayLike
    ranges: Ranges
    directions: Float[ArrayLike, "k D"] | None  # of length one, and orthogonal to each other
    site: str = eqx.field(static=True)

    def __init__(self, value: ArrayLike, **where: Unpack[Where]):
        for name in where:
            if name not in Where.__annotations__:
                raise UserError(f"edit: argument '{name}'; {suggest_name(name, Where.__annotations__)}")
        site, index, feature = where.get("site"), where.get("index"), where.get("feature")
        if feature is not None:
            if site not in (None, "features") or index is not None:
                raise UserError(f"edit of a feature: got site {site} and index {index} too, expected the feature alone")
            site, index = "features", feature
        if site is None:
            raise UserError("edit: no site, expected a site's name or a feature")
        self.site = site
        self.value = value if isinstance(value, jax.Array) else np.asarray(value)
        self.ranges = Ranges(where.get("layer"), where.get("position"), where.get("head"), where.get("key"), index)
        self.ranges.check_axes(site)
        direction = where.get("direction")
        self.directions = None if direction is None else make_directions(site, direction)

    @abstractmethod
    def change(self, place: Place, value: Array) -> Array:
        """The value after the change, as if the edit acted everywhere."""

    def __call__(self, place: Place, value: Array) -> Array:
        if place.site != self.site:
            return value
        return select(self.ranges.find(place, value), self.change(place, value), value)

    def broadcast(self, value: Array) -> Array:
        """The edit's own value in the type of the site's, with as many axes; along directions, its coordinates."""
        shape = value.shape if self.directions is None else (*value.shape[:-1], jnp.shape(self.directions)[0])
        new = jnp.asarray(self.value).astype(value.dtype)
        if new.ndim > value.ndim:
            raise UserError(f"edit of site '{self.site}': value of {new.ndim} axes, expected at most {value.ndim}")
        new = new.reshape((1,) * (value.ndim - new.ndim) + new.shape)
        if any(a not in (1, b) for a, b in zip(new.shape, shape, strict=True)):
            raise UserError(f"edit of site '{self.site}': value of shape {new.shape}, expected {shape}")
        return jnp.broadcast_to(new, shape)


class Set(SiteEdit):
    """Sets a value: x becomes `value`. With a direction v: x becomes x + (value - x.u) u, where u = v / |v|."""

    def __init__(self, value: ArrayLike, **where: Unpack[Where]):
        super().__init__(value, **where)

    def change(self, place: Place, value: Array) -> Array:
        if self.directions is None:
            return self.broadcast(value)
        return value + expand(self.directions, self.broadcast(value) - compute_coordinates(self.directions, value))


class Scale(SiteEdit):
    """Multiplies: x becomes `value` x. With a direction only the part of x along it is multiplied."""

    def __init__(self, value: ArrayLike, **where: Unpack[Where]):
        super().__init__(value, **where)

    def change(self, place: Place, value: Array) -> Array:
        factor = self.broadcast(value)
        if self.directions is None:
            return factor * value
        return value + expand(self.directions, (factor - 1) * compute_coordinates(self.directions, value))


class Add(SiteEdit):
    """Adds: x becomes x + `value`. With a direction v: x + `value` u, where u = v / |v|."""

    def __init__(self, value: ArrayLike, **where: Unpack[Where]):
        super().__init__(value, **where)

    def change(self, place: Place, value: Array) -> Array:
        if self.directions is None:
            return value + self.broadcast(value)
        return value + expand(self.directions, self.broadcast(value))


class Noise(SiteEdit):
    """Adds Gaussian noise of standard deviation `value`. Each row, layer and position has noise of its own, which is
    the same in every pass with this seed, with or without a cache."""

    seed: ArrayLike

    def __init__(self, value: ArrayLike, *, seed: int = 0, **where: Unpack[Where]):
        super().__init__(value, **where)
        if self.directions is not None:
            raise UserError(f"noise at site '{self.site}': along a direction, expected none")
        if "S" in SITE_AXES.get(self.site, ()):
            raise UserError(f"noise at site '{self.site}': expected a site without an axis of keys")
        self.seed = np.uint32(seed)

    def change(self, place: Place, value: Array) -> Array:
        batch, length = value.shape[:2]
        positions = jnp.arange(length)[None] if place.positions is None else place.positions
        positions = jnp.broadcast_to(positions, (batch, length))
        key = jax.random.fold_in(jax.random.key(self.seed), 0 if place.layer is None else place.layer)

        def draw(row: Array, position: Array) -> Array:
            own_key = jax.random.fold_in(jax.random.fold_in(key, row), position)
            return jax.random.normal(own_key, value.shape[2:], value.dtype)

        draw_rows = jax.vmap(jax.vmap(draw, in_axes=(None, 0)))
        noise = draw_rows(jnp.arange(batch), positions)
        return value + self.broadcast(value) * noise


def make_directions(site: str, direction: ArrayLike) -> ArrayLike:
    """The directions as orthonormal rows. One direction keeps its sign."""
    if not is_known(direction):
        traced = jnp.atleast_2d(direction)
        if traced.shape[0] > 1:
            raise UserError(f"edit of site '{site}': several directions within a program, expected them before it")
        return traced / jnp.linalg.norm(traced, axis=-1, keepdims=True)
    rows = np.atleast_2d(np.asarray(direction))
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    if rows.ndim != 2 or not np.isfinite(lengths).all() or not (lengths > 0).all():
        raise UserError(
            f"edit of site '{site}': directions of shape {rows.shape}, expected [D] or [k, D] without zeros"
        )
    if len(rows) == 1:
        return rows / lengths
    q, r = np.linalg.qr((rows / lengths).T)
    if np.abs(np.diag(r)).min() < 1e-6:
        raise UserError(f"edit of site '{site}': directions that depend on each other, expected independent ones")
    return (q * np.sign(np.diag(r))).T.astype(rows.dtype)


def compute_coordinates(directions: ArrayLike, x: Float[Array, "... D"]) -> Float[Array, "... k"]:
    return einsum("...d,kd->...k", x, jnp.asarray(directions).astype(x.dtype)).astype(x.dtype)


def expand(directions: ArrayLike, along: Float[Array, "... k"]) -> Float[Array, "... D"]:
    """The vectors with these coordinates along the directions."""
    return einsum("...k,kd->...d", along, jnp.asarray(directions).astype(along.dtype)).astype(along.dtype)


def project_onto(directions: ArrayLike, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """The part of x in the space of the directions."""
    return expand(directions, compute_coordinates(directions, x))
