"""The measures show nothing for an untrained model, and find planted effects."""

import jax
import numpy as np
import pytest

from jclt.models import Model, declare, find_model, load_tokenizer
from jclt.training.presets import small_world
from jclt.world import measure
from jclt.world.facts import ASKED, CITIES, STATE_OF, STATES
from jclt.world.measure import answer_examples, measure_accuracy, measure_swaps, probe, probe_states
from jclt.world.tasks import TASKS


@pytest.fixture(scope="module")
def untrained() -> Model:
    config = small_world().model
    weights = declare(config)
    keys = jax.random.split(jax.random.key(0), len(weights))

    @jax.jit
    def draw(keys):
        return {name: weight.init(key, np.float32) for key, (name, weight) in zip(keys, weights.items(), strict=True)}

    return Model(config, draw(list(keys)), load_tokenizer(find_model("demo")), "untrained")


def test_an_untrained_model_answers_nothing(untrained, share_program):
    share_program(30)
    assert all(share < 0.2 for name, share in measure_accuracy(untrained, count=30).items() if name != "greater_than")


def test_padding_does_not_change_answers(untrained):
    by_length = {len(untrained.encode(e.prompt)): e for e in TASKS["induction"].examples("report", 6, seed=0)}
    *examples, longest = [by_length[length] for length in sorted(by_length)[-3:]]
    *batched, _ = answer_examples(untrained, [*examples, longest])
    separate = [answer_examples(untrained, [example])[0] for example in examples]
    assert len(examples) == 2
    assert [a.predicted for a in batched] == [a.predicted for a in separate]
    np.testing.assert_allclose([a.probability for a in batched], [a.probability for a in separate], rtol=1e-4)


def test_swaps_cover_every_layer_and_move_nothing_here(untrained, monkeypatch):
    monkeypatch.setattr(measure, "ASKED", ASKED[:1])
    swaps = measure_swaps(untrained, partners=1)
    assert {swap.layer for swap in swaps} == set(range(untrained.config.layers))
    assert len(swaps) == 3 * untrained.config.layers
    assert all(swap.moved < 0.3 for swap in swaps)


def test_probe_finds_what_is_there():
    random = np.random.default_rng(0)
    states = np.array([STATES.index(STATE_OF[city]) for city in CITIES])
    noise = random.normal(size=(100, 32))
    assert probe(noise) < 0.3
    assert probe(noise + 8 * np.eye(10, 32)[states]) > 0.95


def test_state_is_not_in_the_embeddings(untrained):
    assert probe_states(untrained)["embeddings"] < 0.3
