"""The settings of a sweep: from a file, or names and lists, to the trainings that they stand for."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import os
import re
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from itda.disk import as_input_error, checked_path
from itda.errors import InputError, one_line, shortened
from itda.provenance import is_number
from itda.settings import verbs
from itda.training.defaults import admission_of

MOST = 10_000  # trainings: what is more is a slip
SLOW = ("model", "revision", "data")  # changing these costs loading
ONE_PASS = ("layer", "hook")  # read together
SIZES = ("threshold", "n_atoms")  # alternatives
# What a grid may name: what `itda.train` takes, less what says how the work runs.
SETTINGS = {name: declared for name, declared in verbs.GRID.settings.items() if declared.setting.flag is not None}
_REQUIRED = ("model", "data")
_SAID = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


@dataclass(frozen=True)
class Job:
    """One training of a sweep: settings of `itda.train`, and what it reads in one pass."""

    settings: dict[str, Any]  # those that are not the default
    kind: str  # "layer" or "hook"
    places: tuple[int | str, ...]

    @property
    def name(self) -> str:
        """Of its folder: for people, and for the settings alone, so that it finds what was trained before."""
        model = self.settings["model"].rstrip("/\\").replace("\\", "/").split("/")[-1]
        parts = [model] + [f"{n[0]}{self.settings[n]}" for n in ("revision", "k", *SIZES, "seed") if n in self.settings]
        readable = re.sub(r"[^A-Za-z0-9.-]+", "_", "_".join(parts)).strip("._-")[:60]
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()
        return f"{readable}-{digest[:12]}"

    @property
    def admission(self) -> str:
        """How atoms come to be in what `itda.train` makes of these settings."""
        given = {name: value for name, value in self.settings.items() if name in verbs.TRAIN.settings}
        return admission_of(verbs.TRAIN.complete("train", given))


def read_grid(settings: Mapping[str, Any] | str | os.PathLike, *, whole: bool = True) -> dict[str, list]:
    """A list of values by name of a setting, every one of its type; `settings` is a mapping or a TOML file.

    If it is the `whole` of a sweep, what every sweep needs must be there.
    """
    where = "The settings"
    if not isinstance(settings, Mapping):
        where = one_line(os.fspath(settings))
        settings = _file(Path(checked_path(settings)))
    grid: dict[str, list] = {}
    for given, value in settings.items():
        name = str(given).replace("-", "_")
        if name not in (known := (*_REQUIRED, *SETTINGS)):
            near = difflib.get_close_matches(name, known, 1, 0.5)
            hint = f"perhaps {near[0]!r} was meant" if near else f"those of `itda train` are {', '.join(known)}"
            raise InputError(f"{where}: there is no setting {shortened(given)}; {hint}.")
        if name in grid:
            raise InputError(f"{where}: {name!r} is there twice, with - and with _: leave one out.")
        if value is None and default(name) is None:
            continue
        values = list(value) if isinstance(value, list | tuple) else [value]
        if not values:
            raise InputError(f"{where}: {name!r} is an empty list: give it a value, or leave it out.")
        checked = [_checked(v, name, where) for v in values]
        grid[name] = list(dict.fromkeys(SETTINGS[name].checked(v) if name in SETTINGS else v for v in checked))
    for name in _REQUIRED if whole else ():
        if name not in grid:
            raise InputError(f"{where}: {name!r} is missing: give a sweep at least one.")
    if whole and len(set(grid) & set(ONE_PASS)) != 1:
        raise InputError(f"{where}: give either 'layer' or 'hook', the numbers of layers or the paths of modules.")
    return grid


def jobs_of(grid: Mapping[str, list]) -> list[Job]:
    """The trainings of a grid, model by model, the last name changing fastest; none that would be the same."""
    names = [*(name for name in SLOW if name in grid), *(n for n in grid if n not in (*SLOW, *ONE_PASS, *SIZES))]
    axes = [[{name: value} for value in grid[name]] for name in names]
    if sizes := [{name: value} for name in SIZES for value in grid.get(name, ())]:
        axes.append(sizes)
    if (count := prod(map(len, axes))) > MOST:
        raise InputError(f"These settings make {count:,} trainings, and {MOST:,} are the most: make several sweeps.")
    (kind,) = set(grid) & set(ONE_PASS)
    jobs = {}
    for parts in itertools.product(*axes):
        given = {name: value for part in parts for name, value in part.items()}
        said = verbs.PRESETS.get(
            given.get("preset") or "", {}
        )  # of these the default is said too: the preset's holds else
        job = Job({n: v for n, v in given.items() if v != default(n) or n in said}, kind, tuple(grid[kind]))
        jobs[job.name] = job
    return list(jobs.values())


def default(name: str) -> Any:
    """What `itda.train` takes where a setting is not given."""
    return SETTINGS[name].default if name in SETTINGS else None


def _file(path: Path) -> dict[str, Any]:
    with as_input_error(f"{path} could not be read", "give a TOML file of settings"):
        data = path.read_bytes()
    try:
        return tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits is no TOMLDecodeError
        reason = one_line(str(error)) or type(error).__name__
        raise InputError(
            f'{path} is not TOML ({reason}): write lines like `k = [20, 40]` and `model = "gpt2"`.'
        ) from error


def _checked(value: Any, name: str, where: str) -> Any:
    """`value` as the setting `name` wants it."""
    kinds = _kinds(name)
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if float in kinds and type(value) is int:
        with suppress(OverflowError):  # of 400 digits: no number that is of use
            value = float(value)
    if int in kinds and isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) not in kinds:
        wanted = " or ".join(_SAID[kind] for kind in kinds)
        raise InputError(f"{where}: {name!r} is {shortened(value)}: write {wanted}, or a list of such.")
    if isinstance(value, str) and not (value and value.isprintable()):
        what = "has control characters in it" if value else "is empty"
        raise InputError(f"{where}: {name!r} is {shortened(value)}, which {what}: write a plain text.")
    if type(value) in (int, float) and not is_number(value):
        raise InputError(f"{where}: {name!r} is {shortened(value)}: write a finite number.")
    return value


def _kinds(name: str) -> tuple[type, ...]:
    """The types that a file may give the setting `name`."""
    if name in _REQUIRED:
        return (str,)
    declared = SETTINGS[name]
    if declared.choices or declared.kinds == (Any,):
        return (str,)
    return tuple(kind for kind in declared.kinds if kind in _SAID)
