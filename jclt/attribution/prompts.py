"""Prompts as token ids, with the beginning that each set of conventions gives them. Many prompts, and their
outputs, as arrays of one shape."""

import logging
from typing import Any

import numpy as np

from jclt.attribution.options import Conventions, is_gemma_3_it
from jclt.attribution.sizes import round_up, round_up_length
from jclt.attribution.sweep.nodes import TargetNodes
from jclt.attribution.targets import Outputs
from jclt.errors import UserError
from jclt.models import Model, token_array
from jclt.models.model import Prompt
from jclt.shapes import Int

log = logging.getLogger(__name__)

GEMMA_3_IT = (2, 105, 2364, 107)
"""`<bos><start_of_turn>user` and a line break."""


def encode_prompt(model: Model, prompt: Prompt, conventions: Conventions = "jclt") -> Int[np.ndarray, "T"]:
    """The token ids of a prompt, text, chat or ids, under these conventions."""
    if isinstance(prompt, str) and not prompt:
        raise UserError("prompt: empty, expected at least one token")
    if isinstance(prompt, str) and (unknown := list_unknown_words(model, prompt)):
        log.warning("prompt: model %s has no token for %s", model.name, ", ".join(map(repr, unknown)))
    if conventions == "circuit-tracer":
        if isinstance(prompt, str) and model.tokenizer is not None:
            prompt = model.tokenizer.plain(prompt)
        tokens = add_special_token(model, token_array(model, prompt))
    else:
        tokens = token_array(model, prompt)
    if tokens.ndim != 1:
        raise UserError(f"prompt: {len(tokens)} rows of token ids, expected one; attribute_batch takes many prompts")
    return tokens


def add_special_token(model: Model, tokens: np.ndarray) -> np.ndarray:
    """Begins a prompt as circuit-tracer does: unless its first token is special already, with the token for the
    beginning of a text; where there is none with the one for padding, else with the one for the end."""
    if tokens.ndim != 1:
        return tokens
    if is_gemma_3_it(model):
        if tuple(tokens[:4].tolist()) != GEMMA_3_IT:
            raise UserError(
                f"prompt: begins with the tokens {tokens[:4].tolist()}, expected {list(GEMMA_3_IT)}: <bos>, "
                f"<start_of_turn>, user and a line break, as all prompts of model {model.name} do for circuit-tracer"
            )
        return tokens
    added = {} if model.tokenizer is None else model.tokenizer.backend.get_added_tokens_decoder()
    special = {number: token.content for number, token in added.items() if token.special}
    padding = [number for number, name in special.items() if "pad" in name.lower()]
    first = [x for x in (model.config.bos_token, *padding, *model.config.stop_tokens, *special) if x is not None]
    if not first or int(tokens[0]) in {*special, *first}:
        return tokens
    return token_array(model, [first[0], *tokens.tolist()])


def list_unknown_words(model: Model, text: str) -> list[str]:
    """The words of a text that the model's tokenizer has no token for, each once."""
    if model.tokenizer is None:
        return []
    backend = model.tokenizer.backend
    unknown = getattr(backend.model, "unk_token", None)
    number = None if unknown is None else backend.token_to_id(unknown)
    if number is None:
        return []
    encoding = backend.encode(text, add_special_tokens=False)
    spans = [span for token, span in zip(encoding.ids, encoding.offsets, strict=True) if token == number]
    return list(dict.fromkeys(text[start:stop].strip() for start, stop in spans))


def pad_prompts(
    prompts: list[np.ndarray], context: int, devices: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]:
    """Tokens of one length, for a number of prompts that the devices can share; and the prompts' own lengths."""
    length = min(round_up_length(max(map(len, prompts))), context)
    count = -(-round_up(len(prompts)) // devices) * devices
    tokens, lengths = np.zeros((count, length), np.int32), np.ones(count, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
    return tokens, lengths


def stack_outputs(outputs: list[Outputs], count: int, dtype: Any) -> TargetNodes:
    """All prompts' outputs in arrays of one shape, longer than any of them: the last entry has a vector of zeros."""
    most = round_up(max(len(prompt_outputs.tokens) for prompt_outputs in outputs) + 1, 16)
    width = outputs[0].vectors.shape[1]
    layers, positions = np.zeros((count, most), np.int64), np.zeros((count, most), np.int64)
    vectors = np.zeros((count, most, width), dtype)
    for row, prompt in enumerate(outputs):
        size = len(prompt.tokens)
        layers[row, :size], positions[row, :size], vectors[row, :size] = prompt.layers, prompt.positions, prompt.vectors
    return TargetNodes(layers, positions, vectors)  # type: ignore[arg-type]
