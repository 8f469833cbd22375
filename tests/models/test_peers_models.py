"""Agreement with transformers on fresh random models of every family: forward, generation, and the way back."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jclt

golden = pytest.importorskip("golden.make_golden", reason="needs torch and transformers")

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
SEED = 8  # not one that the committed folders were made with
CASES = golden.cases()


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A model of transformers, what it computes, and the folder it was saved to."""
    peer = golden.random_model(CASES[request.param], SEED)
    folder = tmp_path_factory.mktemp(request.param)
    peer.save_pretrained(folder)
    want = golden.reference(peer, golden.tokens_for(CASES[request.param], SEED))
    return SimpleNamespace(folder=folder, want=want, model=jclt.load_model(folder))


def assert_close(got, want, tolerance=1e-4):
    np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=tolerance)


def peer_logits(folder, tokens):
    return golden.reference(golden.load(folder), tokens)["logits"]


def test_logits_and_hidden_states(case):
    logits, seen = jclt.run(case.model, case.want["tokens"], capture=("resid_pre", "resid_post", "resid_final"))
    assert_close(logits, case.want["logits"])
    assert_close(seen["resid_pre"], case.want["hidden"][:-1])
    assert_close(seen["resid_post"][:-1], case.want["hidden"][1:-1])
    assert_close(seen["resid_final"], case.want["hidden"][-1])


def test_greedy_generation(case):
    tokens, greedy = case.want["tokens"][:1], case.want["greedy"]
    assert case.want["margin"].min() > 1e-3, "a choice too close to compare, take another seed"
    ids = jclt.generate(case.model, tokens, max_new_tokens=len(greedy), stop_tokens=())
    assert np.asarray(ids).tolist() == [[*tokens[0], *greedy]]


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_transformers_reads_what_was_saved(case, tmp_path, shard_bytes):
    jclt.save_model(case.model, tmp_path / "saved", shard_bytes=shard_bytes)
    assert (tmp_path / "saved" / "model.safetensors.index.json").exists() == (shard_bytes < 10**9)
    assert_close(peer_logits(tmp_path / "saved", case.want["tokens"]), case.want["logits"])
    again = jclt.load_model(tmp_path / "saved")
    assert again.config.explicit() == case.model.config.explicit()
    assert all(np.array_equal(again.params[name], value) for name, value in case.model.params.items())


FULL, SLIDING = "full_attention", "sliding_attention"
VARIANTS = [
    ("mistral", {"layer_types": [FULL] * 3}),  # which transformers does not heed in this family
    ("mistral", {"sliding_window": None}),
    ("qwen2", {"use_sliding_window": False, "layer_types": None}),
    ("gemma2", {"layer_types": [FULL] * 3}),
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": False}),
    ("gemma3", {"layer_types": [SLIDING] * 4, "rope_scaling": None}),
]


@pytest.mark.parametrize("name, changes", VARIANTS)
def test_variants_there_and_back(name, changes, tmp_path):
    """Options that are on in the cases are switched off here, and all layers are of one kind."""
    config = type(CASES[name]).from_dict({**CASES[name].to_dict(), **changes})
    peer, tokens = golden.random_model(config, SEED), golden.tokens_for(config, SEED)
    want = golden.reference(peer, tokens)["logits"]
    peer.save_pretrained(tmp_path / "theirs")
    model = jclt.load_model(tmp_path / "theirs")
    assert_close(jclt.run(model, tokens)[0], want)
    jclt.save_model(model, tmp_path / "ours")
    assert_close(peer_logits(tmp_path / "ours", tokens), want)


@pytest.mark.parametrize("sparse", [False, True])
def test_text_and_image_model(tmp_path, sparse):
    """Gemma 3 beside its image encoder; nested, its configuration is complete or, as on the hub, leaves most out."""
    text = CASES["gemma3"].to_dict() | {"final_logit_softcapping": None, "attention_bias": False}
    if sparse:
        kept = ("hidden_size", "intermediate_size", "model_type", "num_hidden_layers", "rope_scaling", "sliding_window")
        text = {key: text[key] for key in kept} | {"head_dim": 8}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = golden.hf.Gemma3Config(text, vision | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=1)
    peer = golden.random_model(config, SEED)
    want = golden.reference(peer, golden.tokens_for(CASES["gemma3"], SEED))
    peer.save_pretrained(tmp_path / "both")
    if sparse:
        settings = json.loads((tmp_path / "both" / "config.json").read_text())
        (tmp_path / "both" / "config.json").write_text(json.dumps(settings | {"text_config": text}))
    logits, _ = jclt.run(jclt.load_model(tmp_path / "both"), want["tokens"])
    assert_close(logits, want["logits"])


def hub_gpt2(name):
    return name.removeprefix("transformer.")


def new_gemma3(name):
    return "model.language_model." + name.removeprefix("model.")


@pytest.mark.parametrize("case", ["gpt2", "neox", "gemma3"], indirect=True)
def test_other_names_on_disk(case, tmp_path):
    """Names and buffers of the hub's first checkpoints, and the configuration as transformers 5 writes it."""
    shutil.copytree(case.folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    settings = json.loads((tmp_path / "config.json").read_text())
    mask = np.ones((1, 1, 32, 32), bool)
    if case.model.config.family == "gpt2":
        tensors = {hub_gpt2(name): value for name, value in tensors.items()} | {"h.0.attn.bias": mask}
    elif case.model.config.family == "gpt_neox":
        buffers = {"bias": mask, "masked_bias": np.float32(-1e9), "rotary_emb.inv_freq": np.ones(2, np.float32)}
        tensors |= {f"gpt_neox.layers.0.attention.{name}": np.asarray(value) for name, value in buffers.items()}
        rope = {"rope_theta": settings.pop("rotary_emb_base"), "partial_rotary_factor": settings.pop("rotary_pct")}
        settings["rope_parameters"] = rope | {"rope_type": "default"}
    else:
        tensors = {new_gemma3(name): value for name, value in tensors.items()}
        local = {"rope_type": "default", "rope_theta": settings.pop("rope_local_base_freq")}
        rope = settings.pop("rope_scaling") | {"rope_theta": settings.pop("rope_theta")}
        settings["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
    for old in ("rope_theta", "rope_scaling", "partial_rotary_factor"):
        settings.pop(old, None)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    model = jclt.load_model(tmp_path)
    assert dataclasses.asdict(model.config) == dataclasses.asdict(case.model.config)
    assert_close(jclt.run(model, case.want["tokens"])[0], case.want["logits"])
