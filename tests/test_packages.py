"""The architecture: packages import only from packages above them, no two files import each other, files and functions
can be read at one go, and a name means one thing within its package."""

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path

import jclt

PACKAGE = Path(jclt.__file__).parent
ORDER = [
    *("errors", "shapes", "interrupts", "config", "files", "array_files", "memory", "numerics"),
    *("kept", "fingerprints", "mesh", "hosts"),
    *(
        "graphs",
        "models",
        "data",
        "world",
        "kernels",
        "coders",
        "attribution",
        "interventions",
        "circuits",
        "features",
        "evaluation",
        "training",
        "pods",
    ),
    *("viewer", "cli", "__main__"),
]
"""Each imports only from those before it, and from itself."""

LONG_FILES = {
    "kernels/row_sums_sparse_core.py": "two Pallas kernels",
}
LONG_FUNCTIONS = {
    "kernels/row_sums_sparse_core.py": {"sum_rows", "dot_rows", "kernel"},  # Pallas nests them
}
SHARED_NAMES = {
    "cli": {"add_command", "run"},  # each command is a module with both
    "kernels": {"sum_rows", "dot_rows", "estimate_cost", "CHUNK"},  # each form of the sums has its own
}
"""Names that files of one package may share, beside their loggers."""


def module_of(path: Path) -> str:
    name = ".".join(("jclt", *path.relative_to(PACKAGE).with_suffix("").parts))
    return name.removesuffix(".__init__")


FILES = {module_of(path): path for path in PACKAGE.rglob("*.py")}


def package_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "jclt"


def imports(path: Path) -> set[str]:
    """The modules of jclt that a file imports, at its head or later; not what only type checkers read."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jclt":
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else str(node.module) for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "jclt"}
    return found


@cache
def read_all_imports() -> dict[str, set[str]]:
    return {module: imports(path) - {module} for module, path in FILES.items()}


def test_every_package_is_listed():
    present = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert present - {"__init__"} == set(ORDER)


def test_packages_import_only_from_packages_above():
    for module, found in read_all_imports().items():
        if module == "jclt":  # re-exports what users call; nothing imports from it
            continue
        allowed = ORDER[: ORDER.index(package_of(module)) + 1]
        assert {package_of(other) for other in found} <= set(allowed), module


def test_no_files_import_each_other_in_a_circle():
    state, all_imports = dict[str, str](), read_all_imports()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert state.get(module) != "open", " -> ".join((*way[way.index(module) :], module))
        if module in state:
            return
        state[module] = "open"
        for other in sorted(all_imports.get(module, ())):
            if other.count(".") > 1 or (other in FILES and FILES[other].name != "__init__.py"):
                visit(other, (*way, module))
        state[module] = "done"

    for module in all_imports:
        visit(module, ())


def test_files_and_functions_can_be_read_at_one_go():
    long_files, long_functions = set(), defaultdict(set)
    for path in FILES.values():
        text, name = path.read_text(), str(path.relative_to(PACKAGE))
        if text.count("\n") > 300:
            long_files.add(name)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 60:
                long_functions[name].add(node.name)
    assert long_files == set(LONG_FILES)
    assert long_functions == LONG_FUNCTIONS


def test_a_name_is_defined_once_within_its_package():
    for folder in {path.parent for path in FILES.values()}:
        places = defaultdict(set)
        for path in folder.glob("*.py"):
            for node in ast.parse(path.read_text()).body:
                for name in defined_by(node):
                    places[name].add(path.name)
        shared = {name for name, files in places.items() if len(files) > 1} - {"log"}
        assert shared <= SHARED_NAMES.get(folder.name, set()), (folder.name, shared)


def defined_by(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    names = {inner.id for target in targets for inner in ast.walk(target) if isinstance(inner, ast.Name)}
    return {name for name in names if not name.startswith("__")}


def test_no_package_holds_more_than_a_ninth_of_the_code():
    lines = {folder: 0 for folder in {path.parent for path in FILES.values()}}
    for path in FILES.values():
        lines[path.parent] += path.read_text().count("\n")
    assert max(lines.values()) <= 0.11 * sum(lines.values()), max(lines, key=lambda folder: lines[folder])
