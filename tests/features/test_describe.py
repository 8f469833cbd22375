"""Described features equal loops over all tokens; an interrupted pass ends in the same bytes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from features_of_random_coders import (
    FEATURES,
    LENGTH,
    ROWS,
    SIZES,
    VOCABULARY,
    describe_by_loops,
    draw_rows,
    encode_rows,
    make_coder,
    make_model,
    read_files,
)
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from random_coders import random_coder

import jclt
from jclt.coders import CoderConfig, abstract_coder, load_coder, neurons, save_coder
from jclt.errors import UserError
from jclt.features import Features, describe_features
from jclt.features import describe as describing
from jclt.features import rows as rows_of_data
from jclt.features.columns import COLUMNS, find_bins
from jclt.features.events import list_firing
from jclt.mesh import make_sharding
from jclt.models import Model, declare
from jclt.pods.collectives import find_collectives


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks and batches; two thirds of the rows are looked at for features that fire together."""
    monkeypatch.setattr(rows_of_data, "BLOCK_TOKENS", 9 * LENGTH)
    monkeypatch.setattr("jclt.features.block_events.BATCH_TOKENS", {"cpu": 4 * LENGTH})
    monkeypatch.setattr("jclt.features.events.CHUNK_TOKENS", {"cpu": 2 * LENGTH})
    monkeypatch.setattr("jclt.features.block_events.FIRST_SLOTS", 1)
    monkeypatch.setattr(rows_of_data, "COFIRING_TOKENS", 27 * LENGTH)


@pytest.fixture(scope="module")
def model():
    return make_model()


def split_model(model: Model, mesh: jax.sharding.Mesh) -> Model:
    axes = {name: weight.axes for name, weight in declare(model.config).items()}
    params = {name: jax.device_put(x, make_sharding(mesh, x.shape, axes[name])) for name, x in model.params.items()}
    return replace(model, params=params)


def check_counts(features: Features, activations: np.ndarray, rows: np.ndarray, layers: tuple[int, ...]) -> None:
    looked_at = [n for n in range(ROWS) if (n + 1) * 27 // ROWS > n * 27 // ROWS]
    for index, layer in enumerate(layers):
        thresholds = features.column(layer, "threshold")
        fires = activations[index] > thresholds
        others = fires & np.isin(np.arange(ROWS), looked_at)[:, None, None]
        for feature in range(features.settings["features"]):
            a = activations[index, :, :, feature]
            want = describe_by_loops(a, rows, thresholds[feature], others)
            got = {name: features.column(layer, name)[feature] for name in COLUMNS}
            record = features[layer, feature]
            assert got["count"] == want["count"] and got["maximum"] == pytest.approx(want["maximum"], rel=1e-4)
            assert got["sum"] == pytest.approx(want["sum"], rel=1e-4, abs=1e-6)
            np.testing.assert_array_equal(got["histogram"], want["histogram"])
            for kind in ("top", "sample"):
                check_examples(record, got, kind, want[kind], a, rows, thresholds[feature])
            for kind in ("token", "next"):
                check_frequencies(got[f"{kind}_ids"], got[f"{kind}_counts"], got[f"{kind}_missed"], want[kind])
            assert got["cofiring_own"] == want["together"][feature]
            want["together"][feature] = 0
            best = sorted(range(len(want["together"])), key=lambda f: (-want["together"][f], f))[: SIZES.neighbours]
            kept = [(f, want["together"][f]) for f in best if want["together"][f]]
            assert list(record.fires_with) == kept


def check_examples(record, got, kind, want, activations, rows, threshold):
    places = list(zip(got[f"{kind}_row"].tolist(), got[f"{kind}_position"].tolist(), strict=True))
    assert [place for place in places if place[0] >= 0] == want
    examples = {(example.row, example.position): example for example in getattr(record, kind)}
    assert set(examples) == set(want)
    for (row, position), example in examples.items():
        shown = slice(max(0, position - SIZES.context), position + SIZES.context + 1)
        assert example.start == shown.start and example.ids == tuple(rows[row, shown])
        around = activations[row, shown]
        np.testing.assert_allclose(example.activations, np.where(around > threshold, around, 0), rtol=1e-4, atol=1e-5)
        assert example.value == example.activations[position - shown.start]


def check_frequencies(ids, counts, missed, want):
    kept = {token: count for token, count in zip(ids.tolist(), counts.tolist(), strict=True) if token >= 0}
    assert list(kept.values()) == sorted(kept.values(), reverse=True) and 0 not in kept.values()
    assert all(count <= want[token] <= count + missed for token, count in kept.items())
    assert all(want[token] <= missed for token in set(want) - set(kept))
    assert missed or kept == want


@pytest.mark.parametrize("kind", ["clt", "transcoder"])
def test_counts_examples_and_histograms_equal_loops_over_all_tokens(model, kind, tmp_path):
    coder, rows = make_coder(model, kind=kind), draw_rows()
    features = describe_features(model, coder, rows, out=tmp_path / "out", sizes=SIZES)
    assert features.settings["tokens"] == rows.size and len(features) == 3 * FEATURES
    check_counts(features, encode_rows(model, coder, rows), rows, (0, 1, 2))
    assert features.column(1, "token_missed").any()  # more tokens than places


def test_positions_left_to_the_model_and_layers_that_are_not_covered_do_not_count(model, tmp_path):
    coder, rows = make_coder(model, activation="relu", first_position=3, layers=(0, 2)), draw_rows()
    features = describe_features(model, coder, rows, out=tmp_path / "out", sizes=SIZES)
    activations = encode_rows(model, coder, rows)
    activations[:, :, :3] = 0
    assert features.layers == (0, 2) and features.settings["tokens"] == ROWS * (LENGTH - 3)
    check_counts(features, activations, rows, (0, 2))


def test_neurons_fire_at_the_share_of_tokens_with_their_highest_activations(model, tmp_path):
    rows = draw_rows()
    features = describe_features(model, neurons(model), rows, out=tmp_path / "out", sizes=SIZES, share=0.1)
    check_counts(features, encode_rows(model, neurons(model), rows), rows, (0, 1, 2))
    shares = features.column(1, "count") / rows.size
    assert 0.05 < np.median(shares) < 0.15 and (features.column(1, "threshold") >= 0).all()


def test_no_features_are_gathered_from_a_mesh(model):
    """Sizes differ from one another, so that a shape says what its axes are."""
    features, mesh = 4 * 43, jclt.make_mesh()
    coder = random_coder(CoderConfig(features=features).fit_to_model(model.config, "random"))
    coder = jax.device_put(coder, jax.tree.map(lambda x: x.sharding, abstract_coder(coder.config, mesh)))
    x = jax.device_put(np.zeros((3, 7, model.config.width), np.float32), NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        arguments = coder.load_encoder(0), x, jnp.ones((3, 7), bool), jnp.zeros(features), 5
        collectives = find_collectives(list_firing.lower(*arguments).compile().compiled.as_text())
    assert not any(op.has_axis(features) or op.has_axis(features // 4) for op in collectives), collectives


@pytest.mark.parametrize("where", ["disk", "mesh", pytest.param("mesh, model too", marks=pytest.mark.exhaustive)])
def test_a_coder_has_the_same_features_wherever_it_lies(where, model, tmp_path):
    coder, rows, mesh = make_coder(model), draw_rows(), jclt.make_mesh(2, 2)
    save_coder(coder, tmp_path / "coder")
    keep, model_there = "disk" if where == "disk" else mesh, split_model(model, mesh) if "model" in where else model
    coder_there = load_coder(tmp_path / "coder", keep=keep, model=model, check=False)
    first, second = (
        describe_features(m, c, rows, out=tmp_path / name, sizes=SIZES)
        for m, c, name in ((model, coder, "a"), (model_there, coder_there, "b"))
    )
    for name in COLUMNS:
        if np.issubdtype(first.column(1, name).dtype, np.integer):
            np.testing.assert_array_equal(first.column(1, name), second.column(1, name), name)
        else:
            np.testing.assert_allclose(first.column(1, name), second.column(1, name), rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("stop", ["blocks", "layers"])
def test_an_interrupted_pass_goes_on_and_ends_in_the_same_bytes(model, tmp_path, monkeypatch, stop):
    coder, rows = make_coder(model), draw_rows()
    describe_features(model, coder, rows, out=tmp_path / "whole", sizes=SIZES)
    calls, name = [], "add_events" if stop == "blocks" else "write_layer"
    function = getattr(describing, name)

    def fail_at(number):
        def call(*arguments):
            calls.append(arguments)
            if len(calls) == number:
                raise RuntimeError("killed")
            return function(*arguments)

        return call

    def describe():
        return describe_features(model, coder, rows, out=tmp_path / "out", sizes=SIZES, save_seconds=0.0)

    with monkeypatch.context() as patch:
        patch.setattr(describing, name, fail_at(8 if stop == "blocks" else 2))
        with pytest.raises(RuntimeError, match="killed"):
            describe()
        with pytest.raises(UserError, match="not finished"):
            jclt.load_features(tmp_path / "out")
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(describing, name, fail_at(-1))
        describe()
    assert len(calls) == (9 if stop == "blocks" else 2)  # 2 of 5 blocks, and 1 of 3 layers, were kept
    assert read_files(tmp_path / "out") == read_files(tmp_path / "whole")
    calls.clear()
    assert describe().settings["length"] == LENGTH and not calls


def test_errors_are_one_line(model, tmp_path):
    coder, rows = make_coder(model), draw_rows()
    describe_features(model, coder, rows, out=tmp_path / "out", sizes=SIZES)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    bad = make_model()
    bad = replace(bad, params={**bad.params, "token_embedding": bad.params["token_embedding"].at[3].set(jnp.nan)})
    cases = [
        ({"data": draw_rows(1)}, "out: was begun with another data fingerprint"),
        ({"sizes": replace(SIZES, top=4)}, r"out: was begun with another sizes top \(3, now 4\)"),
        ({"coder": make_coder(model, kind="transcoder")}, "out: was begun with another coder "),
        ({"out": tmp_path / "full"}, "full: exists already, expected a new folder"),
        ({"sizes": replace(SIZES, tokens=0)}, "sizes: tokens=0, expected a whole number from 1 on"),
        ({"share": 2.0}, r"share 2\.0: expected above 0, up to 1"),
        ({"rows": 0}, "rows 0: expected at least 1"),
        ({"length": 13}, "length 13: expected 2 to 12, the model's context"),
        ({"data": "world"}, "model random: has no tokenizer, expected data made by `jclt tokenize`"),
        ({"data": rows[0]}, r"data: 1 axes, expected rows of token ids \[N, T\]"),
        ({"data": rows + 20}, "prompt: token id .*, expected 0 to 22"),
        ({"model": bad, "out": tmp_path / "new"}, "model: what the coder reads is not finite, expected numbers"),
    ]
    for changes, message in cases:
        arguments = {"model": model, "coder": coder, "data": rows, "out": tmp_path / "out", "sizes": SIZES} | changes
        with pytest.raises(UserError, match=message) as raised:
            describe_features(**arguments)
        assert "\n" not in str(raised.value)


def test_bins_have_the_edges_that_are_named():
    from jclt.features import BIN_EDGES

    inside = BIN_EDGES[1:-1].astype(np.float32)
    np.testing.assert_array_equal(find_bins(inside), np.arange(1, len(inside) + 1))
    np.testing.assert_array_equal(find_bins(np.nextafter(inside, np.float32(0))), np.arange(len(inside)))
    np.testing.assert_array_equal(find_bins(np.array([1e-30, 1e30], np.float32)), [0, len(inside)])


def test_rows_are_spread_evenly_and_named_by_their_number_in_the_data(model):
    data = rows_of_data.find_rows(model, draw_rows(), 8, None)
    assert data.numbers.tolist() == [0, 5, 10, 15, 20, 25, 30, 35] and data.length == LENGTH
    blocks = list(rows_of_data.iterate_blocks(data, 0))
    assert [block.rows.tolist() for block in blocks] == [data.numbers.tolist()]
    assert VOCABULARY > blocks[0].tokens.max()
