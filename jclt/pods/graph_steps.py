"""Programs of a graph, compiled from the shapes of their arrays, and what they take."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jclt.pods.chips import Network
from jclt.pods.hlo import Program
from jclt.pods.schedule import simulate_schedule

ONCE = {-1: 1.0}


class Step(NamedTuple):
    """A program of one graph, or the body of a loop."""

    part: str  # of a graph's time
    lowered: jax.stages.Lowered
    kept: int  # bytes of a chip that hold other arrays meanwhile, and this program's arguments but weights
    times: Mapping[int, float] = ONCE  # how often it runs, by the branch that is chosen where it chooses one


class Cost(NamedTuple):
    parts: dict[str, float]  # seconds of a graph
    peak: float  # bytes of a chip, beside weights


def measure_steps(steps: Iterable[Step], network: Network) -> Cost:
    """What steps take on a chip; a peak of all its memory if the compiler refuses one of them."""
    parts, peak = defaultdict[str, float](float), 0.0
    for step in steps:
        try:
            compiled = step.lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return Cost({}, network.chip.memory)
        text, used = compiled.as_text() or "", compiled.memory_analysis()
        assert used is not None
        for branch, times in step.times.items():
            parts[step.part] += times * simulate_schedule(Program(text, branch), network).seconds
        temporary = used.peak_memory_in_bytes - used.argument_size_in_bytes + used.generated_code_size_in_bytes
        peak = max(peak, step.kept + temporary)
    return Cost(dict(parts), peak)


class Shapes(NamedTuple):
    """Makes the shapes of arrays on the devices of a mesh; by default each has them whole."""

    mesh: Mesh
    spec: P = P()

    def array(self, *shape: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, self.spec))

    def numbers(self, *shape: int) -> Any:
        return self.array(*shape, dtype=jnp.int32)

    def place(self, tree: Any) -> Any:
        """The shapes of these arrays, with integers as they are on devices."""
        return jax.tree.map(lambda x: self.array(*x.shape, dtype=jax.dtypes.canonicalize_dtype(x.dtype)), tree)

    def evaluate(self, function: Callable[..., Any], *arguments: Any, static: int) -> Any:
        """The shapes of a function's results. Its first `static` arguments are no arrays."""
        settings, arrays = arguments[:static], arguments[static:]
        return self.place(jax.eval_shape(lambda *arrays: function(*settings, *arrays), *arrays))


def count_bytes(*trees: Any) -> int:
    """Of a chip."""

    def count(x: Any) -> int:
        return int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize

    return sum(map(count, jax.tree.leaves(trees)))
