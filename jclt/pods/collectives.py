"""The collectives of a compiled program, and the bytes of its arrays, read from its text (HLO)."""

import math
import re
from typing import NamedTuple

COLLECTIVE_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
COLLECTIVE_LINE = re.compile(
    rf"^\s*(?:ROOT )?%\S+ = (?P<result>.+?) (?P<kind>{COLLECTIVE_KINDS})(?:-start)?\((?P<attributes>.*)$", re.MULTILINE
)
ARRAY_PATTERN = re.compile(r"([a-z]+\d*)\[([\d,]*)\](?:\{([^{}]*)\})?")
TYPE_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}


class Collective(NamedTuple):
    """A collective: the arrays that each device gets from it, and where in the traced program it comes from."""

    kind: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]  # type and shape
    source: str
    groups: str  # the devices that take part, in the compiler's notation
    one_ring: bool  # whether it is sent along one ring through all devices, whatever axes of the torus they span

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [shape for _, shape in self.arrays]

    @property
    def largest(self) -> int:
        """The number of elements of its largest array."""
        return max(map(math.prod, self.shapes))

    @property
    def size(self) -> int:
        """The bytes of all its arrays together."""
        return sum(math.prod(shape) * TYPE_BYTES.get(dtype, 4) for dtype, shape in self.arrays)

    def has_axis(self, size: int) -> bool:
        return any(size in shape for shape in self.shapes)

    def list_group(self) -> list[int]:
        """The devices of its first group."""
        return parse_first_group(self.groups)

    def __str__(self) -> str:
        arrays = " ".join(f"{dtype}{list(shape)}" for dtype, shape in self.arrays)
        return f"{self.kind} {arrays} from {self.source}"


def find_collectives(text: str) -> list[Collective]:
    """All collectives of a program, each once. One that runs beside other work is in the text once for each piece."""
    by_channel = {}
    for number, line in enumerate(COLLECTIVE_LINE.finditer(text)):
        channel = re.search(r"channel_id=(\d+)", line["attributes"])
        by_channel.setdefault(channel[1] if channel else -number, parse_collective(line))
    return list(by_channel.values())


def parse_collective(line: re.Match[str]) -> Collective:
    arrays = ARRAY_PATTERN.findall(re.sub(r"/\*.*?\*/", "", line["result"]))
    sized = tuple((dtype, tuple(map(int, sizes.split(",") if sizes else ()))) for dtype, sizes, _ in arrays)
    source = re.search(r'op_name="([^"]*)"', line["attributes"])
    groups = re.search(r"(?:replica_groups|source_target_pairs)=(.*?)(?:, [a-z_]+=|$)", line["attributes"])
    one_ring = '"emitter":"1D' in line["attributes"]
    return Collective(line["kind"], sized, source[1] if source else "", groups[1] if groups else "", one_ring)


def parse_first_group(groups: str) -> list[int]:
    """The devices of the first group, from any of the notations that the compiler uses."""
    if named := re.match(r"mesh\[(.*?)\] *\{(.*?)\}", groups):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        grouped_axes, members, stride = re.findall(r"'(\w+)'", named[2]), [0], 1
        for name, size in reversed(sizes.items()):
            if name in grouped_axes:
                members = [start + stride * i for i in range(size) for start in members]
            stride *= size
        return sorted(members)
    if listed := re.match(r"\{\{([\d,]*)\}", groups):
        return [int(member) for member in listed[1].split(",") if member]
    if tiled := re.match(r"\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", groups):
        shape = [int(size) for size in tiled[3].split(",")]
        order = [int(axis) for axis in tiled[4].split(",")] if tiled[4] else list(range(len(shape)))
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        members = [0]
        for axis in order:
            members = [start + strides[axis] * i for start in members for i in range(shape[axis])]
        return members[: int(tiled[2])]
    return []


def count_array_bytes(result: str) -> int:
    """The bytes of all arrays of a result, in any memory."""
    return sum(_count_bytes(dtype, sizes) for dtype, sizes, _ in ARRAY_PATTERN.findall(result))


def count_hbm_bytes(result: str) -> int:
    """The bytes of a result's arrays in HBM. The layout of an array elsewhere names its memory: S(1) for VMEM."""
    return sum(
        _count_bytes(dtype, sizes)
        for dtype, sizes, layout in ARRAY_PATTERN.findall(result)
        if not re.search(r"S\(\d", layout)
    )


def _count_bytes(dtype: str, sizes: str) -> int:
    return math.prod(map(int, sizes.split(","))) * TYPE_BYTES.get(dtype, 4) if sizes else TYPE_BYTES.get(dtype, 4)
