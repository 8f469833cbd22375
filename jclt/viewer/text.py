"""A graph as a newcomer first meets it: a few lines of text, and its files."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jclt.errors import UserError
from jclt.files import new_file, write_bytes
from jclt.graphs import Graph, describe, load_graph, strongest_paths
from jclt.graphs.export_json import encoded, export_json, slug_of
from jclt.graphs.viewer_index import write_index
from jclt.viewer.picture import write_picture

PATHS = 3
MEANING = (
    "completeness: of what reaches the nodes of a graph, the part that is no error; replacement: of what reaches its "
    "outputs, the part that comes from the prompt and not from errors; what was pruned counts as error"
)
SUFFIXES = (".npz", ".json", ".png")

Labels = Mapping[tuple[int, int], str]


def summary(graph: Graph, small: Graph, paths: int = PATHS) -> str:
    """What the graph explains, how much of it, and the strongest paths of its pruned form."""
    outputs = zip(graph.logit_names, graph.logit_tokens.tolist(), graph.logit_probabilities, strict=True)
    # Only a token has a probability; a difference or a direction has a name alone.
    named = ", ".join(f"{name!r} {chance:.3f}" if token >= 0 else repr(name) for name, token, chance in outputs)
    whole, pruned, edges = graph.scores, small.scores, int(np.count_nonzero(small.adjacency))
    lines = [
        f"explains {named}",
        f"{len(graph.features)} active features: completeness {whole.completeness:.2f}, replacement "
        f"{whole.replacement:.2f}; pruned to {len(small.features)} features and {edges} edges: completeness "
        f"{pruned.completeness:.2f}, replacement {pruned.replacement:.2f}",
        *(f"  {describe(small, path)}" for path in strongest_paths(small, paths)),
    ]
    return "\n".join(lines)


def write_graph(graph: Graph, small: Graph, folder: Path, name: str | None = None, labels: Labels | None = None) -> str:
    """The whole graph as `NAME.npz`; its pruned form as a viewer's `NAME.json`, listed in the folder's index, and as a
    picture, `NAME.png`: all of them or none. Returns the name, by default one made from the prompt that no other graph
    in the folder has."""
    name = _checked(name) if name is not None else free_name(graph, folder, slug_of(graph))
    arrays, content, picture = (folder / f"{name}{suffix}" for suffix in SUFFIXES)
    viewed = encoded(export_json(small, slug=name, labels=labels), content)
    with new_file(arrays) as beside, new_file(picture) as drawn:
        graph.save(beside)
        write_picture(small, drawn, labels=labels, title="".join(graph.token_texts))
        write_bytes(content, viewed)
    write_index(folder)
    return name


def write_viewer_json(graph: Graph, folder: Path, name: str, labels: Labels | None = None) -> None:
    """The graph's pruned form as a viewer's `NAME.json`; `write_index` lists those of a folder when all are there."""
    export_json(graph.prune(), folder / f"{_checked(name)}.json", slug=name, labels=labels)


def free_name(graph: Graph, folder: Path, slug: str) -> str:
    """The slug, numbered where it is the name of another graph: of another prompt, or made in another way."""
    number, name = 1, slug
    while any(os.path.lexists(folder / f"{name}{suffix}") for suffix in SUFFIXES):
        try:
            there = load_graph(folder / f"{name}.npz")
        except UserError:
            pass  # whatever it is, it is not this graph
        else:
            if there.tokens.tolist() == graph.tokens.tolist() and there.provenance == graph.provenance:
                return name
        number += 1
        name = f"{slug}-{number}"
    return name


def _checked(name: str) -> str:
    if name in ("", ".", "..") or Path(name).name != name:
        raise UserError(f"name '{name}': expected the name of a file, without folders")
    return name
