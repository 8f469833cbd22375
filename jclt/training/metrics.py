"""Metrics of a run: JSON lines always, TensorBoard and Weights & Biases where they are installed, and a picture."""

import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol, TypeGuard

import jax

from jclt.errors import UserError, reason_of
from jclt.files import create_file, read_bytes, to_json, write_json_lines
from jclt.fingerprints import hash_json

Entry = dict[str, Any]


class Writer(Protocol):
    """Another place to which the metrics go."""

    def write(self, entry: Entry) -> None: ...

    def close(self) -> None: ...


class Log:
    """Appends the metrics to metrics.jsonl, one JSON object per line.

    On resume, the lines that a killed run wrote after its last checkpoint are dropped. Only the first host writes.
    TensorBoard events go to the run's folder if `tensorboardX` can be imported. Weights & Biases gets the run if
    `wandb` can be imported and WANDB_PROJECT is set; the run's identity there follows from `place`, its URL or folder.
    Numbers that are not finite are written as null, since JSON cannot express them.
    """

    def __init__(self, folder: Path, step: int, settings: Entry | None = None, place: str | None = None):
        self.path = folder / "metrics.jsonl"
        self.others: list[Writer] = []
        self.file: IO[str] | None = None
        self.last: dict[str, Entry] = {}
        """The last entry of each kind, "step" or "evaluation"."""
        if jax.process_index() > 0:
            return
        earlier = [entry for entry in read_metrics(self.path) if entry["step"] <= step] if self.path.exists() else []
        write_json_lines(self.path, map(replace_nonfinite, earlier))
        for entry in earlier:
            self.last[get_kind(entry)] = entry
        try:
            self.file = self.path.open("a", buffering=1, encoding="utf-8")
        except OSError as error:
            raise self._failed(error) from None
        with suppress(ImportError):
            self.others.append(_TensorBoard(folder, step))
        if "WANDB_PROJECT" in os.environ:
            with suppress(ImportError):
                self.others.append(_WeightsAndBiases(folder, settings or {}, place or str(folder.resolve())))

    def write(self, entry: Entry) -> None:
        entry = replace_nonfinite(entry)
        self.last[get_kind(entry)] = entry
        if self.file is not None:
            try:
                self.file.write(to_json(entry, self.path) + "\n")
            except OSError as error:
                raise self._failed(error) from None
        for other in self.others:
            other.write(entry)

    def has_evaluation(self, step: int) -> bool:
        """Whether the last evaluation that was written is of this step."""
        return self.last.get("evaluation", {}).get("step") == step

    def _failed(self, error: OSError) -> UserError:
        return UserError(f"{self.path}: cannot be written ({reason_of(error)})")

    def close(self) -> None:
        if self.file is not None:
            with suppress(OSError):  # a failed write has been reported already
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
        for name, value in flatten_numbers(entry).items():
            self.writer.add_scalar(name, value, entry["step"])

    def close(self) -> None:
        self.writer.close()


class _WeightsAndBiases:
    def __init__(self, folder: Path, settings: Entry, place: str):
        import wandb

        # Folders of the same name in different places are different runs.
        self.run = wandb.init(
            dir=str(folder), config=settings, id=f"{folder.name}-{hash_json(place)}", name=folder.name, resume="allow"
        )

    def write(self, entry: Entry) -> None:
        self.run.log(flatten_numbers(entry), step=entry["step"])

    def close(self) -> None:
        self.run.finish()


def get_kind(entry: Entry) -> str:
    return "step" if "loss" in entry else "evaluation"


def replace_nonfinite(value: Any) -> Any:
    """The value with None for every number that is not finite."""
    if isinstance(value, dict):
        return {name: replace_nonfinite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [replace_nonfinite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flatten_numbers(entry: Entry) -> dict[str, float]:
    """An entry's numbers by name; those of a list by name and index."""
    flat: dict[str, Any] = {}
    for name, value in entry.items():
        if isinstance(value, list):
            flat |= {f"{name}/{index}": item for index, item in enumerate(value)}
        elif name != "step":
            flat[name] = value
    return {name: value for name, value in flat.items() if value is not None}


def read_metrics(path: Path) -> list[Entry]:
    """The entries of a metrics file. Lines that are damaged, or incomplete because the run was killed, are skipped."""
    entries: list[Entry] = []
    for line in read_bytes(path, "the metrics of a run").split(b"\n"):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and type(entry.get("step")) is int:
            entries.append(entry)
    return entries


def draw_curves(entries: list[Entry], names: tuple[str, ...], path: Path) -> None:
    """Draws the metrics of these names over the steps, one below the other, without values that are not finite."""
    from matplotlib.figure import Figure

    height = 1 + 2.5 * len(names)
    figure = Figure(figsize=(7, height))  # with margins in inches: to look for the best ones takes as long as to draw
    figure.subplots_adjust(1.1 / 7, 0.6 / height, 1 - 0.2 / 7, 1 - 0.2 / height, hspace=0.1)
    rows = figure.subplots(len(names), sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(rows, names, strict=True):
        points = [(entry["step"], entry[name]) for entry in entries if is_finite(entry.get(name))]
        axes.plot([step for step, _ in points], [y for _, y in points], linewidth=1)
        axes.set(ylabel=name, yscale="log" if points and all(y > 0 for _, y in points) else "linear")
        axes.grid(alpha=0.3)
    rows[-1].set(xlabel="step")
    with create_file(path) as beside:
        figure.savefig(beside, dpi=120, format="png")


def describe_evaluation(entry: Entry) -> str:
    """How well the replacement model agrees with the model, in one line."""

    def format_number(name: str, form: str) -> str:
        return format(entry[name], form) if is_finite(entry.get(name)) else "-"

    agreement = format_number("agreement", ".1%")
    return (
        f"step {entry['step']}: the replacement model agrees with the model on {agreement} of the tokens, "
        f"KL {format_number('kl_replaced', '.3f')}, recovered {format_number('recovered', '.1%')} of the loss"
    )


def is_finite(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
