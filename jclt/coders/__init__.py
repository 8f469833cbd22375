"""Sparse coders: cross-layer and per-layer transcoders, SAEs, and a model's MLP neurons with the same methods.

Reading order: `config.py` (the settings), `coder.py` (the weights; encoding and decoding), `activations.py`,
`neurons.py`, `streamed.py` (weights that stay on disk), `replacement.py` (the model with a coder in place of its MLPs)
with `decoder_sums.py`, `model_fit.py` (does a coder belong to a model), `formats/` (files).
"""

from jclt.coders.coder import AXES, Coder, CoderLayer, SparseCoder, abstract_coder, declare_coder
from jclt.coders.config import CoderConfig
from jclt.coders.formats.circuit_tracer import misread_by_circuit_tracer
from jclt.coders.formats.load import LAYOUTS, coder_model, find_coder, load_coder, save_coder
from jclt.coders.model_fit import Fit, check_fit, measure_fit
from jclt.coders.neurons import Neurons, neurons
from jclt.coders.replacement import CoderReplacement
from jclt.coders.streamed import StreamedCoder, read_fingerprint

__all__ = [
    "AXES",
    "LAYOUTS",
    "Coder",
    "CoderConfig",
    "CoderLayer",
    "Fit",
    "Neurons",
    "SparseCoder",
    "StreamedCoder",
    "abstract_coder",
    "check_fit",
    "coder_model",
    "declare_coder",
    "find_coder",
    "load_coder",
    "measure_fit",
    "misread_by_circuit_tracer",
    "neurons",
    "read_fingerprint",
    "CoderReplacement",
    "save_coder",
]
