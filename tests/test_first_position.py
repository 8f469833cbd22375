"""A coder leaves the positions before its `first_position` to the model: where it is trained, measured and traced."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from golden_cases import golden_model
from random_coders import random_coder
from traced_graphs import measure_residual

import jclt
from jclt.coders import CoderConfig, CoderReplacement
from jclt.errors import UserError
from jclt.evaluation import evaluate_reconstruction, evaluate_replacement
from jclt.mesh import make_mesh
from jclt.training.coder.harvest import harvest
from jclt.training.coder.prepare import complete_config
from jclt.training.config import TrainConfig

FIRST, LENGTH = 2, 7
MODEL = golden_model("llama3")
CODER = random_coder(CoderConfig(features=12, activation="relu", first_position=FIRST).fit_to_model(MODEL.config, ""))
PLAIN = replace(CODER, config=replace(CODER.config, first_position=0))
TOKENS = np.random.default_rng(0).integers(0, MODEL.config.vocabulary, (3, LENGTH))


def test_there_the_replacement_model_writes_what_the_model_does():
    _, model = jclt.run(MODEL, TOKENS, capture=("mlp_out",))
    _, replaced = jclt.run(
        MODEL, TOKENS, edit=CoderReplacement(CODER), unroll=True, capture=("mlp_in", "mlp_out", "resid_final")
    )
    np.testing.assert_allclose(replaced["mlp_out"][:, :, :FIRST], model["mlp_out"][:, :, :FIRST], atol=1e-5)
    activations = [CODER.encode(layer, x) for layer, x in enumerate(replaced["mlp_in"])]
    for layer, x in enumerate(replaced["mlp_in"]):
        written = np.asarray(CODER.write(layer, activations[: layer + 1], x))[:, FIRST:]
        np.testing.assert_allclose(replaced["mlp_out"][layer, :, FIRST:], written, atol=1e-4 * np.abs(written).max())


def test_training_sees_copies_of_the_last_positions_in_their_place():
    got = jax.jit(harvest, static_argnums=(0, 1))(MODEL.config, CODER.config, MODEL.params, TOKENS)
    _, seen = jclt.run(MODEL, TOKENS, capture=("mlp_in", "mlp_out"))
    positions = [*range(LENGTH - FIRST, LENGTH), *range(FIRST, LENGTH)]
    for site, x in (("mlp_in", got.reads), ("mlp_out", got.writes)):
        np.testing.assert_allclose(x, np.asarray(seen[site])[:, :, positions], atol=1e-6)


def test_evaluation_measures_the_other_positions():
    got = evaluate_reconstruction(MODEL, CODER, TOKENS)
    mask = np.broadcast_to(np.arange(LENGTH) >= FIRST, TOKENS.shape)
    want = evaluate_reconstruction(MODEL, PLAIN, TOKENS, mask=mask)
    assert got.tokens == want.tokens == 3 * (LENGTH - FIRST)
    for name in ("error", "centred_error", "spread", "density"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=1e-6)
    replaced, _ = jclt.run(MODEL, TOKENS, edit=CoderReplacement(CODER), unroll=True)
    logits, seen = jclt.run(MODEL, TOKENS, capture=("mlp_out",))
    means = np.asarray(seen["mlp_out"])[:, :, FIRST:].mean(axis=(1, 2))[:, None, None]
    ablated, _ = jclt.run(MODEL, TOKENS, edit=jclt.Replace({"mlp_out": means}, position=slice(FIRST, None)))

    def measure_kl(other) -> float:
        p, q = (np.asarray(jax.nn.log_softmax(x))[:, FIRST:].astype(float) for x in (logits, other))
        return (np.exp(p) * (p - q)).sum(-1).mean()

    figures = evaluate_replacement(MODEL, CODER, TOKENS)
    assert figures.kl == pytest.approx(measure_kl(replaced), rel=1e-4)
    assert figures.ablated_kl == pytest.approx(measure_kl(ablated), rel=1e-4)


def test_graphs_have_no_features_there_and_stay_exact():
    graph = jclt.attribute(MODEL, CODER, TOKENS[0])
    assert set(graph.features[:, 1]) == set(range(FIRST, LENGTH)) and measure_residual(graph) < 1e-5
    errors = graph.nodes.find("error")[graph.errors[:, 1] < FIRST]
    assert not graph.adjacency[:, errors].any()


def test_interventions_that_drop_errors_keep_what_the_model_writes_there():
    result = jclt.intervene(
        MODEL, CODER, TOKENS[0], [], attention="free", norms="free", errors="dropped", predict=False
    )
    want, _ = jclt.run(MODEL, TOKENS[0], edit=CoderReplacement(CODER), unroll=True)
    np.testing.assert_allclose(result.logits, want, atol=1e-4)


def test_a_row_must_be_twice_as_long():
    config = TrainConfig(CODER.config, length=3, batch=4)
    with pytest.raises(UserError, match="^setting 'length': 3, expected at least twice coder.first_position=2$"):
        complete_config(config, MODEL.config, make_mesh())
    with pytest.raises(UserError, match="^setting 'coder.first_position': -1, expected at least 0$"):
        replace(CODER.config, first_position=-1).check()
