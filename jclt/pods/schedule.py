"""How long a compiled program takes by its schedule: the cycles of its instructions over the clock, and the time of
its collectives that no other work hides."""

from collections import defaultdict
from typing import NamedTuple

from jclt.pods.chips import Network
from jclt.pods.collectives import Collective
from jclt.pods.hlo import Program, ScheduledStep


class Traffic(NamedTuple):
    """A collective in one run of the program. Seconds are the sum over all the times that it runs."""

    name: str  # its kind and arrays
    stage: str
    times: int
    size: int  # bytes, each time
    devices: int
    seconds: float
    exposed: float  # those during which no other work runs


class Timeline(NamedTuple):
    stages: dict[str, float]  # seconds of work
    traffic: list[Traffic]
    moved: float  # bytes read from HBM and written there, at least
    kernels: float  # seconds of work in kernels

    @property
    def work(self) -> float:
        return sum(self.stages.values(), 0.0)

    @property
    def sending(self) -> float:
        return sum((traffic.seconds for traffic in self.traffic), 0.0)

    @property
    def exposed(self) -> float:
        return sum((traffic.exposed for traffic in self.traffic), 0.0)

    @property
    def seconds(self) -> float:
        return self.work + self.exposed


def simulate_schedule(program: Program, network: Network) -> Timeline:
    """Runs through the program's schedule.

    1. An instruction takes its cycles; a kernel takes the time in which HBM moves its bytes.
    2. Collectives that have started proceed meanwhile, one after another, as fast as the links are.
    3. What is left of a collective at its end is waited for, and counts as exposed.
    4. A kernel on SparseCores runs beside the other work; what is left of it at its end counts as work.
    """
    stages: defaultdict[str, float] = defaultdict(float)
    in_flight: dict[str, float] = {}  # seconds left of each collective
    on_sparse_cores: dict[str, float] = {}  # seconds left of each kernel
    traffic: dict[str, Traffic] = {}
    moved = kernels = 0.0
    for step in program.list_steps():
        instruction = step.instruction
        seconds = instruction.cycles / network.chip.clock
        if step.kernel_bytes:
            moved += step.kernel_bytes * step.times
            seconds = step.kernel_bytes / network.chip.bandwidth
            if instruction.kind == "call-start":
                on_sparse_cores[instruction.name] = seconds
                continue
        elif step.ends in on_sparse_cores:
            seconds = on_sparse_cores.pop(step.ends)
        if step.kernel_bytes or instruction.kind == "call-done":
            kernels += seconds * step.times
        stages[step.stage] += seconds * step.times
        moved_bytes = program.count_moved_bytes(instruction)
        movable = seconds * network.chip.bandwidth
        moved += (min(moved_bytes, movable) if instruction.cycles else moved_bytes) * step.times
        for name in list(on_sparse_cores)[:1]:
            on_sparse_cores[name] = max(0.0, on_sparse_cores[name] - seconds)
        for name in in_flight:
            hidden = min(seconds, in_flight[name])
            in_flight[name] -= hidden
            seconds -= hidden
        if step.begins is not None:
            once = measure_traffic(step, step.begins, network)
            in_flight[instruction.name] = once.seconds
            traffic[instruction.name] = once._replace(seconds=once.seconds * step.times)
        if step.ends in in_flight:
            waited = wait_for(step.ends, in_flight)
            traffic[step.ends] = traffic[step.ends]._replace(exposed=waited * step.times)
    by_time = dict(sorted(stages.items(), key=lambda stage: -stage[1]))
    return Timeline(stages=by_time, traffic=list(traffic.values()), moved=moved, kernels=kernels)


def measure_traffic(step: ScheduledStep, collective: Collective, network: Network) -> Traffic:
    """The traffic of a collective that a step begins, with the seconds of one time, none of them exposed yet."""
    group = collective.list_group() or list(range(len(network.hosts)))
    seconds = network.estimate_seconds(collective.kind, collective.size, group, collective.one_ring)
    arrays = " ".join(f"{dtype}{list(shape)}" for dtype, shape in collective.arrays[:2])
    return Traffic(
        name=f"{collective.kind} {arrays}{' ...' if len(collective.arrays) > 2 else ''}",
        stage=step.stage,
        times=step.times,
        size=collective.size,
        devices=len(group),
        seconds=seconds,
        exposed=0.0,
    )


def wait_for(ended: str, in_flight: dict[str, float]) -> float:
    """Seconds until a collective has ended. The links carry first what was sent before it."""
    waited = 0.0
    for name in list(in_flight):
        if name == ended:
            return waited + in_flight.pop(name)
        waited += in_flight[name]
        in_flight[name] = 0.0
    return waited
