"""Where tiles lie: those that write to a layer are the first ones, and no others are kept for it."""

import numpy as np
import pytest

from jclt.attribution.sizes import choose_layout
from jclt.attribution.sweep.tiles import plan_tiles
from jclt.coders import CoderConfig


def draw_counts(prompts, layers, positions):
    """Active features: many at the first position, none at the second one and in one layer."""
    counts = np.random.default_rng(0).poisson(9, (prompts, layers, positions))
    counts[:, :, 0] *= 7
    counts[:, :, 1] = counts[:, 2] = 0
    return counts


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize(("kind", "groups"), [("clt", 1), ("transcoder", 6)])
def test_the_tiles_that_write_to_a_layer_come_first(kind, groups, backend):
    counts, layers = draw_counts(3, 6, 40), (1, 2, 3, 5, 6, 8)
    layout = choose_layout(CoderConfig(kind=kind, layers=layers), counts, 512, backend)
    assert layout.groups == groups
    plan, at_once = plan_tiles(counts, layout), layout.tiles_at_once
    for prompt, counts_of_prompt in enumerate(counts):
        end = 0
        for index, layer in enumerate(layers):
            group = 0 if layout.groups == 1 else index
            written = np.flatnonzero(plan.layers[prompt, group] <= layer)
            np.testing.assert_array_equal(written, np.arange(len(written)))  # the first ones
            features = counts_of_prompt[: index + 1].sum(axis=0) if groups == 1 else counts_of_prompt[index]
            tiles = -(-features // layout.tile_size)
            found = np.bincount(plan.positions[prompt, group][written], minlength=len(features))
            np.testing.assert_array_equal(found, tiles)
            for position, count in enumerate(tiles):
                numbers = plan.numbers[prompt, group, position, :count]
                assert (plan.positions[prompt, group, numbers] == position).all()
                assert (np.diff(plan.layers[prompt, group, numbers]) >= 0).all()
            assert plan.starts[prompt, index] == end
            end += -(-len(written) // at_once) * at_once
        assert end <= layout.kept_tiles


@pytest.mark.parametrize(("features", "share"), [(20, 0.7), (200, 0.6)])
def test_little_more_than_half_is_kept_of_what_all_layers_would_take(features, share):
    config = CoderConfig(kind="clt", layers=tuple(range(12)))
    layout = choose_layout(config, np.full((1, 12, 24), features), 8192, "cpu")
    assert layout.kept_tiles <= share * len(layout.layers) * layout.tiles
