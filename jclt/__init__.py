"""jclt: circuit tracing of language models in JAX."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from jclt.attribution import Direction, attribute, attribute_batch
    from jclt.circuits import (
        EdgeScores,
        NodeScores,
        find_circuit,
        load_circuit,
        make_edge_graph,
        run_circuits,
        run_edge_circuits,
        save_circuit,
        score_edges,
        score_feature_edges,
        score_nodes,
        trace_neurons,
    )
    from jclt.coders import load_coder, save_coder
    from jclt.errors import UserError
    from jclt.evaluation import CircuitGrades, grade_edges, grade_nodes
    from jclt.features import FeatureRecord, Features, describe_features, export_features, load_features
    from jclt.graphs import Graph, export_json, import_json, load_graph, read_circuit_tracer
    from jclt.interventions import (
        Ablations,
        Component,
        Intervention,
        PairRow,
        PatchingResult,
        PromptPairs,
        Steered,
        ablate,
        find_maxima,
        intervene,
        knock_out,
        load_pairs,
        make_pairs,
        make_world_pairs,
        measure_shares,
        patch,
        patch_paths,
        scale_nodes,
        steer,
        swap_nodes,
        sweep,
        sweep_steering,
        trace_causes,
    )
    from jclt.mesh import make_mesh
    from jclt.models import (
        SITES,
        Add,
        Compose,
        Freeze,
        Model,
        ModelConfig,
        Noise,
        Replace,
        Scale,
        Set,
        generate,
        load_model,
        run,
        save_model,
    )
    from jclt.viewer import export_html

__version__ = "0.1.0"
__all__ = [
    "SITES",
    "Ablations",
    "Add",
    "CircuitGrades",
    "Component",
    "Compose",
    "Direction",
    "EdgeScores",
    "FeatureRecord",
    "Features",
    "Freeze",
    "Graph",
    "Intervention",
    "Model",
    "ModelConfig",
    "NodeScores",
    "Noise",
    "PairRow",
    "PatchingResult",
    "PromptPairs",
    "Replace",
    "Scale",
    "Set",
    "Steered",
    "UserError",
    "ablate",
    "attribute",
    "attribute_batch",
    "describe_features",
    "export_features",
    "export_html",
    "export_json",
    "find_circuit",
    "find_maxima",
    "generate",
    "grade_edges",
    "grade_nodes",
    "import_json",
    "intervene",
    "knock_out",
    "load_circuit",
    "load_coder",
    "load_features",
    "load_graph",
    "load_model",
    "load_pairs",
    "make_edge_graph",
    "make_mesh",
    "make_pairs",
    "make_world_pairs",
    "measure_shares",
    "patch",
    "patch_paths",
    "read_circuit_tracer",
    "run",
    "run_circuits",
    "run_edge_circuits",
    "save_circuit",
    "save_coder",
    "save_model",
    "scale_nodes",
    "score_edges",
    "score_feature_edges",
    "score_nodes",
    "steer",
    "swap_nodes",
    "sweep",
    "sweep_steering",
    "trace_causes",
    "trace_neurons",
]

_PACKAGES = {
    "attribution": ("Direction", "attribute", "attribute_batch"),
    "circuits": (
        "EdgeScores",
        "NodeScores",
        "find_circuit",
        "load_circuit",
        "make_edge_graph",
        "run_circuits",
        "run_edge_circuits",
        "save_circuit",
        "score_edges",
        "score_feature_edges",
        "score_nodes",
        "trace_neurons",
    ),
    "coders": ("load_coder", "save_coder"),
    "errors": ("UserError",),
    "evaluation": ("CircuitGrades", "grade_edges", "grade_nodes"),
    "features": ("FeatureRecord", "Features", "describe_features", "export_features", "load_features"),
    "graphs": ("Graph", "export_json", "import_json", "load_graph", "read_circuit_tracer"),
    "interventions": (
        "Ablations",
        "Component",
        "Intervention",
        "PairRow",
        "PatchingResult",
        "PromptPairs",
        "Steered",
        "ablate",
        "find_maxima",
        "intervene",
        "knock_out",
        "load_pairs",
        "make_pairs",
        "make_world_pairs",
        "measure_shares",
        "patch",
        "patch_paths",
        "scale_nodes",
        "steer",
        "swap_nodes",
        "sweep",
        "sweep_steering",
        "trace_causes",
    ),
    "models": (
        "SITES",
        "Add",
        "Compose",
        "Freeze",
        "Model",
        "ModelConfig",
        "Noise",
        "Replace",
        "Scale",
        "Set",
        "generate",
        "load_model",
        "run",
        "save_model",
    ),
    "mesh": ("make_mesh",),
    "viewer": ("export_html",),
}
"""The public names, by the module or package that defines them."""
_OTHER_PACKAGES = (
    "config",
    "data",
    "files",
    "fingerprints",
    "kernels",
    "memory",
    "pods",
    "shapes",
    "training",
    "world",
)


def __getattr__(name: str) -> object:
    """Imports a package when it is first used, so that the `jclt` command can answer before JAX is imported."""
    from importlib import import_module

    if name in _PACKAGES or name in _OTHER_PACKAGES:
        return import_module(f"jclt.{name}")
    for package, names in _PACKAGES.items():
        if name in names:
            globals()[name] = value = getattr(import_module(f"jclt.{package}"), name)
            return value
    raise AttributeError(f"module 'jclt' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES, *_OTHER_PACKAGES})
