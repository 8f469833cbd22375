"""The public calls: the plan of a run, or the comparison of several variants of it."""

from collections.abc import Callable
from contextlib import closing
from typing import Any

from jclt.pods.report import PARTS, format_graphs, format_plan, format_sweep
from jclt.pods.slices import Pod, find_model_config
from jclt.pods.variants import list_variants
from jclt.pods.worker import Job, run_job, run_jobs
from jclt.training.coder.sparse import explain_why_not_sparse
from jclt.training.config import TrainConfig


def plan_run(
    config: TrainConfig,
    pod: Pod,
    prompt_length: int = 0,
    active: float = 0.0,
    show: Callable[[str], object] = lambda part: None,
) -> tuple[str, dict[str, Any]]:
    """The plan as text, and its figures. With a number of active features the sparse path is planned too, and with a
    prompt length the programs of attribution graphs. `show` gets the text of each part as soon as it is ready."""
    jobs = _list_jobs(config, pod, prompt_length, active)
    report: dict[str, Any] = {}
    with closing(run_jobs(jobs)) as answers:
        for name, text in PARTS.items():
            if name in jobs:
                _, figures = next(answers)
                report |= figures if name == "step" else {name: figures}
            elif name == "sparse" and active:
                report[name] = {"active": active, "none": explain_why_not_sparse(config)}
            if name == "step" or name in report:
                show(text(config, report))
    return format_plan(config, report), report


def _list_jobs(config: TrainConfig, pod: Pod, prompt_length: int, active: float) -> dict[str, Job]:
    model = find_model_config(pod, config)
    jobs = {"step": Job(f"the train step for {pod.topology}", "compile_step", (config, model, pod))}
    if active and not explain_why_not_sparse(config):
        jobs["sparse"] = Job("the train step on the sparse path", "compile_step", (config, model, pod, active))
    if prompt_length:
        jobs["graphs"] = Job(
            "the attribution programs", "plan_attribution", (config, model, pod, prompt_length, active)
        )
    jobs["calibration"] = Job("programs whose cost is known", "calibrate", (pod,))
    return jobs


def plan_prompts(config: TrainConfig, pod: Pod, prompt_length: int, active: float = 0.0) -> tuple[str, dict[str, Any]]:
    """The plan of attribution graphs alone, as text and figures."""
    arguments = config, find_model_config(pod, config), pod, prompt_length, active
    report = {"graphs": run_job(Job("the attribution programs", "plan_attribution", arguments))}
    return format_graphs(config, report), report


def plan_step(config: TrainConfig, pod: Pod) -> dict[str, Any]:
    """The figures of the dense train step alone."""
    return run_job(Job("the train step", "compile_step", (config, find_model_config(pod, config), pod)))


def plan_sweep(config: TrainConfig, pod: Pod) -> tuple[str, list[dict[str, Any]]]:
    """A table of the variants of a run, and their figures: those that fit first, the fastest first."""
    variants = list(list_variants(config, pod))
    jobs = {
        str(number): Job(
            f"variant {number} of {len(variants)}", "compile_step", (variant, find_model_config(pod, config), pod)
        )
        for number, variant in enumerate(variants, 1)
    }
    reports = [report for _, report in run_jobs(jobs)]
    reports.sort(key=lambda report: (not report["fits"], report.get("seconds", 0.0)))
    return format_sweep(reports), reports
