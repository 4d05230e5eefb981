"""The house: one ordered list of folders, imports point down it, heavy libraries have one home each.

README.md and CONTRIBUTING.md show the same list; `test_the_list_is_the_one_that_is_shown` holds them to it.
"""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import itda

ROOT = Path(itda.__file__).parent

# From the top down. A file imports from its own folder and from those below it. "itda" is the vocabulary: the files of
# the package itself, and `settings`, which is part of it.
FOLDERS = (
    "cli",
    "demo",
    "interop",
    "evaluation",
    "saes",
    "training",
    "comparison",
    "pages",
    "report",
    "usage",
    "reading",
    "dictionary",
    "models",
    "text",
    "similarity",
    "pursuit",
    "itda",
)
# The world yields activations and the dictionary is built from any iterator of them: neither knows the other.
STRANGERS = (("dictionary", "models"), ("dictionary", "text"), ("reading", "dictionary"))
LONGEST_CHAIN = 6  # of files that import each other within a folder

# Heavy libraries and the only folders (or files) that may import them.
HOMES = {
    "transformers": {"models/pretrained", "models/hooked_model", "models/loading", "models/shared_model", "models/hub",
                     "models/classes",
                     "reading/activations"},
    "datasets": {"text/documents", "text/folders"},
    "accelerate": {"models/parameters"},
    "peft": {"models/adapters"},
    "nnsight": {"models/nnsight_model"},
    "ray": {"training/cluster"},
    "matplotlib": {"report/plots", "report/zf_plot"},
    "plotly": {"report/plots"},
    "sae_lens": {"interop"},
    "sae_bench": {"interop"},
    "numba": {"pursuit"},
    "triton": {"pursuit"},
    "sklearn": {"evaluation/probing"},
    "tyro": {"cli"},
}  # fmt: skip
FILES = sorted(ROOT.rglob("*.py"))
FACES = {ROOT / name for name in ("__init__.py", "__main__.py", "refine.py")}  # of the package, which use all below


def folder(path: Path) -> str:
    """The folder that a file belongs to."""
    first = path.relative_to(ROOT).parts[0]
    return "itda" if first.endswith(".py") or first == "settings" else first


@cache
def imports(path: Path) -> list[str]:
    """What a file imports, wherever it does so: dotted names."""
    names = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import: write it from `itda`"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def target(name: str) -> Path | None:
    """The file that a dotted name of ours is, or is in; `from itda import train` is the package's face, hence None."""
    parts = name.split(".")[1:]
    for end in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:end])
        if path.with_suffix(".py").is_file():
            return path.with_suffix(".py")
        if (path / "__init__.py").is_file():
            return path / "__init__.py"
    return None


def ours(path: Path) -> set[Path]:
    """The files of the package that a file imports."""
    found = {target(name) for name in imports(path) if name.split(".")[0] == "itda"}
    return {file for file in found if file is not None and file != path}


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=short)
def test_imports_point_down(path):
    if path in FACES:
        return
    here = FOLDERS.index(folder(path))
    for name in imports(path):
        if name.split(".")[0] == "itda" and (file := target(name)) is not None:
            there = folder(file)
            assert FOLDERS.index(there) >= here, f"{short(path)} imports {name}, which stands above it"
            for pair in STRANGERS:
                assert {folder(path), there} != set(pair), f"{short(path)} imports {name}: they do not know each other"
        elif name.split(".")[0] == "itda":
            assert folder(path) == "cli" or name in ("itda._version", "itda"), (
                f"{short(path)} imports {name} from the face"
            )
        elif (library := name.split(".")[0]) in HOMES:
            place = short(path).removesuffix(".py")
            assert any(place == home or place.startswith(f"{home}/") for home in HOMES[library]), (
                f"{place} imports {library}, whose home is {HOMES[library]}"
            )


def test_no_circles_and_no_long_chains():
    depth: dict[Path, int] = {}

    def visit(path: Path, above: tuple[Path, ...]) -> int:
        assert path not in above, f"import circle: {' -> '.join(map(short, [*above[above.index(path) :], path]))}"
        if path not in depth:
            below = [visit(other, (*above, path)) for other in ours(path) if folder(other) == folder(path)]
            depth[path] = 1 + max(below, default=0)
        return depth[path]

    for path in FILES:
        if path not in FACES:
            assert visit(path, ()) <= LONGEST_CHAIN, f"{short(path)} begins a chain of {depth[path]} files"


def test_every_folder_says_what_it_is_for():
    assert {path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "_"} == {*FOLDERS, "settings"} - {
        "itda"
    }
    for name in FOLDERS[:-1]:
        said = ast.get_docstring(ast.parse((ROOT / name / "__init__.py").read_text("utf-8"))) or ""
        assert len(said.splitlines()) >= 3, f"itda/{name}/__init__.py: say what it is for, what may enter, what it uses"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_the_list_is_the_one_that_is_shown(page):
    text = (ROOT.parent / page).read_text("utf-8")
    shown = re.findall(r"^  (\w+)/(?: {2,}|$)", re.search(r"```\nitda/\n(.*?)```", text, re.DOTALL)[1], re.MULTILINE)
    assert tuple(shown) == FOLDERS[:-1]


def test_type_checkers_see_the_public_names():
    tree = ast.parse((ROOT / "__init__.py").read_text("utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    said = {alias.name: node.module for node in block.body for alias in node.names}
    assert said == {name: f"itda.{home}" for name, home in itda._HOMES.items()}
    assert set(itda.__all__) == {*said, "__version__"}


def test_importing_itda_is_light():
    heavy = [*HOMES, "pyarrow", "rich", "huggingface_hub", "scipy", "pandas"]
    code = f"import sys, itda; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def functions():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef):
                yield path, node


def test_no_function_runs_on_and_on():
    for path, node in functions():
        body = node.body[1:] if ast.get_docstring(node) else node.body
        length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
        assert length <= 60, f"{path.name}: {node.name} has {length} lines"


def test_no_function_is_written_with_many_parameters():
    for path, node in functions():
        if any(ast.unparse(decorator) == "kernel" for decorator in node.decorator_list):
            continue  # of Triton, which takes pointers and sizes one by one
        a = node.args
        count = sum(arg.arg not in ("self", "cls") for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs))
        assert count <= 12, f"{path.name}: {node.name} has {count} parameters: declare a group in itda/settings"
