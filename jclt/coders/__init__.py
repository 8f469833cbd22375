"""Sparse coders: cross-layer and per-layer transcoders, SAEs, and a model's own neurons behind the same methods."""

from jclt.coders.coder import AXES, Coder, CoderLayer, SparseCoder, abstract_coder, declare
from jclt.coders.config import CoderConfig
from jclt.coders.formats.circuit_tracer import misread_by_circuit_tracer
from jclt.coders.formats.load import LAYOUTS, coder_model, find_coder, load_coder, save_coder
from jclt.coders.model_fit import Fit, check_fit, measure_fit
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
    "coder_model",
    "declare",
    "find_coder",
    "load_coder",
    "measure_fit",
    "misread_by_circuit_tracer",
    "neurons",
    "replacing",
    "save_coder",
]
