"""Graphs of thousands of prompts, one file each: `jclt attribute --prompts FILE --out DIR`."""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from jclt.attribution.attribute import BATCH, attribute_each, check_coder, describe_provenance, mark_chat
from jclt.attribution.options import Options, check_vectors
from jclt.attribution.prompts import encode_prompt
from jclt.attribution.targets import Target, parse_targets, resolve_targets
from jclt.coders import Coder
from jclt.errors import UserError
from jclt.files import parse_object, read_bytes, read_json, read_lines, write_json, write_json_lines
from jclt.fingerprints import hash_json
from jclt.graphs.graph import Graph
from jclt.graphs.load import load_graph
from jclt.models import Model
from jclt.models.chat import Messages, check_messages, is_chat

log = logging.getLogger(__name__)

LOG_INTERVAL = 30.0
"""Seconds between two log lines on the progress, where no progress bar is shown."""


class Line(NamedTuple):
    """A line of the file: its number, counted from 0, its prompt as text, chat or token ids, and its own
    targets, if any."""

    number: int
    prompt: str | list[int] | Messages
    targets: list[Target] | None = None


def attribute_file(
    model: Model,
    coder: Coder,
    prompts: Path,
    out: Path,
    options: Options,
    batch: int = BATCH,
    share: tuple[int, int] = (0, 1),
    visit: Callable[[Graph, str], None] | None = None,
) -> tuple[int, int]:
    """Writes the graph of each line of `prompts` to `out/NUMBER.npz`, and an entry for each to `out/graphs.jsonl`;
    returns the number of graphs and the number of prompts that failed.

    A prompt that cannot be traced is logged, written to `out/failed.jsonl`, and passed over. Graphs that are in the
    folder already are not written again: after an interruption the same command continues, and the folder ends up with
    the same bytes. Of several processes, process i of n handles `share=(i, n)`; they do not communicate, and the last
    one lists the graphs of all. `visit` is called with each graph and its number as a name, those in the folder first.
    """
    lines = read_prompts(prompts)
    check_coder(model, coder)
    options = options.check()
    if options.targets is not None:
        resolve_targets(model, options.targets)
    check_vectors(model, options)
    prepare_folder(out, lines, describe_provenance(model, coder, options))
    process, processes = share
    process_lines = [line for line in lines if line.number % processes == process]
    done = {line.number for line in process_lines if graph_path(out, line.number).exists()}
    encoded = encode_lines(model, options, out, process_lines, done, visit)
    finished = len(process_lines) - sum(line.number not in done for line, _ in encoded)
    traced = trace_lines(model, coder, options, batch, encoded, done)
    for line, graph in show_progress(traced, finished, len(process_lines)):
        if isinstance(graph, UserError):
            record_failure(out, line, graph)
        else:
            graph.save(graph_path(out, line.number))
            if visit is not None:
                visit(graph, graph_path(out, line.number).stem)
    return write_lists(out, lines)


Encoded = list[tuple[Line, np.ndarray]]
"""Lines with the token ids of their prompts."""


def encode_lines(
    model: Model,
    options: Options,
    out: Path,
    lines: Sequence[Line],
    done: set[int],
    visit: Callable[[Graph, str], None] | None,
) -> Encoded:
    """Encodes the prompts of all lines, and records those that are no prompts. Of lines that are `done`, with the graph
    in the folder, `visit` gets the graph; of the others an earlier failure is forgotten."""
    encoded: Encoded = []
    for line in lines:
        if line.number not in done:
            failure_path(out, line.number).unlink(missing_ok=True)
        elif visit is not None:
            visit(load_graph(graph_path(out, line.number)), graph_path(out, line.number).stem)
        try:
            encoded.append((line, encode_prompt(model, line.prompt, options.conventions)))
        except UserError as error:
            record_failure(out, line, error)
    return encoded


def trace_lines(
    model: Model, coder: Coder, options: Options, batch: int, encoded: Encoded, done: set[int]
) -> Iterator[tuple[Line, Graph | UserError]]:
    """The graph or the error of each line that is not done. Lines that are done still share batches with the others."""
    tokens, targets = [ids for _, ids in encoded], [line.targets for line, _ in encoded]
    done_indices = {index for index, (line, _) in enumerate(encoded) if line.number in done}
    for index, graph in attribute_each(model, coder, tokens, options, batch, targets, done_indices):
        line = encoded[index][0]
        yield line, graph if isinstance(graph, UserError) else mark_chat(graph, line.prompt)


def show_progress(
    results: Iterator[tuple[Line, Graph | UserError]], finished: int, total: int
) -> Iterator[tuple[Line, Graph | UserError]]:
    """Passes results on, with a progress bar; where there is no terminal, with a log line from time to time."""
    with tqdm(total=total, initial=finished, unit="graph", disable=None) as progress:
        logged = time.monotonic()
        for count, result in enumerate(results, finished + 1):
            yield result
            progress.update()
            if progress.disable and time.monotonic() - logged >= LOG_INTERVAL:
                logged = time.monotonic()
                log.info("%d of %d graphs", count, total)


def record_failure(out: Path, line: Line, error: UserError) -> None:
    log.warning("line %d: %s", line.number + 1, error)
    write_json_lines(failure_path(out, line.number), [describe_line(line) | {"error": str(error)}])


def write_lists(out: Path, lines: Sequence[Line]) -> tuple[int, int]:
    """Writes the lists of the graphs in the folder and of the prompts that failed; returns the length of each."""
    graphs, failures = [], []
    for line in lines:
        path, failure = graph_path(out, line.number), failure_path(out, line.number)
        if path.exists():
            try:
                graphs.append(describe_graph(line, path))
            except UserError as error:  # the file is damaged; when it is deleted, the graph is made again
                log.warning("line %d: %s", line.number + 1, error)
                failures.append(describe_line(line) | {"error": str(error)})
        elif failure.exists():
            try:
                failures.append(parse_object(read_bytes(failure), failure))
            except UserError:  # the name of the file still tells which prompt failed
                failures.append(describe_line(line) | {"error": "unknown"})
    write_json_lines(out / "failed.jsonl", failures)
    write_json_lines(out / "graphs.jsonl", graphs)
    return len(graphs), len(failures)


def read_prompts(path: Path) -> list[Line]:
    """The lines of a file that are not blank. A line is a text. In a file named .jsonl or .json it is a JSON object
    with the field `prompt`, text, a list of messages or of token ids, and perhaps `target` or `targets`, as `attribute`
    takes them."""
    texts = read_lines(path, "a file of prompts")
    is_json = path.suffix in (".jsonl", ".json")
    lines = [
        _parse_json_line(path, number, text) if is_json else Line(number, text)
        for number, text in enumerate(texts)
        if text.strip()
    ]
    if not lines:
        raise UserError(f"{path}: empty, expected a prompt on each line")
    return lines


def _parse_json_line(path: Path, number: int, text: str) -> Line:
    where = f"{path}: line {number + 1}"
    try:
        fields = parse_object(text, where)
        prompt = fields["prompt"]
    except (UserError, KeyError):
        raise UserError(f"{where} is not JSON with a field 'prompt'") from None
    is_ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
    if is_chat(prompt):
        try:
            check_messages(prompt)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    elif not isinstance(prompt, str) and not is_ids:
        wanted = "text or a list of token ids or of messages"
        raise UserError(f"{where}: 'prompt' is {json.dumps(prompt)[:80]}, expected {wanted}")
    names = [name for name in ("target", "targets") if fields.get(name) is not None]
    if len(names) > 1:
        raise UserError(f"{where}: both 'target' and 'targets', expected one of them")
    if not names:
        return Line(number, prompt)
    targets = [fields["target"]] if names == ["target"] else fields["targets"]
    if not isinstance(targets, list | str | int):
        raise UserError(f"{where}: 'targets' is {json.dumps(targets)[:80]}, expected a list of tokens or pairs of them")
    try:
        return Line(number, prompt, parse_targets(targets))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def prepare_folder(out: Path, lines: Sequence[Line], about: dict[str, Any]) -> None:
    """Makes the folder, or checks that it was begun with the same prompts, weights and settings."""
    settings = json.loads(json.dumps(about | {"prompts": hash_json([list(line) for line in lines])}))
    path = out / "settings.json"
    if not path.exists():
        others = out.exists() and any(not file.name.startswith(path.name) for file in out.iterdir())
        if others and not path.exists():  # another process may just have begun the folder
            raise UserError(f"{out}: holds other files, expected a new folder or one to go on with")
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
    saved = read_json(path)
    for kind in ("model", "coder"):
        name = f"{kind}_fingerprint"
        if name not in saved:
            raise UserError(
                f"{out}: begun by an older jclt, which did not note its {kind}'s weights; expected a new folder"
            )
        if saved[name] != settings[name]:
            raise UserError(f"{out}: begun with another {kind} (fingerprint {saved[name]}, now {settings[name]})")
    for name, value in settings.items():
        if saved.get(name) != value:
            raise UserError(f"{out}: begun with {name} {saved.get(name)}, expected {value}")


def graph_path(out: Path, number: int) -> Path:
    """Numbered like the lines, from 1."""
    return out / f"{number + 1:06d}.npz"


def failure_path(out: Path, number: int) -> Path:
    return out / f"{number + 1:06d}.failed"


def describe_line(line: Line) -> dict[str, Any]:
    return {"line": line.number + 1, "prompt": line.prompt}


def describe_graph(line: Line, path: Path) -> dict[str, Any]:
    graph = load_graph(path)
    scores = graph.scores
    return describe_line(line) | {
        "file": path.name,
        "outputs": list(graph.logit_names),
        "probabilities": [_round_finite(p) for p in graph.logit_probabilities],
        "features": len(graph.features),
        "completeness": _round_finite(scores.completeness),
        "replacement": _round_finite(scores.replacement),
    }


def _round_finite(x: float) -> float | None:
    """Rounded; None for NaN or infinity, which JSON does not have."""
    return round(float(x), 6) if math.isfinite(x) else None
