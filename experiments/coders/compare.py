"""Train sparse coders of two kinds, two activations and three sparsities on one model, and measure all in the same way.

    python experiments/coders/compare.py                      # of the small world's model
    python experiments/coders/compare.py --model FOLDER       # of another one, on text sampled from it
    python experiments/coders/compare.py --share 0 2          # every second coder, beside another process with 1 2
    python experiments/coders/compare.py --small              # a few steps each, to see that everything runs

Coders that are in --out already are not trained again, so the last process to end prints the whole table. README.md in
this folder has the expected numbers and their cost.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from jclt.coders import SparseCoder, load_coder, save_coder
from jclt.errors import Interrupted, UserError
from jclt.evaluation import evaluate_reconstruction, evaluate_replacement, exchange_states, measure_world_agreement
from jclt.models import Model, generate, load_model
from jclt.training.coder.train import train_coder
from jclt.training.config import TrainConfig
from jclt.training.presets import CODER_PRESETS
from jclt.world import make_corpus

Figures = Mapping[str, float | str]

# ---------------------------------------------------------------- which coders


TANH_WEIGHTS = {24: 0.38, 12: 1.1, 48: 0.13}
"""The weight of JumpReLU's penalty that leads to about k active features on the small world, for each k."""


def make_configs(base: TrainConfig) -> dict[str, TrainConfig]:
    """The configuration of each coder, by its name. The last two train the sparsest coder twice as long: as
    before, or the second half end to end."""
    configs: dict[str, TrainConfig] = {}
    jumping = replace(base, sparsity="tanh", sparsity_ramp=0.5)
    for kind in ("clt", "transcoder"):
        for k, weight in TANH_WEIGHTS.items():
            coder = replace(base.coder, kind=kind, activation="batchtopk", k=k)
            configs[f"{kind} batchtopk k={k}"] = replace(base, coder=coder)
            coder = replace(base.coder, kind=kind, activation="jumprelu", k=None)
            configs[f"{kind} jumprelu w={weight}"] = replace(jumping, coder=coder, sparsity_weight=weight)
    longer = replace(configs["clt batchtopk k=12"], steps=2 * base.steps)
    configs["clt batchtopk k=12, twice the steps"] = longer
    configs["clt batchtopk k=12, the second half end to end"] = replace(longer, end_to_end_steps=base.steps)
    return configs


# ---------------------------------------------------------------- what they are trained and measured on


@dataclass(frozen=True)
class World:
    """The small world's model, whose right answers are known."""

    model: Model
    rows: np.ndarray  # held out
    prompts: int  # of each task
    data: str = "world"

    def figures(self, coder: SparseCoder) -> Figures:
        held_out, trained = (
            measure_world_agreement(self.model, coder, self.prompts, split=split) for split in ("report", "train")
        )
        moved = {size: exchange_states(self.model, coder, size=size) for size in (8, 16)}
        weakest = held_out.weakest()
        return {
            "agreement": held_out.overall.agreement,
            "trained": trained.overall.agreement,
            "weakest": f"{weakest} {held_out.tasks[weakest].agreement:.1%}",
            "ablated": held_out.overall.ablated_agreement,
            "exchange, 8": moved[8].moved,
            "exchange, 16": moved[16].moved,
            "exchange, drawn": moved[16].control,
        }


@dataclass(frozen=True)
class Other:
    """Any other model, with text sampled from it."""

    model: Model
    rows: np.ndarray
    data: str

    def figures(self, coder: SparseCoder) -> Figures:
        replacement = evaluate_replacement(self.model, coder, self.rows)
        return {
            "agreement": replacement.agreement,
            "KL": replacement.kl,
            "recovered": replacement.recovered,
            "ablated": replacement.ablated_agreement,
            "ablated KL": replacement.ablated_kl,
        }


def make_world(model: Model, small: bool) -> World:
    assert model.tokenizer is not None
    held_out = make_corpus(64 if small else 1600, 64, seed=1, vocabulary=model.tokenizer.backend.get_vocab()).tokens
    return World(model, held_out, prompts=25 if small else 400)


def make_other(model: Model, folder: Path, small: bool) -> Other:
    assert model.tokenizer is not None
    folder.mkdir(parents=True, exist_ok=True)
    path, held_out = folder / "train.jsonl", folder / "held_out.npy"
    if not held_out.exists():
        texts = [model.tokenizer.decode(ids) for seed in range(1 if small else 3) for ids in sample_rows(model, seed)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        np.save(held_out, sample_rows(model, 100))
    return Other(model, np.load(held_out), str(path))


def sample_rows(model: Model, seed: int) -> np.ndarray:
    """256 rows of 256 tokens, sampled from the model after its first token."""
    start = np.full((256, 1), model.config.bos_token)
    rows = generate(model, start, 255, temperature=1.0, seed=seed, stop_tokens=())
    assert isinstance(rows, np.ndarray)
    return rows


# ---------------------------------------------------------------- the table


def measure_coder(subject: World | Other, config: TrainConfig, folder: Path) -> Figures:
    """The figures of one coder. Trains it if the folder does not hold them yet."""
    report = folder / "report.json"
    if report.exists():
        return json.loads(report.read_text())
    start = time.perf_counter()
    trained = train_coder(config, folder)
    seconds = time.perf_counter() - start
    half = folder / "half"
    if not half.exists():
        save_coder(trained, half, dtype="float16")
    coder = load_coder(half, keep="device")
    reconstruction = evaluate_reconstruction(subject.model, coder, subject.rows)
    figures = {
        "seconds": round(seconds),
        "MB": sum(path.stat().st_size for path in half.iterdir()) / 1e6,
        "L0": float(reconstruction.l0.sum()),
        "NMSE": float(reconstruction.nmse.mean()),
        "dead": float(np.mean(reconstruction.density == 0)),
        **subject.figures(coder),
    }
    report.write_text(json.dumps(figures, indent=1) + "\n")
    return figures


FORMATS = {"seconds": ".0f", "MB": ".1f", "L0": ".1f", "NMSE": ".4f", "KL": ".3f", "ablated KL": ".3f", "weakest": ""}
"""All other figures are shares."""


def format_table(figures_by_coder: Mapping[str, Figures]) -> str:
    names = list(next(iter(figures_by_coder.values())))
    lines = [f"| coder | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for coder, figures in figures_by_coder.items():
        lines.append(f"| {coder} | {' | '.join(format(figures[n], FORMATS.get(n, '.1%')) for n in names)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--out", type=Path, default=Path("runs/coders"))
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1), metavar=("NUMBER", "OF"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--small", action="store_true", help="20 steps each")
    options = parser.parse_args()
    folder = options.out / Path(options.model).name
    model = load_model(options.model)
    subject = (
        make_world(model, options.small)
        if options.model == "demo"
        else make_other(model, folder / "text", options.small)
    )
    base = replace(CODER_PRESETS["tiny"](), model=options.model, data=subject.data)
    base = replace(base, steps=20, warmup=5) if options.small else replace(base, steps=options.steps)
    runs = {
        name: (config, folder / name.replace(" ", "-").replace(",", "")) for name, config in make_configs(base).items()
    }
    number, of = options.share
    for name, (config, run) in list(runs.items())[number::of]:
        print(format_table({name: measure_coder(subject, config, run)}), flush=True)
    reports = {name: run / "report.json" for name, (_, run) in runs.items()}
    print(format_table({name: json.loads(path.read_text()) for name, path in reports.items() if path.exists()}))


if __name__ == "__main__":
    try:
        main()
    except (UserError, Interrupted) as reason:
        sys.exit(str(reason))
