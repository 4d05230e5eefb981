"""What the flags of the commands take, and what `--help` says of those that several commands have."""

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
Wholes = Annotated[tuple[Whole, ...], arg(metavar="N [N ...]", help_behavior_hint="")]
Real = Annotated[float, _spec(_number, "X")]
MaybeReal = Annotated[float | None, _spec(_number, "X"), UNSAID]
Reals = Annotated[tuple[Real, ...], arg(metavar="X [X ...]", help_behavior_hint="")]
Text = Annotated[str, arg(metavar="TEXT")]
MaybeText = Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")]
Words = Annotated[tuple[str, ...], arg(metavar="NAME [NAME ...]", help_behavior_hint="")]
Flag = Annotated[bool, UNSAID]
Layers = Annotated[tuple[Whole, ...], arg(metavar="N [N ...]", help_behavior_hint="")]
Hooks = Annotated[tuple[str, ...], arg(metavar="PATH [PATH ...]", help_behavior_hint="")]
Data = Annotated[Positional[str], arg(metavar="DATA")]
Folder = Annotated[Positional[str], arg(metavar="DIR")]
Out = Annotated[str, arg(metavar="DIR")]

# How a text is read.
Tokens = Annotated[Whole, arg(help="read so many tokens at most")]
ContextLength = Annotated[Whole, arg(help="tokens in a row")]
BatchRows = Annotated[
    int | None,
    _spec(_whole, "N"),
    arg(help="rows that go through the model together", help_behavior_hint="(default: 32)"),
]
Truncate = Annotated[Flag, arg(help="use the first row of each document only; a .txt file is one document")]
Pack = Annotated[Flag, arg(help="join the documents")]
Seed = Annotated[MaybeWhole, arg(help="shuffle the rows")]
Column = Annotated[Text, arg(help="where the text of a record is")]
Split = Annotated[Text, arg(help="of a hub dataset")]
Config = Annotated[MaybeText, arg(help="of a hub dataset")]
DataRevision = Annotated[MaybeText, arg(help="of a hub dataset")]
SpecialTokens = Annotated[Flag, arg(help="read special tokens and position 0 too")]
Padding = Annotated[Flag, arg(help="fill rows up and read the filling like text")]

# Which model, and how it is loaded.
Model = Annotated[Positional[str], arg(metavar="MODEL", help="id of a model on the Hugging Face hub, or its folder")]
Hook = Annotated[Hooks, arg(help="read here instead, by module path (model.layers.8.mlp) or TransformerLens name")]
Tokenizer = Annotated[MaybeText, arg(help="id or folder, where it is not the model's")]
Device = Annotated[MaybeText, arg(help="cpu, cuda, ...; the fastest there is by default")]
Revision = Annotated[MaybeText, arg(help="branch, tag or commit of the model")]
TrustRemoteCode = Annotated[Flag, arg(help="run code that the model's repository brings")]
DeviceMap = Annotated[MaybeText, arg(help="auto spreads the model over GPUs, memory and disk, with accelerate")]
TensorParallel = Annotated[
    MaybeWhole,
    arg(help="share every block of the model between so many GPUs of this machine, a process for each"),
]
StreamLayers = Annotated[
    Flag, arg(help="load the model block by block, as is done by itself where it does not fit into memory")
]
NoStreamLayers = Annotated[Flag, arg(help="load it whole in any case")]
StateGb = Annotated[
    MaybeReal,
    arg(help="of hidden states on disk, when it is streamed, in 10^9 bytes; half of the free disk by default"),
]

# A dictionary that was saved, and what is to be otherwise than it says.
Dictionary = Annotated[Folder, arg(help="folder of a dictionary, or its repository on the hub")]
OtherModel = Annotated[MaybeText, arg(help="id or folder, where it is not the one that the dictionary names")]
OtherK = Annotated[MaybeWhole, arg(help="pursuit steps, if not the dictionary's")]
OtherMethod = Annotated[
    Literal["mp", "omp", "gp"] | None,
    arg(
        metavar="{mp,omp,gp}",
        help="matching pursuit, orthogonal matching pursuit or gradient pursuit, if not the dictionary's",
        help_behavior_hint="",
    ),
]
OtherDtype = Annotated[MaybeText, arg(help="of the model, if not as in training")]
Force = Annotated[Flag, arg(help="use a model or tokenizer that is not the dictionary's")]

# Who works, and what comes out.
Ray = Annotated[
    tuple[str, ...] | None,
    arg(
        metavar="[ADDRESS]",
        help="on the machines of the Ray cluster at this address; without one, on this machine",
        help_behavior_hint="",
    ),
]
Json = Annotated[Flag, arg(help="print the result as JSON")]
