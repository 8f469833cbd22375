"""Labels from weights alone: `say ' Denver'` where few tokens have the logits that a feature raises, `reads ' Denver'`
where few tokens have the embeddings that its encoder reads.

Embeddings reach layer 0 alone as they are; attention and MLPs in between add to them, so that in later layers `reads`
says less. What a label is worth is told by its scores.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from jclt.coders import Coder
from jclt.features.labels import LONGEST_LABEL, Label, Labels
from jclt.features.weights import rank_effects, sum_targets, take_post_gains
from jclt.models import Model
from jclt.models.model import on_mesh
from jclt.models.sites import Sites
from jclt.models.transformer import apply_norm
from jclt.numerics import einsum
from jclt.shapes import Array, Float

MOST_TOKENS_SAID, RAISED_TOKENS = 3, 10
DOMINANT = 0.5
"""A token dominates if its effect is at least this share of the largest; a label needs all others to have less."""


def label_by_weights(model: Model, coder: Coder, places: Sequence[tuple[int, int]]) -> Labels:
    """`say X` where a feature has such a label, else `reads X`."""
    return label_by_embeddings(model, coder, places) | label_by_logits(model, coder, places)


def find_raised_tokens(
    model: Model, coder: Coder, places: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], list[tuple[str, float]]]:
    """The tokens whose logits features raise most, as texts, and by how much (`describe_weights`)."""
    found: dict[tuple[int, int], list[tuple[str, float]]] = {}
    texts = list_token_texts(model)
    for layer in sorted({layer for layer, _ in places}):
        chosen, index = [f for number, f in places if number == layer], coder.config.covered.index(layer)
        with on_mesh(model):
            sums, _ = sum_targets(
                coder.take_decoder_rows(index, np.array(chosen)), take_post_gains(model, coder, index)
            )
            effects = rank_effects(model.config, model.params, sums, min(RAISED_TOKENS, model.config.vocabulary))
        for feature, ids, values in zip(
            chosen, *(np.asarray(effects[x]) for x in ("raised_ids", "raised_effects")), strict=True
        ):
            found[layer, feature] = [(texts[i], x) for i, x in zip(ids.tolist(), values.tolist(), strict=True)]
    return found


def list_token_texts(model: Model) -> list[str]:
    """The text of each token; its number where there is no tokenizer."""
    size = model.config.vocabulary
    return [str(n) if model.tokenizer is None else model.tokenizer.text(n) for n in range(size)]


def label_by_logits(model: Model, coder: Coder, places: Sequence[tuple[int, int]]) -> Labels:
    """`say X` for features that raise few logits above all others."""
    raised = find_raised_tokens(model, coder, places)
    labels = {place: _write_dominant("say", [(repr(text), x) for text, x in raised[place]]) for place in places}
    return {place: label for place, label in labels.items() if label}


def label_by_embeddings(model: Model, coder: Coder, places: Sequence[tuple[int, int]]) -> Labels:
    """`reads X` for features whose encoder reads few tokens' embeddings above all others."""
    labels: Labels = {}
    if coder.config.reads not in ("mlp_in", "mlp_normalized", "resid_mid"):
        return labels
    texts = list_token_texts(model)
    for layer in sorted({layer for layer, _ in places}):
        chosen = [feature for number, feature in places if number == layer]
        read = np.asarray(read_embeddings(model, coder, layer, chosen))
        for feature, effects in zip(chosen, read, strict=True):
            order = np.argsort(-effects, kind="stable")[: MOST_TOKENS_SAID + 1]
            pairs = [(repr(texts[token]), float(effects[token])) for token in order.tolist()]
            label = _write_dominant("reads", pairs)
            if label:
                labels[layer, feature] = label
    return labels


def read_embeddings(model: Model, coder: Coder, layer: int, features: Sequence[int]) -> Float[Array, "n V"]:
    """How much each token's embedding alone gives to the pre-activations, minus the mean over the vocabulary; through
    the norm and its gain if the coder reads after them."""
    config, index = model.config, coder.config.covered.index(layer)
    with on_mesh(model):
        table = model.params["token_embedding"].astype(jnp.float32)
        gains = {name: x[layer] for name, x in model.params.items() if name in ("mlp_norm_gain", "mlp_norm_bias")}
        if coder.config.reads == "mlp_normalized":
            gains = {"mlp_norm_gain": jnp.full_like(gains["mlp_norm_gain"], 1 - config.norm_offset)}
        if coder.config.reads != "resid_mid":
            table = apply_norm(config, gains, "mlp_norm", Sites(layer), table)
        rows, _ = coder.load_encoder(index).encoder(0)
        read = einsum("nd,vd->nv", rows[np.asarray(features)].astype(jnp.float32), table)
        return read - jnp.mean(read, axis=1, keepdims=True)


def _write_dominant(verb: str, effects: Sequence[tuple[str, float]]) -> Label | None:
    """The label that names the tokens with the largest effects, if there are few of them."""
    if not effects or effects[0][1] <= 0:
        return None
    dominant = [text for text, effect in effects if effect >= DOMINANT * effects[0][1]]
    text = f"{verb} {', '.join(dict.fromkeys(dominant))}"
    return Label(text, "weights") if len(dominant) <= MOST_TOKENS_SAID and len(text) <= LONGEST_LABEL else None
