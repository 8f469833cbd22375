"""`jclt circuit`: which nodes or edges matter to a model's answers, and whether they give them alone."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from jclt.cli.arguments import (
    Subcommands,
    add_fit_arguments,
    check_new_file,
    load_coder_and_model,
    make_int_parser,
    parse_amount,
)
from jclt.errors import UserError

if TYPE_CHECKING:
    from jclt.circuits import EdgeScores, NodeScores
    from jclt.evaluation import CircuitGrades
    from jclt.interventions import PromptPairs
    from jclt.models import Model

ACDC, IG = "acdc", "eap ig inputs"
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
        "jclt circuit smollm2 --pairs ioi.csv --edges --method eap --ablation zero --grade",
    )
    command.add_argument("model", metavar="MODEL", help="demo, smollm2, a folder, a GGUF file or a hub name")
    prompts = command.add_mutually_exclusive_group(required=True)
    prompts.add_argument(
        "--pairs",
        type=Path,
        metavar="FILE",
        help="pairs of prompts with the fields clean, corrupted, answer and wrong_answer in each row, or in another "
        "layout (jclt/interventions); with --grade every second pair grades",
    )
    prompts.add_argument("--task", metavar="NAME", help="a task of the small world, such as agreement or ioi")
    command.add_argument(
        "--count",
        type=make_int_parser(1),
        default=24,
        metavar="N",
        help="at most N pairs choose, and as many others grade (default 24)",
    )
    add_what_arguments(command)
    command.add_argument(
        "--ablation",
        metavar="NAME",
        help="what stands in for all that is outside a circuit: mean (default of nodes), counterfactual (default of "
        "edges), zero or resample. Scores of edges are for the same; scores of nodes for the corrupted prompt, or for "
        "zero",
    )
    command.add_argument("--grade", action="store_true", help="also grade circuits of the best")
    command.add_argument(
        "--size",
        type=make_int_parser(1),
        nargs="+",
        metavar="N",
        help="sizes of circuits (default: from 0.1%% to 50%% of all); the largest one goes into the files",
    )
    command.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="also write scores, circuit and grades; of edges in the layout of EAP-IG and the MIB benchmark",
    )
    command.add_argument("--out", type=Path, metavar="FILE", help="edges: also write the circuit as a graph, FILE.npz")
    command.set_defaults(function=run)


def add_what_arguments(command: argparse.ArgumentParser) -> None:
    """What is scored, and how."""
    what = command.add_mutually_exclusive_group()
    what.add_argument(
        "--nodes",
        default="neurons",
        metavar="BASIS",
        help="neurons (default), heads, mlps, 'mlp outputs', attentions, streams, residual, embeddings, queries, keys "
        "or values, each at a layer and position",
    )
    what.add_argument("--edges", action="store_true", help="edges between heads and MLPs, over all positions")
    what.add_argument("--coder", help="the features of a coder: demo, or a folder in any known layout")
    add_fit_arguments(command)
    command.add_argument(
        "--method",
        metavar="NAME",
        help="of nodes relp (default), atp, gim, 'ig inputs', 'ig activations' or exact; of edges 'eap ig inputs' "
        "(default), eap, relp, 'clean corrupted', 'eap ig activations', 'information flow', exact or acdc, which "
        "removes one edge after the other",
    )
    command.add_argument(
        "--threshold", type=parse_amount, metavar="T", help="acdc: how much the loss rises by an edge that stays"
    )
    command.add_argument(
        "--within",
        type=make_int_parser(1),
        metavar="N",
        help="acdc: begin with the N best edges by 'eap ig inputs' (default: with all, a pass for each)",
    )
    command.add_argument(
        "--metric",
        metavar="NAME",
        help="logit_difference (default), probability or difference; of edges also kl, the default of acdc",
    )


def run(arguments: argparse.Namespace) -> None:
    check_circuit_arguments(arguments)
    coder = None
    if arguments.coder is None:
        from jclt.models import load_model

        model = load_model(arguments.model)
    else:
        model, coder = load_coder_and_model(arguments)
    (explain_edges if arguments.edges else explain_nodes)(arguments, model, *draw_pairs(arguments, model), coder)


def check_circuit_arguments(arguments: argparse.Namespace) -> None:
    """All that can be known before anything is loaded."""
    from jclt.circuits import BASES, EDGE_METHODS
    from jclt.circuits.edge_methods import EdgeMetric
    from jclt.circuits.node_runs import Ablation
    from jclt.circuits.node_scores import METHODS
    from jclt.circuits.passes import GRADIENT_METRICS
    from jclt.files import check_file
    from jclt.world import TASKS

    def check(name: str, typed: str | None, known: Any) -> None:
        if typed is not None and typed not in known:
            raise UserError(f"circuit: --{name} '{typed}': does not exist, expected one of: {', '.join(known)}")

    check("task", arguments.task, TASKS)
    check("nodes", arguments.nodes, BASES)
    check("method", arguments.method, (*EDGE_METHODS, ACDC) if arguments.edges else METHODS)
    check("ablation", arguments.ablation, get_args(Ablation))
    check("metric", arguments.metric, get_args(EdgeMetric) if arguments.edges else GRADIENT_METRICS)
    for name in ("threshold", "within"):
        if getattr(arguments, name) is not None and arguments.method != ACDC:
            raise UserError(f"circuit: --{name} is for --edges --method acdc")
    if arguments.method == ACDC and not arguments.threshold:
        raise UserError("circuit: --method acdc needs --threshold T above 0, such as 0.05")
    if arguments.method == ACDC and arguments.size:
        raise UserError("circuit: --size with --method acdc, whose circuit has one size")
    if arguments.out is not None and not arguments.edges:
        raise UserError("circuit: --out is the graph of edges, expected --edges")
    if arguments.pairs is not None:
        check_file(arguments.pairs, "a file of pairs of prompts")
    for path in (arguments.json, arguments.out):
        check_new_file(path)


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

    ablation = arguments.ablation or "counterfactual"
    sizes = None if arguments.size is None else sorted(set(arguments.size))
    if sizes is not None:
        check_sizes(sizes, int(list_edges(model.config).sum()))
    if arguments.method == ACDC:
        scores, beside, sizes = search_circuit(arguments, model, chosen, ablation)
    else:
        scores, beside = score_pairs(arguments, model, chosen, arguments.method or IG, ablation), []
        print(scores.summarize())
    grades: list[CircuitGrades] = []
    if graded is not None:
        grades = grade_edges(model, graded, [scores, *beside], sizes, ablation=ablation, mean_of=chosen)
        print_grades(graded, grades)
    kept = None if sizes is None else prune_edges(model.config, scores.take_best(sizes[-1]))
    if arguments.json is not None:
        save_circuit(arguments.json, scores, kept, {"grades": [grade.summary() for grade in grades]})
        print(f"written: {arguments.json}")
    if arguments.out is not None:
        make_edge_graph(scores, kept).save(arguments.out)
        print(f"written: {arguments.out}")


def score_pairs(
    arguments: argparse.Namespace, model: "Model", chosen: "PromptPairs", method: str, ablation: Any
) -> "EdgeScores":
    from jclt.circuits import score_edges

    return score_edges(model, chosen, method, metric=arguments.metric or "logit_difference", ablation=ablation)


def search_circuit(
    arguments: argparse.Namespace, model: "Model", chosen: "PromptPairs", ablation: Any
) -> "tuple[EdgeScores, list[EdgeScores], list[int]]":
    """ACDC: its circuit as scores, 1 for its edges and 0 for all others; the scores within whose best it began, if any;
    and its size."""
    import numpy as np

    from jclt.circuits import find_circuit
    from jclt.circuits.edge_files import make_edge_scores

    beside, start = [], None
    if arguments.within is not None:
        beside = [score_pairs(arguments, model, chosen, IG, ablation)]
        start = beside[0].take_best(arguments.within)
    loss: Any = arguments.metric or "kl"
    circuit = find_circuit(model, chosen, arguments.threshold, metric=loss, ablation=ablation, start=start)
    size = int(circuit.kept.sum())
    if not size:
        raise UserError(f"circuit: no edge is left at --threshold {arguments.threshold}, expected a smaller one")
    print(f"{circuit!r} after {circuit.passes} passes", *circuit.names, sep="\n  ")
    made = {"method": ACDC, "metric": arguments.metric or "logit_difference", "ablation": ablation}
    scores = make_edge_scores(model.config, circuit.kept.astype(np.float32), f"{len(chosen)} pairs", made)
    return scores, beside, [size]


def print_grades(graded: "PromptPairs", grades: "list[CircuitGrades]") -> None:
    print(f"graded on others: {graded!r}")
    for grade in grades:
        print(f"\n{grade}")
