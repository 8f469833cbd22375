"""The files of described features: one folder a layer, in it one `.npy` file a column, whose row f is feature f.

    settings.json       what made it: fingerprints of model, coder and data, and the sizes below
    vocabulary.json     the text of each token
    LAYER/COLUMN.npy    memory-mapped, so that one feature is read without the others

A feature fires at a token where its activation exceeds `threshold`, which is 0 but for dense coders such as neurons.
Letters: K and R examples, C tokens of context before and after, M tokens counted, J neighbours, I tokens of effects,
H bins, Z layers of the decoder's reach. Empty places at the end hold -1 as number and 0 as value.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jclt.shapes import Float, Int

FORMAT, VERSION = "jclt-features", 1
SETTINGS, UNFINISHED_SETTINGS, VOCABULARY, UNFINISHED = (
    "settings.json",
    "settings.partial.json",
    "vocabulary.json",
    "unfinished",
)

BINS = 64
FIRST_BIN = 2 * (127 - 16)
"""The number, as `find_bins` counts, of the histogram's first bin, which begins at 2^-16."""
BIN_EDGES = np.array([2.0 ** (n // 2 - 16) * (1.0, 1.5)[n % 2] for n in range(BINS + 1)])
"""Two bins for each doubling, from 2^-16 to 2^16. Values beyond either end count in the bin there."""


@dataclass(frozen=True)
class Sizes:
    """How much is kept of each feature."""

    top: int = 20  # K, examples with the highest activations
    sample: int = 20  # R, examples drawn at random
    context: int = 16  # C, tokens shown before and after an example's
    tokens: int = 64  # M, tokens whose firings are counted
    neighbours: int = 10  # J, other features of the layer
    effects: int = 10  # I, tokens whose logits it raises, and as many that it lowers


class Column(NamedTuple):
    """A column's type, and the letters of its axes after F."""

    dtype: str  # "token": uint16 or uint32, by the vocabulary
    axes: str
    meaning: str


EXAMPLES = {
    "value": Column("float32", "", "its activation"),
    "row": Column("int32", "", "the row of the data; -1: no example"),
    "position": Column("int32", "", "the position in the row"),
    "tokens": Column("token", "W", "positions - C to position + C of the row; 0 outside of the row"),
    "activations": Column("float32", "W", "the feature's at these tokens; 0 where it does not fire"),
}
"""The columns of examples; `top_` and `sample_` stand before their names, K or R before their axes."""

COLUMNS: dict[str, Column] = {
    "threshold": Column("float32", "", "it fires where its activation is higher"),
    "count": Column("int64", "", "tokens at which it fires"),
    "sum": Column("float64", "", "of its activations at these tokens"),
    "maximum": Column("float32", "", "its highest activation; 0 if it never fires"),
    "histogram": Column("uint32", "H", "how many of its activations are in each bin"),
    **{f"top_{name}": column._replace(axes="K" + column.axes) for name, column in EXAMPLES.items()},
    **{f"sample_{name}": column._replace(axes="R" + column.axes) for name, column in EXAMPLES.items()},
    "token_ids": Column("int32", "M", "tokens at which it fires, most frequent first"),
    "token_counts": Column("int64", "M", "how often; exact, or up to `token_missed` too low"),
    "token_missed": Column("int64", "", "the most firings that any token's count may lack; 0: all are exact"),
    "next_ids": Column("int32", "M", "tokens that follow where it fires, most frequent first"),
    "next_counts": Column("int64", "M", "how often"),
    "next_missed": Column("int64", "", "the most that any of these counts may lack"),
    "cofiring_ids": Column("int32", "J", "features of the layer that fire with it most often, on some of the rows"),
    "cofiring_counts": Column("int64", "J", "at how many tokens of these rows"),
    "cofiring_own": Column("int64", "", "at how many tokens of these rows it fires itself"),
    "raised_ids": Column("int32", "I", "tokens whose logits it raises most"),
    "raised_effects": Column("float32", "I", "by how much at activation 1, up to the final norm's denominator"),
    "lowered_ids": Column("int32", "I", "tokens whose logits it lowers most"),
    "lowered_effects": Column("float32", "I", "by how much"),
    "decoder_norms": Column("float32", "Z", "of the vectors that it writes, by target layer"),
    "encoder_ids": Column("int32", "J", "features of the layer with the most similar encoder rows"),
    "encoder_cosines": Column("float32", "J", "how similar"),
    "decoder_ids": Column("int32", "J", "the same of what they write, summed over target layers"),
    "decoder_cosines": Column("float32", "J", "how similar"),
}


def find_axis_sizes(sizes: Sizes, features: int, reach: int) -> dict[str, int]:
    """The length of each axis of a layer's columns."""
    return {
        "K": sizes.top,
        "R": sizes.sample,
        "W": 2 * sizes.context + 1,
        "M": sizes.tokens,
        "J": min(sizes.neighbours, features - 1),
        "I": sizes.effects,
        "H": BINS,
        "Z": reach,
    }


def find_token_type(vocabulary: int) -> str:
    return "uint16" if vocabulary <= 1 << 16 else "uint32"


def find_layout(column: Column, sizes: Sizes, settings: Mapping[str, Any], layer: int) -> tuple[str, tuple[int, ...]]:
    """The type and shape of a column of the layer with this index."""
    axes = find_axis_sizes(sizes, settings["features"], settings["reach"][layer])
    dtype = find_token_type(settings["vocabulary"]) if column.dtype == "token" else column.dtype
    return dtype, (settings["features"], *(axes[letter] for letter in column.axes))


def find_bins(values: Float[np.ndarray, "E"]) -> Int[np.ndarray, "E"]:
    """The bin of each positive float32: by its exponent and the first bit of its fraction, so that edges are exact."""
    return np.clip((np.asarray(values, np.float32).view(np.uint32) >> 22).astype(np.int64) - FIRST_BIN, 0, BINS - 1)
