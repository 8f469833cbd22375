"""The replacement model beside the model: how often they agree, and what the coder's reconstruction costs in loss.

Every MLP that the coder covers is replaced at every position, attention is free, and no error is added back. The
control knows nothing of the prompt: what every MLP writes is its mean over tokens.
"""

from dataclasses import asdict, dataclass
from functools import reduce

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jclt.coders import Coder, CoderConfig, replacing
from jclt.errors import UserError
from jclt.evaluation.batches import BATCH, batches, check_finite, on_host, rows_at_once
from jclt.evaluation.reconstruction import Moments, joined, moments
from jclt.mesh import placed
from jclt.models import Edit, Model, ModelConfig, forward
from jclt.models.model import on_mesh
from jclt.models.sites import LAYER_SITES
from jclt.shapes import Array, ArrayLike, Bool, Float, Int, Layer, Logits, Params, Tokens


def check_replaceable(coder: CoderConfig) -> None:
    """That in one pass of the model the coder has read a layer before it is to write there."""
    order = list(LAYER_SITES)
    if coder.reads in order and coder.writes in order and order.index(coder.reads) > order.index(coder.writes):
        raise UserError(
            f"coder: reads '{coder.reads}', which comes after '{coder.writes}', expected a coder that reads before it "
            "writes: there is no replacement model of another"
        )


def replaced_logits(config: ModelConfig, params: Params, coder: Coder, tokens: Tokens) -> Logits:
    return forward(config, params, tokens, edit=replacing(coder), unroll=True)[0]


def ablated_logits(
    config: ModelConfig, params: Params, coder: CoderConfig, means: Float[ArrayLike, "L D"], tokens: Tokens
) -> Logits:
    """Logits where every covered layer writes its mean."""
    return forward(config, params, tokens, edit=ablating(coder, means), unroll=True)[0]


def ablating(coder: CoderConfig, means: Float[ArrayLike, "L D"]) -> Edit:
    def edit(site: str, layer: Layer, value: Array) -> Array:
        index = coder.index(layer)
        if site != coder.writes or index is None:
            return value
        return jnp.zeros_like(value) + jnp.asarray(means)[index].astype(value.dtype)[None, None]

    return edit


def mean_writes(
    model: Model, coder: CoderConfig, rows: ArrayLike, *, mask: ArrayLike | None = None, batch: int = BATCH
) -> Float[np.ndarray, "L D"]:
    """What each covered layer of the model writes on average over the tokens."""
    with on_mesh(model):
        found = reduce(
            joined,
            (
                on_host(_write_moments(model.config, model.params, coder, tokens, kept))
                for tokens, kept in batches(model, rows, mask, batch)
            ),
        )
    return np.asarray(found.mean, np.float32)


@eqx.filter_jit
def _write_moments(
    config: ModelConfig, params: Params, coder: CoderConfig, tokens: Tokens, mask: Bool[Array, "B T"]
) -> Moments:
    _, seen, _ = forward(config, params, tokens, capture=(coder.writes,))
    return moments(jnp.stack([seen[coder.writes][layer] for layer in coder.covered]), mask)


@eqx.filter_jit
def said(
    config: ModelConfig, params: Params, coder: Coder, means: Float[ArrayLike, "L D"], tokens: Tokens
) -> Int[Array, "3 B T"]:
    """The most probable next tokens: the model's, the replacement's, the control's; -1 where logits are not finite."""
    logits = (
        forward(config, params, tokens)[0],
        replaced_logits(config, params, coder, tokens),
        ablated_logits(config, params, coder.config, means, tokens),
    )
    words = [jnp.where(_finite(x), jnp.argmax(x, axis=-1), -1) for x in logits]
    return placed(jnp.stack(words), (None, None, None))


def _finite(logits: Logits) -> Bool[Array, "B T"]:
    return jnp.all(jnp.isfinite(logits), axis=-1)


@eqx.filter_jit
def _compared(
    config: ModelConfig,
    params: Params,
    coder: Coder,
    means: Float[ArrayLike, "L D"],
    tokens: Tokens,
    mask: Bool[Array, "B T"],
) -> dict[str, Array]:
    """Sums over the positions measured; losses are summed over those whose next token is measured too."""
    own = forward(config, params, tokens)[0]
    others = {
        "replaced": replaced_logits(config, params, coder, tokens),
        "ablated": ablated_logits(config, params, coder.config, means, tokens),
    }
    weight = mask.astype(own.dtype)
    followed = weight[:, :-1] * weight[:, 1:]
    sums = {"positions": weight.sum(), "followed": followed.sum(), "loss": _loss(own, tokens, followed)}
    for name, logits in {"model": own, **others}.items():
        sums[f"{name}_finite"] = jnp.all(_finite(logits) | ~mask)
    for name, logits in others.items():
        sums[f"{name}_agreement"] = jnp.sum((logits.argmax(axis=-1) == own.argmax(axis=-1)).astype(own.dtype) * weight)
        sums[f"{name}_kl"] = jnp.sum(divergence(own, logits) * weight)
        sums[f"{name}_loss"] = _loss(logits, tokens, followed)
    return sums


def divergence(logits: Float[Array, "*N V"], other: Float[Array, "*N V"]) -> Float[Array, "*N"]:
    """KL(p || q) of the distributions that two sets of logits give."""
    p, q = jax.nn.log_softmax(logits, axis=-1), jax.nn.log_softmax(other, axis=-1)
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def _loss(logits: Logits, tokens: Tokens, weight: Float[Array, "B T-1"]) -> Float[Array, ""]:
    """Cross-entropy of the next tokens, summed."""
    chosen = jax.nn.one_hot(tokens[:, 1:], logits.shape[-1], dtype=logits.dtype)
    return -jnp.sum(jnp.sum(jax.nn.log_softmax(logits[:, :-1], axis=-1) * chosen, axis=-1) * weight)


@dataclass(frozen=True)
class Replacement:
    """Means over positions; cross-entropies in nats."""

    tokens: int
    agreement: float  # how often the most probable next token is the model's
    ablated_agreement: float
    kl: float  # KL(model || replacement)
    ablated_kl: float
    loss: float  # of the model
    replaced_loss: float
    ablated_loss: float

    @property
    def recovered(self) -> float:
        """The share of the loss, between the control's and the model's, that the replacement makes good; NaN where the
        control loses nothing."""
        lost = self.ablated_loss - self.loss
        return (self.ablated_loss - self.replaced_loss) / lost if lost else float("nan")

    def summary(self) -> dict[str, float]:
        found = {name: float(x) for name, x in asdict(self).items()}
        return found if np.isnan(self.recovered) else found | {"recovered": self.recovered}

    def table(self) -> str:
        lines = [
            "              agreement      KL    loss",
            f"model            {1:8.2%}  {0:6.3f}  {self.loss:6.3f}",
            f"replacement      {self.agreement:8.2%}  {self.kl:6.3f}  {self.replaced_loss:6.3f}",
            f"mean-ablated     {self.ablated_agreement:8.2%}  {self.ablated_kl:6.3f}  {self.ablated_loss:6.3f}",
        ]
        recovered = "the control loses none" if np.isnan(self.recovered) else f"{self.recovered:.2%}"
        return "\n".join([*lines, f"cross-entropy recovered: {recovered}"])


def evaluate_replacement(
    model: Model,
    coder: Coder,
    rows: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    means: Float[ArrayLike, "L D"] | None = None,
    batch: int | None = None,
) -> Replacement:
    """Streams over token rows `[N, T]`, `batch` at once or as many as there is room for; the control's means are those
    of the same tokens unless given."""
    check_replaceable(coder.config)
    batch = batch or rows_at_once(model, coder.config, rows, mask)
    if means is None:
        means = mean_writes(model, coder.config, rows, mask=mask, batch=batch)
    check_finite(np.isfinite(means), f"model {model.name}: what its layers write at '{coder.config.writes}' is")
    sums: dict[str, float] = {}
    with on_mesh(model):
        for tokens, kept in batches(model, rows, mask, batch):
            found = on_host(_compared(model.config, model.params, coder, means, tokens, kept))
            check_finite(found.pop("model_finite"), f"model {model.name}: its logits are")
            check_finite(found.pop("replaced_finite"), "coder: the logits of its replacement model are")
            check_finite(found.pop("ablated_finite"), f"model {model.name}: its logits with the means written are")
            sums = {name: sums.get(name, 0.0) + value for name, value in found.items()}

    def mean(name: str, count: str) -> float:
        return float(sums[name] / np.maximum(sums[count], 1))

    return Replacement(
        tokens=round(float(sums["positions"])),
        agreement=mean("replaced_agreement", "positions"),
        ablated_agreement=mean("ablated_agreement", "positions"),
        kl=mean("replaced_kl", "positions"),
        ablated_kl=mean("ablated_kl", "positions"),
        loss=mean("loss", "followed"),
        replaced_loss=mean("replaced_loss", "followed"),
        ablated_loss=mean("ablated_loss", "followed"),
    )
