"""Weights that hold for every prompt, and what they say of addition.

    python experiments/global_weights.py

Draws what each feature of the shipped coder is in addition (its activation at `=` for all pairs of operands), and the
weights among the features that are most often active. Then asks whether weights explain addition: the grid of a target
j as predicted through the residual stream alone, without attention and without the norm, from grids G of features of
lower layers and their virtual weights V,

    predicted(a, b) = sum over features i of lower layers  V[j, i] G_i(a, b)

should be larger for the pairs on which j is active than for the others: printed is the share of pairs of pairs in the
right order (area under the ROC curve; 0.5 by chance), beside that of the weights of another target of its layer.
Expected:
38%, 68% and 82% of the largest positive, the largest negative and all virtual weights join features that are
never active together; sums (diagonals) are predicted with 0.67, 0.79 and 0.93 in layers 1 to 3, control 0.46 to 0.53.
Cost: 90 seconds of processor time.
"""

import argparse
from pathlib import Path

import numpy as np

from jclt import load_coder, load_model
from jclt.evaluation import OperandGrids, measure_global_weights, measure_operand_grids
from jclt.evaluation.circuit_grades import area_under_roc
from jclt.evaluation.global_weights import choose_often_active, compute_virtual_weights
from jclt.evaluation.intervals import average_prompts
from jclt.features.rows import find_rows
from jclt.viewer import draw_global_weights, draw_operand_grids

OPERANDS = range(10, 100)
ROWS, LENGTH, EACH = 512, 64, 128
SHAPES = ("diagonal", "grid", "other")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/global_weights"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    model = load_model("demo")
    coder = load_coder("demo", model=model)

    data = find_rows(model, "world", ROWS, LENGTH)
    rows = np.asarray(data.tokens[data.numbers])
    weights = measure_global_weights(model, coder, rows, choose_often_active(model, coder, rows, EACH))
    title = f"{len(weights.features)} features, {weights.tokens} tokens of the small world"
    draw_global_weights(weights, options.out / "global_weights.png", title=title)
    for name, share in weights.measure_interference().items():
        print(f"never active together, {name} virtual weights: {share:.0%}")

    grids = measure_operand_grids(model, coder, operands=OPERANDS)
    draw_operand_grids(grids, options.out / "operand_grids.png", title="calc: {a}+{b}=, activations at '='")
    print(grids.count_shapes())
    virtual = compute_virtual_weights(model, coder, grids.features)
    print("layer  shape     targets  right order            weights of another target")
    for layer in coder.config.covered[1:]:
        for shape in SHAPES:
            chosen = np.flatnonzero((grids.features[:, 0] == layer) & (np.array(grids.shapes) == shape))
            if len(chosen) > 1:
                pairs = zip(chosen.tolist(), np.roll(chosen, 1).tolist(), strict=True)
                ordered = [measure_order(grids, virtual[j], j) for j in chosen.tolist()]
                other = [measure_order(grids, virtual[k], j) for j, k in pairs]
                print(f"{layer:5}  {shape:8}  {len(chosen):7}  {average_prompts(ordered)}  {average_prompts(other)}")
    print(f"pictures: {options.out}")


def measure_order(grids: OperandGrids, weights: np.ndarray, target: int) -> float:
    """How often the prediction is larger for a pair on which the target is active than for one on which it is not."""
    predicted, active = np.tensordot(weights, grids.grids, 1), grids.grids[target] > 0
    return float("nan") if active.all() else area_under_roc(predicted, active)


if __name__ == "__main__":
    main()
