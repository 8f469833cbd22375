"""`intervene`: what happens to the model when features, errors or values at sites are changed; beside it, what a graph
predicts.

Steps:

1. The original pass: run the model; keep what the coder reads and writes, patterns and denominators (`run_original`).
2. The changed pass: run it again with the edits (`run_changed`); `feature_pass.py` says what MLPs write there.
3. The prediction, from the edges of a graph and the changes of the edited features (`graphs/prediction.py`).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jclt.attribution import attribute
from jclt.attribution.attribute import check_coder
from jclt.coders import Coder, read_fingerprint
from jclt.errors import UserError
from jclt.graphs import Graph
from jclt.interventions.changes import Changes
from jclt.interventions.feature_pass import FeaturePass, Original, read_original
from jclt.interventions.result import ErrorShares, Intervention, make_result, measure_error_shares
from jclt.interventions.settings import (
    EditParts,
    Errors,
    Reference,
    Setting,
    Treatment,
    list_dropped_errors,
    parse_layers,
    sort_edits,
)
from jclt.mesh import fetch_to_host, mesh_of
from jclt.models import Compose, Edit, Freeze, Model, ModelConfig, forward
from jclt.models.model import Prompt, on_mesh, token_row
from jclt.numerics import einsum
from jclt.shapes import Array, Float, Logits, Params, Tokens


def intervene(
    model: Model,
    coder: Coder,
    prompt: Prompt,
    edits: Edit | Sequence[Edit],
    *,
    layers: tuple[int, int] | range | None = None,
    attention: Treatment = "frozen",
    norms: Treatment = "frozen",
    reference: Reference = "original",
    errors: Errors = "kept",
    graph: Graph | None = None,
    predict: bool = True,
) -> Intervention:
    """Runs the model on a prompt with and without edits, and compares.

    `edits` change features (`jclt.Set(0.0, layer=3, position=5, feature=17)`), the coder's errors (`site="errors"`) or
    any other site (a head: `site="head_out", head=2`; a neuron: `site="mlp_neurons", index=7`).

    layers      the first and the last layer of a range that is clamped: constrained patching. There the MLPs write what
                they wrote originally, plus what the edits change; the model runs on from the end of the range. Over all
                layers, with attention and norms frozen, this is the direct effect: the graph's edges. None: no layer
                is clamped
    attention   whether patterns keep their original values
    norms       whether the denominators of norms keep their original values
    reference   which MLPs react where no layer is clamped. "original": the coder's features stand in for the MLPs and
                are recomputed, and errors stay as they were (iterative patching); `Scale` and `Add` act on original
                activations, as they do with `layers`. "current": the model's own MLPs; an edit acts on the activation
                that the coder computes in the changed pass
    errors      "dropped" leaves out what the coder does not reconstruct
    graph       predicts the result. Without it every call runs `attribute`, which takes longer than the rest; with
                `predict=False` there is no prediction
    """
    setting = Setting(parse_layers(layers), attention, norms, reference, errors)
    results = compare_rows(model, coder, prompt, edits, setting, graph, predict)
    if len(results) > 1:
        raise UserError("edits: values of several rows, expected one number each; `jclt.sweep` takes several")
    return results[0]


def sweep(
    model: Model,
    coder: Coder,
    prompt: Prompt,
    edits: Edit | Sequence[Edit],
    *,
    layers: tuple[int, int] | range | None = None,
    attention: Treatment = "frozen",
    norms: Treatment = "frozen",
    reference: Reference = "original",
    errors: Errors = "kept",
    graph: Graph | None = None,
    predict: bool = True,
) -> list[Intervention]:
    """`intervene` for several strengths at once: the values of edits of features may be arrays `[n]`, as in
    `jclt.Scale(np.linspace(-2, 2, 9), layer=3, position=5, feature=17)`. Gives one result for each of the n values."""
    setting = Setting(parse_layers(layers), attention, norms, reference, errors)
    return compare_rows(model, coder, prompt, edits, setting, graph, predict)


def compare_rows(
    model: Model,
    coder: Coder,
    prompt: Prompt,
    edits: Edit | Sequence[Edit],
    setting: Setting,
    graph: Graph | None,
    predict: bool,
) -> list[Intervention]:
    """The results of one prompt, one for each row of the edits' values."""
    check_coder(model, coder)
    model, coder = use_one_device(model, coder)
    tokens = token_row(model, prompt)
    if graph is not None:
        check_graph(model, coder, tokens, graph)
    parts = sort_edits(model, coder, edits, setting, len(tokens))
    original, frozen, before = run_original(model, coder, tokens, setting)
    after = run_changed(model, coder, tokens, parts, setting, original, frozen)
    if predict and graph is None:
        graph = attribute(model, coder, prompt)
    of_errors = ErrorShares({}, 0)
    if predict and graph is not None:
        dropped = list_dropped_errors(setting, coder.config)
        of_errors = measure_error_shares(graph, parts.errors, dropped, len(parts.sites))
    before, after = (jax.tree.map(fetch_to_host, x) for x in (before, after))
    clamped = setting.writing == "clamped"
    return [
        make_result(
            model,
            coder,
            tokens,
            setting.describe(),
            clamped,
            Changes(*parts.changes[:3], *(x[row : row + 1] for x in parts.changes[3:])),
            before.take_row(0),
            after.take_row(row),
            graph if predict else None,
            of_errors,
        )
        for row in range(len(after.logits))
    ]


def use_one_device(model: Model, coder: Coder) -> tuple[Model, Coder]:
    """The model and the coder on one device, where a mesh holds their weights. Every host must call this."""
    if model.mesh is None and mesh_of(coder.decoder_bias(0)) is None:
        return model, coder
    params, coder = jax.tree.map(lambda x: jnp.asarray(fetch_to_host(x)), (dict(model.params), coder))
    return replace(model, params=params), coder


def check_graph(model: Model, coder: Coder, tokens: np.ndarray, graph: Graph) -> None:
    """An error if the graph is of other tokens, or says that another model or coder made it."""
    if not np.array_equal(graph.tokens, tokens):
        raise UserError("graph: is of another prompt, expected one of this prompt's tokens")
    made_by = graph.provenance
    if made_by.get("model_fingerprint") not in (None, model.fingerprint):
        raise UserError(f"graph: was made of another model ({made_by.get('model')}), expected {model.name}")
    if made_by.get("coder_fingerprint") not in (None, read_fingerprint(coder)):
        raise UserError(f"graph: was made with another coder ({made_by.get('coder')})")


class Pass(NamedTuple):
    """What a pass computed, for every row."""

    logits: Logits
    centred: Float[Array, "B V"]  # at the last position: logits before any soft cap, minus their mean
    activations: Float[Array, "C B T F"]  # after edits
    preactivations: Float[Array, "C B T F"]

    def take_row(self, row: int) -> dict[str, np.ndarray]:
        batch_axis = {"logits": 0, "centred": 0, "activations": 1, "preactivations": 1}
        return {name: np.take(getattr(self, name), row, axis) for name, axis in batch_axis.items()}


def center_logits(config: ModelConfig, params: Params, final: Float[Array, "B T D"]) -> Float[Array, "B V"]:
    table = params["token_embedding" if config.tied else "unembedding"]
    logits = einsum("bd,vd->bv", final[:, -1], table)
    return logits - logits.mean(axis=-1, keepdims=True)


def run_original(
    model: Model, coder: Coder, tokens: np.ndarray, setting: Setting
) -> tuple[Original, dict[str, Array], Pass]:
    """The original pass: at the coder's sites, the frozen values, and the logits."""
    sites = setting.list_frozen_sites(model.config)
    with on_mesh(model):
        return _run_original(model.config, model.params, coder, jnp.asarray(tokens)[None], sites)


@eqx.filter_jit
def _run_original(
    config: ModelConfig, params: Params, coder: Coder, tokens: Tokens, sites: tuple[str, ...]
) -> tuple[Original, dict[str, Array], Pass]:
    c = coder.config
    capture = tuple(dict.fromkeys((*sites, c.reads, c.writes, "resid_final")))
    logits, seen, _ = forward(config, params, tokens, capture=capture)
    original = read_original(coder, seen[c.reads], seen[c.writes])
    as_pass = Pass(
        logits, center_logits(config, params, seen["resid_final"]), original.activations, original.preactivations
    )
    return original, {name: seen[name] for name in sites}, as_pass


def run_changed(
    model: Model,
    coder: Coder,
    tokens: np.ndarray,
    parts: EditParts,
    setting: Setting,
    original: Original,
    frozen: dict[str, Array],
) -> Pass:
    """The pass with the edits, with a row for each row of the changes."""
    features = make_feature_pass(coder, parts, setting, original)
    rows = parts.changes.add.shape[0]
    batch = jnp.broadcast_to(jnp.asarray(tokens), (rows, len(tokens)))
    with on_mesh(model):
        return _run_changed(model.config, model.params, batch, features, Freeze(frozen))


def make_feature_pass(
    coder: Coder, parts: EditParts, setting: Setting, original: Original | None, *, records: bool = True
) -> FeaturePass:
    first, last = setting.layers or (0, -1)
    return FeaturePass(
        coder=coder,
        changes=parts.changes,
        original=original if setting.writing != "model" else None,
        error_edits=parts.errors,
        site_edits=parts.sites,
        writing=setting.writing,
        clamped=tuple(range(first, last + 1)),
        keeps_errors=setting.errors == "kept",
        records=records,
        current_pass={},
    )


@eqx.filter_jit
def _run_changed(config: ModelConfig, params: Params, tokens: Tokens, features: FeaturePass, frozen: Freeze) -> Pass:
    edit = Compose((frozen, features))  # edits act on frozen values
    logits, seen, _ = forward(config, params, tokens, capture=("resid_final",), edit=edit, unroll=True)
    activations, preactivations = features.take_features()
    centred = center_logits(config, params, seen["resid_final"])
    return Pass(logits, centred, jnp.stack(activations), jnp.stack(preactivations))
