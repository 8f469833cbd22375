"""Where the rows of a grid act: layers, positions and heads as ranges, one row for each place of the grid.

A position is a number (a negative one counts from the end), a range, or a name: "last", "all", "subject", "subject
first", "subject last". Named positions stand at different places in different prompts, so that averages over prompts of
different length still mean something.
"""

from collections.abc import Iterable, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from jclt.errors import UserError
from jclt.interventions.patching.pairs import PromptPairs
from jclt.models import SITES, ModelConfig
from jclt.models.sites import LAYER_SITES, SITE_AXES, check_sites
from jclt.shapes import Int

Position = int | range | slice | str
LayerSpan = int | range | slice
"""A layer, or several that change together."""

NAMED = ("last", "all", "subject", "subject first", "subject last")


class Grid(NamedTuple):
    """All places of a grid; one row for each, in the order of the axes."""

    axes: dict[str, tuple[str | int, ...]]
    sites: tuple[str, ...]
    site: Int[np.ndarray, "R"]  # number of each row's site
    layers: Int[np.ndarray, "R 2"]
    heads: Int[np.ndarray, "R 2"]
    positions: tuple[Position, ...]
    position: Int[np.ndarray, "R"]  # number of each row's position

    def locate(self, pairs: PromptPairs, numbers: Int[np.ndarray, "P"]) -> Int[np.ndarray, "P R 2"]:
        """The positions of every row in each of these pairs."""
        spans = [[locate_position(pairs, int(i), position) for position in self.positions] for i in numbers]
        return np.array(spans, np.int32)[:, self.position]


def make_grid(
    config: ModelConfig,
    pairs: PromptPairs,
    sites: str | Iterable[str],
    layers: Iterable[LayerSpan] | None,
    positions: Iterable[Position] | None,
    heads: bool,
) -> Grid:
    """The grid of all combinations. By default every layer and every position, one at a time."""
    sites = check_sites(sites, config)
    for site in sites:
        if site not in LAYER_SITES:
            raise UserError(f"site '{site}': is outside the layers, expected one within them ({SITES[site]})")
        if heads and not set(SITE_AXES[site]) & set("HG"):
            raise UserError(f"site '{site}': has no axis of heads; its axes are {' '.join(SITE_AXES[site])}")
    if not sites:
        raise UserError("sites: none, expected at least one")
    spans = [read_layers(config, layer) for layer in (range(config.layers) if layers is None else layers)]
    places = list_positions(pairs) if positions is None else tuple(positions)
    counts = {config.heads if "H" in SITE_AXES[site] else config.key_heads for site in sites} if heads else {1}
    if len(counts) > 1:
        raise UserError(f"sites {', '.join(sites)}: have {min(counts)} and {max(counts)} heads, expected as many each")
    if not spans or not places:
        raise UserError("layers or positions: none, expected at least one")
    rows = np.array(list(product(range(len(sites)), range(len(spans)), range(len(places)), range(min(counts)))), int)
    axes: dict[str, tuple[str | int, ...]] = {
        "site": sites,
        "layer": tuple(name_span(span) for span in spans),
        "position": tuple(name_position(pairs, place) for place in places),
    }
    head_ranges = np.array([[0, 2**30]], np.int32)
    if heads:
        axes["head"] = tuple(range(min(counts)))
        head_ranges = np.arange(min(counts), dtype=np.int32)[:, None] + np.array([[0, 1]], np.int32)
    return Grid(
        axes, sites, rows[:, 0], np.array(spans, np.int32)[rows[:, 1]], head_ranges[rows[:, 3]], places, rows[:, 2]
    )


def read_layers(config: ModelConfig, layer: LayerSpan) -> tuple[int, int]:
    """The first layer, and the one after the last."""
    if isinstance(layer, range | slice):
        if layer.step not in (None, 1):
            raise UserError(f"layers {layer}: expected a range without steps")
        start, stop = layer.start or 0, config.layers if layer.stop is None else layer.stop
    else:
        start, stop = int(layer), int(layer) + 1
    if not 0 <= start < stop <= config.layers:
        raise UserError(f"layer {layer}: expected 0 to {config.layers - 1}")
    return start, stop


def list_windows(config: ModelConfig, window: int, layers: Sequence[int]) -> list[range]:
    """`window` layers around each layer, fewer at the ends of the model."""
    if window < 1:
        raise UserError(f"window {window}: expected at least 1 layer")
    for layer in layers:
        read_layers(config, layer)
    return [range(max(0, at - window // 2), min(config.layers, at + (window + 1) // 2)) for at in layers]


def name_span(span: tuple[int, int]) -> str | int:
    return span[0] if span[1] == span[0] + 1 else f"{span[0]}-{span[1] - 1}"


def list_positions(pairs: PromptPairs) -> tuple[int, ...]:
    """Every position of prompts of one length."""
    lengths = sorted(pairs.group_by_length())
    if len(lengths) > 1:
        raise UserError(
            f"positions: the prompts have {lengths[0]} to {lengths[-1]} tokens, expected one length, or positions by "
            f"name ({', '.join(NAMED)})"
        )
    return tuple(range(lengths[0]))


def locate_position(pairs: PromptPairs, number: int, position: Position) -> tuple[int, int]:
    """The first position and the one after the last, in the pair with this number."""
    length, name = len(pairs.clean[number]), pairs.names[number]
    if isinstance(position, str):
        if position not in NAMED:
            raise UserError(f"position '{position}': expected a number, a range or one of: {', '.join(NAMED)}")
        subject = pairs.subjects[number]
        if position.startswith("subject") and subject is None:
            raise UserError(f"position '{position}': {name} has no subject")
        start, stop = subject or (0, length)
        return {
            "last": (length - 1, length),
            "all": (0, length),
            "subject": (start, stop),
            "subject first": (start, start + 1),
            "subject last": (stop - 1, stop),
        }[position]
    if isinstance(position, range | slice):
        start, stop, _ = slice(position.start, position.stop).indices(length)
        step = position.step
    else:
        start = position + length if position < 0 else int(position)
        stop, step = start + 1, None
    if step not in (None, 1) or not 0 <= start < stop <= length:
        raise UserError(f"position {position}: {name} has {length} tokens, expected 0 to {length - 1}")
    return start, stop


def name_position(pairs: PromptPairs, position: Position) -> str:
    """A label: of a number, with its token, unless the prompts differ there."""
    if isinstance(position, str):
        return position
    if isinstance(position, range | slice):
        return f"{position.start or 0}-{'' if position.stop is None else position.stop - 1}"
    texts = {texts[position] for texts in pairs.token_texts if -len(texts) <= position < len(texts)}
    return f"{position} {texts.pop()}" if len(texts) == 1 else f"{position} *"
