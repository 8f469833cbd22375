"""All measures of a coder, on data that the user chooses; `jclt eval` prints them."""

from pathlib import Path
from typing import Any

import numpy as np

from jclt.coders import Coder
from jclt.data.batches import choose_batch_rows
from jclt.data.load_tokens import is_token_folder, load_shards, tokenize_file
from jclt.data.token_rows import count_reserved, cut_reserved_rows
from jclt.errors import UserError
from jclt.evaluation import (
    check_replaceable,
    evaluate_reconstruction,
    evaluate_replacement,
    exchange_states,
    measure_world_agreement,
)
from jclt.models import Model
from jclt.world.corpus import make_corpus


def evaluate(
    model: Model, coder: Coder, data: str = "world", rows: int = 128, length: int = 64, seed: int = 1, tasks: int = 200
) -> tuple[str, dict[str, Any]]:
    """Tables to print, and their figures by name. On the small world also how often the answers to its tasks stay."""
    for name, value, least in (("rows", rows, 1), ("length", length, 2), ("seed", seed, 0), ("tasks", tasks, 1)):
        if value < least:
            raise UserError(f"{name} {value}: expected at least {least}")
    if length > model.config.context:
        raise UserError(f"length {length}: expected at most {model.config.context}, the model's context")
    check_replaceable(coder.config)
    tokens = find_evaluation_rows(model, data, rows, length, seed)
    parts: dict[str, Any] = {
        "reconstruction": evaluate_reconstruction(model, coder, tokens),
        "replacement": evaluate_replacement(model, coder, tokens),
    }
    if data == "world":
        parts["tasks"] = measure_world_agreement(model, coder, tasks)
    measured = parts["reconstruction"].tokens
    text = "\n\n".join(f"{name}, {measured} tokens\n{part.table()}" for name, part in parts.items())
    figures = {name: part.summary() for name, part in parts.items()}
    if data == "world" and coder.config.kind in ("clt", "transcoder"):
        # All layers but the last, after which nothing is left to look a state's capital up.
        exchange = exchange_states(model, coder, layers=tuple(range(max(1, len(coder.config.covered) - 1))))
        figures["exchange"] = exchange.summary()
        text += f"\n\nexchange of one state's features for another's: {exchange.moved:.1%} of the answers follow"
        text += f", {exchange.control:.1%} with as many others"
    return text, figures


def find_evaluation_rows(model: Model, data: str, rows: int, length: int, seed: int) -> np.ndarray:
    """Token rows, drawn by a seed, that no coder was trained on, whatever its settings: of the small world such as
    training draws by no seed, of a folder of tokens or a text those at its end that training leaves out (see
    `reserved`). There may be fewer than are asked for."""
    if data == "world":
        if model.tokenizer is None:
            raise UserError(f"model {model.name}: has no tokenizer, expected another --data than the small world")
        return make_corpus(rows, length, f"evaluate {seed}", model.tokenizer.backend.get_vocab()).tokens
    if is_token_folder(data):
        shards, _ = load_shards(data, model.config.vocabulary, model.tokenizer)
    elif model.tokenizer is None:
        raise UserError(f"model {model.name}: has no tokenizer, expected --data made by `jclt tokenize`")
    else:
        shards = [tokenize_file(Path(data), model.tokenizer, model.config.stop_tokens[:1])]
    token_rows = cut_reserved_rows(shards, length)
    if not len(token_rows):
        total = sum(map(len, shards))
        left = f"training leaves out the last {count_reserved(total)} of {total} tokens"
        raise UserError(f"data '{data}': {left}, expected {length} of them together (one row)")
    return token_rows[choose_batch_rows(len(token_rows), seed, 0, min(rows, len(token_rows)))]
