"""Training a language model: its settings, its loss, its step, and the run from the first step to the saved model."""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jclt.data.batches import batch_rows, place
from jclt.data.load_tokens import holds_tokens, local_tokens
from jclt.errors import UserError
from jclt.hosts import together
from jclt.mesh import fetched, make_mesh, sharding
from jclt.models import Model, ModelConfig, Tokenizer, abstract_params, declare, forward, load_tokenizer, save_model
from jclt.models.formats.config_json import write_config
from jclt.shapes import Array, Float, Params, Tokens
from jclt.training.checkpoints import Checkpoints
from jclt.training.config import LmConfig, settings_of_step
from jclt.training.loop import fit
from jclt.training.metrics import Log, draw_curves, read_metrics
from jclt.training.optimizers import lm_optimizer
from jclt.training.run_folder import Place, check_settings, held_place, replaced_folder
from jclt.training.run_rows import find_rows, rows_begun_with, world_rows
from jclt.world.tokenizer import build_tokenizer


class LmState(NamedTuple):
    step: Array
    params: Params
    optimizer: Any


def init_state(config: LmConfig, mesh: Mesh) -> LmState:
    """Fresh parameters and optimizer state, made where they will lie."""
    placed = {name: target.sharding for name, target in abstract_params(config.model, mesh).items()}

    def params(key: Array) -> Params:
        weights = declare(config.model)
        keys = jax.random.split(key, len(weights))
        return {name: weight.init(k, jnp.float32) for k, (name, weight) in zip(keys, weights.items(), strict=True)}

    made = jax.jit(params, out_shardings=placed)(jax.random.key(config.seed))
    return LmState(jnp.zeros((), jnp.int32), made, jax.jit(lm_optimizer(config).init)(made))


def next_token_loss(
    config: ModelConfig, remat: bool, params: Params, tokens: Tokens, weights: Float[Array, "B T"]
) -> Float[Array, ""]:
    """Mean cross-entropy of each token given those before it, weighted by what predicting it counts."""
    logits, _, _ = forward(config, params, tokens[:, :-1], remat=remat)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.sum(losses * weights[:, 1:]) / jnp.sum(weights[:, 1:])


@partial(jax.jit, static_argnames="config", donate_argnames="state")
def train_step(
    config: LmConfig, state: LmState, tokens: Tokens, weights: Float[Array, "B T"]
) -> tuple[LmState, dict[str, Array]]:
    loss, gradient = jax.value_and_grad(partial(next_token_loss, config.model, config.remat))(
        state.params, tokens=tokens, weights=weights
    )
    # What comes out lies as what went in; in between the compiler decides, since Muon multiplies whole matrices.
    placed = jax.tree.map(lambda x: jax.typeof(x).sharding, (state.params, state.optimizer))
    update: Any = jax.sharding.auto_axes(lm_optimizer(config).update, out_sharding=placed)
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules mix types
        updates, inner = update(gradient, state.optimizer, state.params)
        params: Any = optax.apply_updates(state.params, updates)
    return LmState(state.step + 1, params, inner), {"loss": loss, "gradient_norm": optax.tree.norm(gradient)}


def find_tokenizer(config: LmConfig) -> Tokenizer:
    if config.data == "world":
        tokenizer = Tokenizer(build_tokenizer())
    elif config.tokenizer is None and not holds_tokens(config.data):
        raise UserError("setting 'tokenizer': missing, expected a folder with tokenizer.json for data that are text")
    else:
        folder = Path(config.tokenizer) if config.tokenizer else local_tokens(config.data)  # which brings its own
        found = load_tokenizer(folder)
        if found is None:
            raise UserError(f"tokenizer '{folder}': no tokenizer.json there")
        tokenizer = found
    if tokenizer.size > config.model.vocabulary:
        raise UserError(f"setting 'model.vocabulary': {config.model.vocabulary}, expected at least {tokenizer.size}")
    return tokenizer


def train_lm(config: LmConfig, out: str | Path) -> Model:
    """Trains from nothing, or from where the run in `out`, a folder or a URL, stopped; the model ends up in
    `out/model`."""
    with held_place(out) as home:
        return _train(config, home)


def _train(config: LmConfig, home: Place) -> Model:
    folder = home.folder
    mesh = make_mesh(config.data_shards)
    check_settings(config, config.model.context, mesh)
    write_config(config.model, "float32")  # a model that its family cannot express could not be saved
    tokenizer = together(lambda: find_tokenizer(config))
    vocabulary, end = config.model.vocabulary, config.model.stop_tokens[:1]

    def world() -> tuple[np.ndarray, np.ndarray]:
        count = rows_begun_with(folder) or config.steps * config.batch  # one epoch
        return world_rows(tokenizer, count, config.length, config.seed, text_weight=config.text_weight)

    shared = home.url is None
    rows = find_rows(folder, config, vocabulary, tokenizer, end, world, shared=shared, reached=home.reached)
    placement = sharding(mesh, (config.batch, config.length), ("batch", None))

    def batch(step: int) -> tuple[Array, Array]:
        return place(rows.read, batch_rows(len(rows), config.seed, step, config.batch), placement)

    with jax.set_mesh(mesh), Checkpoints(home.checkpoints, home.publish) as checkpoints:
        state = init_state(config, mesh)
        state = checkpoints.restore(state) or state
        with Log(folder, int(state.step), asdict(config), home.name) as metrics:
            state = fit(
                state,
                lambda _, state, data: train_step(settings_of_step(config), state, *data),
                batch,
                config.steps,
                checkpoints,
                metrics,
                log_every=config.log_every,
                save_every=config.save_every,
                describe=lambda values: f"loss {values['loss']:.3f}",
                speed=lambda steps: {"tokens_per_second": steps * config.batch * config.length},
            )
    model = Model(config.model, state.params, tokenizer, str(folder / "model"))
    replaced_folder(folder / "model", partial(_save, model))
    if jax.process_index() == 0:
        draw_curves(read_metrics(folder / "metrics.jsonl"), ("loss",), folder / "loss.png")
    home.publish()
    return model


def _save(model: Model, folder: Path) -> None:
    """The first host writes what all of them hand it."""
    if jax.process_count() > 1:
        here = jax.local_devices()[0]
        params = {name: jax.device_put(fetched(x), here) for name, x in sorted(model.params.items())}
        model = replace(model, params=params)
    if jax.process_index() == 0:
        save_model(model, folder)
