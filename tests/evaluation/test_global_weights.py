"""Virtual weights and co-activation against loops, and grids of operands that are made by hand."""

import numpy as np
import pytest
from traced_graphs import make_case

import jclt
from jclt.coders import neurons
from jclt.errors import UserError
from jclt.evaluation.global_weights import choose_often_active, measure_global_weights
from jclt.evaluation.operand_grids import label_grid
from jclt.world.handmade import PROMPTS, STATE_OF_CITY, build_two_hop


def test_global_weights_are_those_of_loops_over_tokens():
    model, coder, _ = make_case("gpt2", "clt", "float32")
    rows = np.random.default_rng(0).integers(0, model.config.vocabulary, (5, 6)).astype(np.int32)
    features = choose_often_active(model, coder, rows, 4)
    found = measure_global_weights(model, coder, rows, features)
    _, seen = jclt.run(model, rows, capture=("mlp_in",))
    active = [np.asarray(coder.encode(i, seen["mlp_in"][i]), np.float64).reshape(30, -1) for i in range(3)]
    counts = np.array([(active[layer] > 0).sum(axis=0) for layer in range(3)])
    assert [counts[layer, number] for layer, number in features[:4]] == np.sort(counts[0])[::-1][:4].tolist()
    gain = np.asarray(model.params["mlp_norm_gain"], np.float64)
    for j, (target, of_target) in enumerate(features):
        row = np.asarray(coder.encoder(int(target))[0], np.float64)[of_target] * gain[target]
        row = row - row.mean()
        for i, (source, of_source) in enumerate(features):
            rows_of = np.asarray(coder.decoder_rows(int(source)), np.float64)[of_source]
            weight = sum(rows_of[layer - source] @ row for layer in range(source, target))
            a, b = active[target][:, of_target], active[source][:, of_source]
            assert found.virtual[j, i] == pytest.approx(weight, rel=1e-4, abs=1e-5)
            assert found.era[j, i] == pytest.approx(((a > 0) * b).mean() * weight, rel=1e-4, abs=1e-5)
            assert found.twera[j, i] == pytest.approx((a * b).mean() / a.mean() * weight, rel=1e-4, abs=1e-5)
            assert found.together[j, i] == pytest.approx(((a > 0) & (b > 0)).mean())
    with pytest.raises(UserError, match=r"expected \[m, 2\]: layers \(0, 1, 2\)"):
        measure_global_weights(model, coder, rows, features + 3)


def test_in_the_handmade_model_a_city_writes_its_state_alone():
    model = build_two_hop()
    features = np.array([(0, city) for city in range(12)] + [(1, state) for state in range(4)])
    found = measure_global_weights(model, neurons(model), np.asarray(PROMPTS, np.int32), features)
    want = 2.0 * (np.array(STATE_OF_CITY)[None] == np.arange(4)[:, None])
    np.testing.assert_allclose(found.virtual[12:, :12], want, atol=1e-6)
    # Each city is active on 1 of 36 tokens, at 0.5; its state on 3 of them.
    np.testing.assert_allclose(found.era[12:, :12], want * 0.5 / 36, atol=1e-7)
    np.testing.assert_allclose(found.twera[12:, :12], want * 0.5 / 3, atol=1e-7)
    assert found.measure_interference(0.25) == {"largest positive": 0, "largest negative": 1, "all": 0.75}


def test_grids_get_the_label_of_their_shape():
    a, b = np.indices((100, 100))
    shapes = {
        "bar": [a // 10 == 3, b % 10 == 6, 2.0 * (a % 2 == 0)],
        "diagonal": [(a + b) % 10 == 5, (a + b) // 10 == 7],
        "grid": [(a % 10 == 6) & (b % 10 == 9), (a // 10 == 3) & (b // 10 == 5)],
        "mostly active": [a + 1.0, a + b > 5],
        "other": [(a * b) % 7 == 3, np.zeros((100, 100))],
    }
    for label, grids in shapes.items():
        assert [label_grid(np.asarray(grid, np.float64)) for grid in grids] == [label] * len(grids)
