"""`steer`: text that the model writes while features, directions or other values are changed; and the largest
activations of features over data, by which edits may be scaled."""

from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from jclt.attribution.attribute import check_coder
from jclt.coders import Coder
from jclt.errors import UserError
from jclt.interventions.intervene import make_feature_pass, run_original, use_one_device
from jclt.interventions.settings import Setting, Treatment, sort_edits
from jclt.mesh import fetch_to_host
from jclt.models import Compose, Edit, Freeze, Model, ModelConfig, forward
from jclt.models.model import (
    Prompt,
    Sampling,
    choose_stops,
    continue_prompt,
    decode_continuation,
    on_mesh,
    token_array,
    token_row,
)
from jclt.shapes import Array, ArrayLike, Float, Int, Params, Tokens


class Steered(NamedTuple):
    """What the model writes with the edits, and without them."""

    text: str | None  # of the new tokens, None if the model has no tokenizer
    original_text: str | None
    tokens: Int[np.ndarray, "N"]  # the prompt's and the new ones
    original_tokens: Int[np.ndarray, "N"]
    logits: Float[np.ndarray, "new V"]  # by which each new token was chosen


def steer(
    model: Model,
    coder: Coder,
    prompt: Prompt,
    edits: Edit | Sequence[Edit],
    max_new_tokens: int = 32,
    *,
    attention: Treatment = "free",
    norms: Treatment = "free",
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_tokens: Sequence[int] | None = None,
) -> Steered:
    """Continues a prompt while edits act, as `intervene` with reference "current": the model's own MLPs react, and the
    change of each edited feature is written on top of what they write.

    Positions count from the start of the prompt. An edit at a single position acts on it alone; one of an open slice,
    such as `slice(5, None)`, and one without a position also act on every new token. The keys and values of earlier
    tokens are cached; the logits are those of a pass over all tokens with the same edits. Frozen patterns and
    denominators are those of the prompt; new tokens have none that could be kept.
    """
    setting = Setting(attention=attention, norms=norms, reference="current")
    sampling = Sampling(max_new_tokens, temperature, top_p, seed, choose_stops(model, stop_tokens))
    return steer_rows(model, coder, prompt, edits, setting, sampling, most=1)[0]


def sweep_steering(
    model: Model,
    coder: Coder,
    prompt: Prompt,
    edits: Edit | Sequence[Edit],
    max_new_tokens: int = 32,
    *,
    attention: Treatment = "free",
    norms: Treatment = "free",
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_tokens: Sequence[int] | None = None,
) -> list[Steered]:
    """`steer` for several strengths at once: the values of edits of features may be arrays `[n]`, as in
    `jclt.Add(np.linspace(0, 8, 5) * maxima[index, feature], layer=3, feature=17)`. Gives one result for each value."""
    setting = Setting(attention=attention, norms=norms, reference="current")
    sampling = Sampling(max_new_tokens, temperature, top_p, seed, choose_stops(model, stop_tokens))
    return steer_rows(model, coder, prompt, edits, setting, sampling, most=None)


def steer_rows(
    model: Model,
    coder: Coder,
    prompt: Prompt,
    edits: Edit | Sequence[Edit],
    setting: Setting,
    sampling: Sampling,
    most: int | None,
) -> list[Steered]:
    """One continuation for each row of the edits' values; an error if there are more than `most`."""
    check_coder(model, coder)
    model, coder = use_one_device(model, coder)
    tokens = token_row(model, prompt)
    parts = sort_edits(model, coder, edits, setting, len(tokens) + sampling.max_new_tokens)
    rows = parts.changes.add.shape[0]
    if most is not None and rows > most:
        raise UserError("edits: values of several rows, expected one number each; `jclt.sweep_steering` takes several")
    _, frozen, _ = run_original(model, coder, tokens, setting)
    features = make_feature_pass(coder, parts, setting, None, records=False)
    edit = Compose((Freeze(frozen), features))
    batch = np.repeat(tokens[None], rows, axis=0)
    steered, logits = continue_prompt(model, batch, sampling, edit=edit, unroll=True, keep_logits=True)
    original, _ = continue_prompt(model, tokens, sampling)
    assert logits is not None

    def decode(ids: np.ndarray) -> str | None:
        return None if model.tokenizer is None else decode_continuation(model, ids, sampling)

    return [
        Steered(decode(of_row), decode(original), of_row, original, row_logits)
        for of_row, row_logits in zip(steered, logits, strict=True)
    ]


def find_maxima(model: Model, coder: Coder, rows: Int[ArrayLike, "N T"], batch: int = 8) -> Float[np.ndarray, "C F"]:
    """The largest activation of each feature of each covered layer, over all positions of rows of tokens. A steering
    edit in units of it: `Add(strength * maxima[index, feature], ...)`."""
    check_coder(model, coder)
    tokens = np.atleast_2d(token_array(model, rows))
    largest = np.zeros((len(coder.config.covered), coder.config.features), np.float32)
    with on_mesh(model):
        for start in range(0, len(tokens), batch):
            part = np.resize(tokens[start : start + batch], (batch, tokens.shape[1]))  # the last one repeats rows
            largest = np.maximum(
                largest, fetch_to_host(_find_maxima(model.config, model.params, coder, jnp.asarray(part)))
            )
    return largest


@eqx.filter_jit
def _find_maxima(config: ModelConfig, params: Params, coder: Coder, tokens: Tokens) -> Float[Array, "C F"]:
    reads = coder.config.reads
    _, seen, _ = forward(config, params, tokens, capture=(reads,))
    encoded = [coder.encode(i, seen[reads][layer]) for i, layer in enumerate(coder.config.covered)]
    return jnp.stack([a.max(axis=(0, 1)) for a in encoded])
