"""The chips of pods, as their makers and the Scaling Book describe them, and how fast their links carry data."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jclt.errors import UserError, suggest_name


class Chip(NamedTuple):
    """Rates of one chip; sources: the Scaling Book's tables (link, hop, network), `jax.experimental.pallas.tpu`'s
    description of each chip (operations, bandwidth), and the limit that the compiler names when it refuses a program
    (memory)."""

    operations: float  # bfloat16 multiplications and additions a second
    clock: float  # cycles a second that the compiler's schedule is counted in: operations over what a cycle can do
    memory: float  # bytes of HBM that a program may use
    bandwidth: float  # bytes of HBM a second
    link: float  # bytes a second along one axis of the torus, both directions together
    ring: int  # an axis whose length is a multiple of this closes to a ring; others have half the bandwidth
    host_network: float = 2.5e10  # bytes a second between slices, of the chips of one host together


GIB = 2.0**30
HOP_SECONDS = 1e-6
"""Seconds that the first byte takes from chip to chip."""

CHIPS = {
    "v5e": Chip(1.97e14, 1.97e14 / 2**17, 15.75 * GIB, 8.2e11, 9e10, 16),
    "v5p": Chip(4.59e14, 4.59e14 / 2**18, 95.74 * GIB, 2.46e12, 1.8e11, 4),
    "v6e": Chip(9.2e14, 9.2e14 / 2**19, 31.25 * GIB, 1.64e12, 1.8e11, 16),
}


def find_chip(topology: str) -> Chip:
    """The chip of a topology such as v5e:16x16."""
    name = topology.partition(":")[0]
    if name not in CHIPS or ":" not in topology:
        raise UserError(f"topology '{topology}': expected CHIP:AxB or CHIP:AxBxC with CHIP {suggest_name(name, CHIPS)}")
    return CHIPS[name]


class Network(NamedTuple):
    """The positions of a mesh's devices in the torus, in the mesh's order, in which programs number them."""

    chip: Chip
    shape: tuple[int, ...]  # of one slice's torus
    coordinates: tuple[tuple[int, ...], ...]
    slices: tuple[int, ...]
    hosts: tuple[int, ...]

    def estimate_seconds(self, kind: str, size: int, group: Sequence[int], one_ring: bool = False) -> float:
        """The least time of a collective over this group: its bytes over the links that the group spans, and the hops.

        `size` is the bytes of the largest array that takes part on one chip. Links carry an all-gather or a
        reduce-scatter once, an all-reduce twice, and a quarter of an all-to-all (the Scaling Book). The compiler sends
        some collectives along `one_ring` through all chips of the group, at the rate of one axis.
        """
        if len(group) < 2:
            return 0.0
        passes = {"all-reduce": 2.0, "all-to-all": 0.25}.get(kind, 1.0)
        time, slices = 0.0, {self.slices[i] for i in group}
        within = [i for i in group if self.slices[i] == self.slices[group[0]]]
        spanned = [axis for axis in range(len(self.shape)) if len({self.coordinates[i][axis] for i in within}) > 1]
        if spanned:
            lengths = [len({self.coordinates[i][axis] for i in within}) for axis in spanned]
            rings = [
                length == self.shape[axis] and length % self.chip.ring == 0
                for axis, length in zip(spanned, lengths, strict=True)
            ]
            rate = sum(self.chip.link * (1.0 if ring else 0.5) for ring in rings)
            hops = sum(length / (2 if ring else 1) for length, ring in zip(lengths, rings, strict=True))
            if one_ring:
                rate, hops = min(rate, self.chip.link), len(within) / 2
            time += passes * (size * (1 - 1 / len(within)) / rate + hops * HOP_SECONDS)
        if len(slices) > 1:
            here = self.hosts[group[0]]
            rate = self.chip.host_network / sum(host == here for host in self.hosts)
            # Between slices each chip exchanges its share of what is summed within one.
            time += passes * size / len(within) * (1 - 1 / len(slices)) / rate
        return time


def make_network(topology: str, devices: Sequence[Any]) -> Network:
    """The network of the devices of a mesh, in the mesh's order."""
    shape = tuple(int(size) for size in topology.partition(":")[2].split("x"))
    return Network(
        find_chip(topology),
        shape,
        tuple(tuple(device.coords[: len(shape)]) for device in devices),
        tuple(getattr(device, "slice_index", None) or 0 for device in devices),
        tuple(device.process_index for device in devices),
    )


def count_chips(topology: str) -> int:
    return math.prod(int(size) for size in topology.partition(":")[2].split("x"))
