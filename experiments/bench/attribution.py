"""Attribution graphs: one prompt on a model of GPT-2's size beside circuit-tracer, a long prompt, many prompts at once.

    python experiments/bench/attribution.py
    python experiments/bench/attribution.py --long      # also 256 tokens with 20,000 active features

The first case has 12 layers x 768, 8,192 features a layer, 16 tokens, 20 active features a layer and token, all rows
traced: 3,600 features under circuit-tracer's conventions, in which position 0 has none. Expected is a whole call, once
compiled, at least 18 times faster than circuit-tracer 0.5.0 (with `--peer`, where it is installed: 3 more minutes).
Operations are those that the graph needs: a target's gradient takes 4 D^2 at each layer below it and each position up
to it, and every feature below it takes 2 D for each layer that it writes to. Cost: 5 minutes and 6 GB; 3 more minutes
and 12 GB with --long.
"""

import os
import resource
import subprocess
import sys
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from machine import Case, matmul_rate, parser, report

import jclt
from jclt.coders import CoderConfig, SparseCoder
from jclt.coders.coder import declare_coder
from jclt.graphs import Graph
from jclt.models import Model, ModelConfig, declare
from jclt.world import TASKS

LAYERS, WIDTH, HEADS, FEATURES, VOCABULARY, L0 = 12, 768, 12, 8192, 8192, 20
BATCHES = (1, 8, 32)


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


def count_operations(graph: Graph) -> float:
    """The operations of the products that all edges of features and errors need."""
    layers, length, width = graph.layers, len(graph.tokens), WIDTH
    active = np.zeros((layers, length))
    np.add.at(active, (graph.features[:, 0], graph.features[:, 1]), 1)
    writing = np.cumsum(np.cumsum(active, axis=0), axis=0)  # pairs of a feature and a layer up to this one it writes to
    below = np.concatenate([np.zeros((1, length)), np.cumsum(writing, axis=1)])
    ends = np.stack([np.full_like(graph.logit_positions, layers), graph.logit_positions], axis=1)
    targets = np.concatenate([graph.features[:, :2], ends])
    layer, position = targets.T
    through_attention = 4.0 * width**2 * np.minimum(layer, layers - 1) * (position + 1)
    return float(np.sum(through_attention + 2.0 * width * below[layer, position]))


def time_call(run: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def time_peer(length: int) -> float | None:
    """circuit-tracer on random weights of the same shape and sparsity; the faster of two calls."""
    try:
        import torch
        from circuit_tracer import attribute
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
    return min(time_call(lambda: attribute(tokens, model, batch_size=128, verbose=False))[0] for _ in range(2))


def time_one_prompt(repeats: int, with_peer: bool) -> list[Case]:
    tokens = np.random.default_rng(0).integers(3, VOCABULARY, 16)
    model = random_model(512)
    coder = random_coder(model, tokens, FEATURES, L0)
    first, graph = time_call(lambda: jclt.attribute(model, coder, tokens, conventions="circuit-tracer"))
    runs = [
        time_call(lambda: jclt.attribute(model, coder, tokens, conventions="circuit-tracer"))[0] for _ in range(repeats)
    ]
    seconds, work, rate = min(runs), count_operations(graph), matmul_rate(5)
    other_length, _ = time_call(
        lambda: jclt.attribute(model, coder, np.resize(tokens, 23), conventions="circuit-tracer")
    )
    print(f"first call {first:.1f} s, of which {first - seconds:.1f} s compile")
    print(f"first call of another length {other_length:.1f} s")
    del coder
    peer = time_peer(16) if with_peer else None
    beside: dict[str, Any] = {} if peer is None else {"against": "circuit-tracer", "ratio": peer / seconds}
    return [
        Case(f"12 x 768, 16 tokens, {len(graph.features)} features", work, seconds, work / seconds / rate, **beside)
    ]


def time_long_prompt() -> list[Case]:
    tokens = np.random.default_rng(0).integers(3, VOCABULARY, 256)
    model = random_model(512)
    coder = random_coder(model, tokens, FEATURES, 20_000 / 256 / LAYERS)
    jclt.attribute(model, coder, tokens, max_features=600)  # compiles
    seconds, graph = time_call(lambda: jclt.attribute(model, coder, tokens))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    reads = jclt.run(model, tokens, capture=("resid_mid",))[1]["resid_mid"]
    active = sum(int(np.count_nonzero(coder.encode(layer, read))) for layer, read in enumerate(reads))
    work, rate = count_operations(graph), matmul_rate(5)
    counts = f"{active} active features, {len(graph.features)} traced, {graph.missing:.2f} missing"
    print(f"256 tokens: {counts}, peak {peak:.1f} GB")
    return [Case("256 tokens, 7,500 of them traced", work, seconds, work / seconds / rate)]


def time_many_prompts() -> list[Case]:
    """On the shipped model: prompts of all tasks, against the number that go through the device at once."""
    model, coder = jclt.load_model("demo"), jclt.load_coder("demo")
    prompts = [e.prompt for task in TASKS.values() for e in task.examples("report", 24, 0)]
    cases = []
    for batch in BATCHES:
        jclt.attribute_batch(model, coder, prompts, batch=batch)
        seconds, graphs = time_call(lambda batch=batch: jclt.attribute_batch(model, coder, prompts, batch=batch))
        print(f"{jax.device_count()} devices, batch {batch}: {len(graphs) / seconds * 60:.0f} graphs a minute")
        cases.append(Case(f"{len(prompts)} prompts, batch {batch}, {jax.device_count()} devices", 0.0, seconds))
    return cases


def print_tolerances() -> None:
    """Prints which share of its rows each graph of the shipped model needs for each tolerance of its influence."""
    model, coder = jclt.load_model("demo"), jclt.load_coder("demo")
    prompts = [e.prompt for task in TASKS.values() for e in task.examples("report", 8, 0)]
    all_rows = [len(graph.features) for graph in jclt.attribute_batch(model, coder, prompts)]
    for tolerance in (0.1, 0.05, 0.01):
        graphs = jclt.attribute_batch(model, coder, prompts, tolerance=tolerance)
        share = np.mean([len(graph.features) / n for graph, n in zip(graphs, all_rows, strict=True)])
        missing = max(graph.missing for graph in graphs)
        print(f"tolerance {tolerance}: {share:.0%} of the rows, at most {missing:.3f} missing")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--peer", action="store_true", help="also time circuit-tracer")
    options.add_argument("--long", action="store_true", help="also time a prompt of 256 tokens")
    options.add_argument("--only-many", action="store_true", help="only many prompts at once")
    arguments = options.parse_args()
    cases = [] if arguments.only_many else time_one_prompt(min(arguments.repeats, 3), arguments.peer)
    cases += time_many_prompts()
    if not arguments.only_many:
        flags = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
        subprocess.run([sys.executable, __file__, "--only-many"], env=flags, check=True)
        print_tolerances()
        if arguments.long:
            cases += time_long_prompt()
    report(cases, matmul_rate(5), arguments.json)


if __name__ == "__main__":
    main()
