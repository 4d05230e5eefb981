"""Functions of the library as users call them, past the type checker of the tests."""

import inspect

from itda.settings import takes


def untyped(function):
    """`function` without its check of types; settings are checked as ever."""
    plain = inspect.unwrap(function)
    return takes(function.verb)(plain) if hasattr(function, "verb") else plain
