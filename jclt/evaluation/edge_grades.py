"""Grades of circuits that consist of edges, by the formulas of `circuit_grades.py`.

    jclt.evaluation.grade_edges(model, pairs, scores)

A circuit has the edges with the largest scores in size. Edges that then lead nowhere are removed (`prune`); its size
still counts them, as the sizes of all circuits of one column of a table do.
"""

from collections.abc import Sequence

import numpy as np

from jclt.circuits.edge_circuits import run_edge_circuits
from jclt.circuits.edge_scores import EdgeScores
from jclt.circuits.edges import list_edges, prune_edges, take_best, take_best_connected
from jclt.circuits.node_runs import Ablation
from jclt.errors import UserError
from jclt.evaluation.circuit_grades import RANDOM, SHARES, CircuitGrades, check_range, check_sizes, share_sizes
from jclt.interventions import PromptPairs
from jclt.models import Model, ModelConfig
from jclt.shapes import Bool, Float


def list_sizes(config: ModelConfig, shares: Sequence[float] = SHARES) -> tuple[int, ...]:
    """Numbers of edges, each once."""
    return share_sizes(int(list_edges(config).sum()), shares)


def choose_edges(
    config: ModelConfig, scores: Float[np.ndarray, "s r"], size: int, *, connected: bool = False, prune: bool = True
) -> Bool[np.ndarray, "s r"]:
    kept = (take_best_connected if connected else take_best)(config, scores, size)
    return prune_edges(config, kept) if prune else kept


def grade_edges(
    model: Model,
    pairs: PromptPairs,
    scores: EdgeScores | Sequence[EdgeScores],
    sizes: Sequence[int] | None = None,
    *,
    connected: bool = False,
    prune: bool = True,
    ablation: Ablation = "counterfactual",
    mean_of: PromptPairs | None = None,
    draws: int = 3,
    seed: int = 0,
) -> list[CircuitGrades]:
    """Grades circuits of the best edges by each of the scores, and last random circuits.

    pairs       those that grade; better not those that the scores are of
    sizes       numbers of edges, by default `list_sizes`
    connected   whether edges are added from the logits down, rather than by their scores alone
    ablation    of the edges outside: counterfactual, mean, zero or resample; `mean_of` other pairs if given
    draws       of random orders, whose values are averaged
    """
    all_scores, config = [scores] if isinstance(scores, EdgeScores) else list(scores), model.config
    if len({s.metric for s in all_scores}) != 1 or any(s.config != config for s in all_scores):
        raise UserError("scores: expected those of one metric, and of this model's edges")
    metric, edges = all_scores[0].metric, list_edges(config)
    total = int(edges.sum())
    sizes = check_sizes(list_sizes(config) if sizes is None else sizes, total)
    generator = np.random.default_rng(seed)
    orders = [s.values for s in all_scores] + [generator.random(edges.shape) for _ in range(draws)]
    circuits = np.stack(
        [choose_edges(config, o, size, connected=connected, prune=prune) for o in orders for size in sizes]
    )
    masks = np.concatenate([circuits, edges & ~circuits, edges[None], np.zeros_like(edges)[None]])
    values = run_edge_circuits(model, pairs, masks, ablation=ablation, mean_of=mean_of, metric=metric, seed=seed)
    check_range(values[-2], values[-1])
    circuit, rest = values[:-2].reshape(2, len(orders), len(sizes), -1)
    count = len(all_scores)
    rows = [(s.method, circuit[i], rest[i]) for i, s in enumerate(all_scores)]
    if draws:
        rows.append((RANDOM, circuit[count:].mean(axis=0), rest[count:].mean(axis=0)))
    ends = (values[-2], values[-1])
    return [CircuitGrades(name, "edges", total, sizes, c, r, *ends, ablation, metric) for name, c, r in rows]
