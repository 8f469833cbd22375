"""What is known of each feature, read from the files of `columns.py`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jclt.array_files import map_array
from jclt.errors import UserError
from jclt.features.columns import (
    BIN_EDGES,
    COLUMNS,
    FORMAT,
    SETTINGS,
    UNFINISHED_SETTINGS,
    VERSION,
    VOCABULARY,
    Sizes,
    find_layout,
)
from jclt.files import read_json
from jclt.shapes import Float, Int


class Example(NamedTuple):
    """A place of the data where the feature fires, with the tokens around it."""

    row: int
    position: int
    value: float  # the activation there
    start: int  # the position of the first token shown
    tokens: tuple[str, ...]
    activations: tuple[float, ...]  # of the feature at these tokens
    ids: tuple[int, ...]

    @property
    def token(self) -> str:
        return self.tokens[self.position - self.start]

    def mark(self, share: float = 0.5) -> str:
        """The text, with brackets around tokens whose activation is at least this share of the example's."""
        marked = zip(self.tokens, self.activations, strict=True)
        return "".join(f"[{text}]" if a > 0 and a >= share * self.value else text for text, a in marked)


@dataclass(frozen=True)
class FeatureRecord:
    """All that is known of one feature. Lists begin with the largest."""

    layer: int
    feature: int
    tokens: int  # of the data
    count: int  # tokens at which it fires: its activation exceeds `threshold`
    threshold: float
    mean: float  # of its activations where it fires
    maximum: float
    histogram: Int[np.ndarray, "H"]  # by `columns.BIN_EDGES`
    top: tuple[Example, ...]  # the highest activations, at most one of each row
    sample: tuple[Example, ...]  # one firing at random of each of some rows drawn at random, highest first
    fires_on: tuple[tuple[str, int], ...]  # tokens, and how often
    fires_on_missed: int  # the most that each of these counts may lack
    followed_by: tuple[tuple[str, int], ...]  # the tokens after those it fires on
    followed_by_missed: int
    fires_with: tuple[tuple[int, int], ...]  # features of its layer, and at how many of the tokens that were looked at
    raises: tuple[tuple[str, float], ...]  # tokens, and by how much their logits
    lowers: tuple[tuple[str, float], ...]
    decoder_norms: Float[np.ndarray, "Z"]  # by target layer
    reads_like: tuple[tuple[int, float], ...]  # features of its layer, and the cosine of encoder rows
    writes_like: tuple[tuple[int, float], ...]  # and the cosine of decoder rows, summed over target layers

    @property
    def density(self) -> float:
        """The share of tokens at which it fires."""
        return self.count / self.tokens

    def quantile(self, share: float) -> float:
        """The activation that this share of its activations do not exceed: the upper edge of the histogram's bin."""
        reached = np.cumsum(self.histogram) >= share * self.count
        return float(min(BIN_EDGES[1 + np.argmax(reached)], self.maximum)) if self.count else 0.0

    def group_sample(self, groups: int) -> list[tuple[Example, ...]]:
        """The random examples in groups of about the same size, from those with the highest activations down."""
        borders = [len(self.sample) * n // groups for n in range(groups + 1)]
        return [self.sample[a:b] for a, b in zip(borders, borders[1:], strict=False)]

    def describe(self, examples: int = 5) -> str:
        """A text of a few lines."""
        head = f"layer {self.layer} feature {self.feature}: fires at {self.count} of {self.tokens} tokens"
        if not self.count:
            lines = [head]
        else:
            missed = f" (or up to {self.fires_on_missed} more)" if self.fires_on_missed else ""
            lines = [f"{head} ({self.density:.2%}), mean {self.mean:.3g}, maximum {self.maximum:.3g}"]
            lines += [f"  on {_list_pairs(self.fires_on)}{missed}", f"  followed by {_list_pairs(self.followed_by)}"]
        lines += [f"  raises {_list_texts(self.raises)}", f"  lowers {_list_texts(self.lowers)}"]
        lines += [f"  {example.value:8.3g}  {example.mark()!r}" for example in self.top[:examples]]
        return "\n".join(lines)


def _list_pairs(pairs: tuple[tuple[str, int], ...]) -> str:
    return ", ".join(f"{text!r} {count}x" for text, count in pairs[:8]) or "-"


def _list_texts(pairs: tuple[tuple[str, float], ...]) -> str:
    return ", ".join(repr(text) for text, _ in pairs[:8]) or "-"


def summarize(features: "Features") -> str:
    """A table of all layers."""
    tokens = features.settings["tokens"]
    lines = [
        f"{tokens} tokens of '{features.settings['data']['name']}'",
        "layer  features  that fire      L0  median density",
    ]
    for layer in features.layers:
        counts = features.column(layer, "count")
        fire = counts[counts > 0]
        median = f"{np.median(fire) / tokens:14.3%}" if len(fire) else f"{'-':>14}"
        lines.append(f"{layer:5}  {len(counts):8}  {len(fire):9}  {counts.sum() / tokens:6.1f}  {median}")
    return "\n".join(lines)


@dataclass(frozen=True, repr=False)
class Features:
    """Described features; `features[layer, feature]` is the record of one, by the model's layer."""

    folder: Path
    settings: Mapping[str, Any]
    sizes: Sizes

    def __repr__(self) -> str:
        s = self.settings
        return (
            f"<Features of '{s['coder']['name']}': {len(self.layers)} layers of {s['features']}, {s['tokens']} tokens>"
        )

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.settings["layers"])

    def __len__(self) -> int:
        return len(self.layers) * self.settings["features"]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """The layers and numbers of all features."""
        return ((layer, feature) for layer in self.layers for feature in range(self.settings["features"]))

    @cached_property
    def vocabulary(self) -> list[str]:
        """The text of each token."""
        path = self.folder / VOCABULARY
        texts = read_json(path).get("tokens")
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{path}: 'tokens' is damaged, expected a list of texts")
        return texts

    @cached_property
    def _columns(self) -> dict[tuple[int, str], np.ndarray]:
        return {}

    def column(self, layer: int, name: str) -> np.ndarray:
        """One column of all features of a layer, memory-mapped (`columns.COLUMNS`)."""
        self.check(layer)
        if (layer, name) not in self._columns:
            index = self.layers.index(layer)
            dtype, shape = find_layout(COLUMNS[name], self.sizes, self.settings, index)
            path = self.folder / str(layer) / f"{name}.npy"
            array = map_array(path, f"{dtype} of shape {list(shape)}")
            if array.shape != shape or array.dtype != dtype:
                raise UserError(f"{path}: {array.dtype} of shape {list(array.shape)}, expected {dtype} {list(shape)}")
            self._columns[layer, name] = array
        return self._columns[layer, name]

    def check(self, layer: int, feature: int = 0) -> None:
        """An error of one line if there is no such feature."""
        if layer not in self.layers:
            raise UserError(f"layer {layer}: expected one of {', '.join(map(str, self.layers))}")
        if not 0 <= feature < self.settings["features"]:
            raise UserError(f"feature {layer}/{feature}: expected a number from 0 to {self.settings['features'] - 1}")

    def __getitem__(self, place: tuple[int, int]) -> FeatureRecord:
        layer, feature = int(place[0]), int(place[1])
        self.check(layer, feature)

        def get(name: str) -> Any:
            return np.asarray(self.column(layer, name)[feature])

        def pair(ids: str, values: str) -> Iterator[tuple[int, Any]]:
            return ((i, x) for i, x in zip(get(ids).tolist(), get(values).tolist(), strict=True) if i >= 0)

        def name_tokens(ids: str, values: str) -> tuple[tuple[str, Any], ...]:
            return tuple((self.text(i), x) for i, x in pair(ids, values))

        count = int(get("count"))
        return FeatureRecord(
            layer=layer,
            feature=feature,
            tokens=self.settings["tokens"],
            count=count,
            threshold=float(get("threshold")),
            mean=float(get("sum")) / max(count, 1),
            maximum=float(get("maximum")),
            histogram=get("histogram").astype(np.int64),
            top=tuple(self._read_examples(layer, feature, "top")),
            sample=tuple(sorted(self._read_examples(layer, feature, "sample"), key=lambda x: -x.value)),
            fires_on=name_tokens("token_ids", "token_counts"),
            fires_on_missed=int(get("token_missed")),
            followed_by=name_tokens("next_ids", "next_counts"),
            followed_by_missed=int(get("next_missed")),
            fires_with=tuple(pair("cofiring_ids", "cofiring_counts")),
            raises=name_tokens("raised_ids", "raised_effects"),
            lowers=name_tokens("lowered_ids", "lowered_effects"),
            decoder_norms=get("decoder_norms"),
            reads_like=tuple(pair("encoder_ids", "encoder_cosines")),
            writes_like=tuple(pair("decoder_ids", "decoder_cosines")),
        )

    def text(self, token: int) -> str:
        return self.vocabulary[token] if token < len(self.vocabulary) else str(token)

    def _read_examples(self, layer: int, feature: int, kind: str) -> Iterator[Example]:
        values, rows, positions, tokens, activations = (
            self.column(layer, f"{kind}_{name}")[feature]
            for name in ("value", "row", "position", "tokens", "activations")
        )
        context, length = self.sizes.context, self.settings["length"]
        for n in range(len(rows)):
            if rows[n] >= 0:
                position = int(positions[n])
                start, stop = max(0, position - context), min(length, position + context + 1)
                shown = slice(start - position + context, stop - position + context)
                ids = tuple(tokens[n, shown].tolist())
                texts = tuple(map(self.text, ids))
                yield Example(
                    int(rows[n]), position, float(values[n]), start, texts, tuple(activations[n, shown].tolist()), ids
                )


def load_features(folder: str | Path) -> Features:
    """The features that `describe_features` wrote to a folder. Nothing is read before it is asked for."""
    folder = Path(folder)
    path = folder / SETTINGS
    if not path.exists() and (folder / UNFINISHED_SETTINGS).exists():
        raise UserError(f"{folder}: not finished, expected the same `jclt features` to be run again to its end")
    settings = read_json(path, "a folder made by `jclt features`, with its settings.json")
    if settings.get("format") != FORMAT or settings.get("version") != VERSION:
        raise UserError(
            f"{path}: not described features of version {VERSION}, expected a folder made by `jclt features`"
        )
    return Features(folder, settings, read_sizes(settings, path))


def read_sizes(settings: Mapping[str, Any], path: Path) -> Sizes:
    """The sizes, after a check of all that readers use."""
    kinds: dict[str, Any] = {"layers": list, "reach": list, "features": int, "tokens": int, "length": int}
    kinds |= {"vocabulary": int, "sizes": dict, "coder": dict}
    for name, kind in kinds.items():
        if not isinstance(settings.get(name), kind):
            raise UserError(f"{path}: '{name}' is damaged, expected what `jclt features` wrote")
    try:
        return Sizes(**{str(name): int(size) for name, size in settings["sizes"].items()})
    except (TypeError, ValueError):
        raise UserError(
            f"{path}: 'sizes' is damaged, expected numbers named {', '.join(Sizes.__annotations__)}"
        ) from None
