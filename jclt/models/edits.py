"""Edits of a forward pass: what the network goes on with at a site, in place of the value that it computed there.

The transformer calls an edit at every site with the site's name, the layer and the value, and goes on with the result.
Any function of these three is an edit. The ones in this file are pytrees (equinox modules): their arrays are arguments
of a compiled program, so the same program serves other values.

- `Replace(values)` puts values at sites: everywhere, in some layers, or where a mask is true.
- `Freeze(values)` puts values at sites and stops gradients there; `Freeze(names)` keeps what the network computes.
- `Compose(edits)` applies several edits in the order given.
"""
# JAX's types are partial, hence the exceptions.
# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Callable, Iterable, Mapping

import equinox as eqx
import jax
import jax.numpy as jnp

from jclt.errors import UserError
from jclt.mesh import shard_like
from jclt.shapes import Array, ArrayLike, Bool, Layer

Edit = Callable[[str, Layer, Array], Array]
"""`edit(site, layer, value)` returns what the network goes on with. An edit that changes nothing returns `value`
itself: then the compiled program is the one without the edit."""


class Replace(eqx.Module):
    """Puts values at sites, everywhere or where a mask is true.

    Values have the shape of captured ones: a leading layer axis inside the layers, and no batch axis where the prompt
    had none. Axes of size 1 are repeated. A mask is a boolean array with as many axes that broadcasts to its value.
    `layers` gives the layers that the leading axis stands for; all other layers stay as they are. Without it the axis
    stands for all layers of the model.
    """

    values: dict[str, Array]
    where: dict[str, Bool[Array, "..."]]
    layers: tuple[int, ...] | None = eqx.field(static=True)

    def __init__(
        self,
        values: Mapping[str, ArrayLike],
        where: Mapping[str, ArrayLike] | None = None,
        layers: Iterable[int] | None = None,
    ):
        for name in where or {}:
            if name not in values:
                raise UserError(f"replacement: a mask for site '{name}', but no values for it")
        self.values = {name: jnp.asarray(value) for name, value in values.items()}
        self.where = {name: jnp.asarray(mask) for name, mask in (where or {}).items()}
        self.layers = None if layers is None else tuple(layers)
        for name, mask in self.where.items():
            if mask.ndim != self.values[name].ndim:
                raise UserError(
                    f"replacement of site '{name}': its mask has {mask.ndim} axes, expected {self.values[name].ndim}"
                )

    def __call__(self, site: str, layer: Layer, value: Array) -> Array:
        if site not in self.values:
            return value
        new, mask = self.values[site], self.where.get(site)
        present = None  # whether this layer is one of `layers`, where only the running program knows
        if layer is not None and self.layers is not None:
            if new.shape[0] != len(self.layers):
                raise UserError(
                    f"replacement of site '{site}': values of {new.shape[0]} layers, expected {len(self.layers)}"
                )
            if isinstance(layer, int):
                if layer not in self.layers:
                    return value
                layer = self.layers.index(layer)
            else:
                matches = jnp.asarray(self.layers, layer.dtype) == layer
                present, layer = jnp.any(matches), jnp.argmax(matches)
        if layer is not None:
            new = new[layer]
            mask = None if mask is None else mask[layer if mask.shape[0] > 1 else 0]
        new = _match_axes(site, "values", new, value).astype(value.dtype)
        if mask is not None:
            mask = jnp.broadcast_to(_match_axes(site, "mask", mask, value), value.shape)
            new = jnp.where(mask, new, value)
        new = shard_like(jnp.broadcast_to(new, value.shape), value)
        return new if present is None else jnp.where(present, new, value)


class Freeze(eqx.Module):
    """Makes sites constant: puts values there, shaped as in `Replace`, and stops gradients. Of names alone it keeps
    what the network computes there.

    A `layer` of None takes the values of layer sites without their layer axis, for a pass through a single block.
    """

    values: dict[str, Array | None]

    def __init__(self, values: Mapping[str, ArrayLike] | Iterable[str]):
        if isinstance(values, Mapping):
            self.values = {name: jnp.asarray(value) for name, value in values.items()}
        else:
            self.values = dict.fromkeys((values,) if isinstance(values, str) else values)

    def __call__(self, site: str, layer: Layer, value: Array) -> Array:
        if site not in self.values:
            return value
        new = self.values[site]
        if new is not None:
            value = Replace({site: new})(site, layer, value)
        return jax.lax.stop_gradient(value)


class Compose(eqx.Module):
    """Several edits in the order given: each receives what the one before it returned."""

    edits: tuple[Edit, ...]

    def __init__(self, edits: Iterable[Edit]):
        self.edits = tuple(edits)

    def __call__(self, site: str, layer: Layer, value: Array) -> Array:
        for edit in self.edits:
            value = edit(site, layer, value)
        return value


def list_edited_sites(edit: Edit | None) -> tuple[str, ...]:
    """The names of the sites that the edits of this file name; any other function may change every site."""
    if isinstance(edit, Compose):
        return tuple(name for part in edit.edits for name in list_edited_sites(part))
    return tuple(edit.values) if isinstance(edit, Replace | Freeze) else ()


def _match_axes(site: str, kind: str, array: Array, value: Array) -> Array:
    """The array with the batch axis of `value`; an error if it does not broadcast to the shape of `value`."""
    if array.ndim == value.ndim - 1:
        array = array[None]
    if array.ndim != value.ndim or any(a not in (1, b) for a, b in zip(array.shape, value.shape, strict=True)):
        raise UserError(f"replacement of site '{site}': {kind} of shape {array.shape}, expected {value.shape}")
    return array
