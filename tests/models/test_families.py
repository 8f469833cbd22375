"""A family of models is data: one definition is enough to read and to write it."""

import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

import jclt
from jclt.array_files import SafetensorsFile, write_tensors
from jclt.models import Model, declare
from jclt.models.formats import config_json
from jclt.models.formats.families import FAMILIES, REQUIRED, Family, Tensor

TINY = Family(
    name="tiny",
    architecture="TinyForCausalLM",
    keys={
        "vocabulary": ("n_tokens", REQUIRED),
        "width": ("dim", REQUIRED),
        "layers": ("depth", REQUIRED),
        "heads": ("n_heads", REQUIRED),
        "mlp_width": ("hidden", None),
        "context": ("max_length", 64),
        "activation": ("act", "relu"),
        "bos_token": ("bos_token_id", None),
    },
    tensors=(
        Tensor("embed", "D V -> V D", ("token_embedding",)),
        Tensor("layers.{}.norm_1", "D -> D", ("attn_norm_gain",)),
        Tensor("layers.{}.qkv", "(c H K) D -> c D H K", ("query", "key", "value")),
        Tensor("layers.{}.out", "D (H K) -> H K D", ("attn_out",)),
        Tensor("layers.{}.norm_2", "D -> D", ("mlp_norm_gain",)),
        Tensor("layers.{}.up", "M D -> D M", ("up",)),
        Tensor("layers.{}.down", "D M -> M D", ("down",)),
        Tensor("norm", "D -> D", ("final_norm_gain",)),
        Tensor("^head", "V D -> V D", ("unembedding",)),
    ),
    prefixes=("net.", ""),
    fixed={"gated": False, "rope_fraction": 0.5},
    ignored=("mask",),
    scaling_switch="scale_scores",
    mlp_ratio=3,
)
RAW = {"model_type": "tiny", "n_tokens": 19, "dim": 8, "depth": 2, "n_heads": 2, "hidden": None, "scale_scores": False}
SHAPES = {
    "net.embed": (8, 19),
    **{f"net.layers.{i}.{name}": (8,) for i in range(2) for name in ("norm_1", "norm_2")},
    **{f"net.layers.{i}.qkv": (24, 8) for i in range(2)},
    **{f"net.layers.{i}.out": (8, 8) for i in range(2)},
    **{f"net.layers.{i}.up": (24, 8) for i in range(2)},
    **{f"net.layers.{i}.down": (8, 24) for i in range(2)},
    "net.norm": (8,),
    "head": (19, 8),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The family is known, and a model of it is on disk."""
    monkeypatch.setattr(config_json, "FAMILIES", (*FAMILIES, TINY))
    random = np.random.default_rng(0)
    published = {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    (tmp_path / "model").mkdir()
    write_tensors(tmp_path / "model" / "model.safetensors", published | {"net.mask": np.ones(3, np.float32)})
    (tmp_path / "model" / "config.json").write_text(json.dumps(RAW))
    return tmp_path / "model"


def test_one_definition_reads_a_new_family(folder):
    model = jclt.load_model(folder)
    config = model.config
    assert (config.family, config.mlp_width, config.context, config.gated) == ("tiny", 24, 64, False)
    assert (config.attn_scale, config.activation, config.rotary_width) == (1.0, "relu", 2)
    assert {name: x.shape for name, x in model.params.items()} == {n: w.shape for n, w in declare(config).items()}
    file = SafetensorsFile(folder / "model.safetensors")
    np.testing.assert_array_equal(model.params["token_embedding"], file.read_tensor("net.embed").T)
    for part, name in enumerate(("query", "key", "value")):
        tensor = file.read_tensor("net.layers.1.qkv").reshape(3, 2, 4, 8)[part]
        np.testing.assert_array_equal(model.params[name][1], tensor.transpose(2, 0, 1))
    tokens = np.arange(6)
    logits, _ = jclt.run(model, tokens)
    same = Model(replace(config, family="llama"), model.params, None, "the same arithmetic under another name")
    np.testing.assert_array_equal(logits, jclt.run(same, tokens)[0])


def test_the_same_definition_writes_it(folder, tmp_path):
    model = jclt.load_model(folder)
    jclt.save_model(model, tmp_path / "again")
    first, again = (SafetensorsFile(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert set(again.header) == set(SHAPES)
    for name in SHAPES:
        np.testing.assert_array_equal(first.read_tensor(name), again.read_tensor(name))
    raw = json.loads((tmp_path / "again" / "config.json").read_text())
    assert raw["architectures"] == ["TinyForCausalLM"] and raw["hidden"] == 24 and raw["scale_scores"] is False
    assert jclt.load_model(tmp_path / "again").config == model.config


def test_what_the_family_cannot_express_is_named(folder, tmp_path):
    model = jclt.load_model(folder)
    gated = Model(replace(model.config, norm_epsilon=1e-3), model.params, None, "other norms")
    with pytest.raises(jclt.UserError, match="family tiny: norm_epsilon=0.001 cannot be written in its layout"):
        jclt.save_model(gated, tmp_path / "refused")


def test_every_family_names_each_weight_once():
    for family in (*FAMILIES, TINY):
        weights = [weight for tensor in family.tensors for weight in tensor.weights]
        assert len(weights) == len(set(weights)), family.name
        assert jnp.all(jnp.asarray([" -> " in tensor.pattern for tensor in family.tensors]))
