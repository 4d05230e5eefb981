"""From settings to flags: what a command takes is built from its own signature and the settings of its verb.

tyro parses and prints; nothing of the library is imported for that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from tyro.conf import Positional, arg
from tyro.constructors import PrimitiveConstructorSpec

from itda.errors import InputError
from itda.settings import Declared, Verb
from itda.settings.declare import OWN_TYPE


def _whole(args: list[str]) -> int:
    with contextlib.suppress(ValueError):
        return int(args[0])
    with contextlib.suppress(ValueError, OverflowError):
        if (number := float(args[0])).is_integer():
            return int(number)
    raise ValueError(f"{args[0]!r} came, and a whole number was wanted")


def _number(args: list[str]) -> float:
    with contextlib.suppress(ValueError):
        return float(args[0])
    raise ValueError(f"{args[0]!r} came, and a number was wanted")


def _spec(read: Callable[[list[str]], Any], metavar: str) -> Any:
    fits: Any = lambda x: x is None or isinstance(x, int | float)  # noqa: E731
    return PrimitiveConstructorSpec(1, metavar, read, fits, lambda x: [str(x)])


# Numbers as people write them: 1_000_000, 1e6.
Whole = Annotated[int, _spec(_whole, "N")]
MaybeWhole = Annotated[int | None, _spec(_whole, "N")]
Real = Annotated[float, _spec(_number, "X")]

# What commands take besides settings.
Model = Annotated[Positional[str], arg(metavar="MODEL", help="id of a model on the Hugging Face hub, or its folder")]
Data = Annotated[
    Positional[str],
    arg(
        metavar="DATA",
        help="a .txt, .jsonl, .json, .csv or .parquet file (.gz and .zst too), a folder of these or of "
        "activations, or the id of a dataset on the hub",
    ),
]
Dictionary = Annotated[Positional[str], arg(metavar="DIR", help="folder of a dictionary, or its repository on the hub")]
Out = Annotated[str, arg(metavar="DIR", help="the folder to make")]
Json = Annotated[bool, arg(help="print the result as JSON", help_behavior_hint="")]


def said(help: str, metavar: str = "TEXT") -> Any:
    """What is said of a flag that may be left out."""
    return arg(metavar=metavar, help=help, help_behavior_hint="")


def some(help: str, metavar: str) -> Any:
    """What is said of a flag that takes several texts."""
    return said(help, f"{metavar} [{metavar} ...]")


@dataclasses.dataclass(frozen=True)
class Command:
    """A command: its function, the verb whose settings it takes, and those that its short help shows.

    With `many`, a setting takes several values (`itda sweep`).
    """

    function: Callable[..., None]
    verb: Verb | None
    common: tuple[str, ...]
    many: bool

    @property
    def name(self) -> str:
        """As it is typed."""
        return self.function.__name__.removesuffix("_")

    @property
    def summary(self) -> str:
        """The first line of its help."""
        return (self.function.__doc__ or "").splitlines()[0]

    @functools.cached_property
    def settings(self) -> dict[str, Declared]:
        """The settings that have a flag, less those that it takes in its own way."""
        own = inspect.signature(self.function).parameters
        known = {} if self.verb is None else self.verb.settings
        return {name: d for name, d in known.items() if d.setting.flag is not None and name not in own}

    def form(self, short: bool = False) -> type:
        """A dataclass whose fields are all flags, or those of the short help, by group."""
        hints = get_type_hints(self.function, include_extras=True)
        own = [p for p in inspect.signature(self.function).parameters.values() if p.kind is not p.VAR_KEYWORD]
        fields: list[Any] = []
        for p in own:
            default = () if p.default is p.empty else (dataclasses.field(default=p.default),)
            fields.append((p.name, hints[p.name], *default))
        shown = [d for name, d in self.settings.items() if not short or name in self.common]
        headings = dict.fromkeys(d.heading for d in shown)
        for number, heading in enumerate(headings):
            parts = [flag for d in shown if d.heading == heading for flag in self._flags(d)]
            group = dataclasses.make_dataclass(f"Group{number}", parts, namespace={"__doc__": ""})
            fields.append((_field_name(heading), group))
        doc = inspect.cleandoc(self.function.__doc__ or "")
        if short and len(shown) < len(self.settings):
            doc += f"\n\nThe settings that most people need; all: itda {self.name} --help-all"
        return dataclasses.make_dataclass(self.name, fields, kw_only=True, namespace={"__doc__": doc})

    def _flags(self, declared: Declared) -> list[tuple]:
        if self.many:
            return [(declared.name, _several(declared), dataclasses.field(default=()))]
        verb = self.verb
        as_before = verb is not None and declared.name in verb.as_before
        preset = verb is not None and any(declared.name in said for said in verb.presets.values())
        flags = _one(declared, as_before, both=as_before or preset)
        return [(name, kind, dataclasses.field(default=default)) for name, kind, default in flags]

    def bound(self, form: Any) -> Callable[[], None]:
        """The function, with what the `form` was filled in with."""
        own = {name: getattr(form, name) for name in inspect.signature(self.function).parameters if hasattr(form, name)}
        found: dict[str, Any] = {}
        for part in (value for value in vars(form).values() if dataclasses.is_dataclass(value)):
            found |= vars(part)
        given = {}
        for name, declared in self.settings.items():
            value = _listed(declared, found[name]) if self.many else _given(declared, found)
            if value is not None:
                given[name] = value
        return functools.partial(self.function, **own, **given)


def command(verb: Verb | None = None, common: str = "", many: bool = False) -> Callable[[Callable[..., None]], Command]:
    """Make a command of a function; `common` are the names of the settings in its short help."""
    return lambda function: Command(function, verb, tuple(common.split()), many)


def _field_name(heading: str) -> str:
    return heading.lower().replace(" ", "_").replace("-", "_")


def _kind(declared: Declared) -> tuple[Any, bool]:
    """What one value of the flag is, and whether it takes several."""
    if declared.setting.flag is not OWN_TYPE:
        return declared.setting.flag, False
    kinds = declared.kinds
    several = [kind for kind in kinds if hasattr(get_origin(kind), "__getitem__") and get_origin(kind) is not Literal]
    return (get_args(several[0])[0], True) if several else (kinds[0], False)


def _one(declared: Declared, as_before: bool, both: bool = False) -> list[tuple[str, Any, Any]]:
    """The flags of a setting: name, type with help, and default; with `both`, a yes and a no where it is a flag."""
    kind, several = _kind(declared)
    setting, name, default = declared.setting, declared.name, declared.default
    unsaid = default is None or isinstance(default, bool) or several
    hint = "(as in training)" if as_before else "" if unsaid else f"(default: {_shown(default)})"
    said: dict[str, Any] = dict(help=setting.help, help_behavior_hint=hint)
    if setting.alias:
        said["aliases"] = (setting.alias,)
    if declared.kinds == (bool, str) and kind is bool and setting.flag is OWN_TYPE:  # --ray [ADDRESS]
        return [(name, Annotated[tuple[str, ...] | None, arg(metavar="[ADDRESS]", **said)], None)]
    if kind is bool:
        off = (f"no_{name}", Annotated[bool, arg(**said | {"help": setting.off or f"do not {setting.help}"})], False)
        on = (name, Annotated[bool, arg(**said)], False)
        if both or default is None:
            return [on, off]
        return [off] if default is True else [on]
    if several:
        item: Any = Whole if kind is int else str
        metavar = "N" if kind is int else "NAME"
        return [(name, Annotated[tuple[item, ...], arg(metavar=f"{metavar} [{metavar} ...]", **said)], ())]
    if get_origin(kind) is Literal:
        choices = "{" + ",".join(get_args(kind)) + "}"
        return [(name, Annotated[kind | None, arg(metavar=choices, **said)], None)]
    if kind in (int, float):
        read, metavar = (_whole, "N") if kind is int else (_number, "X")
        return [(name, Annotated[kind | None, _spec(read, metavar), arg(**said)], None)]
    return [(name, Annotated[str | None, arg(metavar="TEXT", **said)], None)]


def _several(declared: Declared) -> Any:
    """The flag of a setting that takes several values."""
    kind, _ = _kind(declared)
    said: dict[str, Any] = dict(help=declared.setting.help, help_behavior_hint="")
    if kind is bool:
        return Annotated[tuple[Literal["true", "false"], ...], arg(metavar="{true,false} ...", **said)]
    kinds: dict[Any, tuple[Any, str]] = {int: (Whole, "N"), float: (Real, "X")}
    item: Any
    item, metavar = kinds.get(kind, (str, "TEXT"))
    return Annotated[tuple[item, ...], arg(metavar=f"{metavar} [{metavar} ...]", **said)]


def _given(declared: Declared, found: Mapping[str, Any]) -> Any:
    """The value of a setting that the flags say; None if they say nothing of it."""
    name, value, off = declared.name, found.get(declared.name), found.get(f"no_{declared.name}", False)
    if off and value:
        raise InputError(f"Both `{flag(name)}` and `--no-{flag(name)[2:]}` were given: choose one of them.")
    if off:
        return False
    if declared.kinds == (bool, str) and not isinstance(value, bool):
        return None if value is None else address(value)
    if isinstance(value, tuple):
        single = declared.kinds[0] in (int, str) and len(value) == 1  # of `layer` and `hook`, which take one or several
        return value[0] if single else list(value) or None
    return value or None if isinstance(value, bool) else value


def _listed(declared: Declared, values: tuple) -> list | None:
    """The values of a setting that takes several; None without any."""
    return [value == "true" if _kind(declared)[0] is bool else value for value in values] or None


def flag(name: str) -> str:
    """A setting as it is typed."""
    return "--" + name.replace("_", "-")


def address(ray: tuple[str, ...]) -> bool | str:
    """What `--ray` says: this machine, or an address."""
    if len(ray) > 1:
        raise InputError(
            f"--ray: {' '.join(ray)!r} came, and one address or none was wanted: put what belongs elsewhere before it."
        )
    return ray[0] if ray else True


def _shown(value: Any) -> str:
    return f"{value:_}" if isinstance(value, int) and value > 9999 else f"{value}"
