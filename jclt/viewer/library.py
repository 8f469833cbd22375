"""The graphs that the page can show: files, and graphs that were opened or computed since."""

import itertools
import tempfile
import threading
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

from jclt.errors import UserError
from jclt.features.labels import LONGEST_LABEL, parse_place
from jclt.files import check_file, read_json, write_json
from jclt.graphs import Graph, import_json, load_graph, read_circuit_tracer
from jclt.graphs.viewer_index import INDEX
from jclt.graphs.viewer_json import Json, is_list_of_groups
from jclt.viewer.page_limit import limit_edges

SUFFIXES_READ = (".npz", ".json", ".json.gz", ".pt")
"""Files of graphs. Of files that differ in this ending alone, a folder's graph is the first."""
VIEW_SUFFIX = ".view.json"
LOADED_AT_ONCE = 4


class Library:
    """Graphs by name. Its methods may be called from several threads."""

    def __init__(self, places: Sequence[str | Path]):
        self.paths = find_graph_files(places)
        self.added: dict[str, Graph] = {}  # have no file
        self.views: dict[str, Json] = {}  # of graphs without a file, and those whose file could not be written
        self.loaded: dict[str, Graph] = {}  # the latest last
        self.lock = threading.RLock()

    def list_graphs(self) -> list[Json]:
        """Name and, where an index beside the file has it, the prompt of each graph."""
        prompts: dict[Path, Mapping[str, str]] = {}
        for folder in {path.parent for path in self.paths.values()}:
            prompts[folder] = read_prompts(folder)
        with self.lock:
            added = [{"name": name, "prompt": "".join(graph.token_texts)} for name, graph in self.added.items()]
        return [
            *(
                {"name": name, "prompt": prompts[path.parent].get(name_graph(path))}
                for name, path in self.paths.items()
            ),
            *added,
        ]

    def read(self, name: str) -> Graph:
        """The graph as the page shows it: of a large one the strongest edges."""
        with self.lock:
            if name in self.added:
                return self.added[name]
            if name not in self.paths:
                raise UserError(f"graph '{name}': there is none of this name")
            graph = self.loaded.pop(name, None) or limit_edges(read_graph_file(self.paths[name]))
            self.loaded[name] = graph
            for oldest in list(self.loaded)[:-LOADED_AT_ONCE]:
                del self.loaded[oldest]
            return graph

    def add(self, name: str, graph: Graph) -> str:
        """Adds a graph without a file, and returns its name: a free one."""
        with self.lock:
            free = find_free(name, {*self.paths, *self.added})
            self.added[free] = limit_edges(graph)
            return free

    def read_view(self, name: str) -> Json:
        """What was pinned, grouped and labelled; saved beside the graph's file."""
        with self.lock:
            path = self._find_view_file(name)
            if path is None or name in self.views:
                return dict(self.views.get(name, {}))
            view = read_json(path) if path.exists() else {}
            check_view(view, path)
            return view

    def change_view(self, name: str, changes: Mapping[str, object]) -> Json:
        """Saves changes and returns the whole view. Labels are added to those that others have saved meanwhile. What
        cannot be written stays here, and is written with the next change."""
        check_view(changes, "view")
        with self.lock:
            view = self.read_view(name)
            labels = dict(view.get("labels", {})) | dict(changes.get("labels", {}))  # type: ignore[call-overload]
            view |= dict(changes) | {"labels": {key: text for key, text in labels.items() if text}}
            self.views[name] = view
            if path := self._find_view_file(name):
                try:
                    write_json(path, view)
                except UserError as error:
                    raise UserError(f"{error}; kept until the server ends") from None
                del self.views[name]
            return view

    def _find_view_file(self, name: str) -> Path | None:
        if name not in self.paths:
            self.read(name)  # an error if there is no such graph
            return None
        return self.paths[name].with_name(f"{name_graph(self.paths[name])}{VIEW_SUFFIX}")


def find_graph_files(places: Sequence[str | Path]) -> dict[str, Path]:
    """The graphs' files by name: files, and those that lie in folders."""
    found: dict[str, Path] = {}
    for place in map(Path, places):
        if place.is_dir():
            files = sorted(path for path in place.iterdir() if is_graph_file(path))
            files.sort(key=lambda path: (name_graph(path), [path.name.endswith(s) for s in SUFFIXES_READ][::-1]))
        else:
            check_file(place, "a graph's file, or a folder of them")
            files = [place]
        of_place: dict[str, Path] = {}
        for path in files:
            of_place.setdefault(name_graph(path), path)
        for name, path in of_place.items():
            found[find_free(name, found)] = path
    return found


def find_free(name: str, taken: Container[str]) -> str:
    """The name, with a number if it is taken."""
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(free for free in names if free not in taken)


def is_graph_file(path: Path) -> bool:
    named = path.name.endswith(SUFFIXES_READ) and not path.name.endswith(VIEW_SUFFIX) and path.name != INDEX
    return named and path.is_file()


def name_graph(path: Path) -> str:
    suffix = next((s for s in SUFFIXES_READ if path.name.endswith(s)), "")
    return path.name.removesuffix(suffix) or path.name


def read_graph_file(path: Path) -> Graph:
    """A graph of any format, told by the ending of the file's name."""
    if path.suffix == ".npz":
        return load_graph(path)
    return read_circuit_tracer(path) if path.suffix == ".pt" else import_json(path)


def read_graph_bytes(name: str, content: bytes) -> Graph:
    """A graph from the bytes of its file, of which the name tells the format."""
    if not name.endswith(SUFFIXES_READ):
        raise UserError(f"file '{name}': expected a graph, {', '.join(SUFFIXES_READ)}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"graph{next(s for s in SUFFIXES_READ if name.endswith(s))}"
        path.write_bytes(content)
        try:
            return read_graph_file(path)
        except UserError as error:
            raise UserError(str(error).replace(str(path), f"file '{name}'")) from None


def read_prompts(folder: Path) -> Mapping[str, str]:
    """The prompts that a folder's index has, by slug."""
    try:
        graphs = read_json(folder / INDEX).get("graphs")
    except UserError:
        return {}
    entries = [entry for entry in graphs if isinstance(entry, dict)] if isinstance(graphs, list) else []
    return {str(entry.get("slug")): str(entry.get("prompt") or "") for entry in entries}


def check_view(view: Mapping[str, object], where: object) -> None:
    """Raises an error unless the fields are those of a view."""
    expected = {
        "pinnedIds": lambda x: isinstance(x, list) and all(isinstance(text, str) for text in x),
        "supernodes": is_list_of_groups,
        "places": lambda x: isinstance(x, dict) and all(is_place(place) for place in x.values()),
        "labels": lambda x: (
            isinstance(x, dict) and all(isinstance(text, str) and len(text) <= LONGEST_LABEL for text in x.values())
        ),
    }
    for name, value in view.items():
        if name not in expected or not expected[name](value):
            raise UserError(f"{where}: field '{name}' is unknown or damaged, expected one of: {', '.join(expected)}")
    labels = view.get("labels", {})
    for key in labels if isinstance(labels, dict) else ():
        parse_place(key, where)


def is_place(place: object) -> bool:
    return isinstance(place, list) and len(place) == 2 and all(type(x) in (int, float) and 0 <= x <= 1 for x in place)
