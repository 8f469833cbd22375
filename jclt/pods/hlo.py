"""Reads the text of a compiled program (HLO): its instructions, in the order in which they run.

The TPU compiler writes its schedule into the text. Instructions are in the order in which they run, most of them with
the number of cycles that the compiler expects. Collectives have none, and their time follows from the links
(`chips.Network`). A collective that runs beside other work is written as a start, as pieces inside the matrix products
that it runs beside, and as an end.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

from jclt.pods.collectives import (
    COLLECTIVE_KINDS,
    COLLECTIVE_LINE,
    Collective,
    count_array_bytes,
    count_hbm_bytes,
    parse_collective,
)

WHOLE_ARRAY_PATTERN = re.compile(r"[a-z]+\d*\[[\d,]*\](?:\{[^{}]*\})?")
COMPUTATION_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION_LINE = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
KINDS_WITHOUT_TRAFFIC = ("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "custom-call")

STAGES = (
    *("harvest", "shuffle", "reshard", "choose", "encode", "decode"),
    *("auxiliary", "end_to_end", "spread", "reduce", "update"),
)
"""The named scopes of a train step, by which its time is reported."""


class Instruction(NamedTuple):
    name: str
    kind: str
    result: str
    line: str

    @property
    def cycles(self) -> int:
        match = re.search(r'"estimated_cycles":"(\d+)"', self.line)
        return int(match[1]) if match else 0

    @property
    def calls(self) -> str | None:
        match = re.search(r"calls=%([\w.\-]+)", self.line)
        return match[1] if match else None

    @property
    def source(self) -> str:
        match = re.search(r'op_name="([^"]*)"', self.line)
        return match[1] if match else ""

    @property
    def operands_text(self) -> str:
        return self.line.split(f" {self.kind}(", 1)[1].partition(")")[0]

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.operands_text)


class ScheduledStep(NamedTuple):
    """An instruction in the order in which it runs, and how many times it runs."""

    instruction: Instruction
    times: int
    stage: str
    begins: Collective | None = None  # the collective that it starts
    ends: str | None = None  # the name of the instruction that started what ends here
    kernel_bytes: int = 0  # bytes that it moves, if it is a kernel of ours


class Program:
    def __init__(self, text: str, branch: int = -1):
        """Of a conditional's branches the one with this number runs. The last one is what `lax.cond` runs where its
        condition holds, as it usually does."""
        self.branch = branch
        self.computations: dict[str, list[Instruction]] = {}
        current: list[Instruction] = []
        for line in text.splitlines():
            if head := COMPUTATION_HEAD.match(line):
                current = self.computations[head[2]] = []
                if head[1]:
                    self.entry = head[2]
            elif match := INSTRUCTION_LINE.match(line):
                current.append(Instruction(name=match[1], kind=match[3], result=match[2], line=line))

    def list_steps(self) -> Iterator[ScheduledStep]:
        yield from self._list_steps(self.entry, 1, "")

    def _list_steps(self, computation: str, times: int, outer_stage: str) -> Iterator[ScheduledStep]:
        for instruction in self.computations[computation]:
            if instruction.kind == "while":
                body, condition = (
                    re.search(rf"{name}=%([\w.\-]+)", instruction.line) for name in ("body", "condition")
                )
                assert body and condition
                rounds = self._count_rounds(instruction, condition[1])
                yield from self._list_steps(body[1], times * rounds, find_stage(instruction.source))
            elif instruction.kind in ("call", "conditional"):
                branch = self.branch if instruction.kind == "conditional" else 0
                yield from self._list_steps(list_branches(instruction.line)[branch], times, outer_stage)
            else:
                called = instruction.calls or ""
                stage = find_stage(instruction.source) or self._stages[called] or outer_stage or "other"
                yield self._read_step(ScheduledStep(instruction, times, stage))

    def _read_step(self, step: ScheduledStep) -> ScheduledStep:
        """The step with the collective or kernel that it starts or ends."""
        instruction, kind = step.instruction, step.instruction.kind
        inner = self.computations.get(instruction.calls or "", [])
        lines = (instruction.line, *(x.line for x in inner))
        collective = next(filter(None, map(COLLECTIVE_LINE.match, lines)), None)
        marks = {mark for x in inner for mark in re.findall(r"AsyncCollective(Start|Done)", x.line)}
        if kind == "call-done":
            return step._replace(ends=instruction.operands[0])
        if kernel_bytes := self._count_kernel_bytes(instruction):
            return step._replace(kernel_bytes=kernel_bytes)
        if "Start" in marks or (collective and kind.endswith("-start")):
            return step._replace(begins=parse_collective(collective) if collective else None)
        if "Done" in marks:
            return step._replace(ends=instruction.name.replace("-done", "-start"))
        if kind in {f"{kind}-done" for kind in COLLECTIVE_KINDS.split("|")}:
            return step._replace(ends=instruction.operands[0])
        if collective and not instruction.name.startswith(("fusion", "async")) and not instruction.cycles:
            return step._replace(begins=parse_collective(collective), ends=instruction.name)
        if collective and "all-reduce-scatter" in (instruction.calls or ""):
            scatter = parse_collective(collective)._replace(kind="reduce-scatter")
            return step._replace(begins=scatter, ends=instruction.name)
        return step

    def _count_kernel_bytes(self, instruction: Instruction) -> int:
        if instruction.kind == "call-start":
            called = re.search(r"to_apply=%([\w.\-]+)", instruction.line)
            return sum(map(self._count_kernel_bytes, self.computations[called[1]])) if called else 0
        moved = re.search(r'"bytes_accessed":"(\d+)"', instruction.line)
        return int(moved[1]) if moved and '"tpu_custom_call"' in instruction.line else 0

    def _count_rounds(self, loop: Instruction, condition: str) -> int:
        """How many times a loop runs: the bound that its counter, which starts at 0, is compared with."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.line):
            return int(known[1])
        bounds = [re.search(r"s32\[\]\S* constant\((\d+)\)", x.line) for x in self.computations[condition]]
        return max((int(bound[1]) for bound in bounds if bound), default=1)

    @cached_property
    def _stages(self) -> defaultdict[str, str]:
        """The most frequent stage in each computation, for instructions whose text has no source."""
        by_computation: defaultdict[str, str] = defaultdict(str)
        for name, instructions in self.computations.items():
            stages = Counter(filter(None, (find_stage(instruction.source) for instruction in instructions)))
            by_computation[name] = stages.most_common(1)[0][0] if stages else ""
        return by_computation

    @cached_property
    def _arrays(self) -> dict[str, str]:
        """The result of each instruction, by its name."""
        return {x.name: x.result for instructions in self.computations.values() for x in instructions}

    def count_moved_bytes(self, instruction: Instruction) -> int:
        """The bytes that an instruction at least reads from HBM and writes there. Where it takes slices of an operand,
        only the slices count. Where it runs beside a collective, only its result counts."""
        if (
            instruction.kind in KINDS_WITHOUT_TRAFFIC
            or instruction.kind.endswith("-done")
            or instruction.kind in COLLECTIVE_KINDS.split("|")
        ):
            return 0
        if instruction.kind.endswith("-start"):
            return min(
                (size for size in map(count_array_bytes, WHOLE_ARRAY_PATTERN.findall(instruction.result)) if size > 64),
                default=0,
            )
        inner = {x.name: x for x in self.computations.get(instruction.calls or "", [])}
        if any(COLLECTIVE_LINE.match(x.line) for x in inner.values()):
            return count_hbm_bytes(WHOLE_ARRAY_PATTERN.findall(instruction.result)[0])
        written, read = count_hbm_bytes(instruction.result), 0
        parameters = {int(x.operands_text): x for x in inner.values() if x.kind == "parameter"}
        for number, operand in enumerate(instruction.operands):
            operand_bytes = count_hbm_bytes(self._arrays.get(operand, ""))
            if not operand_bytes or number not in parameters:
                read += operand_bytes
                continue
            users = _find_users(inner, parameters[number])
            if users and all(x.kind in ("dynamic-slice", "slice", "gather") for x in users):
                read += min(operand_bytes, sum(count_array_bytes(x.result) for x in users))
            elif users and all(x.kind == "dynamic-update-slice" for x in users):
                # Updated in place: what is written is the update.
                written = max(0, written - operand_bytes) + sum(
                    count_array_bytes(inner[x.operands[1]].result) for x in users
                )
            else:
                read += operand_bytes
        return written + read


def _find_users(inner: dict[str, Instruction], value: Instruction) -> list[Instruction]:
    """The instructions of a fusion that use a value, whatever changes of shape and type are in between."""
    users = [x for x in inner.values() if value.name in x.operands]
    while len(users) == 1 and users[0].kind in ("bitcast", "convert", "copy"):
        users = [x for x in inner.values() if users[0].name in x.operands]
    return users


def list_branches(line: str) -> list[str]:
    """The computations of a call, or of a conditional, of which the last is for a condition that holds."""
    if pair := re.search(r"true_computation=%([\w.\-]+), false_computation=%([\w.\-]+)", line):
        return [pair[2], pair[1]]
    called = re.search(r"(?:to_apply|branch_computations)=\{?([^}]*?)(?:\}|, [a-z_]+=)", line)
    assert called
    return re.findall(r"%([\w.\-]+)", called[1])


def find_stage(source: str) -> str:
    """The stage of a traced operation, by its named scopes."""
    parts = re.split(r"[/()]", source)
    stage = next((part for part in parts if part in STAGES), "")
    return f"{stage} backward" if stage and "transpose" in parts else stage
