"""docs/equations.md maps numbers to names; names move, so the map is checked."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "equations.md").read_text("utf-8")
NAMES = sorted(set(re.findall(r"`(itda\.[\w.]+)`", TEXT)))
TESTS = sorted(set(re.findall(r"`(tests/[\w.:/]+)`", TEXT)))


@pytest.mark.parametrize("name", NAMES)
def test_every_name_exists(name):
    parts, found = name.split("."), None
    for i in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError:
            continue
        for part in parts[i:]:
            found = getattr(found, part)
        break
    assert found.__doc__


@pytest.mark.parametrize("name", [name for name in TESTS if "::" in name])
def test_every_law_has_its_test(name):
    path, *parts = name.split("::")
    body = ast.parse((ROOT / path).read_text("utf-8")).body
    for part in parts:
        found = [node for node in body if getattr(node, "name", None) == part]
        assert found, f"{path} has no {part}"
        body = found[0].body


def test_the_map_is_not_empty():
    assert len(NAMES) > 10
    assert len(TESTS) > 10
