"""What a run's folder holds: its settings, how far it came, its newest checkpoint and a digest of the parameters."""

import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from jclt.errors import UserError
from jclt.files import read_json
from jclt.training.metrics import draw_curves, read_metrics

PARAMETERS = ("coder.", "params.")
CURVES = ("loss", "nmse", "l0", "dead", "gradient_norm", "tokens_per_second")


def inspect_run(folder: Path) -> str:
    """A description in lines; draws the curves into the folder, as curves.png, on the way."""
    if not (folder / "config.json").exists():
        raise UserError(f"{folder}: no config.json, expected the folder of a run")
    lines = [f"run {folder}"]
    config = read_json(folder / "config.json")
    lines += [f"  {name} = {value}" for name, value in sorted(config.items())]
    metrics = folder / "metrics.jsonl"
    entries = [e for e in read_metrics(metrics) if "loss" in e] if metrics.exists() else []
    if entries:
        last = entries[-1]
        lines.append(f"step {last['step']} of {config.get('steps')}")
        lines += [f"  {name} = {value:.6g}" for name, value in last.items() if isinstance(value, float)]
        draw_curves(entries, tuple(name for name in CURVES if name in last), folder / "curves.png")
        lines.append(f"curves in {folder / 'curves.png'}")
    lines += describe_checkpoints(folder / "checkpoints")
    return "\n".join(lines)


def describe_checkpoints(folder: Path) -> list[str]:
    """Of which steps there are checkpoints, and what the newest holds."""
    if not folder.is_dir():
        return ["no checkpoint yet"]
    with ocp.training.Checkpointer(str(folder.absolute())) as checkpointer:
        steps = sorted(checkpoint.step for checkpoint in checkpointer.checkpoints)
        if not steps:
            return ["no checkpoint yet"]
        held: Any = checkpointer.metadata(steps[-1]).metadata["state"]
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        wanted = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for name, x in held.items()}
        state: Any = checkpointer.load(steps[-1], {"state": wanted})["state"]
    found = {name: np.asarray(x) for name, x in state.items()}
    own = {name: x for name, x in found.items() if name.startswith(PARAMETERS)}
    rest = [x for name, x in found.items() if name not in own]
    return [
        f"checkpoints of steps {', '.join(map(str, steps))}; in the newest:",
        *(f"  {name:32} {x.dtype!s:9} {list(x.shape)}" for name, x in sorted(own.items())),
        f"  {len(rest)} more arrays (optimizer, running averages), {sum(x.nbytes for x in rest) / 1e6:.1f} MB",
        f"parameters: {sum(x.size for x in own.values()):,}, sha256 {digest(own)}",
    ]


def digest(arrays: dict[str, np.ndarray]) -> str:
    """Of names, types, shapes and bytes: equal where every bit is."""
    whole = hashlib.sha256()
    for name, x in sorted(arrays.items()):
        whole.update(f"{name} {x.dtype} {x.shape} ".encode())
        whole.update(np.ascontiguousarray(x).tobytes())
    return whole.hexdigest()
