"""A run's token rows: those it began with, and kept in its folder where they were made for it."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jclt.data.load_tokens import holds_tokens, load_tokens, text_rows
from jclt.data.token_rows import PackedRows, TokenRows, load_rows, save_rows
from jclt.errors import UserError
from jclt.files import read_json, write_json
from jclt.hosts import together
from jclt.models import Tokenizer
from jclt.training.config import LmConfig, TrainConfig
from jclt.training.run_folder import _begin, is_begun
from jclt.world.corpus import corpus


def find_rows(
    folder: Path,
    config: LmConfig | TrainConfig,
    vocabulary: int,
    tokenizer: Tokenizer | None,
    end: Sequence[int],
    world: Callable[[], tuple[np.ndarray, np.ndarray]],
    *,
    shared: bool = True,
    reached: Callable[[], int] = lambda: 0,
) -> TokenRows:
    """The run's token rows: those it began with, those of a folder of tokens, or rows made now and kept in its folder.

    `world` generates the small world's. Of several hosts that see a shared folder the first makes them and the others
    read; else each makes its own. All that they read is what the run began with.
    """
    makes, kept, seen = not shared or jax.process_index() == 0, folder / "data", folder / "data.json"

    def begin(rows: TokenRows) -> TokenRows:
        known, found = read_json(seen) if seen.exists() else {}, described(rows)
        if any(known.get(name, value) != value for name, value in found.items()):
            damaged = "" if holds_tokens(config.data) else f"; where {kept} is damaged, remove it to have it made again"
            raise UserError(
                f"data '{config.data}': other tokens than those that the run in {folder} began with{damaged}"
            )
        if makes:
            _begin(folder, config)
            if known != found:
                write_json(seen, found)
        return rows

    def take() -> TokenRows:
        if makes:
            is_begun(folder, config, reached)
        return begin(load_tokens(config.data, config.length, vocabulary, tokenizer))

    def make() -> None:
        if is_begun(folder, config, reached) and (kept / "tokens.npy").exists():
            return
        if config.data == "world":
            made = world()
        elif tokenizer is None:
            raise UserError(f"data '{config.data}': text, expected tokens (`jclt tokenize`): there is no tokenizer")
        else:
            made = text_rows(Path(config.data), tokenizer, config.length, end)
        _begin(folder, config)
        save_rows(kept, *made)

    if holds_tokens(config.data):
        return together(take)
    together(lambda: make() if makes else None)
    return together(lambda: begin(load_rows(kept)))


def described(rows: TokenRows) -> dict[str, Any]:
    """What tells these rows from others."""
    found: dict[str, Any] = {"digest": rows.digest, "rows": len(rows)}
    if not isinstance(rows.tokens, PackedRows):  # whose tokens count alike
        found["weights"] = hashlib.sha256(rows.weights.tobytes()).hexdigest()
    return found


def rows_begun_with(folder: Path) -> int | None:
    """How many rows the run in the folder has, whatever number of steps it has been given since."""
    path = folder / "data.json"
    found = read_json(path).get("rows") if path.exists() else None
    return found if isinstance(found, int) else None


def world_rows(
    tokenizer: Tokenizer, count: int, length: int, seed: int, **weights: float
) -> tuple[np.ndarray, np.ndarray]:
    """Token rows of the small world and what each token counts, as they are kept."""
    made = corpus(count, length, seed, tokenizer.backend.get_vocab(), **weights)
    return made.tokens.astype(np.uint16), made.weights.astype(np.float16)
