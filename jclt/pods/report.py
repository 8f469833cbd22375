"""A plan in words and tables."""

import math
from collections.abc import Callable
from typing import Any

from jclt.coders import CoderConfig
from jclt.pods.chips import GIB
from jclt.training.config import TrainConfig

Report = dict[str, Any]
KINDS = {
    "parameters": "parameters",
    "optimizer": "optimizer",
    "model": "language model",
    "other": "other state",
    "padding": "padding",
    "gradients": "gradients",
    "activations": "activations and other temporaries",
    "program": "program",
}
HEADROOM = 0.08
"""Share of the memory that a configuration should leave free: what the compiler does not see, such as profiles."""


def title(config: TrainConfig, report: Report) -> str:
    c: CoderConfig = config.coder
    mesh = "x".join(map(str, report["mesh"].values()))
    slices = f"{report['slices']} slices of " if report["slices"] > 1 else ""
    return (
        f"{c.kind} of {config.model}, {c.features:,} features a layer, on {slices}{report['topology']} "
        f"({report['chips']} chips, mesh {mesh}); {report['tokens_per_step']:,} tokens a step in "
        f"{report['micro_batches']} micro-batches"
    )


def plan_text(config: TrainConfig, report: Report) -> str:
    return "\n\n".join(text(config, report) for name, text in PARTS.items() if name == "step" or name in report)


def step_text(config: TrainConfig, report: Report) -> str:
    memory = report["memory"]
    lines = [title(config, report), f"parameters        {report['parameters']:,}"]
    if "refused" in report:
        given = ", ".join(f"{KINDS[k]} {memory[k] / GIB:.2f}" for k in KINDS if k in memory)
        lines += [f"memory            does not fit: {report['refused']}; of it {given} GiB"]
        return "\n".join(lines + [f"to make it fit    {line}" for line in advice(config, report)])
    parts = ", ".join(f"{name} {memory[kind] / GIB:.2f}" for kind, name in KINDS.items())
    lines += [
        f"memory            {memory['total'] / GIB:.2f} of {memory['limit'] / GIB:.2f} GiB a chip, "
        f"{memory['headroom']:.0%} free: {parts}",
        f"operations        {report['operations']:.3g} a chip and step",
        f"step              {milliseconds(report['seconds'])} by the compiler's schedule at "
        f"{report['clock'] / 1e9:.2f} GHz: {milliseconds(report['work_seconds'])} of work, "
        f"{milliseconds(report['exposed_seconds'])} of waiting for the links, of whose time work hides "
        f"{report['hidden']:.0%}",
        f"no less than      {milliseconds(report['floors']['products'])} (operations over peak), "
        f"{milliseconds(report['floors']['memory'])} (bytes over HBM bandwidth), "
        f"{milliseconds(report['floors']['links'])} (collectives over links)",
        f"utilisation       {report['utilisation']:.0%} of peak, optimizer included",
        f"speed             {report['tokens_per_second']:,.0f} tokens a second; {report['tokens']:.3g} tokens take "
        f"{report['tokens'] / report['tokens_per_second'] / 3600:.3g} hours, {report['chip_hours']:,.3g} chip-hours",
        "",
        "work              " + ", ".join(f"{k} {share(v, report)}" for k, v in report["stages"].items() if v > 0),
        f"{'traffic':<18}{'times':>6} {'GB':>8} {'ms':>8} {'waited':>8}  largest",
    ]
    for own in report["traffic"]:
        if own["seconds"] >= 0.001 * report["seconds"]:
            lines.append(
                f"  {own['stage']:<16}{own['times']:>6} {own['bytes'] / 1e9:>8.2f} {own['seconds'] * 1e3:>8.2f} "
                f"{own['exposed'] * 1e3:>8.2f}  {own['kind']} {own['largest']}"
            )
    if memory["headroom"] < HEADROOM:
        lines += ["", *(f"to leave {HEADROOM:.0%} free   {line}" for line in advice(config, report))]
    lines += ["", "An estimate from the TPU compiler's schedule, not a measurement."]
    return "\n".join(lines)


def calibration_text(config: TrainConfig, report: Report) -> str:
    off = report["calibration"]
    return (
        f"Of programs whose cost is known the schedule gives {off['product']:.2f} times that of a large product at "
        f"peak, {off['copy']:.2f} times that of a copy at full bandwidth, {off['all-reduce']:.2f} times that of an "
        "all-reduce over the links (for collectives the compiler gives no cycles: their time is bytes over links)."
    )


def sparse_text(config: TrainConfig, report: Report) -> str:
    own, dense = report["sparse"], report
    if "none" in own:
        return f"sparse path       none: {own['none']}"
    room = f"room for {own['room']:g} a token, layer and chip"
    head = f"sparse path       at {own['active']:g} active features a token, of all layers ({room}): "
    if "refused" in own:
        return f"{head}does not fit: {own['refused']}"
    times = dense["seconds"] / own["seconds"] if "refused" not in dense else math.inf
    verdict = f"{times:.2f} times as fast as" if times >= 1 else f"{1 / times:.2f} times as slow as"
    verdict = f"{verdict} the dense path" if times < math.inf else "the dense path does not fit"
    kernels = f"{milliseconds(own['kernel_seconds'])} of them kernels, by the bytes that full lists would move"
    return (
        f"{head}{milliseconds(own['seconds'])} a step, {kernels}; {own['memory']['total'] / GIB:.2f} GiB\n"
        f"                  {verdict}: {'--set path=sparse' if times > 1 else 'the dense path wins'}"
    )


def graphs_text(config: TrainConfig, report: Report) -> str:
    own = report["graphs"]
    room = f"{own['total'] / GIB:.2f} of {own['limit'] / GIB:.2f} GiB a chip"
    if own["total"] == own["given"]:
        return f"attribution       does not fit: each chip holds the whole coder and model, {room} in float32"
    verdict = "fits" if own["fits"] else "does not fit"
    return f"attribution       {verdict}: prompts of {own['prompt_length']} tokens, one a chip, take {room}"


PARTS: dict[str, Callable[[TrainConfig, Report], str]] = {
    "step": step_text,
    "sparse": sparse_text,
    "graphs": graphs_text,
    "calibration": calibration_text,
}
"""What a plan says, in this order; all but the step by their names in the report."""


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def share(seconds: float, report: Report) -> str:
    return f"{seconds / report['seconds']:.1%}"


def advice(config: TrainConfig, report: Report) -> list[str]:
    """What to change so that less memory is needed, the cheapest first."""
    memory, lines = report["memory"], []
    state = memory["parameters"] + memory["optimizer"]
    if state + memory["parameters"] < 0.9 * memory["limit"]:
        if config.length % (2 * config.micro_batches) == 0:
            lines.append(f"--set micro_batches={2 * config.micro_batches}: half as many activations at a time")
        if not config.remat:
            lines.append("--set remat=true: encodes once more in the backward pass instead of keeping pre-activations")
    if config.data_shards > report["slices"]:
        lines.append(f"--set data_shards={max(report['slices'], config.data_shards // 2)}: features over more chips")
    if config.moment_dtype == "float32" and config.beta1:
        lines.append("--set moment_dtype=bfloat16: half of the optimizer's first moment")
    lines.append("a larger slice, or fewer features")
    return lines


def sweep_text(rows: list[Report]) -> str:
    """One line a variant, the best first."""
    lines = [
        f"{'mesh':>9} {'micro':>5} {'remat':>5} {'step':>10} {'of peak':>7} {'tokens/s':>12} {'memory':>8} {'free':>5}"
    ]
    for own in rows:
        mesh = "x".join(map(str, own["mesh"].values()))
        head = f"{mesh:>9} {own['micro_batches']:>5} {str(own['remat']).lower():>5}"
        if "seconds" not in own:
            lines.append(f"{head} {own['refused']}")
            continue
        memory = own["memory"]
        lines.append(
            f"{head} {milliseconds(own['seconds']):>10} {own['utilisation']:>7.0%} {own['tokens_per_second']:>12,.0f} "
            f"{memory['total'] / GIB:>8.2f} {memory['headroom']:>5.0%}"
        )
    return "\n".join(lines)
