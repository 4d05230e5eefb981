"""What a setting is, and how functions and commands take groups of them.

A group is a `TypedDict` whose fields are `Annotated[type, Setting(...)]`. `takes` gives a function written with
`**settings: Unpack[Group]` a signature in which every setting stands with its type and default, so that `help`, editors
and type checkers all know it; and it checks what comes, by name, type and range, before the function begins.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import os
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from itda.errors import InputError, shortened, whole

Function = TypeVar("Function", bound=Callable[..., Any])
_UNIONS = (Union, types.UnionType)


OWN_TYPE: Any = "its own"  # of a flag


@dataclass(frozen=True)
class Setting:
    """One setting: its default, one sentence of help, and what else is to be known of it.

    `least` bounds numbers from below. `kept` says that it belongs to the identity of what was read, which a dictionary
    keeps and which must be equal for work to go on. `flag` is the type that the command line takes in place of its own;
    None for a setting of Python alone. `off` is the help of `--no-NAME`, where it is not "do not" and the help;
    `alias` another spelling of the flag.
    """

    default: Any
    help: str
    least: int | None = None
    kept: bool = False
    flag: Any = OWN_TYPE
    off: str = ""
    alias: str = ""

    def but(self, **changes: Any) -> Setting:
        """The same setting where it has another default, or means something more special."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Declared:
    """A setting with its name, its type, and the group that it stands in."""

    name: str
    kind: Any
    setting: Setting
    group: type

    @property
    def default(self) -> Any:
        """What holds where the setting is not given."""
        return self.setting.default

    @property
    def heading(self) -> str:
        """What the settings of its group are about."""
        return inspect.cleandoc(self.group.__doc__ or "").splitlines()[0]

    @property
    def optional(self) -> bool:
        """Whether None is a value of its own."""
        return self.kind is Any or type(None) in get_args(self.kind)

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The types that a value may have, None left out; of a Literal, the Literal."""
        parts = get_args(self.kind) if get_origin(self.kind) in _UNIONS else (self.kind,)
        return tuple(part for part in parts if part is not type(None))

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values to choose from, where there are only some."""
        return tuple(value for kind in self.kinds if get_origin(kind) is Literal for value in get_args(kind))

    def checked(self, value: Any) -> Any:
        """`value` as this setting has it; raises `InputError` for a wrong type, range or choice."""
        if value is None and self.optional:
            return None
        if self.choices:
            if not isinstance(value, str) or value not in self.choices:
                said = ", ".join(map(repr, self.choices))
                raise InputError(f"`{self.name}` is {shortened(value)}; choose one of {said}.")
            return value
        wanted = [kind for kind in self.kinds if kind in _CHECKS or get_origin(kind) in (Sequence, Callable)]
        if not wanted or len(wanted) < len(self.kinds):  # of a type that is checked where it is used
            if getattr(value, "ndim", 0):  # which no comparison with a name would survive
                raise InputError(
                    f"`{self.name}` is of type {type(value).__name__}: pass no array ({self.setting.help})."
                )
            return value
        for kind in wanted:
            if (found := _check_of(kind)(value)) is not None:
                return self._in_range(found)
        said = " or ".join(map(_said, wanted))
        least = f", {self.setting.least:,} or more" if self.setting.least is not None else ""
        raise InputError(f"`{self.name}` is {shortened(value)}: pass {said}{least}.")

    def _in_range(self, value: Any) -> Any:
        least = self.setting.least
        if least is None or not isinstance(value, int | float) or isinstance(value, bool):
            return value
        if isinstance(value, int) and int in self.kinds:
            return whole(self.name, value, int(least))
        if not value >= least:
            raise InputError(f"`{self.name}` is {shortened(value)}: pass a number, {least:,} or more.")
        return value


def _whole(value: Any) -> int | None:
    return int(value) if isinstance(value, Integral) and not _is_flag(value) else None


def _number(value: Any) -> float | None:
    if not isinstance(value, Real) or _is_flag(value):
        return None
    with suppress(OverflowError):  # of 400 digits: no number that is of use
        return float(value) if not math.isnan(value) else None
    return None


def _flag(value: Any) -> bool | None:
    return bool(value) if _is_flag(value) else None


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool) or type(value).__name__ in ("bool_", "bool")  # NumPy's, without importing it


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _path(value: Any) -> os.PathLike | None:
    return value if isinstance(value, os.PathLike) else None


def _several(items: tuple, value: Any) -> Any:
    """`value` as a list, if it is anything like one; a text in place of a list of texts as it is.

    Items that are to be texts have to be; what numbers and other items mean is checked where they are used.
    """
    if isinstance(value, str) and str in items:
        return value
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable) or not getattr(value, "ndim", 1):
        return None
    found = list(value)
    return found if str not in items or all(isinstance(item, str) for item in found) else None


def _function(value: Any) -> Any:
    return value if callable(value) else None


def _check_of(kind: Any) -> Callable[[Any], Any]:
    """What takes a value of `kind`, and gives it as it is kept, or None for one of another."""
    if get_origin(kind) is Callable:
        return _function
    return _CHECKS.get(kind) or functools.partial(_several, get_args(kind))


def _said(kind: Any) -> str:
    """A type in words."""
    if get_origin(kind) is Callable:
        return "a function"
    lists = {int: "a list of whole numbers", str: "a list of texts"}
    return _SAID.get(kind) or " or ".join(lists[item] for item in get_args(kind) if item in lists) or "a list"


_CHECKS: dict[Any, Callable[[Any], Any]] = {bool: _flag, int: _whole, float: _number, str: _text, os.PathLike: _path}
_SAID = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", os.PathLike: "a path"}


@dataclass(frozen=True)
class Verb:
    """The settings that a function takes: those of a group, with other defaults for some.

    `changed` has a `Setting` or a default by name. Settings in `as_before` are None unless given: they are those of
    what was made before.
    """

    group: type
    changed: Mapping[str, Any] = field(default_factory=dict)
    as_before: frozenset[str] = frozenset()
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by value of the setting `preset`
    open: bool = False  # whether names that are not known are handed on

    @functools.cached_property
    def settings(self) -> dict[str, Declared]:
        """All of them by name, in the order of their declaration."""
        out = {}
        for name, declared in declarations(self.group).items():
            change = self.changed.get(name, declared.setting)
            setting = change if isinstance(change, Setting) else declared.setting.but(default=change)
            kind = declared.kind
            if name in self.as_before:
                setting, kind = setting.but(default=None), kind | None if kind is not Any else Any
            out[name] = replace(declared, setting=setting, kind=kind)
        return out

    def refuse(self, settings: Mapping[str, Any], idle: Iterable[str], why: str) -> None:
        """Raise `InputError` for the first of the `idle` settings that is not its default: it would have no effect."""
        for name in idle:
            if settings[name] != self.settings[name].default:
                raise InputError(f"`{name}` has no effect here, since {why}: leave it out.")

    def complete(self, function: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """What is given, else what the preset says, else the default, all of it checked.

        Raises `InputError` for the first name that is none of the settings, with the one that may have been meant.
        """
        for name in given:
            if name not in self.settings:
                self._unknown(function, name)
        free = {name for preset in self.presets.values() for name in preset}  # None leaves these to the preset
        chosen = {name: value for name, value in given.items() if value is not None or name not in free}
        if (preset := given.get("preset")) is not None and self.presets:
            self.settings["preset"].checked(preset)
            chosen = {**self.presets[preset], **chosen}
        out = {name: declared.checked(chosen.get(name, declared.default)) for name, declared in self.settings.items()}
        return out | {name: value for name, value in chosen.items() if name not in out}

    def _unknown(self, function: str, name: str) -> None:
        near = difflib.get_close_matches(name, self.settings, 1, 0.86 if self.open else 0.6)
        if self.open and not near:
            return
        advice = f"perhaps `{near[0]}` was meant" if near else f"`help({function})` lists all of them"
        raise InputError(f"`{function}` has no setting `{name}`: {advice}.")


def takes(verb: Verb) -> Callable[[Function], Function]:
    """Let a function written with `**settings` take those of `verb`: named, checked and complete."""

    def decorate(function: Function) -> Function:
        own = inspect.signature(function).parameters
        written = [p for p in own.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        names = {p.name for p in written}
        public = function.__qualname__.removesuffix(".__init__")

        @functools.wraps(function)
        def called(*args: Any, **given: Any) -> Any:
            mine = {name: given.pop(name) for name in [*given] if name in names}
            return function(*args, **mine, **verb.complete(public, given))

        added = [
            inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=d.default, annotation=d.kind)
            for n, d in verb.settings.items()
        ]
        rest = [p for p in own.values() if p.kind is inspect.Parameter.VAR_KEYWORD and verb.open]
        parameters = [*written, *added, *(p.replace(annotation=Any) for p in rest)]
        signature = inspect.Signature(parameters, return_annotation=inspect.signature(function).return_annotation)
        called.__signature__ = signature  # type: ignore[attr-defined]
        called.verb = verb  # type: ignore[attr-defined]
        called.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\n{described(verb)}"
        return called  # type: ignore[return-value]

    return decorate


def described(verb: Verb) -> str:
    """All settings of `verb`, by group, a line or two each, as a docstring has them."""
    lines: list[str] = ["Settings"]
    last = ""
    for name, declared in verb.settings.items():
        if declared.heading != last:
            last = declared.heading
            lines += ["", f"  {last}"]
        default = "as before" if name in verb.as_before else repr(declared.default)
        lines.append(f"    {name:<18} {declared.setting.help} ({default})")
    return "\n".join(lines)


_groups: list[type] = []


def groups(*declared: type) -> None:
    """Make the groups known that settings are shown in; what is made of them has no place of its own."""
    _groups.extend(declared)


@functools.cache
def declarations(group: type) -> dict[str, Declared]:
    """The settings of a group by name, each with the group that declares it."""
    out = {}
    for name, hint in get_type_hints(group, include_extras=True).items():
        assert get_origin(hint) is Annotated, f"{group.__name__}.{name} has no Setting"
        home = next((g for g in _groups if _hints(g).get(name) == hint), group)
        kind, setting = get_args(hint)[:2]
        out[name] = Declared(name, kind, setting, home)
    return out


@functools.cache
def _hints(group: type) -> dict[str, Any]:
    return get_type_hints(group, include_extras=True)


def names(*groups: type) -> tuple[str, ...]:
    """The names of all settings of `groups`."""
    return tuple(name for group in groups for name in declarations(group))


def kept(*groups: type) -> tuple[str, ...]:
    """The names of those that belong to the identity of what was read."""
    return tuple(name for group in groups for name, one in declarations(group).items() if one.setting.kept)


def pick(group: type, settings: Mapping[str, Any]) -> Any:
    """Of `settings` those of a group, to be handed on."""
    return {name: settings[name] for name in declarations(group) if name in settings}
