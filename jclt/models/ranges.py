"""Where an edit acts: ranges of layers, positions, heads, keys and indices at a site.

A range `[start, stop)` is an array of two numbers, the first index and the one after the last. So an index, a slice and
an open-ended slice are data of one shape: one compiled program serves all of them.
"""
# JAX's types are partial, hence the exceptions.
# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jclt.errors import UserError
from jclt.mesh import shard_like
from jclt.models.config import ModelConfig
from jclt.models.sites import LAYER_SITES, SITE_AXES, Place
from jclt.shapes import Array, ArrayLike, Bool

END = 2**31 - 1
"""The end of an open range: it also covers positions that are generated later."""

Index = int | slice | range | np.integer | Array | None
"""An index, a slice or range without steps, or None for everything."""

AXIS_OF = {"position": "T", "head": "HG", "key": "S"}
"""The letters of the axes that a range runs over; `index` runs over the last axis."""


class Ranges(eqx.Module):
    """Ranges `[start, stop)`; None: everything."""

    layer: ArrayLike | None
    position: ArrayLike | None
    head: ArrayLike | None
    key: ArrayLike | None
    index: ArrayLike | None

    def __init__(
        self,
        layer: Index = None,
        position: Index = None,
        head: Index = None,
        key: Index = None,
        index: Index = None,
    ):
        self.layer = make_range("layer", layer)
        self.position = make_range("position", position)
        self.head = make_range("head", head)
        self.key = make_range("key", key)
        self.index = make_range("index", index)

    def check_axes(self, site: str) -> None:
        """An error if the site has no axis for one of the ranges."""
        axes = SITE_AXES.get(site, ())
        for name, letters in AXIS_OF.items():
            if getattr(self, name) is not None and axes and not set(letters) & set(axes):
                raise UserError(f"edit of site '{site}': has no axis for {name}; its axes are {' '.join(axes)}")
        if self.index is not None and axes and axes[-1] in "TS":
            raise UserError(f"edit of site '{site}': its last axis is {axes[-1]}, expected `position` or `key`")
        if self.layer is not None and axes and site not in LAYER_SITES and site not in ("features", "errors"):
            raise UserError(f"edit of site '{site}': the site is outside the layers, leave out `layer`")

    def read(self, name: str, size: int) -> range:
        """The known indices of one range, up to `size`."""
        limits = getattr(self, name)
        start, stop = (0, size) if limits is None else map(int, np.asarray(limits))
        return range(min(start, size), min(stop, size))

    def find(self, place: Place, value: Array) -> Bool[Array, "..."] | None:
        """A mask that broadcasts to the value, true where the ranges meet; None: everywhere."""
        axes, masks = SITE_AXES[place.site], list[Array]()
        if self.layer is not None:
            layer = jnp.asarray(place.layer, jnp.int32)
            masks.append(is_within(self.layer, layer).reshape((1,) * value.ndim))
        if self.position is not None:
            time = axes.index("T")
            length = value.shape[time]
            positions = jnp.arange(length, dtype=jnp.int32)[None] if place.positions is None else place.positions
            shape = [1] * value.ndim
            shape[0], shape[time] = positions.shape[0], length
            masks.append(is_within(self.position, positions).reshape(shape))
        for name, letters in (("head", "HG"), ("key", "S"), ("index", axes[-1])):
            if (limits := getattr(self, name)) is not None:
                axis = next(axis for axis, letter in enumerate(axes) if letter in letters)
                shape = [1] * value.ndim
                shape[axis] = value.shape[axis]
                masks.append(is_within(limits, jnp.arange(value.shape[axis], dtype=jnp.int32)).reshape(shape))
        if not masks:
            return None
        mask = masks[0]
        for other in masks[1:]:
            mask = mask & other
        return mask

    def overlap(self, other: "Ranges") -> bool:
        """Whether some place is within both; False where only the running program knows."""
        names = ("layer", "position", "head", "key", "index")
        pairs = [(getattr(self, name), getattr(other, name)) for name in names]
        known = [(a, b) for a, b in pairs if a is not None and b is not None]
        if not all(is_known(x) and np.ndim(x) == 1 for pair in known for x in pair):
            return False
        return all(max(a[0], b[0]) < min(a[1], b[1]) for a, b in (np.asarray(pair) for pair in known))

    def check(self, site: str, config: ModelConfig, length: int) -> None:
        """An error for a range that begins beyond the model or the text."""
        sizes = {"layer": config.layers, "position": length, "key": length}
        axes = SITE_AXES[site]
        sizes["head"] = config.heads if "H" in axes else config.key_heads
        letters = {"D": config.width, "K": config.head_size, "M": config.mlp_width, "V": config.vocabulary}
        if axes[-1] in letters:
            sizes["index"] = letters[axes[-1]]
        for name, size in sizes.items():
            limits = getattr(self, name)
            if limits is None or not is_known(limits):
                continue
            start = int(np.max(np.asarray(limits)[..., 0]))
            if start >= size:
                what = "tokens" if name in ("position", "key") else f"of {name}"
                raise UserError(f"edit of site '{site}': {name} {start}, expected 0 to {size - 1} ({size} {what})")


def make_range(name: str, index: Index | object) -> ArrayLike | None:
    """The range of an index or slice; an error for negative ones, as an edit does not know where the text ends."""
    if index is None:
        return None
    if isinstance(index, jax.Array):
        return jnp.stack([index, index + 1], axis=-1).astype(jnp.int32)
    if isinstance(index, slice | range):
        if index.step not in (None, 1):
            raise UserError(f"edit: {name} with step {index.step}, expected a slice or range without steps")
        start, stop = (0 if index.start is None else index.start), (END if index.stop is None else index.stop)
    elif isinstance(index, int | np.integer):
        start, stop = int(index), int(index) + 1
    else:
        raise UserError(f"edit: {name} {index!r}, expected an index or a slice; `Compose` several edits for a list")
    if min(start, stop) < 0:
        raise UserError(f"edit: {name} {index}, expected 0 or more, counted from the start")
    if start > stop:
        raise UserError(f"edit: {name} from {start} to before {stop}, expected an end after the start")
    return np.array([start, stop], np.int32)


def is_within(limits: ArrayLike, x: Array) -> Bool[Array, "..."]:
    limits = jnp.asarray(limits).astype(x.dtype)
    return (x >= limits[0]) & (x < limits[1])


def is_known(x: ArrayLike) -> bool:
    """Whether the numbers are known before the program runs."""
    return not isinstance(x, Tracer)


def select(mask: Bool[Array, "..."] | None, new: Array, value: Array) -> Array:
    """The new value where the mask is true, in the type and sharding of the value."""
    new = shard_like(jnp.broadcast_to(new, value.shape).astype(value.dtype), value)
    if mask is None:
        return new
    return jnp.where(shard_like(jnp.broadcast_to(mask, value.shape), value), new, value)


def align_positions(place: Place, new: Array, value: Array) -> tuple[Array, Bool[Array, "..."] | None]:
    """Captured values at the positions of `value`, and a mask of the positions that they have (None: all).

    With a cache, `value` holds any positions, and its axis of keys is as long as the cache.
    """
    axes = SITE_AXES[place.site]
    new = new[None] if new.ndim == value.ndim - 1 else new
    sizes = list(value.shape)
    if place.positions is not None and new.ndim == value.ndim:
        for axis, letter in enumerate(axes):
            if letter == "T" and new.shape[axis] > 1:
                sizes[axis] = new.shape[axis]
            if letter == "S" and 1 < new.shape[axis] < value.shape[axis]:
                padding = [(0, value.shape[axis] - new.shape[axis] if i == axis else 0) for i in range(new.ndim)]
                new = jnp.pad(new, padding)
    if new.ndim != value.ndim or any(a not in (1, b) for a, b in zip(new.shape, sizes, strict=True)):
        raise UserError(f"replacement of site '{place.site}': values of shape {new.shape}, expected {value.shape}")
    time = axes.index("T")
    if place.positions is None or new.shape[time] == 1:
        return new, None
    shape = [1] * value.ndim
    shape[0], shape[time] = place.positions.shape
    positions = place.positions.reshape(shape)
    new = jnp.broadcast_to(new, (value.shape[0], *new.shape[1:]))
    new = jnp.take_along_axis(new, jnp.minimum(positions, new.shape[time] - 1), axis=time)
    return new, positions < sizes[time]
