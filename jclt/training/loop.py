"""The loop, on one screen: batches in, steps, metrics one step late, checkpoints, and what a signal does."""

import logging
import math
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from tqdm import tqdm

from jclt.errors import Interrupted, UserError
from jclt.shapes import Array
from jclt.training.checkpoints import Checkpoints
from jclt.training.metrics import MetricsLog, draw_loss, read_metrics

log = logging.getLogger(__name__)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@runtime_checkable
class HasStep(Protocol):
    """A training state: a pytree that counts its steps."""

    @property
    def step(self) -> Array: ...


State = TypeVar("State", bound=HasStep)


def fit(
    state: State,
    advance: Callable[[State, Any], tuple[State, Mapping[str, Array]]],
    batch: Callable[[int], Any],
    steps: int,
    out: Path,
    *,
    log_every: int,
    save_every: int,
    describe: Callable[[Mapping[str, float]], str],
) -> State:
    """Runs `advance` from the newest checkpoint in `out` to the last step, and returns the state it ends in.

    The batch is a function of the step and the state of nothing else, so that a run that was killed and started again
    ends in the same bits as one that was not.
    """
    checkpoints = Checkpoints(out / "checkpoints")
    found = checkpoints.restore(state)
    start, state = (0, state) if found is None else (int(found.step), found)
    if start:
        log.info("resuming at step %d", start)
    metrics = MetricsLog(out / "metrics.jsonl", start)
    asked_to_stop: list[int] = []
    before = {name: signal.signal(name, lambda number, _: asked_to_stop.append(number)) for name in STOP_SIGNALS}
    began, waiting, saved = time.perf_counter(), None, start

    def record(step: int, values: Mapping[str, Array]) -> None:
        fetched = {name: float(value) for name, value in values.items()}
        for name, value in fetched.items():
            if not math.isfinite(value):
                newest = f"the newest checkpoint is of step {saved}" if saved else "no checkpoint has been saved yet"
                raise UserError(f"{name} is {value} at step {step}; {newest}")
        if step % log_every == 0 or step in (1, steps):
            seconds = time.perf_counter() - began
            metrics.write({"step": step, "seconds": round(seconds, 3), **fetched})
            progress.set_postfix_str(describe(fetched), refresh=False)

    try:
        with tqdm(total=steps, initial=start, unit="step", mininterval=0.5) as progress:
            for step in range(start, steps):
                state, values = advance(state, batch(step))
                # Metrics are read one step late: the device never waits for the host.
                if waiting is not None:
                    record(*waiting)
                    progress.update()
                waiting = (step + 1, values)
                if (step + 1) % save_every == 0 or step + 1 == steps or asked_to_stop:
                    # What is saved has been looked at and logged: a run resumed from here lacks no line.
                    record(*waiting)
                    progress.update()
                    waiting = None
                    checkpoints.save(step + 1, state)
                    saved = step + 1
                if asked_to_stop:
                    raise Interrupted(f"stopped at step {step + 1}, saved; the same command goes on from there")
    finally:
        checkpoints.close()
        metrics.close()
        for name, handler in before.items():
            signal.signal(name, handler)
    draw_loss(read_metrics(out / "metrics.jsonl"), out / "loss.png")
    return state
