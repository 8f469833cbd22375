"""`load_pairs`: pairs of prompts from files, ours and published ones. The fields of the first row tell the layout.

| layout | file | fields of a row |
|---|---|---|
| ours | JSON lines, JSON list, CSV | clean, answer (one, or a list); corrupted, wrong_answer, subject, name if wanted |
| indirect objects (EAP-IG) | CSV | clean, corrupted, corrupted_hard, correct_idx; the answer is the name not repeated |
| greater-than (EAP-IG) | CSV | clean, corrupted, label: the two digits above which all years are right |
| agreement (sparse feature circuits) | JSON lines | clean_prefix, patch_prefix, clean_answer, patch_answer |
| known facts (ROME) | JSON list | prompt, subject, attribute. There is no corrupted prompt: they serve `trace_causes` |

Published token ids are those of one tokenizer, so answers are always taken from the text.
"""

import csv
import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jclt.errors import UserError, first_line
from jclt.files import parse_json, read_text
from jclt.interventions.patching.pairs import PairRow, PromptPairs, make_pairs
from jclt.models import Model

TWO_NAMES = re.compile(r"\b([A-Z][a-z]+) and ([A-Z][a-z]+)\b")


def load_pairs(model: Model, path: str | Path, *, corrupted: str = "corrupted") -> PromptPairs:
    """Pairs from a file. `corrupted` names the field with corrupted prompts, where a file has several ("corrupted_hard"
    swaps the two names)."""
    path = Path(path)
    records = read_records(path)
    if not records:
        raise UserError(f"{path}: has no rows, expected pairs of prompts")
    fields = set(records[0])
    readers: list[tuple[set[str], Callable[[Mapping[str, Any]], PairRow]]] = [
        ({"clean", "answer"}, lambda row: read_own(row, corrupted)),
        ({"clean", corrupted, "correct_idx"}, lambda row: read_indirect_object(row, corrupted)),
        ({"clean", corrupted, "label"}, lambda row: read_greater_than(row, corrupted)),
        ({"clean_prefix", "patch_prefix", "clean_answer", "patch_answer"}, read_agreement),
        ({"prompt", "subject", "attribute"}, read_fact),
    ]
    read = next((reader for needed, reader in readers if needed <= fields), None)
    if read is None:
        raise UserError(
            f"{path}: fields {', '.join(sorted(fields))}, expected clean, {corrupted}, answer, wrong_answer"
        )
    rows: list[PairRow] = []
    for number, record in enumerate(records):
        try:
            row = read(record)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}: row {number}: {first_line(error)}, expected the fields of the first row"
            ) from None
        rows.append(row if row.name is not None else row._replace(name=f"{path.name} {number}"))
    return make_pairs(model, rows)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV file, a JSON list, or JSON lines."""
    text = read_text(path, "pairs of prompts as JSON lines or CSV")
    if path.suffix.lower() == ".csv":
        try:
            return [dict(row) for row in csv.DictReader(io.StringIO(text), strict=True)]
        except csv.Error as error:
            raise UserError(f"{path}: not valid CSV ({first_line(error)})") from None
    if text.lstrip().startswith("["):
        records = parse_json(text, path)
    else:
        lines = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
        records = [parse_json(line, f"{path}: line {number}") for number, line in lines]
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise UserError(f"{path}: row {number}: {type(record).__name__}, expected an object with fields")
    return records


def read_own(row: Mapping[str, Any], corrupted: str) -> PairRow:
    subject = row.get("subject")
    subject = (int(subject[0]), int(subject[1])) if isinstance(subject, list) else subject
    return PairRow(
        row["clean"], row.get(corrupted), row["answer"], row.get("wrong_answer", ()), subject, row.get("name")
    )


def read_indirect_object(row: Mapping[str, Any], corrupted: str) -> PairRow:
    """`A and B ..., A ... to`: B is right, A is wrong."""
    names = TWO_NAMES.search(row["clean"])
    if names is None:
        raise ValueError(f"no two names in '{row['clean']}'")
    later = row["clean"][names.end() :]
    repeated = [name for name in names.groups() if re.search(rf"\b{name}\b", later)]
    if len(repeated) != 1:
        raise ValueError(f"names {names[1]} and {names[2]} are not repeated once in '{row['clean']}'")
    (other,) = set(names.groups()) - set(repeated)
    return PairRow(row["clean"], row[corrupted], f" {other}", f" {repeated[0]}", repeated[0])


def read_greater_than(row: Mapping[str, Any], corrupted: str) -> PairRow:
    """Years of the century above the label are right, and those up to it are wrong."""
    label = int(row["label"])
    years = [f"{year:02d}" for year in range(100)]
    return PairRow(row["clean"], row[corrupted], tuple(years[label + 1 :]), tuple(years[: label + 1]))


def read_agreement(row: Mapping[str, Any]) -> PairRow:
    return PairRow(row["clean_prefix"], row["patch_prefix"], row["clean_answer"], row["patch_answer"])


def read_fact(row: Mapping[str, Any]) -> PairRow:
    return PairRow(row["prompt"], None, f" {row['attribute']}", (), row["subject"])
