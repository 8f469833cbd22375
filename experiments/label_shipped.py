"""Label the features of the coder that ships, by the concepts of the small world, on held-out prompts.

python experiments/label_shipped.py                     # writes labels.json beside the coder
python experiments/label_shipped.py --out labels.json   # somewhere else
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from jclt import UserError, attribute_batch, load_coder, load_model
from jclt.coders import read_fingerprint
from jclt.features.concepts import PROMPTS, PURE, draw_examples, label_by_concepts
from jclt.features.label import label_features, summarize_labels
from jclt.features.labels import find_labels, save_labels
from jclt.features.statements import GENERAL
from jclt.world import TASKS

ROWS = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=find_labels("demo"))
    parser.add_argument("--prompts", type=int, default=PROMPTS, help=f"of each task (default {PROMPTS})")
    options = parser.parse_args()
    start, model = time.perf_counter(), load_model("demo")
    coder = load_coder("demo", model=model)
    labels = label_by_concepts(model, coder, *draw_examples(options.prompts))
    pure = {place: label for place, label in labels.items() if label.scores.get("purity", 0) >= PURE}
    save_labels(options.out, pure, read_fingerprint(coder))
    prompts = [task.examples("report", 1, seed=0)[0].prompt for task in TASKS.values()]
    graphs = [graph.prune() for graph in attribute_batch(model, coder, prompts, batch=len(prompts))]
    kept = sorted({(int(layer), int(feature)) for graph in graphs for layer, _, feature in graph.features})
    kinds = {"concepts": (), "or tokens": ("place", "token", "next"), "or tasks": GENERAL}
    for name, places in (("with a label by concepts", sorted(labels)), ("in the demo's pruned graphs", kept)):
        print(f"{len(places)} features {name}")
        for kind, allowed in kinds.items():
            of_kind = [labels[x] for x in places if x in labels and is_of_kind(labels[x].text, allowed)]
            shares = [
                sum(label.scores.get(score, 0) >= PURE for label in of_kind) / len(places)
                for score in ("purity", "pure_firings")
            ]
            means = {
                s: np.mean([x.scores[s] for x in of_kind if x.scores]) for s in ("purity", "shuffled", "detection")
            }
            print(
                f"  {kind:10} labelled {len(of_kind) / len(places):4.0%}, purity of at least {PURE} {shares[0]:4.0%} "
                f"(by firings {shares[1]:4.0%}); means: " + ", ".join(f"{s} {x:.2f}" for s, x in means.items())
            )
    print(f"{time.perf_counter() - start:.0f} seconds", flush=True)
    print(summarize_labels(label_features(model, coder, out=options.out, places=sorted(labels), rows=ROWS)))
    print(f"{time.perf_counter() - start:.0f} seconds; wrote {options.out}")


def is_of_kind(text: str, allowed: tuple[str, ...]) -> bool:
    name = text.replace(" is one of ", " = ").split(" = ")[0]
    return name not in GENERAL or name in allowed


if __name__ == "__main__":
    try:
        main()
    except UserError as reason:
        sys.exit(str(reason))
