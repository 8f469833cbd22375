"""Coders saved here are the same in circuit-tracer and SAELens, and coders saved by these are the same here."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from coder_samples import CLT, PLT, RULES, SAE, compute_outputs, random_coder
from safetensors.numpy import load_file, save_file

import jclt
from jclt.coders.formats.circuit_tracer import _circuit_tracer_settings

torch = pytest.importorskip("torch", reason="needs circuit-tracer")
hub = pytest.importorskip("circuit_tracer.utils.hf_utils", reason="needs circuit-tracer")
peer_models = pytest.importorskip("circuit_tracer_models", reason="needs circuit-tracer")
clts = pytest.importorskip("circuit_tracer.transcoder.cross_layer_transcoder", reason="needs circuit-tracer")

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
CPU = torch.device("cpu")
X = np.random.default_rng(1).standard_normal((3, 7, 6), np.float32)


def assert_close(got, want):
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=0, atol=1e-5)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("layout", ["jclt", "circuit-tracer"])
@pytest.mark.parametrize(
    "config",
    [CLT, replace(CLT, **RULES["relu"]), PLT, replace(PLT, skip=True), replace(PLT, **RULES["relu"])],
    ids=["clt", "clt relu", "transcoder", "transcoder skip", "transcoder relu"],
)
def test_circuit_tracer_loads_what_is_saved(config, layout, lazy, tmp_path):
    coder = random_coder(config)
    jclt.save_coder(coder, tmp_path / "saved", layout)
    peer = peer_models.load_coder(tmp_path / "saved", lazy)
    assert (peer.feature_input_hook, peer.feature_output_hook) == ("mlp.hook_in", "hook_mlp_out")
    activations, reconstruction = compute_outputs(coder, X)
    with torch.no_grad():
        x = torch.tensor(X)
        features = torch.stack([peer.encode_layer(x[i], i) for i in range(3)])
        assert_close(features, np.stack(activations))
        assert_close(peer.decode(features, x), np.stack(reconstruction))
    assert 0 < (np.stack(activations) != 0).mean() < 1


@pytest.mark.parametrize("config", [replace(PLT, **RULES["topk"]), replace(CLT, **RULES["topk"])], ids=["plt", "clt"])
def test_why_no_topk_is_written_for_circuit_tracer(config, tmp_path):
    """With the settings that it would need, circuit-tracer's loaders read a ReLU."""
    coder = random_coder(config)
    jclt.save_coder(coder, tmp_path / "saved")
    assert not (tmp_path / "saved" / "config.yaml").exists()
    _, settings = _circuit_tracer_settings(config)
    (tmp_path / "saved" / "config.yaml").write_text(hub.yaml.safe_dump(dict(settings) | {"activation": "topk", "k": 5}))
    peer = peer_models.load_coder(tmp_path / "saved", False)
    with torch.no_grad():
        features = torch.stack([peer.encode_layer(torch.tensor(X[i]), i) for i in range(3)])
    relu = [np.maximum(coder.compute_preactivation(i, jnp.asarray(X[i])), 0) for i in range(3)]
    assert_close(features, np.stack(relu))


def test_a_topk_as_circuit_tracer_computes_it_is_read_from_a_tensor_k(tmp_path):
    """Up to the sign: circuit-tracer keeps negative activations among the k largest, and only these differ. It saves no
    tensor k itself; some published files have one."""
    transcoders = pytest.importorskip("circuit_tracer.transcoder.single_layer_transcoder")
    topk = pytest.importorskip("circuit_tracer.transcoder.activation_functions").TopK(5)
    peer = transcoders.SingleLayerTranscoder(6, 16, topk, 0, device=CPU, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.4)
        features = peer.encode(torch.tensor(X[0]))
    (tmp_path / "theirs").mkdir()
    path = str(tmp_path / "theirs" / "layer_0.safetensors")
    peer.to_safetensors(path)
    save_file(load_file(path) | {"k": np.array(5)}, path)
    coder = jclt.load_coder(tmp_path / "theirs", reads="mlp_in", writes="mlp_out")
    assert (coder.config.rule, coder.config.k) == ("topk", 5)
    assert_close(compute_outputs(coder, X[:1])[0][0], np.maximum(features, 0))


@pytest.mark.parametrize("rule", ["relu", "jump_relu"])
def test_what_circuit_tracer_saves_is_read(rule, tmp_path):
    generator = torch.Generator().manual_seed(0)
    peer = clts.CrossLayerTranscoder(3, 16, 6, rule, lazy_decoder=False, device=CPU, dtype=torch.float32)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.4)
        features = peer.encode(torch.tensor(X))
        reconstruction = peer.decode(features)
    peer.to_safetensors(str(tmp_path / "theirs"))
    coder = jclt.load_coder(tmp_path / "theirs", reads="hook_resid_mid", writes="hook_mlp_out")
    assert coder.config.rule == rule.replace("_", "") and coder.config.reads == "resid_mid"
    activations, output = compute_outputs(coder, X)
    assert_close(np.stack(activations), features)
    assert_close(np.stack(output), reconstruction)


@pytest.mark.parametrize(
    "config",
    [SAE, replace(SAE, **RULES["relu"]), replace(SAE, **RULES["topk"]), replace(PLT, skip=True), PLT],
    ids=["jumprelu", "standard", "topk", "jumprelu_skip_transcoder", "jumprelu_transcoder"],
)
def test_saelens_loads_what_is_saved(config, tmp_path):
    sae_lens = pytest.importorskip("sae_lens", reason="needs sae-lens")
    coder = random_coder(config)
    jclt.save_coder(coder, tmp_path / "saved", "saelens")
    activations, reconstruction = compute_outputs(coder, X)
    for i in range(3):
        peer = sae_lens.SAE.load_from_disk(tmp_path / "saved" / f"layer_{i}", device="cpu")
        with torch.no_grad():
            assert_close(peer.encode(torch.tensor(X[i])), activations[i])
            assert_close(peer(torch.tensor(X[i])), reconstruction[i])


def test_what_saelens_saves_is_read(tmp_path):
    sae_lens = pytest.importorskip("sae_lens", reason="needs sae-lens")
    settings = {"d_in": 6, "d_sae": 16, "apply_b_dec_to_input": True}
    metadata = sae_lens.saes.sae.SAEMetadata(model_name="gpt2", hook_name="blocks.2.hook_resid_post")
    peer = sae_lens.JumpReLUSAE(sae_lens.JumpReLUSAEConfig(**settings, metadata=metadata))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.4)
        features, reconstruction = peer.encode(torch.tensor(X[0])), peer(torch.tensor(X[0]))
    peer.save_model(tmp_path / "theirs")
    coder = jclt.load_coder(tmp_path / "theirs")
    assert (coder.config.covered, coder.config.reads, coder.config.kind) == ((2,), "resid_post", "sae")
    activations, output = compute_outputs(coder, X[:1])
    assert_close(activations[0], features)
    assert_close(output[0], reconstruction)
