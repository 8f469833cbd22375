"""No name in the picture of a graph covers a mark."""

from typing import Any

import numpy as np
from graph_lists import random_graph
from matplotlib.backends.backend_agg import FigureCanvasAgg

from jclt.viewer import picture


def test_names_keep_clear_of_all_marks(tmp_path, monkeypatch):
    figures: list[Any] = []
    monkeypatch.setattr(picture, "save_figure", lambda figure, *_: figures.append(figure))
    graph = random_graph(1, features=40, layers=3, tokens=4, rest=0.3, vectors=True)
    assert graph.counts["head"] and graph.counts["stream"]
    picture.write_picture(graph, tmp_path / "graph.png")
    axes, renderer = figures[0].axes[0], FigureCanvasAgg(figures[0]).get_renderer()
    names = [text for text in axes.texts if text.get_fontsize() == 6.5]
    assert len(names) > 10
    places = np.concatenate([marks.get_offsets() for marks in axes.collections if marks.get_zorder() == 4])
    x, y = axes.transData.transform(places).T
    assert len(places) == len(graph)
    for name in names:
        box = name.get_window_extent(renderer)
        # One pixel less: the boxes of names are estimated by the number of letters.
        covered = (x > box.x0 + 1) & (x < box.x1 - 1) & (y > box.y0 + 1) & (y < box.y1 - 1)
        assert not covered.any(), name.get_text()
