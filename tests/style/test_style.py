"""Style as a test: the layer map, import cycles, sizes, unfinished marks, one subject per file."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src"
MODULES = sorted((SRC / "aether").rglob("*.py"))

FUNCTION_LINES_MAX = 70
MODULE_LINES_MAX = 600
FUNCTION_LINES_AIM = 40
FUNCTIONS_OVER_AIM_MAX = 45  # the ratchet: lower it when the code allows, never raise it

# What each part may import besides itself, `contract` and the standard library.
ROLE = {"aether.telemetry", "aether.backends"}
LAYERS: dict[str, set[str]] = {
    "contract": {"msgspec", "uuid_utils", "rfc8785"},
    "api": {"msgspec", "uvicorn", "httptools", "uvloop"},
    "substrate": ROLE | {"msgspec", "cryptography", "cedarpy", "rfc8785", "uuid_utils", "jwt"},
    "spawner": set(),
    "egress": ROLE | {"msgspec", "cryptography", "h11", "pyrage"},
    "orchestrator": ROLE | {"msgspec", "prometheus_client"},
    "runtime": {"msgspec", "numpy", "onnxruntime", "cryptography", "rfc8785"},
    "worldmodel": {"numpy", "torch", "onnx", "onnxscript", "onnxruntime", "cryptography", "msgspec", "rfc8785"}
    | {"aether.runtime"},
    "telemetry": {"prometheus_client", "structlog"},
    "backends": {"msgspec", "apsw"},
    "client": {"msgspec", "cryptography", "aether.api"},
    "cli": {"msgspec", "typer", "click", "rich", "aether.api", "aether.client"},
    "daemons": {"*"},
}
# Named exceptions: (module, what it imports lazily) with the reason.
EXCEPTIONS = {
    ("aether.cli", "aether.daemons.control"): "up, down and `run` start an instance",
    ("aether.cli", "aether.substrate.audit"): "verification works without an instance",
    ("aether.cli", "aether.substrate.access"): "a policy is checked and tested without an instance",
    ("aether.cli", "aether.spawner.linux.probe"): "`doctor` works without an instance",
    ("aether.cli", "aether.worldmodel.data"): "sample trajectories need no instance",
}


def name_of(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """(module, only for type checking)."""
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in typing_only
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module, id(node) in typing_only
            if node.module.startswith("aether"):
                for alias in node.names:
                    candidate = f"{node.module}.{alias.name}"
                    if (SRC / Path(*candidate.split("."))).with_suffix(".py").exists():
                        yield candidate, id(node) in typing_only


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_layer_map(path: Path) -> None:
    name = name_of(path)
    part = name.split(".")[1] if "." in name else None
    if part is None:
        return
    allowed = LAYERS[part]
    if "*" in allowed:
        return
    for module, _ in imports(tree_of(path)):
        top = module.split(".")[0]
        if top in sys.stdlib_module_names:
            continue
        if top != "aether":
            assert top in allowed, f"{name} imports {module}"
            continue
        target = ".".join(module.split(".")[:2])
        own = target in (f"aether.{part}", "aether", "aether.contract")
        excused = any(name.startswith(who) and module.startswith(what) for who, what in EXCEPTIONS)
        assert own or target in allowed or excused, f"{name} imports {module}: not in the layer map"


def test_spawner_imports_only_the_standard_library() -> None:
    """The closure of what the spawner imports, contract modules included, is stdlib alone."""
    seen: set[str] = set()
    todo = [name_of(path) for path in MODULES if name_of(path).startswith("aether.spawner")]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        base = SRC / Path(*name.split("."))
        path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        for module, _ in imports(tree_of(path)):
            top = module.split(".")[0]
            if top == "aether":
                todo.append(module)
            else:
                assert top in sys.stdlib_module_names, f"{name} imports {module}"


def test_no_import_cycles() -> None:
    graph = {
        name_of(path): {m for m, typing_only in imports(tree_of(path)) if m.startswith("aether.") and not typing_only}
        for path in MODULES
    }
    state: dict[str, int] = {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if state.get(name) == 2 or name not in graph:
            return
        assert state.get(name) != 1, " -> ".join((*trail, name))
        state[name] = 1
        for target in graph[name]:
            visit(target, (*trail, name))
        state[name] = 2

    for name in graph:
        visit(name, ())


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_sizes() -> None:
    over_aim = 0
    for path in MODULES:
        lines = path.read_text().count("\n")
        assert lines <= MODULE_LINES_MAX, f"{name_of(path)} has {lines} lines"
        for node in functions(tree_of(path)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= FUNCTION_LINES_MAX, f"{name_of(path)}.{node.name} has {length} lines"
            over_aim += length > FUNCTION_LINES_AIM
    assert over_aim <= FUNCTIONS_OVER_AIM_MAX, f"{over_aim} functions over {FUNCTION_LINES_AIM} lines"


def test_every_module_has_a_head() -> None:
    for path in MODULES:
        assert ast.get_docstring(tree_of(path)), f"{name_of(path)} has no docstring"


def test_nothing_unfinished() -> None:
    marks = ("TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error")
    for path in MODULES:
        text = path.read_text()
        for mark in marks:
            assert mark not in text, f"{name_of(path)} holds {mark}"


def test_the_native_init_stays_small() -> None:
    """It runs as root before it gives that up, so it must be possible to read it in one sitting."""
    sources = [p for p in (SRC / "aether" / "spawner" / "native").glob("*.[ch]") if p.name != "fuzz.c"]
    lines = [line for path in sources for line in path.read_text().splitlines()]
    assert len(lines) <= 1000
    assert max(map(len, lines)) <= 120
