"""All case studies in one table: the paper's figure, ours with its control, the verdict and the command of each.

    python experiments/all.py                   # three seeds of 24 prompts
    python experiments/all.py --prompts 4       # to see that everything runs
    python experiments/all.py --others          # also OTHERS, with tables of their own

Nothing is trained. Figures and graphs of each study go to runs/case_studies/. Expected: the table in README.md.
Cost: with --others and SmolLM2, where it is installed, 8 to 13 minutes on two CPU cores, beside other programs.
"""

import argparse
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

HERE = Path(__file__).parent
STUDIES = (
    *("two_hop", "addition", "acronym", "factual_recall", "agreement", "antonyms", "successor", "brackets"),
    *("greater_than", "indirect_object", "attention", "per_layer", "pruning", "depth"),
)
OTHERS = ("intermediates.py", "concept_probes.py", "group_names.py", "global_weights.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, help="of each of three seeds (default: 24)")
    parser.add_argument("--out", type=Path, default=Path("runs/case_studies"))
    parser.add_argument("--others", action="store_true")
    options = parser.parse_args()
    sys.path.insert(0, str(HERE / "case_studies"))
    report, start = import_module("report"), time.perf_counter()
    scripts = [HERE / "case_studies/smollm2.py", *(HERE / name for name in OTHERS if options.others)]
    with ThreadPoolExecutor(1) as second_core:
        printed = {script: second_core.submit(run_script, script) for script in scripts}
        print(report.write_head("command"), flush=True)
        for name in STUDIES:
            study = import_module(name).STUDY
            rows = report.run_study(study, options.prompts or report.PROMPTS)
            for row in rows:
                print(report.write_row(name, row), f"`python experiments/case_studies/{name}.py` |", flush=True)
            report.write_files(study, rows, options.out / name)
        for script, text in printed.items():
            print(f"\npython experiments/{script.relative_to(HERE)}\n{text.result()}", flush=True)
    print(f"{time.perf_counter() - start:.0f} seconds; figures and graphs are in {options.out}")


def run_script(script: Path) -> str:
    """What the script prints; it runs beside the studies."""
    return subprocess.run([sys.executable, script], check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
