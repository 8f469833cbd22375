"""Graphs of thousands of prompts, one file each: `jclt attribute --prompts FILE --out DIR`."""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jclt.attribution.attribute import BATCH, attribute_each, check, prompt_tokens, provenance
from jclt.attribution.files import load_graph, save_graph
from jclt.attribution.trace import Options
from jclt.coders import Coder
from jclt.errors import UserError
from jclt.files import read_json, write_json
from jclt.models import Model

log = logging.getLogger(__name__)


def attribute_file(
    model: Model,
    coder: Coder,
    prompts: Path,
    out: Path,
    options: Options,
    batch: int = BATCH,
    share: tuple[int, int] = (0, 1),
) -> tuple[int, int]:
    """Writes the graph of each line of `prompts` to `out/NUMBER.npz`, and a line on each to `out/graphs.jsonl`; returns
    how many there are and how many prompts failed.

    A prompt that cannot be traced is reported, in `out/failed.jsonl` too, and passed over. What is there already is
    not computed again: the same command goes on where it stopped. Of several processes each takes its `share`, which
    of how many; they need no word of one another, and the last to be done lists all.
    """
    texts = read_prompts(prompts)
    check(model, coder)
    options.check()
    begin(out, texts, provenance(model, coder, options))
    mine = range(share[0], len(texts), share[1])
    tokens: dict[int, np.ndarray] = {}
    done = {number for number in mine if path_of(out, number).exists()}
    failed = 0

    def fail(number: int, error: UserError) -> None:
        nonlocal failed
        failed += 1
        log.warning("line %d: %s", number + 1, error)
        write_lines(failure_of(out, number), [{"line": number + 1, "prompt": texts[number], "error": str(error)}])

    for number in mine:
        if number not in done:
            failure_of(out, number).unlink(missing_ok=True)
            try:
                tokens[number] = prompt_tokens(model, texts[number])
            except UserError as error:
                fail(number, error)
    numbers = list(tokens)
    with tqdm(total=len(mine), initial=len(done) + failed, unit="graph", disable=None) as progress:
        for place, graph in attribute_each(model, coder, list(tokens.values()), options, batch):
            if isinstance(graph, UserError):
                fail(numbers[place], graph)
            else:
                save_graph(graph, path_of(out, numbers[place]))
            progress.update()
    return list_all(out, texts)


def list_all(out: Path, texts: Sequence[str]) -> tuple[int, int]:
    """Writes the lists of what is there and of what failed, and says how many they are."""
    kept = [number for number in range(len(texts)) if path_of(out, number).exists()]
    failures = [failure_of(out, number) for number in range(len(texts))]
    entries = [json.loads(path.read_text()) for path in failures if path.exists()]
    write_lines(out / "failed.jsonl", entries)
    write_lines(out / "graphs.jsonl", (line_on(number, texts[number], path_of(out, number)) for number in kept))
    return len(kept), len(entries)


def read_prompts(path: Path) -> list[str]:
    """Lines of text, or of JSON with the field `prompt`; empty lines are prompts too, which fail."""
    lines = path.read_text().splitlines()
    if not lines:
        raise UserError(f"{path}: empty, expected a prompt on each line")
    if path.suffix not in (".jsonl", ".json"):
        return lines
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            prompts.append(json.loads(line)["prompt"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: line {number} is not JSON with a field 'prompt'") from None
    return prompts


def begin(out: Path, texts: Sequence[str], about: dict[str, Any]) -> None:
    """Makes the folder, or sees that it was begun with the same prompts and settings."""
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    settings = json.loads(json.dumps(about | {"prompts": digest}))
    path = out / "settings.json"
    if not path.exists():
        others = out.exists() and any(not file.name.startswith(path.name) for file in out.iterdir())
        if others and not path.exists():
            raise UserError(f"{out}: holds other files, expected a new folder or one to go on with")
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
    for name, value in read_json(path).items():
        if value != settings.get(name):
            raise UserError(f"{out}: begun with {name} {value}, expected {settings.get(name)}")


def path_of(out: Path, number: int) -> Path:
    """Numbered as the lines are, from 1."""
    return out / f"{number + 1:06d}.npz"


def failure_of(out: Path, number: int) -> Path:
    return out / f"{number + 1:06d}.failed"


def line_on(number: int, text: str, path: Path) -> dict[str, Any]:
    graph = load_graph(path)
    scores = graph.scores
    return {
        "line": number + 1,
        "prompt": text,
        "file": path.name,
        "outputs": list(graph.logit_names),
        "probabilities": [round(float(p), 6) for p in graph.logit_probabilities],
        "features": len(graph.features),
        "completeness": round(scores.completeness, 6),
        "replacement": round(scores.replacement, 6),
    }


def write_lines(path: Path, lines: Any) -> None:
    beside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with beside.open("w") as file:
        for line in lines:
            file.write(json.dumps(line) + "\n")
    beside.replace(path)
