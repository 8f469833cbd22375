"""Sets of prompts on which graphs are measured."""

from pathlib import Path

import numpy as np

from jclt.attribution.many_prompts import read_prompts
from jclt.attribution.prompts import encode_prompt
from jclt.errors import UserError
from jclt.models import Model
from jclt.shapes import Int
from jclt.world import TASKS


def find_prompts(model: Model, name: str, count: int, seed: int = 0) -> list[Int[np.ndarray, "_"]]:
    """Token ids of each prompt. `world`: `count` held-out prompts of each task of the small world; else the first
    `count` of a file, as `jclt attribute --prompts` reads it."""
    if count < 1:
        raise UserError(f"count {count}: expected at least 1 prompt")
    if name == "world":
        if model.tokenizer is None:
            raise UserError(f"model {model.name}: has no tokenizer, expected a file of prompts with token ids")
        examples = [example for task in TASKS.values() for example in task.examples("report", count, seed)]
        return [encode_prompt(model, example.prompt) for example in examples]
    return [encode_prompt(model, line.prompt) for line in read_prompts(Path(name))[:count]]
