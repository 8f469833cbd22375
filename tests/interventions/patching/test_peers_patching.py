"""Activation patching agrees with TransformerLens's own on random models, at every layer, position and head."""

import numpy as np
import pytest

import jclt

torch = pytest.importorskip("torch", reason="needs TransformerLens")
peer_models = pytest.importorskip("circuit_tracer_models", reason="needs TransformerLens")
golden = pytest.importorskip("golden.make_golden", reason="needs torch and transformers")

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
FAMILIES = {"gpt2": {}, "llama2": {}, "gemma2": {"attention_bias": False}}
"""And changes of their configurations."""
RIGHT, WRONG = 5, 6


@pytest.mark.parametrize("family", FAMILIES)
def test_every_place_has_transformer_lens_value(family, tmp_path):
    from transformer_lens import HookedTransformer, patching

    config = golden.cases()[family]
    source = golden.random_model(type(config).from_dict({**config.to_dict(), **FAMILIES[family]}), 8)
    source.save_pretrained(tmp_path)
    model = jclt.load_model(tmp_path)
    settings = peer_models.describe_model(source.config)
    peer = HookedTransformer(settings)
    weights = peer_models.CONVERSIONS[source.config.model_type](source, settings)
    weights.setdefault("unembed.b_U", torch.zeros(settings.d_vocab))
    unchanged = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False)
    peer.load_and_process_state_dict(weights, **unchanged)

    clean, corrupted = np.random.default_rng(0).integers(3, model.config.vocabulary, (2, 6))
    pairs = jclt.make_pairs(model, [(clean, corrupted, RIGHT, WRONG)])

    def measure(logits):
        return logits[0, -1, RIGHT] - logits[0, -1, WRONG]

    with torch.no_grad():
        _, cache = peer.run_with_cache(torch.tensor(clean)[None])
        arguments = peer, torch.tensor(corrupted)[None], cache, measure
        want = {
            "resid_pre": patching.get_act_patch_resid_pre(*arguments),
            "attn_out": patching.get_act_patch_attn_out(*arguments),
            "mlp_out": patching.get_act_patch_mlp_out(*arguments),
        }
        by_head = patching.get_act_patch_attn_head_out_by_pos(*arguments).numpy()
    got = jclt.patch(model, pairs, list(want), metric="logit_difference", progress=False)
    for values, site in zip(got.values, want, strict=True):
        np.testing.assert_allclose(values, want[site].numpy(), atol=1e-4, rtol=1e-4, err_msg=site)
    assert np.ptp(got.values) > 0.1
    heads = jclt.patch(model, pairs, "head_out", heads=True, metric="logit_difference", progress=False)
    np.testing.assert_allclose(heads.values[0], by_head, atol=1e-4, rtol=1e-4)
