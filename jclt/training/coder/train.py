"""Trains a sparse coder, from the first token to the saved coder; `jclt train` calls `train_coder`."""

import logging
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jclt.coders import CoderConfig, SparseCoder, save_coder
from jclt.data.token_rows import HELD_OUT
from jclt.evaluation import evaluate_replacement
from jclt.hosts import broadcast_from_first_host, run_on_every_host
from jclt.mesh import make_mesh
from jclt.models import Model, ModelConfig, load_model
from jclt.training.checkpoints import Checkpoints
from jclt.training.coder.abstract import abstract_state
from jclt.training.coder.conclusions import describe_step, list_conclusions
from jclt.training.coder.forms import to_inference_form
from jclt.training.coder.harvest import Harvest, fold_scaling
from jclt.training.coder.prepare import check_state_memory, complete_config, find_run_rows, init_state, prepare_data
from jclt.training.coder.shuffle import fill_buffer
from jclt.training.coder.sparse_switch import REVIEW_EVERY, measure_needed, update_capacity
from jclt.training.coder.speed import count_step_operations, measure_machine_rate
from jclt.training.coder.state import CoderState
from jclt.training.coder.step import train_step
from jclt.training.config import TrainConfig, select_step_settings
from jclt.training.loop import Reporting, fit, try_evaluate
from jclt.training.metrics import Log, draw_curves, read_metrics
from jclt.training.profile import trace_steps
from jclt.training.run_folder import Place, lock_place, replace_folder

log = logging.getLogger(__name__)


@jax.jit
def finish_coder(state: CoderState) -> SparseCoder:
    """The coder as others use it: for raw activations, in its form at inference."""
    with jax.default_matmul_precision("highest"):
        return fold_scaling(to_inference_form(state.coder, state.running), state.scaling)


def train_coder(config: TrainConfig, out: str | Path, mesh: Mesh | None = None, profile: int = 0) -> SparseCoder:
    """Trains a coder, from the start or from the newest checkpoint of the run in `out`, a folder or a URL.

    The coder is saved in `out/coder`. Without a mesh all devices are used, `config.data_shards` of them along its data
    axis. The first `profile` steps after the one that compiles are traced, into `out/profile`. On several hosts the
    returned coder is sharded over all of them.
    """
    with lock_place(out) as place:
        return _train(config, place, mesh or make_mesh(config.data_shards), profile)


def _train(config: TrainConfig, place: Place, mesh: Mesh, profile: int) -> SparseCoder:
    model = run_on_every_host(lambda: load_model(config.model, dtype=config.compute, mesh=mesh))
    config = complete_config(config, model.config, mesh, model.fingerprint)
    run_on_every_host(partial(check_state_memory, config, mesh))
    rows = find_run_rows(config, model, place)
    with jax.set_mesh(mesh), Checkpoints(place.checkpoints, place.publish) as checkpoints:
        data = prepare_data(config, model, rows)
        state = checkpoints.restore(abstract_state(config, mesh)) or init_state(config, mesh, data.harvest)
        start = int(state.step)
        trainer = Trainer(config, model, mesh, data.harvest, state)
        evaluate = partial(evaluate_state, config, model, data.held_out)
        with Log(place.folder, start, asdict(config), place.name) as metrics:
            state = fit(
                state,
                trace_steps(trainer.advance, start, min(profile, config.steps - start - 1), place.folder / "profile"),
                lambda step: data.read_batch(step + config.shuffle - 1),  # the shuffle buffer is that far ahead
                config.steps,
                checkpoints,
                metrics,
                Reporting(
                    describe=describe_step,
                    every=config.log_every,
                    speed=make_speed_report(config, model.config),
                    evaluate=evaluate,
                    evaluate_every=max(0, config.evaluate_every),
                    layers=config.coder.covered,
                ),
                save_every=config.save_every,
                skips=config.skips,
            )
            coder = finish_coder(state)
            replace_folder(place.folder / "coder", partial(save_coder, coder))
            if config.evaluate_every >= 0 and not broadcast_from_first_host(metrics.has_evaluation(config.steps)):
                if (values := try_evaluate(evaluate, config.steps, state)) is not None:
                    metrics.write({"step": config.steps, **values})
            conclude(coder.config, place.folder, metrics)
    place.publish()
    return coder


class Trainer:
    """Takes the steps of a run, and keeps the shuffle buffer and the capacity of the sparse path between them."""

    def __init__(
        self, config: TrainConfig, model: Model, mesh: Mesh, harvest: Callable[[int], Harvest], state: CoderState
    ):
        self.config, self.model, self.mesh = config, model, mesh
        self.step_settings = select_step_settings(config)
        self.buffer: Harvest | None = None
        if config.shuffle > 1:
            self.buffer = fill_buffer(harvest, int(state.step), config.shuffle, config.seed)
        self.capacity = float(state.capacity)  # on the host: the step is compiled for it

    def advance(self, step: int, state: CoderState, batch: Any) -> tuple[CoderState, dict[str, Any]]:
        config, model = self.config, self.model
        if step % REVIEW_EVERY == 0 and (step or config.path == "sparse"):  # early training is dense
            measure = partial(measure_needed, self.step_settings, model.config, state, model.params, batch)
            state = update_capacity(config, self.mesh, state, measure)
            self.capacity = float(state.capacity)
        state, self.buffer, metrics = train_step(
            self.step_settings,
            model.config,
            step >= config.steps - config.end_to_end_steps,
            state,
            self.buffer,
            model.params,
            batch,
            self.capacity or None,
        )
        return state, metrics


def evaluate_state(config: TrainConfig, model: Model, held_out: np.ndarray, state: CoderState) -> dict[str, Any]:
    """How well the replacement model agrees with the model on rows that were not trained on."""
    log.info("step %d: evaluating the replacement model ...", state.step)
    # As many rows at once as a micro-batch of training has tokens for.
    batch = max(1, min(HELD_OUT, config.batch // config.micro_batches))
    replaced = evaluate_replacement(model, finish_coder(state), held_out, batch=batch)
    return {"agreement": replaced.agreement, "kl_replaced": replaced.kl, "recovered": replaced.recovered}


def conclude(finished: CoderConfig, folder: Path, metrics: Log) -> None:
    """Logs conclusions about the run and draws its curves, on the first host."""
    if jax.process_index() == 0:
        for line in list_conclusions(finished, metrics.last):
            log.info("%s", line)
        draw_curves(read_metrics(folder / "metrics.jsonl"), ("loss", "nmse", "l0", "dead"), folder / "curves.png")


def make_speed_report(config: TrainConfig, model: ModelConfig) -> Callable[[float], dict[str, Any]]:
    """A function from steps per second to the metrics of speed. It measures the machine's matmul rate once, now.

    Operations are counted for a dense step. So on the sparse path the share of the matmul rate may exceed 1.
    """
    tokens, operations = config.batch * config.length, count_step_operations(config, model)
    rate = measure_machine_rate(config.compute)
    return lambda steps: {"tokens_per_second": steps * tokens, "matmul_fraction": steps * operations / rate}
