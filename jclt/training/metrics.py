"""Metrics of a run: JSON lines always, TensorBoard and Weights & Biases where they are installed, and a picture."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

Entry = dict[str, Any]


class Log:
    """Appends one JSON object a line; on resume, what a killed run logged beyond its checkpoint is dropped.

    Only the first host writes. TensorBoard events go to the run's folder where `tensorboardX` can be imported;
    Weights & Biases gets the run where `wandb` can and WANDB_PROJECT is set.
    """

    def __init__(self, folder: Path, step: int, settings: Entry | None = None):
        self.path, self.others = folder / "metrics.jsonl", []
        self.file = None
        if jax.process_index() > 0:
            return
        kept = [entry for entry in read_metrics(self.path) if entry["step"] <= step] if self.path.exists() else []
        beside = self.path.with_suffix(".partial")
        beside.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        beside.replace(self.path)
        self.file = self.path.open("a", buffering=1)
        with suppress(ImportError):
            self.others.append(_TensorBoard(folder, step))
        if "WANDB_PROJECT" in os.environ:
            with suppress(ImportError):
                self.others.append(_WeightsAndBiases(folder, settings or {}))

    def write(self, entry: Entry) -> None:
        if self.file is not None:
            self.file.write(json.dumps(entry) + "\n")
        for other in self.others:
            other.write(entry)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        for other in self.others:
            other.close()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _TensorBoard:
    def __init__(self, folder: Path, step: int):
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, entry: Entry) -> None:
        for name, value in numbers(entry).items():
            self.writer.add_scalar(name, value, entry["step"])

    def close(self) -> None:
        self.writer.close()


class _WeightsAndBiases:
    def __init__(self, folder: Path, settings: Entry):
        import wandb

        self.run = wandb.init(dir=str(folder), config=settings, id=folder.name, resume="allow")

    def write(self, entry: Entry) -> None:
        self.run.log(numbers(entry), step=entry["step"])

    def close(self) -> None:
        self.run.finish()


def numbers(entry: Entry) -> dict[str, float]:
    """An entry's numbers by name, those of a list under the name and their place."""
    flat: dict[str, float] = {}
    for name, value in entry.items():
        if isinstance(value, list):
            flat |= {f"{name}/{place}": item for place, item in enumerate(value)}
        elif name != "step":
            flat[name] = value
    return flat


def read_metrics(path: Path) -> list[Entry]:
    """Every complete line; a run killed while it wrote leaves half a one."""
    entries = []
    for line in path.read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def draw_curves(entries: list[Entry], names: tuple[str, ...], path: Path) -> None:
    """A picture of the numbers of these names over the steps, one below the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1 + 2.5 * len(names)), layout="constrained")
    rows = figure.subplots(len(names), sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(rows, names, strict=True):
        points = [(entry["step"], entry[name]) for entry in entries if name in entry]
        axes.plot(*zip(*points, strict=True), linewidth=1)
        axes.set(ylabel=name, yscale="log" if all(y > 0 for _, y in points) else "linear")
        axes.grid(alpha=0.3)
    rows[-1].set(xlabel="step")
    figure.savefig(path, dpi=120)
