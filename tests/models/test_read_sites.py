"""Sites that are read without the rest of the pass hold what the whole pass captures there."""

import jax
import numpy as np
import pytest

import jclt
from jclt.models import read_sites
from jclt.models.model import run
from jclt.models.read_sites import run_to_sites

TOKENS = np.arange(3, 27, dtype=np.int32).reshape(2, 12)


@pytest.mark.parametrize(("site", "layers"), [("mlp_in", (0, 1, 2, 3)), ("resid_mid", (2, 0)), ("mlp_out", (0,))])
def test_the_same_as_in_the_whole_pass(site, layers):
    model = jclt.load_model("demo")
    _, seen = run(model, TOKENS, capture=(site,))
    for layer, got in zip(layers, read_sites(model, TOKENS, site, layers), strict=True):
        np.testing.assert_allclose(got, seen[site][layer], atol=1e-5)


def test_only_what_the_site_needs_is_computed():
    """Of the last layer no MLP, of the model no unembedding: the compiled program has as few operations."""
    model = jclt.load_model("demo")

    def count(site: str, layer: int) -> float:
        lowered = jax.jit(lambda p, t: run_to_sites(model.config, p, site, (layer,), t)).lower(model.params, TOKENS)
        costs = lowered.compile().cost_analysis()
        assert costs is not None
        return (costs[0] if isinstance(costs, list) else costs)["flops"]

    config, tokens = model.config, TOKENS.size
    of_mlp = 2 * tokens * config.width * config.mlp_width * 2
    assert count("mlp_out", 0) - count("mlp_in", 0) == pytest.approx(of_mlp, rel=0.1)
    assert count("mlp_in", 0) < 2 * tokens * config.width * config.vocabulary
