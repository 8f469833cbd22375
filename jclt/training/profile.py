"""Traces some steps for XProf."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

log = logging.getLogger(__name__)
Advance = Callable[[int, Any, Any], tuple[Any, Any]]


def trace_steps(advance: Advance, first: int, steps: int, folder: Path) -> Advance:
    """`advance` with a trace of so many steps from the second one on, since the first one compiles."""
    if steps < 1:
        return advance
    begin = first + 1

    def advance_and_trace(step: int, state: Any, batch: Any) -> tuple[Any, Any]:
        if step == begin:
            jax.block_until_ready(state)
            jax.profiler.start_trace(folder)
        with jax.profiler.StepTraceAnnotation("step", step_num=step):
            advanced = advance(step, state, batch)
        if step == begin + steps - 1:
            jax.block_until_ready(advanced)
            jax.profiler.stop_trace()
            log.info("trace of %d steps in %s: xprof --logdir %s", steps, folder, folder)
        return advanced

    return advance_and_trace
