"""Names of groups by known concepts: strength, choice and scores, on features made by hand."""

import numpy as np
import pytest

import jclt
from jclt.features.group_names import (
    KnownPrompts,
    choose_statement,
    draw_group,
    draw_prompts,
    list_known,
    measure_strength,
    read_known_prompts,
    score_name,
)
from jclt.graphs import Supernode
from jclt.world import TASKS

OHIO, IOWA, BIRD = ("state", "Ohio"), ("state", "Iowa"), ("relation", "bird")
TRUE = [{OHIO, BIRD}] * 6 + [{OHIO}] * 4 + [{IOWA, BIRD}] * 6 + [{IOWA}] * 14


def make_prompts(*features: dict[int, float]) -> KnownPrompts:
    """One layer; what each feature is in which prompts."""
    strongest = np.zeros((len(TRUE), 1, len(features)), np.float32)
    for number, values in enumerate(features):
        strongest[list(values), 0, number] = list(values.values())
    return KnownPrompts(TRUE, strongest)


def test_a_group_is_as_strong_as_the_weakest_of_three_quarters_of_its_members():
    prompts = make_prompts({0: 4.0, 1: 1.0}, {0: 1.0, 1: 5.0}, {0: 2.0}, {0: 3.0, 1: 1.0})
    members = [(0, number, 2.0) for number in range(4)]
    np.testing.assert_allclose(
        measure_strength(prompts, members)[:3], [1.0, 0.5, 0]
    )  # 2, 1.5, 1, 0.5; 2.5, 0.5, 0.5, 0
    np.testing.assert_allclose(measure_strength(prompts, members[:2])[:2], [0.5, 0.5])
    np.testing.assert_allclose(measure_strength(prompts, [(0, 0, 4.0)])[:2], [1.0, 0.25])


def test_what_members_say_together_is_chosen():
    """Each member fires for another state too; only the two together say one."""
    mixed = make_prompts(dict.fromkeys(range(16), 1.0), {n: 1.0 for n in (*range(10), *range(16, 30))})
    both, first = [(0, 0, 1.0), (0, 1, 1.0)], [(0, 0, 1.0)]
    assert choose_statement(mixed, both, [OHIO, BIRD]) == OHIO
    assert choose_statement(mixed, first, [OHIO]) is None  # a purity of 10 / 16
    assert choose_statement(mixed, both, [IOWA]) is None
    assert choose_statement(make_prompts(dict.fromkeys(range(4), 1.0)), first, [OHIO]) is None  # too few prompts
    assert choose_statement(make_prompts(dict.fromkeys(range(10, 30), 1.0)), first, [IOWA]) is None  # true of too many
    few = make_prompts({**dict.fromkeys(range(8), 3.0), 20: 4.0})
    assert choose_statement(few, first, [OHIO]) == OHIO
    scores = score_name(few, first, OHIO)
    assert scores["purity"] == pytest.approx(24 / 28)
    assert scores["detection"] == pytest.approx((8 / 9 + 19 / 21) / 2)
    assert score_name(few, [], OHIO) == score_name(make_prompts({0: 1.0}), first, OHIO) == {}


def test_random_groups_are_of_the_same_layers_and_positions():
    random = np.random.default_rng(0)
    places = [(layer, position, number) for layer in range(2) for position in range(2) for number in range(5)]
    group = Supernode("x", ((0, 0, 1), (0, 0, 3), (1, 0, 4)), 0.1)
    drawn = draw_group(places, group, random)
    assert not {*drawn} & {*group.features} and len({*drawn}) == len(drawn)
    assert sorted(x[:2] for x in drawn) == sorted(x[:2] for x in group.features)
    assert draw_group(list(group.features), group, random) == []


def test_only_what_can_be_known_at_a_position_names_a_group():
    example = TASKS["two_hop"].examples("report", 1, 0)[0]
    city, relation = (concept.position for concept in example.concepts[:2])
    assert ("state", "Colorado") in list_known(example, city) and ("state", "Colorado") not in list_known(
        example, city - 1
    )
    assert ("relation", "capital") not in list_known(example, relation - 1)
    explaining, held_out = draw_prompts("two_hop", example.prompt)
    prompts = [x.prompt for x in explaining], [x.prompt for x in held_out]
    assert not {*prompts[0]} & {*prompts[1]} and example.prompt not in prompts[0] + prompts[1]


def test_activations_are_the_strongest_of_each_prompt():
    model = jclt.load_model("demo")
    coder = jclt.load_coder("demo", model=model, check=False)
    groups = TASKS["addition"].examples("report", 3, seed=0), TASKS["athlete"].examples("report", 2, seed=0)
    known = read_known_prompts(model, coder, groups)
    assert [len(prompts.true) for prompts in known] == [3, 2]
    for prompts, examples in zip(known, groups, strict=True):
        for example, true, strongest in zip(examples, *prompts, strict=True):
            seen = jclt.run(model, example.prompt, capture=("mlp_in",))[1]["mlp_in"]
            for layer in range(4):
                want = np.asarray(coder.encode(layer, seen[layer][None]))[0, 1:].max(axis=0)
                np.testing.assert_allclose(strongest[layer], want, atol=1e-3)
            assert {(concept.name, concept.value) for concept in example.concepts} <= true
