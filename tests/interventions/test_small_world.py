"""In the small world a city's state is known: its features, set to those of another state, move the answer."""

import numpy as np
import pytest

import jclt
from jclt.evaluation.exchange import read_forms, score_features, select_largest
from jclt.models import SiteEdit
from jclt.models.site_edits import Set
from jclt.world.example import find_position
from jclt.world.facts import ASKED, CITIES, CITY_SPLIT, STATE_OF, STATES, value_of
from jclt.world.measure import get_vocabulary

FORM = ASKED[0]
LAYERS = (0, 1, 2)
PAIRS = 20


@pytest.fixture(scope="module")
def demo():
    model = jclt.load_model("demo")
    return model, jclt.load_coder("demo", model=model)


def choose_pairs() -> list[tuple[str, str]]:
    """Cities of different states, none of which chose the features."""
    random, tested = np.random.default_rng(0), [city for city in CITIES if CITY_SPLIT[city] == "report"]
    every = [(a, b) for a in tested for b in tested if STATE_OF[a] != STATE_OF[b]]
    return [every[i] for i in random.permutation(len(every))[:PAIRS]]


def choose_features(model, coder) -> dict[str, set[tuple[int, int]]]:
    """Layer and number of each state's 32 features with the largest effect on its capital, on known cities."""
    known = [i for i, city in enumerate(CITIES) if CITY_SPLIT[city] != "report"]
    forms = read_forms(model, coder, LAYERS, "from the city on")
    chosen = select_largest(score_features(model, coder, LAYERS, forms, known), 32)
    return {
        state: {(LAYERS[layer], int(feature)) for layer, feature in np.argwhere(sets).tolist()}
        for state, sets in zip(STATES, chosen, strict=True)
    }


def find_supernode(graph: jclt.Graph, features: set[tuple[int, int]], city: int) -> list[int]:
    """The nodes of a state's features, from the city on."""
    nodes = graph.nodes
    return [
        node
        for node in nodes.find("feature").tolist()
        if (nodes.layer[node], nodes.index[node]) in features and nodes.position[node] >= city
    ]


def move(edits: list[SiteEdit], by: int) -> list[SiteEdit]:
    """The same edits at other positions."""
    moved = []
    for edit in edits:
        layer, position, feature = (int(x[0]) for x in (edit.ranges.layer, edit.ranges.position, edit.ranges.index))
        moved.append(Set(edit.value, layer=layer, position=position + by, feature=feature))
    return moved


@pytest.mark.exhaustive  # slow; test_two_hop.py swaps the state of a compiled model in a plain run
def test_swapping_the_states_supernode_moves_the_capital_and_only_at_the_right_place(demo, one_form):
    model, coder = demo
    features = choose_features(model, coder)
    pairs = choose_pairs()
    prompts = {city: FORM.format(city=city, relation="capital") for pair in pairs for city in pair}
    graphs = dict(zip(prompts, jclt.attribute_batch(model, coder, list(prompts.values())), strict=True))
    city = find_position(prompts[pairs[0][0]], pairs[0][0])
    length = len(graphs[pairs[0][0]].tokens)
    vocabulary = get_vocabulary(model)
    right, wrong = [], []
    for ours, theirs in pairs:
        members = (find_supernode(graphs[name], features[STATE_OF[name]], city) for name in (ours, theirs))
        edits = jclt.swap_nodes(graphs[ours], next(members), graphs[theirs], next(members))
        answer = vocabulary[f" {value_of(STATE_OF[theirs], 'capital')}"]
        for where, chosen in ((right, edits), (wrong, move(edits, city - length))):
            result = jclt.intervene(
                model, coder, prompts[ours], chosen, layers=(0, 2), attention="free", norms="free", predict=False
            )
            where.append(result.logits[-1].argmax() == answer)
            assert result.original_logits[-1].argmax() != answer
    assert np.mean(right) >= 0.9 and np.mean(wrong) <= 0.05, (np.mean(right), np.mean(wrong))
