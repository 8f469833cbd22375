"""Labels by a language model behind an endpoint, and its judgement of any label. The prompts are in `prompts/`."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, TypeVar

import numpy as np

from jclt.errors import escape_unprintable, first_line
from jclt.features.endpoint import Endpoint, NoAnswer, ask
from jclt.features.labels import LONGEST_LABEL, Label, Labels, Place
from jclt.features.rules import balance_accuracy
from jclt.features.scores import HIGHLIGHT_SHARE, draw_highlights
from jclt.features.windows import WindowPair, Windows
from jclt.shapes import Bool

Answer = TypeVar("Answer")
AT_ONCE = 4
EXAMPLES_SHOWN = 12
JUDGED = 20
"""Windows of each kind of score, half of them with the right answer yes."""
JUDGED_AT_ONCE = 10
FAILURES_IN_A_ROW = 8
"""After so many the endpoint is not asked for more labels."""
ANSWER_TOKENS = 400
"""Room for a model that thinks first."""


class EndpointRun(NamedTuple):
    labels: Labels
    failed: dict[Place, str]  # why a feature has no label or no score


@cache
def read_prompt(name: str) -> str:
    return (Path(__file__).parent / "prompts" / f"{name}.txt").read_text()


def label_by_endpoint(
    endpoint: Endpoint,
    windows: Mapping[Place, WindowPair],
    vocabulary: Sequence[str],
    raised: Mapping[Place, Sequence[str]] | None = None,
    *,
    given: Mapping[Place, Label] = MappingProxyType({}),
    judge: bool = True,
    save: Callable[[Place, Label], None] = lambda place, label: None,
) -> EndpointRun:
    """A label of each feature with enough windows, with its detection and fuzzing by the same model's judgement on
    held-out windows and, as `shuffled`, the detection by another feature's label. Labels that are `given` are only
    judged. `save` gets each label as soon as it is there. A question without an answer is reported and costs no other
    label. `raised` are tokens whose logits a feature raises, for the prompt."""
    asked = {place: pair for place, pair in windows.items() if place not in given}
    few = {place: "it fires in too few windows" for place, pair in asked.items() if not pair.explaining.enough}
    run = EndpointRun(dict(given), few)

    def explain(place: Place) -> Label:
        prompt = write_explain_prompt(windows[place].explaining, vocabulary, (raised or {}).get(place, ()))
        text = clean_answer(ask(endpoint, prompt, ANSWER_TOKENS))
        if text is None:
            raise NoAnswer("an answer without a label")
        return Label(text, "endpoint")

    for place, label in _ask_for_all(explain, [place for place in asked if place not in run.failed], run.failed):
        run.labels[place] = label
        save(place, label)  # before it is judged, which takes longer
    if judge:
        texts = [label.text for label in run.labels.values()]
        others = dict(zip(run.labels, [*texts[1:], *texts[:1]], strict=True))

        def score(place: Place) -> tuple[dict[str, float], str]:
            other = others[place] if len(texts) > 1 else ""
            return judge_label(endpoint, vocabulary, windows[place].held_out, run.labels[place].text, other)

        judged = [place for place in run.labels if windows[place].held_out.enough]
        for place, (scores, reason) in _ask_for_all(score, judged, run.failed):
            run.labels[place] = run.labels[place]._replace(scores=scores)
            save(place, run.labels[place])
            if reason:
                run.failed[place] = reason
    return run


def _ask_for_all(
    question: Callable[[Place], Answer], places: Sequence[Place], failed: dict[Place, str]
) -> Iterator[tuple[Place, Answer]]:
    """The answers as they come, a few questions at once. Features without an answer are noted in `failed`; after many
    in a row the rest is not asked."""
    in_a_row = 0
    with ThreadPoolExecutor(AT_ONCE) as threads:
        waiting = {threads.submit(question, place): place for place in places}
        try:
            for done in as_completed(waiting):
                place = waiting[done]
                if done.cancelled():
                    failed[place] = f"not asked, after {FAILURES_IN_A_ROW} failures in a row"
                    continue
                try:
                    answer, in_a_row = done.result(), 0
                except NoAnswer as reason:
                    failed[place], in_a_row = first_line(reason), in_a_row + 1
                    if in_a_row == FAILURES_IN_A_ROW:
                        _cancel(waiting)
                    continue
                yield place, answer
        finally:
            _cancel(waiting)


def _cancel(waiting: Iterable[Future]) -> None:
    for question in waiting:
        question.cancel()


def judge_label(
    endpoint: Endpoint, vocabulary: Sequence[str], windows: Windows, text: str, other: str = ""
) -> tuple[dict[str, float], str]:
    """The scores that the model's judgement gives to a label, and why one of them is missing."""
    random, scores, reason = np.random.default_rng(0), {}, ""
    chosen = _draw_balanced(windows.fires, random)
    highlights = draw_highlights(windows)
    marked = _draw_balanced(highlights.right, random)
    plain = [write_window(windows, int(n), vocabulary) for n in chosen]
    shown = [write_window(windows, int(highlights.window[n]), vocabulary, highlights.marked[n]) for n in marked]
    questions = {"detection": ("detection", text, plain, windows.fires[chosen])}
    questions["fuzzing"] = "fuzzing", text, shown, highlights.right[marked]
    if other:
        questions["shuffled"] = "detection", other, plain, windows.fires[chosen]
    for name, (kind, label, texts, truth) in questions.items():
        if truth.all() or not truth.any():
            continue
        try:
            said = ask_which(endpoint, kind, label, texts)
        except NoAnswer as error:
            reason = f"{name} is missing: {first_line(error)}"
            continue
        scores[name] = balance_accuracy(said, truth)
    return scores, reason


def _draw_balanced(truth: Bool[np.ndarray, "N"], random: np.random.Generator) -> np.ndarray:
    halves = [random.permutation(np.flatnonzero(truth == value))[: JUDGED // 2] for value in (True, False)]
    return random.permutation(np.concatenate(halves))


def ask_which(endpoint: Endpoint, kind: str, label: str, texts: Sequence[str]) -> Bool[np.ndarray, "N"]:
    """For which of these texts the model says yes."""
    said: list[bool] = []
    for start in range(0, len(texts), JUDGED_AT_ONCE):
        some = texts[start : start + JUDGED_AT_ONCE]
        numbered = "\n".join(f"{number}. {text}" for number, text in enumerate(some, start=1))
        prompt = _fill(read_prompt(kind), label=label, examples=numbered, count=str(len(some)))
        answer = parse_judgement(ask(endpoint, prompt, ANSWER_TOKENS), len(some))
        if answer is None:
            raise NoAnswer(f"an answer that is no list of {len(some)} numbers")
        said += answer
    return np.array(said, bool)


def parse_judgement(answer: str, count: int) -> list[bool] | None:
    """The last list of so many zeros and ones in an answer."""
    lists = re.findall(r"\[\s*[01](?:\s*,\s*[01])*\s*\]", answer[-10_000:])
    found = [json.loads(text) for text in lists]
    fitting = [values for values in found if len(values) == count]
    return [value == 1 for value in fitting[-1]] if fitting else None


def write_explain_prompt(windows: Windows, vocabulary: Sequence[str], raised: Sequence[str] = ()) -> str:
    """Half of the examples have the highest activations, half are drawn at random."""
    highest = windows.activations.max(axis=1)
    order = np.flatnonzero(windows.fires)[np.argsort(-highest[windows.fires], kind="stable")]
    others = np.random.default_rng(0).permutation(order[EXAMPLES_SHOWN // 2 :])[: EXAMPLES_SHOWN // 2]
    strong = windows.activations >= HIGHLIGHT_SHARE * np.maximum(highest, 1e-30)[:, None]
    chosen = [*order[: EXAMPLES_SHOWN // 2], *others]
    examples = "\n".join(
        f"{i}. {write_window(windows, int(n), vocabulary, strong[n])}" for i, n in enumerate(chosen, 1)
    )
    named = ", ".join(repr(text) for text in raised)
    weights = f"Where it is active, it makes these tokens more likely to come next: {named}" if named else ""
    return _fill(read_prompt("explain"), examples=examples, weights=weights)


def write_window(
    windows: Windows, number: int, vocabulary: Sequence[str], marked: Bool[np.ndarray, "W"] | None = None
) -> str:
    """The text on one line, with << and >> around runs of marked tokens."""
    parts, inside = list[str](), False
    for n, token in enumerate(windows.tokens[number, 1:-1]):
        if not windows.valid[number, n] or token < 0:
            continue
        is_marked = marked is not None and bool(marked[n])
        parts.append("<<" * (is_marked and not inside) + ">>" * (inside and not is_marked))
        parts.append(str(vocabulary[token]))
        inside = is_marked
    return escape_unprintable("".join(parts) + ">>" * inside)


def _fill(prompt: str, **parts: str) -> str:
    """All at once, so that braces in a text stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda found: parts.get(found[1], found[0]), prompt)


def clean_answer(answer: str) -> str | None:
    """A label from an answer: plain text of one line, without what a model thought before, markup, or quotes around it;
    None if nothing is left."""
    answer = re.sub(r"<think>.*?</think>", " ", answer[:100_000], flags=re.DOTALL)
    answer = re.sub(
        r"<(script|style)\b.*?</\1\s*>|<[a-zA-Z/!][^<>]{0,200}>|```\w*", " ", answer, flags=re.DOTALL | re.I
    )
    for line in answer.splitlines():
        line = re.sub(r"^\s*(?:[#>*+-]+\s+)?", "", line)
        line = re.sub(r"\*\*|__|`", "", line)
        line = re.sub(r"^(?:label|answer|explanation)\s*:\s*", "", line.strip(), flags=re.I)
        line = "".join(c for c in " ".join(line.split()).strip("\"'“”*_ ") if c.isprintable())
        if re.search(r"\w", line):
            return line if len(line) <= LONGEST_LABEL else f"{line[: LONGEST_LABEL - 3]}..."
    return None
