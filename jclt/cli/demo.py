"""`jclt demo`: explains answers of the shipped model."""

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jclt.cli.arguments import Subcommands, make_int_parser
from jclt.cli.page import DESCRIBED, add_page_arguments, serve_graphs
from jclt.errors import UserError

if TYPE_CHECKING:
    from jclt.coders import Coder
    from jclt.graphs.names import LabelTexts
    from jclt.models import Model

log = logging.getLogger(__name__)

DESCRIBED_ROWS = 512
"""Rows of the small world from which the page's examples of features are taken: some seconds."""


def add_command(commands: Subcommands) -> None:
    command = commands.add_parser(
        "demo",
        help="see how the shipped model finds its answers",
        description="Takes one prompt of each task of the small world. The shipped model was not trained on these "
        "prompts. Prints the model's answer, how much of it the attribution graph explains, and the strongest paths "
        "from the prompt to the answer. Writes the graphs as .npz, as .json for viewers and as pictures.",
    )
    command.add_argument("--out", type=Path, default=Path("demo"), help="the folder for the graphs (default demo)")
    command.add_argument("--seed", type=make_int_parser(0), default=0, help="seed of the prompts (default 0)")
    command.add_argument("--open", action="store_true", help="show the graphs on a page, where they can be worked in")
    add_page_arguments(command)
    command.set_defaults(function=run)


def run(arguments: argparse.Namespace) -> None:
    from jclt.files import check_writable

    check_writable(arguments.out)
    print(explain_examples(arguments.out, arguments.seed))
    if arguments.open:
        serve_graphs(
            [arguments.out],
            arguments,
            load=load_demo,
            find_labels=find_demo_labels,
            features=describe_demo(arguments.out / DESCRIBED),
            first="two_hop",
            has_tour=True,
        )


def describe_demo(folder: Path) -> Path | None:
    """Describes the features of the shipped coder, unless the folder has that already."""
    from jclt.features import describe_features

    try:
        return describe_features(*load_demo(), rows=DESCRIBED_ROWS, out=folder).folder
    except UserError as error:
        log.warning("the page is without examples of features: %s", error)
        return None


def find_demo_labels(coder: "Coder") -> "LabelTexts":
    from jclt.coders import read_fingerprint
    from jclt.features.labels import load_label_texts

    return load_label_texts("demo", read_fingerprint(coder))


def load_demo() -> "tuple[Model, Any]":
    from jclt.coders import load_coder
    from jclt.models import load_model

    model = load_model("demo")
    return model, load_coder("demo", model=model, keep="device", check=False)


def explain_examples(out: Path, seed: int = 0) -> str:
    """Answers one prompt of each task, writes the graphs to `out` and describes them."""
    from tqdm import tqdm

    from jclt.attribution import attribute_batch
    from jclt.features.group_names import draw_prompts, name_by_concepts, read_known_prompts
    from jclt.features.labels import load_label_texts
    from jclt.graphs import add_supernodes, label_nodes, suggest_supernodes
    from jclt.viewer.text import SCORES_EXPLAINED, summarize_graph, write_graph
    from jclt.world import TASKS
    from jclt.world.measure import answer_examples

    model, coder = load_demo()
    labels = load_label_texts("demo")
    examples = [task.examples("report", 1, seed)[0] for task in TASKS.values()]
    drawn = [prompts for example in examples for prompts in draw_prompts(example.task, without=example.prompt)]
    with tqdm(
        total=2 * len(examples) + 2, desc="loading", leave=False, bar_format="{desc}: {bar} {elapsed}"
    ) as progress:
        answers = answer_examples(model, examples)
        progress.update()
        progress.set_description("computing graphs")
        graphs = attribute_batch(model, coder, [example.prompt for example in examples], batch=len(examples))
        progress.update(len(examples))
        progress.set_description("reading other prompts")
        known = read_known_prompts(model, coder, drawn)
        progress.update()
        blocks = []
        for example, answer, graph, *others in zip(examples, answers, graphs, known[::2], known[1::2], strict=True):
            progress.set_description(f"drawing {example.task}")
            graph = label_nodes(graph, labels)
            pruned = graph.prune()
            suggested = name_by_concepts(coder, graph, suggest_supernodes(pruned), example, *others)
            graph, pruned = add_supernodes(graph, suggested), add_supernodes(pruned, suggested)
            write_graph(graph, pruned, out, example.task)
            verdict = "right" if answer.right else f"wrong, expected {' or '.join(map(repr, example.answers[:3]))}"
            head = f"{example.task}: {example.prompt!r} -> {answer.predicted!r} {answer.probability:.3f} {verdict}"
            blocks.append(f"{head}\n{summarize_graph(graph, pruned, supernodes=suggested)}")
            progress.update()
    right = sum(answer.right for answer in answers)
    blocks.append(
        f"{right} of {len(answers)} right; none of these prompts was in the training data. Graphs in {out}: NAME.npz "
        f"(jclt.load_graph), NAME.json (graph viewers), NAME.png\n{SCORES_EXPLAINED}"
    )
    return "\n\n".join(blocks)
