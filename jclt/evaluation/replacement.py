"""The replacement model compared with the model: how often they agree, and what the reconstruction costs in loss.

Every MLP that the coder covers is replaced at every position, attention is not frozen, and no error is added back. The
control is mean ablation: every covered MLP writes its mean over tokens, whatever the prompt.
"""

from dataclasses import asdict, dataclass
from functools import reduce

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jclt.coders import Coder, CoderConfig, CoderReplacement
from jclt.errors import UserError
from jclt.evaluation.batches import (
    LARGEST_BATCH,
    check_finite,
    choose_batch_size,
    iterate_batches,
    mask_first_positions,
    to_host,
)
from jclt.evaluation.reconstruction import Moments, measure_moments, merge_moments
from jclt.mesh import shard_by_axes
from jclt.models import Model, ModelConfig, Replace, forward
from jclt.models.model import on_mesh
from jclt.models.sites import LAYER_SITES
from jclt.numerics import kl_divergence
from jclt.shapes import Array, ArrayLike, Bool, Float, Int, Logits, Params, Tokens


def check_replaceable(coder: CoderConfig) -> None:
    """An error if the coder reads after it writes: then no single pass of the model can be its replacement model."""
    order = list(LAYER_SITES)
    if coder.reads in order and coder.writes in order and order.index(coder.reads) > order.index(coder.writes):
        raise UserError(
            f"coder: reads '{coder.reads}', which comes after '{coder.writes}', expected a coder that reads before it "
            "writes: there is no replacement model of another"
        )


def compute_replaced_logits(config: ModelConfig, params: Params, coder: Coder, tokens: Tokens) -> Logits:
    return forward(config, params, tokens, edit=CoderReplacement(coder), unroll=True)[0]


def compute_ablated_logits(
    config: ModelConfig, params: Params, coder: CoderConfig, means: Float[ArrayLike, "L D"], tokens: Tokens
) -> Logits:
    """Logits where every covered layer writes its mean, from the coder's first position on."""
    start = slice(coder.first_position, None) if coder.first_position else None
    ablation = Replace({coder.writes: jnp.asarray(means)[:, None, None]}, position=start, value_layers=coder.covered)
    return forward(config, params, tokens, edit=ablation, unroll=True)[0]


def measure_mean_writes(
    model: Model, coder: CoderConfig, rows: ArrayLike, *, mask: ArrayLike | None = None, batch: int = LARGEST_BATCH
) -> Float[np.ndarray, "L D"]:
    """What each covered layer of the model writes on average over the tokens."""
    with on_mesh(model):
        total = reduce(
            merge_moments,
            (
                to_host(_measure_write_moments(model.config, model.params, coder, tokens, token_mask))
                for tokens, token_mask in iterate_batches(model, rows, mask, batch)
            ),
        )
    return np.asarray(total.mean, np.float32)


@eqx.filter_jit
def _measure_write_moments(
    config: ModelConfig, params: Params, coder: CoderConfig, tokens: Tokens, mask: Bool[Array, "B T"]
) -> Moments:
    _, seen, _ = forward(config, params, tokens, capture=(coder.writes,))
    return measure_moments(jnp.stack([seen[coder.writes][layer] for layer in coder.covered]), mask)


@eqx.filter_jit
def predict_tokens(
    config: ModelConfig, params: Params, coder: Coder, means: Float[ArrayLike, "L D"], tokens: Tokens
) -> Int[Array, "3 B T"]:
    """The most probable next tokens: the model's, the replacement's, the control's; -1 where logits are not finite."""
    logits = (
        forward(config, params, tokens)[0],
        compute_replaced_logits(config, params, coder, tokens),
        compute_ablated_logits(config, params, coder.config, means, tokens),
    )
    predicted = [jnp.where(_is_finite(x), jnp.argmax(x, axis=-1), -1) for x in logits]
    return shard_by_axes(jnp.stack(predicted), (None, None, None))


def _is_finite(logits: Logits) -> Bool[Array, "B T"]:
    return jnp.all(jnp.isfinite(logits), axis=-1)


@eqx.filter_jit
def _compare_batch(
    config: ModelConfig,
    params: Params,
    coder: Coder,
    means: Float[ArrayLike, "L D"],
    tokens: Tokens,
    mask: Bool[Array, "B T"],
) -> dict[str, Array]:
    """Sums over the measured positions; losses are summed over those whose next token is measured too."""
    model_logits = forward(config, params, tokens)[0]
    others = {
        "replaced": compute_replaced_logits(config, params, coder, tokens),
        "ablated": compute_ablated_logits(config, params, coder.config, means, tokens),
    }
    weight = mask.astype(model_logits.dtype)
    followed = weight[:, :-1] * weight[:, 1:]
    sums = {"positions": weight.sum(), "followed": followed.sum(), "loss": _sum_loss(model_logits, tokens, followed)}
    for name, logits in {"model": model_logits, **others}.items():
        sums[f"{name}_finite"] = jnp.all(_is_finite(logits) | ~mask)
    for name, logits in others.items():
        agrees = logits.argmax(axis=-1) == model_logits.argmax(axis=-1)
        sums[f"{name}_agreement"] = jnp.sum(agrees.astype(weight.dtype) * weight)
        sums[f"{name}_kl"] = jnp.sum(kl_divergence(model_logits, logits) * weight)
        sums[f"{name}_loss"] = _sum_loss(logits, tokens, followed)
    return sums


def _sum_loss(logits: Logits, tokens: Tokens, weight: Float[Array, "B T-1"]) -> Float[Array, ""]:
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
        """(control's loss - replacement's loss) / (control's loss - model's loss); NaN if the control loses nothing."""
        lost = self.ablated_loss - self.loss
        return (self.ablated_loss - self.replaced_loss) / lost if lost else float("nan")

    def summary(self) -> dict[str, float]:
        figures = {name: float(x) for name, x in asdict(self).items()}
        return figures if np.isnan(self.recovered) else figures | {"recovered": self.recovered}

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
    """Measures on token rows `[N, T]`, `batch` rows at once or as many as fit in memory. The control's `means` are by
    default those over the same tokens. Positions before the coder's first one stay the model's and are left out."""
    check_replaceable(coder.config)
    mask = mask_first_positions(coder.config, rows, mask)
    batch = batch or choose_batch_size(model, coder.config, rows, mask)
    if means is None:
        means = measure_mean_writes(model, coder.config, rows, mask=mask, batch=batch)
    check_finite(np.isfinite(means), f"model {model.name}: what its layers write at '{coder.config.writes}' is")
    sums: dict[str, float] = {}
    with on_mesh(model):
        for tokens, token_mask in iterate_batches(model, rows, mask, batch):
            batch_sums = to_host(_compare_batch(model.config, model.params, coder, means, tokens, token_mask))
            check_finite(batch_sums.pop("model_finite"), f"model {model.name}: its logits are")
            check_finite(batch_sums.pop("replaced_finite"), "coder: the logits of its replacement model are")
            check_finite(batch_sums.pop("ablated_finite"), f"model {model.name}: its logits with the means written are")
            sums = {name: sums.get(name, 0.0) + value for name, value in batch_sums.items()}

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
