"""Pairs of prompts for the models in `golden/`, and single edited passes: what a whole grid is compared with."""

import numpy as np
from golden_cases import golden_model, reference

import jclt
from jclt.interventions import make_pairs
from jclt.models import Compose, Replace

LENGTH, RIGHT, WRONG = 8, [(5,), (7, 9)], [(11, 12), (13,)]
FAMILIES = ["gpt2", "gemma2", "gemma3", "llama3", "neox", "qwen3"]
FEW = ["gemma3", "neox"]
"""Post-norms, norms of queries and keys, sliding windows, grouped heads; parallel blocks with biases."""


def get_tokens(name):
    """Clean and corrupted prompts `[2, T]`, which differ in some tokens."""
    tokens = reference(name)["tokens"]
    clean = tokens[:, :LENGTH].copy()
    corrupted = clean.copy()
    corrupted[:, 2:4], corrupted[:, 6] = tokens[::-1, 9:11], tokens[::-1, 12]
    assert (clean != corrupted).any(axis=1).all()
    return clean, corrupted


def get_pairs(name):
    rows = zip(*get_tokens(name), RIGHT, WRONG, [(2, 4)] * 2, strict=True)
    return make_pairs(golden_model(name), rows)


def run_one(name, tokens, seen, site, **where):
    """The last logits of both prompts with the captured values of a site at one place, and those of the other sites
    nowhere: so one program serves all sites."""
    head = {"head": where.pop("head", slice(0, None))}
    at = {one: where if one == site else dict.fromkeys(where, slice(0, 0)) for one in seen}
    edits = [Replace({one: seen[one]}, **at[one], **(head if one == "head_out" else {})) for one in seen]
    return np.asarray(jclt.run(golden_model(name), tokens, edit=Compose(edits))[0][:, -1])


def compute_difference(logits):
    return np.array(
        [
            row[list(right)].mean() - row[list(wrong)].mean()
            for row, right, wrong in zip(logits, RIGHT, WRONG, strict=True)
        ]
    )
