"""The house: imports point one way, no cycles, every module small enough to read."""
from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = {"searchspaces": 0, "actors": 1, "orchestrator": 2}
MODULES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path, top_level_only: bool = False) -> set[str]:
    """Modules of this project that a file imports (imports under TYPE_CHECKING do not run)."""
    tree = ast.parse(path.read_text())
    guarded = {id(node) for block in ast.walk(tree) if isinstance(block, ast.If) and "TYPE_CHECKING" in
               ast.dump(block.test) for node in ast.walk(block)}
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if id(node) in guarded:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.split(".")[0] in LAYERS}


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_down(path: Path) -> None:
    layer = LAYERS[module_name(path).split(".")[0]]
    upward = sorted(name for name in imported(path) if LAYERS[name.split(".")[0]] > layer)
    assert not upward, f"{module_name(path)} imports upward: {upward}"


def test_searchspaces_know_no_ray_and_actors_no_pydantic_models() -> None:
    for path in MODULES:
        if module_name(path).startswith("searchspaces"):
            assert "import ray" not in path.read_text(), f"{path} imports ray"


def test_no_import_cycles() -> None:
    names = {module_name(path) for path in MODULES}
    graph = {module_name(path): imported(path, top_level_only=True) & names for path in MODULES}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import cycle: {' -> '.join((*trail, name))}"
        if name not in done:
            for target in graph[name]:
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    assert done == set(graph)
