"""Scores of all edges of a model of GPT-2's size: EAP-IG with 5 steps, beside the same method by TransformerLens hooks.

    python circuit_edges.py [--peer]

12 layers x 768, 12 heads, 32,491 edges, 8 pairs of prompts of 16 tokens. Expected: at least 3 times as fast as hooks
that multiply the gradients of one group of receivers after the other, as EAP-IG's code does (which needs a GPU).
Operations: 2 passes without gradients, 5 forward and backward passes (three times a pass), the product of each sender's
change with each receiver's gradient, which is summed over the steps before, and what carries gradients back through the
receivers' own weights.
"""

import os
from functools import partial
from typing import Any

import numpy as np
from machine import Case, best, matmul_rate, parser, report
from random_gpt2 import copy_to_peer, describe_for_peer, random_model

import jclt
from jclt.circuits import score_edges
from jclt.circuits.edges import list_edges
from jclt.interventions import PromptPairs
from jclt.models import Model, ModelConfig

PAIRS, LENGTH, STEPS = 8, 16, 5


def make_random_pairs(model: Model) -> PromptPairs:
    random = np.random.default_rng(0)
    sides = random.integers(3, model.config.vocabulary, (2, PAIRS, LENGTH))
    answers = random.integers(3, model.config.vocabulary, (2, PAIRS))
    return jclt.make_pairs(model, zip(*sides, *answers.tolist(), strict=True))


def count_operations(config: ModelConfig, edges: np.ndarray) -> float:
    """Products of weights and of edges; attention's own are left out."""
    tokens = PAIRS * LENGTH
    layer = 4 * config.width**2 + 2 * config.width * config.mlp_width
    passes = tokens * config.layers * layer * (2 + 3 * STEPS) + PAIRS * config.vocabulary * config.width * (
        2 + 3 * STEPS
    )
    back = tokens * STEPS * config.layers * 3 * config.width**2
    return 2.0 * (passes + back + tokens * config.width * edges.size)


def make_hooks_peer(model: Model) -> Any:
    """The same model in TransformerLens, with an own input for the queries, keys and values of every head."""
    from transformer_lens import HookedTransformer

    config = describe_for_peer(model.config)
    config.use_split_qkv_input = config.use_attn_result = config.use_hook_mlp_in = True
    peer = HookedTransformer(config)
    copy_to_peer(model, peer)
    return peer


def score_by_hooks(peer: Any, pairs: PromptPairs, steps: int = STEPS) -> np.ndarray:
    """EAP-IG's scores `[s, r]`, averaged over pairs, with inputs k / steps of the way from corrupted to clean."""
    import torch

    c = peer.cfg
    clean, corrupted = (torch.tensor(np.array(side)) for side in (pairs.clean, pairs.corrupted))
    right, wrong = (torch.tensor([a[0] for a in side]) for side in (pairs.answers, pairs.wrong_answers))
    count, rows = 1 + c.n_layers * (c.n_heads + 1), torch.arange(len(pairs))
    changes = torch.zeros(*clean.shape, count, c.d_model)
    scores = torch.zeros(count, c.n_layers * (3 * c.n_heads + 1) + 1)
    outputs, inputs = [("hook_embed", slice(0, 1))], []
    for layer in range(c.n_layers):
        first, column = 1 + layer * (c.n_heads + 1), layer * (3 * c.n_heads + 1)
        outputs.append((f"blocks.{layer}.attn.hook_result", slice(first, first + c.n_heads)))
        outputs.append((f"blocks.{layer}.hook_mlp_out", slice(first + c.n_heads, first + c.n_heads + 1)))
        for number, letter in enumerate("qkv"):
            start = column + number * c.n_heads
            inputs.append((f"blocks.{layer}.hook_{letter}_input", first, slice(start, start + c.n_heads)))
        at = column + 3 * c.n_heads
        inputs.append((f"blocks.{layer}.hook_mlp_in", first + c.n_heads, slice(at, at + 1)))
    inputs.append((f"blocks.{c.n_layers - 1}.hook_resid_post", count, slice(-1, None)))

    def add(places: slice, sign: int, value: Any, hook: Any) -> None:
        changes[:, :, places] += sign * (value if value.ndim == 4 else value[:, :, None]).detach()

    def multiply(before: int, places: slice, gradient: Any, hook: Any) -> None:
        gradient = gradient.detach() if gradient.ndim == 4 else gradient.detach()[:, :, None]
        scores[:before, places] += torch.einsum("btsd,btrd->sr", changes[:, :, :before], gradient)

    with torch.no_grad():
        for tokens, sign in ((corrupted, 1), (clean, -1)):
            peer.run_with_hooks(tokens, fwd_hooks=[(name, partial(add, at, sign)) for name, at in outputs])
        ends = [peer.embed(tokens) for tokens in (corrupted, clean)]
    backward = [(name, partial(multiply, before, at)) for name, before, at in inputs]
    for step in range(steps):

        def interpolate(value: Any, hook: Any, share: float = step / steps) -> Any:
            return (ends[0] + share * (ends[1] - ends[0])).requires_grad_()

        with peer.hooks(fwd_hooks=[("hook_embed", interpolate)], bwd_hooks=backward):
            logits = peer(clean)[:, -1]
            (logits[rows, right] - logits[rows, wrong]).sum().backward()
        peer.zero_grad()
    return (scores / len(pairs) / steps).numpy()


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--peer", action="store_true", help="run TransformerLens beside it")
    arguments = options.parse_args()
    model = random_model(LENGTH)
    pairs, edges = make_random_pairs(model), list_edges(model.config)
    settings = {"quadrature": "right", "steps": STEPS, "progress": False}

    def run() -> np.ndarray:
        return score_edges(model, pairs, "eap ig inputs", **settings).values

    seconds = best(run, arguments.repeats)
    against = ratio = None
    if arguments.peer:
        import torch

        peer = make_hooks_peer(model)
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        found, ours = score_by_hooks(peer, pairs), run()
        print(f"largest difference {np.abs(found - ours).max():.1e} of {np.abs(ours).max():.1e}")
        against, ratio = "TransformerLens hooks", best(lambda: score_by_hooks(peer, pairs), 1) / seconds
    work, rate = count_operations(model.config, edges), matmul_rate(5)
    name = f"EAP-IG, {STEPS} steps, {edges.sum():,} edges, {PAIRS} pairs"
    report([Case(name, work, seconds, work / seconds / rate, against, ratio)], rate, arguments.json)


if __name__ == "__main__":
    main()
