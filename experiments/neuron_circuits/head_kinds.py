"""Simple scores of heads: where they attend, and what they copy.

previous    mean attention to the position before, on random tokens
duplicate   mean attention to the earlier occurrence of the token, on random tokens repeated once
induction   mean attention to the position after the earlier occurrence, on the same
mover       from the last position of prompts about indirect objects: attention to the answer's name
inhibitor   from there: attention to the second occurrence of the subject
copying     share of names for which what the head makes of the name's embedding raises the name's logit above that of
            all other names
"""

import numpy as np

import jclt
from jclt.interventions import PromptPairs

LEAST = 0.3
"""A head is of the kind with the largest score from here on."""
REPEATED = 24


def measure_heads(model: jclt.Model, pairs: PromptPairs, seed: int = 0) -> dict[str, np.ndarray]:
    """Scores `[layers, heads]`."""
    random = np.random.default_rng(seed)
    tokens = random.integers(1000, model.config.vocabulary, (4, REPEATED))
    twice = np.concatenate([np.zeros((4, 1), int), tokens, tokens], axis=1)
    pattern = np.asarray(jclt.run(model, twice, capture=("pattern",))[1]["pattern"])
    late = np.arange(REPEATED + 1, 2 * REPEATED + 1)
    figures = {
        "previous": pattern[:, :, :, late, late - 1].mean(axis=(1, 3)),
        "duplicate": pattern[:, :, :, late, late - REPEATED].mean(axis=(1, 3)),
        "induction": pattern[:, :, :, late, late - REPEATED + 1].mean(axis=(1, 3)),
    }
    movers, inhibitors = [], []
    for ids, answers, wrong in zip(pairs.clean, pairs.answers, pairs.wrong_answers, strict=True):
        last = np.asarray(jclt.run(model, ids, capture=("pattern",))[1]["pattern"])[:, :, -1]
        names, subjects = np.flatnonzero(np.isin(ids, answers)), np.flatnonzero(np.isin(ids, wrong))
        if len(names) and len(subjects) > 1:
            movers.append(last[:, :, names].sum(axis=-1))
            inhibitors.append(last[:, :, subjects[-1]])
    figures |= {"mover": np.mean(movers, axis=0), "inhibitor": np.mean(inhibitors, axis=0)}
    names = np.unique([token for answers in (*pairs.answers, *pairs.wrong_answers) for token in answers])
    return figures | {"copying": measure_copying(model, names)}


def measure_copying(model: jclt.Model, names: np.ndarray) -> np.ndarray:
    """Through the first layer's MLP, as names are read later."""
    config, w = model.config, {name: np.asarray(x, np.float32) for name, x in model.params.items()}
    _, seen = jclt.run(model, names[:, None], capture=("resid_post",))
    x = np.asarray(seen["resid_post"])[0, :, 0]
    x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True))
    table = w["token_embedding" if config.tied else "unembedding"][names] * w["final_norm_gain"]
    found = np.zeros((config.layers, config.heads))
    for layer in range(config.layers):
        for head in range(config.heads):
            value = w["value"][layer][:, head * config.key_heads // config.heads]
            logits = (x * w["attn_norm_gain"][layer]) @ value @ w["attn_out"][layer, head] @ table.T
            found[layer, head] = (logits.argmax(axis=1) == np.arange(len(names))).mean()
    return found


def name_kind(figures: dict[str, np.ndarray], layer: int, head: int) -> str:
    """The kind with the largest attention score, if it is large enough; a mover must copy, too."""
    scores = {name: values[layer, head] for name, values in figures.items() if name != "copying"}
    if figures["copying"][layer, head] < LEAST:
        scores["mover"] = 0.0
    best = max(scores, key=lambda name: scores[name])
    return best if scores[best] >= LEAST else "other"
