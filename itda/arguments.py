"""Arguments at the door of a public function: the wrong type is refused in one sentence, one or several are a list.

    @checks(path=PATH, atom=WHOLE)
    def atom_report(path, atom, *, top=12): ...

Settings are checked where they are declared (`itda.settings`); this is for what a function is about.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple, TypeVar

from itda.errors import InputError, shortened

Function = TypeVar("Function", bound=Callable[..., Any])


class Kind(NamedTuple):
    """What an argument has to be: in words, and whether a value is."""

    said: str
    fits: Callable[[Any], bool]


def _named(value: Any, *names: str) -> bool:
    """Whether `value` is of a class of such a name, or derived from one: classes are not imported for this."""
    return any(kind.__name__ in names for kind in type(value).__mro__)


def _numbers(value: Any, kind: Any) -> bool:
    """Whether `value` is an array or tensor of numbers, or a list of such; which dtypes fit is checked further in."""
    if _named(value, "Tensor"):
        return not value.is_complex()
    if _named(value, "ndarray"):
        return value.dtype.kind in "biuf"
    listed = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    return listed and all(isinstance(item, kind) and not isinstance(item, bool) for item in value)


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _path(value: Any) -> bool:
    return isinstance(value, str | os.PathLike)


TEXT = Kind("a text", lambda value: isinstance(value, str))
PATH = Kind("a path or a name, as text", _path)
WHOLE = Kind("a whole number", _whole)
FLAG = Kind("True or False", lambda value: isinstance(value, bool) or _named(value, "bool_", "bool"))
ARRAY = Kind("an array or tensor of numbers", lambda v: _named(v, "Tensor", "ndarray") and _numbers(v, Real))
INTEGERS = Kind("an array or list of whole numbers", lambda value: _numbers(value, Integral))
COUNT_OR_INTEGERS = Kind("a whole number, or an array or list of them", lambda v: _whole(v) or _numbers(v, Integral))
ITDA = Kind("an ITDA (`itda.ITDA.load` reads one)", lambda value: _named(value, "ITDA"))
DICTIONARY = Kind("an ITDA, its folder or its repository on the hub", lambda v: _named(v, "ITDA") or _path(v))
LABELS = Kind("the `Labels` of these tokens", lambda value: _named(value, "Labels"))
CODES = Kind("`Codes`, as `encode` and `pursue` give them", lambda value: _named(value, "Codes"))
GRID = Kind("a dict of settings, or the path of a TOML file", lambda value: isinstance(value, Mapping) or _path(value))


def listed(value: Any) -> list:
    """`value` as a list: [] for None, and one text, number or other single thing in a list of its own."""
    return [] if value is None else [value] if _is_one(value) else list(value)


def _is_one(value: Any) -> bool:
    return isinstance(value, str) or not isinstance(value, Iterable)


def places_of(layer: Any, hook: Any, *, needed: bool = False) -> tuple[list, bool]:
    """What `layer` or `hook` names as a list, [] if neither is given, and whether it was no list.

    Raises `InputError` if both are given, and, where one is `needed`, if none is.
    """
    if (layer is not None and hook is not None) or (needed and layer is None and hook is None):
        raise InputError("Pass one of `layer` (`--layer`), a number, and `hook` (`--hook`), the path of a module.")
    given = hook if layer is None else layer
    return listed(given), _is_one(given)


def checks(**kinds: Kind) -> Callable[[Function], Function]:
    """Let a function raise `InputError` for arguments of other kinds than these; None fits where it is the default."""

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        free = {name for name, p in signature.parameters.items() if p.default is None}
        order = list(signature.parameters)

        @functools.wraps(function)
        def called(*args: Any, **given: Any) -> Any:
            for name, value in (*zip(order, args, strict=False), *given.items()):
                kind = kinds.get(name)
                if kind is not None and not (value is None and name in free) and not kind.fits(value):
                    raise InputError(f"`{name}` is {shortened(value)}: pass {kind.said}.")
            return function(*args, **given)

        return called  # type: ignore[return-value]

    return decorate
