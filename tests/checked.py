"""The type checker of the tests: shapes and types of a function's first calls in every test.

A kernel that is called a hundred thousand times would spend most of a test in its checks.
"""

import functools
import inspect
import sys

from beartype import beartype

FIRST = 200  # calls of a function that are checked, in each test
_unchecked, _counts = [], []


def first_calls(function):
    """`function`, checked; what jaxtyping wraps is called as it is once it was checked often enough."""
    checked, count = beartype(function), [0]
    _counts.append(count)

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        count[0] += 1
        if count[0] == FIRST and (inner := _named(function)) is not None:
            inner.__no_type_check__ = True
            _unchecked.append(inner)
        return checked(*args, **kwargs)

    return wrapped


def begin():
    """Check everything again: a test begins."""
    while _unchecked:
        _unchecked.pop().__no_type_check__ = False
    for count in _counts:
        count[0] = 0


def _named(function):
    """What stands under the name of `function`, unwrapped; None for what is inside another function."""
    found = sys.modules.get(function.__module__)
    for name in function.__qualname__.split("."):
        found = vars(found).get(name) if hasattr(found, "__dict__") else None
    found = getattr(found, "fget", getattr(found, "__func__", found))  # of a property, a method of the class
    return inspect.unwrap(found) if inspect.isroutine(found) else None
