"""Questions about the graphs of a coder on a set of prompts, such as `jclt eval --faithfulness`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jclt.coders import Coder
from jclt.evaluation.circuits import measure_circuits
from jclt.evaluation.distances import measure_distances
from jclt.evaluation.faithfulness import measure_faithfulness
from jclt.evaluation.graph_figures import measure_graphs, threshold_neurons
from jclt.evaluation.intervals import Figure, summarize_figures, tabulate
from jclt.models import Model
from jclt.shapes import Int

Measure = Callable[..., dict[str, Figure]]
QUESTIONS: dict[str, Measure] = {
    "graphs": measure_graphs,
    "faithfulness": measure_faithfulness,
    "circuits": measure_circuits,
    "distances": measure_distances,
}
"""Each takes the model, the coder, the prompts' token ids and a seed."""
THRESHOLDED = "thresholded-neurons"
"""The name of the model's neurons above a threshold, of which as many are active as features of the coder."""


def answer_questions(
    model: Model,
    coders: Mapping[str, Coder | None],
    names: Sequence[str],
    prompts: Sequence[Int[np.ndarray, "_"]],
    seed: int = 0,
) -> tuple[str, dict[str, Any]]:
    """Tables to print, and their figures by name, of one coder or of several side by side. A coder that is None is made
    from the first one: its name is `thresholded-neurons`."""
    first = next(coder for coder in coders.values() if coder is not None)
    texts, summaries = [], {}
    for name in names:
        tables = {}
        for label, coder in coders.items():
            measured = coder or threshold_neurons(model, first, prompts)
            tables[label] = QUESTIONS[name](model, measured, prompts, seed=seed)
        texts.append(tabulate(f"{name}, {len(prompts)} prompts", tables))
        summaries[name] = {label: summarize_figures(table) for label, table in tables.items()}
    return "\n\n".join(texts), summaries
