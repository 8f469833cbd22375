"""The shipped coder keeps what its model knows, by the bars it was chosen for, on prompts withheld from training."""

import numpy as np
import pytest

import jclt
from jclt.coders import find_coder
from jclt.evaluation import evaluate_reconstruction, exchange_states, measure_world_agreement
from jclt.training.presets import CODER_PRESETS
from jclt.world import make_corpus


@pytest.fixture(scope="module")
def model():
    return jclt.load_model("demo")


@pytest.fixture(scope="module")
def coder(model):
    return jclt.load_coder("demo", model=model)


def test_it_is_small_and_what_the_preset_makes(coder):
    assert sum(path.stat().st_size for path in find_coder("demo").rglob("*") if path.is_file()) <= 8_000_000
    config = CODER_PRESETS["small-world"]().coder
    assert (coder.config.kind, coder.config.activation) == ("clt", "jumprelu")
    assert (coder.config.features, coder.config.reads) == (config.features, config.reads)


def test_it_is_sparse_and_faithful_on_text_of_another_seed(model, coder):
    rows = make_corpus(1600, 64, seed=7, vocabulary=model.tokenizer.backend.get_vocab()).tokens
    found = evaluate_reconstruction(model, coder, rows)
    assert found.l0.sum() <= 24
    assert found.nmse.mean() <= 0.02
    assert np.mean(found.density == 0) <= 0.15


def test_the_replacement_model_answers_as_the_model_does(model, coder):
    found = measure_world_agreement(model, coder, 150, split="report")
    assert found.overall.agreement >= 0.98
    assert found.tasks[found.weakest()].agreement >= 0.90
    assert found.overall.ablated_agreement < 0.1


@pytest.mark.parametrize("relation", ["capital", "river"])
def test_exchanging_a_states_features_moves_the_answer(model, coder, relation):
    """Of all layers but the last. Chosen by what they do for the capital, they move the river too: they are the
    state's."""
    found = exchange_states(model, coder, layers=(0, 1, 2), size=16, relation=relation)
    assert found.moved >= 0.85 and found.control < 0.1
    assert all(len(features) <= 16 for features in found.features.values())
