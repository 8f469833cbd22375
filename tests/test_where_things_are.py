"""The page `jclt/README.md` says where things are: its files exist, and its names are defined in the lines it gives."""

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest

PAGE = Path(__file__).parents[1] / "jclt" / "README.md"
MOST_LINES = 40


class Row(NamedTuple):
    """One question of the table."""

    question: str
    file: str  # relative to the page
    names: tuple[str, ...]  # what is defined there; none: the docstring at the head of the file
    start: int
    stop: int


def read_row(line: str) -> Row:
    question, answer, lines = (cell.strip() for cell in line.strip("|").split("|"))
    place = re.fullmatch(r"`(.+):(\d+)-(\d+)`", lines)
    assert place, line
    links = re.findall(r"\[([^\]]+)\]\(([^)]+)\)", answer)
    assert links and {path for _, path in links} == {place[1]}, line
    names = tuple(text.strip("`") for text, _ in links if text.startswith("`"))
    return Row(question, place[1], names, int(place[2]), int(place[3]))


def find_definitions(path: Path) -> dict[str, tuple[int, int]]:
    """The first and last line of each function, class and constant at the top level, and of the head as ''."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names, first = [node.name], min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names, first = [target.id for target in targets if isinstance(target, ast.Name)], node.lineno
        elif isinstance(node, ast.Expr) and node.lineno == 1:
            names, first = [""], 1
        else:
            continue
        found |= {name: (first, node.end_lineno) for name in names}
    return found


TEXT = PAGE.read_text()
ROWS = [read_row(line) for line in TEXT.splitlines() if line.startswith("| ") and "](" in line]


def test_the_page_has_all_questions_and_links_to_the_overview():
    assert len(ROWS) == 13 == len({row.question for row in ROWS})
    assert "](../README.md)" in TEXT
    for link in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert (PAGE.parent / link).is_file(), link


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.question)
def test_an_answer_is_in_the_lines_that_the_page_gives(row):
    assert row.stop - row.start < MOST_LINES
    definitions = find_definitions(PAGE.parent / row.file)
    for name in row.names or ("",):
        assert name in definitions, f"{row.file} defines no {name or 'docstring at its head'}"
        first, last = definitions[name]
        assert row.start <= first and last <= row.stop, f"{row.file}: {name or 'the head'} is in lines {first}-{last}"
