"""A model of GPT-2's size and a coder of it with random weights, and the same for circuit-tracer."""

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
    biases: dict[str, Any] = {"qkv_bias": True, "attn_out_bias": True, "mlp_bias": True, "learned_positions": True}
    config = ModelConfig(
        "gpt2", VOCABULARY, WIDTH, LAYERS, HEADS, 4 * WIDTH, context, norm="layer", gated=False, tied=True, **biases
    )
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


def make_peer(length: int) -> tuple[Any, Any] | None:
    """circuit-tracer's model with random weights of the same shape and sparsity, and a prompt; None without it."""
    try:
        import torch
        from circuit_tracer.replacement_model.replacement_model_transformerlens import (
            TransformerLensReplacementModel as ReplacementModel,
        )
        from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder
        from tokenizers import Tokenizer, models
        from transformer_lens import HookedTransformerConfig
        from transformers import PreTrainedTokenizerFast
    except ImportError:
        return None
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    shape: dict[str, Any] = {"n_layers": LAYERS, "d_model": WIDTH, "d_head": WIDTH // HEADS, "n_heads": HEADS}
    shape |= {"d_mlp": 4 * WIDTH, "d_vocab": VOCABULARY, "n_ctx": 128, "act_fn": "gelu_new", "normalization_type": "LN"}
    config = HookedTransformerConfig(**shape, model_name="random", device="cpu", tokenizer_name=None)
    sites = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out", "lazy_decoder": False}
    coder = CrossLayerTranscoder(
        LAYERS,
        FEATURES,
        WIDTH,
        activation_function="jump_relu",
        dtype=torch.float32,
        device=torch.device("cpu"),
        **sites,
    )
    with torch.no_grad():
        coder.W_enc.normal_(0, WIDTH**-0.5)
        for rows in coder.W_dec:
            rows.normal_(0, 0.05 / (LAYERS * WIDTH) ** 0.5)
    model = ReplacementModel.from_config(config, coder)
    words = {"<bos>": 0, "<eos>": 1, "<pad>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokens = torch.randint(3, VOCABULARY, (length,))
    tokens[0] = 0
    h = model.get_activations(tokens, apply_activation_function=False)[1].reshape(LAYERS, length, FEATURES)
    for layer in range(LAYERS):
        level = np.quantile(h[layer, 1:].detach().numpy(), 1 - L0 / FEATURES)
        coder.activation_function.threshold.data[layer] = float(level)
    return model, tokens
