"""The page's own files, and a graph with the whole page in one file."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jclt.files import write_text
from jclt.graphs.export_json import slug_of
from jclt.graphs.graph import Graph
from jclt.graphs.names import LabelTexts
from jclt.viewer.page_data import build_page_data
from jclt.viewer.page_limit import limit_edges

FOLDER = Path(__file__).parent / "page"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
MAIN = "main.js"


@cache
def read_page_files() -> dict[str, tuple[bytes, str]]:
    """Content and type of each file, by name."""
    return {path.name: (path.read_bytes(), TYPES[path.suffix]) for path in FOLDER.iterdir() if path.suffix in TYPES}


def export_html(
    graph: Graph, path: str | Path, *, labels: LabelTexts | None = None, view: Mapping[str, Any] | None = None
) -> None:
    """Writes the graph's page as one file, which needs no server and no network."""
    write_text(Path(path), build_single_page(graph, slug_of(graph), labels=labels, view=view))


def build_single_page(
    graph: Graph,
    name: str,
    *,
    labels: LabelTexts | None = None,
    view: Mapping[str, Any] | None = None,
    has_kernel: bool = False,
) -> str:
    """With `has_kernel` the page waits for a port through which Python answers (`page/kernel.js`)."""
    script, style = join_modules(), read_page_files()["style.css"][0].decode()
    # Nothing in the data can end the element that holds it.
    data = json.dumps(build_page_data(limit_edges(graph), name, labels=labels, view=view)).replace("<", "\\u003c")
    policy = (
        f"default-src 'none'; script-src '{hash_source(script)}'; style-src '{hash_source(style)}'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>jclt</title>\n'
        f'<link rel="icon" href="data:,">\n<style>{style}</style>\n</head>\n<body>\n'
        f'<script type="application/json" id="graph-data"{" data-kernel" if has_kernel else ""}>{data}</script>\n'
        f'<script type="module">{script}</script>\n'
        "</body>\n</html>\n"
    )


@cache
def join_modules() -> str:
    """All modules as one: each after those that it imports, each with its own names."""
    done: dict[str, str] = {}

    def add(name: str) -> None:
        if name in done:
            return
        text = read_page_files()[name][0].decode()
        for other in re.findall(r"^import .* from '\./(.*)';$", text, re.MULTILINE):
            add(other)
        done[name] = wrap_module(text, name)

    add(MAIN)
    return "\n".join(done.values())


def wrap_module(text: str, name: str) -> str:
    """The module as a function that returns what it exports."""
    exported = re.findall(r"^export (?:async )?(?:function|const|class) (\w+)", text, re.MULTILINE)
    imports = re.sub(r"^import \{(.*)\} from '\./(.*)\.js';$", r"const {\1} = \2_module;", text, flags=re.MULTILINE)
    body = re.sub(r"^export ", "", imports, flags=re.MULTILINE)
    return f"const {Path(name).stem}_module = (() => {{\n{body}\nreturn {{ {', '.join(exported)} }};\n}})();"


def hash_source(text: str) -> str:
    """How a content security policy names a script or style."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
