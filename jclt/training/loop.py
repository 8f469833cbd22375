"""The loop, on one screen: batches in, steps, metrics one step late, checkpoints, and what a signal does."""

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
from tqdm import tqdm

from jclt.data.prefetch import prefetched
from jclt.errors import Interrupted, UserError, first_line
from jclt.hosts import agreed
from jclt.memory import size_text, used_memory
from jclt.shapes import Array
from jclt.training.checkpoints import Checkpoints
from jclt.training.metrics import Log

log = logging.getLogger(__name__)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
SOUND = ("loss", "gradient_norm")
"""What must be finite for a step to count; any other metric may lack a value."""
Values = dict[str, Any]


@runtime_checkable
class HasStep(Protocol):
    """A training state: a pytree that counts its steps."""

    @property
    def step(self) -> Array: ...


StepState = TypeVar("StepState", bound=HasStep)


def fit(
    state: StepState,
    advance: Callable[[int, StepState, Any], tuple[StepState, Mapping[str, Array]]],
    batch: Callable[[int], Any],
    steps: int,
    checkpoints: Checkpoints,
    metrics: Log,
    *,
    log_every: int,
    save_every: int,
    describe: Callable[[Values], str],
    measure: Callable[[StepState], Values] | None = None,
    measure_every: int = 0,
    speed: Callable[[float], Values] = lambda steps_per_second: {},
    skips: int = 0,
    layers: Sequence[int] = (),
) -> StepState:
    """Runs `advance(step, state, batch)` from the state's own step to the last, and returns the state it ends in.

    The batch is a function of the step and the state of nothing else, so that a run that was killed and started again
    ends in the same bits as one that was not. A state that comes out of a step without a finite loss is the caller's
    to keep sound: the run goes on until more than `skips` such steps came in a row. What `measure` says is logged
    every so many steps before the last; the run does not depend on it. `layers` are those that metrics list.
    """
    start = int(state.step)
    waiting, saved, bad, began = None, start, 0, time.perf_counter()
    written = (start, began)

    def write(entry: Values) -> None:
        try:
            metrics.write(entry)
        except UserError as error:
            with suppress(UserError):
                checkpoints.wait()
            newest = checkpoints.complete
            kept = f"the newest checkpoint is of step {newest}" if newest else "no checkpoint has been saved yet"
            raise UserError(f"{error}; {kept}") from None

    def record(step: int, values: Mapping[str, Array]) -> None:
        nonlocal bad, written
        fetched = {name: plain(value) for name, value in values.items()}
        broken = [name for name in SOUND if name in fetched and not np.all(np.isfinite(fetched[name]))]
        bad = bad + 1 if broken else 0
        if bad > skips:
            if skips:  # each of these steps was skipped: the state is the one from before them
                checkpoints.save(int(state.step), state)
                checkpoints.wait()
            newest = int(state.step) if skips else saved
            kept = f"the newest checkpoint is of step {newest}" if newest else "no checkpoint has been saved yet"
            times = f", for the {ordinal(bad)} step in a row" if skips else ""
            where = where_broken(fetched, layers)
            raise UserError(f"{broken[0]} is {fetched[broken[0]]} at step {step}{times}{where}; {kept}")
        if step % log_every == 0 or step in (1, steps):
            now = time.perf_counter()
            if step > start + 1:  # the first step compiles
                fetched |= speed((step - written[0]) / (now - written[1]))
            written = (step, now)
            write({"step": step, "seconds": round(now - began, 3), **fetched})
            progress.say(step, describe(fetched), fetched.get("tokens_per_second"))
        progress.update(step)

    def look(step: int) -> None:
        if measure is not None and (found := measured(measure, step, state)) is not None:
            write({"step": step, **found})

    with (
        stop_requests() as asked_to_stop,
        prefetched(batch, start, steps) as batches,
        Progress(start, steps) as progress,
    ):
        due = measure is not None and bool(measure_every) and 0 < start < steps and start % measure_every == 0
        if due and not agreed(metrics.evaluated(start)):  # the run ended between its checkpoint and this
            look(start)
        for step, data in zip(range(start, steps), batches, strict=True):
            state, values = advance(step, state, data)
            # Metrics are read one step late: the device never waits for the host.
            if waiting is not None:
                record(*waiting)
            waiting = (step + 1, values)
            stop = asked_to_stop(step)
            due = measure is not None and bool(measure_every) and (step + 1) % measure_every == 0 and step + 1 < steps
            saves = (step + 1) % save_every == 0 or step + 1 == steps or stop
            if saves or due:
                # What is saved has been looked at and logged: a run resumed from here lacks no line.
                record(*waiting)
                waiting = None
            if saves:
                checkpoints.save(step + 1, state)
                saved = step + 1
            if stop:
                checkpoints.wait()
                raise Interrupted(f"stopped at step {step + 1}, saved; the same command goes on from there")
            if due:
                look(step + 1)
    checkpoints.wait()
    return state


def measured(measure: Callable[[StepState], Values], step: int, state: StepState) -> Values | None:
    """What is measured of a state. It is no part of training: where it fails, that is said and no more."""
    try:
        return measure(state)
    except Exception as error:
        log.warning("step %d could not be evaluated, the run goes on without (%s)", step, first_line(error))
        return None


def where_broken(values: Values, layers: Sequence[int]) -> str:
    """In which layers metrics lack a value, if that tells one layer from another."""
    for name, value in values.items():
        if isinstance(value, list) and len(value) == len(layers):
            found = [layer for layer, own in zip(layers, value, strict=True) if not np.isfinite(own)]
            if 0 < len(found) < len(layers):
                which = f"layers {', '.join(map(str, found))}" if len(found) > 1 else f"layer {found[0]}"
                return f" ({name} has no value in {which})"
    return ""


def ordinal(number: int) -> str:
    ends = {1: "st", 2: "nd", 3: "rd"}
    return f"{number}{'th' if number % 100 in (11, 12, 13) else ends.get(number % 10, 'th')}"


def plain(value: Array) -> Any:
    """A number, or a list of numbers."""
    return np.asarray(value).tolist()


class Progress:
    """How far a run is: a bar on a terminal; elsewhere a line now and then, as a file of logs wants it."""

    EVERY = 30.0
    """Seconds between two such lines at most; ten of them are written in any case."""

    def __init__(self, start: int, steps: int):
        shown = jax.process_index() == 0 and start < steps
        terminal = sys.stderr is not None and (sys.stderr.isatty() or "ipykernel" in sys.modules)
        self.start, self.steps, self.lines = start, steps, shown and not terminal
        self.bar = tqdm(total=steps, initial=start, unit="step", mininterval=0.5, disable=not (shown and terminal))
        self.said = (start, time.perf_counter())
        if self.lines:
            log.info("step %d of %d: compiling", start + 1, steps)
        else:
            self.bar.set_postfix_str("compiling")

    def say(self, step: int, text: str, tokens_per_second: float | None) -> None:
        used = used_memory()
        speed = f" {tokens_per_second:,.0f} tokens/s" if tokens_per_second else ""
        text += speed + (f" {size_text(used)}" if used else "")
        self.bar.set_postfix_str(text, refresh=False)
        before, now = self.said, time.perf_counter()
        tenth = (step - before[0]) * 10 >= self.steps - self.start
        if self.lines and (tenth or now - before[1] > self.EVERY or step == self.steps):
            log.info("step %d of %d: %s", step, self.steps, text)
            self.said = (step, now)

    def update(self, step: int) -> None:
        self.bar.update(step - self.bar.n)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()


@contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Within it a first signal to stop is noted instead of obeyed, and a second one ends the process at once; on
    several hosts all learn of it at the same step. In a thread other than the main one signals are not ours."""
    if jax.process_count() > 1:
        # The coordination service carries one host's SIGTERM to all of them.
        from jax.experimental.multihost_utils import reached_preemption_sync_point

        yield reached_preemption_sync_point
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    asked: list[int] = []
    # While a step compiles Python runs no handler, and then one for all signals of a kind: the bytes tell how many.
    read, write = socket.socketpair()
    read.setblocking(False)
    write.setblocking(False)
    before_bytes = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)

    def note(number: int, _: Any) -> None:
        with suppress(BlockingIOError):
            asked.extend(own for own in read.recv(1000) if own in STOP_SIGNALS)
        if len(asked) > 1:
            signal.signal(number, signal.SIG_DFL)
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            os.kill(os.getpid(), number)

    before = {name: signal.signal(name, note) for name in STOP_SIGNALS}
    try:
        yield lambda step: bool(asked)
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
        signal.set_wakeup_fd(before_bytes)
        read.close()
        write.close()
