"""What do the groups of features that `jclt demo` suggests do in the model, and what does the one for the state hold?

    python experiments/group_effects.py

Sets each group of one graph of each task to zero, beside random groups; sets the group of the state to what questions
about other cities have there; and counts in which prompts of all tasks it fires. Expected: 26 groups, 20 of which move
the outputs more than all of 20 random groups, 14 more than all with as much influence; the capital changes for 29 of 29
cities; 100% of the group's strength is in prompts of its state. Cost: 4 minutes on one CPU core.
"""

import sys

import numpy as np

from jclt import UserError, attribute_batch, load_coder, load_model
from jclt.coders import Coder
from jclt.features.concepts import draw_examples
from jclt.features.group_names import (
    draw_prompts,
    find_holding,
    list_units,
    measure_strength,
    name_by_concepts,
    read_known_prompts,
)
from jclt.graphs import Graph, Supernode, suggest_supernodes
from jclt.graphs.supernodes import find_members
from jclt.interventions import measure_supernodes
from jclt.models import Model
from jclt.viewer.page_interventions import change_nodes
from jclt.world import TASKS, Example
from jclt.world.facts import CITY_SPLIT, STATE_OF, value_of

STATE = ("state", "Colorado")


def main() -> None:
    model = load_model("demo")
    coder = load_coder("demo", model=model)
    examples = {name: task.examples("report", 1, seed=0)[0] for name, task in TASKS.items()}
    graphs = attribute_batch(model, coder, [example.prompt for example in examples.values()], batch=len(examples))
    set_all_to_zero(model, coder, graphs)
    example, graph = examples["two_hop"], graphs[list(examples).index("two_hop")]
    known = read_known_prompts(model, coder, draw_prompts("two_hop", example.prompt))
    groups = name_by_concepts(coder, graph, suggest_supernodes(graph.prune()), example, *known)
    state = next(group for group in groups if group.name == " = ".join(STATE))
    ask_about_other_cities(model, coder, graph, example, state)
    count_firing(model, coder, graph, state)


def set_all_to_zero(model: Model, coder: Coder, graphs: list[Graph]) -> None:
    effects = [
        effect
        for graph in graphs
        for effect in measure_supernodes(
            model, coder, graph.tokens, graph, suggest_supernodes(graph.prune()), random=20
        )
    ]
    for effect in effects:
        print(f"  {effect}, agreement {effect.agreement:.2f}")
    print(f"{len(effects)} groups of {len(graphs)} graphs")
    for name, beaten in (
        ("random groups", [effect.beaten for effect in effects]),
        ("groups with about as much influence", [effect.count_beaten(effect.comparable) for effect in effects]),
    ):
        all_beaten, half = beaten.count(20), sum(count >= 10 for count in beaten)
        print(
            f"{name}: each moves more than at least {min(beaten)} of 20, {half} than at least 10, {all_beaten} than all"
        )
    print(f"agreement of at least {np.nanmin([effect.agreement for effect in effects]):.2f}", flush=True)


def ask_about_other_cities(model: Model, coder: Coder, graph: Graph, example: Example, state: Supernode) -> None:
    """Of the cities for which training never asked this."""
    city = next(concept.value for concept in example.concepts if concept.name == "city")
    members, changed = list(find_members(graph, [state])[0]), list[bool]()
    others = [x for x, split in CITY_SPLIT.items() if split != "train" and STATE_OF[x] != STATE[1]]
    for other in others:
        prompt = example.prompt.replace(city, other)
        outputs = change_nodes(model, coder, graph, members, {"prompt": prompt}).outputs
        answer = outputs.names[outputs.probability_after.argmax()]
        changed.append(answer.strip() == value_of(STATE_OF[other], "capital"))
    states = len({STATE_OF[other] for other in others})
    cities = f"{sum(changed)} of {len(others)} cities"
    print(f"set to another city's: the capital changed for {cities}, of {states} states", flush=True)


def count_firing(model: Model, coder: Coder, graph: Graph, state: Supernode) -> None:
    units = list_units(coder, graph)
    members = [units[place] for place in state.features]
    for name, prompts in zip(
        ("that explain", "held out"), read_known_prompts(model, coder, draw_examples()), strict=True
    ):
        strength = measure_strength(prompts, members)
        share = strength[find_holding(prompts, STATE)].sum() / strength.sum()
        print(f"prompts of all tasks {name}: {share:.0%} of its strength is in those of {STATE[1]}")


if __name__ == "__main__":
    try:
        main()
    except UserError as reason:
        sys.exit(str(reason))
