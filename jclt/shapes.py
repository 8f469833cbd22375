"""The glossary: axis letters, and the words that mean the same thing in every file.

Axis letters of annotations, einsums and docstrings:

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
| N | node of a graph; in kernels, tokens of all rows one after another |
| E | active pair |

Words:

| word | meaning |
|---|---|
| coder | a sparse coder: cross-layer transcoder, per-layer transcoder or autoencoder |
| site | a named activation inside the model (`models/sites.py`), such as `mlp_in` |
| reads, writes | the site that a coder encodes, and the site that it reconstructs |
| edit | a change of activations at sites during a forward pass |
| active feature | a feature whose activation at a token is not zero |
| active pair | a (token, feature) pair that the sparse kernels work on: active, or with a gradient |
| capacity | the number of active pairs per token for which the sparse buffers have space |
| source node, target node | the nodes at the two ends of an edge: activity flows from source to target |
| error node | the part of a site's activation that the coder does not reconstruct, as one node |
| logical axis, mesh axis | what an axis of an array means, and an axis of the mesh of devices (`mesh.py`) |
| shard | the piece of an array on one device |
"""

from collections.abc import Mapping

from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int

Tokens = Int[Array, "B T"]
Stream = Float[Array, "B T D"]
Logits = Float[Array, "B T V"]
Mask = Bool[Array, "B T S"]
Params = Mapping[str, Array]
"""Weights by name."""
Captured = Mapping[str, Array]
"""Activations that a forward pass returns, by site."""
Layer = int | Int[Array, ""] | None
"""A layer's number: an `int` where layers are unrolled, traced where they are scanned, `None` outside the layers."""

__all__ = [
    "Array",
    "ArrayLike",
    "Bool",
    "Captured",
    "DTypeLike",
    "Float",
    "Int",
    "Layer",
    "Logits",
    "Mask",
    "Params",
    "Stream",
    "Tokens",
]
