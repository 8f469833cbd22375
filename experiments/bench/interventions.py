"""Interventions on a model of GPT-2's size: activation patching of a whole grid beside TransformerLens, and thousands
of ablations of single features beside circuit-tracer.

    python experiments/bench/interventions.py
    python experiments/bench/interventions.py --peer      # also the two others, where they are installed

The model has 12 layers x 768 and random weights, the prompts 16 tokens. The grid has every layer and position of
resid_pre, attn_out and mlp_out: 576 passes that each differ in one place. Expected is a whole call, once compiled, at
least 3 times faster than TransformerLens's own loop. Operations are those that the grid needs: the layers from the
place on, at the positions from it on, and the logits at the last position.

The coder of the ablations has 8,192 features a layer, of which 20 are active at each token. 2,000 active features are
set to 0, one at a time, while attention and norms are frozen and the MLPs react. Expected is a whole call, once
compiled, at least 10 times faster than circuit-tracer's own loop on the same model, coder and prompt (timed on 20
features, without the activations that it also returns), the same logits, and at least 40% of the matmul rate. The same
on the shipped model and coder, whose active features are taken several times. Cost: 4 minutes and 8 GB; 3 more minutes
with --peer.
"""

import os
import resource
from typing import Any

import numpy as np
from machine import Case, matmul_rate, parser, report
from random_gpt2 import (
    FEATURES,
    L0,
    LAYERS,
    VOCABULARY,
    WIDTH,
    copy_to_peer,
    describe_for_peer,
    make_peer,
    random_coder,
    random_model,
    time_call,
)

import jclt
from jclt.coders import Coder, SparseCoder
from jclt.interventions import Ablations
from jclt.models import Model

LENGTH = 16
SITES = ("resid_pre", "attn_out", "mlp_out")
ABLATIONS, PEER_ABLATIONS = 2000, 20


def random_prompts() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    prompts = random.integers(3, VOCABULARY, LENGTH), random.integers(3, VOCABULARY, LENGTH)
    for tokens in prompts:
        tokens[0] = 0  # circuit-tracer puts this one first where it is missing
    return prompts


def count_patching_operations() -> float:
    """Of the products with weights, which are nearly all."""
    layers, positions = np.meshgrid(np.arange(LAYERS), np.arange(LENGTH), indexing="ij")
    blocks = np.sum((LAYERS - layers) * (LENGTH - positions)) * 2.0 * 12 * WIDTH**2
    return len(SITES) * (blocks + layers.size * 2.0 * VOCABULARY * WIDTH)


def time_peer_patching(model: Model) -> float | None:
    """TransformerLens on the same grid, with the three functions that it offers for it; one run, after a first pass."""
    try:
        import torch
        from transformer_lens import HookedTransformer, patching
    except ImportError:
        return None
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    peer = HookedTransformer(describe_for_peer(model.config))
    copy_to_peer(model, peer)
    clean, corrupted = (torch.tensor(tokens)[None] for tokens in random_prompts())

    def measure(logits: Any) -> Any:
        return logits[0, -1, 5] - logits[0, -1, 6]

    def run() -> None:
        with torch.no_grad():
            _, cache = peer.run_with_cache(clean)
            for function in (
                patching.get_act_patch_resid_pre,
                patching.get_act_patch_attn_out,
                patching.get_act_patch_mlp_out,
            ):
                function(peer, corrupted, cache, measure)

    with torch.no_grad():
        peer(clean)
    return time_call(run)[0]


def time_patching(repeats: int, with_peer: bool) -> list[Case]:
    model = random_model(128)
    pairs = jclt.make_pairs(model, [(*random_prompts(), 5, 6)])

    def run() -> Any:
        return jclt.patch(model, pairs, SITES, metric="logit_difference", progress=False)

    first, result = time_call(run)
    seconds = min(time_call(run)[0] for _ in range(repeats))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    work, rate = count_patching_operations(), matmul_rate(5)
    print(f"patching {result.values.size} places: first call {first:.1f} s, of which {first - seconds:.1f} s compile")
    print(f"peak memory {peak:.1f} GB")
    peer = time_peer_patching(model) if with_peer else None
    beside: dict[str, Any] = {} if peer is None else {"against": "TransformerLens", "ratio": peer / seconds}
    name = f"patching, 12 x 768, {LENGTH} tokens, {result.values.size} places"
    return [Case(name, work, seconds, work / seconds / rate, **beside)]


def count_ablation_operations(features: np.ndarray) -> float:
    """Of the products with weights: with frozen patterns no queries and keys."""
    layers, positions, _ = features.T
    in_blocks = np.sum((LAYERS - layers) * (LENGTH - positions)) * 2.0 * 10 * WIDTH**2
    return float(in_blocks + len(features) * 2.0 * VOCABULARY * WIDTH)


def time_peer_ablations(model: Model, coder: SparseCoder, ours: Ablations) -> float | None:
    """Seconds for as many ablations by circuit-tracer, from those of a few; prints by how much their logits differ."""
    peer = make_peer(model, coder)
    if peer is None:
        return None
    import torch

    tokens = torch.tensor(random_prompts()[0])
    chosen = np.linspace(0, len(ours.features) - 1, PEER_ABLATIONS).astype(int)
    logits: list[np.ndarray] = []

    def run() -> None:
        logits.clear()
        for layer, position, feature in ours.features[chosen].tolist():
            edit = (layer, position, feature, 0.0)
            result = peer.feature_intervention(tokens, [edit], freeze_attention=True, return_activations=False)[0]
            logits.append(result[0, -1].numpy())

    run()
    seconds = time_call(run)[0]
    differences = np.abs(np.array(logits)[:, ours.tokens] - ours.logits[chosen])
    print(f"logits differ from circuit-tracer's by at most {differences.max() / np.abs(ours.logits).max():.1e}")
    return seconds / PEER_ABLATIONS * len(ours.features)


def list_active(model: Model, coder: Coder, tokens: np.ndarray) -> np.ndarray:
    """Layer, position and number of each active feature."""
    reads = jclt.run(model, tokens, capture=(coder.config.reads,))[1][coder.config.reads]
    return np.argwhere(np.stack([np.asarray(coder.encode(i, read)) for i, read in enumerate(reads)]))


def time_ablations(repeats: int, with_peer: bool) -> list[Case]:
    model = random_model(128)
    tokens = random_prompts()[0]
    coder = random_coder(model, tokens, FEATURES, L0)
    active = list_active(model, coder, tokens)
    active = active[active[:, 1] > 0]  # circuit-tracer has no features at position 0
    features = active[np.random.default_rng(0).permutation(len(active))[:ABLATIONS]]
    first, seconds, result = time_repeated(lambda: jclt.ablate(model, coder, tokens, features, progress=False), repeats)
    work, rate = count_ablation_operations(features), matmul_rate(5)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{len(features)} ablations: first call {first:.1f} s, of which {first - seconds:.1f} s compile")
    print(f"peak memory {peak:.1f} GB")
    peer = time_peer_ablations(model, coder, result) if with_peer else None
    beside: dict[str, Any] = {} if peer is None else {"against": "circuit-tracer", "ratio": peer / seconds}
    return [Case(f"ablations, 12 x 768, {LENGTH} tokens", work, seconds, work / seconds / rate, **beside)]


def time_shipped_ablations(repeats: int) -> list[Case]:
    model, coder = jclt.load_model("demo"), jclt.load_coder("demo")
    tokens = np.asarray(model.encode("Question: in the state of South Creek, what is the capital? Answer:"))[-LENGTH:]
    features = np.resize(list_active(model, coder, tokens), (ABLATIONS, 3))
    first, seconds, _ = time_repeated(lambda: jclt.ablate(model, coder, tokens, features, progress=False), repeats)
    print(f"{ABLATIONS} ablations on the shipped model: first call {first:.1f} s, later ones {seconds:.2f} s")
    return [Case(f"ablations, shipped model, {LENGTH} tokens", 0.0, seconds)]


def time_repeated(run: Any, repeats: int) -> tuple[float, float, Any]:
    """Seconds of the first call, and of the fastest of the later ones; the result."""
    first, result = time_call(run)
    return first, min(time_call(run)[0] for _ in range(repeats)), result


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--peer", action="store_true", help="also time TransformerLens and circuit-tracer")
    options.add_argument("--only", choices=("patching", "ablations", "shipped"), help="one part alone")
    arguments = options.parse_args()
    repeats, only = min(arguments.repeats, 3), arguments.only
    cases: list[Case] = []
    if only in (None, "patching"):
        cases += time_patching(repeats, arguments.peer)
    if only in (None, "ablations"):
        cases += time_ablations(repeats, arguments.peer)
    if only in (None, "shipped"):
        cases += time_shipped_ablations(repeats)
    report(cases, matmul_rate(5), arguments.json)


if __name__ == "__main__":
    main()
