"""A compiled program, read from its text: what it runs in which order, what it sends, and what travels beside work.

The TPU compiler writes its schedule out: instructions stand in the order in which they run, most with the cycles that
it expects of them. It expects none of collectives; those are timed by the links (`chips.Network`). A collective that
runs beside other work is written as a start, pieces inside the products that it runs beside, and an end.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

SENDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
COLLECTIVE = re.compile(
    rf"^\s*(?:ROOT )?%\S+ = (?P<result>.+?) (?P<kind>{SENDS})(?:-start)?\((?P<rest>.*)$", re.MULTILINE
)
ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\](?:\{([^{}]*)\})?")
ARRAYS = re.compile(r"[a-z]+\d*\[[\d,]*\](?:\{[^{}]*\})?")
HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
OPERATION = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}

UNMOVED = ("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "custom-call")

STAGES = (
    *("harvest", "shuffle", "reshard", "choose", "encode", "decode"),
    *("auxiliary", "end_to_end", "spread", "reduce", "update"),
)
"""The named scopes that the time of a step is told by."""


class Collective(NamedTuple):
    """One collective: the arrays that it gives each device, and where in the traced program it comes from."""

    kind: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]  # type and shape
    source: str
    groups: str  # as the compiler writes which devices take part
    one_ring: bool  # sent along one ring through all of them, whatever axes they span

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [shape for _, shape in self.arrays]

    @property
    def largest(self) -> int:
        """Elements of its largest array."""
        return max(map(math.prod, self.shapes))

    @property
    def size(self) -> int:
        """Bytes of all its arrays together."""
        return sum(math.prod(shape) * SIZES.get(dtype, 4) for dtype, shape in self.arrays)

    def has_axis(self, size: int) -> bool:
        return any(size in shape for shape in self.shapes)

    def group(self) -> list[int]:
        """The devices of its first group."""
        return first_group(self.groups)

    def __str__(self) -> str:
        arrays = " ".join(f"{dtype}{list(shape)}" for dtype, shape in self.arrays)
        return f"{self.kind} {arrays} from {self.source}"


def collectives(text: str) -> list[Collective]:
    """All of a program, each once: one that runs beside other work stands in the text once for each piece of it."""
    found = {}
    for number, line in enumerate(COLLECTIVE.finditer(text)):
        channel = re.search(r"channel_id=(\d+)", line["rest"])
        found.setdefault(channel[1] if channel else -number, _collective(line))
    return list(found.values())


def _collective(line: re.Match[str]) -> Collective:
    arrays = ARRAY.findall(re.sub(r"/\*.*?\*/", "", line["result"]))
    sized = tuple((dtype, tuple(map(int, sizes.split(",") if sizes else ()))) for dtype, sizes, _ in arrays)
    source = re.search(r'op_name="([^"]*)"', line["rest"])
    groups = re.search(r"(?:replica_groups|source_target_pairs)=(.*?)(?:, [a-z_]+=|$)", line["rest"])
    one_ring = '"emitter":"1D' in line["rest"]
    return Collective(line["kind"], sized, source[1] if source else "", groups[1] if groups else "", one_ring)


def first_group(groups: str) -> list[int]:
    """The first of the groups, from any of the ways they are written."""
    if named := re.match(r"mesh\[(.*?)\] *\{(.*?)\}", groups):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        joined, members, stride = re.findall(r"'(\w+)'", named[2]), [0], 1
        for name, size in reversed(sizes.items()):
            if name in joined:
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


class Instruction(NamedTuple):
    name: str
    kind: str
    result: str
    line: str

    @property
    def cycles(self) -> int:
        found = re.search(r'"estimated_cycles":"(\d+)"', self.line)
        return int(found[1]) if found else 0

    @property
    def calls(self) -> str | None:
        found = re.search(r"calls=%([\w.\-]+)", self.line)
        return found[1] if found else None

    @property
    def source(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.line)
        return found[1] if found else ""

    @property
    def operands_text(self) -> str:
        return self.line.split(f" {self.kind}(", 1)[1].partition(")")[0]

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.operands_text)


class Step(NamedTuple):
    """One instruction in the order in which it runs: `times` over in a run of the program."""

    instruction: Instruction
    times: int
    stage: str
    begins: Collective | None = None  # what travels from here on
    ends: str | None = None  # the name of the start whose end this is
    kernel: int = 0  # bytes that a kernel moves that is not the compiler's own


class Program:
    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        current: list[Instruction] = []
        for line in text.splitlines():
            if head := HEAD.match(line):
                current = self.computations[head[2]] = []
                if head[1]:
                    self.entry = head[2]
            elif found := OPERATION.match(line):
                current.append(Instruction(found[1], found[3], found[2], line))

    def steps(self) -> Iterator[Step]:
        yield from self._steps(self.entry, 1, "")

    def _steps(self, computation: str, times: int, outside: str) -> Iterator[Step]:
        for own in self.computations[computation]:
            if own.kind == "while":
                body, condition = (re.search(rf"{name}=%([\w.\-]+)", own.line) for name in ("body", "condition"))
                assert body and condition
                yield from self._steps(body[1], times * self._rounds(own, condition[1]), stage_of(own.source))
            elif own.kind in ("call", "conditional"):
                called = re.search(
                    r"(?:to_apply|branch_computations|true_computation)=\{?([^}]*?)(?:\}|, [a-z_]+=)", own.line
                )
                assert called
                # The last of several is what `lax.cond` runs where its condition holds, as it usually does.
                yield from self._steps(re.findall(r"%([\w.\-]+)", called[1])[-1], times, outside)
            else:
                inner = self.computations.get(own.calls or "", [])
                stage = stage_of(own.source) or self._stages[own.calls or ""] or outside or "other"
                sent = next(filter(None, map(COLLECTIVE.match, (own.line, *(x.line for x in inner)))), None)
                marks = {mark for x in inner for mark in re.findall(r"AsyncCollective(Start|Done)", x.line)}
                if own.kind == "call-done":
                    yield Step(own, times, stage, ends=own.operands[0])
                elif kernel := self._kernel(own):
                    yield Step(own, times, stage, kernel=kernel)
                elif "Start" in marks or (sent and own.kind.endswith("-start")):
                    yield Step(own, times, stage, begins=_collective(sent) if sent else None)
                elif "Done" in marks:
                    yield Step(own, times, stage, ends=own.name.replace("-done", "-start"))
                elif own.kind in {f"{kind}-done" for kind in SENDS.split("|")}:
                    yield Step(own, times, stage, ends=own.operands[0])
                elif sent and not own.name.startswith(("fusion", "async")) and not own.cycles:
                    yield Step(own, times, stage, begins=_collective(sent), ends=own.name)
                elif sent and "all-reduce-scatter" in (own.calls or ""):
                    scattered = _collective(sent)._replace(kind="reduce-scatter")
                    yield Step(own, times, stage, begins=scattered, ends=own.name)
                else:
                    yield Step(own, times, stage)

    def _kernel(self, own: Instruction) -> int:
        if own.kind == "call-start":
            called = re.search(r"to_apply=%([\w.\-]+)", own.line)
            return sum(map(self._kernel, self.computations[called[1]])) if called else 0
        moves = re.search(r'"bytes_accessed":"(\d+)"', own.line)
        return int(moves[1]) if moves and '"tpu_custom_call"' in own.line else 0

    def _rounds(self, loop: Instruction, condition: str) -> int:
        """How often a loop runs: the bound that its counter, which starts at 0, is compared with."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.line):
            return int(known[1])
        bounds = [re.search(r"s32\[\]\S* constant\((\d+)\)", own.line) for own in self.computations[condition]]
        return max((int(bound[1]) for bound in bounds if bound), default=1)

    @cached_property
    def _stages(self) -> defaultdict[str, str]:
        """The stage of most of what each computation computes, for instructions that do not say where they are from."""
        found: defaultdict[str, str] = defaultdict(str)
        for name, instructions in self.computations.items():
            stages = Counter(filter(None, (stage_of(own.source) for own in instructions)))
            found[name] = stages.most_common(1)[0][0] if stages else ""
        return found

    @cached_property
    def _arrays(self) -> dict[str, str]:
        return {own.name: own.result for instructions in self.computations.values() for own in instructions}

    def moved(self, own: Instruction) -> int:
        """Bytes that an instruction reads from HBM and writes there, at least: of an operand of which it takes slices
        the slices count, and what runs beside a collective counts by its result alone."""
        if own.kind in UNMOVED or own.kind.endswith("-done") or own.kind in SENDS.split("|"):
            return 0
        if own.kind.endswith("-start"):
            return min((size for size in map(array_bytes, ARRAYS.findall(own.result)) if size > 64), default=0)
        inner = {x.name: x for x in self.computations.get(own.calls or "", [])}
        if any(COLLECTIVE.match(x.line) for x in inner.values()):
            return bytes_in_hbm(ARRAYS.findall(own.result)[0])
        written, total = bytes_in_hbm(own.result), 0
        numbered = {int(x.operands_text): x for x in inner.values() if x.kind == "parameter"}
        for number, operand in enumerate(own.operands):
            whole = bytes_in_hbm(self._arrays.get(operand, ""))
            if not whole or number not in numbered:
                total += whole
                continue
            users = _users(inner, numbered[number])
            if users and all(x.kind in ("dynamic-slice", "slice", "gather") for x in users):
                total += min(whole, sum(array_bytes(x.result) for x in users))
            elif users and all(x.kind == "dynamic-update-slice" for x in users):
                # Updated in place: what is written is the update.
                written = max(0, written - whole) + sum(array_bytes(inner[x.operands[1]].result) for x in users)
            else:
                total += whole
        return written + total


def _users(inner: dict[str, Instruction], own: Instruction) -> list[Instruction]:
    """What uses a value within a fusion, looking through changes of shape and type."""
    users = [x for x in inner.values() if own.name in x.operands]
    while len(users) == 1 and users[0].kind in ("bitcast", "convert", "copy"):
        users = [x for x in inner.values() if users[0].name in x.operands]
    return users


def stage_of(source: str) -> str:
    """The stage of a traced operation, by the named scopes that it stands in."""
    parts = re.split(r"[/()]", source)
    stage = next((part for part in parts if part in STAGES), "")
    return f"{stage} backward" if stage and "transpose" in parts else stage


def array_bytes(result: str) -> int:
    """Of all arrays of a result, wherever they lie."""
    return sum(_bytes(dtype, sizes) for dtype, sizes, _ in ARRAY.findall(result))


def bytes_in_hbm(result: str) -> int:
    """Of those that lie in HBM: the layout of others names their memory, S(1) for VMEM."""
    return sum(
        _bytes(dtype, sizes) for dtype, sizes, layout in ARRAY.findall(result) if not re.search(r"S\(\d", layout)
    )


def _bytes(dtype: str, sizes: str) -> int:
    return math.prod(map(int, sizes.split(","))) * SIZES.get(dtype, 4) if sizes else SIZES.get(dtype, 4)
