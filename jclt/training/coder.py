"""Training a sparse coder, from the first token to the saved coder; `jclt train` calls `train_coder`."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jclt.coders import CoderConfig, SparseCoder, misread_by_circuit_tracer, save_coder
from jclt.errors import UserError
from jclt.evaluation import evaluate_replacement
from jclt.memory import check_memory, free_memory
from jclt.models import Model, ModelConfig, load_model
from jclt.models.sites import LAYER_SITES
from jclt.sharding import agreed, make_mesh, placed, together
from jclt.training.abstract import abstract_state
from jclt.training.changeover import REVIEW, entries_needed, reviewed
from jclt.training.checkpoints import Checkpoints
from jclt.training.config import TrainConfig
from jclt.training.data import HELD_OUT, TokenRows, trained_rows
from jclt.training.harvest import Harvest, Scaling, as_tokens, fold, measure_scaling, silent_layers
from jclt.training.initial import calibrated_bias, first_density, initial_weights
from jclt.training.loop import fit, measured
from jclt.training.metrics import Log, describe_evaluation, draw_curves, is_finite, read_metrics
from jclt.training.profile import profiled
from jclt.training.rules import at_inference, with_thresholds
from jclt.training.runs import (
    Place,
    check_settings,
    find_rows,
    held_place,
    replaced_folder,
    rows_begun_with,
    world_rows,
)
from jclt.training.shuffle import filled
from jclt.training.source import activations, stored_source, token_source
from jclt.training.sparse import reason_against
from jclt.training.speed import machine_rate, step_operations
from jclt.training.step import CoderState, fresh_state, train_step

log = logging.getLogger(__name__)
SCALING_BATCHES = 8
WORLD_ROWS = 32_768
"""Rows of the small world that are generated at most; beyond that they come again in another order."""


def fitted(config: TrainConfig, model: ModelConfig, mesh: Mesh, fingerprint: str = "") -> TrainConfig:
    """The configuration with what follows from the model filled in, or one line on what cannot work."""
    config = replace(config, coder=config.coder.fitted(model, config.model, fingerprint))
    check_settings(config, model.context, mesh)
    check_coder_sites(config.coder)
    if config.coder.kind == "neurons":
        raise UserError("setting 'coder.kind': neurons are the model's own, expected clt, transcoder or sae")
    for name in ("micro_batches", "shuffle"):
        if config.length % getattr(config, name):
            raise UserError(f"setting '{name}': {getattr(config, name)}, expected a divisor of length={config.length}")
    if config.sparsity == "l0" and config.coder.activation != "jumprelu":
        raise UserError("setting 'sparsity': l0 counts gates, expected coder.activation=jumprelu")
    if config.end_to_end_steps and (config.store or config.shuffle > 1):
        raise UserError("setting 'end_to_end_steps': needs whole rows, expected store=none and shuffle=1")
    if config.store and config.store_rows < config.batch:
        raise UserError(f"setting 'store_rows': {config.store_rows}, expected at least batch={config.batch}")
    if config.path == "sparse" and (reason := reason_against(config)):
        raise UserError(f"setting 'path': sparse, expected auto or dense, since {reason}")
    if config.coder.features % mesh.shape["features"]:
        shards = mesh.shape["features"]
        raise UserError(f"setting 'coder.features': {config.coder.features}, expected a multiple of {shards} shards")
    return config


def check_coder_sites(coder: CoderConfig) -> None:
    """That both sites are vectors of the model's width, and that what is read is there before what is written."""
    order = list(LAYER_SITES)
    for name in ("reads", "writes"):
        site = getattr(coder, name)
        if site not in LAYER_SITES or not LAYER_SITES[site].startswith("B T D"):
            wide = ", ".join(own for own in order if LAYER_SITES[own].startswith("B T D"))
            raise UserError(
                f"setting 'coder.{name}': {site} is no vector of the model's width, expected one of: {wide}"
            )
    if order.index(coder.reads) > order.index(coder.writes):
        raise UserError(
            f"setting 'coder.reads': {coder.reads} comes after {coder.writes}, which the coder writes, expected a site "
            "before it"
        )


def check_state_memory(config: TrainConfig, mesh: Mesh) -> None:
    """That the training state and the gradients fit, before anything is begun; what a batch takes comes on top."""
    state = abstract_state(config, mesh)
    each = device_bytes(state) + device_bytes(state.coder)
    local = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    need = each * (len(local) if local[0].platform == "cpu" else 1)  # devices of a CPU share its memory
    free = free_memory(local[0])
    fits = "" if free is None else f"{int(free * config.coder.features / need):,} features a layer would fit"
    what = f"setting 'coder.features': {config.coder.features} of {len(config.coder.covered)} layers"
    check_memory(need, what, fits)


def device_bytes(tree: Any) -> int:
    """What lies on one device of arrays that are known by their shapes."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def init_state(config: TrainConfig, mesh: Mesh, harvested: Callable[[int], Harvest]) -> CoderState:
    """Fresh weights, with scales and encoder biases measured on the first batches."""
    c = config.coder
    scaling = measure_scaling(harvested, SCALING_BATCHES, config.normalize, (len(c.covered), c.size))
    for index in silent_layers(scaling):
        layer = c.covered[index]
        log.warning("layer %d writes one constant vector to %s: there is nothing to learn of it", layer, c.writes)
    weights = initial_weights(config, mesh)

    @jax.jit
    def calibrated(coder: SparseCoder, scaling: Scaling, found: Harvest) -> SparseCoder:
        x = as_tokens(found.reads, scaling.read_mean, scaling.read_scale, jnp.float32)
        x = placed(x, (None, "tokens", None))
        zero = jnp.zeros(())
        thresholds = [zero if own.threshold is None else own.threshold for own in with_thresholds(coder).layers]
        biases = [
            calibrated_bias(coder.preactivation(layer, x[layer]), thresholds[layer], first_density(config))
            for layer in range(len(coder.layers))
        ]
        return eqx.tree_at(lambda t: [own.encoder_bias for own in t.layers], coder, biases)

    return fresh_state(config, calibrated(weights, scaling, harvested(0)), scaling)


@partial(jax.jit, static_argnames="config")
def finished(config: TrainConfig, state: CoderState) -> SparseCoder:
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
                    config, mesh, state, lambda: entries_needed(config, model.config, state, model.params, batch)
                )
                room = float(state.room)
            ends = step >= config.steps - config.end_to_end_steps
            state, buffer, values = train_step(
                config, model.config, ends, state, buffer, model.params, batch, room or None
            )
            return state, values

        def measure(state: CoderState) -> dict[str, Any]:
            log.info("step %d: evaluating the replacement model ...", state.step)
            replaced = evaluate_replacement(model, finished(config, state), held_out, batch=evaluated_rows(config))
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
            coder = finished(config, state)
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


def conclusions(coder: CoderConfig, trained_by: str, last: Mapping[str, dict[str, Any]]) -> list[str]:
    """What there is to say at the end of a run: of its last metrics, and of the coder that came out of it."""
    lines = []
    if evaluation := last.get("evaluation"):
        lines.append(describe_evaluation(evaluation))
    step = last.get("step", {})
    share, each = step.get("dead"), step.get("layers_l0")
    if is_finite(share) and share > MANY_DEAD:
        lines.append(f"{share:.0%} of the features are dead: fewer of them, or more steps, would do")
    if trained_by == "batchtopk" and each and all(map(is_finite, each)):
        starved = [layer for layer, own in zip(coder.covered, each, strict=True) if own < STARVED * np.mean(each)]
        if starved:
            lines.append(
                f"hardly a feature is active in layer {', '.join(map(str, starved))}: under batchtopk all layers share "
                "coder.k, which activation topk gives to each of them"
            )
    if misread := misread_by_circuit_tracer(coder):
        lines.append(f"circuit-tracer would read another coder out of these files: {misread}")
    return lines


MANY_DEAD = 0.5
STARVED = 0.02
"""The share of the mean number of active features below which a layer goes without."""


def run_rows(config: TrainConfig, model: Model, home: Place) -> TokenRows:
    def world() -> tuple[np.ndarray, np.ndarray]:
        assert model.tokenizer is not None
        count = rows_begun_with(home.folder) or min(config.steps * config.batch, WORLD_ROWS) + HELD_OUT
        return world_rows(model.tokenizer, count, config.length, config.seed)

    if config.data == "world" and model.tokenizer is None:
        raise UserError(f"model {model.name}: has no tokenizer, expected another setting 'data' than the small world")
    return find_rows(
        home.folder,
        config,
        model.config.vocabulary,
        model.tokenizer,
        model.config.stop_tokens[:1],
        world,
        shared=home.url is None,
        reached=home.reached,
    )


def speed(config: TrainConfig, model: ModelConfig) -> Callable[[float], dict[str, Any]]:
    """From steps a second to what is reported of them; the yardstick is measured once, now. Operations are those of a
    dense step, of which the sparse path can seem to do more than there is time for."""
    tokens, operations, rate = (
        config.batch * config.length,
        step_operations(config, model),
        machine_rate(config.compute),
    )
    return lambda steps: {"tokens_per_second": steps * tokens, "matmul_fraction": steps * operations / rate}


def describe(values: dict[str, Any]) -> str:
    skipped = f" skipped {values['skipped']}" if values["skipped"] else ""
    path = "" if "overflow" not in values else f" sparse, {values['overflow']:.0%} without room"
    dead = f"{values['dead']:.0%}" if is_finite(values["dead"]) else "-"  # not known before features could have fired
    return f"nmse {values['nmse']:.4f} L0 {values['l0']:.1f} dead {dead}{path}{skipped}"
