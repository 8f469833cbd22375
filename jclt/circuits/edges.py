"""The edges of a model: from each part that writes to the residual stream to each part that reads it afterwards.

Senders are the input (all embeddings), every head and every MLP. Receivers are the queries of every head, the keys and
the values of every key-value head, every MLP, and the logits. Each receiver reads the sum of the senders before it, and
of biases, which are no senders. Arrays of edges are `[s, r]`, senders by receivers, both in the order of a pass.

Names are those of EAP-IG and MIB: `input`, `a0.h1`, `m0` and `logits`; `a1.h0<q>` are the queries of a head, and of a
model with grouped heads `a1.h0<k>` the keys of a key-value head.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jclt.errors import UserError, suggest_name
from jclt.models import ModelConfig
from jclt.shapes import Array, Bool, Float, Int

READS = ("queries", "keys", "values", "mlp_in")
"""What a layer's receivers read, in their order. The logits come last."""
LETTERS = {"queries": "q", "keys": "k", "values": "v"}


def list_senders(config: ModelConfig) -> tuple[str, ...]:
    names = ["input"]
    for layer in range(config.layers):
        names += [*(f"a{layer}.h{head}" for head in range(config.heads)), f"m{layer}"]
    return tuple(names)


def list_receivers(config: ModelConfig) -> tuple[str, ...]:
    counts = count_readers(config)
    names: list[str] = []
    for layer in range(config.layers):
        names += [f"a{layer}.h{head}<{letter}>" for read, letter in LETTERS.items() for head in range(counts[read])]
        names.append(f"m{layer}")
    return (*names, "logits")


def count_readers(config: ModelConfig) -> dict[str, int]:
    """The number of each layer's receivers of each kind."""
    return {"queries": config.heads, "keys": config.key_heads, "values": config.key_heads, "mlp_in": 1}


def find_sender_layers(config: ModelConfig) -> Int[np.ndarray, "s"]:
    """The layer of each sender, -1 for the input."""
    return np.concatenate([[-1], np.repeat(np.arange(config.layers), config.heads + 1)])


def find_receiver_layers(config: ModelConfig) -> Int[np.ndarray, "r"]:
    """The layer of each receiver; the number of layers for the logits."""
    return np.append(np.repeat(np.arange(config.layers), sum(count_readers(config).values())), config.layers)


def find_groups(config: ModelConfig) -> Int[np.ndarray, "s"]:
    """The group that each sender moves with: the input, the heads of one layer, or one MLP; numbered in their order."""
    of_layer = np.repeat([1, 2], [config.heads, 1])
    return np.concatenate([[0], (2 * np.arange(config.layers)[:, None] + of_layer).ravel()])


def count_groups(config: ModelConfig) -> int:
    return 2 * config.layers + 1


def list_edges(config: ModelConfig) -> Bool[np.ndarray, "s r"]:
    """Which senders come before which receivers."""
    senders = find_sender_layers(config)
    is_mlp = np.array([name.startswith("m") for name in list_senders(config)])
    columns: list[np.ndarray] = []
    for layer in range(config.layers):
        before = senders < layer
        columns += [before] * sum(list(count_readers(config).values())[:-1])
        columns.append(before if config.parallel else before | ((senders == layer) & ~is_mlp))
    return np.stack([*columns, np.ones(len(senders), bool)], axis=1)


def find_readers(config: ModelConfig) -> Bool[np.ndarray, "s r"]:
    """Through which receivers each sender reads: a head through its queries, and its group's keys and values."""
    group = config.heads // config.key_heads
    senders = {name: number for number, name in enumerate(list_senders(config))}
    reads = np.zeros((len(senders), len(list_receivers(config))), bool)
    for number, name in enumerate(list_receivers(config)[:-1]):
        part, _, letter = name.rstrip(">").partition("<")
        if letter in ("", "q"):
            reads[senders[part], number] = True
        else:
            layer, head = part.removeprefix("a").split(".h")
            reads[[senders[f"a{layer}.h{int(head) * group + i}"] for i in range(group)], number] = True
    return reads


def prune_edges(config: ModelConfig, kept: Bool[np.ndarray, "s r"]) -> Bool[np.ndarray, "s r"]:
    """The edges that are left when edges of parts without kept inputs, or without kept outputs, are removed again and
    again. The input needs no inputs, and the logits no outputs."""
    reads, kept = find_readers(config), kept & list_edges(config)
    while True:
        has_inputs = (reads & kept.any(axis=0)).any(axis=1) | (np.arange(len(kept)) == 0)
        connected = kept.any(axis=1) & has_inputs
        receivers = (reads & connected[:, None]).any(axis=0) | (np.arange(kept.shape[1]) == kept.shape[1] - 1)
        left = kept & connected[:, None] & receivers
        if (left == kept).all():
            return kept
        kept = left


def take_best(config: ModelConfig, scores: Float[np.ndarray, "s r"], count: int) -> Bool[np.ndarray, "s r"]:
    """The edges with the largest scores in size, of equal ones the first; sets of several counts are nested."""
    edges = list_edges(config)
    check_count(edges, count)
    kept = np.zeros_like(edges)
    order = np.argsort(-np.abs(scores[edges]), kind="stable")
    kept[tuple(axis[order[:count]] for axis in np.nonzero(edges))] = True
    return kept


def take_best_connected(config: ModelConfig, scores: Float[np.ndarray, "s r"], count: int) -> Bool[np.ndarray, "s r"]:
    """From the logits down, again and again the best edge into a part that the circuit already has."""
    edges, reads = list_edges(config), find_readers(config)
    check_count(edges, count)
    size, kept = np.where(edges, np.abs(scores), -1.0), np.zeros_like(edges)
    within = np.zeros(edges.shape[1], bool)
    within[-1] = True
    for _ in range(count):
        best = int(np.argmax(np.where(within & ~kept, size, -1.0)))
        sender, receiver = divmod(best, edges.shape[1])
        if not within[receiver] or kept[sender, receiver] or not edges[sender, receiver]:
            break  # nothing is left that leads to the logits
        kept[sender, receiver] = True
        within |= reads[sender]
    return kept


def check_count(edges: Bool[np.ndarray, "s r"], count: int) -> None:
    if not 0 <= count <= edges.sum():
        raise UserError(f"circuit of {count} edges: expected 0 to {edges.sum()}, all edges of the model")


def name_edges(config: ModelConfig, kept: Bool[np.ndarray, "s r"]) -> tuple[str, ...]:
    """`input->a0.h1<q>` for each edge that is kept."""
    senders, receivers = list_senders(config), list_receivers(config)
    return tuple(f"{senders[s]}->{receivers[r]}" for s, r in np.argwhere(kept).tolist())


def find_edges(config: ModelConfig, names: Iterable[str]) -> Bool[np.ndarray, "s r"]:
    """The edges with these names."""
    edges = list_edges(config)
    numbers = {name: tuple(place) for name, place in zip(name_edges(config, edges), np.argwhere(edges), strict=True)}
    kept = np.zeros_like(edges)
    for name in names:
        if name not in numbers:
            raise UserError(f"edge '{name}': does not exist in this model; {suggest_name(name, numbers)}")
        kept[numbers[name]] = True
    return kept


class ByReceiver(NamedTuple):
    """What there is for every receiver, as a pass needs it."""

    layers: dict[str, Array]  # by what they read, `[L, ..., receivers of this kind]`
    logits: Array


def split_receivers(config: ModelConfig, columns: Float[Array, "s r"]) -> ByReceiver:
    counts = count_readers(config)
    by_layer = columns[:, :-1].reshape(len(columns), config.layers, sum(counts.values())).swapaxes(0, 1)
    ends = np.cumsum(list(counts.values()))
    parts = {read: by_layer[:, :, end - counts[read] : end] for read, end in zip(READS, ends, strict=True)}
    return ByReceiver(parts, columns[:, -1])


def join_receivers(parts: ByReceiver) -> Float[Array, "B s r"]:
    """From parts `[L, B, s, receivers of this kind]` and `[B, s]`."""
    by_layer = jnp.concatenate([parts.layers[read] for read in READS], axis=-1)
    layers, batch, senders, receivers = by_layer.shape
    columns = by_layer.transpose(1, 2, 0, 3).reshape(batch, senders, layers * receivers)
    return jnp.concatenate([columns, parts.logits[..., None]], axis=-1)
