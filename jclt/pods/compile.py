"""What a run will cost, from the very programs that it will run, compiled for TPUs that are not here.

This module runs in a process of its own (`worker.py`): with libtpu loaded, JAX starts slowly.
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
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jclt.errors import UserError
from jclt.mesh import make_mesh
from jclt.models import ModelConfig
from jclt.pods.attribution_program import plan_graphs
from jclt.pods.chips import chip_of, network_of
from jclt.pods.flags import flag_text
from jclt.pods.hlo import Program
from jclt.pods.report import Report
from jclt.pods.schedule import Timeline, timeline
from jclt.pods.slices import Pod
from jclt.training.coder.abstract import StepInputs, lower_step, step_inputs
from jclt.training.coder.prepare import fitted
from jclt.training.coder.sparse_switch import room_for
from jclt.training.coder.speed import step_operations
from jclt.training.config import TrainConfig

LEAST_EFFORT = -1.0


def devices_of(pod: Pod) -> list[Any]:
    slices = {"num_slices": pod.slices} if pod.slices > 1 else {}
    try:
        return list(get_topology_desc(pod.topology, platform="tpu", **slices).devices)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"topology '{pod.topology}': {str(error).splitlines()[0]}") from None


def compile_step(config: TrainConfig, model: ModelConfig, pod: Pod, active: float = 0.0) -> Report:
    """The train step's memory, operations, time and traffic on one chip, and what follows for the run; on the sparse
    path when so many features, of all layers, are active at a token."""
    chip, devices = chip_of(pod.topology), devices_of(pod)
    mesh = make_mesh(config.data_shards, devices=devices)
    settings = asdict(config)
    config = fitted(config, model, mesh)
    inputs = step_inputs(config, model, mesh)
    began = time.perf_counter()
    each = active / len(config.coder.covered) / mesh.shape["features"]
    room = room_for(config.headroom * each) if active else None
    lowered = lower_step(config, model, mesh, room)
    compiled, refused = compile_or_refusal(lowered)
    tokens = config.batch * config.length
    operations = step_operations(config, model) / len(devices)
    report: Report = {
        "settings": settings,
        "topology": pod.topology,
        "slices": pod.slices,
        "chips": len(devices),
        "mesh": dict(mesh.shape),
        "parameters": sum(x.size for x in jax.tree.leaves(inputs.state.coder)),
        "tokens_per_step": tokens,
        "micro_batches": config.micro_batches,
        "remat": config.remat,
        "compile_seconds": time.perf_counter() - began,
        "operations": operations,
        "clock": chip.clock,
        "flags": flag_text(),
        "jax": jax.__version__,
        "libtpu": version("libtpu"),
    }
    if room:
        report |= {"active": active, "room": room}
    if compiled is None:
        return report | {"fits": False, "memory": {"limit": chip.memory, **held(inputs)}, "refused": refused}
    memory = memory_of(compiled, inputs, chip.memory)
    line = timeline(Program(compiled.as_text()), network_of(pod.topology, list(mesh.devices.flat)))
    floors = {
        "products": operations / chip.operations,
        "memory": line.moved / chip.bandwidth,
        "links": line.sending,
    }
    seconds = line.seconds
    return report | {
        "fits": memory["headroom"] >= 0,
        "memory": memory,
        "seconds": seconds,
        "work_seconds": line.work,
        "exposed_seconds": line.exposed,
        "floors": floors,
        "moved": line.moved,
        "kernel_seconds": line.kernels,
        "utilisation": operations / chip.operations / seconds,
        "tokens_per_second": tokens / seconds,
        "chip_hours": config.steps * seconds * len(devices) / 3600,
        "tokens": config.steps * tokens,
        "stages": line.stages,
        "traffic": traffic_of(line),
        "hidden": 1 - line.exposed / line.sending if line.sending else 1.0,
    }


def compile_or_refusal(lowered: jax.stages.Lowered) -> tuple[Any, str]:
    """The compiled program, or why the compiler refuses it: that it needs too much memory."""
    try:
        return lowered.compile(), ""
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needs = re.search(r"\(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)", str(error))
        return None, f"needs {needs[1]}, expected at most {needs[2]}" if needs else str(error).splitlines()[0]


def held(inputs: StepInputs) -> dict[str, float]:
    """Bytes a chip of what the step is given, by kind."""

    def own(tree: Any) -> float:
        return sum(
            np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(tree)
            if hasattr(x, "sharding")
        )

    state = inputs.state
    rest = (state.scaling, state.density, state.silent, inputs.tokens)
    return {
        "parameters": own(state.coder),
        "optimizer": own(state.optimizer),
        "model": own(inputs.params),
        "other": own(rest),
    }


def memory_of(compiled: Any, inputs: StepInputs, limit: float) -> dict[str, float]:
    """Bytes a chip at the fullest moment. What the program is given is padded to tiles; of what it makes on the way the
    gradients are as large as the parameters, and the rest are activations and other temporaries."""
    used, given = compiled.memory_analysis(), held(inputs)
    total = used.peak_memory_in_bytes + used.generated_code_size_in_bytes
    rest = total - used.argument_size_in_bytes - given["parameters"] - used.generated_code_size_in_bytes
    return {
        "limit": limit,
        **given,
        "padding": used.argument_size_in_bytes - sum(given.values()),
        "gradients": given["parameters"],
        "activations": rest,
        "program": used.generated_code_size_in_bytes,
        "total": total,
        "headroom": (limit - total) / limit,
    }


def traffic_of(line: Timeline) -> list[Report]:
    """Collectives of one stage and kind together, the longest first."""
    found: dict[tuple[str, str], Report] = {}
    for own in line.traffic:
        kind = own.what.split(" ")[0]
        entry = found.setdefault(
            (own.stage, kind),
            {"stage": own.stage, "kind": kind, "largest": "", "size": 0, "times": 0, "bytes": 0.0}
            | {"devices": own.devices, "seconds": 0.0, "exposed": 0.0},
        )
        if own.size > entry["size"]:
            entry |= {"largest": own.what.removeprefix(f"{kind} "), "size": own.size}
        entry["times"] += own.times
        entry["bytes"] += own.size * own.times
        entry["seconds"] += own.seconds
        entry["exposed"] += own.exposed
    return sorted(found.values(), key=lambda entry: -entry["seconds"])


def calibrate(pod: Pod) -> Report:
    """The same estimate of programs whose cost is known: estimated over known time of a large product, of a copy, and
    of an all-reduce over the slice."""
    chip, devices = chip_of(pod.topology), devices_of(replace(pod, slices=1))
    mesh = jax.make_mesh((1, len(devices)), ("data", "features"), devices=devices)
    network = network_of(pod.topology, list(mesh.devices.flat))
    size, rows = 8192, 1 << 14

    def estimated(function: Any, *shapes: tuple[tuple[int, int], Any, P]) -> float:
        inputs = [jax.ShapeDtypeStruct(s, dtype, sharding=NamedSharding(mesh, where)) for s, dtype, where in shapes]
        with jax.set_mesh(mesh):
            compiled = jax.jit(function).lower(*inputs).compile()
        return timeline(Program(compiled.as_text() or ""), network).seconds

    def added(x: jax.Array) -> jax.Array:
        return jax.shard_map(lambda x: jax.lax.psum(x, "features"), in_specs=P("features"), out_specs=P())(x)

    product = estimated(jnp.dot, *[((size, size), jnp.bfloat16, P())] * 2)
    copy = estimated(lambda x: x + 1.0, ((rows, size), jnp.float32, P()))
    sums = estimated(added, ((len(devices) * 1024, size), jnp.float32, P("features")))
    whole = 1024 * size * 4
    return {
        "product": product / (2 * size**3 / chip.operations),
        "copy": copy / (2 * rows * size * 4 / chip.bandwidth),
        "all-reduce": sums / network.seconds("all-reduce", whole, range(len(devices))),
    }


def plan_attribution(config: TrainConfig, model: ModelConfig, pod: Pod, prompt_length: int) -> Report:
    """Whether graphs can be made there. Nothing but memory is asked of their programs, on which the compiler need not
    spend the time that making them fast takes."""
    jax.config.update("jax_exec_time_optimization_effort", LEAST_EFFORT)
    whole = replace(config, coder=config.coder.fitted(model, config.model))
    return plan_graphs(whole, model, pod.topology, devices_of(pod), prompt_length)
