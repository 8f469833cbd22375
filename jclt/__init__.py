"""jclt: circuit tracing of language models in JAX."""

from jclt.coders import load_coder, save_coder
from jclt.errors import UserError
from jclt.models import SITES, Model, ModelConfig, Replace, generate, load_model, run, save_model
from jclt.sharding import make_mesh

__version__ = "0.1.0"
__all__ = [
    "SITES",
    "Model",
    "ModelConfig",
    "Replace",
    "UserError",
    "generate",
    "load_coder",
    "load_model",
    "make_mesh",
    "run",
    "save_coder",
    "save_model",
]
