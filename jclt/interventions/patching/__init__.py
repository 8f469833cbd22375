"""Edits of sites on pairs of a clean and a corrupted prompt: activation patching and related methods.

Reading order: `pairs.py` and `pair_files.py` (the prompts), `metrics.py` (what is measured), then the methods:
`patch.py` (activation patching), `tracing.py` (causal tracing), `knockout.py` (attention knockout), `paths.py` (path
patching). Below them `places.py` (the grid), `runs.py` (the passes), `rows.py` (the rows of a grid) and `result.py`.
"""

from jclt.interventions.patching.knockout import knock_out
from jclt.interventions.patching.pair_files import load_pairs
from jclt.interventions.patching.pairs import PairRow, PromptPairs, make_pairs, make_world_pairs
from jclt.interventions.patching.patch import patch
from jclt.interventions.patching.paths import Component, patch_paths
from jclt.interventions.patching.result import PatchingResult
from jclt.interventions.patching.tracing import trace_causes

__all__ = [
    "Component",
    "PairRow",
    "PatchingResult",
    "PromptPairs",
    "knock_out",
    "load_pairs",
    "make_pairs",
    "make_world_pairs",
    "patch",
    "patch_paths",
    "trace_causes",
]
