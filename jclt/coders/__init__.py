"""Sparse coders: cross-layer and per-layer transcoders, SAEs, and a model's own neurons behind the same methods."""

from jclt.coders.coder import AXES, Coder, CoderLayer, SparseCoder, abstract_coder, declare
from jclt.coders.config import CoderConfig
from jclt.coders.files import LAYOUTS, find_coder, load_coder, save_coder
from jclt.coders.fit import Fit, check_fit, measure_fit
from jclt.coders.neurons import Neurons, neurons
from jclt.coders.replacement import replacing

__all__ = [
    "AXES",
    "LAYOUTS",
    "Coder",
    "CoderConfig",
    "CoderLayer",
    "Fit",
    "Neurons",
    "SparseCoder",
    "abstract_coder",
    "check_fit",
    "declare",
    "find_coder",
    "load_coder",
    "measure_fit",
    "neurons",
    "replacing",
    "save_coder",
]
