"""What users ask for: a plan, or a comparison of several."""

from collections.abc import Callable
from contextlib import closing
from typing import Any

from jclt.pods.report import PARTS, plan_text, sweep_text
from jclt.pods.slices import Pod, shape_of
from jclt.pods.variants import variants
from jclt.pods.worker import Job, ask, ask_each
from jclt.training.coder.sparse import reason_against
from jclt.training.config import TrainConfig


def plan_run(
    config: TrainConfig,
    pod: Pod,
    prompt_length: int = 0,
    active: float = 0.0,
    say: Callable[[str], object] = lambda part: None,
) -> tuple[str, dict[str, Any]]:
    """The plan in words, and its figures; of the sparse path too where a number of active features is given, and of the
    programs that graphs are made with where a length of prompts is. Each part is said as soon as it is ready."""
    jobs = _jobs(config, pod, prompt_length, active)
    report: dict[str, Any] = {}
    with closing(ask_each(jobs)) as answers:
        for name, text in PARTS.items():
            if name in jobs:
                _, own = next(answers)
                report |= own if name == "step" else {name: own}
            elif name == "sparse" and active:
                report[name] = {"active": active, "none": reason_against(config)}
            if name == "step" or name in report:
                say(text(config, report))
    return plan_text(config, report), report


def _jobs(config: TrainConfig, pod: Pod, prompt_length: int, active: float) -> dict[str, Job]:
    model = shape_of(pod, config)
    jobs = {"step": Job(f"the train step for {pod.topology}", "compile_step", (config, model, pod))}
    if active and not reason_against(config):
        jobs["sparse"] = Job("the train step on the sparse path", "compile_step", (config, model, pod, active))
    if prompt_length:
        jobs["graphs"] = Job("the attribution programs", "plan_attribution", (config, model, pod, prompt_length))
    jobs["calibration"] = Job("programs whose cost is known", "calibrate", (pod,))
    return jobs


def plan_step(config: TrainConfig, pod: Pod) -> dict[str, Any]:
    """The figures of the train step alone."""
    return ask(Job("the train step", "compile_step", (config, shape_of(pod, config), pod)))


def plan_sweep(config: TrainConfig, pod: Pod) -> tuple[str, list[dict[str, Any]]]:
    """The variants of a run, the fastest of those that fit first."""
    found = list(variants(config, pod))
    jobs = {
        str(number): Job(f"variant {number} of {len(found)}", "compile_step", (variant, shape_of(pod, config), pod))
        for number, variant in enumerate(found, 1)
    }
    reports = [report for _, report in ask_each(jobs)]
    reports.sort(key=lambda own: (not own["fits"], own.get("seconds", 0.0)))
    return sweep_text(reports), reports
