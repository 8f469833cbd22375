"""Laws of every model and coder, on configurations drawn from a seed: few by default, many with `-m fuzz`."""

from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawing import Draw, read_options
from golden_cases import CASES, golden_model
from graph_lists import assert_same_graph
from numpy.random import Generator
from random_coders import random_coder

import jclt
from jclt.attribution import attribute, attribute_batch
from jclt.coders import LAYOUTS, CoderConfig, SparseCoder, load_coder, save_coder
from jclt.errors import UserError
from jclt.graphs import Graph, export_json, import_json, load_graph
from jclt.graphs.graph import Kind
from jclt.models import LAYER_SITES, Model, Replace, check_sites

pytestmark = pytest.mark.fuzz

FEW = 1
"""Cases of the default run; with the flag there is one for each hundred damaged files."""


@pytest.fixture(autouse=True)
def forget_programs_of_a_case(draw: Draw):
    """Cases share no programs, and a process can hold those of a few cases only."""
    yield
    if draw.large:
        jax.clear_caches()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each test gets all cases; the options set their number."""
    if "case" in metafunc.fixturenames:
        draw = read_options(metafunc.config)
        count = max(FEW, draw.inputs // 100) if draw.large else FEW
        numbers = range(count) if draw.only is None else [draw.only]
        metafunc.parametrize("case", [case_of(draw.seed, number) for number in numbers], ids=str)


def pick(rng: Generator, items: Any) -> Any:
    return items[int(rng.integers(len(items)))]


@dataclass(frozen=True)
class Case:
    number: int
    family: str
    coder_config: CoderConfig
    dtype: str
    tokens: tuple[int, ...]
    budget: int  # features traced

    def __str__(self) -> str:
        c = self.coder_config
        extras = f"{'-skip' * c.skip}-{'all' if c.layers is None else c.layers}"
        return f"{self.number}-{self.family}-{c.kind}-{c.rule}{extras}-{self.dtype}-{len(self.tokens)}-{self.budget}"

    @property
    def model(self) -> Model:
        return golden_model(self.family)

    @cached_property
    def coder(self) -> SparseCoder:
        return self.filled(self.coder_config)

    def filled(self, config: CoderConfig) -> SparseCoder:
        """The coder with random weights that the type holds without loss."""
        config = config.fit_to_model(self.model.config, "random")
        coder = random_coder(config, cast(Any, np.dtype("float32")), seed=self.number)

        def rounded(path: Any, x: jax.Array) -> jax.Array:
            values = np.asarray(x)
            values = np.abs(values) if path[-1].name == "threshold" else values  # what every layout can say
            return jnp.asarray(values.astype(jnp.dtype(self.dtype)).astype(np.float32))

        return jax.tree_util.tree_map_with_path(rounded, coder)

    @cached_property
    def graph(self) -> Graph:
        return attribute(self.model, self.coder, np.array(self.tokens), max_features=self.budget)


@cache
def case_of(seed: int, number: int) -> Case:
    rng = np.random.default_rng([seed, number])
    family = CASES[(number + seed) % len(CASES)]
    model = golden_model(family).config
    layers = sorted(rng.choice(model.layers, int(rng.integers(1, model.layers + 1)), replace=False).tolist())
    activation = ("relu", "topk", "jumprelu")[number % 3]
    reads, writes = pick(rng, (("mlp_in", "mlp_out"), ("resid_mid", "mlp_out"), ("mlp_normalized", "mlp_out")))
    config = CoderConfig(
        ("clt", "transcoder")[number % 2],
        int(rng.integers(4, 25)),
        activation,
        int(rng.integers(1, 4)) if activation == "topk" else None,
        reads,
        writes,
        skip=bool(rng.random() < 0.4),
        layers=None if rng.random() < 0.6 else tuple(layers),
    )
    length = int(rng.integers(1, 9))
    tokens = tuple(rng.integers(0, model.vocabulary, length).tolist())
    budget = 7500 if rng.random() < 0.5 else int(rng.integers(1, 40))
    return Case(number, family, config, pick(rng, ("float32", "bfloat16", "float16")), tokens, budget)


def law(graph: Graph) -> None:
    """The contributions to each feature and output add up to its value. Other nodes have no incoming edges."""
    targets = graph.nodes.find("feature", "output")
    total = graph.adjacency.sum(axis=1, dtype=np.float64) + graph.bias + graph.rest
    size = np.abs(graph.adjacency).sum(axis=1) + np.abs(graph.bias) + graph.rest_mass  # of terms that may cancel
    assert (np.abs(total - graph.values)[targets] <= 1e-5 * size[targets]).all()
    kinds: list[Kind] = ["error", "token", "position"]
    assert not graph.adjacency[graph.nodes.find(*kinds)].any()
    assert (graph.rest_mass >= np.abs(graph.rest) * (1 - 1e-5)).all()
    assert (graph.nodes.layer[:, None] > graph.nodes.layer[None])[graph.adjacency != 0].all()


def close(got: np.ndarray, want: np.ndarray, share: float) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype
    np.testing.assert_allclose(got, want, rtol=0, atol=share * max(np.abs(want).max(initial=0), 1e-30))


def same_weights(got: SparseCoder, want: SparseCoder) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=str(path))


def test_conservation_holds_and_pruning_files_and_json_keep_it(case: Case, tmp_path: Path):
    graph = case.graph
    law(graph)
    assert len(graph.features) <= case.budget
    assert (len(graph.features) == case.budget or not graph.rest.any()) and 0 <= graph.missing <= 1
    rng = np.random.default_rng(case.number)
    small = graph.prune(float(rng.random()), float(rng.random()), pick(rng, ("paper", "circuit-tracer")))
    law(small)
    assert len(small) <= len(graph) and set(map(tuple, small.features)) <= set(map(tuple, graph.features))
    scores = graph.scores
    assert -1e-6 <= scores.replacement <= scores.completeness + 1e-6 <= 1 + 2e-6

    for number, saved in enumerate((graph, small)):
        saved.save(tmp_path / f"{number}.npz")
        assert_same_graph(load_graph(tmp_path / f"{number}.npz"), saved)
        export_json(saved, tmp_path / f"{number}.json.gz")
        imported = import_json(tmp_path / f"{number}.json.gz")
        np.testing.assert_array_equal(
            imported.adjacency[imported.adjacency != 0], saved.adjacency[saved.adjacency != 0]
        )
        np.testing.assert_array_equal(imported.features, saved.features)
        assert imported.logit_names == saved.logit_names and imported.token_texts == saved.token_texts
        export_json(imported, tmp_path / f"{number} again.json.gz")
        twice = import_json(tmp_path / f"{number} again.json.gz")
        np.testing.assert_array_equal(twice.adjacency, imported.adjacency)


def test_a_prompt_has_the_same_graph_alone_and_among_others(case: Case, draw: Draw):
    if not draw.large:
        pytest.skip("with -m fuzz; a few are compared in tests/attribution/test_many_prompts.py")
    rng = np.random.default_rng(case.number)
    others = [rng.integers(0, case.model.config.vocabulary, int(rng.integers(1, 9))) for _ in range(2)]
    prompts = [others[0], np.array(case.tokens), others[1]]
    graphs = attribute_batch(case.model, case.coder, prompts, max_features=case.budget)
    for graph in graphs:
        law(graph)
    got, want = graphs[1], case.graph
    for name in ("features", "errors", "tokens", "positions", "logit_tokens", "logit_positions"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
    for name in ("adjacency", "bias", "values", "activations", "logit_probabilities"):
        close(getattr(got, name), getattr(want, name), 1e-6)


@pytest.mark.parametrize("kind", ["drawn", "sae", "tied sae"])
def test_a_coder_is_the_same_in_every_layout_that_can_say_it(case: Case, kind: str, tmp_path: Path):
    sae = replace(case.coder_config, kind="sae", reads="resid_post", writes="resid_post", tied=kind == "tied sae")
    coder = case.coder if kind == "drawn" else case.filled(sae)
    sites = {"reads": coder.config.reads, "writes": coder.config.writes}
    for layout in LAYOUTS:
        for dtype in sorted({case.dtype, "float32"}):
            folder, twice = tmp_path / f"{layout} {dtype}", tmp_path / f"{layout} {dtype} twice"
            try:
                save_coder(coder, folder, layout, dtype)
            except UserError as error:
                assert str(error).startswith(("layout ", "dtype ")) and layout != "jclt" and not folder.exists()
                continue
            again = load_coder(folder, check=False, **({} if layout == "jclt" else sites))
            if layout == "jclt":
                assert again.config == coder.config
                same_weights(again, coder)
            for name in ("encoder", "encoder_bias", "threshold", "decoder_rows", "decoder_bias", "skip"):
                for got, want in zip(again.layers, coder.layers, strict=True):
                    np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=f"{layout} {name}")
            for name in SAID:
                assert getattr(again.config, name) == getattr(coder.config, name), (layout, name)
            save_coder(again, twice, layout, dtype)
            for path in twice.rglob("*.safetensors"):
                assert path.read_bytes() == (folder / path.relative_to(twice)).read_bytes()


SAID = ("kind", "features", "rule", "k", "reads", "writes", "skip", "covered", "size")
"""Each layout writes a coder without change, or refuses it."""


def test_what_was_captured_and_is_put_back_changes_no_bit(case: Case):
    rng = np.random.default_rng(case.number)
    possible = [site for site in LAYER_SITES if _has(case.model, site)]
    sites = tuple(sorted(rng.choice(possible, int(rng.integers(1, 5)), replace=False).tolist()))
    tokens = np.array(case.tokens)
    logits, seen = jclt.run(case.model, tokens, capture=sites)
    again, _ = jclt.run(case.model, tokens, capture=sites, edit=Replace(seen))
    np.testing.assert_array_equal(again, logits)
    assert np.isfinite(logits).all()


def _has(model: Model, site: str) -> bool:
    try:
        check_sites((site,), model.config)
    except UserError:
        return False
    return True
