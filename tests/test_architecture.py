"""Arrows point one way: cli -> work -> world -> objects -> kernels -> values; objects and world do not meet."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import itda

ROOT = Path(itda.__file__).parent

# Each module's floor. A module imports modules of lower floors, or of its own. World and objects share a height but
# not a floor: neither may import the other.
FLOORS = {
    "values": ["_version", "errors", "labels", "codes", "progress", "disk"],
    "kernels": ["pursuit", "metrics", "similarity"],
    "objects": ["folder", "tables", "model", "admission", "threshold", "builder", "checkpoint", "build", "refine"],
    "world": [
        "documents",
        "prompts",
        "layout",
        "hub",
        "loading",
        "parameters",
        "parallel",
        "team",
        "weights",
        "states",
        "streaming",
        "reading",
        "traced",
        "hooks",
        "splice",
        "demo",
        "shards",
        "store",
        "caches",
    ],
    "work": [
        *(
            "runs",
            "cluster",
            "workers",
            "grid",
            "trainer",
            "improving",
            "sweep",
            "collect",
            "stored",
            "report",
            "drawing",
            "places",
            "drawing_models",
            "aligned",
            "layers",
            "saved",
            "compare",
            "plots",
            "diff",
            "changes",
            "page",
        ),
        *("systems", "heldout", "controls", "scores", "evaluate", "probing", "interop"),
    ],
    "cli": ["cli", "commands", "queries", "flags", "terminal", "__main__", "__init__"],
}
BELOW = {
    "values": {"values"},
    "kernels": {"values", "kernels"},
    "objects": {"values", "kernels", "objects"},
    "world": {"values", "kernels", "world"},
    "work": {"values", "kernels", "objects", "world", "work"},
    "cli": {"values", "kernels", "objects", "world", "work", "cli"},
}
FLOOR_OF = {module: floor for floor, modules in FLOORS.items() for module in modules}

# Heavy libraries and the only modules that may import them, and of those, the ones that may not do so on import.
HOMES = {
    "transformers": {"hub", "loading", "reading", "hooks", "parallel"},
    "datasets": {"prompts", "documents"},
    "accelerate": {"parameters"},
    "nnsight": {"traced"},
    "ray": {"cluster"},
    "matplotlib": {"plots"},
    "plotly": {"plots"},
    "sae_lens": {"interop"},
    "sae_bench": {"interop"},
    "numba": {"pursuit"},
    "triton": {"pursuit"},
    "sklearn": {"probing"},
}


def modules() -> list[tuple[str, Path]]:
    return [(path.relative_to(ROOT).parts[0].removesuffix(".py"), path) for path in sorted(ROOT.rglob("*.py"))]


def imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import: write it from `itda`"
            names += [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "itda" else [node.module]
    return names


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda x: x.name if isinstance(x, Path) else x)
def test_arrows_point_down(module, path):
    assert module in FLOOR_OF, f"{module} has no floor: put it into FLOORS"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "itda" and len(parts) > 1:
            below = parts[1] if parts[1] in FLOOR_OF else "__init__"
            floor, target = FLOOR_OF[module], FLOOR_OF[below]
            assert target in BELOW[floor], f"{module} ({floor}) imports {name} ({target})"
        elif parts[0] in HOMES:
            assert module in HOMES[parts[0]], f"{module} imports {parts[0]}, whose home is {HOMES[parts[0]]}"


def test_no_cycles():
    graph = {}
    for module, path in modules():
        edges = {name.split(".")[1] for name in imports(path) if name.startswith("itda.")}
        graph.setdefault(module, set()).update(edges & set(FLOOR_OF) - {module})
    done, path = set(), []

    def visit(module):
        assert module not in path, f"import cycle: {' -> '.join([*path[path.index(module) :], module])}"
        if module not in done:
            path.append(module)
            for below in sorted(graph.get(module, ())):
                visit(below)
            done.add(path.pop())

    for module in graph:
        visit(module)


def test_importing_itda_is_light():
    heavy = [*HOMES, "pyarrow", "tyro", "rich", "huggingface_hub", "sklearn", "scipy", "pandas"]
    code = f"import sys, itda; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_no_function_runs_on_and_on():
    for _, path in modules():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                assert length <= 60, f"{path.name}: {node.name} has {length} lines"
