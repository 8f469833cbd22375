"""The list of a folder's graphs, from which published viewers choose."""

import logging
from pathlib import Path

from jclt.errors import UserError
from jclt.files import write_bytes
from jclt.graphs.export_json import encoded
from jclt.graphs.import_json import _read

log = logging.getLogger(__name__)


INDEX = "graph-metadata.json"


def write_index(folder: str | Path) -> None:
    """Writes `graph-metadata.json`, the list of the graphs in a folder that the published viewers choose from.

    They look for a graph in the file of its slug, so the index gives each the name of its file. Files that are no
    graphs are left out, with a warning where they are no JSON objects either.
    """
    folder, graphs = Path(folder), []
    for path in sorted(folder.glob("*.json")):
        if path.name == INDEX:
            continue
        try:
            content = _read(path)
        except UserError as error:
            log.warning("left out of %s: %s", INDEX, error)
            continue
        metadata = content.get("metadata")
        if isinstance(metadata, dict) and {"nodes", "links"} <= set(content):
            graphs.append(metadata | {"slug": path.stem})
    write_bytes(folder / INDEX, encoded({"graphs": graphs}, folder / INDEX))
