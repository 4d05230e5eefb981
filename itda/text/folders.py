"""Which files of a folder are read: those of one split and configuration, by the conventions of `datasets`."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from itda.errors import InputError
from itda.text.files import SUPPORTED, brief, check_pointer, kind_of

EVERY = "all"  # the split that is all of them
BEFORE = (".txt", ".jsonl", ".parquet")  # what was read of a folder before splits were told apart
SAVED, SAVED_DICT = ("state.json", "dataset_info.json"), "dataset_dict.json"  # as `save_to_disk` leaves them
MAY_BE_ABOUT = (".json", ".csv", ".tsv")  # kinds of which a folder may hold some that are about the data
# Files that say something about data, in every folder that a data set was put into.
_ABOUT = re.compile(
    r"(readme|license|licence|citation|changelog|notice|contributing)(\.(md|rst|txt))?|(dataset_infos?|dataset_dict|state"
    r"|config)\.json|.*\.(py|sh|lock|sha256|md5)|makefile",
    re.IGNORECASE,
)


@dataclass
class Chosen:
    """The files that are read, in order, or folders of `save_to_disk`; and what is said of the choice."""

    files: list[str]
    split: str | None = None  # where it was told apart or asked for
    config: str | None = None
    unread: list[str] = field(default_factory=list)  # those that are neither read nor of another split


def chosen_files(folder: str, split: str | None, config: str | None, holds: Callable[[str], bool]) -> Chosen:
    """What is read of `folder`, a split or a configuration asked for or not.

    `holds` says of a .json whose name is that of a file about data whether it has records all the same. Linked folders
    and files are read like others, once. Files are sorted by name, level by level; hidden ones are left out. If
    their names tell splits apart, "train" is read unless another is named; "all" is every file. Raises `InputError`
    for a split or configuration that is not there, and a folder without files that can be read.
    """
    found = listed(folder)
    saved = {path for path in found if os.path.isdir(path)}
    found = [path for path in found if os.path.dirname(path) not in saved]
    about = {path for path in found if _about(path) and not (kind_of(path) == ".json" and holds(path))}
    files = [p for p in found if p in saved or (_readable(p) and not (p in about and kind_of(p) == ".json"))]
    if not files:
        _none(folder, found)
    if said := _declared(folder):
        of = _by_config(folder, config, found)
    elif config not in (None, "default"):
        raise InputError(
            f"`config` is {config!r}, but the folder {folder!r} has no configurations, since it has no README.md that "
            "names some: leave it out."
        )
    else:
        of = _splits(folder, files)
    known = {path for every in of.values() for path in every}
    if split is not None and split != EVERY and split not in (of or ("train",)):
        there = f"has {', '.join(map(repr, of))}" if of else "is all one, since no name of a file in it tells another"
        raise InputError(
            f"`split` is {split!r}, but the folder {folder!r} {there}: name one that is there, or 'all' for every file."
        )
    if (
        split is None
        and "train" in of
        and (said or len(of) > 1 or known >= {path for path in files if path not in about})
    ):
        split = "train"  # else one file happens to be called so
    taken = of.get(split or EVERY, known if said else files)
    once, read = _once(taken), {os.path.realpath(path) for path in taken}
    unread = [] if said else [p for p in found if p not in known | about and os.path.realpath(p) not in read]
    return Chosen(once, split, config, unread)


def chosen_before(folder: str) -> Chosen:
    """What was read of a folder before splits were told apart: for dictionaries of that time."""
    files = [path for path in listed(folder, links=False) if path.lower().endswith(BEFORE) and _is_file(path)]
    if not files:
        _none(folder, [])
    return Chosen(files)


def listed(folder: str, links: bool = True) -> list[str]:
    """The files in `folder` and its folders, sorted by name level by level; a folder of `save_to_disk` is one of them.

    Linked folders come after others, so that what is in both is read where it lies; none is read twice.
    """

    def refuse(error: OSError):
        raise InputError(f"`data`: {error.filename!r} cannot be read ({brief(error)}): check the folder.") from error

    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        linked: list[str] = []
        for start in waiting:
            for parent, folders, names in os.walk(start, onerror=refuse):
                if not _first_visit(parent, seen):
                    folders[:] = []
                    continue
                folders[:] = [name for name in folders if not name.startswith(".")]
                linked += [p for p in (os.path.join(parent, name) for name in folders) if links and os.path.islink(p)]
                found += [os.path.join(parent, name) for name in names if not name.startswith(".")]
                if is_saved(parent) and parent != folder:
                    found.append(parent)
        waiting = sorted(linked, key=_order)
    return sorted(found, key=_order)


def is_saved(folder: str) -> bool:
    """Whether `Dataset.save_to_disk` wrote this folder."""
    return all(os.path.isfile(os.path.join(folder, name)) for name in SAVED)


def saved_split(folder: str) -> str:
    """The split that a folder of `Dataset.save_to_disk` says it is."""
    try:
        with open(os.path.join(folder, SAVED[0]), encoding="utf-8") as file:
            found = json.load(file).get("_split")
    except (OSError, ValueError, AttributeError, RecursionError):
        found = None
    return found if isinstance(found, str) else "train"


def saved_splits(folder: str) -> list[str] | None:
    """The splits of a folder that `DatasetDict.save_to_disk` wrote; None for any other."""
    try:
        with open(os.path.join(folder, SAVED_DICT), encoding="utf-8") as file:
            found = json.load(file)["splits"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else None


def _order(path: str) -> list[str]:
    return path.split(os.sep)


def _first_visit(folder: str, seen: set[tuple[int, int]]) -> bool:
    there = os.stat(folder)
    key = there.st_dev, there.st_ino
    return key not in seen and not seen.add(key)  # type: ignore[func-returns-value]


def _is_file(path: str) -> bool:
    return os.path.isfile(path) or not os.path.exists(path)  # a broken link is said later


def _once(paths: Iterable[str]) -> list[str]:
    """The files in order, each of them once, and where it lies rather than where a link to it does."""
    first: dict[str, str] = {}
    for path in sorted(paths, key=lambda path: (os.path.islink(path), _order(path))):
        first.setdefault(os.path.realpath(path), path)
    return sorted(first.values(), key=_order)


def _readable(path: str) -> bool:
    kind = kind_of(path)
    empty = kind in MAY_BE_ABOUT and not (os.path.isfile(path) and os.path.getsize(path))
    return kind is not None and not empty and _is_file(path)


def _about(path: str) -> bool:
    return _ABOUT.fullmatch(os.path.basename(path)) is not None


def endings(paths: Iterable[str]) -> dict[str, int]:
    """How many of the files end in what, the most frequent ending first."""
    found = (os.path.basename(path) for path in paths)
    return dict(Counter(os.path.splitext(name)[1].lower() or name for name in found).most_common())


def _none(folder: str, found: list[str]) -> None:
    others = sorted({os.path.splitext(file)[1] or os.path.basename(file) for file in found})
    for path in found:
        check_pointer(path)
    raise InputError(
        f"`data` is the folder {folder!r} with {', '.join(map(repr, others[:8])) or 'no files'}, "
        f"but {SUPPORTED.removeprefix('a ').removesuffix(' or a folder of these')} was wanted in it: add one or pass "
        "another folder."
    )


def _splits(folder: str, files: Sequence[str]) -> dict[str, list[str]]:
    """The files of each split by what names say, as `datasets` reads them; none where they say nothing."""
    from datasets.data_files import DEFAULT_PATTERNS_ALL, _get_data_files_patterns
    from fsspec.utils import glob_translate

    names = {
        os.path.relpath(path, folder).replace(os.sep, "/") + "/x.arrow" * os.path.isdir(path): path for path in files
    }

    def matching(pattern: str) -> list[str]:
        fits = re.compile(glob_translate(pattern))
        out = [name for name in names if fits.match(name)]
        if not out:
            raise FileNotFoundError(pattern)
        return out

    try:
        patterns = _get_data_files_patterns(matching)
    except ValueError as error:
        raise InputError(
            f"`data`: {folder!r} has names that say no split ({brief(error)}): rename the files."
        ) from error
    if patterns == {str(split): said for split, said in DEFAULT_PATTERNS_ALL.items()}:
        return {}
    found: dict[str, list[str]] = {}
    for split, every in patterns.items():
        taken = {name for pattern in every for name in _or_none(matching, pattern)}
        found[str(split)] = [path for name, path in names.items() if name in taken]
    return found


def _or_none(matching: Any, pattern: str) -> list[str]:
    try:
        return matching(pattern)
    except FileNotFoundError:
        return []


def _declared(folder: str) -> bool:
    """Whether the README.md of a data set says which files are which configuration."""
    try:
        with open(os.path.join(folder, "README.md"), encoding="utf-8") as file:
            head = file.read(1 << 20)
    except (OSError, UnicodeDecodeError):
        return False
    front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", head, re.DOTALL)
    return bool(front and re.search(r"^configs:", front[1], re.MULTILINE))


def _by_config(folder: str, config: str | None, found: Iterable[str]) -> dict[str, list[str]]:
    """The files of each split of a configuration, as the README.md has it and `datasets` reads it."""
    import datasets

    start = f"`data` is the folder {folder!r}, whose README.md "
    mend = "mend or remove that README.md"
    try:
        builder = datasets.load_dataset_builder(os.path.abspath(folder), config)
    except FileNotFoundError as error:
        raise InputError(f"{start}has `configs` that match no file ({brief(error)}): {mend}.") from error
    except Exception as error:  # `datasets` raises anything, and lists the configurations there are
        try:
            datasets.get_dataset_config_names(os.path.abspath(folder))
        except Exception:
            raise InputError(f"{start}has `configs` that cannot be read ({brief(error)}): {mend}.") from error
        raise InputError(
            f"{start}names configurations, and `config` is {config!r} ({brief(error)}): choose one of them."
        ) from error
    there = {os.path.realpath(path): path for path in found}
    files = builder.config.data_files or {}
    of = {str(s): [there[r] for p in paths if (r := os.path.realpath(p)) in there] for s, paths in files.items()}
    if not any(of.values()):
        raise InputError(f"{start}has `configs` that match no file that is read here: {mend}.")
    return of
