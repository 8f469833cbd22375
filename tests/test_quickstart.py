"""The notebook experiments/quickstart.ipynb, run here without Jupyter: its cells print and show what the file holds."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import jax
import pytest

from jclt.world.facts import CITY_SPLIT

NOTEBOOK = Path(__file__).parents[1] / "experiments" / "quickstart.ipynb"
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_small_and_holds_no_page_and_no_progress():
    """A page would be that of an older jclt."""
    for cell in CELLS:
        ast.parse("".join(cell["source"]))
    outputs = [output for cell in CELLS for output in cell["outputs"]]
    assert NOTEBOOK.stat().st_size < 300_000 and len(CELLS) <= 10
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    assert {output["output_type"] for output in outputs} == {"execute_result", "display_data", "stream"}
    assert {output["name"] for output in outputs if output["output_type"] == "stream"} == {"stdout"}
    assert "iframe" not in NOTEBOOK.read_text() and CITY_SPLIT["South Creek"] != "train"


def run_cell(source: str, names: dict[str, Any]) -> Any:
    """Runs a cell and gives what Jupyter would show below it."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) and not source.endswith(";") else None
    exec(compile(tree, "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names) if isinstance(last, ast.Expr) else None


def strip(text: str | list[str]) -> str:
    """Without line breaks, which Jupyter sets otherwise, and decimal fractions, whose last digits vary."""
    return re.sub(r"\d\.\d+", "p", "".join("".join(text).split()))


@pytest.mark.exhaustive  # a minute; the example of the README goes the same road
def test_its_cells_give_what_the_file_holds(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for cell in CELLS:
            value = run_cell("".join(cell["source"]), names)
            printed = capsys.readouterr().out
            for output in cell["outputs"]:
                if output["output_type"] == "stream":
                    assert strip(printed) == strip(output["text"])
                elif output["output_type"] == "display_data":
                    assert names["plt"].get_fignums()
                else:
                    assert strip(repr(value)) == strip(output["data"]["text/plain"])
                if "text/html" in output.get("data", {}):
                    assert strip(value._repr_html_()) == strip(output["data"]["text/html"])
    names["plt"].close("all")
    assert list(tmp_path.iterdir()) == []  # it leaves no file behind
