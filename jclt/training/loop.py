"""The training loop: batches, steps, metrics one step late, checkpoints, and signals to stop."""

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
from tqdm import tqdm

from jclt.data.prefetch import prefetch
from jclt.errors import Interrupted, UserError, first_line
from jclt.hosts import broadcast_from_first_host
from jclt.memory import format_size, measure_used_memory
from jclt.shapes import Array
from jclt.training.checkpoints import Checkpoints
from jclt.training.metrics import Log

log = logging.getLogger(__name__)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
MUST_BE_FINITE = ("loss", "gradient_norm")
"""Metrics that must be finite for a step to count; any other metric may be NaN."""
Values = dict[str, Any]


@runtime_checkable
class HasStep(Protocol):
    """A training state: a pytree that counts its steps."""

    @property
    def step(self) -> Array: ...


StepState = TypeVar("StepState", bound=HasStep)


class Reporting(NamedTuple):
    """What the loop reports of a run, and how often."""

    describe: Callable[[Values], str]  # a step's metrics in one short line, for the progress bar
    every: int  # steps between two lines of metrics
    speed: Callable[[float], Values] = lambda steps_per_second: {}  # metrics that follow from the speed
    evaluate: Callable[[Any], Values] | None = None  # metrics of a state; the run does not depend on them
    evaluate_every: int = 0  # steps between two evaluations before the last step; 0: none
    layers: Sequence[int] = ()  # the layers of metrics that are lists

    def is_evaluated(self, step: int, steps: int) -> bool:
        """Whether the loop evaluates the state after so many of all steps."""
        if self.evaluate is None or self.evaluate_every == 0:
            return False
        return 0 < step < steps and step % self.evaluate_every == 0


def fit(
    state: StepState,
    advance: Callable[[int, StepState, Any], tuple[StepState, Mapping[str, Array]]],
    batch: Callable[[int], Any],
    steps: int,
    checkpoints: Checkpoints,
    metrics: Log,
    reporting: Reporting,
    *,
    save_every: int,
    skips: int = 0,
) -> StepState:
    """Runs `advance(step, state, batch)` from the state's step to the last, and returns the final state.

    The batch depends on the step alone, and the next state on the step, the state and the batches. So a run that was
    killed and started again ends in the same bits as one that was not.

    When the loss of a step is not finite, `advance` must return a state that is still sound. The run stops after more
    than `skips` such steps in a row.
    """
    start = int(state.step)
    with (
        catch_stop_signals() as is_stop_requested,
        prefetch(batch, start, steps) as batches,
        Progress(start, steps) as progress,
    ):
        recorder = Recorder(start, steps, checkpoints, metrics, reporting, progress, skips)
        is_missing = reporting.is_evaluated(start, steps)
        if is_missing and not broadcast_from_first_host(metrics.has_evaluation(start)):
            recorder.evaluate(start, state)  # the run ended between its checkpoint and this evaluation
        waiting: tuple[int, Mapping[str, Array]] | None = None
        for step, data in zip(range(start, steps), batches, strict=True):
            state, values = advance(step, state, data)
            # Metrics are read one step late: the device never waits for the host.
            if waiting is not None:
                recorder.record(*waiting, state)
            waiting, done = (step + 1, values), step + 1
            stops, evaluates = is_stop_requested(step), reporting.is_evaluated(done, steps)
            saves = done % save_every == 0 or done == steps or stops
            if saves or evaluates:
                # The step is checked and logged before its state is saved: a resumed run lacks no line.
                recorder.record(*waiting, state)
                waiting = None
            if saves:
                recorder.save(done, state)
            if stops:
                checkpoints.wait()
                raise Interrupted(f"stopped at step {done}, saved; the same command goes on from there")
            if evaluates:
                recorder.evaluate(done, state)
    checkpoints.wait()
    return state


class Recorder:
    """Writes a run's metrics, and stops the run when its loss is not finite."""

    def __init__(
        self,
        start: int,
        steps: int,
        checkpoints: Checkpoints,
        metrics: Log,
        reporting: Reporting,
        progress: "Progress",
        skips: int,
    ):
        self.start, self.steps, self.skips = start, steps, skips
        self.checkpoints, self.metrics, self.reporting, self.progress = checkpoints, metrics, reporting, progress
        self.saved = start  # the step of the newest checkpoint
        self.bad_in_row = 0
        self.began = time.perf_counter()
        self.last_written = start, self.began

    def record(self, step: int, values: Mapping[str, Array], state: HasStep) -> None:
        """Checks a step's metrics, and writes those of every so many steps. `state` is the newest one."""
        entry = {name: to_plain(value) for name, value in values.items()}
        self._check_finite(step, entry, state)
        if step % self.reporting.every == 0 or step in (1, self.steps):
            now = time.perf_counter()
            if step > self.start + 1:  # the first step compiles
                last_step, then = self.last_written
                entry |= self.reporting.speed((step - last_step) / (now - then))
            self.last_written = step, now
            self._write({"step": step, "seconds": round(now - self.began, 3), **entry})
            self.progress.show(step, self.reporting.describe(entry), entry.get("tokens_per_second"))
        self.progress.update(step)

    def save(self, step: int, state: HasStep) -> None:
        self.checkpoints.save(step, state)
        self.saved = step

    def evaluate(self, step: int, state: HasStep) -> None:
        """Writes the evaluation of a state, where it does not fail."""
        evaluate = self.reporting.evaluate
        if evaluate is not None and (values := try_evaluate(evaluate, step, state)) is not None:
            self._write({"step": step, **values})

    def _check_finite(self, step: int, entry: Values, state: HasStep) -> None:
        broken = [name for name in MUST_BE_FINITE if name in entry and not np.all(np.isfinite(entry[name]))]
        self.bad_in_row = self.bad_in_row + 1 if broken else 0
        if self.bad_in_row <= self.skips:
            return
        if self.skips:  # each of these steps was skipped: the state is the one before them
            self.checkpoints.save(int(state.step), state)
            self.checkpoints.wait()
        newest = int(state.step) if self.skips else self.saved
        times = f", for the {to_ordinal(self.bad_in_row)} step in a row" if self.skips else ""
        where = describe_broken_layers(entry, self.reporting.layers)
        raise UserError(
            f"{broken[0]} is {entry[broken[0]]} at step {step}{times}{where}; {describe_newest_checkpoint(newest)}"
        )

    def _write(self, entry: Values) -> None:
        try:
            self.metrics.write(entry)
        except UserError as error:
            with suppress(UserError):
                self.checkpoints.wait()
            raise UserError(f"{error}; {describe_newest_checkpoint(self.checkpoints.complete)}") from None


def describe_newest_checkpoint(step: int) -> str:
    return f"the newest checkpoint is of step {step}" if step else "no checkpoint has been saved yet"


def try_evaluate(evaluate: Callable[[StepState], Values], step: int, state: StepState) -> Values | None:
    """The evaluation of a state; None, and a warning, where it fails: it is not part of the training."""
    try:
        return evaluate(state)
    except Exception as error:
        log.warning("step %d could not be evaluated, the run goes on without (%s)", step, first_line(error))
        return None


def describe_broken_layers(values: Values, layers: Sequence[int]) -> str:
    """The layers in which a metric is not finite, unless it is so in none or in all of them."""
    for name, value in values.items():
        if isinstance(value, list) and len(value) == len(layers):
            broken = [layer for layer, x in zip(layers, value, strict=True) if not np.isfinite(x)]
            if 0 < len(broken) < len(layers):
                which = f"layers {', '.join(map(str, broken))}" if len(broken) > 1 else f"layer {broken[0]}"
                return f" ({name} has no value in {which})"
    return ""


def to_ordinal(number: int) -> str:
    ends = {1: "st", 2: "nd", 3: "rd"}
    return f"{number}{'th' if number % 100 in (11, 12, 13) else ends.get(number % 10, 'th')}"


def to_plain(value: Array) -> Any:
    """A number, or a list of numbers."""
    return np.asarray(value).tolist()


class Progress:
    """Shows how far a run is: a bar on a terminal; elsewhere, for log files, a line now and then."""

    EVERY = 30.0
    """Seconds between two such lines, unless a tenth of the run passes sooner."""

    def __init__(self, start: int, steps: int):
        is_shown = jax.process_index() == 0 and start < steps
        on_terminal = sys.stderr is not None and (sys.stderr.isatty() or "ipykernel" in sys.modules)
        self.start, self.steps, self.shows_lines = start, steps, is_shown and not on_terminal
        self.bar = tqdm(
            total=steps, initial=start, unit="step", mininterval=0.5, disable=not (is_shown and on_terminal)
        )
        self.last_line = (start, time.perf_counter())
        if self.shows_lines:
            log.info("step %d of %d: compiling", start + 1, steps)
        else:
            self.bar.set_postfix_str("compiling")

    def show(self, step: int, text: str, tokens_per_second: float | None) -> None:
        used = measure_used_memory()
        speed = f" {tokens_per_second:,.0f} tokens/s" if tokens_per_second else ""
        text += speed + (f" {format_size(used)}" if used else "")
        self.bar.set_postfix_str(text, refresh=False)
        (last_step, then), now = self.last_line, time.perf_counter()
        is_tenth = (step - last_step) * 10 >= self.steps - self.start
        if self.shows_lines and (is_tenth or now - then > self.EVERY or step == self.steps):
            log.info("step %d of %d: %s", step, self.steps, text)
            self.last_line = (step, now)

    def update(self, step: int) -> None:
        self.bar.update(step - self.bar.n)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()


@contextmanager
def catch_stop_signals() -> Iterator[Callable[[int], bool]]:
    """Gives a function of the step that tells whether a signal to stop has come.

    The first signal is only noted; a second one ends the process at once. On several hosts all learn of a signal at
    the same step. Only the main thread can catch signals: in any other thread the function always returns False.
    """
    if jax.process_count() > 1:
        # The coordination service carries one host's SIGTERM to all of them.
        from jax.experimental.multihost_utils import reached_preemption_sync_point

        yield reached_preemption_sync_point
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    signals: list[int] = []
    # While a step compiles Python runs no handler, and afterwards one for all signals of a kind. So signals are
    # counted by the bytes that each of them writes to a socket.
    read, write = socket.socketpair()
    read.setblocking(False)
    write.setblocking(False)
    before_bytes = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)

    def note(number: int, _: Any) -> None:
        with suppress(BlockingIOError):
            signals.extend(byte for byte in read.recv(1000) if byte in STOP_SIGNALS)
        if len(signals) > 1:
            signal.signal(number, signal.SIG_DFL)
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            os.kill(os.getpid(), number)

    handlers = {name: signal.signal(name, note) for name in STOP_SIGNALS}
    try:
        yield lambda step: bool(signals)
    finally:
        for name, handler in handlers.items():
            signal.signal(name, handler)
        signal.set_wakeup_fd(before_bytes)
        read.close()
        write.close()
