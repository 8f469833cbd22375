"""Questions about the graphs of a coder on a set of prompts, such as `jclt eval --faithfulness`."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jclt.coders import Coder
from jclt.evaluation.faithfulness import measure_faithfulness
from jclt.evaluation.intervals import Figure, summarize_figures, tabulate
from jclt.models import Model
from jclt.shapes import Int

Measure = Callable[..., dict[str, Figure]]
QUESTIONS: dict[str, Measure] = {"faithfulness": measure_faithfulness}
"""Each takes the model, the coder, the prompts' token ids and a seed."""


def answer_questions(
    model: Model, coder: Coder, names: Sequence[str], prompts: Sequence[Int[np.ndarray, "T"]], seed: int = 0
) -> tuple[str, dict[str, Any]]:
    """Tables to print, and their figures by name."""
    texts, summaries = [], {}
    for name in names:
        figures = QUESTIONS[name](model, coder, prompts, seed=seed)
        texts.append(tabulate(f"{name}, {len(prompts)} prompts", figures))
        summaries[name] = summarize_figures(figures)
    return "\n\n".join(texts), summaries
