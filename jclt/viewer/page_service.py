"""What the page asks for: graphs, interventions and new graphs, views, and files to download."""

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jclt.errors import UserError
from jclt.features.labels import parse_place
from jclt.graphs import Graph, export_json, slug_of
from jclt.graphs.export_nodes import make_node_ids
from jclt.graphs.names import LabelTexts, label_nodes, list_labels
from jclt.graphs.viewer_json import Json, name_groups
from jclt.viewer.feature_panels import (
    are_others,
    coder_of,
    describe_by_weights,
    read_densities,
    read_description,
    read_labels,
)
from jclt.viewer.library import Library, read_graph_bytes
from jclt.viewer.page_data import build_page_data
from jclt.viewer.page_files import build_single_page

if TYPE_CHECKING:
    from jclt.coders import Coder
    from jclt.interventions import Intervention
    from jclt.models import Model

LoadModel = Callable[[], "tuple[Model, Coder]"]
FindLabels = Callable[["Coder"], LabelTexts]


@dataclass
class Page:
    """What the server shows, and the model that it runs, if there is one."""

    library: Library
    load_model: LoadModel | None = None
    features: Path | None = None  # folder with labels and descriptions
    find_labels: FindLabels | None = None  # of the coder's features, for new graphs
    has_tour: bool = False  # whether the first look at the demo is offered
    running: threading.Lock = field(default_factory=threading.Lock)

    @cached_property
    def model_and_coder(self) -> "tuple[Model, Coder]":
        if self.load_model is None:
            raise UserError("there is no model here; `jclt serve --model NAME` gives one")
        return self.load_model()

    @cached_property
    def coder_labels(self) -> LabelTexts:
        return self.find_labels(self.model_and_coder[1]) if self.find_labels else {}

    def read_labels(self, graph: Graph) -> LabelTexts:
        return read_labels(self.features, coder_of(graph))

    def show(self, name: str) -> Json:
        graph = self.library.read(name)
        labels, densities = self.read_labels(graph), read_densities(self.features, graph)
        return build_page_data(graph, name, labels=labels, densities=densities, view=self.library.read_view(name))

    def add(self, name: str, graph: Graph) -> Json:
        return self.show(self.library.add(name, graph))

    def attribute(self, request: Mapping[str, Any]) -> Json:
        """A graph of a new prompt."""
        from jclt.attribution import attribute

        prompt = request.get("prompt")
        if not isinstance(prompt, str) or not prompt:
            raise UserError("prompt: empty, expected at least one token")
        with self.running:
            model, coder = self.model_and_coder
            graph = label_nodes(attribute(model, coder, prompt), self.coder_labels)
        return self.add(slug_of(graph), graph)

    def intervene(self, name: str, request: Mapping[str, Any]) -> Json:
        from jclt.viewer.page_interventions import describe_result

        return describe_result(self.run_intervention(name, request))

    def run_intervention(self, name: str, request: Mapping[str, Any]) -> "Intervention":
        from jclt.viewer.page_interventions import change_nodes, find_changed_nodes

        graph = self.library.read(name)
        members = find_changed_nodes(graph, request)
        with self.running:
            return change_nodes(*self.model_and_coder, graph, members, request)

    def generate_graph(self, request: Mapping[str, Any]) -> Json:
        """This and the next two are requests of a published graph server (`graph_server.py`)."""
        from jclt.viewer import graph_server

        graph_server.check_graph_request(request)
        with self.running:
            return graph_server.generate_graph(*self.model_and_coder, self.coder_labels, request)

    def find_likeliest(self, request: Mapping[str, Any]) -> Json:
        from jclt.viewer import graph_server

        graph_server.check_forward_request(request)
        with self.running:
            return graph_server.find_likeliest(self.model_and_coder[0], request)

    def steer(self, request: Mapping[str, Any]) -> Json:
        from jclt.viewer import graph_server

        graph_server.check_steering_request(request)
        with self.running:
            return graph_server.steer_prompt(*self.model_and_coder, request)

    def export(self, name: str, node_threshold: float, edge_threshold: float) -> str:
        """The JSON of published viewers, with pinned nodes, supernodes and labels."""
        graph = self.library.read(name)
        graph = add_view(graph, self.library.read_view(name), self.read_labels(graph))
        if (node_threshold, edge_threshold) != (1, 1):
            graph = graph.prune(node_threshold, edge_threshold)
        return json.dumps(export_json(graph, slug=name), separators=(",", ":"))

    def list_graphs(self) -> Json:
        has_model = self.load_model is not None
        return {"graphs": self.library.list_graphs(), "model": has_model, "tour": self.has_tour}

    def upload(self, name: str, content: bytes) -> Json:
        graph = read_graph_bytes(name, content)
        return self.add(slug_of(graph), graph)

    def describe(self, name: str, layer: int, feature: int) -> Json | None:
        """Examples and effects of a feature; the effects alone if there is a model, but no description."""
        coder = coder_of(self.library.read(name))
        found = read_description(self.features, layer, feature, coder)
        return self.describe_by_weights(coder, layer, feature) if found is None and self.load_model else found

    def describe_by_weights(self, made_by: str | None, layer: int, feature: int) -> Json | None:
        """Nothing if the graph was made by another coder."""
        from jclt.coders import read_fingerprint

        with self.running:
            model, coder = self.model_and_coder
            is_others = are_others(read_fingerprint(coder), made_by)
            found = None if is_others else describe_by_weights(model, coder, layer, feature)
        return found and found | {"checked": made_by is not None}

    def build_file(self, name: str) -> str:
        """The page with this graph as one file."""
        graph, view = self.library.read(name), self.library.read_view(name)
        return build_single_page(graph, name, labels=self.read_labels(graph), view=view)


def add_view(graph: Graph, view: Mapping[str, Any], labels: LabelTexts) -> Graph:
    """The graph with what was pinned, grouped and labelled on the page; `labels` are those of its other features."""
    numbers = {node_id: node for node, node_id in enumerate(make_node_ids(graph))}
    annotations = dict(graph.annotations)
    if "pinnedIds" in view:
        annotations["qParams"] = annotations.get("qParams", {}) | {"pinnedIds": view["pinnedIds"]}
    if "supernodes" in view:
        graph = replace(graph, supernodes=name_groups(view["supernodes"], numbers))
    given = {parse_place(key, "view"): text for key, text in view.get("labels", {}).items()}
    return label_nodes(replace(graph, annotations=annotations), {**list_labels(graph), **labels, **given})
