"""A graph's page in a notebook's cell that gives back to Python what is done on it. Needs anywidget."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from jclt.errors import UserError, first_line
from jclt.graphs import Graph, slug_of
from jclt.graphs.export_nodes import make_node_ids
from jclt.graphs.names import check_node, list_labels
from jclt.graphs.paths import with_supernodes
from jclt.graphs.viewer_json import Json
from jclt.interventions import Intervention
from jclt.viewer.library import Library, check_view
from jclt.viewer.page_data import is_pruned, read_first_view
from jclt.viewer.page_files import build_single_page
from jclt.viewer.page_interventions import describe_result
from jclt.viewer.page_service import LoadModel, Page, add_view

log = logging.getLogger(__name__)

THRESHOLDS, ALL = [0.8, 0.98], [1.0, 1.0]
"""At which the page begins, for whole graphs and for pruned ones."""
VIEW = ("_graph_name", "pinned", "supernodes", "labels", "places")
"""What is kept for each graph, when the page shows another."""


class GraphWidget(anywidget.AnyWidget):
    """The page of a graph. What is pinned, grouped, labelled and chosen on it is here at once; what is set here the
    page shows at once. Nodes are the numbers that they have in the graph."""

    _esm = (Path(__file__).parent / "notebook_cell.js").read_text()
    _page = traitlets.Unicode().tag(sync=True)
    _height = traitlets.Int().tag(sync=True)
    _graph_name = traitlets.Unicode().tag(sync=True)
    pinned = traitlets.List(traitlets.CInt()).tag(sync=True)
    supernodes = traitlets.Dict(value_trait=traitlets.List(traitlets.CInt())).tag(sync=True)
    labels = traitlets.Dict(value_trait=traitlets.Unicode(), help="edited ones, by `layer/number`").tag(sync=True)
    places = traitlets.Dict(help="to which items of the subgraph were moved").tag(sync=True)
    thresholds = traitlets.List(traitlets.CFloat(), help="of nodes and edges, for `graph.prune`").tag(sync=True)
    selected = traitlets.List(traitlets.CInt(), help="the clicked node, or a supernode's members").tag(sync=True)

    def __init__(
        self, graph: Graph, *, load_model: LoadModel | None = None, features: Path | None = None, height: int = 760
    ):
        self.result: Intervention | None = None  # of the last intervention on the page
        self.service = Page(Library([]), load_model, features, find_labels=lambda _: list_labels(graph))
        name = self.service.library.add(slug_of(graph), graph)
        graph = self.service.library.read(name)
        numbers = number_ids(graph)
        super().__init__(
            _page=build_single_page(graph, name, labels=self.service.read_labels(graph), has_kernel=True),
            _height=height,
            _graph_name=name,
            pinned=[numbers[node_id] for node_id in read_first_view(graph, list(numbers))["pinnedIds"]],
            supernodes={title: list(members) for title, members in graph.supernodes.items()},
            thresholds=ALL if is_pruned(graph) else THRESHOLDS,
        )
        self.on_msg(self._receive)

    def __repr__(self) -> str:
        return "<page of a graph; notebooks show it>"

    @property
    def graph_name(self) -> str:
        """Of the graph that the page shows: another one after a prompt was traced on it."""
        return self._graph_name

    @property
    def graph(self) -> Graph:
        """The shown graph, with what was pinned, grouped and labelled."""
        whole = self.service.library.read(self._graph_name)
        return add_view(whole, self._make_view(whole), self.service.read_labels(whole))

    def _make_view(self, graph: Graph) -> Json:
        ids = make_node_ids(graph)
        return {
            "pinnedIds": [ids[node] for node in self.pinned],
            "supernodes": [[name, *(ids[node] for node in nodes)] for name, nodes in self.supernodes.items()],
            "labels": dict(self.labels),
            "places": dict(self.places),
        }

    @traitlets.observe(*VIEW)
    def _keep_view(self, change: Mapping[str, Any]) -> None:
        library = self.service.library
        view = self._make_view(library.read(self._graph_name))
        given_up = dict.fromkeys(library.read_view(self._graph_name).get("labels", {}), "")
        library.change_view(self._graph_name, view | {"labels": given_up | view["labels"]})

    @traitlets.observe("supernodes")
    def _pin_members(self, change: Mapping[str, Any]) -> None:
        members = [node for nodes in self.supernodes.values() for node in nodes]
        if not set(members) <= set(self.pinned):
            self.pinned = [*self.pinned, *members]

    @traitlets.validate("pinned", "selected")
    def _check_nodes(self, proposal: Mapping[str, Any]) -> list[int]:
        graph = self.service.library.read(self._graph_name)
        for node in proposal["value"]:
            check_node(graph, node, f"{proposal['trait'].name}: ")
        return list(dict.fromkeys(proposal["value"]))

    @traitlets.validate("supernodes")
    def _check_supernodes(self, proposal: Mapping[str, Any]) -> dict[str, list[int]]:
        graph = with_supernodes(self.service.library.read(self._graph_name), proposal["value"])
        return {name: list(nodes) for name, nodes in graph.supernodes.items() if nodes}

    @traitlets.validate("labels", "places")
    def _check_fields(self, proposal: Mapping[str, Any]) -> dict[str, Any]:
        check_view({proposal["trait"].name: proposal["value"]}, "the page of a graph")
        return proposal["value"]

    @traitlets.validate("thresholds")
    def _check_thresholds(self, proposal: Mapping[str, Any]) -> list[float]:
        shares = proposal["value"]
        if len(shares) != 2 or not all(0 <= share <= 1 for share in shares):
            raise UserError(f"thresholds: {shares}, expected two numbers from 0 to 1, for nodes and edges")
        return shares

    def _receive(self, _: object, message: Json, buffers: Sequence[bytes]) -> None:
        """Answers a question of the page."""
        answers = {
            "list": self.service.list_graphs,
            "graph": self.service.show,
            "intervene": self._intervene,
            "attribute": self.service.attribute,
            "feature": self.service.describe,
            "json": self.service.export,
            "page": self.service.build_file,
        }
        try:
            content = {"answer": answers[message["name"]](*message["values"])}
        except UserError as error:
            content = {"error": str(error)}
        except Exception as error:
            log.warning("%s: %s", message.get("name"), first_line(error))
            content = {"error": f"failed: {first_line(error)}"}
        self.send({"view": message.get("view"), "number": message.get("number"), **content})

    def _intervene(self, name: str, request: Json) -> Json:
        self.result = self.service.run_intervention(name, request)
        return describe_result(self.result)


def number_ids(graph: Graph) -> dict[str, int]:
    return {node_id: node for node, node_id in enumerate(make_node_ids(graph))}
