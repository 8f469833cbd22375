"""What a run will cost: reads the run's programs, compiled for TPUs that are not here.

This module runs in a separate process (`worker.py`), since JAX starts slowly once libtpu is loaded. `worker.py` calls
`compile_step`, `plan_attribution` and `calibrate` by name.
"""

import re
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.topologies import get_topology_desc
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jclt.errors import UserError
from jclt.mesh import FEATURES_AXIS, MESH_AXES, make_mesh
from jclt.models import ModelConfig
from jclt.pods.attribution_program import plan_graphs
from jclt.pods.chips import Chip, find_chip, make_network
from jclt.pods.flags import format_flags
from jclt.pods.hlo import Program
from jclt.pods.report import Report
from jclt.pods.schedule import Timeline, simulate_schedule
from jclt.pods.slices import Pod
from jclt.training.coder.abstract import StepInputs, lower_step, make_step_inputs
from jclt.training.coder.prepare import complete_config
from jclt.training.coder.sparse_switch import choose_capacity
from jclt.training.coder.speed import count_step_operations
from jclt.training.config import TrainConfig


def list_devices(pod: Pod) -> list[Any]:
    slices = {"num_slices": pod.slices} if pod.slices > 1 else {}
    try:
        return list(get_topology_desc(pod.topology, platform="tpu", **slices).devices)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"topology '{pod.topology}': {str(error).splitlines()[0]}") from None


def compile_step(config: TrainConfig, model: ModelConfig, pod: Pod, active: float = 0.0) -> Report:
    """The train step's memory, operations, time and traffic on one chip, and what follows for the run. With `active`
    features per token, over all layers, it is the step of the sparse path."""
    devices, settings = list_devices(pod), asdict(config)
    mesh = make_mesh(config.data_shards, devices=devices)
    config = complete_config(config, model, mesh)
    inputs = make_step_inputs(config, model, mesh)
    active_per_shard = active / len(config.coder.covered) / mesh.shape[FEATURES_AXIS]
    capacity = choose_capacity(config.headroom * active_per_shard) if active else None
    began = time.perf_counter()
    compiled, refused = try_compile(lower_step(config, model, mesh, capacity))
    compile_seconds = time.perf_counter() - began
    operations = count_step_operations(config, model) / len(devices)
    report = describe_run(config, pod, mesh, inputs, operations) | {
        "settings": settings,
        "compile_seconds": compile_seconds,
    }
    if capacity:
        report |= {"active": active, "room": capacity}
    limit = find_chip(pod.topology).memory
    if compiled is None:
        return report | {"fits": False, "memory": {"limit": limit, **measure_inputs(inputs)}, "refused": refused}
    memory = measure_memory(compiled, inputs, limit)
    timeline = simulate_schedule(Program(compiled.as_text()), make_network(pod.topology, list(mesh.devices.flat)))
    speed = describe_speed(config, find_chip(pod.topology), len(devices), operations, timeline)
    return report | {"fits": memory["headroom"] >= 0, "memory": memory} | speed


def describe_run(config: TrainConfig, pod: Pod, mesh: Mesh, inputs: StepInputs, operations: float) -> Report:
    """What is known of a run before its step is compiled; operations are those of a step on one chip."""
    return {
        "topology": pod.topology,
        "slices": pod.slices,
        "chips": mesh.size,
        "mesh": dict(mesh.shape),
        "parameters": sum(x.size for x in jax.tree.leaves(inputs.state.coder)),
        "tokens_per_step": config.batch * config.length,
        "micro_batches": config.micro_batches,
        "remat": config.remat,
        "operations": operations,
        "clock": find_chip(pod.topology).clock,
        "flags": format_flags(),
        "jax": jax.__version__,
        "libtpu": version("libtpu"),
    }


def describe_speed(config: TrainConfig, chip: Chip, chips: int, operations: float, timeline: Timeline) -> Report:
    """The time of a step by the compiler's schedule, what it is spent on, and what follows for the run."""
    seconds, tokens = timeline.seconds, config.batch * config.length
    return {
        "seconds": seconds,
        "work_seconds": timeline.work,
        "exposed_seconds": timeline.exposed,
        "floors": {
            "products": operations / chip.operations,
            "memory": timeline.moved / chip.bandwidth,
            "links": timeline.sending,
        },
        "moved": timeline.moved,
        "kernel_seconds": timeline.kernels,
        "utilisation": operations / chip.operations / seconds,
        "tokens_per_second": tokens / seconds,
        "chip_hours": config.steps * seconds * chips / 3600,
        "tokens": config.steps * tokens,
        "stages": timeline.stages,
        "traffic": sum_traffic(timeline),
        "hidden": 1 - timeline.exposed / timeline.sending if timeline.sending else 1.0,
    }


def try_compile(lowered: jax.stages.Lowered) -> tuple[Any, str]:
    """The compiled program; or None and a reason where it needs too much memory for the compiler."""
    try:
        return lowered.compile(), ""
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needs = re.search(r"\(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)", str(error))
        return None, f"needs {needs[1]}, expected at most {needs[2]}" if needs else str(error).splitlines()[0]


def measure_inputs(inputs: StepInputs) -> dict[str, float]:
    """Bytes per chip of the step's inputs, by kind."""

    def count_bytes(tree: Any) -> float:
        return sum(
            np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(tree)
            if hasattr(x, "sharding")
        )

    state = inputs.state
    return {
        "parameters": count_bytes(state.coder),
        "optimizer": count_bytes(state.optimizer),
        "model": count_bytes(inputs.params),
        "other": count_bytes((state.scaling, state.density, state.silent, inputs.tokens)),
    }


def measure_memory(compiled: Any, inputs: StepInputs, limit: float) -> dict[str, float]:
    """Bytes per chip when most memory is in use. The program's arguments are padded to tiles. Of its temporaries the
    gradients are as large as the parameters; the others are activations and the like."""
    used, input_bytes = compiled.memory_analysis(), measure_inputs(inputs)
    total = used.peak_memory_in_bytes + used.generated_code_size_in_bytes
    gradients = input_bytes["parameters"]
    return {
        "limit": limit,
        **input_bytes,
        "padding": used.argument_size_in_bytes - sum(input_bytes.values()),
        "gradients": gradients,
        "activations": total - used.argument_size_in_bytes - gradients - used.generated_code_size_in_bytes,
        "program": used.generated_code_size_in_bytes,
        "total": total,
        "headroom": (limit - total) / limit,
    }


def sum_traffic(timeline: Timeline) -> list[Report]:
    """The collectives, summed by stage and kind; those that take longest first."""
    sums: dict[tuple[str, str], Report] = {}
    for traffic in timeline.traffic:
        kind = traffic.name.split(" ")[0]
        entry = sums.setdefault(
            (traffic.stage, kind),
            {"stage": traffic.stage, "kind": kind, "largest": "", "size": 0, "times": 0, "bytes": 0.0}
            | {"devices": traffic.devices, "seconds": 0.0, "exposed": 0.0},
        )
        if traffic.size > entry["size"]:
            entry |= {"largest": traffic.name.removeprefix(f"{kind} "), "size": traffic.size}
        entry["times"] += traffic.times
        entry["bytes"] += traffic.size * traffic.times
        entry["seconds"] += traffic.seconds
        entry["exposed"] += traffic.exposed
    return sorted(sums.values(), key=lambda entry: -entry["seconds"])


def calibrate(pod: Pod) -> Report:
    """The schedule's estimate for programs with a known cost: estimated time / known time of a large matrix product, of
    a copy, and of an all-reduce over the slice."""
    chip, devices = find_chip(pod.topology), list_devices(replace(pod, slices=1))
    mesh = jax.make_mesh((1, len(devices)), MESH_AXES, devices=devices)
    network = make_network(pod.topology, list(mesh.devices.flat))
    size, rows = 8192, 1 << 14

    def estimate_seconds(function: Any, *shapes: tuple[tuple[int, int], Any, P]) -> float:
        inputs = [jax.ShapeDtypeStruct(s, dtype, sharding=NamedSharding(mesh, spec)) for s, dtype, spec in shapes]
        with jax.set_mesh(mesh):
            compiled = jax.jit(function).lower(*inputs).compile()
        return simulate_schedule(Program(compiled.as_text() or ""), network).seconds

    def sum_over_slice(x: jax.Array) -> jax.Array:
        return jax.shard_map(lambda x: jax.lax.psum(x, FEATURES_AXIS), in_specs=P(FEATURES_AXIS), out_specs=P())(x)

    product = estimate_seconds(jnp.dot, *[((size, size), jnp.bfloat16, P())] * 2)
    copy = estimate_seconds(lambda x: x + 1.0, ((rows, size), jnp.float32, P()))
    sums = estimate_seconds(sum_over_slice, ((len(devices) * 1024, size), jnp.float32, P(FEATURES_AXIS)))
    sum_bytes = 1024 * size * 4
    return {
        "product": product / (2 * size**3 / chip.operations),
        "copy": copy / (2 * rows * size * 4 / chip.bandwidth),
        "all-reduce": sums / network.estimate_seconds("all-reduce", sum_bytes, range(len(devices))),
    }


def plan_attribution(config: TrainConfig, model: ModelConfig, pod: Pod, prompt_length: int, active: float) -> Report:
    """What attribution graphs take on one slice."""
    config = replace(config, coder=config.coder.fit_to_model(model, config.model))
    report = plan_graphs(config, model, pod.topology, list_devices(replace(pod, slices=1)), prompt_length, active)
    return report | {"jax": jax.__version__, "libtpu": version("libtpu")}
