"""Scores of edges beside TransformerLens's own gradients, and beside auto-circuit where it is installed
(`pip install --no-deps auto-circuit ordered-set blobfile pycryptodomex lxml plotly`)."""

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import jclt
from jclt.circuits import run_edge_circuits, score_edges
from jclt.circuits.edges import list_edges, take_best
from jclt.models import Model, ModelConfig, declare

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
sys.path.append(str(Path(__file__).parents[2] / "experiments" / "bench"))
LAYERS, HEADS, LENGTH = 3, 4, 7


@pytest.fixture(scope="module")
def case():
    """A small random model, the same in TransformerLens, and pairs."""
    pytest.importorskip("transformer_lens")
    import jax
    import jax.numpy as jnp
    from circuit_edges import make_hooks_peer

    shape = {"vocabulary": 32, "width": 32, "layers": LAYERS, "heads": HEADS, "mlp_width": 64, "context": LENGTH}
    biases = dict.fromkeys(("qkv_bias", "attn_out_bias", "mlp_bias", "learned_positions"), True)
    config = ModelConfig("gpt2", **shape, **biases, norm="layer", activation="gelu_tanh", gated=False, tied=True)
    weights = enumerate(declare(config).items())
    key = jax.random.key(0)
    params = {n: 0.3 * jax.random.normal(jax.random.fold_in(key, i), w.shape, jnp.float32) for i, (n, w) in weights}
    model = Model(config, params, None, "random")
    random = np.random.default_rng(0)
    sides, answers = random.integers(1, 32, (2, 4, LENGTH)), random.permutation(32)[:8].reshape(2, 4)
    pairs = jclt.make_pairs(model, zip(*sides, *answers.tolist(), strict=True))
    return model, make_hooks_peer(model), pairs


def test_eap_ig_is_that_of_hooks_in_transformer_lens(case):
    from circuit_edges import score_by_hooks

    model, peer, pairs = case
    want = score_by_hooks(peer, pairs, 5)
    got = score_edges(model, pairs, "eap ig inputs", quadrature="right", steps=5, progress=False).values
    assert want.shape == got.shape and (want[~list_edges(model.config)] == 0).all()
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


@pytest.fixture
def patchable(case):
    """The model with auto-circuit's masks, and its loader of the pairs."""
    import torch
    import transformer_lens

    if not hasattr(transformer_lens, "HookedTransformerKeyValueCache"):  # the name of TransformerLens 2
        transformer_lens.HookedTransformerKeyValueCache = transformer_lens.TransformerLensKeyValueCache
        module = ModuleType("transformer_lens.past_key_value_caching")
        module.HookedTransformerKeyValueCache = transformer_lens.TransformerLensKeyValueCache
        sys.modules[module.__name__] = module
    graph_utils = pytest.importorskip("auto_circuit.utils.graph_utils")
    from auto_circuit.data import PromptDataLoader, PromptDataset
    from circuit_edges import make_hooks_peer

    model, _, pairs = case
    sides = [torch.tensor(np.stack(side)) for side in (pairs.clean, pairs.corrupted)]
    answers = [[torch.tensor(tokens) for tokens in side] for side in (pairs.answers, pairs.wrong_answers)]
    loader = PromptDataLoader(PromptDataset(*sides, *answers), seq_len=None, diverge_idx=0, batch_size=len(pairs))
    options = {"factorized": True, "slice_output": "last_seq", "separate_qkv": True}
    return graph_utils.patchable_model(make_hooks_peer(model), **options), loader


def join_masks(by_module) -> np.ndarray:
    """auto-circuit's numbers by module as an array of edges `[s, r]`."""
    senders, columns = 1 + LAYERS * (HEADS + 1), []
    for layer in range(LAYERS):
        names = [f"blocks.{layer}.hook_{letter}_input" for letter in "qkv"] + [f"blocks.{layer}.hook_mlp_in"]
        columns += [row for name in names for row in np.atleast_2d(by_module[name].numpy())]
    columns.append(by_module[f"blocks.{LAYERS - 1}.hook_resid_post"].numpy())
    return np.stack([np.pad(column, (0, senders - len(column))) for column in columns], axis=1)


def test_eap_is_that_of_auto_circuit(case, patchable):
    """Its masks replace an edge at 1, and its loss is the negative difference."""
    from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores

    model, _, pairs = case
    peer, loader = patchable
    found = mask_gradient_prune_scores(peer, loader, None, "logit", "avg_diff", mask_val=0.0)
    want = -join_masks(found)
    got = score_edges(model, pairs, "eap", progress=False).values
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def test_a_circuit_runs_as_in_auto_circuit(case, patchable):
    import torch
    from auto_circuit.utils.ablation_activations import batch_src_ablations
    from auto_circuit.utils.graph_utils import patch_mode

    model, _, pairs = case
    peer, loader = patchable
    scores = np.random.default_rng(1).standard_normal(list_edges(model.config).shape)
    kept = take_best(model.config, scores, 60)
    names = list(peer.edges)
    senders = {name: number for number, name in enumerate(["Resid Start", *list_parts()])}
    receivers = {name: number for number, name in enumerate(list_inputs())}
    replaced = [edge for edge in names if not kept[senders[edge.src.name], receivers[edge.dest.name]]]
    outputs = batch_src_ablations(peer, loader, clean_corrupt="corrupt")
    batch = next(iter(loader))
    with torch.no_grad(), patch_mode(peer, outputs[batch.key], replaced):
        logits = peer(batch.clean)[:, -1]
    rows = torch.arange(len(pairs))
    right, wrong = (torch.tensor([tokens[0] for tokens in side]) for side in (pairs.answers, pairs.wrong_answers))
    want = (logits[rows, right] - logits[rows, wrong]).numpy()
    np.testing.assert_allclose(run_edge_circuits(model, pairs, kept[None])[0], want, atol=1e-4)


def list_parts():
    return [n for i in range(LAYERS) for n in (*(f"A{i}.{head}" for head in range(HEADS)), f"MLP {i}")]


def list_inputs():
    names = []
    for layer in range(LAYERS):
        names += [*(f"A{layer}.{head}.{letter}" for letter in "QKV" for head in range(HEADS)), f"MLP {layer}"]
    return [*names, "Resid End"]
