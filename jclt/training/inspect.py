"""What a run's folder holds: its settings, how far it came, its newest checkpoint and a digest of the parameters."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from orbax.checkpoint import v1 as ocp

from jclt.errors import UserError, first_line
from jclt.files import read_json
from jclt.training.checkpoints import read_state
from jclt.training.metrics import describe_evaluation, draw_curves, is_finite, kind_of, read_metrics

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
    entries = read_metrics(metrics) if metrics.exists() else []
    steps = [entry for entry in entries if kind_of(entry) == "step"]
    if steps:
        last = steps[-1]
        lines.append(f"step {last['step']} of {config.get('steps')}")
        lines += [f"  {name} = {value:.6g}" for name, value in last.items() if isinstance(value, float)]
    if evaluations := [entry for entry in entries if kind_of(entry) == "evaluation"]:
        lines.append(describe_evaluation(evaluations[-1]))
    names = tuple(name for name in CURVES if any(is_finite(entry.get(name)) for entry in steps))
    if names:
        try:
            draw_curves(steps, names, folder / "curves.png")
            lines.append(f"curves in {folder / 'curves.png'}")
        except (UserError, OSError) as error:  # a run that one may only read
            lines.append(f"curves could not be drawn ({first_line(error)})")
    lines += describe_checkpoints(folder / "checkpoints")
    return "\n".join(lines)


def describe_checkpoints(folder: Path) -> list[str]:
    """Of which steps there are checkpoints, and what the newest one that can be read holds."""
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
                    found = {name: np.asarray(x) for name, x in read_state(checkpointer, step).items()}
                except Exception as error:  # a damaged checkpoint can fail in any layer below
                    lines.append(f"that of step {step} cannot be read ({first_line(error)})")
                    continue
                return [*lines, f"in that of step {step}:", *describe_state(found)]
    except Exception as error:  # of the file system, whichever it is
        lines.append(f"checkpoints cannot be read ({first_line(error)})")
    return lines


def describe_state(arrays: Mapping[str, np.ndarray]) -> list[str]:
    own = {name: x for name, x in arrays.items() if name.startswith(PARAMETERS)}
    rest = [x for name, x in arrays.items() if name not in own]
    kinds: dict[str, list[np.ndarray]] = {}
    for name, x in sorted(own.items()):
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(x)
    return [
        *(f"  {name:32} {len(alike):4} x {alike[0].dtype!s:9} {shapes(alike)}" for name, alike in kinds.items()),
        f"  {len(rest)} more arrays (optimizer, running averages), {sum(x.nbytes for x in rest) / 1e6:.1f} MB",
        f"parameters: {sum(x.size for x in own.values()):,}, sha256 {digest(own)}",
    ]


def shapes(arrays: list[np.ndarray]) -> str:
    """The shape of arrays of one kind, with the range of each axis that they differ in."""
    if len({x.ndim for x in arrays}) > 1:
        return "of several shapes"
    axes = [(min(sizes), max(sizes)) for sizes in zip(*(x.shape for x in arrays), strict=True)]
    return f"[{', '.join(str(least) if least == most else f'{least} to {most}' for least, most in axes)}]"


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Of names, types, shapes and bytes: equal where every bit is."""
    whole = hashlib.sha256()
    for name, x in sorted(arrays.items()):
        whole.update(f"{name} {x.dtype} {x.shape} ".encode())
        whole.update(np.ascontiguousarray(x).tobytes())
    return whole.hexdigest()
