"""Describes a run's folder: settings, progress, newest checkpoint, and a digest of the parameters."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from orbax.checkpoint import v1 as ocp

from jclt.errors import UserError, first_line
from jclt.files import read_json
from jclt.training.checkpoints import read_state
from jclt.training.metrics import describe_evaluation, draw_curves, get_kind, is_finite, read_metrics

PARAMETERS = ("coder.", "params.")
CURVES = ("loss", "nmse", "l0", "dead", "gradient_norm", "tokens_per_second")


def inspect_run(folder: Path) -> str:
    """A description of several lines. Also draws curves.png into the folder."""
    if not (folder / "config.json").exists():
        raise UserError(f"{folder}: no config.json, expected the folder of a run")
    lines = [f"run {folder}"]
    config = read_json(folder / "config.json")
    lines += [f"  {name} = {value}" for name, value in sorted(config.items())]
    metrics = folder / "metrics.jsonl"
    entries = read_metrics(metrics) if metrics.exists() else []
    steps = [entry for entry in entries if get_kind(entry) == "step"]
    if steps:
        last = steps[-1]
        lines.append(f"step {last['step']} of {config.get('steps')}")
        lines += [f"  {name} = {value:.6g}" for name, value in last.items() if isinstance(value, float)]
    if evaluations := [entry for entry in entries if get_kind(entry) == "evaluation"]:
        lines.append(describe_evaluation(evaluations[-1]))
    names = tuple(name for name in CURVES if any(is_finite(entry.get(name)) for entry in steps))
    if names:
        try:
            draw_curves(steps, names, folder / "curves.png")
            lines.append(f"curves in {folder / 'curves.png'}")
        except (UserError, OSError) as error:  # a folder without permission to write
            lines.append(f"curves could not be drawn ({first_line(error)})")
    lines += describe_checkpoints(folder / "checkpoints")
    return "\n".join(lines)


def describe_checkpoints(folder: Path) -> list[str]:
    """The steps of all checkpoints, and the contents of the newest one that can be read."""
    if not folder.is_dir():
        return ["no checkpoint yet"]
    lines: list[str] = []
    try:
        with ocp.training.Checkpointer(str(folder.absolute())) as checkpointer:
            steps = sorted(checkpoint.step for checkpoint in checkpointer.checkpoints)
            if not steps:
                return ["no checkpoint yet"]
            lines.append(f"checkpoints of steps {', '.join(map(str, steps))}")
            for step in reversed(steps):
                try:
                    arrays = {name: np.asarray(x) for name, x in read_state(checkpointer, step).items()}
                except Exception as error:  # a damaged checkpoint can fail in any layer below
                    lines.append(f"that of step {step} cannot be read ({first_line(error)})")
                    continue
                return [*lines, f"in that of step {step}:", *describe_state(arrays)]
    except Exception as error:  # of any file system
        lines.append(f"checkpoints cannot be read ({first_line(error)})")
    return lines


def describe_state(arrays: Mapping[str, np.ndarray]) -> list[str]:
    parameters = {name: x for name, x in arrays.items() if name.startswith(PARAMETERS)}
    others = [x for name, x in arrays.items() if name not in parameters]
    kinds: dict[str, list[np.ndarray]] = {}
    for name, x in sorted(parameters.items()):
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(x)
    return [
        *(
            f"  {name:32} {len(alike):4} x {alike[0].dtype!s:9} {describe_shapes(alike)}"
            for name, alike in kinds.items()
        ),
        f"  {len(others)} more arrays (optimizer, running averages), {sum(x.nbytes for x in others) / 1e6:.1f} MB",
        f"parameters: {sum(x.size for x in parameters.values()):,}, sha256 {hash_arrays(parameters)}",
    ]


def describe_shapes(arrays: list[np.ndarray]) -> str:
    """The shape of arrays of one kind; where they differ along an axis, its range of sizes."""
    if len({x.ndim for x in arrays}) > 1:
        return "of several shapes"
    axes = [(min(sizes), max(sizes)) for sizes in zip(*(x.shape for x in arrays), strict=True)]
    return f"[{', '.join(str(least) if least == most else f'{least} to {most}' for least, most in axes)}]"


def hash_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """A digest of names, types, shapes and bytes: equal if and only if every bit is equal."""
    digest = hashlib.sha256()
    for name, x in sorted(arrays.items()):
        digest.update(f"{name} {x.dtype} {x.shape} ".encode())
        digest.update(np.ascontiguousarray(x).tobytes())
    return digest.hexdigest()
