"""Training a sparse coder, from the first token to the saved coder; `jclt train` calls `train_coder`."""

import logging
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jclt.coders import SparseCoder, save_coder
from jclt.data.token_rows import HELD_OUT, trained_rows
from jclt.errors import UserError
from jclt.evaluation import evaluate_replacement
from jclt.hosts import agreed, together
from jclt.mesh import make_mesh
from jclt.models import ModelConfig, load_model
from jclt.training.checkpoints import Checkpoints
from jclt.training.coder.abstract import abstract_state
from jclt.training.coder.batches import activations, stored_source, token_source
from jclt.training.coder.conclusions import conclusions, describe
from jclt.training.coder.forms import at_inference
from jclt.training.coder.harvest import Harvest, fold
from jclt.training.coder.prepare import check_state_memory, fitted, init_state, run_rows
from jclt.training.coder.shuffle import filled
from jclt.training.coder.sparse_switch import REVIEW, entries_needed, reviewed
from jclt.training.coder.speed import machine_rate, step_operations
from jclt.training.coder.state import CoderState
from jclt.training.coder.step import train_step
from jclt.training.config import TrainConfig, settings_of_step
from jclt.training.loop import fit, measured
from jclt.training.metrics import Log, draw_curves, read_metrics
from jclt.training.profile import profiled
from jclt.training.run_folder import Place, held_place, replaced_folder

log = logging.getLogger(__name__)


@jax.jit
def finished(state: CoderState) -> SparseCoder:
    """The coder as others use it: on raw activations, by its rule at inference."""
    with jax.default_matmul_precision("highest"):
        return fold(at_inference(state.coder, state.running), state.scaling)


def train_coder(config: TrainConfig, out: str | Path, mesh: Mesh | None = None, profile: int = 0) -> SparseCoder:
    """Trains from nothing, or from where the run in `out`, a folder or a URL, stopped; the coder ends up in
    `out/coder`.

    Without a mesh given, all devices are used, `config.data_shards` of them on its data axis. `profile` steps are
    traced, into `out/profile`. On several hosts the coder that is returned lies in pieces on all of them.
    """
    with held_place(out) as home:
        return _train(config, home, mesh, profile)


def _train(config: TrainConfig, home: Place, mesh: Mesh | None, profile: int) -> SparseCoder:
    folder = home.folder
    mesh = mesh or make_mesh(config.data_shards)
    model = together(lambda: load_model(config.model, dtype=config.compute, mesh=mesh))
    config = fitted(config, model.config, mesh, model.fingerprint)
    of_step = settings_of_step(config)
    together(partial(check_state_memory, config, mesh))
    rows = run_rows(config, model, home)
    count = trained_rows(rows, config.data)
    if count < config.batch:
        least = f"expected at least batch={config.batch}"
        raise UserError(f"data '{config.data}': {max(0, count)} of {len(rows)} rows to train on, {least}")
    held_out = rows.read(np.arange(len(rows) - HELD_OUT, len(rows)))[0]
    with jax.set_mesh(mesh), Checkpoints(home.checkpoints, home.publish) as checkpoints:
        source = (stored_source if config.store else token_source)(config, model, rows, count)
        harvested = jax.jit(partial(activations, config, model.config))

        def read(number: int) -> Harvest:
            return harvested(model.params, source(number))

        state = checkpoints.restore(abstract_state(config, mesh)) or init_state(config, mesh, read)
        start = int(state.step)
        buffer = filled(read, start, config.shuffle, config.seed) if config.shuffle > 1 else None

        room = float(state.room)

        def advance(step: int, state: CoderState, batch: Any) -> tuple[CoderState, dict[str, Any]]:
            nonlocal buffer, room
            if step % REVIEW == 0 and (step or config.path == "sparse"):  # early training is dense
                state = reviewed(
                    config, mesh, state, lambda: entries_needed(of_step, model.config, state, model.params, batch)
                )
                room = float(state.room)
            ends = step >= config.steps - config.end_to_end_steps
            state, buffer, values = train_step(
                of_step, model.config, ends, state, buffer, model.params, batch, room or None
            )
            return state, values

        def measure(state: CoderState) -> dict[str, Any]:
            log.info("step %d: evaluating the replacement model ...", state.step)
            replaced = evaluate_replacement(model, finished(state), held_out, batch=evaluated_rows(config))
            return {"agreement": replaced.agreement, "kl_replaced": replaced.kl, "recovered": replaced.recovered}

        with Log(folder, start, asdict(config), home.name) as metrics:
            state = fit(
                state,
                profiled(advance, start, min(profile, config.steps - start - 1), folder / "profile"),
                lambda step: source(step + config.shuffle - 1),  # what the buffer takes in is ahead of the step
                config.steps,
                checkpoints,
                metrics,
                log_every=config.log_every,
                save_every=config.save_every,
                describe=describe,
                measure=measure,
                measure_every=max(0, config.evaluate_every),
                speed=speed(config, model.config),
                skips=config.skips,
                layers=config.coder.covered,
            )
            coder = finished(state)
            replaced_folder(folder / "coder", partial(save_coder, coder))
            if config.evaluate_every >= 0 and not agreed(metrics.evaluated(config.steps)):
                # By now nothing depends on it any more.
                found = measured(measure, config.steps, state)
                if found is not None:
                    metrics.write({"step": config.steps, **found})
            if jax.process_index() == 0:
                for line in conclusions(coder.config, config.coder.activation, metrics.last):
                    log.info("%s", line)
                draw_curves(
                    read_metrics(folder / "metrics.jsonl"), ("loss", "nmse", "l0", "dead"), folder / "curves.png"
                )
    home.publish()
    return coder


def evaluated_rows(config: TrainConfig) -> int:
    """Rows that the replacement model reads at once: no more than a micro-batch of training has tokens for."""
    return max(1, min(HELD_OUT, config.batch // config.micro_batches))


def speed(config: TrainConfig, model: ModelConfig) -> Callable[[float], dict[str, Any]]:
    """From steps a second to what is reported of them; the yardstick is measured once, now. Operations are those of a
    dense step, of which the sparse path can seem to do more than there is time for."""
    tokens, operations, rate = (
        config.batch * config.length,
        step_operations(config, model),
        machine_rate(config.compute),
    )
    return lambda steps: {"tokens_per_second": steps * tokens, "matmul_fraction": steps * operations / rate}
