"""A model of GPT-2's size with random weights, a coder of it, and the same numbers for circuit-tracer."""

import os
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import jclt
from jclt.coders import CoderConfig, SparseCoder
from jclt.coders.coder import declare_coder
from jclt.models import Model, ModelConfig, declare

LAYERS, WIDTH, HEADS, FEATURES, VOCABULARY, L0 = 12, 768, 12, 8192, 8192, 20


def random_model(context: int) -> Model:
    shape = (VOCABULARY, WIDTH, LAYERS, HEADS, 4 * WIDTH, context)
    kind: dict[str, Any] = {"norm": "layer", "activation": "gelu_tanh", "gated": False, "tied": True}
    biases = dict.fromkeys(("qkv_bias", "attn_out_bias", "mlp_bias", "learned_positions"), True)
    config = ModelConfig("gpt2", *shape, **kind, **biases)
    key = jax.random.key(0)
    weights = enumerate(declare(config).items())
    return Model(config, {n: w.init(jax.random.fold_in(key, i), jnp.float32) for i, (n, w) in weights}, None, "random")


def random_coder(model: Model, tokens: np.ndarray, features: int, l0: float) -> SparseCoder:
    """A JumpReLU coder whose thresholds give that many active features a layer and token of this prompt."""
    config = CoderConfig(features=features, reads="resid_mid", writes="mlp_out").fit_to_model(model.config, "random")
    keys = iter(jax.random.split(jax.random.key(1), 8 * LAYERS))
    scales = {"encoder": WIDTH**-0.5, "decoder": 0.05 / (LAYERS * WIDTH) ** 0.5}
    coder = declare_coder(config, lambda name, shape: scales.get(name, 0.0) * jax.random.normal(next(keys), shape))
    reads = jclt.run(model, tokens, capture=("resid_mid",))[1]["resid_mid"]
    preactivations = [reads[layer][1:] @ layer_weights.encoder.T for layer, layer_weights in enumerate(coder.layers)]
    levels = [jnp.full(features, np.quantile(np.asarray(h), 1 - l0 / features), jnp.float32) for h in preactivations]
    return eqx.tree_at(lambda c: [layer_weights.threshold for layer_weights in c.layers], coder, levels)


def time_call(run: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def describe_for_peer(config: ModelConfig) -> Any:
    """The settings of TransformerLens for a model of this file."""
    from transformer_lens import HookedTransformerConfig

    return HookedTransformerConfig(
        n_layers=config.layers,
        d_model=config.width,
        d_head=config.head_size,
        n_heads=config.heads,
        d_mlp=config.mlp_width,
        d_vocab=config.vocabulary,
        n_ctx=config.context,
        act_fn="gelu_new",
        eps=config.norm_epsilon,
        normalization_type="LN",
        model_name="random",
        device="cpu",
        tokenizer_name=None,
    )


def copy_to_peer(model: Model, peer: Any) -> None:
    """Gives a HookedTransformer of this shape the same weights."""
    import torch

    w = {name: np.asarray(weight) for name, weight in model.params.items()}
    names = {
        "ln1.w": w["attn_norm_gain"],
        "ln1.b": w["attn_norm_bias"],
        "attn.W_Q": w["query"].swapaxes(1, 2),
        "attn.W_K": w["key"].swapaxes(1, 2),
        "attn.W_V": w["value"].swapaxes(1, 2),
        "attn.b_Q": w["query_bias"],
        "attn.b_K": w["key_bias"],
        "attn.b_V": w["value_bias"],
        "attn.W_O": w["attn_out"],
        "attn.b_O": w["attn_out_bias"],
        "ln2.w": w["mlp_norm_gain"],
        "ln2.b": w["mlp_norm_bias"],
        "mlp.W_in": w["up"],
        "mlp.b_in": w["up_bias"],
        "mlp.W_out": w["down"],
        "mlp.b_out": w["down_bias"],
    }
    weights = {f"blocks.{i}.{name}": weight[i] for name, weight in names.items() for i in range(model.config.layers)}
    weights |= {"embed.W_E": w["token_embedding"], "pos_embed.W_pos": w["position_embedding"]}
    weights |= {"unembed.W_U": w["token_embedding"].T, "unembed.b_U": np.zeros(model.config.vocabulary, np.float32)}
    weights |= {"ln_final.w": w["final_norm_gain"], "ln_final.b": w["final_norm_bias"]}
    unchanged = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False)
    arrays = {name: torch.tensor(weight) for name, weight in weights.items()}
    peer.load_and_process_state_dict(arrays, **unchanged)


def make_peer_model(model: Model) -> Any:
    """The same model, number for number, as circuit-tracer's, without a coder; None where it is not installed."""
    try:
        import torch
        from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast
    except ImportError:
        return None
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    words = {"<bos>": 0, "<eos>": 1, "<pad>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    peer = TransformerLensReplacementModel(describe_for_peer(model.config))
    peer.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    copy_to_peer(model, peer)
    return peer


def make_peer(model: Model, coder: SparseCoder) -> Any:
    """The same model and coder, number for number, as circuit-tracer's; None where it is not installed."""
    peer = make_peer_model(model)
    if peer is None:
        return None
    import torch
    from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder

    sites = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out", "lazy_decoder": False}
    kind: dict[str, Any] = {"activation_function": "jump_relu", "dtype": torch.float32, "device": torch.device("cpu")}
    peer_coder = CrossLayerTranscoder(LAYERS, coder.config.features, WIDTH, **kind, **sites)
    with torch.no_grad():
        peer_coder.b_enc.zero_()
        peer_coder.b_dec.zero_()
        for index, layer in enumerate(coder.layers):
            peer_coder.W_enc[index] = torch.tensor(np.asarray(layer.encoder))
            peer_coder.W_dec[index].copy_(torch.tensor(np.asarray(coder.decoder_rows(index))))
            peer_coder.activation_function.threshold[index] = torch.tensor(np.asarray(layer.threshold))
    peer._configure_replacement_model(peer_coder)
    return peer
