"""`itda.page`: the pages of a dictionary as a folder that opens in any browser, written at once or not at all."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files as resources
from pathlib import Path

from itda._version import __version__
from itda.arguments import FLAG, PATH, checks
from itda.beside import EVAL, is_evaluation
from itda.dictionary.itda import ITDA
from itda.disk import ELSEWHERE, as_input_error, checked_path, json_object, sync_folder, write_through
from itda.errors import InputError, counted
from itda.locks import PATIENCE, locked
from itda.pages import data
from itda.results import Report
from itda.usage.kept import Uses

FORMAT, VERSION = "itda-page", 1
MANIFEST, DATA = "page.json", "data"
ASSETS = ("index.html", "page.css", "page.js", "views.js", "search.js", "preact.js", "preact.LICENSE")
_DATA = re.compile(r"(index|texts|contexts|atoms-\d{3,})\.js")


@dataclass(frozen=True, repr=False)
class Page(Report):
    """A folder of pages that was written; made by `itda.page`."""

    path: str
    index: str  # the file to open
    n_atoms: int
    files: int
    size: int  # bytes of all of them
    uses: bool  # whether there were any to show

    def __str__(self) -> str:
        more = "" if self.uses else "; it shows labels alone: `itda uses` first, and it shows what every atom does"
        return (
            f"{self.path}: {counted(self.n_atoms, 'atom')}, {counted(self.files, 'file')}, {self.size / 1e6:.1f} MB"
            f"{more}; open {self.index}"
        )

    __repr__ = __str__


@checks(dictionary=PATH, out=PATH, overwrite=FLAG)
def page(dictionary: str | os.PathLike, out: str | os.PathLike, *, overwrite: bool = False) -> Page:
    """Write pages to look at a dictionary with, which need no network and no model: `index.html` in the folder `out`.

    `dictionary` is its folder, or its repository on the hub. They show what stands in that folder: labels, what
    `itda uses` saw and what `itda eval` measured. What was written there before is replaced with `overwrite`.

    Raises `InputError` for a damaged dictionary or uses, for a folder that holds anything else, and for pages that are
    there already.
    """
    target = Path(os.path.realpath(checked_path(out)))
    if Path(os.path.realpath(checked_path(dictionary))) in (target, *target.parents):
        raise InputError(f"{target} is in the folder of the dictionary, which holds nothing else: choose another.")
    _check_free(target, overwrite)
    found = ITDA.of(dictionary)
    uses = Uses.load(dictionary, found) if Uses.exist(dictionary) else None
    measured = Path(dictionary) / EVAL
    evaluation = json_object(measured) if is_evaluation(measured) else None
    size, count = _write(target, data.files(found, uses, evaluation or None), overwrite)
    return Page(str(target), str(target / ASSETS[0]), len(found), count, size, uses is not None)


def _check_free(target: Path, overwrite: bool) -> None:
    """Raise `InputError` unless pages may be written to `target`."""
    with as_input_error(f"{target} could not be used", ELSEWHERE):
        if not os.path.lexists(target):
            return
        if not target.is_dir():
            raise InputError(f"{target} is a file, and pages are a folder: choose another path.")
        names = os.listdir(target)
        foreign = [name for name in names if not _is_ours(target, name)]
        if names and json_object(target / MANIFEST).get("format") != FORMAT:
            foreign = foreign or names
    if foreign:
        raise InputError(
            f"{target} holds {sorted(foreign)[0]!r}, which is not part of a page, so nothing was written: choose a new "
            "or empty folder."
        )
    if names and not overwrite:
        raise InputError(f"{target} holds a page already: `overwrite` (`--overwrite`) replaces it.")


def _is_ours(target: Path, name: str) -> bool:
    """Whether a thing of this name in a folder of pages is what we write there."""
    path = target / name
    if path.is_symlink():
        return False
    if name == DATA:
        return path.is_dir() and all(_DATA.fullmatch(each) and (path / each).is_file() for each in os.listdir(path))
    return name in (*ASSETS, MANIFEST) and path.is_file()


def _write(target: Path, made: Iterator[tuple[str, bytes]], overwrite: bool) -> tuple[int, int]:
    """Write all files beside `target` and put the folder in its place in one step; bytes and number of files."""
    with (
        as_input_error(f"{target} could not be written", ELSEWHERE),
        locked(target, patience=PATIENCE) as new,
    ):
        _check_free(target, overwrite)  # once more: others may have written while it was waited for
        stage, aside = (target.parent / f".{target.name}.tmp-{secrets.token_hex(8)}" for _ in range(2))
        try:
            size, count = _fill(stage, made)
            if os.listdir(target):
                os.rename(target, aside)
            elif os.name == "nt":  # where nothing is renamed over an empty folder
                target.rmdir()
            try:
                os.rename(stage, target)
            except BaseException:
                if aside.exists():
                    os.rename(aside, target)
                raise
        except BaseException:
            with suppress(OSError):
                _remove(stage)
            raise
        if not new and aside.exists():
            _remove(aside)
        sync_folder(target.parent)
    return size, count


def _fill(stage: Path, made: Iterator[tuple[str, bytes]]) -> tuple[int, int]:
    """Write all files into the new folder `stage`."""
    stage.mkdir()
    (stage / DATA).mkdir()
    size = count = 0
    assets = resources("itda.pages") / "assets"
    manifest = json.dumps({"format": FORMAT, "version": VERSION, "itda_version": __version__}).encode() + b"\n"
    own = ((name, (assets / name).read_bytes()) for name in ASSETS)
    for name, content in (*own, (MANIFEST, manifest)):
        write_through(stage / name, [content])
        size, count = size + len(content), count + 1
    for name, content in made:
        write_through(stage / DATA / name, [content])
        size, count = size + len(content), count + 1
    sync_folder(stage / DATA)
    sync_folder(stage)
    return size, count


def _remove(folder: Path) -> None:
    """Remove what we wrote there, and nothing else: a folder with more in it stays."""
    for inner in (folder / DATA, folder):
        if inner.is_dir():
            for name in os.listdir(inner):
                if (inner / name).is_file():
                    (inner / name).unlink()
            inner.rmdir()
