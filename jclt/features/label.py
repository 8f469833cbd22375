"""Labels of a coder's features, in a file that grows as they are found."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from jclt.coders import Coder, read_fingerprint
from jclt.features.block_events import choose_share
from jclt.features.concepts import PURE, check_world, draw_examples, label_by_concepts
from jclt.features.endpoint import Endpoint
from jclt.features.endpoint_labels import EndpointRun, label_by_endpoint
from jclt.features.labels import SOURCES, Label, Labels, load_labels, save_labels
from jclt.features.rows import Data, find_rows
from jclt.features.rule_labels import label_by_rules, measure_random_directions
from jclt.features.rules import find_classes
from jclt.features.weight_labels import find_raised_tokens, label_by_weights, list_token_texts
from jclt.features.windows import collect_windows
from jclt.models import Model
from jclt.models.model import on_mesh

LABELLED_AT_ONCE = 512
"""Whose windows are kept in memory; the data are read again for each so many."""
ROWS_READ = 1024
"""Rows of the data that are read by default."""
RANDOM_SHARE = 0.01
"""The share of tokens at which random directions fire."""


def label_features(
    model: Model,
    coder: Coder,
    data: Data = "world",
    *,
    out: str | Path,
    places: Sequence[tuple[int, int]] | None = None,
    rows: int | None = None,
    length: int | None = None,
    share: float | None = None,
    endpoint: Endpoint | None = None,
    judge: bool = True,
) -> EndpointRun:
    """Labels these features, or all, in the file `out`: by rules and weights, or by the model behind an endpoint.

    Labels that the file has stay: yours always, others unless an endpoint is asked and they are by something else. So
    the same call goes on where it was interrupted; an endpoint's labels without scores are then judged. `failed` says
    which features got no label, and why.
    """
    out, share = Path(out), choose_share(coder.config, share)
    with on_mesh(model):
        fingerprint = read_fingerprint(coder)
    labels = load_labels(out, fingerprint) if out.exists() else {}
    if places is None:
        places = [(layer, feature) for layer in coder.config.covered for feature in range(coder.config.features)]
    kept = ("yours", "endpoint") if endpoint else SOURCES
    unjudged = find_unjudged(labels) if endpoint and judge else {}
    todo = [x for x in dict.fromkeys(places) if x in unjudged or x not in labels or labels[x].source not in kept]
    vocabulary, failed = list_token_texts(model), dict[tuple[int, int], str]()
    classes = find_classes(vocabulary)

    def save(place: tuple[int, int], label: Label) -> None:
        labels[place] = label
        save_labels(out, labels, fingerprint)

    if not todo:
        return EndpointRun({place: labels[place] for place in places}, failed)
    found = find_rows(model, data, rows or ROWS_READ, length)
    controls: dict[int, float] | None = None
    for start in tqdm(range(0, len(todo), LABELLED_AT_ONCE), desc="labelling", leave=False):
        some = todo[start : start + LABELLED_AT_ONCE]
        windows = collect_windows(model, coder, found, some, share=share)
        if endpoint:
            raised = {p: [text for text, _ in pairs] for p, pairs in find_raised_tokens(model, coder, some).items()}
            given = {place: unjudged[place] for place in some if place in unjudged}
            run = label_by_endpoint(endpoint, windows, vocabulary, raised, given=given, judge=judge, save=save)
            failed |= run.failed
            if run.labels.keys() == given.keys() and any("not asked" in reason for reason in run.failed.values()):
                break
            continue
        if controls is None:
            layers = sorted({layer for layer, _ in todo})
            controls = measure_random_directions(model, coder, found, classes, vocabulary, RANDOM_SHARE, layers)
        for place, label in label_by_rules(windows, vocabulary, classes, label_by_weights(model, coder, some)).items():
            more = {"random": controls[place[0]]} if label.scores and place[0] in controls else {}
            labels[place] = label._replace(scores={**label.scores, **more})
        failed |= {place: "it fires in too few windows" for place in some if place not in labels}
        save_labels(out, labels, fingerprint)
    return EndpointRun({place: labels[place] for place in places if place in labels}, failed)


def find_unjudged(labels: Labels) -> Labels:
    return {place: label for place, label in labels.items() if label.source == "endpoint" and not label.scores}


def add_concepts(model: Model, coder: Coder, out: str | Path, places: Sequence[tuple[int, int]] | None = None) -> int:
    """Adds to the file `out` the pure labels by the small world's concepts of these features, or all, that have no
    label there. Returns how many."""
    check_world(model)
    out = Path(out)
    with on_mesh(model):
        fingerprint = read_fingerprint(coder)
    labels = load_labels(out, fingerprint) if out.exists() else {}
    found = label_by_concepts(model, coder, *draw_examples())
    wanted = found.keys() if places is None else found.keys() & set(places)
    added = {p: found[p] for p in wanted - labels.keys() if found[p].scores.get("purity", 0) >= PURE}
    save_labels(out, labels | added, fingerprint)
    return len(added)


def summarize_labels(run: EndpointRun) -> str:
    """How many labels there are of each kind, with their mean scores, and what failed."""
    lines = []
    for source in dict.fromkeys(label.source for label in run.labels.values()):
        of_source = [label for label in run.labels.values() if label.source == source]
        names = dict.fromkeys(name for label in of_source for name in label.scores)
        means = {name: np.mean([x.scores[name] for x in of_source if name in x.scores]) for name in names}
        shown = ", ".join(f"{name} {mean:.2f}" for name, mean in means.items())
        lines.append(f"{len(of_source)} labels by {source}{': mean ' + shown if shown else ''}")
    reasons = dict.fromkeys(run.failed.values())
    for reason in list(reasons)[:5]:
        having = [f"{layer}/{feature}" for (layer, feature), given in run.failed.items() if given == reason]
        lines.append(f"{len(having)} features ({', '.join(having[:3])}{' ...' * (len(having) > 3)}): {reason}")
    return "\n".join(lines) or "no features to label"
