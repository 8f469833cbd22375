"""The loops of the programs that trace a prompt run as often as is counted for a plan."""

from collections import Counter

import jax
import numpy as np
import pytest
from golden_cases import golden_model
from random_coders import random_coder

from jclt.attribution import attribute, calls, sizes
from jclt.attribution.options import Options
from jclt.attribution.sweep import columns, edges
from jclt.attribution.targets import MOST_LOGITS
from jclt.coders import CoderConfig
from jclt.pods.attribution_program import describe_setup, list_gathering
from jclt.pods.typical_prompt import count_push_trips, count_trips, list_rounds, make_prompt

ACTIVE, LENGTH = 8, 11


@pytest.mark.exhaustive  # slow: every loop that is counted tells the host; a plain run tests what a prompt consists of
@pytest.mark.parametrize(("family", "kind", "cut", "first"), [("gemma3", "clt", 3, 1), ("gpt2", "transcoder", 0, 0)])
def test_loops_run_as_often_as_is_counted(family, kind, cut, first, monkeypatch):
    """With as many active features at each place as a top-k coder has."""
    model = golden_model(family)
    config = CoderConfig(kind, 16, activation="topk", k=ACTIVE, first_position=first).fit_to_model(
        model.config, "random"
    )
    coder = jax.tree_util.tree_map_with_path(
        lambda path, x: x + 100 if path[-1].name == "encoder_bias" else x, random_coder(config, np.float32)
    )  # so that no pre-activation is negative
    monkeypatch.setitem(sizes.LARGEST_BLOCK, "cpu", 32)
    monkeypatch.setattr(calls, "choose_cut", lambda *_: cut)
    batches, ran = [], watch_loops(monkeypatch)

    def keep(batch, original=calls.push_columns):
        batches.append(original(batch))
        return batches[-1]

    monkeypatch.setattr("jclt.attribution.schedule.push_columns", keep)
    forget_loops()
    graph = attribute(model, coder, np.arange(LENGTH), targets=list(range(MOST_LOGITS)))
    jax.effects_barrier()
    forget_loops()  # those that count

    setup = describe_setup(config, model.config, jax.devices()[0])
    prompt = make_prompt(setup, LENGTH, float(ACTIVE * len(config.covered)), "cpu")
    _, batch = list_gathering(setup, prompt)
    (traced,) = batches
    assert batch.layout == traced.layout and batch.stops == traced.stops and batch.start == traced.start
    (rows,), positions = batch.rows, graph.features[:, 1]
    assert len(graph.features) == rows.limit and positions.tolist() == rows.features[:, 1].tolist()
    arranged = calls.arrange_columns(batch, "cpu")
    assert (arranged is not None) == bool(cut)
    if arranged is not None:
        push = count_push_trips(batch, arranged[0])
        assert +push.later == ran["push"] != Counter()
        assert push.firsts == ran["first push"].total() > 0 and push.layers == ran["writes"].total()
    trips = count_trips(batch, prompt.tiles, arranged and arranged[0], "cpu")
    assert +sum((x.later for x in trips), Counter()) == ran["pull"] != Counter()
    assert sum(x.firsts for x in trips) == ran["first pull"].total() > 0
    needed, skipped = sum(x.needed for x in trips), sum(x.skipped for x in trips)
    assert needed == ran["tiles"][True] > 0 and skipped >= ran["tiles"][False]
    groups = batch.layout.tiles // batch.layout.tiles_at_once
    assert needed + skipped == ran["shares"].total() * groups


def forget_loops() -> None:
    for program in (edges.trace_blocks, columns.push_sources):
        program.clear_cache()


def watch_loops(monkeypatch) -> dict[str, Counter[int]]:
    """How often each body runs, by the number of positions; and how many groups of tiles are needed, and are not."""
    ran = {name: Counter[int]() for name in ("pull", "first pull", "shares", "push", "first push", "writes", "tiles")}

    def count(module, function, name, stop_argument=None):
        original = getattr(module, function)

        def counting(sweep, *arguments):
            stop = np.int32(0) if stop_argument is None else arguments[stop_argument]
            jax.debug.callback(lambda stop: ran[name].update([sweep.stops[int(stop)]]), stop)
            return original(sweep, *arguments)

        monkeypatch.setattr(module, function, counting)

    def count_tiles(sweep, step, index, *arrays, original=edges.add_features):
        sources, layout = sweep.prompts.sources, sweep.layout
        place = step.prompt, (index if layout.groups > 1 else 0)

        def count_groups(layer, stop_index, layers, positions):
            for group in range(0, layout.tiles, layout.tiles_at_once):
                some = range(group, group + layout.tiles_at_once)
                stop = sweep.stops[int(stop_index)] + sweep.start
                ran["tiles"][any(layers[tile] <= layer and positions[tile] < stop for tile in some)] += 1

        tiles = sources.tile_layers[place], sources.tile_positions[place]
        jax.debug.callback(count_groups, step.layer, step.stop_index, *tiles)
        return original(sweep, step, index, *arrays)

    count(edges, "pull_back", "pull", 1)
    count(edges, "pull_first", "first pull")
    count(edges, "add_shares", "shares")
    count(columns, "push_forward", "push", 1)
    count(columns, "push_first", "first push")
    count(columns, "take_writes", "writes")
    monkeypatch.setattr(edges, "add_features", count_tiles)
    return ran


def test_rounds_trace_as_many_features_as_may_be_and_are_spread_evenly():
    model = golden_model("gpt2").config
    config = CoderConfig("clt", 16).fit_to_model(model, "random")
    setup = describe_setup(config, model, jax.devices()[0])._replace(options=Options(max_features=100))
    prompt = make_prompt(setup, LENGTH, float(ACTIVE * len(config.covered)), "tpu")
    _, batch = list_gathering(setup, prompt)
    (rows,) = batch.rows
    outputs, *rounds = list_rounds(rows)
    assert sum(map(len, rounds)) == 100 and max(map(len, rounds)) <= rows.round_size
    chosen = np.concatenate(rounds)
    assert len(set(chosen)) == 100 and prompt.counts.sum() == len(rows.features) == ACTIVE * 3 * LENGTH
    layers = Counter(rows.features[chosen, 0].tolist())
    assert max(layers.values()) - min(layers.values()) <= 1 and len(outputs) == MOST_LOGITS
    assert (prompt.counts[0, :, LENGTH:] == 0).all() and (prompt.counts[0, :, :LENGTH] == ACTIVE).all()
