"""Training a language model: state, loss, step, and the run from the first step to the saved model."""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jclt.data.batches import choose_batch_rows, place_rows
from jclt.data.load_tokens import fetch_tokens, is_token_folder
from jclt.data.token_rows import TokenRows
from jclt.errors import UserError
from jclt.hosts import run_on_every_host
from jclt.mesh import fetch_to_host, make_mesh, make_sharding
from jclt.models import Model, ModelConfig, Tokenizer, abstract_params, declare, forward, load_tokenizer, save_model
from jclt.models.formats.config_json import write_config
from jclt.shapes import Array, Float, Params, Tokens
from jclt.training.checkpoints import Checkpoints
from jclt.training.config import LmConfig, select_step_settings
from jclt.training.loop import Reporting, fit
from jclt.training.metrics import Log, draw_curves, read_metrics
from jclt.training.optimizers import make_lm_optimizer
from jclt.training.run_folder import Place, check_settings, lock_place, replace_folder
from jclt.training.run_rows import find_rows, generate_world_rows, read_row_count
from jclt.world.tokenizer import build_tokenizer


class LmState(NamedTuple):
    step: Array
    params: Params
    optimizer: Any


def init_state(config: LmConfig, mesh: Mesh) -> LmState:
    """Initial parameters and optimizer state, created with their shardings."""
    shardings = {name: target.sharding for name, target in abstract_params(config.model, mesh).items()}

    def init_params(key: Array) -> Params:
        weights = declare(config.model)
        keys = jax.random.split(key, len(weights))
        return {name: weight.init(k, jnp.float32) for k, (name, weight) in zip(keys, weights.items(), strict=True)}

    params = jax.jit(init_params, out_shardings=shardings)(jax.random.key(config.seed))
    return LmState(
        step=jnp.zeros((), jnp.int32), params=params, optimizer=jax.jit(make_lm_optimizer(config).init)(params)
    )


def next_token_loss(
    config: ModelConfig, remat: bool, params: Params, tokens: Tokens, weights: Float[Array, "B T"]
) -> Float[Array, ""]:
    """Mean cross-entropy of each token given those before it, weighted by each token's weight."""
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
    # New weights are sharded as the old ones. In between the compiler decides, since Muon multiplies whole matrices.
    shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, (state.params, state.optimizer))
    update: Any = jax.sharding.auto_axes(make_lm_optimizer(config).update, out_sharding=shardings)
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules mix types
        updates, optimizer = update(gradient, state.optimizer, state.params)
        params: Any = optax.apply_updates(state.params, updates)
    new = LmState(step=state.step + 1, params=params, optimizer=optimizer)
    return new, {"loss": loss, "gradient_norm": optax.tree.norm(gradient)}


def find_tokenizer(config: LmConfig) -> Tokenizer:
    if config.data == "world":
        tokenizer = Tokenizer(build_tokenizer())
    elif config.tokenizer is None and not is_token_folder(config.data):
        raise UserError("setting 'tokenizer': missing, expected a folder with tokenizer.json for data that are text")
    else:
        folder = Path(config.tokenizer) if config.tokenizer else fetch_tokens(config.data)
        loaded = load_tokenizer(folder)
        if loaded is None:
            raise UserError(f"tokenizer '{folder}': no tokenizer.json there")
        tokenizer = loaded
    if tokenizer.size > config.model.vocabulary:
        raise UserError(f"setting 'model.vocabulary': {config.model.vocabulary}, expected at least {tokenizer.size}")
    return tokenizer


def train_lm(config: LmConfig, out: str | Path, mesh: Mesh | None = None) -> Model:
    """Trains a language model, from the start or from the newest checkpoint of the run in `out`, a folder or a URL.

    The model is saved in `out/model`. Without a mesh all devices are used, `config.data_shards` of them along its data
    axis.
    """
    with lock_place(out) as place:
        return _train(config, place, mesh or make_mesh(config.data_shards))


def _train(config: LmConfig, place: Place, mesh: Mesh) -> Model:
    folder = place.folder
    check_settings(config, config.model.context, mesh)
    write_config(config.model, "float32")  # raises if the family cannot express the model: it could not be saved
    tokenizer = run_on_every_host(lambda: find_tokenizer(config))
    rows = _find_rows(config, tokenizer, place)
    batch_sharding = make_sharding(mesh, (config.batch, config.length), ("batch", None))

    def read_batch(step: int) -> tuple[Array, Array]:
        return place_rows(rows.read, choose_batch_rows(len(rows), config.seed, step, config.batch), batch_sharding)

    with jax.set_mesh(mesh), Checkpoints(place.checkpoints, place.publish) as checkpoints:
        state = init_state(config, mesh)
        state = checkpoints.restore(state) or state
        with Log(folder, int(state.step), asdict(config), place.name) as metrics:
            state = fit(
                state,
                lambda _, state, data: train_step(select_step_settings(config), state, *data),
                read_batch,
                config.steps,
                checkpoints,
                metrics,
                Reporting(
                    describe=lambda values: f"loss {values['loss']:.3f}",
                    every=config.log_every,
                    speed=lambda steps: {"tokens_per_second": steps * config.batch * config.length},
                ),
                save_every=config.save_every,
            )
    model = Model(config.model, state.params, tokenizer, str(folder / "model"))
    replace_folder(folder / "model", partial(_save, model))
    if jax.process_index() == 0:
        draw_curves(read_metrics(folder / "metrics.jsonl"), ("loss",), folder / "loss.png")
    place.publish()
    return model


def _find_rows(config: LmConfig, tokenizer: Tokenizer, place: Place) -> TokenRows:
    def make_world() -> tuple[np.ndarray, np.ndarray]:
        count = read_row_count(place.folder) or config.steps * config.batch  # one epoch
        return generate_world_rows(tokenizer, count, config.length, config.seed, text_weight=config.text_weight)

    return find_rows(place, config, config.model.vocabulary, tokenizer, config.model.stop_tokens[:1], make_world)


def _save(model: Model, folder: Path) -> None:
    """Gathers the parameters from all hosts; the first host writes them."""
    if jax.process_count() > 1:
        device = jax.local_devices()[0]
        params = {name: jax.device_put(fetch_to_host(x), device) for name, x in sorted(model.params.items())}
        model = replace(model, params=params)
    if jax.process_index() == 0:
        save_model(model, folder)
