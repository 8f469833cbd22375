"""Plans every configuration of this folder and writes the tables in README.md, and the figures to plans.json.

    python tpu_configs/plan_all.py                all of them, which takes an hour or two on 2 cores
    python tpu_configs/plan_all.py gpt2 qwen      those whose names contain one of these
    python tpu_configs/plan_all.py --graphs gpt2  attribution graphs in place of training

What is not planned again keeps its figures.
"""

import json
import sys
import time
from datetime import date
from pathlib import Path

from jclt.config import load_settings
from jclt.pods import load_pod, plan_prompts, plan_run
from jclt.pods.chips import GIB
from jclt.pods.report import GRAPH_PRECISIONS, sum_graph_seconds
from jclt.training.config import TrainConfig

HERE = Path(__file__).parent
FIGURES, TABLE = HERE / "plans.json", HERE / "README.md"
TOKENS, ACTIVE = 20, 375.0
"""Of the prompts whose graphs are planned: 7,500 active features over all layers."""
HEAD = (
    "| configuration | chips | parameters | memory a chip, GiB | free | step, s | of peak | waited for links | "
    "tokens/s | chip-hours for 10^9 tokens | compiled in, s |\n|---|---|---|---|---|---|---|---|---|---|---|\n"
)

GRAPHS_HEAD = (
    "| configuration | chips that hold the coder | memory a chip, GiB: model, coder, the prompt's arrays | s a graph, "
    "float32 | bfloat16_3x | of it encoding and reading rows | graphs a chip-hour, float32 | bfloat16_3x | graphs a "
    "second on the slice, float32 | bfloat16_3x |\n|---|---|---|---|---|---|---|---|---|---|\n"
)


def format_row(name: str, plan: dict) -> str:
    memory = plan["memory"]
    return (
        f"| {name} | {plan['chips']} | {plan['parameters'] / 1e9:.1f}e9 | {memory['total'] / GIB:.1f} of "
        f"{memory['limit'] / GIB:.1f} | {memory['headroom']:.0%} | {plan['seconds']:.3f} | {plan['utilisation']:.0%} | "
        f"{plan['exposed_seconds'] / plan['seconds']:.0%} | {plan['tokens_per_second']:,.0f} | "
        f"{plan['chips'] * 1e9 / plan['tokens_per_second'] / 3600:,.0f} | {plan['compile_seconds']:.0f} |\n"
    )


def format_graph_rows(name: str, plan: dict) -> str:
    graphs = plan["graphs"]
    if not graphs["fits"]:
        kinds = f"{graphs['model'] / GIB:.1f}, none, {graphs['prompt'] / GIB:.1f}"
        total = (graphs["model"] + graphs["prompt"]) / GIB
        return f"| {name} | | does not fit: {total:.1f} of {graphs['limit'] / GIB:.1f}: {kinds}{' |' * 8}\n"
    rows = ""
    for place in graphs["places"]:
        kinds = graphs["model"], place["coder"], place["total"] - graphs["model"] - place["coder"]
        memory = f"{place['total'] / GIB:.1f} of {graphs['limit'] / GIB:.1f}"
        memory = f"{memory}: {', '.join(f'{kind / GIB:.1f}' for kind in kinds)}"
        if not place["fits"]:
            rows += f"| {name} | {place['chips']} | does not fit: {memory}{' |' * 8}\n"
            continue
        seconds = [sum_graph_seconds(graphs, place, precision) for precision in GRAPH_PRECISIONS]
        cells = [*(f"{x:.3g}" for x in seconds), f"{sum(place['parts'].values()):.2g}"]
        cells += [f"{3600 / x:,.0f}" for x in seconds] + [f"{graphs['chips'] / x:,.3g}" for x in seconds]
        rows += f"| {name} | {place['chips']} | {memory} | {' | '.join(cells)} |\n"
    return rows


def write_table(name: str, table: str, plans: list[dict]) -> None:
    """Writes a table between its marks."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    before, _, from_table = TABLE.read_text().partition(begin)
    versions = sorted({f"{plan['date']}, JAX {plan['jax']}, libtpu {plan['libtpu']}" for plan in plans})
    after = from_table.partition(end)[2]
    TABLE.write_text(f"{before}{begin}{table}\nPlanned on {'; '.join(versions)}.\n{end}{after}")


def main(names: list[str]) -> None:
    of_graphs, names = "--graphs" in names, [name for name in names if name != "--graphs"]
    figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    for path in sorted(HERE.glob("*_v[0-9]*.py")):
        if names and not any(part in path.stem for part in names):
            continue
        began, today, before = time.perf_counter(), {"date": date.today().isoformat()}, figures.get(path.stem, {})
        config, pod = load_settings(str(path), TrainConfig, {}), load_pod(str(path), None, None)
        if of_graphs:
            text, report = plan_prompts(config, pod, TOKENS, ACTIVE)
            figures[path.stem] = before | {"graphs": report["graphs"] | today}
        else:
            text, report = plan_run(config, pod)
            figures[path.stem] = {name: before[name] for name in ("graphs",) if name in before} | report | today
        print(f"{text}\n\n{path.stem}: {time.perf_counter() - began:.0f} s\n", flush=True)
        FIGURES.write_text(json.dumps(figures, indent=1))
    steps = {name: plan for name, plan in sorted(figures.items()) if "seconds" in plan}
    write_table("plans", HEAD + "".join(format_row(*item) for item in steps.items()), list(steps.values()))
    graphs = {name: plan for name, plan in sorted(figures.items()) if "graphs" in plan}
    table = GRAPHS_HEAD + "".join(format_graph_rows(*item) for item in graphs.items())
    write_table("graphs", table, [plan["graphs"] for plan in graphs.values()])


if __name__ == "__main__":
    main(sys.argv[1:])
