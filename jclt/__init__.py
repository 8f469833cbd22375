"""jclt: circuit tracing of language models in JAX."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from jclt.attribution import Direction, attribute, attribute_batch
    from jclt.coders import load_coder, save_coder
    from jclt.errors import UserError
    from jclt.graphs import Graph, export_json, import_json, load_graph, read_circuit_tracer
    from jclt.mesh import make_mesh
    from jclt.models import SITES, Model, ModelConfig, Replace, generate, load_model, run, save_model

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

_PACKAGES = {
    "attribution": ("Direction", "attribute", "attribute_batch"),
    "coders": ("load_coder", "save_coder"),
    "errors": ("UserError",),
    "graphs": ("Graph", "export_json", "import_json", "load_graph", "read_circuit_tracer"),
    "models": ("SITES", "Model", "ModelConfig", "Replace", "generate", "load_model", "run", "save_model"),
    "sharding": ("make_mesh",),
}
"""What users call, by the package that it is of."""
_OTHERS = (
    "config",
    "data",
    "evaluation",
    "files",
    "fingerprints",
    "kernels",
    "memory",
    "pods",
    "shapes",
    "training",
    "viewer",
    "world",
)


def __getattr__(name: str) -> object:
    """Loads what is asked for the first time: the `jclt` command answers before JAX is there."""
    from importlib import import_module

    if name in _PACKAGES or name in _OTHERS:
        return import_module(f"jclt.{name}")
    for package, names in _PACKAGES.items():
        if name in names:
            globals()[name] = found = getattr(import_module(f"jclt.{package}"), name)
            return found
    raise AttributeError(f"module 'jclt' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES, *_OTHERS})
