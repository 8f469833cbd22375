"""`ablate`: thousands of features of one prompt changed, one at a time, and what each does to the next token.

A single feature's change is known before the pass: nothing before it has changed. So a row of the batch needs neither
the coder nor the layers below its feature, nor the positions before it (`batches.py`, `resume.py`).

    before the feature's layer          the original residual stream
    from there on                       out(l) = MLP(l) + change W(s, l)
    in the clamped layers, if any       out(l) = out0(l) + change W(s, l) + skip
    after the clamped layers            out(l) = MLP(l)
"""

import logging
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from jclt.attribution.attribute import check_coder
from jclt.attribution.targets import decode_token
from jclt.attribution.true_pass import stack_skips, widen
from jclt.coders import Coder
from jclt.errors import UserError
from jclt.interventions.batches import choose_starts, limit_rows, split_rows
from jclt.interventions.resume import KeptPass, keep_pass, make_rows_mesh, resume_pass
from jclt.interventions.settings import Setting, Treatment
from jclt.models import Model, ModelConfig, Place
from jclt.models.model import Prompt, token_row
from jclt.numerics import einsum, kl_divergence
from jclt.shapes import Array, Captured, Float, Int, Params, Tokens

log = logging.getLogger(__name__)

SHOWN_TOKENS = 10


@dataclass(frozen=True, eq=False)
class Ablations:
    """The effect of each feature's change on the next token."""

    features: Int[np.ndarray, "n 3"]  # layer, position, feature
    activations: Float[np.ndarray, "n"]  # original ones
    tokens: Int[np.ndarray, "k"]  # whose logits are reported
    token_names: tuple[str, ...]
    original_logits: Float[np.ndarray, "k"]
    logits: Float[np.ndarray, "n k"]
    kl: Float[np.ndarray, "n"]  # of the distribution after from that before, in nats
    likeliest: Int[np.ndarray, "n"]  # the likeliest next token after the change

    @property
    def effects(self) -> Float[np.ndarray, "n k"]:
        """How much each change moves each token's logit. (`intervene` gives logits minus the mean logit.)"""
        return self.logits - self.original_logits

    def summarize(self, shown: int = 10) -> str:
        """The features whose change moves the next token most."""
        lines = [f"{len(self.features)} features, one at a time; logit of {self.token_names[0]!r}, KL in nats"]
        for row in np.argsort(-self.kl, kind="stable")[:shown]:
            layer, position, feature = self.features[row].tolist()
            name = f"layer {layer} position {position} feature {feature}"
            effect = f"{self.effects[row, 0]:+.3f}  KL {self.kl[row]:.4f}"
            lines.append(f"  {effect}  {name}")
        return "\n".join(lines)


class Unchanged(NamedTuple):
    """The original pass over one prompt."""

    kept: KeptPass
    seen: Captured  # what the coder reads and writes, and the frozen sites
    activations: Float[Array, "C T F"]


class Rows(NamedTuple):
    """What the rows of a batch change."""

    layers: Int[Array, "B"]  # of the model
    positions: Int[Array, "B"]
    writes: Float[Array, "L B D"]  # what the change adds to each layer's output


class AblationSettings(NamedTuple):
    """What programs are compiled for."""

    model: ModelConfig
    reads: str
    writes: str
    frozen: tuple[str, ...]
    clamped: int


def ablate(
    model: Model,
    coder: Coder,
    prompt: Prompt,
    features: Int[np.ndarray, "n 3"] | None = None,
    *,
    factor: float = 0.0,
    clamped: int = 0,
    attention: Treatment = "frozen",
    norms: Treatment = "frozen",
    tokens: Int[np.ndarray, "k"] | None = None,
    batch: int | None = None,
    progress: bool = True,
) -> Ablations:
    """Multiplies each feature's activation by `factor`, one feature at a time, and runs the model.

    features    layer, position and feature of each; by default all active ones
    clamped     the number of layers, from the feature's own one on, that are clamped (constrained patching). 0: all
                layers react, as in `intervene` with reference "current"
    tokens      whose logits to report, by default the ten likeliest next tokens
    batch       rows that run at once on a device, by default as many as suit it

    The rows are split over this host's devices; each holds a copy of the model and the coder.
    """
    setting = Setting(attention=attention, norms=norms, reference="current")
    local = check_coder(model, coder)
    ids = token_row(model, prompt)
    if clamped < 0 or (batch is not None and batch < 1):
        raise UserError(f"clamped={clamped}, batch={batch}: expected at least 0 layers and at least 1 row")
    features = None if features is None else check_features(features, len(ids), coder)
    tokens = None if tokens is None else check_tokens(tokens, model.config.vocabulary)
    mesh = make_rows_mesh()
    params, coder = jax.device_put((dict(model.params), coder), NamedSharding(mesh, P()))
    params, skips = widen(params), stack_skips(coder, model.config.layers)
    frozen = setting.list_frozen_sites(model.config)
    settings = AblationSettings(model.config, local.reads, local.writes, frozen, clamped)
    original = run_unchanged(settings, params, coder, jax.device_put(ids[None], NamedSharding(mesh, P())))
    active, logits = np.asarray(original.activations), np.asarray(original.kept.logits)
    features = list_active(active, coder) if features is None else features
    index = np.array([coder.config.index(int(layer)) for layer in features[:, 0]], int)
    before = active[index, features[:, 1], features[:, 2]]
    chosen = np.argsort(-logits, kind="stable")[:SHOWN_TOKENS] if tokens is None else tokens

    def limit(start: int) -> int:
        return (batch or limit_rows(model.config, len(ids) - start)) * mesh.size

    kinds = ((len(chosen),), logits.dtype), ((), logits.dtype), ((), np.int64)
    columns = [np.zeros((len(features), *shape), dtype) for shape, dtype in kinds]
    starts = choose_starts(model.config, len(features), len(ids))
    with tqdm(total=len(features), unit="feature", disable=None if progress else True) as bar:
        for start, numbers in split_rows(features[:, 1], features[:, 0], starts, limit, mesh.size):
            rows = gather_rows(coder, settings, features[numbers], index[numbers], (factor - 1) * before[numbers], mesh)
            first_layer = np.int32(features[numbers, 0].min())
            measured = run_changed_rows(settings, start, params, skips, original, rows, first_layer, chosen)
            for column, values in zip(columns, jax.device_get(measured), strict=True):
                column[numbers] = values
            bar.update(len(np.unique(numbers)))
    names = tuple(decode_token(model, int(token)) for token in chosen)
    report_lost(columns[1], norms)
    return Ablations(features, before, chosen, names, logits[chosen], *columns)


def report_lost(kl: Float[np.ndarray, "n"], norms: Treatment) -> None:
    """Warns of changes that end in logits that are not finite."""
    if lost := np.count_nonzero(~np.isfinite(kl)):
        grown = ": with frozen norms activations can grow without bound; norms='free' bounds them"
        hint = grown if norms == "frozen" else ""
        log.warning("ablate: %d of %d changes end in logits that are not finite%s", lost, len(kl), hint)


def list_active(active: np.ndarray, coder: Coder) -> np.ndarray:
    """All active features."""
    index, position, feature = np.nonzero(active)
    return np.stack([np.asarray(coder.config.covered)[index], position, feature], axis=1)


def check_features(features: np.ndarray, length: int, coder: Coder) -> np.ndarray:
    features = np.asarray(features)
    if features.ndim != 2 or features.shape[1] != 3 or not np.issubdtype(features.dtype, np.integer):
        raise UserError(f"features: shape {features.shape}, expected integers [n, 3]: layer, position, feature")
    for layer, position, feature in features.tolist():
        if coder.config.index(layer) is None or not (0 <= position < length and 0 <= feature < coder.config.features):
            raise UserError(f"features: layer {layer}, position {position}, feature {feature} does not exist")
    return features


def check_tokens(tokens: np.ndarray, vocabulary: int) -> np.ndarray:
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not len(tokens) or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"tokens: shape {tokens.shape}, expected token ids [k], at least one")
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        wrong = tokens.min() if tokens.min() < 0 else tokens.max()
        raise UserError(f"tokens: id {wrong}, expected 0 to {vocabulary - 1}")
    return tokens


def gather_rows(
    coder: Coder, settings: AblationSettings, features: np.ndarray, index: np.ndarray, changes: np.ndarray, mesh: Mesh
) -> Rows:
    """What each row's change writes to each layer; rows are split over the devices."""
    covered, width = coder.config.covered, coder.config.size
    writes = np.zeros((settings.model.layers, len(features), width), changes.dtype)
    for source in np.unique(index):
        rows = np.flatnonzero(index == source)
        padded = np.resize(features[rows, 2], 1 << max(len(rows) - 1, 0).bit_length())
        decoders = np.asarray(coder.take_decoder_rows(int(source), padded))[: len(rows)]
        for step in range(decoders.shape[1]):
            writes[covered[source + step], rows] = decoders[:, step] * changes[rows, None]
    by_row, by_layer = NamedSharding(mesh, P("rows")), NamedSharding(mesh, P(None, "rows"))
    arrays = features[:, 0].astype(np.int32), features[:, 1].astype(np.int32), writes
    return Rows(*jax.device_put(arrays, (by_row, by_row, by_layer)))


@partial(jax.jit, static_argnames=("settings",))
@jax.named_scope("original_pass")
def run_unchanged(settings: AblationSettings, params: Params, coder: Coder, tokens: Tokens) -> Unchanged:
    kept, seen = keep_pass(settings.model, params, tokens, (settings.reads, settings.writes, *settings.frozen))
    return Unchanged(kept, seen, encode_layers(coder, seen[settings.reads]))


def encode_layers(coder: Coder, reads: Float[Array, "L *B T D"]) -> Float[Array, "C *B T F"]:
    coder = widen(coder)
    return jnp.stack([coder.encode(index, reads[layer]) for index, layer in enumerate(coder.config.covered)])


@partial(jax.jit, static_argnames=("settings", "start"))
@jax.named_scope("ablate")
def run_changed_rows(
    settings: AblationSettings,
    start: int,
    params: Params,
    skips: Float[Array, "L D D"] | None,
    original: Unchanged,
    rows: Rows,
    first_layer: Int[Array, ""],
    tokens: Int[Array, "k"],
) -> tuple[Float[Array, "B k"], Float[Array, "B"], Int[Array, "B"]]:
    """The logits of the chosen tokens, the divergence and the likeliest token of each row. The rows change nothing
    before position `start` and below `first_layer`."""
    seen, read = original.seen, None

    def edit(place: Place, value: Array) -> Array:
        nonlocal read
        layer = place.layer
        if place.site in settings.frozen:
            return put_frozen(place, seen[place.site], start, value)
        if place.site == settings.reads:
            read = value
        if place.site != settings.writes:
            return value
        assert place.positions is not None and read is not None
        at_position = place.positions == rows.positions[:, None]
        write = jnp.where(at_position[..., None], rows.writes[layer][:, None], 0).astype(value.dtype)
        if not settings.clamped:
            return value + write
        clamped = seen[settings.writes][layer][None, start:] + write
        if skips is not None:
            moved = read - seen[settings.reads][layer][None, start:]
            clamped = clamped + einsum("btd,ed->bte", moved, skips[layer])
        assert layer is not None
        is_clamped = (layer >= rows.layers) & (layer < rows.layers + settings.clamped)
        return jnp.where(is_clamped[:, None, None], clamped, value)

    batch = rows.layers.shape[0]
    logits = resume_pass(settings.model, params, original.kept, first_layer, start, batch, edit)[:, 0]
    kl = kl_divergence(jnp.broadcast_to(original.kept.logits, logits.shape), logits)
    return logits[:, tokens], kl, jnp.argmax(logits, axis=-1)


def put_frozen(place: Place, frozen: Array, start: int, value: Array) -> Array:
    """The part of a frozen value at the positions of the batch, for every row."""
    if place.layer is None:
        return jnp.broadcast_to(frozen[None, -1:], value.shape)
    part = frozen[place.layer]
    part = part[:, start:] if place.site == "pattern" else part[start:]
    return jnp.broadcast_to(part[None], value.shape)
