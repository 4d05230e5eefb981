"""Counts in sentences: one of a thing is no plural."""

import ast
import re
from pathlib import Path

import pytest

import itda
from itda.errors import counted

SOURCES = sorted(Path(itda.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize(
    ("n", "what", "said"),
    [
        (1, "hook point", "1 hook point"),
        (0, "token", "0 tokens"),
        (2000, "token", "2,000 tokens"),
        (2, "class", "2 classes"),
        (3, "pass", "3 passes"),
        (1, "dictionary", "1 dictionary"),
        (2, "dictionary", "2 dictionaries"),
        (2, "key", "2 keys"),
    ],
)
def test_counted(n, what, said):
    assert counted(n, what) == said


def _counted_nouns(trees):
    """The plural of the last word of everything that `counted` is asked to count."""
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "counted":
                (what,) = [arg.value for arg in node.args[1:] if isinstance(arg, ast.Constant)] or [None]
                if what:
                    yield counted(2, what.split()[-1]).split()[-1]


def _bare(tree, nouns):
    """Where an f-string has a value, and then one of `nouns`, which `counted` would write in the singular."""
    noun = re.compile(rf" (?:(?!are |has |holds |in |of )[a-z]+ )?(?:{'|'.join(sorted(nouns - {'times'}))})\b(?!/)")
    for node in ast.walk(tree):
        for value, text in zip(node.values, node.values[1:], strict=False) if isinstance(node, ast.JoinedStr) else ():
            if isinstance(value, ast.FormattedValue) and isinstance(text, ast.Constant) and noun.match(text.value):
                yield node.lineno, ast.unparse(value.value)


# Never one: constants, what is refused for being too many, what goes before special tokens, no number at all.
ALLOWED = {"LARGEST", "LARGEST_INDEX", "least", "count", "sizes or 'no'", "shape"}


def test_every_count_goes_through_counted():
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
    nouns = set(_counted_nouns(trees.values()))
    assert {"tokens", "atoms", "points", "layers", "dictionaries"} <= nouns
    found = {f"{path.name}:{line} {value}" for path, tree in trees.items() for line, value in _bare(tree, nouns)}
    assert {one for one in found if one.split(" ", 1)[1] not in ALLOWED} == set()
