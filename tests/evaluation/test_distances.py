"""Perturbations by distance: of the handmade model, whose neurons make an exact local replacement model."""

import numpy as np
import pytest
from handmade_coders import unfaithful_coder

from jclt.coders import neurons
from jclt.evaluation.distances import compare_directions, list_local_pushes, measure_distances
from jclt.evaluation.perturbations import prepare_prompt
from jclt.world.handmade import PROMPTS, build_two_hop


def test_directions_are_compared_by_hand():
    cosine, error = compare_directions(np.float32([[3, 4]]), np.float32([[3, 0]]))
    assert (cosine, error) == (pytest.approx(0.6), pytest.approx(16 / 25))
    assert np.isnan(compare_directions(np.zeros((1, 2), np.float32), np.float32([[3, 0]]))).all()


def test_neurons_follow_every_push_and_the_unfaithful_coder_none():
    """Taking away the city's neuron switches the state's off, which writes 4 * 0.5 = 2: |true|^2 = 1 + 4. Without a
    reaction the perturbation is the 1 alone."""
    model = build_two_hop()
    prompts = [np.asarray(PROMPTS[2], np.int32)]
    kinds, layers, values = list_local_pushes(
        prepare_prompt(model, neurons(model), prompts[0]), np.random.default_rng(0)
    )
    assert kinds == ["encoder", "random", "upstream"] and len(layers) == 12 and not values[3:].any()
    figures = measure_distances(model, neurons(model), prompts)
    assert all(figure.value == pytest.approx(float("cosine" in name), abs=1e-5) for name, figure in figures.items())
    lost = figures["upstream, 1 layer later: error"]
    assert lost.control == pytest.approx(4 / 5) and lost.paper == "about 0.4"
    found = measure_distances(model, unfaithful_coder(model), prompts)["upstream, 1 layer later: error"]
    assert found.value == pytest.approx(4 / 5) == found.control
