"""The loop, on one screen: batches in, steps, metrics one step late, checkpoints, and what a signal does."""

import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
from tqdm import tqdm

from jclt.errors import Interrupted, UserError
from jclt.shapes import Array
from jclt.training.checkpoints import Checkpoints
from jclt.training.metrics import Log
from jclt.training.prefetch import prefetched

log = logging.getLogger(__name__)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
Values = dict[str, Any]


@runtime_checkable
class HasStep(Protocol):
    """A training state: a pytree that counts its steps."""

    @property
    def step(self) -> Array: ...


State = TypeVar("State", bound=HasStep)


def fit(
    state: State,
    advance: Callable[[int, State, Any], tuple[State, Mapping[str, Array]]],
    batch: Callable[[int], Any],
    steps: int,
    checkpoints: Checkpoints,
    metrics: Log,
    *,
    log_every: int,
    save_every: int,
    describe: Callable[[Values], str],
    measure: Callable[[State], Values] | None = None,
    measure_every: int = 0,
    speed: Callable[[float], Values] = lambda steps_per_second: {},
    skips: int = 0,
) -> State:
    """Runs `advance(step, state, batch)` from the state's own step to the last, and returns the state it ends in.

    The batch is a function of the step and the state of nothing else, so that a run that was killed and started again
    ends in the same bits as one that was not. A state that comes out of a step without a finite loss is the caller's
    to keep sound: the run goes on until more than `skips` such steps came in a row.
    """
    start = int(state.step)
    waiting, saved, bad, began = None, start, 0, time.perf_counter()
    written = (start, began)

    def record(step: int, values: Mapping[str, Array]) -> None:
        nonlocal bad, written
        fetched = {name: plain(value) for name, value in values.items()}
        # Of other figures some may be unknown yet.
        broken = [name for name in ("loss", "gradient_norm") if not np.all(np.isfinite(fetched.get(name, 0.0)))]
        bad = bad + 1 if broken else 0
        if bad > skips:
            if skips:  # each of these steps was skipped: the state is the one from before them
                checkpoints.save(int(state.step), state)
            newest = int(state.step) if skips else saved
            kept = f"the newest checkpoint is of step {newest}" if newest else "no checkpoint has been saved yet"
            times = f", for the {bad}th step in a row" if skips else ""
            raise UserError(f"{broken[0]} is {fetched[broken[0]]} at step {step}{times}; {kept}")
        if step % log_every == 0 or step in (1, steps):
            now = time.perf_counter()
            if step > start + 1:  # the first step compiles
                fetched |= speed((step - written[0]) / (now - written[1]))
            written = (step, now)
            metrics.write({"step": step, "seconds": round(now - began, 3), **fetched})
            progress.set_postfix_str(describe(fetched), refresh=False)
        progress.update()

    with (
        stop_requests() as asked_to_stop,
        prefetched(batch, start, steps) as batches,
        tqdm(total=steps, initial=start, unit="step", mininterval=0.5, disable=jax.process_index() > 0) as progress,
    ):
        for step, data in zip(range(start, steps), batches, strict=True):
            state, values = advance(step, state, data)
            # Metrics are read one step late: the device never waits for the host.
            if waiting is not None:
                record(*waiting)
            waiting = (step + 1, values)
            stop = asked_to_stop(step)
            measured = measure is not None and bool(measure_every) and (step + 1) % measure_every == 0
            if (step + 1) % save_every == 0 or step + 1 == steps or stop or measured:
                # What is saved has been looked at and logged: a run resumed from here lacks no line.
                record(*waiting)
                waiting = None
            if measured and measure is not None:
                metrics.write({"step": step + 1, **measure(state)})
            if (step + 1) % save_every == 0 or step + 1 == steps or stop:
                checkpoints.save(step + 1, state)
                saved = step + 1
            if stop:
                raise Interrupted(f"stopped at step {step + 1}, saved; the same command goes on from there")
    return state


def plain(value: Array) -> Any:
    """A number, or a list of numbers."""
    return np.asarray(value).tolist()


@contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Within it a signal to stop is noted instead of obeyed; on several hosts all learn of it at the same step."""
    if jax.process_count() > 1:
        # The coordination service carries one host's SIGTERM to all of them.
        from jax.experimental.multihost_utils import reached_preemption_sync_point

        yield reached_preemption_sync_point
        return
    asked: list[int] = []
    before = {name: signal.signal(name, lambda number, _: asked.append(number)) for name in STOP_SIGNALS}
    try:
        yield lambda step: bool(asked)
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
