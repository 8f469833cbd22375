"""`jclt circuit`: which nodes or edges matter to a model's answers, and whether they give them alone."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from jclt.cli.arguments import Subcommands, load_coder_and_model
from jclt.cli.circuit_arguments import ACDC, add_circuit_arguments, check_circuit_arguments
from jclt.errors import UserError

if TYPE_CHECKING:
    from jclt.circuits import EdgeScores, NodeScores
    from jclt.evaluation import CircuitGrades
    from jclt.interventions import PromptPairs
    from jclt.models import Model

IG, ABLATION = "eap ig inputs", "counterfactual"
LISTED = 1000
"""Nodes in a file, where no --size says how many."""


def add_command(commands: Subcommands) -> None:
    command = commands.add_parser(
        "circuit",
        help="find the nodes or edges that matter to answers, and grade circuits of them",
        description="Scores the nodes or edges of a model on pairs of prompts, and prints the best. A score estimates "
        "how the metric changes if one of them alone has its value of the corrupted prompt: negative ones support "
        "the answer. With --grade the model runs on other pairs with all but the best ablated, beside random circuits: "
        "faithfulness is 1 where a circuit does all that the model does, completeness 0 where the rest does nothing of "
        "it; CPR and CMD are the areas under faithfulness and between it and 1.",
        epilog="example: jclt circuit demo --task agreement --grade --size 50 200; jclt circuit demo --task agreement "
        "--edges --json circuit.json; jclt circuit demo --task ioi --edges --method acdc --threshold 0.05 --count 4; "
        "jclt circuit smollm2 --pairs ioi.csv --edges --method eap --ablation zero --grade; jclt circuit demo --task "
        "agreement --read circuit.json --grade",
    )
    command.add_argument("model", metavar="MODEL", help="demo, smollm2, a folder, a GGUF file or a hub name")
    add_circuit_arguments(command)
    command.set_defaults(function=run)


def run(arguments: argparse.Namespace) -> None:
    check_circuit_arguments(arguments)
    coder = None
    if arguments.coder is None:
        from jclt.models import load_model

        model = load_model(arguments.model)
    else:
        model, coder = load_coder_and_model(arguments)
    of_edges = arguments.edges or arguments.read is not None
    (explain_edges if of_edges else explain_nodes)(arguments, model, *draw_pairs(arguments, model), coder)


def draw_pairs(arguments: argparse.Namespace, model: "Model") -> "tuple[PromptPairs, PromptPairs | None]":
    """The pairs that choose, and those that grade."""
    from jclt.interventions import load_pairs, make_world_pairs

    count = arguments.count
    if arguments.task is not None:
        chosen = make_world_pairs(model, arguments.task, count, "train")
        return chosen, make_world_pairs(model, arguments.task, count, "report") if arguments.grade else None
    pairs = load_pairs(model, arguments.pairs)
    if not arguments.grade:
        return pairs.take(range(min(count, len(pairs)))), None
    if len(pairs) < 2:
        raise UserError(f"{arguments.pairs}: 1 pair is left, expected at least 2 with --grade")
    return pairs.take(range(0, len(pairs), 2)[:count]), pairs.take(range(1, len(pairs), 2)[:count])


def explain_nodes(
    arguments: argparse.Namespace, model: "Model", chosen: "PromptPairs", graded: "PromptPairs | None", coder: Any
) -> None:
    from jclt.circuits import score_nodes
    from jclt.evaluation import grade_nodes

    chosen, graded = keep_one_length(chosen, graded)
    reference: Any = "zero" if arguments.ablation == "zero" else "corrupted"
    basis, metric = coder or arguments.nodes, arguments.metric or "logit_difference"
    scores = score_nodes(model, chosen, basis, arguments.method or "relp", metric=metric, reference=reference)
    print(scores.summarize())
    grades: list[CircuitGrades] = []
    if graded is not None:
        ablation = arguments.ablation or "mean"
        sizes = None if arguments.size is None else sorted(set(arguments.size))
        grades = grade_nodes(model, graded, scores, sizes, ablation=ablation, mean_of=chosen)
        print_grades(graded, grades)
    if arguments.json is not None:
        write_nodes(arguments.json, scores, max(arguments.size or [LISTED]), grades)


def keep_one_length(chosen: "PromptPairs", graded: "PromptPairs | None") -> "tuple[PromptPairs, PromptPairs | None]":
    """Nodes are at positions, so all prompts have one length."""
    kept = chosen.keep_one_length(graded), None if graded is None else graded.keep_one_length(chosen)
    if any(len(old) > len(new) for old, new in zip((chosen, graded), kept, strict=True) if old is not None and new):
        print(f"of prompts of {len(kept[0].clean[0])} tokens, as nodes are at positions")
    return kept


def write_nodes(path: Path, scores: "NodeScores", count: int, grades: "list[CircuitGrades]") -> None:
    """The best nodes and the grades."""
    from jclt.circuits.nodes import locate_nodes
    from jclt.files import write_json

    places = locate_nodes(scores.values.shape, scores.rank_nodes()[:count]).tolist()
    nodes = [
        {"layer": scores.layers[layer], "position": t, "unit": unit, "score": float(scores.values[layer, t, unit])}
        for layer, t, unit in places
    ]
    settings = {name: getattr(scores, name) for name in ("method", "rules", "metric", "reference")}
    content = {"basis": scores.basis.name, **settings, "pairs": len(scores.pairs), "total": scores.values.size}
    write_json(path, content | {"nodes": nodes, "grades": [grade.summary() for grade in grades]})
    print(f"written: {path}")


def explain_edges(
    arguments: argparse.Namespace, model: "Model", chosen: "PromptPairs", graded: "PromptPairs | None", coder: None
) -> None:
    from jclt.circuits import make_edge_graph, save_circuit
    from jclt.circuits.edges import list_edges, prune_edges
    from jclt.evaluation import grade_edges
    from jclt.evaluation.circuit_grades import check_sizes

    sizes = None if arguments.size is None else sorted(set(arguments.size))
    if sizes is not None:
        check_sizes(sizes, int(list_edges(model.config).sum()))
    if arguments.read is not None:
        scores, by, sizes = read_circuit(arguments, model, sizes)
    elif arguments.method == ACDC:
        scores, by, sizes = search_circuit(arguments, model, chosen)
    else:
        scores = score_pairs(arguments, model, chosen, arguments.method or IG)
        by = [scores]
        print(scores.summarize())
    grades: list[CircuitGrades] = []
    if graded is not None:
        ablation: Any = by[0].ablation
        grades = grade_edges(model, graded, by, sizes, ablation=ablation, mean_of=chosen)
        print_grades(graded, grades)
    kept = None if sizes is None else prune_edges(model.config, by[0].take_best(sizes[-1]))
    if arguments.json is not None:
        save_circuit(arguments.json, scores, kept, {"grades": [grade.summary() for grade in grades]})
        print(f"written: {arguments.json}")
    if arguments.out is not None:
        make_edge_graph(scores, kept).save(arguments.out)
        print(f"written: {arguments.out}")


def score_pairs(arguments: argparse.Namespace, model: "Model", chosen: "PromptPairs", method: str) -> "EdgeScores":
    from jclt.circuits import score_edges

    metric, ablation = arguments.metric or "logit_difference", arguments.ablation or ABLATION
    return score_edges(model, chosen, method, metric=metric, ablation=ablation)


def search_circuit(
    arguments: argparse.Namespace, model: "Model", chosen: "PromptPairs"
) -> "tuple[EdgeScores, list[EdgeScores], list[int]]":
    """ACDC: its circuit as scores, 1 for its edges and 0 for all others; the scores whose best edges are graded,
    which are these and those within whose best it began, if any; and its size."""
    from jclt.circuits import find_circuit

    beside, start = [], None
    if arguments.within is not None:
        beside = [score_pairs(arguments, model, chosen, IG)]
        start = beside[0].take_best(arguments.within)
    loss: Any = arguments.metric or "kl"
    ablation = arguments.ablation or ABLATION
    circuit = find_circuit(model, chosen, arguments.threshold, metric=loss, ablation=ablation, start=start)
    size = int(circuit.kept.sum())
    if not size:
        raise UserError(f"circuit: no edge is left at --threshold {arguments.threshold}, expected a smaller one")
    print(f"{circuit!r} after {circuit.passes} passes", *circuit.names, sep="\n  ")
    made = {"method": ACDC, "metric": arguments.metric or "logit_difference", "ablation": ablation}
    scores = score_kept(model, circuit.kept, f"{len(chosen)} pairs", made)
    return scores, [scores, *beside], [size]


def read_circuit(
    arguments: argparse.Namespace, model: "Model", sizes: list[int] | None
) -> "tuple[EdgeScores, list[EdgeScores], list[int] | None]":
    """The scores of a file; the scores whose best edges are graded; and their sizes. Without sizes it is the circuit of
    the file, if not all edges are in it."""
    from jclt.circuits import load_circuit
    from jclt.circuits.edges import list_edges
    from jclt.circuits.node_runs import Ablation

    scores, kept = load_circuit(model, arguments.read)
    ablation = arguments.ablation or (scores.ablation if scores.ablation in get_args(Ablation) else ABLATION)
    graded = replace(scores, metric=arguments.metric or scores.metric, ablation=ablation)
    size, total = int(kept.sum()), int(list_edges(model.config).sum())
    print(scores.summarize(), f"circuit of {size:,} of {total:,} edges", sep="\n")
    if sizes is None and 0 < size < total:
        made = {"method": "circuit", "metric": graded.metric, "ablation": ablation}
        return scores, [score_kept(model, kept, scores.source, made)], [size]
    if not scores.values.any():
        raise UserError(f"{arguments.read}: has no scores, expected some, or a circuit and no --size")
    return scores, [graded], sizes


def score_kept(model: "Model", kept: Any, source: str, made: dict[str, str]) -> "EdgeScores":
    """A circuit as scores: 1 for its edges, and 0 for all others."""
    from jclt.circuits.edge_files import make_edge_scores

    return make_edge_scores(model.config, kept.astype("float32"), source, made)


def print_grades(graded: "PromptPairs", grades: "list[CircuitGrades]") -> None:
    print(f"graded on others: {graded!r}")
    for grade in grades:
        print(f"\n{grade}")
