"""Runs the model on the batches of a block, and lists where the features of each layer fire."""

from collections.abc import Collection, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jclt.coders import Coder, CoderConfig, StreamedCoder
from jclt.errors import UserError
from jclt.features.events import (
    FIRST_SLOTS,
    NONE,
    Events,
    Listing,
    fetch_events,
    find_thresholds,
    join_events,
    move,
    start_listing,
)
from jclt.features.rows import Block
from jclt.mesh import find_place, use_mesh
from jclt.models import Model, read_sites
from jclt.shapes import Array, Bool, Float, Int

BATCH_TOKENS = {"cpu": 2048}
OTHER_BATCH_TOKENS = 16384
"""Tokens that go through the model at once."""
READ_BYTES = 1 << 31
"""The most bytes of layer inputs that are kept while the layers of a coder that lies elsewhere are read, one by one."""
DENSE_SHARE = 0.01
"""The share of tokens at which a feature of a dense coder counts as firing."""
THRESHOLD_TOKENS = 4096
"""Tokens on which thresholds are measured, where features are to fire at a share of the tokens."""


def choose_share(config: CoderConfig, share: float | None) -> float | None:
    """The share of tokens at which a feature fires, those with its highest activations; None where it fires above 0."""
    if share is not None and not 0 < share <= 1:
        raise UserError(f"share {share}: expected above 0, up to 1")
    return DENSE_SHARE if share is None and config.dense else share


class BlockLister:
    """A model and a coder, and for each covered layer the thresholds and the slots that its events take."""

    def __init__(self, model: Model, coder: Coder, length: int, rows: int):
        layers = len(coder.config.covered)
        self.model, self.coder = model, coder
        self.encoders = None if isinstance(coder, StreamedCoder) else [coder.load_encoder(i) for i in range(layers)]
        mesh = find_place(self.encoders)[0] if self.encoders else None
        if mesh is not None and mesh.is_multi_process:
            raise UserError("coder: split over devices of several hosts, expected those of one")
        devices = 1 if model.mesh is None else model.mesh.size
        batch = max(1, BATCH_TOKENS.get(jax.default_backend(), OTHER_BATCH_TOKENS) // length)
        self.rows = -(-min(batch, rows) // devices) * devices
        kept = max(1, READ_BYTES // (4 * layers * self.rows * length * model.config.width))
        self.batches_at_once = 1 if self.encoders else kept
        self.thresholds = [jnp.zeros(coder.config.features, jnp.float32)] * layers
        self.slots = [FIRST_SLOTS] * layers

    def load(self, layer: int) -> Coder:
        return self.encoders[layer] if self.encoders else self.coder.load_encoder(layer)

    def read(self, tokens: Int[np.ndarray, "B T"]) -> Sequence[Float[Array, "B T D"]]:
        """What the coder reads in each of its layers."""
        return read_sites(self.model, tokens, self.coder.config.reads, self.coder.config.covered)

    def cut_batches(self, block: Block) -> Iterator[tuple[np.ndarray, Bool[np.ndarray, "B T"]]]:
        """Tokens of one shape, and where they count."""
        for start in range(0, len(block.rows), self.rows):
            rows = slice(start, start + self.rows)
            more = ((0, self.rows - len(block.rows[rows])), (0, 0))
            yield np.pad(block.tokens[rows], more), np.pad(block.valid[rows], more)

    def list_events(self, block: Block, wanted: Collection[int] | None = None) -> tuple[Block, list[Events]]:
        """The events of each layer; of those that are not wanted none. The device works on the next batches while those
        of the last ones are fetched."""
        found: list[list[Events]] = [[] for _ in self.slots]
        waiting: list[tuple[int, Listing]] = []
        batches = list(self.cut_batches(block))
        for start in range(0, len(batches), self.batches_at_once):
            some = batches[start : start + self.batches_at_once]
            reads, started = [self.read(tokens) for tokens, _ in some], []
            for layer in range(len(self.slots)) if wanted is None else sorted(wanted):
                encoder = self.load(layer)
                for x, (_, valid) in zip(reads, some, strict=True):
                    listing = start_listing(encoder, x[layer], valid, self.thresholds[layer], self.slots[layer])
                    if jax.default_backend() == "cpu":  # programs that run at once take the cache from each other
                        jax.block_until_ready(listing.result)
                    started.append((layer, listing))
                if not self.encoders:  # its weights are not kept longer than needed
                    self._fetch(started, found)
                    started = []
            self._fetch(waiting, found)
            waiting = started
        self._fetch(waiting, found)
        return block, [
            join_events(batches, self.rows * block.tokens.shape[1]) if batches else NONE for batches in found
        ]

    def _fetch(self, listings: Sequence[tuple[int, Listing]], found: list[list[Events]]) -> None:
        for layer, listing in listings:
            events, self.slots[layer] = fetch_events(listing)
            found[layer].append(events)

    def measure_thresholds(self, block: Block, share: float | None) -> list[Float[np.ndarray, "F"]]:
        """The activations that features must exceed to fire: 0, or what this share of the first tokens exceeds."""
        if share is None:
            return [np.asarray(x) for x in self.thresholds]
        count = max(1, THRESHOLD_TOKENS // (self.rows * block.tokens.shape[1]))
        batches = list(self.cut_batches(block))[:count]
        reads = [self.read(tokens) for tokens, _ in batches]
        valid = jnp.asarray(np.concatenate([valid for _, valid in batches]))
        thresholds = list[np.ndarray]()
        for layer, parts in enumerate(zip(*reads, strict=True)):
            encoder = self.load(layer)
            mesh, place = find_place(encoder)
            with use_mesh(mesh):
                x = jnp.concatenate([move(part, place) for part in parts])
                thresholds.append(np.asarray(find_thresholds(encoder, x, valid, jnp.float32(share))))
        return thresholds
