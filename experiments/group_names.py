"""In how many graphs of held-out two-hop prompts does a suggested group of features tell the state?

    python experiments/group_names.py

Prompts of the same city neither choose nor score a name. Expected: of 40 prompts 16 have a group for the state, 40 one
for the relation. Cost: a minute on one CPU core.
"""

import sys
from collections import Counter

from jclt import UserError, attribute_batch, load_coder, load_model
from jclt.features.group_names import draw_prompts, name_by_concepts, read_known_prompts
from jclt.graphs import suggest_supernodes
from jclt.world import TASKS, Example

PROMPTS = 40


def find_city(example: Example) -> str:
    return next(concept.value for concept in example.concepts if concept.name == "city")


def main() -> None:
    model = load_model("demo")
    coder = load_coder("demo", model=model)
    examples, counts = TASKS["two_hop"].examples("report", PROMPTS, seed=0), Counter[str]()
    drawn = [
        [other for other in others if find_city(other) != find_city(example)]
        for example in examples
        for others in draw_prompts("two_hop", example.prompt)
    ]
    graphs = attribute_batch(model, coder, [example.prompt for example in examples])
    for example, graph, explaining, held_out in zip(examples, graphs, drawn[::2], drawn[1::2], strict=True):
        known = read_known_prompts(model, coder, [explaining, held_out])
        groups = name_by_concepts(coder, graph, suggest_supernodes(graph.prune()), example, *known)
        named = [group for group in groups if group.scores]
        counts.update({group.name.split(" = ")[0] for group in named})
        shown = [f"{x.name} ({len(x.features)} features, purity {x.scores['purity']:.2f})" for x in named]
        print(f"{example.prompt!r}: {', '.join(shown) or 'none'}", flush=True)
    for name, count in counts.most_common():
        print(f"{count:3} of {len(examples)} graphs have a group for: {name}")


if __name__ == "__main__":
    try:
        main()
    except UserError as reason:
        sys.exit(str(reason))
