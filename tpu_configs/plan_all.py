"""Plans every configuration of this folder and writes the table in README.md, and the figures to plans.json.

    python tpu_configs/plan_all.py            all of them, which takes an hour or two on 2 cores
    python tpu_configs/plan_all.py gpt2 qwen  those whose names contain one of these

Configurations that are not planned again keep their figures.
"""

import json
import sys
import time
from datetime import date
from pathlib import Path

from jclt.config import load_settings
from jclt.pods import load_pod, plan_run
from jclt.pods.chips import GIB
from jclt.training.config import TrainConfig

HERE = Path(__file__).parent
FIGURES, TABLE = HERE / "plans.json", HERE / "README.md"
BEGIN, END = "<!-- plans -->\n", "<!-- end of plans -->\n"
HEAD = (
    "| configuration | chips | parameters | memory a chip, GiB | free | step, s | of peak | waited for links | "
    "tokens/s | chip-hours for 10^9 tokens | compiled in, s |\n|---|---|---|---|---|---|---|---|---|---|---|\n"
)


def format_row(name: str, plan: dict) -> str:
    memory = plan["memory"]
    return (
        f"| {name} | {plan['chips']} | {plan['parameters'] / 1e9:.1f}e9 | {memory['total'] / GIB:.1f} of "
        f"{memory['limit'] / GIB:.1f} | {memory['headroom']:.0%} | {plan['seconds']:.3f} | {plan['utilisation']:.0%} | "
        f"{plan['exposed_seconds'] / plan['seconds']:.0%} | {plan['tokens_per_second']:,.0f} | "
        f"{plan['chips'] * 1e9 / plan['tokens_per_second'] / 3600:,.0f} | {plan['compile_seconds']:.0f} |\n"
    )


def main(names: list[str]) -> None:
    figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    for path in sorted(HERE.glob("*_v[0-9]*.py")):
        if names and not any(part in path.stem for part in names):
            continue
        began = time.perf_counter()
        text, report = plan_run(load_settings(str(path), TrainConfig, {}), load_pod(str(path), None, None))
        print(f"{text}\n\n{path.stem}: {time.perf_counter() - began:.0f} s\n", flush=True)
        figures[path.stem] = report | {"date": date.today().isoformat()}
        FIGURES.write_text(json.dumps(figures, indent=1))
    before, _, from_table = TABLE.read_text().partition(BEGIN)
    after = from_table.partition(END)[2]
    rows = "".join(format_row(name, plan) for name, plan in sorted(figures.items()) if "seconds" in plan)
    versions = sorted({f"{plan['date']}, JAX {plan['jax']}, libtpu {plan['libtpu']}" for plan in figures.values()})
    TABLE.write_text(f"{before}{BEGIN}{HEAD}{rows}\nPlanned on {'; '.join(versions)}.\n{END}{after}")


if __name__ == "__main__":
    main(sys.argv[1:])
