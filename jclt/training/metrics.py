"""Metrics of a run: JSON lines always, and a picture of its curve."""

import json
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends one JSON object a line; on resume, what a killed run logged beyond its checkpoint is dropped."""

    def __init__(self, path: Path, step: int):
        kept = [entry for entry in read_metrics(path) if entry["step"] <= step] if path.exists() else []
        path.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
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


def draw_curve(entries: list[dict[str, Any]], path: Path, name: str = "loss") -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    points = [(entry["step"], entry[name]) for entry in entries if name in entry]
    axes.plot(*zip(*points, strict=True), linewidth=1)
    axes.set(xlabel="step", ylabel=name, yscale="log")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
