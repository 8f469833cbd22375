"""A plan as text and tables."""

import math
from collections.abc import Callable
from typing import Any

from jclt.coders import CoderConfig
from jclt.pods.chips import GIB
from jclt.training.config import TrainConfig

Report = dict[str, Any]
MEMORY_KINDS = {
    "parameters": "parameters",
    "optimizer": "optimizer",
    "model": "language model",
    "other": "other state",
    "padding": "padding",
    "gradients": "gradients",
    "activations": "activations and other temporaries",
    "program": "program",
}
GRAPH_PRECISIONS = ("float32", "bfloat16_3x")
"""Those of the products that edges are summed up from, for which graphs are planned."""
HEADROOM = 0.08
"""The share of the memory that a configuration should leave free, for what the compiler does not see, such as
profiles."""


def format_title(config: TrainConfig, report: Report) -> str:
    c: CoderConfig = config.coder
    mesh = "x".join(map(str, report["mesh"].values()))
    slices = f"{report['slices']} slices of " if report["slices"] > 1 else ""
    return (
        f"{c.kind} of {config.model}, {c.features:,} features a layer, on {slices}{report['topology']} "
        f"({report['chips']} chips, mesh {mesh}); {report['tokens_per_step']:,} tokens a step in "
        f"{report['micro_batches']} micro-batches"
    )


def format_plan(config: TrainConfig, report: Report) -> str:
    return "\n\n".join(text(config, report) for name, text in PARTS.items() if name == "step" or name in report)


def format_step(config: TrainConfig, report: Report) -> str:
    memory = report["memory"]
    lines = [format_title(config, report), f"parameters        {report['parameters']:,}"]
    if "refused" in report:
        parts = ", ".join(f"{MEMORY_KINDS[k]} {memory[k] / GIB:.2f}" for k in MEMORY_KINDS if k in memory)
        lines += [f"memory            does not fit: {report['refused']}; of it {parts} GiB"]
        return "\n".join(lines + [f"to make it fit    {line}" for line in advise(config, report)])
    parts = ", ".join(f"{name} {memory[kind] / GIB:.2f}" for kind, name in MEMORY_KINDS.items())
    lines += [
        f"memory            {memory['total'] / GIB:.2f} of {memory['limit'] / GIB:.2f} GiB a chip, "
        f"{memory['headroom']:.0%} free: {parts}",
        f"operations        {report['operations']:.3g} a chip and step",
        f"step              {format_milliseconds(report['seconds'])} by the compiler's schedule at "
        f"{report['clock'] / 1e9:.2f} GHz: {format_milliseconds(report['work_seconds'])} of work, "
        f"{format_milliseconds(report['exposed_seconds'])} of waiting for the links, of whose time work hides "
        f"{report['hidden']:.0%}",
        f"no less than      {format_milliseconds(report['floors']['products'])} (operations over peak), "
        f"{format_milliseconds(report['floors']['memory'])} (bytes over HBM bandwidth), "
        f"{format_milliseconds(report['floors']['links'])} (collectives over links)",
        f"utilisation       {report['utilisation']:.0%} of peak, optimizer included",
        f"speed             {report['tokens_per_second']:,.0f} tokens a second; {report['tokens']:.3g} tokens take "
        f"{report['tokens'] / report['tokens_per_second'] / 3600:.3g} hours, {report['chip_hours']:,.3g} chip-hours",
        "",
        "work              "
        + ", ".join(f"{k} {format_share(v, report)}" for k, v in report["stages"].items() if v > 0),
        f"{'traffic':<18}{'times':>6} {'GB':>8} {'ms':>8} {'waited':>8}  largest",
    ]
    for entry in report["traffic"]:
        if entry["seconds"] >= 0.001 * report["seconds"]:
            lines.append(
                f"  {entry['stage']:<16}{entry['times']:>6} {entry['bytes'] / 1e9:>8.2f} "
                f"{entry['seconds'] * 1e3:>8.2f} {entry['exposed'] * 1e3:>8.2f}  {entry['kind']} {entry['largest']}"
            )
    if memory["headroom"] < HEADROOM:
        lines += ["", *(f"to leave {HEADROOM:.0%} free   {line}" for line in advise(config, report))]
    lines += ["", "An estimate from the TPU compiler's schedule, not a measurement."]
    return "\n".join(lines)


def format_calibration(config: TrainConfig, report: Report) -> str:
    ratios = report["calibration"]
    return (
        f"Of programs whose cost is known the schedule gives {ratios['product']:.2f} times that of a large product at "
        f"peak, {ratios['copy']:.2f} times that of a copy at full bandwidth, {ratios['all-reduce']:.2f} times that of "
        "an all-reduce over the links (for collectives the compiler gives no cycles: their time is bytes over links)."
    )


def format_sparse(config: TrainConfig, report: Report) -> str:
    sparse, dense = report["sparse"], report
    if "none" in sparse:
        return f"sparse path       none: {sparse['none']}"
    capacity = f"capacity {sparse['room']:g} a token, layer and chip"
    head = f"sparse path       at {sparse['active']:g} active features a token, of all layers ({capacity}): "
    if "refused" in sparse:
        return f"{head}does not fit: {sparse['refused']}"
    times = dense["seconds"] / sparse["seconds"] if "refused" not in dense else math.inf
    verdict = f"{times:.2f} times as fast as" if times >= 1 else f"{1 / times:.2f} times as slow as"
    verdict = f"{verdict} the dense path" if times < math.inf else "the dense path does not fit"
    kernels = (
        f"{format_milliseconds(sparse['kernel_seconds'])} of them kernels, by the bytes that full lists would move"
    )
    return (
        f"{head}{format_milliseconds(sparse['seconds'])} a step, {kernels}; {sparse['memory']['total'] / GIB:.2f} GiB\n"
        f"                  {verdict}: {'--set path=sparse' if times > 1 else 'the dense path wins'}"
    )


def format_graphs(config: TrainConfig, report: Report) -> str:
    graphs, indent = report["graphs"], "\n                  "
    limit = f"{graphs['limit'] / GIB:.2f} GiB a chip"
    cut = f", columns up to layer {graphs['cut']}" if graphs["cut"] else ""
    lines = [
        f"attribution       prompts of {graphs['prompt_length']} tokens with {graphs['features']:,} active features, "
        f"{graphs['rows']:,} of them traced{cut}",
        f"each chip holds the model, {graphs['model'] / GIB:.2f} GiB, and traces prompts of its own in up to "
        f"{graphs['prompt'] / GIB:.2f} GiB",
    ]
    if not graphs["fits"]:
        return indent.join(
            [*lines, f"does not fit: expected at most {limit}; graphs of a model split over chips are not planned"]
        )
    for precision in GRAPH_PRECISIONS:
        seconds = sum(graphs[precision].values())
        shares = ", ".join(f"{name} {part / seconds:.0%}" for name, part in graphs[precision].items())
        lines.append(f"  {precision:<12} {seconds:.3g} s a graph: {shares}")
    for place in graphs["places"]:
        where = f"split over {place['chips']} chips" if place["chips"] > 1 else "on one chip"
        memory = f"{place['total'] / GIB:.2f} of {limit}, with {place['coder'] / GIB:.2f} GiB of coder"
        if not place["fits"]:
            lines.append(f"coder {where}: does not fit: {memory}")
            continue
        parts = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in place["parts"].items())
        lines.append(f"coder {where}: {memory}; beside it {parts} a graph, so that")
        for precision in GRAPH_PRECISIONS:
            seconds = sum_graph_seconds(graphs, place, precision)
            lines.append(
                f"  {precision:<12} {seconds:.3g} s a graph, {3600 / seconds:,.0f} graphs a chip-hour, "
                f"{graphs['chips'] / seconds:,.3g} a second on the slice"
            )
    lines.append("by the compiler's schedule of the chips' work; the host's work is not counted")
    return indent.join(lines)


def sum_graph_seconds(graphs: Report, place: Report, precision: str) -> float:
    """Of one graph on one chip, with the coder in this place."""
    return sum(graphs[precision].values()) + sum(place["parts"].values())


PARTS: dict[str, Callable[[TrainConfig, Report], str]] = {
    "step": format_step,
    "sparse": format_sparse,
    "graphs": format_graphs,
    "calibration": format_calibration,
}
"""The parts of a plan in their order. The figures of the step are at the top level of the report, those of the other
parts under their names."""


def format_milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def format_share(seconds: float, report: Report) -> str:
    return f"{seconds / report['seconds']:.1%}"


def advise(config: TrainConfig, report: Report) -> list[str]:
    """Changes that need less memory, those that cost least first."""
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


def format_sweep(reports: list[Report]) -> str:
    """One line for each variant, in their order."""
    lines = [
        f"{'mesh':>9} {'micro':>5} {'remat':>5} {'step':>10} {'of peak':>7} {'tokens/s':>12} {'memory':>8} {'free':>5}"
    ]
    for report in reports:
        mesh = "x".join(map(str, report["mesh"].values()))
        head = f"{mesh:>9} {report['micro_batches']:>5} {str(report['remat']).lower():>5}"
        if "seconds" not in report:
            lines.append(f"{head} {report['refused']}")
            continue
        memory = report["memory"]
        lines.append(
            f"{head} {format_milliseconds(report['seconds']):>10} {report['utilisation']:>7.0%} "
            f"{report['tokens_per_second']:>12,.0f} "
            f"{memory['total'] / GIB:>8.2f} {memory['headroom']:>5.0%}"
        )
    return "\n".join(lines)
