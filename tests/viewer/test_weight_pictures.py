"""Pictures of weights and of grids of operands: what they name and count."""

import numpy as np
import pytest

from jclt.errors import UserError
from jclt.evaluation import GlobalWeights, OperandGrids
from jclt.viewer import draw_global_weights, draw_operand_grids


def make_grids(count):
    a, b = np.indices((6, 6))
    grids = np.stack([(a + b == 5) * 1.0, a % 2 * 2.0, a + b + 1.0])[:count]
    return OperandGrids(np.array([[0, 3], [1, 4], [1, 5]])[:count], grids, ("diagonal", "bar", "mostly active")[:count])


def make_weights(virtual):
    layers = np.arange(len(virtual)) // 2
    features = np.stack([layers, np.arange(len(virtual))], axis=1)
    return GlobalWeights(features, virtual, 0 * virtual, virtual, (virtual > 0) * 0.5, 100)


def test_each_shape_has_a_line_and_each_feature_its_name(tmp_path):
    draw_operand_grids(make_grids(3), tmp_path / "grids.svg", title="a + b, 'as $written'")
    text = (tmp_path / "grids.svg").read_text()
    for name in ("diagonal (1): 0/3", "bar (1): 1/4", "mostly active (1): 1/5", "a + b, 'as $written'"):
        assert f"<!-- {name} -->" in text
    with pytest.raises(UserError, match="cannot draw 'doc'"):
        draw_operand_grids(make_grids(1), tmp_path / "grids.doc")


def test_layers_are_named_and_pairs_counted(tmp_path):
    virtual = np.zeros((6, 6))
    virtual[4:, :2] = 0.5
    draw_global_weights(make_weights(virtual), tmp_path / "weights.svg")
    text = (tmp_path / "weights.svg").read_text()
    assert text.count("<!-- layer 2 -->") == 4
    assert "<!-- active together (33%) -->" in text  # 4 of 12 pairs
