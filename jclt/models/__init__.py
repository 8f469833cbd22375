"""The language model: one configurable transformer for all families.

Reading order: `config.py` the settings, `weights.py` one declaration for each weight, `transformer.py` the forward pass
(its arithmetic is `ops.py`), `sites.py` the named values in it, `edits.py` and `site_edits.py` how to change them, and
`ranges.py` where, `model.py` what users call, `loading.py` how they get a model. `formats/` reads and writes published
models.
"""

from jclt.models.config import ModelConfig, RopeScaling
from jclt.models.edits import Compose, Freeze, Replace
from jclt.models.formats.known_shapes import known_config
from jclt.models.loading import find_model, load_model, load_tokenizer, save_model
from jclt.models.model import Model, generate, run, token_array
from jclt.models.read_sites import read_sites
from jclt.models.site_edits import Add, Noise, Scale, Set, SiteEdit
from jclt.models.sites import (
    LAYER_SITES,
    MODEL_SITES,
    PATTERNS_AND_DENOMINATORS,
    PEER_NAMES,
    SITES,
    Edit,
    Place,
    Sites,
    check_sites,
)
from jclt.models.tokenizer import Tokenizer
from jclt.models.transformer import Cache, Mlp, Transformer, forward
from jclt.models.weights import Weight, abstract_params, declare

__all__ = [
    "LAYER_SITES",
    "MODEL_SITES",
    "PATTERNS_AND_DENOMINATORS",
    "PEER_NAMES",
    "SITES",
    "Add",
    "Cache",
    "Compose",
    "Edit",
    "Freeze",
    "Mlp",
    "Model",
    "ModelConfig",
    "Noise",
    "Place",
    "Replace",
    "RopeScaling",
    "Scale",
    "Set",
    "SiteEdit",
    "Sites",
    "Tokenizer",
    "Transformer",
    "Weight",
    "abstract_params",
    "check_sites",
    "declare",
    "find_model",
    "forward",
    "generate",
    "read_sites",
    "known_config",
    "load_model",
    "load_tokenizer",
    "run",
    "save_model",
    "token_array",
]
