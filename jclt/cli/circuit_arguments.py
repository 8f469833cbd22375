"""The arguments of `jclt circuit`, and what can be said of them before anything is loaded."""

import argparse
from pathlib import Path
from typing import Any, get_args

from jclt.cli.arguments import add_fit_arguments, check_new_file, make_int_parser, parse_amount
from jclt.errors import UserError

ACDC = "acdc"


def add_circuit_arguments(command: argparse.ArgumentParser) -> None:
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
    what.add_argument(
        "--read",
        type=Path,
        metavar="FILE",
        help="edges from a file that --json or EAP-IG wrote: its circuit, or with --size circuits of its best edges; "
        "metric and ablation are the file's unless others are given",
    )
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


def check_circuit_arguments(arguments: argparse.Namespace) -> None:
    """All that can be known before anything is loaded."""
    from jclt.circuits import BASES, EDGE_METHODS
    from jclt.circuits.edge_files import FILE as CIRCUIT_FILE
    from jclt.circuits.edge_methods import EdgeMetric
    from jclt.circuits.node_runs import Ablation
    from jclt.circuits.node_scores import METHODS
    from jclt.circuits.passes import GRADIENT_METRICS
    from jclt.files import check_file
    from jclt.world import TASKS

    def check(name: str, typed: str | None, known: Any) -> None:
        if typed is not None and typed not in known:
            raise UserError(f"circuit: --{name} '{typed}': does not exist, expected one of: {', '.join(known)}")

    edges = arguments.edges or arguments.read is not None
    check("task", arguments.task, TASKS)
    check("nodes", arguments.nodes, BASES)
    check("method", arguments.method, (*EDGE_METHODS, ACDC) if edges else METHODS)
    check("ablation", arguments.ablation, get_args(Ablation))
    check("metric", arguments.metric, get_args(EdgeMetric) if edges else GRADIENT_METRICS)
    if arguments.method is not None and arguments.read is not None:
        raise UserError("circuit: --method with --read, whose file has the scores")
    for name in ("threshold", "within"):
        if getattr(arguments, name) is not None and arguments.method != ACDC:
            raise UserError(f"circuit: --{name} is for --edges --method acdc")
    if arguments.method == ACDC and not arguments.threshold:
        raise UserError("circuit: --method acdc needs --threshold T above 0, such as 0.05")
    if arguments.method == ACDC and arguments.size:
        raise UserError("circuit: --size with --method acdc, whose circuit has one size")
    if arguments.out is not None and not edges:
        raise UserError("circuit: --out is the graph of edges, expected --edges or --read FILE")
    if arguments.read is not None:
        check_file(arguments.read, CIRCUIT_FILE)
    if arguments.pairs is not None:
        check_file(arguments.pairs, "a file of pairs of prompts")
    for path in (arguments.json, arguments.out):
        check_new_file(path)
