"""The glossary of axis letters, the same in every annotation, einsum and docstring.

| letter | axis |
|---|---|
| B | batch (prompts) |
| T | position of the token that attends, or just position |
| S | position of the token attended to |
| L | layer |
| D | model width (residual stream) |
| H | attention head |
| G | key-value head (G = H unless heads are grouped) |
| K | head width |
| M | MLP neuron |
| V | vocabulary |
| F | feature of a sparse coder |
| N | node of a graph |
"""

from collections.abc import Mapping

from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int

Tokens = Int[Array, "B T"]
Stream = Float[Array, "B T D"]
Logits = Float[Array, "B T V"]
Mask = Bool[Array, "B T S"]
Params = Mapping[str, Array]
Seen = Mapping[str, Array]
Layer = int | Int[Array, ""] | None
"""A layer's number: an `int` where layers are unrolled, traced where they are scanned, `None` outside the layers."""

__all__ = [
    "Array",
    "ArrayLike",
    "Bool",
    "DTypeLike",
    "Float",
    "Int",
    "Layer",
    "Logits",
    "Mask",
    "Params",
    "Seen",
    "Stream",
    "Tokens",
]
