"""A trace of some steps, for XProf."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

log = logging.getLogger(__name__)
Advance = Callable[[int, Any, Any], tuple[Any, Any]]


def profiled(advance: Advance, first: int, steps: int, folder: Path) -> Advance:
    """`advance`, which also traces `steps` steps, if any, from the second one on: the first compiles."""
    if steps < 1:
        return advance
    begin = first + 1

    def traced(step: int, state: Any, batch: Any) -> tuple[Any, Any]:
        if step == begin:
            jax.block_until_ready(state)
            jax.profiler.start_trace(folder)
        with jax.profiler.StepTraceAnnotation("step", step_num=step):
            made = advance(step, state, batch)
        if step == begin + steps - 1:
            jax.block_until_ready(made)
            jax.profiler.stop_trace()
            log.info("trace of %d steps in %s: xprof --logdir %s", steps, folder, folder)
        return made

    return traced
