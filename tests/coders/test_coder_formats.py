"""Coders on disk: saved coders load with the same bits, published ones load right, wrong ones get one line."""

import json
import shutil
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from coder_samples import CLT, PLT, RULES, SAE, compute_outputs, random_coder
from golden_cases import golden_model
from golden_graphs import GRAPHS, golden_folder
from more_cases import mark_others
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

import jclt
from jclt.cli.main import main
from jclt.coders import (
    CoderConfig,
    SparseCoder,
    abstract_coder,
    check_fit,
    coder_model,
    measure_fit,
    misread_by_circuit_tracer,
    neurons,
)
from jclt.coders.model_fit import _get_probe_tokens
from jclt.errors import UserError

RNG = np.random.default_rng(0)


def assert_same(got: SparseCoder, want: SparseCoder):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=str(path))


# There and back.


KINDS = {
    "clt": CLT,
    "clt skip": replace(CLT, skip=True),
    "transcoder": PLT,
    "transcoder skip of some layers": replace(PLT, skip=True, layers=(1, 4)),
    "sae": SAE,
    "tied sae": replace(SAE, tied=True),
}
STORED = [*((rule, "float32") for rule in RULES), ("jumprelu", "bfloat16"), ("topk", "float16")]


@pytest.mark.parametrize(
    ("kind", "rule", "dtype"),
    mark_others(
        [(kind, *stored) for kind in KINDS for stored in STORED],
        [
            ("clt", "jumprelu", "float32"),
            ("clt skip", "topk", "float16"),
            ("transcoder", "relu", "float32"),
            ("transcoder skip of some layers", "jumprelu", "bfloat16"),
            ("sae", "topk", "float32"),
            ("tied sae", "jumprelu", "float32"),
        ],
    ),
)
def test_our_own_folder_keeps_everything(kind, rule, dtype, tmp_path):
    coder = random_coder(replace(KINDS[kind], **RULES[rule]), dtype)
    jclt.save_coder(coder, tmp_path / "saved", dtype=dtype)
    again = jclt.load_coder(tmp_path / "saved")
    assert again.config == coder.config
    assert_same(again, coder)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    loaded = jclt.load_coder(tmp_path / "saved", dtype=dtype)
    assert {str(x.dtype) for x in jax.tree.leaves(loaded)} == {dtype}
    assert sum(x.nbytes for x in jax.tree.leaves(coder)) * jnp.dtype(dtype).itemsize // 4 <= sum(
        path.stat().st_size for path in (tmp_path / "saved").iterdir()
    )


HF = {"reads": "mlp_in", "writes": "mlp_out"}
SCOPE = {"reads": "mlp_normalized", "writes": "mlp_out"}
ELSEWHERE = [
    ("circuit-tracer", CLT),
    ("circuit-tracer", replace(CLT, **RULES["relu"])),
    ("circuit-tracer", replace(PLT, skip=True)),
    ("circuit-tracer", replace(SAE, tied=False)),
    ("gemma-scope", replace(PLT, **SCOPE, layers=(3, 12))),
    ("gemma-scope-2", replace(PLT, **HF, skip=True, layers=(3, 12))),
    ("gemma-scope-2", replace(CLT, **HF, skip=True)),
    ("gemma-scope-2", SAE),
    ("saelens", SAE),
    ("saelens", replace(SAE, **RULES["relu"], layers=(7,))),
    ("saelens", replace(SAE, **RULES["topk"])),
    ("saelens", replace(PLT, skip=True, layers=(0, 5))),
    ("saelens", replace(PLT, **RULES["relu"], reads="resid_mid")),
    ("saelens", replace(PLT, **RULES["relu"], skip=True)),
]


@pytest.mark.parametrize("dtype", mark_others(["float32", "float16"], ["float16"]))
@pytest.mark.parametrize(("layout", "config"), ELSEWHERE)
def test_other_layouts_there_and_back(layout, config, dtype, tmp_path):
    config = replace(config, bandwidth=1.0, through="all", model="" if layout == "gemma-scope" else "a/model")
    coder = random_coder(config, dtype)
    jclt.save_coder(coder, tmp_path / "saved", layout, dtype)
    again = jclt.load_coder(tmp_path / "saved")
    assert again.config == config
    assert_same(again, coder)


def test_a_tied_sae_is_written_with_its_decoder_where_none_are_known(tmp_path):
    coder = random_coder(replace(SAE, tied=True))
    x = RNG.standard_normal((3, 5, 6), np.float32)
    for layout in ("circuit-tracer", "saelens", "gemma-scope-2"):
        jclt.save_coder(coder, tmp_path / layout, layout)
        for got, want in zip(
            compute_outputs(jclt.load_coder(tmp_path / layout), x), compute_outputs(coder, x), strict=True
        ):
            np.testing.assert_array_equal(got, want)


NOT_SAYABLE = [
    ("circuit-tracer", replace(CLT, **RULES["topk"]), "has no TopK: its loaders would read a ReLU"),
    ("circuit-tracer", replace(PLT, **RULES["topk"]), "has no TopK: its loaders would read a ReLU"),
    ("circuit-tracer", replace(CLT, skip=True), "has no place for a cross-layer transcoder's skip"),
    ("circuit-tracer", replace(PLT, layers=(0, 2)), r"expects all layers from 0 on, got layers=\(0, 2\)"),
    ("circuit-tracer", replace(CLT, reads="attn_in"), "has no name for the site 'attn_in', expected one of: "),
    ("gemma-scope", replace(PLT, **SCOPE, **RULES["relu"]), "has no rule 'relu', expected one of: jumprelu"),
    ("gemma-scope", CLT, "holds no cross-layer transcoders, expected layout jclt or circuit-tracer"),
    ("gemma-scope", PLT, "cannot say reads='mlp_in', it would be read as 'mlp_normalized'"),
    ("gemma-scope", SAE, "cannot say kind='sae', it would be read as 'transcoder'"),
    ("gemma-scope", replace(PLT, **SCOPE, skip=True), "has no place for a skip, expected layout gemma-scope-2"),
    ("gemma-scope-2", replace(PLT, reads="resid_mid"), "has no name for the site 'resid_mid'"),
    ("gemma-scope-2", replace(CLT, **HF, layers=(1, 2)), "expects all layers from 0 on"),
    ("saelens", CLT, "holds no cross-layer transcoders"),
    ("saelens", replace(PLT, **RULES["topk"]), "has no topk transcoder, expected layout jclt"),
    ("saelens", replace(SAE, skip=True), "has no jumprelu sae with a skip, expected layout jclt"),
    ("saelens", replace(SAE, reads="attn_in", writes="attn_in"), "has no name for the site 'attn_in'"),
]


@pytest.mark.parametrize(("layout", "config", "line"), NOT_SAYABLE)
def test_what_a_layout_cannot_say_is_refused_and_nothing_stays(layout, config, line, tmp_path):
    with pytest.raises(UserError, match=f"^layout {layout}: {line}"):
        jclt.save_coder(random_coder(config), tmp_path / "saved", layout)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_saved_at_all(tmp_path):
    coder = random_coder(PLT)

    def get_refusal(*arguments, coder=coder) -> str:
        with pytest.raises(UserError) as error:
            jclt.save_coder(coder, tmp_path / "saved", *arguments)
        assert not (tmp_path / "saved").exists()
        return str(error.value)

    assert get_refusal("saelen") == "layout 'saelen' is unknown; did you mean 'saelens'?"
    assert get_refusal("jclt", "int8") == "dtype 'int8': expected one of: float32, bfloat16, float16 in layout jclt"
    assert "expected one of: float32, float16 in layout gemma-scope" in get_refusal("gemma-scope", "bfloat16")
    training = random_coder(replace(PLT, activation="batchtopk", k=3))
    assert get_refusal(coder=training).startswith("activation 'batchtopk': a rule of training")
    negative = jax.tree.map(lambda x: jnp.asarray(-np.asarray(x)), coder)
    assert "a threshold is below 0" in get_refusal("gemma-scope-2", coder=negative)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("precious")
    with pytest.raises(UserError, match="full: exists already, expected a new folder"):
        jclt.save_coder(coder, tmp_path / "full")


# Files that others wrote, made here by numpy alone.


def arrays(features=10, width=4, layers=3, reach=None) -> dict[str, np.ndarray]:
    """Random weights, with the axes of jclt."""
    return {
        "encoder": RNG.standard_normal((layers, features, width), np.float32),
        "encoder_bias": RNG.standard_normal((layers, features), np.float32),
        "threshold": RNG.random((layers, features), np.float32),
        "decoder": RNG.standard_normal((layers, features, reach or 1, width), np.float32),
        "decoder_bias": RNG.standard_normal((layers, width), np.float32),
        "skip": RNG.standard_normal((layers, width, width), np.float32),
    }


def assert_weights(coder: SparseCoder, want: dict[str, np.ndarray], clt=False):
    for layer, weights in enumerate(coder.layers):
        for name, values in want.items():
            expected = values[layer, :, layer:] if clt and name == "decoder" else values[layer]
            np.testing.assert_array_equal(getattr(weights, name), expected, err_msg=f"{name} {layer}")
        for name in {"threshold", "skip"} - set(want):
            assert getattr(weights, name) is None


def write_circuit_tracer_clt(folder: Path, w: dict, rule="jumprelu") -> None:
    folder.mkdir()
    for i in range(len(w["encoder"])):
        tensors = {
            f"W_enc_{i}": w["encoder"][i],
            f"b_enc_{i}": w["encoder_bias"][i],
            f"b_dec_{i}": w["decoder_bias"][i],
        }
        tensors |= {f"threshold_{i}": w["threshold"][i]} if rule == "jumprelu" else {}
        save_file(tensors, folder / f"W_enc_{i}.safetensors")
        save_file({f"W_dec_{i}": np.ascontiguousarray(w["decoder"][i, :, i:])}, folder / f"W_dec_{i}.safetensors")
    (folder / "config.yaml").write_text(
        "model_kind: cross_layer_transcoder\nmodel_name: google/gemma-2-2b  # the base model\n"
        "feature_input_hook: hook_resid_mid\nfeature_output_hook: 'hook_mlp_out'\nscan: 'a'\n"
    )


def write_circuit_tracer_set(folder: Path, w: dict, names="layer_{}.safetensors", rule="jumprelu") -> None:
    folder.mkdir()
    for i in range(len(w["encoder"])):
        tensors = {"W_enc": w["encoder"][i], "b_enc": w["encoder_bias"][i], "b_dec": w["decoder_bias"][i]}
        tensors |= {"W_dec": w["decoder"][i, :, 0].copy(), "W_skip": w["skip"][i]}
        tensors |= {"activation_function.threshold": w["threshold"][i]} if rule == "jumprelu" else {}
        save_file(tensors, folder / names.format(i))
    (folder / "config.yaml").write_text(
        "model_kind: transcoder_set\nfeature_input_hook: mlp.hook_in\nfeature_output_hook: mlp.hook_out\n"
    )


@pytest.mark.parametrize("rule", ["relu", "jumprelu"])
def test_a_circuit_tracer_clt(rule, tmp_path):
    w = arrays(reach=3)
    write_circuit_tracer_clt(tmp_path / "clt", w, rule)
    coder = jclt.load_coder(tmp_path / "clt")
    want = CoderConfig("clt", 10, rule, reads="resid_mid", writes="mlp_out", layers=(0, 1, 2), width=4)
    assert coder.config == replace(want, model="google/gemma-2-2b")
    del w["skip"]
    assert_weights(coder, w if rule == "jumprelu" else {k: v for k, v in w.items() if k != "threshold"}, clt=True)


def test_circuit_tracer_transcoders(tmp_path):
    w = arrays()
    write_circuit_tracer_set(tmp_path / "set", w)
    coder = jclt.load_coder(tmp_path / "set")
    want = CoderConfig("transcoder", 10, reads="mlp_in", writes="mlp_raw_out", skip=True, layers=(0, 1, 2), width=4)
    assert coder.config == want
    assert_weights(coder, w)
    write_circuit_tracer_set(tmp_path / "listed", w, "of_{}.safetensors")
    with (tmp_path / "listed" / "config.yaml").open("a") as file:
        file.write("transcoders:\n" + "".join(f"- of_{i}.safetensors\n" for i in range(3)))
    assert_same(jclt.load_coder(tmp_path / "listed"), coder)
    write_circuit_tracer_set(tmp_path / "topk", w, rule="topk")
    with (tmp_path / "topk" / "config.yaml").open("a") as file:
        file.write("activation: topk\nk: 4\n")
    topk = jclt.load_coder(tmp_path / "topk").config
    assert topk == replace(want, activation="topk", k=4)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_gemma_scope(save, tmp_path):
    w = arrays()
    del w["skip"]
    w["encoder"][1] = np.asfortranarray(w["encoder"][1])
    for i, number in enumerate((0, 5, 12)):
        folder = tmp_path / f"layer_{number}" / "width_16k" / "average_l0_6"
        folder.mkdir(parents=True)
        params = {"W_enc": w["encoder"][i].T, "W_dec": w["decoder"][i, :, 0], "b_enc": w["encoder_bias"][i]}
        save(folder / "params.npz", **params, b_dec=w["decoder_bias"][i], threshold=w["threshold"][i])
    coder = jclt.load_coder(tmp_path)
    assert coder.config.covered == (0, 5, 12)
    assert (coder.config.kind, coder.config.reads, coder.config.writes) == ("transcoder", "mlp_normalized", "mlp_out")
    assert_weights(coder, w)
    loaded = jclt.load_coder(tmp_path / "layer_5" / "width_16k", reads="resid_post", writes="hook_resid_post")
    assert (loaded.config.kind, loaded.config.covered, loaded.config.reads) == ("sae", (5,), "resid_post")
    assert_weights(loaded, {name: values[1:2] for name, values in w.items()})


def gemma_scope_2_tensors(w: dict, i: int) -> dict[str, np.ndarray]:
    tensors = {"w_enc": w["encoder"][i].T.copy(), "b_enc": w["encoder_bias"][i], "b_dec": w["decoder_bias"][i]}
    return tensors | {"threshold": w["threshold"][i], "affine_skip_connection": w["skip"][i].T.copy()}


@pytest.mark.parametrize("affine", [False, True])
def test_gemma_scope_2_transcoders(affine, tmp_path):
    w = arrays()
    for i, number in enumerate((1, 2, 10)):
        folder = tmp_path / f"layer_{number}_width_16k_l0_small{'_affine' * affine}"
        folder.mkdir()
        tensors = gemma_scope_2_tensors(w, i) | {"w_dec": w["decoder"][i, :, 0].copy()}
        if not affine:
            del tensors["affine_skip_connection"]
        save_file(tensors, folder / "params.safetensors")
        hooks = {"in": "pre_feedforward_layernorm.output", "out": "post_feedforward_layernorm.output"}
        settings = {f"hf_hook_point_{end}": f"model.layers.{number}.{name}" for end, name in hooks.items()}
        settings |= {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", "affine_connection": affine}
        (folder / "config.json").write_text(json.dumps(settings))
    coder = jclt.load_coder(tmp_path)
    want = CoderConfig("transcoder", 10, reads="mlp_in", writes="mlp_out", skip=affine, layers=(1, 2, 10), width=4)
    assert coder.config == replace(want, model="gemma-v3-1b-pt")
    assert_weights(coder, w if affine else {name: values for name, values in w.items() if name != "skip"})


def test_a_gemma_scope_2_clt(tmp_path):
    w = arrays(reach=3)  # the rows for layers before the feature's layer are ignored
    for i in range(3):
        tensors = gemma_scope_2_tensors(w, i) | {"w_dec": w["decoder"][i]}
        save_file(tensors, tmp_path / f"params_layer_{i}.safetensors")
    coder = jclt.load_coder(tmp_path)
    want = CoderConfig("clt", 10, reads="mlp_in", writes="mlp_out", skip=True, layers=(0, 1, 2), width=4)
    assert coder.config == want
    assert_weights(coder, w, clt=True)


def write_saelens(folder: Path, w: dict, cfg: dict, tensors=("W_enc", "W_dec", "b_enc", "b_dec")) -> None:
    folder.mkdir(parents=True)
    every = {"W_enc": w["encoder"][0].T.copy(), "W_dec": w["decoder"][0, :, 0].copy(), "b_enc": w["encoder_bias"][0]}
    every |= {"b_dec": w["decoder_bias"][0], "threshold": w["threshold"][0], "W_skip": w["skip"][0]}
    save_file({name: every[name] for name in tensors}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": 4, "d_sae": 10} | cfg))


SITE = {"model_name": "gpt2", "hook_name": "blocks.8.hook_resid_pre"}
BETWEEN = {"hook_name": "blocks.3.ln2.hook_normalized", "hook_name_out": "blocks.3.hook_mlp_out"}


def test_saelens_transcoders(tmp_path):
    w = arrays()
    cfg = {"architecture": "jumprelu_skip_transcoder", "d_out": 4, "apply_b_dec_to_input": False, "metadata": BETWEEN}
    write_saelens(tmp_path / "a", w, cfg, ("W_enc", "W_dec", "b_enc", "b_dec", "threshold", "W_skip"))
    coder = jclt.load_coder(tmp_path / "a")
    want = CoderConfig("transcoder", 10, reads="mlp_normalized", writes="mlp_out", skip=True, layers=(3,), width=4)
    assert coder.config == want
    assert_weights(coder, w)


@pytest.mark.parametrize(
    ("cfg", "more"),
    [
        ({"architecture": "standard", "apply_b_dec_to_input": True, "metadata": SITE}, {}),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}, **SITE}, {}),
        ({"architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": True, "metadata": SITE}, {}),
        (
            {"architecture": "standard", "normalize_activations": "expected_average_only_in", "metadata": SITE},
            {"scaling_factor": 1.7},
        ),
        ({"architecture": "jumprelu", "apply_b_dec_to_input": True, "metadata": SITE}, {}),
    ],
)
def test_what_saelens_does_at_run_time_is_folded_into_the_weights(cfg, more, tmp_path):
    w = arrays(layers=1)
    w["threshold"] -= 0.5  # some below 0, where theirs still is a ReLU
    w["decoder"][0, 3] = 0  # a feature that writes nothing
    jump = cfg.get("architecture") == "jumprelu"
    write_saelens(tmp_path / "sae", w, cfg, ("W_enc", "W_dec", "b_enc", "b_dec", *(["threshold"] if jump else [])))
    if more:
        (tmp_path / "sae" / "activation_scaler.json").write_text(json.dumps(more))
    coder = jclt.load_coder(tmp_path / "sae")
    assert (coder.config.kind, coder.config.covered, coder.config.reads) == ("sae", (8,), "resid_pre")

    x = RNG.standard_normal((20, 4)).astype(np.float32)
    scale, norms = more.get("scaling_factor", 1.0), np.ones(10)
    if cfg.get("rescale_acts_by_decoder_norm"):
        norms = np.linalg.norm(w["decoder"][0, :, 0], axis=1)
    h = ((x * scale - w["decoder_bias"][0]) @ w["encoder"][0].T + w["encoder_bias"][0]) * norms
    a = np.maximum(h, 0) * (h > w["threshold"][0] if jump else 1)
    if coder.config.k:
        a = a * (a >= np.sort(a, axis=1)[:, -3:][:, :1])
    y = ((a / np.maximum(norms, 1e-8)) @ w["decoder"][0, :, 0] + w["decoder_bias"][0]) / scale
    (got_a,), (got_y,) = compute_outputs(coder, x[None])
    np.testing.assert_allclose(got_a, a, atol=2e-6)
    np.testing.assert_allclose(got_y, y, atol=5e-6)


# Compared with circuit-tracer's activations.


@pytest.mark.parametrize("case", mark_others(GRAPHS, ["gemma2"]))
def test_activations_are_those_of_circuit_tracer(case, tmp_path):
    folder = golden_folder(case)
    model, graph = jclt.load_model(folder), np.load(folder / "graph.npz")
    coder = jclt.load_coder(folder / "clt", model=model, check=False)
    jclt.save_coder(coder, tmp_path / "again")
    assert_same(jclt.load_coder(tmp_path / "again"), coder)
    config = coder.config
    _, seen = jclt.run(model, graph["tokens"], capture=(config.reads,))
    values = np.stack(compute_outputs(coder, np.asarray(seen[config.reads]))[0])
    values[:, 0] = 0
    assert np.argwhere(values).tolist() == graph["active_features"].tolist()
    # Of the largest value: in llama, where it is 39, either side is 4e-5 from what float64 gives.
    want = graph["activation_values"]
    np.testing.assert_allclose(values[values != 0], want, rtol=0, atol=1e-6 * want.max())


# On a mesh.


@pytest.mark.parametrize("layout", ["jclt", "gemma-scope-2", "saelens"])
def test_loading_onto_a_mesh(layout, tmp_path):
    mesh = jclt.make_mesh(data=2, features=2)
    config = replace(CLT if layout == "jclt" else PLT, skip=True, **HF)
    coder = random_coder(config)
    jclt.save_coder(coder, tmp_path / "saved", layout)
    placed = jclt.load_coder(tmp_path / "saved", keep=mesh)
    for got, target in zip(jax.tree.leaves(placed), jax.tree.leaves(abstract_coder(config, mesh)), strict=True):
        assert got.sharding == target.sharding
    assert {shard.data.shape[0] for shard in placed.layers[0].decoder.addressable_shards} == {8}
    for got, want in zip(jax.tree.leaves(placed), jax.tree.leaves(coder), strict=True):
        np.testing.assert_array_equal(got, want)


# With the model at hand.


@cache
def load_demo() -> jclt.Model:
    return jclt.load_model("demo")


def exact_coder(model: jclt.Model) -> SparseCoder:
    """The demo model's neurons, which are ReLUs, as a transcoder."""
    p, config = model.params, CoderConfig("transcoder", model.config.mlp_width, "relu", writes="mlp_raw_out")
    coder = random_coder(config.fit_to_model(model.config, "demo"))
    up, up_bias, down, down_bias = (np.asarray(p[name]) for name in ("up", "up_bias", "down", "down_bias"))
    layers = []
    for i, layer in enumerate(coder.layers):
        layer = replace(layer, encoder=jnp.asarray(up[i].T), encoder_bias=jnp.asarray(up_bias[i]))
        layers.append(replace(layer, decoder=jnp.asarray(down[i][:, None]), decoder_bias=jnp.asarray(down_bias[i])))
    return SparseCoder(tuple(layers), coder.config)


def test_a_coder_must_fit_its_model(tmp_path):
    model = load_demo()
    check_fit(neurons(model), model, "neurons")
    assert measure_fit(neurons(model), model).error.max() < 1e-8
    jclt.save_coder(exact_coder(model), tmp_path / "exact")
    coder = jclt.load_coder(tmp_path / "exact", model=model)
    assert measure_fit(coder, model).error.max() < 1e-8
    assert jclt.load_coder(tmp_path / "exact", model=model, keep=jclt.make_mesh()).config == coder.config

    other = random_coder(coder.config)
    jclt.save_coder(other, tmp_path / "other")
    with pytest.raises(UserError, match="other' does not fit model 'demo': on a short text it misses .* features act"):
        jclt.load_coder(tmp_path / "other", model=model)
    assert_same(jclt.load_coder(tmp_path / "other", model=model, check=False), other)
    silent = jax.tree.map(lambda x: jnp.asarray(0 * np.asarray(x)), other)
    jclt.save_coder(silent, tmp_path / "silent")
    with pytest.raises(UserError, match="with 0 of 512 features active"):
        jclt.load_coder(tmp_path / "silent", model=model)


def test_a_model_without_a_tokenizer_is_probed_by_random_tokens():
    model = replace(load_demo(), tokenizer=None)
    assert measure_fit(neurons(model), model).error.max() < 1e-8


def test_what_does_not_fit_a_model_by_its_shape(tmp_path):
    model = load_demo()

    def get_refusal(**changes) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        jclt.save_coder(random_coder(replace(PLT, **({"width": 128} | changes))), folder)
        with pytest.raises(UserError) as error:
            jclt.load_coder(folder, model=model)
        return str(error.value).removeprefix(f"{folder}: ")

    assert get_refusal(width=64, model="demo") == "setting 'coder.width': 64, expected 128, the model's"
    other = "was trained on model 'a/model', not on 'demo': "
    assert get_refusal(width=64) == f"{other}setting 'coder.width': 64, expected 128, the model's"
    assert "setting 'coder.layers': (2, 4), expected layers from 0 to 3, in order" in get_refusal(layers=(2, 4))
    assert "a gpt_neox model of this configuration has none" in get_refusal(reads="mlp_post_denominator")


# What is wrong.


def resave(path: Path, change) -> None:
    npz = path.suffix == ".npz"
    tensors = {name: np.array(value) for name, value in (np.load(path) if npz else load_file(path)).items()}
    np.savez(path, **change(tensors)) if npz else save_file(change(tensors), path)


def edit_json(path: Path, **changes) -> None:
    raw = json.loads(path.read_text())
    coder = raw.get("coder", {})
    for name, value in changes.items():
        (coder if name in coder or name == "wdth" else raw)[name] = value
    path.write_text(json.dumps(raw))


def without(name: str):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def turned(name: str):
    return lambda tensors: tensors | {name: np.ascontiguousarray(tensors[name].T)}


def of_type(name: str, dtype):
    return lambda tensors: tensors | {name: tensors[name].astype(dtype)}


def cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def break_header(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F99"'))


FAULTS = [
    ("jclt", lambda f: resave(f / "W_enc_1.safetensors", turned("W_enc_1")), "'W_enc_1' gives the encoder the shape"),
    ("jclt", lambda f: resave(f / "W_enc_1.safetensors", without("b_enc_1")), "tensor 'b_enc_1' is missing, expected"),
    ("jclt", lambda f: resave(f / "W_enc_2.safetensors", without("threshold_2")), "tensor 'threshold_2' is missing"),
    (
        "jclt",
        lambda f: resave(f / "W_enc_1.safetensors", of_type("W_enc_1", np.int32)),
        "is of type int32, expected fl",
    ),
    ("jclt", lambda f: edit_json(f / "config.json", activation="relu", rule="relu"), "'threshold_0' has no place in"),
    ("jclt", lambda f: (f / "W_enc_2.safetensors").unlink(), "W_enc_2.safetensors: not found, expected beside"),
    ("jclt", lambda f: cut(f / "W_dec_1.safetensors", -1), "W_dec_1.safetensors: cut off"),
    ("jclt", lambda f: cut(f / "W_dec_1.safetensors", 9), "W_dec_1.safetensors: not a safetensors file, or cut off"),
    ("jclt", lambda f: break_header(f / "W_dec_1.safetensors"), "'W_dec_1' is of type 'F99', expected one that"),
    ("jclt", lambda f: edit_json(f / "config.json", version=2), "config.json: version 2, expected 1"),
    ("jclt", lambda f: edit_json(f / "config.json", rule="relu"), "rule 'relu' under activation 'jumprelu'"),
    ("jclt", lambda f: edit_json(f / "config.json", k=3), "coder.k': 3, expected none under activation 'jumprelu'"),
    ("jclt", lambda f: edit_json(f / "config.json", width="wide"), "'coder.width' is 'wide', expected a whole number"),
    ("jclt", lambda f: edit_json(f / "config.json", width=None), "'coder.width' is None, expected a whole number"),
    ("jclt", lambda f: edit_json(f / "config.json", wdth=3), "'coder.wdth' is unknown; did you mean 'width'?"),
    ("jclt", lambda f: edit_json(f / "config.json", layers=[1, 0, 2]), "expected layers in order"),
    ("jclt", lambda f: edit_json(f / "config.json", coder=3), "config.json: 'coder' is missing"),
    ("jclt", lambda f: edit_json(f / "config.json", features=99), r"the shape \[16, 6\], expected \[99, 6\]"),
    ("jclt", lambda f: edit_json(f / "config.json", kind="transcoder"), "layer_0.safetensors: not found"),
    ("jclt", lambda f: (f / "config.json").write_text("{"), "config.json: not valid JSON"),
    ("circuit-tracer", lambda f: (f / "W_dec_2.safetensors").unlink(), "W_dec_2.safetensors: not found"),
    ("circuit-tracer", lambda f: (f / "W_enc_0.safetensors").unlink(), "W_enc_0.safetensors: not found"),
    ("circuit-tracer", lambda f: (f / "config.yaml").unlink(), "no file in it says which sites the coder reads and"),
    ("circuit-tracer", lambda f: (f / "config.yaml").write_text("a: b: c"), "config.yaml: not valid YAML"),
    ("circuit-tracer", lambda f: (f / "config.yaml").write_text("words"), "config.yaml: expected `name: value` lines"),
    (
        "circuit-tracer",
        lambda f: edit_json(f / "config.yaml", model_kind="transcoder_set"),
        "model_kind 'transcoder_set', but the files are a cross_layer_transcoder's",
    ),
    ("circuit-tracer", lambda f: edit_json(f / "config.yaml", activation="topk"), "coder.k': None, expected a number"),
    (
        "circuit-tracer",
        lambda f: edit_json(f / "config.yaml", feature_input_hook="hook_resid_mdi"),
        "site 'hook_resid_mdi' is unknown; did you mean 'hook_resid_mid'?",
    ),
    ("circuit-tracer set", lambda f: (f / "layer_1.safetensors").unlink(), "layer_1.safetensors: not found"),
    (
        "circuit-tracer set",
        lambda f: edit_json(f / "config.yaml", transcoders=["hf://a/b/layer_0.safetensors"]),
        "lists 'hf://a/b/layer_0.safetensors', expected files on this machine",
    ),
    ("gemma-scope", lambda f: cut(f / "layer_1" / "params.npz", -40), "params.npz: damaged, or not a .npz file"),
    (
        "gemma-scope",
        lambda f: (f / "layer_1" / "params.npz").rename(f / "params.npz"),
        "params.npz: nothing in its path says which layer it is of",
    ),
    (
        "gemma-scope",
        lambda f: shutil.copytree(f / "layer_1", f / "more" / "layer_1"),
        "params.npz: a second coder of layer 1 beside",
    ),
    (
        "gemma-scope",
        lambda f: resave(f / "layer_1" / "params.npz", lambda tensors: tensors | {"b_enc": np.array([None])}),
        "params.npz: 'b_enc' is damaged",
    ),
    (
        "gemma-scope-2",
        lambda f: edit_json(f / "layer_1" / "config.json", hf_hook_point_in="model.layers.1.lm_head"),
        "site 'model.layers.1.lm_head' is unknown; expected one of: ",
    ),
    (
        "gemma-scope-2",
        lambda f: edit_json(f / "layer_1" / "config.json", hf_hook_point_in="model.layers.2.mlp.input"),
        "'model.layers.2.mlp.input' is in layer 2, expected layer 1",
    ),
    (
        "gemma-scope-2",
        lambda f: edit_json(f / "layer_2" / "config.json", architecture="gated"),
        "architecture 'gated', expected 'jump_relu'",
    ),
    (
        "gemma-scope-2",
        lambda f: edit_json(f / "layer_2" / "config.json", hf_hook_point_in="model.layers.2.output"),
        "reads is 'resid_post', expected 'mlp_in' as in",
    ),
    (
        "saelens",
        lambda f: edit_json(f / "layer_0" / "cfg.json", architecture="gated"),
        "architecture 'gated' is unknown; expected one of: jumprelu, ",
    ),
    (
        "saelens",
        lambda f: edit_json(f / "layer_0" / "cfg.json", normalize_activations="layer_norm"),
        "normalize_activations is 'layer_norm', expected none or expected_average_only_in",
    ),
    (
        "saelens",
        lambda f: edit_json(f / "layer_0" / "cfg.json", normalize_activations="expected_average_only_in"),
        "expected a scaling_factor in activation_scaler.json beside it",
    ),
    ("saelens", lambda f: edit_json(f / "layer_0" / "cfg.json", d_out=9), "d_out is 9, expected 6"),
    ("saelens", lambda f: edit_json(f / "layer_0" / "cfg.json", d_sae=9), "d_sae=9, d_in=6, expected 16 and 6"),
    ("saelens", lambda f: edit_json(f / "layer_0" / "cfg.json", architecture="topk"), "k is None, expected a whole"),
    ("saelens", lambda f: (f / "layer_1" / "sae_weights.safetensors").unlink(), "sae_weights.safetensors: not found"),
    ("saelens", lambda f: edit_json(f / "layer_0" / "cfg.json", metadata={}), "site 'None' is unknown"),
]
SPOILED = {
    "jclt": CLT,
    "circuit-tracer": replace(CLT, reads="resid_mid"),
    "circuit-tracer set": PLT,
    "gemma-scope": replace(PLT, **SCOPE),
    "gemma-scope-2": PLT,
    "saelens": PLT,
}


@pytest.mark.parametrize(("layout", "spoil", "line"), FAULTS)
def test_what_is_wrong_gets_one_line(layout, spoil, line, tmp_path):
    jclt.save_coder(random_coder(SPOILED[layout]), tmp_path / "saved", layout.removesuffix(" set"))
    spoil(tmp_path / "saved")
    with pytest.raises(UserError, match=line) as error:
        jclt.load_coder(tmp_path / "saved")
    assert "\n" not in str(error.value) and str(tmp_path / "saved") in str(error.value)


def test_folders_that_hold_no_coder(tmp_path):
    with pytest.raises(
        UserError, match="nowhere': no such folder, expected 'demo', 'demo-transcoders', 'neurons' or the folder"
    ):
        jclt.load_coder(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file': is a file, expected"):
        jclt.load_coder(tmp_path / "file")
    with pytest.raises(UserError, match="no coder's files found, expected one of the layouts jclt, circuit-tracer, "):
        jclt.load_coder(tmp_path)
    with pytest.raises(UserError, match="dtype 'float8': expected one of: float32, bfloat16, float16"):
        jclt.load_coder(tmp_path, dtype="float8")


def test_convert(tmp_path, capsys):
    coder = random_coder(replace(PLT, **SCOPE, layers=(0, 1)), "float16")
    jclt.save_coder(coder, tmp_path / "scope", "gemma-scope")
    assert main(["convert", str(tmp_path / "scope"), str(tmp_path / "ours"), "--to", "jclt", "--dtype", "float16"]) == 0
    assert capsys.readouterr().out == (
        "done: transcoder of 2 layers with 16 jumprelu features each, mlp_normalized to mlp_out, "
        f"in {tmp_path / 'ours'}\n"
    )
    assert_same(jclt.load_coder(tmp_path / "ours"), jclt.load_coder(tmp_path / "scope"))
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "x"), "--to", "jclt", "--model", "demo"]) == 2
    assert "setting 'coder.width': 6, expected 128, the model's" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    assert "example: jclt convert" in capsys.readouterr().out


# Damage of every kind: one line, before memory is taken.


def poison(name: str, number: float):
    def change(tensors: dict) -> dict:
        array = np.array(tensors[name])
        array.reshape(-1)[-1] = number
        return tensors | {name: array}

    return change


NAMES = ("W_enc_1", "b_enc_1", "threshold_1", "W_dec_1", "b_dec_1", "W_skip_1")


@pytest.mark.parametrize(
    ("name", "number"),
    mark_others(
        product(NAMES, (np.nan, np.inf, -np.inf)),
        [("W_dec_1", np.inf), ("threshold_1", -np.inf), *((name, np.nan) for name in NAMES)],
    ),
)
def test_weights_that_are_not_finite_are_refused(name, number, tmp_path):
    jclt.save_coder(random_coder(replace(CLT, skip=True)), tmp_path / "saved")
    file = tmp_path / "saved" / f"{'W_dec' if name == 'W_dec_1' else 'W_enc'}_1.safetensors"
    resave(file, poison(name, number))
    with pytest.raises(UserError, match=f"{file}: tensor '{name}' holds NaN or infinity as float32, expected finite"):
        jclt.load_coder(tmp_path / "saved")
    with pytest.raises(UserError, match="holds NaN or infinity as bfloat16"):
        jclt.load_coder(tmp_path / "saved", dtype="bfloat16", keep=jclt.make_mesh(features=2))


def with_first(weight: jax.Array, number: float) -> jax.Array:
    array = np.array(weight)
    array.reshape(-1)[0] = number
    return jnp.asarray(array)


def test_a_narrow_type_holds_thresholds_to_its_range_and_refuses_other_numbers_beyond_it(tmp_path):
    coder = random_coder(PLT)
    layer = replace(coder.layers[0], threshold=with_first(coder.layers[0].threshold, 1e6))
    high = SparseCoder((layer, *coder.layers[1:]), coder.config)
    jclt.save_coder(high, tmp_path / "wide")
    jclt.save_coder(high, tmp_path / "narrow", dtype="float16")
    for folder, dtype in (("wide", "float16"), ("narrow", "float32")):
        assert float(np.asarray(jclt.load_coder(tmp_path / folder, dtype=dtype).layers[0].threshold)[0]) == 65504.0
    layer = replace(layer, encoder=with_first(layer.encoder, 1e6))
    large = SparseCoder((layer, *coder.layers[1:]), coder.config)
    with pytest.raises(
        UserError, match="layer_0.safetensors: tensor 'W_enc' exceeds float16, expected a dtype of a wid"
    ):
        jclt.save_coder(large, tmp_path / "none", dtype="float16")
    assert not (tmp_path / "none").exists()
    jclt.save_coder(large, tmp_path / "large")
    with pytest.raises(UserError, match="tensor 'W_enc' holds NaN or infinity as float16"):
        jclt.load_coder(tmp_path / "large", dtype="float16")


DAMAGED = [
    ("saelens", "layer_0/cfg.json", {"metadata": "text"}, "'metadata' is 'text', expected settings by name"),
    ("saelens", "layer_0/cfg.json", {"architecture": {"a": 1}}, "'architecture' is {'a': 1}, expected text"),
    ("saelens", "layer_0/cfg.json", {"activation_fn_kwargs": [3]}, "'activation_fn_kwargs' is .3., expected settings"),
    ("gemma-scope-2", "layer_0/config.json", {"architecture": [1]}, "'architecture' is .1., expected text"),
    ("gemma-scope-2", "layer_0/config.json", {"hf_hook_point_in": 5}, "'hf_hook_point_in' is 5, expected text"),
    ("circuit-tracer", "config.yaml", {"model_kind": ["clt"]}, "'model_kind' is .'clt'., expected text"),
    ("circuit-tracer", "config.yaml", {"feature_input_hook": {}}, "'feature_input_hook' is {}, expected text"),
    ("circuit-tracer", "config.yaml", {"activation": "gelu"}, "activation 'gelu' is unknown; did you mean 'relu'"),
    ("circuit-tracer", "config.yaml", {"activation": "relu"}, "tensor 'threshold_0' has no place in this coder"),
    ("circuit-tracer", "config.yaml", {"activation": "topk", "k": [3]}, "setting 'coder.k': .3., expected a number"),
    (
        "circuit-tracer",
        "config.yaml",
        {"activation": "topk", "k": 3},
        "tensor 'threshold_0' has no place in this coder",
    ),
    ("circuit-tracer set", "config.yaml", {"transcoders": [{"a": 1}]}, "transcoders lists {'a': 1}, expected the path"),
    ("jclt", "config.json", {"bandwidth": 10**400}, r"'coder.bandwidth' is 1000\S*, expected a number"),
    ("jclt", "config.json", {"bandwidth": -1.0}, "'coder.bandwidth': -1.0, expected a number above 0"),
    ("jclt", "config.json", {"features": 10**12}, "'coder.features' is 1000000000000, expected a whole number"),
    ("jclt", "config.json", {"features": 10**9}, r"the shape \[16, 6\], expected \[1000000000, 6\]"),
    ("jclt", "config.json", {"width": 0}, "'coder.width': 0, expected at least 1"),
    ("jclt", "config.json", {"layers": [-1, 0, 1]}, r"'coder.layers' is \[-1, 0, 1\], expected layers in order"),
    ("jclt", "config.json", {"kind": ["clt"]}, r"'coder.kind' is \['clt'\], expected one of: clt, "),
    ("jclt", "config.json", {"version": {}}, "version {}, expected 1"),
    ("jclt", "config.json", {"rule": []}, r"rule \[\] under activation 'jumprelu'"),
]


@pytest.mark.parametrize(("layout", "name", "changes", "line"), DAMAGED)
def test_damaged_settings_get_one_line(layout, name, changes, line, tmp_path):
    jclt.save_coder(random_coder(SPOILED[layout]), tmp_path / "saved", layout.removesuffix(" set"))
    edit_json(tmp_path / "saved" / name, **changes)
    with pytest.raises(UserError, match=line) as error:
        jclt.load_coder(tmp_path / "saved")
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("layout", SPOILED)
def test_what_is_no_plain_file_gets_one_line(layout, tmp_path):
    folder = tmp_path / "saved"
    jclt.save_coder(random_coder(SPOILED[layout]), folder, layout.removesuffix(" set"))
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        path.unlink()
        path.mkdir()
        if not (layout == "jclt" and path.name == "config.yaml"):  # which only circuit-tracer reads
            with pytest.raises(UserError, match="is a folder, expected"):
                jclt.load_coder(folder)
        path.rmdir()
        path.write_bytes(content)


def test_an_archive_is_looked_at_before_it_is_unpacked(tmp_path, monkeypatch):
    """Names and shapes suffice to refuse members that are not needed or too large for the memory."""
    jclt.save_coder(random_coder(SPOILED["gemma-scope"]), tmp_path / "saved", "gemma-scope")
    path = tmp_path / "saved" / "layer_1" / "params.npz"
    tensors = dict(np.load(path))
    np.savez_compressed(path, **tensors, more=np.zeros(1000))
    monkeypatch.setattr("jclt.array_files._read_array", None)
    with pytest.raises(UserError, match="params.npz: tensor 'more' has no place in this coder"):
        jclt.load_coder(tmp_path / "saved")
    np.savez_compressed(path, **tensors | {"W_enc": np.zeros((6, 5000))})
    with pytest.raises(
        UserError, match=r"params.npz: tensor 'W_enc' gives the encoder the shape \[5000, 6\], expected"
    ):
        jclt.load_coder(tmp_path / "saved")
    np.savez_compressed(path, **tensors)
    monkeypatch.setattr("jclt.memory.measure_free_host_memory", lambda: 1000)
    with pytest.raises(UserError, match="coder .*: needs .* kB of memory, expected at most 1 kB; dtype='bfloat16'"):
        jclt.load_coder(tmp_path / "saved", keep="device")


def test_a_flipped_bit_in_an_archive_is_noticed(tmp_path):
    jclt.save_coder(random_coder(SPOILED["gemma-scope"]), tmp_path / "saved", "gemma-scope")
    path = tmp_path / "saved" / "layer_1" / "params.npz"
    weight = np.load(path)["W_dec"].tobytes()
    raw = bytearray(path.read_bytes())
    raw[raw.index(weight) + 5] ^= 1
    path.write_bytes(bytes(raw))
    with pytest.raises(UserError, match="params.npz: 'W_dec' is damaged .(its checksum differs|Bad CRC-32)"):
        jclt.load_coder(tmp_path / "saved")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("IoError: No space left")])
@pytest.mark.parametrize("layout", ["jclt", "saelens"])
def test_a_full_disk_gets_one_line_and_leaves_nothing(error, layout, tmp_path, monkeypatch):
    def full(*_, **__):
        raise error

    monkeypatch.setattr("jclt.array_files.save_file", full)
    with pytest.raises(UserError, match="cannot be written .*No space left"):
        jclt.save_coder(random_coder(PLT), tmp_path / "saved", layout)
    assert not list(tmp_path.iterdir())


def test_the_working_folder_cannot_be_replaced(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "demo", ".", "--to", "jclt"]) == 2
    assert capsys.readouterr().err == "jclt: .: is the working folder, expected the name of a new one\n"
    assert not list(tmp_path.iterdir())


# What circuit-tracer makes of a folder, and we of its.


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (CLT, None),
        (PLT, None),
        (replace(PLT, skip=True), None),
        (replace(CLT, **RULES["topk"]), "has no TopK: its loaders would read a ReLU"),
        (replace(SAE, **RULES["topk"]), "has no TopK: its loaders would read a ReLU"),
        (replace(CLT, layers=(1, 2, 3)), "expects all layers from 0 on, got layers=(1, 2, 3)"),
        (replace(CLT, skip=True), "has no place for a cross-layer transcoder's skip"),
    ],
)
def test_our_folder_is_no_folder_of_circuit_tracers_where_it_would_be_misread(config, reason, tmp_path):
    assert misread_by_circuit_tracer(config) == reason
    coder = random_coder(config)
    jclt.save_coder(coder, tmp_path / "saved")
    assert (tmp_path / "saved" / "config.yaml").exists() == (reason is None)
    assert_same(jclt.load_coder(tmp_path / "saved"), coder)


def test_a_topk_of_circuit_tracers_is_never_a_relu(tmp_path, caplog):
    """circuit-tracer writes a tensor `k` into each file, even if its settings name no k; and its TopK has no ReLU."""
    w = arrays()
    write_circuit_tracer_set(tmp_path / "set", w, rule="topk")

    def with_k(*numbers: object) -> None:
        for i, number in enumerate(numbers):
            resave(tmp_path / "set" / f"layer_{i}.safetensors", lambda t, k=number: t | {"k": np.array(k)})

    with_k(4, 4, 4)
    coder = jclt.load_coder(tmp_path / "set")
    assert (coder.config.activation, coder.config.k) == ("topk", 4)
    assert "circuit-tracer's TopK keeps negative activations among the k largest, here they are 0" in caplog.text
    config_text = (tmp_path / "set" / "config.yaml").read_text()

    def get_refusal(more: str) -> str:
        (tmp_path / "set" / "config.yaml").write_text(config_text + more)
        with pytest.raises(UserError) as error:
            jclt.load_coder(tmp_path / "set")
        return str(error.value)

    assert "k is 5, [4] in the files, expected one number" in get_refusal("activation: topk\nk: 5\n")
    assert "activation 'relu', but the files hold a tensor 'k', expected topk" in get_refusal("activation: relu\n")
    with_k(4, 3, 4)
    assert "k is 4, [3, 4] in the files, expected one number" in get_refusal("")
    with_k(4, 4, 2.5)
    assert "tensor 'k' is of type float64 and shape [], expected a whole number" in get_refusal("")


def test_gemma_scopes_other_coders_are_no_transcoders(tmp_path):
    for name in ("res", "mlp", "att", "transcoders"):
        folder = tmp_path / f"gemma-scope-2b-pt-{name}"
        jclt.save_coder(random_coder(SPOILED["gemma-scope"]), tmp_path / "saved", "gemma-scope")
        (tmp_path / "saved").rename(folder)
        if name == "transcoders":
            assert jclt.load_coder(folder).config.kind == "transcoder"
            continue
        with pytest.raises(UserError, match="says which sites the coder reads and writes, expected reads= and writes="):
            jclt.load_coder(folder)
        sae = jclt.load_coder(folder / "layer_1", reads="resid_post", writes="resid_post")
        assert (sae.config.kind, sae.config.covered) == ("sae", (1,))


def test_files_that_are_links_into_a_cache(tmp_path):
    """As in the cache of huggingface_hub."""
    jclt.save_coder(random_coder(SPOILED["gemma-scope"]), tmp_path / "saved", "gemma-scope")
    coder = jclt.load_coder(tmp_path / "saved")
    for i, path in enumerate(sorted((tmp_path / "saved").rglob("params.npz"))):
        path.rename(tmp_path / f"blob{i}")
        path.symlink_to(tmp_path / f"blob{i}")
    assert_same(jclt.load_coder(tmp_path / "saved"), coder)


# Whose coder it is.


def test_the_name_of_a_coders_model(tmp_path):
    jclt.save_coder(random_coder(CLT), tmp_path / "run" / "coder")
    (tmp_path / "run" / "config.json").write_text('{"model": "other"}')
    assert coder_model(tmp_path / "run" / "coder") == coder_model(tmp_path / "run") == "a/model"
    assert jclt.load_coder(tmp_path / "run").config == CLT
    jclt.save_coder(random_coder(SPOILED["gemma-scope"]), tmp_path / "scope", "gemma-scope")
    assert coder_model(tmp_path / "scope") == ""
    (tmp_path / "run" / "coder" / "W_dec_1.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="cut off in its header"):
        coder_model(tmp_path / "run")


def test_a_models_own_coder_that_fits_badly_is_warned_of(tmp_path, caplog):
    model = load_demo()
    config = replace(exact_coder(model).config, model_fingerprint=model.fingerprint)
    jclt.save_coder(random_coder(config), tmp_path / "early")
    assert_same(jclt.load_coder(tmp_path / "early", model=model), random_coder(config))
    (warned,) = [record.getMessage() for record in caplog.records]
    assert "early' fits model 'demo' badly, which it was trained on: on a short text it misses" in warned
    jclt.save_coder(random_coder(replace(config, model_fingerprint="0" * 16, model="smol")), tmp_path / "other")
    message = (
        f"it was trained on model 'smol' .fingerprint {'0' * 16}., not on this one .{model.fingerprint}.; on a short"
    )
    with pytest.raises(UserError, match=message):
        jclt.load_coder(tmp_path / "other", model=model)
    # A model trained on from that one may still do.
    exact = exact_coder(model)
    tuned = SparseCoder(exact.layers, replace(exact.config, model_fingerprint="0" * 16))
    jclt.save_coder(tuned, tmp_path / "tuned")
    assert jclt.load_coder(tmp_path / "tuned", model=model).config.model_fingerprint == "0" * 16


@pytest.mark.parametrize(
    ("kind", "mesh"),
    mark_others(
        product(("clt", "clt skip", "transcoder skip"), (False, True)), [("clt skip", False), ("clt skip", True)]
    ),
)
def test_fit_is_that_of_what_the_coder_writes(kind, mesh):
    """The fit is measured layer by layer from decoder rows; the test computes it from all activations by `write`."""
    model, skip = golden_model("llama3"), kind.endswith("skip")
    config = replace(CLT, skip=skip, layers=(0, 2) if skip else (0, 1, 2)) if "clt" in kind else replace(PLT, skip=True)
    coder = random_coder(replace(config, width=model.config.width))
    _, seen = jclt.run(model, _get_probe_tokens(model), capture=("mlp_in", "mlp_out"))
    x, y = (np.asarray(seen[site])[list(config.covered), 1:] for site in ("mlp_in", "mlp_out"))
    activations, reconstruction = compute_outputs(coder, x)
    if mesh:
        devices = jclt.make_mesh(data=2, features=2)
        coder = jax.tree.map(lambda a, b: jax.device_put(a, b.sharding), coder, abstract_coder(coder.config, devices))
    error, active = measure_fit(coder, model)
    spread = np.square(y - y.mean(1, keepdims=True)).sum((1, 2))
    np.testing.assert_allclose(error, np.square(y - np.stack(reconstruction)).sum((1, 2)) / spread, rtol=1e-4)
    np.testing.assert_allclose(active, [(a != 0).sum(-1).mean() for a in activations])
