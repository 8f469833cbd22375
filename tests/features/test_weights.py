"""What weights say, in float64: logits that are raised and lowered, norms, features that are alike."""

import numpy as np
import pytest
from features_of_random_coders import SIZES, make_coder, make_model

from jclt.coders import neurons
from jclt.features.weights import describe_weights


@pytest.fixture(scope="module")
def model():
    return make_model()


def rank(values: np.ndarray, count: int) -> np.ndarray:
    return np.argsort(-values, axis=1)[:, :count]


@pytest.mark.parametrize("basis", ["clt", "neurons"])
def test_effects_norms_and_neighbours_equal_float64(model, basis):
    coder = neurons(model) if basis == "neurons" else make_coder(model)
    columns = describe_weights(model, coder, 1, SIZES)
    rows = np.asarray(coder.decoder_rows(1), np.float64)
    np.testing.assert_allclose(columns["decoder_norms"], np.linalg.norm(rows, axis=2), rtol=1e-5)
    written = rows.sum(1)
    gain = np.asarray(model.params["final_norm_gain"], np.float64)
    effects = (written - written.mean(1, keepdims=True)) * gain @ np.asarray(model.params["unembedding"], np.float64).T
    effects -= effects.mean(1, keepdims=True)
    for name, sign in (("raised", 1), ("lowered", -1)):
        want = rank(sign * effects, SIZES.effects)
        np.testing.assert_array_equal(columns[f"{name}_ids"], want)
        np.testing.assert_allclose(
            columns[f"{name}_effects"], np.take_along_axis(effects, want, 1), rtol=1e-4, atol=1e-6
        )
    for name, x in (("encoder", np.asarray(coder.encoder(1)[0], np.float64)), ("decoder", written)):
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        cosines = unit @ unit.T - 3 * np.eye(len(unit))
        want = rank(cosines, SIZES.neighbours)
        np.testing.assert_array_equal(columns[f"{name}_ids"], want)
        np.testing.assert_allclose(columns[f"{name}_cosines"], np.take_along_axis(cosines, want, 1), atol=1e-5)


def test_a_vocabulary_smaller_than_what_is_asked_for_leaves_places_empty(model):
    from dataclasses import replace

    columns = describe_weights(model, make_coder(model), 0, replace(SIZES, effects=30))
    assert (columns["raised_ids"][:, 23:] == -1).all() and (columns["raised_ids"][:, :23] >= 0).all()
