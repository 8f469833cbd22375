"""Graphs of thousands of prompts, one file each: `jclt attribute --prompts FILE --out DIR`."""

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from jclt.attribution.attribute import BATCH, attribute_each, check, prompt_tokens, provenance
from jclt.attribution.options import Options
from jclt.attribution.targets import Target, as_targets, resolved
from jclt.coders import Coder
from jclt.errors import UserError
from jclt.files import parse_object, read_bytes, read_json, read_lines, write_json, write_json_lines
from jclt.fingerprints import digest
from jclt.graphs.graph import Graph
from jclt.graphs.load import load_graph
from jclt.models import Model

log = logging.getLogger(__name__)

BETWEEN = 30.0
"""Seconds between two lines on how far it is, where no bar shows it."""


class Line(NamedTuple):
    """A prompt of a file: the number of its line, from 0, its text or token ids, and the targets it brings itself."""

    number: int
    prompt: str | list[int]
    targets: list[Target] | None = None


def attribute_file(
    model: Model,
    coder: Coder,
    prompts: Path,
    out: Path,
    options: Options,
    batch: int = BATCH,
    share: tuple[int, int] = (0, 1),
    also: Callable[[Graph, str], None] | None = None,
) -> tuple[int, int]:
    """Writes the graph of each line of `prompts` to `out/NUMBER.npz`, and a line on each to `out/graphs.jsonl`; returns
    how many there are and how many prompts failed.

    A prompt that cannot be traced is reported, in `out/failed.jsonl` too, and passed over. What is there already is
    not written again: the same command goes on where it stopped, and ends with the same bytes as if it had not. Of
    several processes each takes its `share`, which of how many; they need no word of one another, and the last to be
    done lists all. `also` is called with every graph and its number as a name, with those found there first.
    """
    lines = read_prompts(prompts)
    check(model, coder)
    options = options.check()
    if options.targets is not None:
        resolved(model, options.targets)
    begin(out, lines, provenance(model, coder, options))
    mine = [line for line in lines if line.number % share[1] == share[0]]
    traced: list[Line] = []
    tokens: list[np.ndarray] = []
    done = {line.number for line in mine if path_of(out, line.number).exists()}
    failed = 0

    def fail(line: Line, error: UserError) -> None:
        nonlocal failed
        failed += 1
        log.warning("line %d: %s", line.number + 1, error)
        write_json_lines(failure_path(out, line.number), [entry_on(line) | {"error": str(error)}])

    for line in mine:
        if line.number in done:
            if also is not None:
                also(load_graph(path_of(out, line.number)), path_of(out, line.number).stem)
        else:
            failure_path(out, line.number).unlink(missing_ok=True)
        try:
            tokens.append(prompt_tokens(model, line.prompt, options.conventions))
            traced.append(line)
        except UserError as error:
            fail(line, error)
    written = {place for place, line in enumerate(traced) if line.number in done}
    targets = [line.targets for line in traced]
    with tqdm(total=len(mine), initial=len(done) + failed, unit="graph", disable=None) as progress:
        said, count = time.monotonic(), len(done) + failed
        for place, graph in attribute_each(model, coder, tokens, options, batch, targets, written):
            line = traced[place]
            if isinstance(graph, UserError):
                fail(line, graph)
            else:
                graph.save(path_of(out, line.number))
                if also is not None:
                    also(graph, path_of(out, line.number).stem)
            progress.update()
            count += 1
            if progress.disable and time.monotonic() - said >= BETWEEN:
                said = time.monotonic()
                log.info("%d of %d graphs", count, len(mine))
    return list_all(out, lines)


def list_all(out: Path, lines: Sequence[Line]) -> tuple[int, int]:
    """Writes the lists of what is there and of what failed, and says how many they are."""
    graphs, failures = [], []
    for line in lines:
        path, failure = path_of(out, line.number), failure_path(out, line.number)
        if path.exists():
            try:
                graphs.append(line_on(line, path))
            except UserError as error:  # damaged since: deleted, it is made again
                log.warning("line %d: %s", line.number + 1, error)
                failures.append(entry_on(line) | {"error": str(error)})
        elif failure.exists():
            try:
                failures.append(parse_object(read_bytes(failure), failure))
            except UserError:  # what failed is known by its name
                failures.append(entry_on(line) | {"error": "unknown"})
    write_json_lines(out / "failed.jsonl", failures)
    write_json_lines(out / "graphs.jsonl", graphs)
    return len(graphs), len(failures)


def read_prompts(path: Path) -> list[Line]:
    """Lines of text; or of JSON with the field `prompt`, text or token ids, and maybe `target` or `targets`, as
    `attribute` takes them. Blank lines are passed over."""
    texts = read_lines(path, "a file of prompts")
    is_json = path.suffix in (".jsonl", ".json")
    lines = [
        _json_line(path, number, text) if is_json else Line(number, text)
        for number, text in enumerate(texts)
        if text.strip()
    ]
    if not lines:
        raise UserError(f"{path}: empty, expected a prompt on each line")
    return lines


def _json_line(path: Path, number: int, text: str) -> Line:
    where = f"{path}: line {number + 1}"
    try:
        found = parse_object(text, where)
        prompt = found["prompt"]
    except (UserError, KeyError):
        raise UserError(f"{where} is not JSON with a field 'prompt'") from None
    is_ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
    if not isinstance(prompt, str) and not is_ids:
        raise UserError(f"{where}: 'prompt' is {json.dumps(prompt)[:80]}, expected text or a list of token ids")
    given = [name for name in ("target", "targets") if found.get(name) is not None]
    if len(given) > 1:
        raise UserError(f"{where}: both 'target' and 'targets', expected one of them")
    if not given:
        return Line(number, prompt)
    targets = [found["target"]] if given == ["target"] else found["targets"]
    if not isinstance(targets, list | str | int):
        raise UserError(f"{where}: 'targets' is {json.dumps(targets)[:80]}, expected a list of tokens or pairs of them")
    try:
        return Line(number, prompt, as_targets(targets))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def begin(out: Path, lines: Sequence[Line], about: dict[str, Any]) -> None:
    """Makes the folder, or sees that it was begun with the same prompts, weights and settings."""
    settings = json.loads(json.dumps(about | {"prompts": digest([list(line) for line in lines])}))
    path = out / "settings.json"
    if not path.exists():
        others = out.exists() and any(not file.name.startswith(path.name) for file in out.iterdir())
        if others and not path.exists():
            raise UserError(f"{out}: holds other files, expected a new folder or one to go on with")
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
    begun = read_json(path)
    for kind in ("model", "coder"):
        name = f"{kind}_fingerprint"
        if name not in begun:
            raise UserError(
                f"{out}: begun by an older jclt, which did not note its {kind}'s weights; expected a new folder"
            )
        if begun[name] != settings[name]:
            raise UserError(f"{out}: begun with another {kind} (fingerprint {begun[name]}, now {settings[name]})")
    for name, value in settings.items():
        if begun.get(name) != value:
            raise UserError(f"{out}: begun with {name} {begun.get(name)}, expected {value}")


def path_of(out: Path, number: int) -> Path:
    """Numbered as the lines are, from 1."""
    return out / f"{number + 1:06d}.npz"


def failure_path(out: Path, number: int) -> Path:
    return out / f"{number + 1:06d}.failed"


def entry_on(line: Line) -> dict[str, Any]:
    return {"line": line.number + 1, "prompt": line.prompt}


def line_on(line: Line, path: Path) -> dict[str, Any]:
    graph = load_graph(path)
    scores = graph.scores
    return entry_on(line) | {
        "file": path.name,
        "outputs": list(graph.logit_names),
        "probabilities": [_rounded(p) for p in graph.logit_probabilities],
        "features": len(graph.features),
        "completeness": _rounded(scores.completeness),
        "replacement": _rounded(scores.replacement),
    }


def _rounded(x: float) -> float | None:
    """JSON has no NaN."""
    return round(float(x), 6) if math.isfinite(x) else None
