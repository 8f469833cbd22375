"""A run's token rows, which stay the same however often it is resumed."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jclt.data.load_tokens import is_token_folder, load_tokens, read_text_rows
from jclt.data.token_rows import PackedRows, TokenRows, load_rows, save_rows
from jclt.errors import UserError
from jclt.files import read_json, write_json
from jclt.hosts import run_on_every_host
from jclt.models import Tokenizer
from jclt.training.config import LmConfig, TrainConfig
from jclt.training.run_folder import Place, is_begun, write_settings
from jclt.world.corpus import make_corpus


def find_rows(
    place: Place,
    config: LmConfig | TrainConfig,
    vocabulary: int,
    tokenizer: Tokenizer | None,
    end: Sequence[int],
    make_world: Callable[[], tuple[np.ndarray, np.ndarray]],
) -> TokenRows:
    """The run's token rows: the rows of a folder of tokens, or rows that are made once and kept in the run's folder.

    `make_world` generates the rows of the small world. If several hosts share the run's folder, the first one makes the
    rows and the others read them; otherwise each host makes them. A resumed run must have the rows that it began
    with.
    """
    folder = place.folder
    files, description = folder / "data", folder / "data.json"

    def check_rows(rows: TokenRows) -> TokenRows:
        saved_description, new_description = read_json(description) if description.exists() else {}, describe_rows(rows)
        if any(saved_description.get(name, value) != value for name, value in new_description.items()):
            remedy = (
                "" if is_token_folder(config.data) else f"; where {files} is damaged, remove it to have it made again"
            )
            raise UserError(
                f"data '{config.data}': other tokens than those that the run in {folder} began with{remedy}"
            )
        if place.holds_folder:
            write_settings(folder, config)
            if saved_description != new_description:
                write_json(description, new_description)
        return rows

    def load_folder() -> TokenRows:
        if place.holds_folder:
            is_begun(folder, config, place.find_newest_step)
        return check_rows(load_tokens(config.data, config.length, vocabulary, tokenizer))

    def make_rows() -> None:
        if is_begun(folder, config, place.find_newest_step) and (files / "tokens.npy").exists():
            return
        if config.data == "world":
            rows = make_world()
        elif tokenizer is None:
            raise UserError(f"data '{config.data}': text, expected tokens (`jclt tokenize`): there is no tokenizer")
        else:
            rows = read_text_rows(Path(config.data), tokenizer, config.length, end)
        write_settings(folder, config)
        save_rows(files, *rows)

    if is_token_folder(config.data):
        return run_on_every_host(load_folder)
    run_on_every_host(lambda: make_rows() if place.holds_folder else None)
    return run_on_every_host(lambda: check_rows(load_rows(files)))


def describe_rows(rows: TokenRows) -> dict[str, Any]:
    """A description that tells these rows from others."""
    description: dict[str, Any] = {"digest": rows.digest, "rows": len(rows)}
    if not isinstance(rows.tokens, PackedRows):  # in packed rows all tokens have the same weight
        description["weights"] = hashlib.sha256(rows.weights.tobytes()).hexdigest()
    return description


def read_row_count(folder: Path) -> int | None:
    """The number of rows that the run in the folder began with, whatever number of steps it has been given since."""
    path = folder / "data.json"
    rows = read_json(path).get("rows") if path.exists() else None
    return rows if isinstance(rows, int) else None


def generate_world_rows(
    tokenizer: Tokenizer, count: int, length: int, seed: int, **weights: float
) -> tuple[np.ndarray, np.ndarray]:
    """Token rows of the small world and the weight of each token, as they are kept in the run's folder."""
    batch = make_corpus(count, length, seed, tokenizer.backend.get_vocab(), **weights)
    return batch.tokens.astype(np.uint16), batch.weights.astype(np.float16)
