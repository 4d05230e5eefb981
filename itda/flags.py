"""What the flags of the commands take, and how they are said in `--help`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg
from tyro.constructors import PrimitiveConstructorSpec


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
    return PrimitiveConstructorSpec(1, metavar, read, lambda x: x is None or isinstance(x, int | float), _shown)


def _shown(value: Any) -> list[str]:
    return [f"{value:_}" if isinstance(value, int) and value > 9999 else f"{value}"]


# Numbers as people write them (1_000_000, 1e6), and flags of which nothing is said where they are not given.
UNSAID = arg(help_behavior_hint="")
Whole = Annotated[int, _spec(_whole, "N")]
MaybeWhole = Annotated[int | None, _spec(_whole, "N"), UNSAID]
Real = Annotated[float, _spec(_number, "X")]
MaybeReal = Annotated[float | None, _spec(_number, "X"), UNSAID]
MaybeText = Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")]
Text = Annotated[str, arg(metavar="TEXT")]
Flag = Annotated[bool, UNSAID]
Dictionary = Annotated[Positional[str], arg(metavar="DIR")]
Words = Annotated[tuple[str, ...], arg(metavar="NAME [NAME ...]", help_behavior_hint="")]
Layers = Annotated[tuple[Whole, ...], arg(metavar="N [N ...]", help_behavior_hint="")]
Hooks = Annotated[tuple[str, ...], arg(metavar="PATH [PATH ...]", help_behavior_hint="")]
Model = Annotated[Positional[str], arg(metavar="MODEL")]
Data = Annotated[Positional[str], arg(metavar="DATA")]
Method = Annotated[Literal["mp", "omp", "gp"] | None, arg(metavar="{mp,omp,gp}", help_behavior_hint="")]
Architecture = Annotated[Literal["matching_pursuit", "itda"], arg(metavar="{matching_pursuit,itda}")]
BatchRows = Annotated[int | None, _spec(_whole, "N"), arg(help_behavior_hint="(default: 32)")]
Wholes = Annotated[tuple[Whole, ...], arg(metavar="N [N ...]", help_behavior_hint="")]
Reals = Annotated[tuple[Real, ...], arg(metavar="X [X ...]", help_behavior_hint="")]
Ray = Annotated[tuple[str, ...] | None, arg(metavar="[ADDRESS]", help_behavior_hint="")]
