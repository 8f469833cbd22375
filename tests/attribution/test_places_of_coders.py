"""A coder gives the same graph wherever its weights lie: on a device, split over a mesh, on the host, on disk."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import golden_model
from more_cases import mark_others
from random_coders import random_coder
from traced_graphs import assert_same

import jclt
from jclt.attribution import active, attribute, attribute_batch
from jclt.coders import Coder, CoderConfig, SparseCoder, StreamedCoder, read_fingerprint, save_coder
from jclt.coders.formats.tensors import StoredLayer
from jclt.coders.streamed import HostLayer, load_on_host
from jclt.errors import UserError
from jclt.fingerprints import fingerprint
from jclt.kernels.take_rows import NO_ROW, take_from_shards, take_rows
from jclt.mesh import make_sharding
from jclt.pods.collectives import find_collectives

FEATURES = 24
KINDS = {
    "clt": CoderConfig("clt", FEATURES),
    "skip": CoderConfig("transcoder", FEATURES, skip=True),
    "topk": CoderConfig("transcoder", FEATURES, "topk", k=4, layers=(0, 2)),
}
CASES = [
    ("clt", "jclt", "bfloat16", (1, 4)),
    ("clt", "jclt", "bfloat16", (2, 2)),
    ("clt", "circuit-tracer", "float32", (2, 2)),
    ("skip", "jclt", "bfloat16", (1, 4)),
    ("skip", "circuit-tracer", "float32", (1, 4)),
    ("topk", "jclt", "float16", (2, 2)),
]
FEW = [("clt", "jclt", "bfloat16", (1, 4))]


def draw_prompt(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 96, 5)


def save_random_coder(kind: str, folder: Path, layout: str = "jclt", dtype: str = "float32") -> SparseCoder:
    config = KINDS[kind].fit_to_model(golden_model("llama3").config, "random")
    coder = random_coder(config, np.dtype(dtype))
    save_coder(coder, folder, layout, dtype)
    return coder


def load_everywhere(folder: Path, shapes: Sequence[tuple[int, int]] = ((1, 4), (2, 2))) -> dict[str, Coder]:
    on_disk = jclt.load_coder(folder, keep="disk")
    assert isinstance(on_disk, StreamedCoder)
    meshes = {f"mesh {data}x{features}": jclt.make_mesh(data, features) for data, features in shapes}
    coders = {name: jclt.load_coder(folder, keep=mesh) for name, mesh in meshes.items()}
    return coders | {"disk": on_disk, "host": load_on_host(on_disk.declared, on_disk.sources)}


@pytest.mark.parametrize(("kind", "layout", "dtype", "mesh"), mark_others(CASES, FEW))
def test_the_graph_does_not_depend_on_where_the_coder_lies(kind, layout, dtype, mesh, tmp_path):
    save_random_coder(kind, tmp_path / "saved", layout, dtype)
    model, prompts = golden_model("llama3"), [draw_prompt(0), draw_prompt(1)]
    in_memory = jclt.load_coder(tmp_path / "saved", keep="device")
    assert in_memory.layers[0].encoder.dtype == jnp.dtype(dtype)
    want = attribute_batch(model, in_memory, prompts)
    assert all(len(graph.features) > 20 for graph in want)
    for place, coder in load_everywhere(tmp_path / "saved", [mesh]).items():
        for got, graph in zip(attribute_batch(model, coder, prompts), want, strict=True):
            assert_same(got, graph)
            about = [x.provenance | {"conservation_error": None} for x in (got, graph)]
            assert about[0] == about[1], place


@pytest.mark.parametrize("layout", ["jclt", "saelens", "gemma-scope", "gemma-scope compressed", "gemma-scope-2"])
def test_rows_are_read_from_every_layout(layout, tmp_path):
    """And with them everything else that a coder gives."""
    model = golden_model("llama3").config
    config = replace(KINDS["clt" if layout in ("jclt", "gemma-scope-2") else "skip"], skip=layout == "saelens")
    layout, _, compressed = layout.partition(" ")
    sites = {"reads": "mlp_normalized"} if layout == "gemma-scope" else {}
    coder = random_coder(replace(config, **sites).fit_to_model(model, "random"))
    save_coder(coder, tmp_path / "saved", layout)
    for path in (tmp_path / "saved").rglob("*.npz") if compressed else ():
        np.savez_compressed(path, **np.load(path))
    features = np.array([3, 23, 3, 0])
    x = np.random.default_rng(0).standard_normal((5, model.width)).astype(np.float32)
    for coder_there in load_everywhere(tmp_path / "saved").values():
        assert read_fingerprint(coder_there) == fingerprint(coder)
        for layer in range(model.layers):
            rows = np.asarray(coder.decoder_rows(layer))
            np.testing.assert_array_equal(coder_there.take_decoder_rows(layer, features), rows[features])
            encoder = coder_there.load_encoder(layer)
            np.testing.assert_array_equal(encoder.encoder(0)[0], coder.encoder(layer)[0])
            if isinstance(coder_there, StreamedCoder):
                a = [coder.encode(index, jnp.asarray(x)) for index in range(layer + 1)]
                np.testing.assert_allclose(coder_there.encode(layer, jnp.asarray(x)), a[-1], atol=1e-6)
                want = coder.write(layer, a, jnp.asarray(x))
                np.testing.assert_allclose(coder_there.write(layer, a, jnp.asarray(x)), want, atol=1e-6)


def test_folded_rows_are_those_of_the_folded_coder(tmp_path):
    """SAELens divides the rows of a decoder by their norms at run time."""
    config = replace(KINDS["skip"], skip=False).fit_to_model(golden_model("llama3").config, "random")
    save_coder(random_coder(config), tmp_path / "saved", "saelens")
    for path in (tmp_path / "saved").rglob("cfg.json"):
        path.write_text(path.read_text().replace("{", '{"rescale_acts_by_decoder_norm": true, ', 1))
    want = jclt.load_coder(tmp_path / "saved", keep="device").decoder_rows(1)
    np.testing.assert_allclose(np.linalg.norm(want, axis=(1, 2)), 1, rtol=1e-6)
    coder = jclt.load_coder(tmp_path / "saved", keep="disk")
    np.testing.assert_array_equal(coder.take_decoder_rows(1, np.array([5, 2])), np.asarray(want)[[5, 2]])


# What is in memory.


def test_no_program_gathers_features(tmp_path):
    """Sizes differ from one another, so that a shape says what its axes are."""
    config = KINDS["clt"].fit_to_model(golden_model("llama3").config, "random")
    features, length, listed, width = 4 * 43, 7, 16, config.size
    save_coder(random_coder(replace(config, features=features)), tmp_path / "saved")
    mesh = jclt.make_mesh()
    coder = jclt.load_coder(tmp_path / "saved", keep=mesh)
    x = jax.device_put(np.zeros((3, length, width), np.float32), make_sharding(mesh, (3, length, width), (None,) * 3))
    chosen = jnp.zeros((4, listed), jnp.int32)
    with jax.set_mesh(mesh):
        encoder, has_nodes = coder.load_encoder(0), jnp.ones((3, length), bool)
        activations, counts = active.encode_layer(encoder, x, has_nodes)
        assert activations.sharding.spec == jax.P(None, None, "features") and counts.shape == (3, 4)
        kinds = {
            active.encode_layer.lower(encoder, x, has_nodes): set[str](),
            active.list_nonzero.lower(activations, listed): set[str](),
            active.take_encoder_rows.lower(encoder, chosen, 8): {"all-to-all"},
            take_from_shards.lower(coder.decoder_rows(0), chosen[0]): {"all-reduce"},
            take_from_shards.lower(coder.decoder_rows(0), chosen, 8): {"all-to-all"},
        }
        for program, expected in kinds.items():
            collectives = find_collectives(program.compile().as_text())
            assert {op.kind for op in collectives} == expected, program.as_text()[:200]
            assert not any(op.has_axis(features) or op.has_axis(features // 4) for op in collectives)


def test_on_disk_one_encoder_is_in_memory_at_a_time_and_no_decoder(tmp_path, monkeypatch):
    features, model = 37, golden_model("llama3")
    config = replace(KINDS["clt"], features=features).fit_to_model(model.config, "random")
    save_coder(random_coder(config), tmp_path / "saved")
    coder = jclt.load_coder(tmp_path / "saved", keep="disk")
    assert isinstance(coder, StreamedCoder)
    read, decoder_rows, in_memory = StoredLayer.read, [], []
    assert coder.fingerprint  # reads everything, once

    def watch(self, weight, dtype, rows=...):
        if weight == "decoder":
            decoder_rows.append((self.number, len(rows)))
        return read(self, weight, dtype, rows)

    list_active_features = active.list_active_features

    def look(*arguments):
        in_memory.append([x.shape for x in jax.live_arrays() if x.shape[:1] == (features,) and x.ndim > 1])
        return list_active_features(*arguments)

    monkeypatch.setattr(StoredLayer, "read", watch)
    monkeypatch.setattr(active, "list_active_features", look)
    before = [x.shape for x in jax.live_arrays() if x.shape[:1] == (features,) and x.ndim > 1]
    graph = attribute(model, coder, draw_prompt(0))
    assert in_memory == [before + [(features, model.config.width)]] * model.config.layers
    active_features = {layer: set() for layer in config.covered}
    for layer, _, feature in graph.features:
        active_features[int(layer)].add(int(feature))
    # The padding of lists is feature 0, and another row says which type the weights have.
    assert decoder_rows[0] == (0, 1) and len(decoder_rows) == 1 + model.config.layers
    for layer, count in decoder_rows[1:]:
        assert len(active_features[layer]) <= count <= len(active_features[layer] | {0}) < features


def test_rows_that_are_named_twice_are_read_once(tmp_path):
    save_random_coder("clt", tmp_path / "saved")
    coder = jclt.load_coder(tmp_path / "saved", keep="disk")
    assert isinstance(coder, StreamedCoder)
    reads = []

    class Watched(HostLayer):
        def read(self, weight, dtype, rows=...):
            reads.append(list(rows))
            return self.source.read(weight, dtype, rows)

    coder.sources = (Watched({}, coder.sources[0]),)
    assert coder.take_decoder_rows(0, np.array([7, 1, 7, 7])).shape[0] == 4 and reads == [[1, 7]]


def test_a_split_table_gives_the_rows_of_the_whole_one():
    table = np.random.default_rng(0).standard_normal((16, 3, 5)).astype(np.float32)
    uneven = np.array([[3, 15, 3], [0, NO_ROW, NO_ROW], [15, 14, 13], [12, 12, NO_ROW]])  # the last shard sends most
    for shape in ((1, 4), (2, 2), (4, 1)):
        placed = jax.device_put(table, make_sharding(jclt.make_mesh(*shape), table.shape, ("features", None, None)))
        np.testing.assert_array_equal(take_rows(placed, np.array([3, 15, 3, 0])), table[[3, 15, 3, 0]])
        for lists in (uneven, np.tile(uneven, 8), uneven[:3]):
            rows = np.asarray(take_rows(placed, lists))
            np.testing.assert_array_equal(rows[lists != NO_ROW], table[lists[lists != NO_ROW]])
        assert np.isfinite(take_rows(placed, np.full((4, 3), NO_ROW))).all()


def test_each_device_gets_the_rows_of_its_own_lists():
    mesh, table = jclt.make_mesh(1, 4), np.arange(16 * 3, dtype=np.float32).reshape(16, 3)
    placed = jax.device_put(table, make_sharding(mesh, table.shape, ("features", None)))
    rows = take_rows(placed, np.array([[3], [0], [15], [12]]))
    assert rows.sharding.spec == jax.P("features", None, None) and rows.sharding.shard_shape(rows.shape) == (1, 1, 3)


# Where a coder is kept, and what goes wrong there.


def test_without_a_word_a_coder_is_kept_where_it_has_room(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    save_random_coder("clt", tmp_path / "saved")
    assert isinstance(jclt.load_coder(tmp_path / "saved"), SparseCoder) and not caplog.text
    monkeypatch.setattr("jclt.memory.measure_free_host_memory", lambda: 10_000)
    assert isinstance(jclt.load_coder(tmp_path / "saved"), StreamedCoder)
    assert "kB of weights are kept on disk (10 kB free on the device)" in caplog.text
    with pytest.raises(UserError, match=r"^coder .*: needs .* of memory, expected at most 10 kB; .*keep='disk' takes"):
        jclt.load_coder(tmp_path / "saved", keep="device")
    with pytest.raises(UserError, match="^keep 'cloud': expected one of: device, host, disk, or a mesh$"):
        jclt.load_coder(tmp_path / "saved", keep="cloud")


def test_a_file_that_changes_or_goes_gets_one_line(tmp_path):
    model, tokens = golden_model("llama3"), draw_prompt(0)
    for change in (os.unlink, lambda path: os.truncate(path, 100), lambda path: os.utime(path, ns=(0, 1))):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        save_random_coder("clt", folder)
        coder = jclt.load_coder(folder, keep="disk")
        attribute(model, coder, tokens, max_features=2)
        change(folder / "W_dec_1.safetensors")
        with pytest.raises(UserError, match=rf"^{folder}/W_dec_1.safetensors: [^\n]*, expected it [^\n]*$"):
            attribute(model, coder, tokens, max_features=2)


def test_weights_on_disk_that_are_not_finite_are_named(tmp_path):
    coder = save_random_coder("clt", tmp_path / "saved")
    layer = replace(coder.layers[1], decoder=coder.layers[1].decoder.at[3, 1, 2].set(jnp.nan))
    save_coder(SparseCoder((coder.layers[0], layer, *coder.layers[2:]), coder.config), tmp_path / "broken")
    with pytest.raises(UserError, match="W_dec_1.safetensors: tensor 'W_dec_1' holds NaN or infinity as float32"):
        attribute(golden_model("llama3"), jclt.load_coder(tmp_path / "broken", keep="disk"), draw_prompt(0))


def test_what_needs_all_weights_says_so(tmp_path):
    save_random_coder("clt", tmp_path / "saved")
    coder = jclt.load_coder(tmp_path / "saved", keep="disk")
    with pytest.raises(UserError, match="^coder: its weights stay on disk, expected keep='device' or a mesh"):
        jclt.intervene(
            golden_model("llama3"), coder, draw_prompt(0), jclt.Set(layer=0, position=0, feature=0, value=0.0)
        )


def test_a_streamed_coder_is_checked_against_its_model(tmp_path):
    model = jclt.load_model("demo")
    assert isinstance(jclt.load_coder("demo", keep="disk", model=model), StreamedCoder)
    other = random_coder(replace(jclt.load_coder("demo", keep="device").config, model_fingerprint=""))
    save_coder(other, tmp_path / "other")
    with pytest.raises(UserError, match="other' does not fit model 'demo': "):
        jclt.load_coder(tmp_path / "other", keep="disk", model=model)
