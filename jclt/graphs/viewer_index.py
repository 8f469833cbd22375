"""The index of a folder's graphs, which published viewers offer to their users."""

import logging
from pathlib import Path

from jclt.errors import UserError
from jclt.files import write_bytes
from jclt.graphs.viewer_json import encode_json, read_viewer_file

log = logging.getLogger(__name__)

INDEX = "graph-metadata.json"


def write_index(folder: str | Path) -> None:
    """Writes `graph-metadata.json`, the list of all graphs in a folder.

    Viewers open the graph with slug NAME from the file NAME.json, so each graph's slug in the index is the name of its
    file. Files that are no graphs are left out; files that are no JSON objects also cause a warning.
    """
    folder, graphs = Path(folder), []
    for path in sorted(folder.glob("*.json")):
        if path.name == INDEX:
            continue
        try:
            content = read_viewer_file(path)
        except UserError as error:
            log.warning("left out of %s: %s", INDEX, error)
            continue
        metadata = content.get("metadata")
        if isinstance(metadata, dict) and {"nodes", "links"} <= set(content):
            graphs.append(metadata | {"slug": path.stem})
    write_bytes(folder / INDEX, encode_json({"graphs": graphs}, folder / INDEX))
