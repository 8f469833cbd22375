"""How long a compiled program takes by its own schedule: cycles over the clock, and what of its traffic work hides."""

from collections import defaultdict
from typing import NamedTuple

from jclt.pods.chips import Network
from jclt.pods.hlo import Program


class Traffic(NamedTuple):
    """A collective as one run of the program sees it; seconds are of all its times together."""

    what: str
    stage: str
    times: int
    size: int  # bytes, each time
    devices: int
    seconds: float
    exposed: float  # of these, that no work runs beside


class Timeline(NamedTuple):
    stages: dict[str, float]  # seconds of work
    traffic: list[Traffic]
    moved: float  # bytes read from HBM and written there, at least
    kernels: float  # seconds of work that are those of kernels

    @property
    def work(self) -> float:
        return sum(self.stages.values(), 0.0)

    @property
    def sending(self) -> float:
        return sum((own.seconds for own in self.traffic), 0.0)

    @property
    def exposed(self) -> float:
        return sum((own.exposed for own in self.traffic), 0.0)

    @property
    def seconds(self) -> float:
        return self.work + self.exposed


def timeline(program: Program, network: Network) -> Timeline:
    """Runs through the schedule: work takes its cycles, a kernel what moving its bytes takes, and of what is on the way
    as much arrives meanwhile as the links carry, one collective after the other. What SparseCores do beside it is
    waited for at its end, and then counts as work."""
    stages: defaultdict[str, float] = defaultdict(float)
    on_the_way: dict[str, float] = {}
    beside: dict[str, float] = {}
    traffic: dict[str, Traffic] = {}
    moved = kernels = 0.0
    for step in program.steps():
        own = step.instruction
        seconds = own.cycles / network.chip.clock
        if step.kernel:
            moved += step.kernel * step.times
            seconds = step.kernel / network.chip.bandwidth
            if own.kind == "call-start":
                beside[own.name] = seconds
                continue
        elif step.ends in beside:
            seconds = beside.pop(step.ends)
        if step.kernel or own.kind == "call-done":
            kernels += seconds * step.times
        stages[step.stage] += seconds * step.times
        bytes_moved = program.moved(own)
        moved += (min(bytes_moved, seconds * network.chip.bandwidth) if own.cycles else bytes_moved) * step.times
        for name in list(beside)[:1]:
            beside[name] = max(0.0, beside[name] - seconds)
        for name in on_the_way:
            arrived = min(seconds, on_the_way[name])
            on_the_way[name] -= arrived
            seconds -= arrived
        if step.begins is not None:
            group = step.begins.group() or list(range(len(network.hosts)))
            takes = network.seconds(step.begins.kind, step.begins.size, group, step.begins.one_ring)
            on_the_way[own.name] = takes
            arrays = " ".join(f"{dtype}{list(shape)}" for dtype, shape in step.begins.arrays[:2])
            what = f"{step.begins.kind} {arrays}{' ...' if len(step.begins.arrays) > 2 else ''}"
            traffic[own.name] = Traffic(
                what, step.stage, step.times, step.begins.size, len(group), takes * step.times, 0.0
            )
        if step.ends in on_the_way:
            waited = 0.0
            for name in list(on_the_way):  # the links carry what was sent before it first
                waited += on_the_way.pop(name) if name == step.ends else on_the_way[name]
                if name == step.ends:
                    break
                on_the_way[name] = 0.0
            traffic[step.ends] = traffic[step.ends]._replace(exposed=waited * step.times)
    by_time = dict(sorted(stages.items(), key=lambda stage: -stage[1]))
    return Timeline(by_time, list(traffic.values()), moved, kernels)
