"""`jclt demo`: how the shipped model finds its answers."""

import argparse
from pathlib import Path

from jclt.cli.arguments import Subcommands, at_least


def add_command(commands: Subcommands) -> None:
    command = commands.add_parser(
        "demo",
        help="see how the shipped model finds its answers",
        description="For one prompt of each task of the small world, none of which the shipped model was trained on: "
        "its answer, its attribution graph by the shipped transcoder, how much of it that explains, and the strongest "
        "paths from the prompt to the answer. The graphs are written as .npz, as a viewer's .json and as a picture.",
    )
    command.add_argument("--out", type=Path, default=Path("demo"), help="the folder for the graphs (default demo)")
    command.add_argument("--seed", type=at_least(0), default=0, help="draws other prompts (default 0)")
    command.set_defaults(function=run)


def run(arguments: argparse.Namespace) -> None:
    from jclt.files import check_writable

    check_writable(arguments.out)
    print(explain_examples(arguments.out, arguments.seed))


def explain_examples(out: Path, seed: int = 0) -> str:
    """What the shipped model answers, and how, by its graphs; their files lie in `out`."""
    from tqdm import tqdm

    from jclt.attribution import attribute_batch
    from jclt.coders import load_coder
    from jclt.models import load_model
    from jclt.viewer.text import MEANING, summary, write_graph
    from jclt.world import TASKS
    from jclt.world.measure import answers

    model = load_model("demo")
    coder = load_coder("demo", model=model, check=False)
    examples = [task.examples("report", 1, seed)[0] for task in TASKS.values()]
    with tqdm(
        total=2 * len(examples) + 1, desc="loading", leave=False, bar_format="{desc}: {bar} {elapsed}"
    ) as progress:
        given = answers(model, examples)
        progress.update()
        progress.set_description("computing graphs")
        graphs = attribute_batch(model, coder, [example.prompt for example in examples], batch=len(examples))
        progress.update(len(examples))
        blocks = []
        for example, answer, graph in zip(examples, given, graphs, strict=True):
            progress.set_description(f"drawing {example.task}")
            small = graph.prune()
            write_graph(graph, small, out, example.task)
            verdict = "right" if answer.right else f"wrong, expected {' or '.join(map(repr, example.answers[:3]))}"
            head = f"{example.task}: {example.prompt!r} -> {answer.said!r} {answer.probability:.3f} {verdict}"
            blocks.append(f"{head}\n{summary(graph, small)}")
            progress.update()
    right = sum(answer.right for answer in given)
    blocks.append(
        f"{right} of {len(given)} right; none of these prompts was in the training data. Graphs in {out}: NAME.npz "
        f"(jclt.load_graph), NAME.json (graph viewers), NAME.png\n{MEANING}"
    )
    return "\n\n".join(blocks)
