"""jclt: circuit tracing of language models in JAX."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from jclt.attribution import Direction, Graph, attribute, attribute_batch, load_graph, read_circuit_tracer
    from jclt.coders import load_coder, save_coder
    from jclt.errors import UserError
    from jclt.models import SITES, Model, ModelConfig, Replace, generate, load_model, run, save_model
    from jclt.sharding import make_mesh
    from jclt.viewer import export_json, import_json

__version__ = "0.1.0"
__all__ = [
    "SITES",
    "Direction",
    "Graph",
    "Model",
    "ModelConfig",
    "Replace",
    "UserError",
    "attribute",
    "attribute_batch",
    "export_json",
    "generate",
    "import_json",
    "load_coder",
    "load_graph",
    "load_model",
    "make_mesh",
    "read_circuit_tracer",
    "run",
    "save_coder",
    "save_model",
]

_ROOMS = {
    "attribution": ("Direction", "Graph", "attribute", "attribute_batch", "load_graph", "read_circuit_tracer"),
    "coders": ("load_coder", "save_coder"),
    "errors": ("UserError",),
    "models": ("SITES", "Model", "ModelConfig", "Replace", "generate", "load_model", "run", "save_model"),
    "sharding": ("make_mesh",),
    "viewer": ("export_json", "import_json"),
}
"""What users call, by the room that it is of."""
_OTHER_ROOMS = ("config", "evaluation", "files", "fingerprints", "memory", "pods", "shapes", "training", "world")


def __getattr__(name: str) -> object:
    """Loads what is asked for the first time: the `jclt` command answers before JAX is there."""
    from importlib import import_module

    if name in _ROOMS or name in _OTHER_ROOMS:
        return import_module(f"jclt.{name}")
    for room, names in _ROOMS.items():
        if name in names:
            globals()[name] = found = getattr(import_module(f"jclt.{room}"), name)
            return found
    raise AttributeError(f"module 'jclt' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS, *_OTHER_ROOMS})
