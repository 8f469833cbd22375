"""Summarizes a graph in a few lines of text, and writes all files of a graph."""

import os
from collections.abc import Sequence
from pathlib import Path

from jclt.errors import UserError, escape_unprintable
from jclt.features import Features
from jclt.files import create_file, write_bytes
from jclt.graphs import Graph, Supernode, add_supernodes, describe, load_graph, strongest_paths, suggest_supernodes
from jclt.graphs.adjacency import count_edges
from jclt.graphs.export_json import export_json, slug_of
from jclt.graphs.names import shorten_label
from jclt.graphs.viewer_index import write_index
from jclt.graphs.viewer_json import encode_json
from jclt.viewer.feature_files import write_feature_files
from jclt.viewer.picture import write_picture

PATHS, GROUP_LETTERS = 3, 80
SCORES_EXPLAINED = (
    "completeness: of what reaches the nodes of a graph, the part that is no error; replacement: of what reaches its "
    "outputs, the part that comes from the prompt and not from errors; what was pruned counts as error"
)
SUFFIXES = (".npz", ".json", ".png")


def summarize_graph(graph: Graph, pruned: Graph, paths: int = PATHS, supernodes: Sequence[Supernode] = ()) -> str:
    """The outputs that the graph explains, its scores before and after pruning, the strongest paths of the pruned
    graph, and supernodes."""
    scores, pruned_scores, edges = graph.scores, pruned.scores, count_edges(pruned.adjacency)
    chosen, heads = graph.provenance.get("chosen"), graph.provenance.get("chosen_heads")
    lines = [
        f"explains {describe_outputs(graph)}",
        *([describe_chosen(**chosen)] if chosen else ()),
        *([describe_heads(**heads)] if heads else ()),
        f"{len(graph.features)} active features: completeness {scores.completeness:.2f}, replacement "
        f"{scores.replacement:.2f}; pruned to {len(pruned.features)} features and {edges} edges: completeness "
        f"{pruned_scores.completeness:.2f}, replacement {pruned_scores.replacement:.2f}",
        *(f"  {describe(pruned, path)}" for path in strongest_paths(pruned, paths)),
        *(f"  supernode {describe_supernode(group)}" for group in supernodes),
    ]
    return "\n".join(lines)


def describe_outputs(graph: Graph) -> str:
    """Only tokens have probabilities; a difference of tokens or a direction has only a name."""
    outputs = zip(graph.logit_names, graph.logit_tokens.tolist(), graph.logit_probabilities, strict=True)
    return ", ".join(f"{name!r} {chance:.3f}" if token >= 0 else repr(name) for name, token, chance in outputs)


def describe_supernode(group: Supernode) -> str:
    scores = "".join(f", {name} {score:.2f}" for name, score in group.scores.items())
    name = escape_unprintable(shorten_label(group.name, GROUP_LETTERS))
    return f"{name}: {len(group.features)} features, {group.share:.1%} of the influence{scores}"


def describe_chosen(nodes: int, of: int, share_of_score: float) -> str:
    return f"nodes are {nodes} of {of} active features, with {share_of_score:.1%} of the influence to first order"


def describe_heads(nodes: int, of: int, share_of_values: float) -> str:
    return f"heads that are nodes: {nodes} of {of}, with {share_of_values:.1%} of the sum of the sizes of their values"


def write_graph(
    graph: Graph, pruned: Graph, folder: Path, name: str | None = None, features: Features | None = None
) -> str:
    """Writes all files of a graph, or none if one of them fails, and updates the folder's index. Returns their name; by
    default it is made from the prompt and numbered if another graph has it.

    NAME.npz   the graph
    NAME.json  the pruned graph for viewers
    NAME.png   a picture of the pruned graph
    features/  a file for viewers of each feature of the pruned graph, if they are described
    """
    name = _check_name(name) if name is not None else find_free_name(graph, folder, slug_of(graph))
    arrays, content, picture = (folder / f"{name}{suffix}" for suffix in SUFFIXES)
    scan = None if features is None else write_feature_files(pruned, features, folder)
    encoded = encode_json(export_json(pruned, slug=name, scan=scan), content)
    with create_file(arrays) as partial_arrays, create_file(picture) as partial_picture:
        graph.save(partial_arrays)
        write_picture(pruned, partial_picture, title="".join(graph.token_texts))
        write_bytes(content, encoded)
    write_index(folder)
    return name


def write_viewer_json(
    graph: Graph, folder: Path, name: str, features: Features | None = None, supernodes: bool = False
) -> None:
    """Prunes the graph and writes it as `NAME.json` for viewers, and files of its features if they are described;
    perhaps with suggested supernodes. Does not update the folder's index; call `write_index` after the last graph."""
    path, pruned = folder / f"{_check_name(name)}.json", graph.prune()
    if supernodes:
        pruned = add_supernodes(pruned, suggest_supernodes(pruned))
    scan = None if features is None else write_feature_files(pruned, features, folder)
    export_json(pruned, path, slug=name, scan=scan)


def find_free_name(graph: Graph, folder: Path, slug: str) -> str:
    """The slug, or the slug with a number if the files of this name are those of another graph: of another prompt, or
    with other provenance."""
    number, name = 1, slug
    while any(os.path.lexists(folder / f"{name}{suffix}") for suffix in SUFFIXES):
        try:
            other = load_graph(folder / f"{name}.npz")
        except UserError:
            pass  # no graph, so the name is taken
        else:
            if other.tokens.tolist() == graph.tokens.tolist() and other.provenance == graph.provenance:
                return name
        number += 1
        name = f"{slug}-{number}"
    return name


def _check_name(name: str) -> str:
    if name in ("", ".", "..") or Path(name).name != name:
        raise UserError(f"name '{name}': expected the name of a file, without folders")
    return name
