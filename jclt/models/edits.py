"""Edits of a forward pass: what the network goes on with at a site, in place of the value that it computed there.

The transformer calls an edit at every site with the place (site, layer, positions) and the value, and goes on with the
result. Any function of these two is an edit. The ones in this file are pytrees (equinox modules): their numbers are
arguments of a compiled program, so the same program serves other numbers.

- `Set`, `Scale`, `Add` and `Noise` (`site_edits.py`) change one site. They say where: layer, position, head, key and
  index, each as an index or a slice; and `direction`, if only a part of the value is to change.
- `Replace(values)` puts captured values at sites.
- `Freeze(values)` puts values at sites and stops gradients there; `Freeze(names)` keeps what the network computes.
- `Compose(edits)` applies several edits in the order given.
"""
# JAX's types are partial, hence the exceptions.
# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Iterable, Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jclt.errors import UserError
from jclt.models.config import ModelConfig
from jclt.models.ranges import Index, Ranges, align_positions, is_known, select
from jclt.models.site_edits import Set, SiteEdit, make_directions, project_onto
from jclt.models.sites import SITE_AXES, Edit, Place, check_sites
from jclt.shapes import Array, ArrayLike, Float, Layer


class Replace(eqx.Module):
    """Puts captured values at sites.

    Values have the shape of captured ones: a leading layer axis inside the layers, and no batch axis where the prompt
    had none. Axes of size 1 are repeated. The ranges and the direction say where, as in `Set`; positions after those of
    the values stay as they are. `value_layers` gives the layers that the leading axis stands for, and all other layers
    stay as they are. Without it the axis stands for all layers of the model.
    """

    values: dict[str, Array]
    ranges: Ranges
    directions: Float[ArrayLike, "k D"] | None
    value_layers: tuple[int, ...] | None = eqx.field(static=True)

    def __init__(
        self,
        values: Mapping[str, ArrayLike],
        *,
        layer: Index = None,
        position: Index = None,
        head: Index = None,
        key: Index = None,
        index: Index = None,
        direction: ArrayLike | None = None,
        value_layers: Iterable[int] | None = None,
    ):
        self.values = {name: jnp.asarray(value) for name, value in values.items()}
        self.ranges = Ranges(layer, position, head, key, index)
        for name in self.values:
            self.ranges.check_axes(name)
        self.directions = None if direction is None else make_directions(next(iter(values), ""), direction)
        self.value_layers = None if value_layers is None else tuple(value_layers)

    def __call__(self, place: Place, value: Array) -> Array:
        if place.site not in self.values:
            return value
        new, present = self._select_layer(place.site, place.layer)
        if new is None:
            return value
        new, known = align_positions(place, new, value)
        if self.directions is not None:
            new = value + project_onto(self.directions, new.astype(value.dtype) - value)
        mask = self.ranges.find(place, value)
        for part in (known, present):
            mask = part if mask is None else mask if part is None else mask & part
        return select(mask, new, value)

    def _select_layer(self, site: str, layer: Layer) -> tuple[Array | None, Array | None]:
        """The layer's values, None if there are none; and, where only the running program knows, whether there are."""
        new = self.values[site]
        if layer is None:
            return new, None
        if self.value_layers is None:
            return new[layer], None
        if new.shape[0] != len(self.value_layers):
            raise UserError(
                f"replacement of site '{site}': values of {new.shape[0]} layers, expected {len(self.value_layers)}"
            )
        if isinstance(layer, int):
            return (new[self.value_layers.index(layer)] if layer in self.value_layers else None), None
        matches = jnp.asarray(self.value_layers, layer.dtype) == layer
        axes_of_value = len(SITE_AXES[site])
        return new[jnp.argmax(matches)], jnp.any(matches).reshape((1,) * axes_of_value)


class Freeze(eqx.Module):
    """Makes sites constant: puts values there, shaped as in `Replace`, and stops gradients. If only names are given, it
    keeps what the network computes there.

    In a pass through a single block, whose places have no layer, values have no layer axis.
    """

    values: dict[str, Array | None]

    def __init__(self, values: Mapping[str, ArrayLike] | Iterable[str]):
        if isinstance(values, Mapping):
            self.values = {name: jnp.asarray(value) for name, value in values.items()}
        else:
            self.values = dict.fromkeys((values,) if isinstance(values, str) else values)

    def __call__(self, place: Place, value: Array) -> Array:
        if place.site not in self.values:
            return value
        new = self.values[place.site]
        if new is not None:
            value = Replace({place.site: new})(place, value)
        return jax.lax.stop_gradient(value)


class Compose(eqx.Module):
    """Several edits in the order given: each receives what the one before it returned.

    Two edits that both set the same place are refused: the second would undo the first.
    """

    edits: tuple[Edit, ...]

    def __init__(self, edits: Iterable[Edit]):
        self.edits = tuple(edits)
        check_conflicts(self.edits)

    def __call__(self, place: Place, value: Array) -> Array:
        for edit in self.edits:
            value = edit(place, value)
        return value


def list_parts(edit: Edit | None) -> tuple[Edit, ...]:
    """The edits of which a composed one consists."""
    if isinstance(edit, Compose):
        return tuple(part for inner in edit.edits for part in list_parts(inner))
    return () if edit is None else (edit,)


def list_edited_sites(edit: Edit | None) -> tuple[str, ...]:
    """The names of the sites that the edits of this file name; any other function may change every site."""
    names: list[str] = []
    for part in list_parts(edit):
        if isinstance(part, SiteEdit):
            names.append(part.site)
        elif isinstance(part, Replace | Freeze):
            names.extend(part.values)
    return tuple(names)


def check_edit(edit: Edit | None, config: ModelConfig, length: int) -> None:
    """An error if an edit of this file names a site, a layer, a head ... that the model does not have, or a position
    beyond `length`."""
    check_sites(list_edited_sites(edit), config)
    for part in list_parts(edit):
        if isinstance(part, SiteEdit):
            part.ranges.check(part.site, config, length)
        elif isinstance(part, Replace):
            for name in part.values:
                part.ranges.check(name, config, length)


def check_conflicts(edits: Iterable[Edit]) -> None:
    """An error if two of the edits set the same place."""
    setters = [part for edit in edits for part in list_parts(edit) if isinstance(part, Set | Replace)]
    for number, later in enumerate(setters):
        for earlier in setters[:number]:
            shared = set(list_edited_sites(earlier)) & set(list_edited_sites(later))
            if not shared or not earlier.ranges.overlap(later.ranges) or _layers_differ(earlier, later):
                continue
            if earlier.directions is not None and later.directions is not None:
                if not is_known(earlier.directions) or not is_known(later.directions):
                    continue
                if np.abs(np.asarray(earlier.directions) @ np.asarray(later.directions).T).max() < 1e-5:
                    continue  # each keeps what the other sets
            raise UserError(f"edits: two of them set site '{min(shared)}' at the same place, expected one")


def _layers_differ(one: Edit, other: Edit) -> bool:
    """Whether one of them puts values at certain layers, in none of which the other acts."""
    for edit, second in ((one, other), (other, one)):
        if isinstance(edit, Replace) and edit.value_layers is not None:
            if not any(acts_in_layer(edit, layer) and acts_in_layer(second, layer) for layer in edit.value_layers):
                return True
    return False


def acts_in_layer(edit: Edit, layer: int) -> bool:
    """Whether an edit of this file may act in a layer, as far as is known before the program runs."""
    if isinstance(edit, Replace) and edit.value_layers is not None and layer not in edit.value_layers:
        return False
    if not isinstance(edit, SiteEdit | Replace) or edit.ranges.layer is None or not is_known(edit.ranges.layer):
        return True
    return layer in edit.ranges.read("layer", layer + 1)
