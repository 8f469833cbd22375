"""Interventions: what happens to the model when a part of it is changed, beside what an attribution graph predicts.

Reading order, of features: `intervene.py` (what users call), `settings.py` (how the model reacts), `changes.py` (edits
of features as arrays), `feature_pass.py` (a pass with changed features), `result.py` (what is measured), `nodes.py`
(supernodes of a graph), `supernodes.py` (whether they do what they claim), `steer.py` (generation), `ablate.py` (many
features, one at a time) with `batches.py` and `resume.py`.

Of sites, on pairs of a clean and a corrupted prompt: the package `patching`.
"""

from jclt.interventions.ablate import Ablations, ablate
from jclt.interventions.intervene import intervene, sweep
from jclt.interventions.nodes import measure_shares, scale_nodes, swap_nodes
from jclt.interventions.patching import (
    Component,
    PairRow,
    PatchingResult,
    PromptPairs,
    knock_out,
    load_pairs,
    make_pairs,
    make_world_pairs,
    patch,
    patch_paths,
    trace_causes,
)
from jclt.interventions.result import Intervention
from jclt.interventions.steer import Steered, find_maxima, steer, sweep_steering
from jclt.interventions.supernodes import SupernodeEffect, measure_supernodes

__all__ = [
    "Ablations",
    "Component",
    "Intervention",
    "PairRow",
    "PatchingResult",
    "PromptPairs",
    "Steered",
    "SupernodeEffect",
    "ablate",
    "find_maxima",
    "intervene",
    "knock_out",
    "load_pairs",
    "make_pairs",
    "make_world_pairs",
    "measure_shares",
    "measure_supernodes",
    "patch",
    "patch_paths",
    "scale_nodes",
    "steer",
    "swap_nodes",
    "sweep",
    "sweep_steering",
    "trace_causes",
]
