"""Rooms import only from rooms above them in this list; it is the architecture of the package."""

import ast
from pathlib import Path

import jclt

PACKAGE = Path(jclt.__file__).parent
ROOMS = [
    "shapes",
    "errors",
    "interrupts",
    "config",
    "files",
    "memory",
    "fingerprints",
    "sharding",
    "models",
    "world",
    "coders",
    "attribution",
    "evaluation",
    "training",
    "pods",
    "viewer",
    "cli",
    "start",
]


def room_of(module: str) -> str:
    """The room of a module's full name; the package itself re-exports what users call, and no room imports from it."""
    return module.split(".")[1] if "." in module else "jclt"


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "jclt":
            found |= {f"jclt.{alias.name}" for alias in node.names} if node.module == "jclt" else {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "jclt"}
    return found


def test_every_room_is_listed():
    present = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir() if path.stem[0] not in "_."} - {
        "py"
    }
    assert present == set(ROOMS)


def test_rooms_import_only_from_rooms_above():
    for path in PACKAGE.rglob("*.py"):
        if path.parent == PACKAGE and path.name == "__init__.py":
            continue
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        allowed = ROOMS[: ROOMS.index(room) + 1]
        for module in imports(path):
            if module == "jclt.__version__":
                continue
            assert room_of(module) in allowed, f"{path.relative_to(PACKAGE)} imports {module}"
