"""Metrics of a run: JSON lines always, and a picture of its curve."""

import json
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends one JSON object a line; on resume, what a killed run logged beyond its checkpoint is dropped."""

    def __init__(self, path: Path, step: int):
        kept = [entry for entry in read_metrics(path) if entry["step"] <= step] if path.exists() else []
        beside = path.with_suffix(".partial")
        beside.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        beside.replace(path)
        self.file = path.open("a", buffering=1)

    def write(self, entry: dict[str, Any]) -> None:
        self.file.write(json.dumps(entry) + "\n")

    def close(self) -> None:
        self.file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every complete line; a run killed while it wrote leaves half a one."""
    entries = []
    for line in path.read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def draw_loss(entries: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([entry["step"] for entry in entries], [entry["loss"] for entry in entries], linewidth=1)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
