"""How far from a perturbation the local replacement model still does what the model does.

The residual stream is pushed after a layer, at one position, in three ways:

    encoder    along the encoder of a feature that is active in the next layer, by a tenth of the stream's norm
    random     in a random direction, as far
    upstream   by taking away what an active feature writes to this layer

The net perturbation is the stream with the push minus that without it, at all positions, after each later layer. That
of the local replacement model (patterns and norms frozen, features recomputed) is compared with that of the model, in
which all reacts: by the cosine, and by |difference|^2 / |model's|^2. The control is the same with MLPs that do not
react: most of a push reaches the next layers along the residual stream, whatever MLPs do.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from jclt.coders import Coder
from jclt.evaluation.intervals import Figure, average_prompts
from jclt.evaluation.perturbations import Prepared, draw_like, list_writes, prepare_prompt, push_prompt
from jclt.models import Model
from jclt.shapes import Float, Int

PER_LAYER = 4
"""Pushes of each kind after each layer."""
SIZE = 0.1
"""The norm of a push, as a share of the stream's."""
PAPER = {"cosine": "about 0.8", "error": "about 0.4"}
"""One layer later; further away the direction degrades slowly, and the error grows much."""


def measure_distances(
    model: Model, coder: Coder, prompts: Sequence[Int[np.ndarray, "_"]], *, seed: int = 0
) -> dict[str, Figure]:
    """Means over prompts, by the kind of push and the number of layers after it."""
    generator = np.random.default_rng(seed)
    found: dict[tuple[str, int, str], list[tuple[float, float]]] = defaultdict(list)
    for prompt in prompts:
        of_prompt: dict[tuple[str, int, str], list[tuple[float, float]]] = defaultdict(list)
        prepared = prepare_prompt(model, coder, prompt)
        kinds, layers, values = list_local_pushes(prepared, generator)
        reactions = push_prompt(prepared, layers, values, local=True)
        for row, kind in enumerate(kinds):
            for layer in range(layers[row] + 1, model.config.layers):
                before = prepared.streams.layers[layer, 0, : prepared.length]
                true, *others = (s.layers[layer, row, : prepared.length] - before for s in reactions)
                for name, values_of in zip(
                    PAPER, zip(*(compare_directions(true, o) for o in others), strict=True), strict=True
                ):
                    of_prompt[kind, int(layer - layers[row]), name].append(values_of)
        for key, pairs in of_prompt.items():
            found[key].append(tuple(np.mean(pairs, axis=0).tolist()))
    figures = {}
    for kind, distance, name in sorted(found):
        replaced, fixed = np.transpose(found[kind, distance, name])
        paper = PAPER[name] if distance == 1 else ""
        key = f"{kind}, {distance} layer{'s' * (distance > 1)} later: {name}"
        figures[key] = average_prompts(replaced, control=fixed.tolist(), paper=paper, seed=seed)
    return figures


def compare_directions(true: Float[np.ndarray, "T D"], other: Float[np.ndarray, "T D"]) -> tuple[float, float]:
    """The cosine, and the squared error as a share of the true square."""
    a, b = true.astype(np.float64).ravel(), other.astype(np.float64).ravel()
    lengths = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / lengths) if lengths else float("nan"), float((a - b) @ (a - b) / (a @ a or np.nan))


def list_local_pushes(
    prepared: Prepared, generator: np.random.Generator
) -> tuple[list[str], Int[np.ndarray, "B"], Float[np.ndarray, "B T D"]]:
    """The kind of each push, its layer, and what is added at each position."""
    coder, streams = prepared.coder, prepared.streams.layers
    kinds, layers, values = [], [], []
    for layer in range(prepared.model.config.layers - 1):
        pushes: list[tuple[str, int, np.ndarray]] = []
        index = coder.config.index(layer + 1)
        if index is not None:
            active = np.asarray(prepared.original.activations[index, 0, : prepared.length])
            strongest = np.argsort(-active, axis=None, kind="stable")[:PER_LAYER]
            rows = np.asarray(coder.encoder(index)[0])
            for position, feature in zip(*np.unravel_index(strongest, active.shape), strict=True):
                if active[position, feature] > 0:
                    norm = SIZE * np.linalg.norm(streams[layer, 0, position])
                    direction = rows[feature] * norm / np.linalg.norm(rows[feature])
                    pushes.append(("encoder", int(position), direction))
                    pushes.append(("random", int(position), draw_like(direction[None, None], generator)[0, 0]))
        writes = list_writes(prepared, layer, PER_LAYER)
        pushes += [("upstream", position, -write) for position, write, _ in writes]
        for kind, position, value in pushes:
            kinds.append(kind)
            layers.append(layer)
            values.append(np.zeros(streams.shape[2:], np.float32))
            values[-1][position] = value
    rows = (prepared.model.config.layers - 1) * 3 * PER_LAYER  # one program, whatever is active
    padded = np.zeros((rows, *streams.shape[2:]), np.float32)
    padded[: len(values)] = values if values else 0
    return kinds, np.array(layers + [0] * (rows - len(layers)), np.int32), padded
