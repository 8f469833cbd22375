"""A prompt whose active features are spread evenly over layers and positions: how it is arranged in blocks, and how
often the loops of the programs that trace it run. The functions that arrange it are those that arrange real prompts."""

from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jclt.attribution.calls import Batch, Setup, arrange_targets
from jclt.attribution.embeddings import EmbeddingEdges
from jclt.attribution.prompts import pad_prompts
from jclt.attribution.ranking import PromptRows
from jclt.attribution.schedule import make_rows
from jclt.attribution.sizes import choose_blocks_per_call, choose_layout, round_up
from jclt.attribution.sweep.bases import FeatureNodes
from jclt.attribution.sweep.blocks import Block
from jclt.attribution.sweep.columns import SourceBlocks
from jclt.attribution.sweep.tiles import Layout, TilePlan, plan_tiles
from jclt.attribution.targets import MOST_LOGITS, Outputs
from jclt.kernels.take_rows import NO_ROW
from jclt.shapes import Int


class Prompt(NamedTuple):
    tokens: Int[np.ndarray, "T"]  # without those that pad it
    counts: Int[np.ndarray, "1 C T"]  # active features
    features: FeatureNodes  # vectors as shapes
    outputs: Outputs
    layout: Layout
    tiles: TilePlan
    start: int  # the first position with features


class PushTrips(NamedTuple):
    """How often loops run that carry sources up to the cut."""

    later: Counter[int]  # blocks through one layer after their first one, by the number of positions
    firsts: int  # blocks through their first layer
    layers: int  # that blocks pass, where what their sources write is added


class Trips(NamedTuple):
    """How often loops run that carry targets down, in blocks of one size."""

    size: int
    blocks_per_call: int
    later: Counter[int]  # blocks through one layer after their first one, by the number of positions
    firsts: int  # blocks through their first layer
    needed: int  # groups of tiles that blocks are multiplied with
    skipped: int  # groups of tiles at the same layers that no target needs
    meetings: int  # positions at which a block of targets meets a block of sources


def make_prompt(setup: Setup, length: int, active: float, backend: str) -> Prompt:
    """With `active` features a token, over all layers."""
    config, model = setup.coder.config, setup.model.config
    tokens, layers, start = np.zeros(length, int), len(config.covered), min(config.first_position, length - 1)
    (_, padded), _ = (x.shape for x in pad_prompts([tokens], model.context, 1))
    ends = np.linspace(0, active * (length - start), layers * (length - start) + 1).round().astype(int)
    counts = np.zeros((1, layers, padded), int)
    counts[0, :, start:length] = np.diff(ends).reshape(layers, -1)
    most = int(counts.sum(axis=2).max())
    layout = choose_layout(config, counts, round_up(most, 16), backend)
    outputs = Outputs(
        tokens=np.arange(MOST_LOGITS),
        names=tuple(map(str, range(MOST_LOGITS))),
        layers=np.full(MOST_LOGITS, model.layers),
        positions=np.full(MOST_LOGITS, length - 1),
        vectors=np.zeros((MOST_LOGITS, model.width), np.float32),
        probabilities=np.full(MOST_LOGITS, 1 / MOST_LOGITS),
        weights=np.full(MOST_LOGITS, 1 / MOST_LOGITS),
    )
    features = list_features(counts, layout, model.width)
    return Prompt(tokens, counts, features, outputs, layout, plan_tiles(counts, layout), start)


def list_features(counts: Int[np.ndarray, "1 C T"], layout: Layout, width: int) -> FeatureNodes:
    """The padded lists of as many features."""
    sizes = 1, len(layout.layers), layout.list_length
    valid = np.arange(layout.list_length) < counts.sum(axis=2)[..., None]
    positions = np.zeros(sizes, np.int32)
    positions[valid] = np.repeat(np.indices(counts.shape)[2].ravel(), counts.ravel())
    encoders = jax.ShapeDtypeStruct((*sizes, width), np.float32)
    activations = np.zeros(sizes, np.float32)
    return FeatureNodes(valid, positions, np.zeros_like(positions), activations, encoders, activations)  # type: ignore[arg-type]


def draw_features(prompt: Prompt, features: int, prompts: int) -> Int[np.ndarray, "P n"]:
    """Random features for each of so many prompts: as many as the layer with the most active features has."""
    most = int(prompt.counts.sum(axis=2).max())
    lists = np.full((prompts, prompt.layout.list_length), NO_ROW)
    lists[:, :most] = np.random.default_rng(0).integers(0, features, (prompts, most))
    return lists


def list_rows(setup: Setup, prompt: Prompt, embedding_edges: EmbeddingEdges) -> PromptRows:
    """What the host keeps of the prompt. Edges are given as shapes."""
    slots = jnp.zeros(prompt.features.positions.shape, int)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), embedding_edges)
    prompts = [prompt.tokens], [{}], [prompt.outputs]
    (rows,) = make_rows(setup, prompt.layout, *prompts, prompt.features, slots, zeros)  # type: ignore[arg-type]
    return rows


def list_rounds(rows: PromptRows) -> list[Int[np.ndarray, "_"]]:
    """The targets of each round. Where not all features are traced, those of a round are spread evenly, too."""
    rounds = [rows.choose_first()]
    if not rows.is_traced.all():
        chosen = np.linspace(0, len(rows.features) - 1, rows.limit).astype(int)
        count = -(-rows.limit // rows.round_size)
        rounds += [chosen[number::count] for number in range(count)]
    return rounds


def count_push_trips(batch: Batch, sources: SourceBlocks) -> PushTrips:
    used = int(sources.used[0])
    passed = batch.rows[0].cut - np.asarray(sources.layers)[0, :used].min(axis=1)
    later = Counter[int]()
    for index, layers in zip(np.asarray(sources.stop_indices)[0, :used], passed, strict=True):
        later[batch.stops[index]] += max(
            int(layers) - 2, 0
        )  # sources write in the first one, and are carried from there
    return PushTrips(later, int(np.count_nonzero(passed > 1)), int(passed.sum()))


def count_trips(batch: Batch, tiles: TilePlan, sources: SourceBlocks | None, backend: str) -> list[Trips]:
    """For each size of blocks that the prompt's rounds have."""
    rows, by_size = batch.rows[0], dict[int, list[list[Block]]]()
    for targets in list_rounds(rows):
        size, (blocks,) = arrange_targets(batch, [targets], backend)
        by_size.setdefault(size, []).append(blocks)
    result = []
    for size, rounds in by_size.items():
        later, groups, meetings, firsts = Counter[int](), Counter[bool](), 0, 0
        for block in (block for of_round in rounds for block in of_round):
            top, stop = batch.find_top(block), batch.stops[block.stop_index]
            later[stop] += top - max(rows.cut, 1)
            firsts += top < batch.setup.model.config.layers  # what the unembedding reads begins after the last layer
            groups += count_tile_groups(batch, tiles, top, stop)
            meetings += 0 if sources is None else count_meetings(batch, sources, stop)
        per_call = choose_blocks_per_call(backend, max(map(len, rounds)), batch.target_bytes, size)
        result.append(Trips(size, per_call, later, firsts, groups[True], groups[False], meetings))
    return result


def count_tile_groups(batch: Batch, tiles: TilePlan, top: int, stop: int) -> Counter[bool]:
    """The groups of tiles with and without a product with a block's gradients, over the layers that it passes."""
    layout, counts = batch.layout, Counter[bool]()
    for layer in range(batch.rows[0].cut, top):
        some = 0
        if layer in layout.layers:
            group = layout.layers.index(layer) if layout.groups > 1 else 0
            needed = (tiles.layers[0, group] <= layer) & (tiles.positions[0, group] - batch.start < stop)
            some = int(needed.reshape(-1, layout.tiles_at_once).any(axis=1).sum())
        counts += Counter({True: some, False: layout.tiles // layout.tiles_at_once - some})
    return counts


def count_meetings(batch: Batch, sources: SourceBlocks, stop: int) -> int:
    """Positions that a block with targets before `stop` and the blocks of sources both reach."""
    reached = np.array(batch.stops)[np.asarray(sources.stop_indices)[0, : int(sources.used[0])]]
    return int(np.maximum(stop - (batch.stops[-1] - reached), 0).sum())
