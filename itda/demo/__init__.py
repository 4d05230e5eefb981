"""A small language model and its text, so that everything can be tried offline.

The text is the English that every Python installation carries: the docstrings of the standard library and the topics
of ``help()``. The model in the folder :func:`model_path` was trained on it by ``scripts/train_demo_model.py``, except
for the documents that :func:`held_out` names.
"""

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MIN_CHARACTERS = 500  # documents shorter than this are left out
_SKIPPED = {"site-packages", "dist-packages", "lib-dynload", "idlelib", "lib2to3", "pydoc_data"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def model_path() -> Path:
    """Return the folder of the demo model, for ``from_pretrained``."""
    return Path(__file__).parent / "model"


def corpus() -> list[str]:
    """Return the texts of :func:`documents`, in the same order."""
    return list(documents().values())


def documents() -> dict[str, str]:
    """Return ``{name: text}``, one document per module of the standard library and one per topic of ``help()``.

    Names are sorted: ``"json.decoder"`` for a module, ``"help:assert"`` for a topic. A paragraph which an earlier
    document has is dropped (topics quote each other), so no held-out document repeats one that is not. The text is
    that of the running Python: it differs a little between versions, and not at all between two calls.
    """
    texts = _topics()
    for name, path in modules().items():
        tree = _parse(path)
        if tree is not None:
            texts[name] = "\n\n".join(ast.get_docstring(node) or "" for node in docstring_nodes(tree))
    seen: set[str] = set()
    kept = {name: "\n\n".join(_unseen_paragraphs(texts[name], seen)) for name in sorted(texts)}
    return {name: text for name, text in kept.items() if len(text) >= MIN_CHARACTERS}


def held_out(name: str) -> bool:
    """Return whether the demo model was trained without the document or module of this name (about 5 % of them)."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % 20 == 0


def modules() -> dict[str, Path]:
    """Return ``{module name: file}`` of the standard library, sorted; tests and installed packages are left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        # `_sysconfigdata...` is a table of this machine's paths.
        if not any(part in _SKIPPED or part.startswith(("test", "_test", "_sysconfigdata")) for part in parts):
            found[".".join(parts).removesuffix(".__init__")] = path
    return dict(sorted(found.items()))


def docstring_nodes(tree: ast.Module) -> list[Any]:
    """Return the module, classes and functions of ``tree`` that have a docstring, in the order of the source."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False)]
    return sorted(nodes, key=lambda node: getattr(node, "lineno", 0))


def _parse(path: Path) -> ast.Module | None:
    """Return the syntax tree of a file, None where it cannot be read or is not Python of this version."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escape sequences in docstrings
            return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return None


def _topics() -> dict[str, str]:
    """Return ``{"help:name": text}`` of Python's help topics, empty where Python was installed without them."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    return {f"help:{name}": text for name, text in topics.items()}


def _unseen_paragraphs(text: str, seen: set[str]) -> Iterator[str]:
    """Yield the paragraphs of ``text`` that are not in ``seen`` up to white space, and add them to it."""
    for paragraph in text.split("\n\n"):
        key = " ".join(paragraph.split())
        if key and key not in seen:
            seen.add(key)
            yield paragraph
