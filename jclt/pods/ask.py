"""What users ask for: a plan, or a comparison of several."""

import logging
from typing import Any

from tqdm import tqdm

from jclt.pods.pod import Pod, shape_of
from jclt.pods.report import plan_text, sweep_text
from jclt.pods.sweep import variants
from jclt.pods.worker import ask
from jclt.training.config import TrainConfig

log = logging.getLogger(__name__)


def plan_run(config: TrainConfig, pod: Pod, prompt_length: int = 0, active: float = 0.0) -> tuple[str, dict[str, Any]]:
    """The plan in words, and its figures; of the sparse path too where a number of active features is given."""
    log.info("compiling for %s, which takes a minute or several", pod.topology)
    report = ask("plan", config, shape_of(pod, config), pod, prompt_length, active)
    return plan_text(config, report), report


def plan_step(config: TrainConfig, pod: Pod) -> dict[str, Any]:
    """The figures of the train step alone."""
    return ask("plan_step", config, shape_of(pod, config), pod)


def plan_sweep(config: TrainConfig, pod: Pod) -> tuple[str, list[dict[str, Any]]]:
    """The variants of a run, the fastest of those that fit first."""
    reports = [plan_step(variant, pod) for variant in tqdm(list(variants(config, pod)), unit="plan")]
    reports.sort(key=lambda own: (not own["fits"], own.get("seconds", 0.0)))
    return sweep_text(reports), reports
