"""Data of any kind -> its documents, each as blocks of text: a list, a file, a folder or a Hub dataset."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set, Sized
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from itda.errors import InputError
from itda.remote import HUB_ID
from itda.settings.groups import Source
from itda.text import folders
from itda.text.files import COMPRESSED, KINDS, SUPPORTED, Reading, brief, check_pointer, kind_of, read_file

_ENDINGS = (*KINDS, *COMPRESSED, ".zip", ".arrow", ".md", ".html", ".pdf")  # of what is meant as a file

Chat = Callable[[list], str]  # the text of messages


class Unread(UserWarning):
    """Files in a folder of data that are not read."""


@dataclass
class Documents:
    """Documents in order: every call starts again. A document is blocks of text.

    `about` has what a provenance says of them besides: `split` and `config` as read, `files`, and `unread` by ending.
    """

    again: Callable[[Reading], Iterator[Iterable[str]]]
    about: dict[str, Any] = field(default_factory=dict)
    size: int = 0  # bytes of all files; 0 if not known
    chat: bool = False  # whether the first of them are messages
    reading: Reading = field(default_factory=lambda: Reading(0))  # how far the latest call is

    def __call__(self) -> Iterator[Iterable[str]]:
        self.reading = Reading(self.size)
        return self.again(self.reading)

    def share(self) -> float | None:
        """The part of all bytes that the latest call has read; None where that is not known."""
        return self.reading.share if self.size else None


def open_documents(
    data, source: Source, chat: Chat | None = None, as_before: bool = False
) -> tuple[str, Documents, str | None]:
    """What `data` is: its kind, its documents, and the revision that was found.

    `chat` makes text of a column of messages. With `as_before`, a folder is read as it was before splits were told
    apart: every .txt, .jsonl and .parquet file. Raises `InputError` for what is not there or cannot be read, and for
    parts of it that are asked for and not there. Files that are not read are named in a warning, `Unread`.
    """
    chats = 0

    def counted(messages: list) -> str:
        nonlocal chats
        chats += 1
        return chat(messages) if chat else " "  # without a tokenizer nobody reads it

    kind, found, revision = _opened(data, source, counted, as_before)
    found.chat = found.chat or chats > 0
    return kind, found, revision


def _opened(data, source: Source, chat: Chat, as_before: bool) -> tuple[str, Documents, str | None]:
    if not isinstance(data, (str, os.PathLike)):
        return "texts", Documents(_texts(data, source, chat), _undivided(source, "texts in memory")), None
    path = os.fsdecode(data)
    if os.path.exists(path):
        kind = "folder" if os.path.isdir(path) else "file"
        return kind, _local(path, source, chat, as_before), None
    file_like = path.lower().endswith(_ENDINGS) or path.startswith((".", "~", os.sep))
    if isinstance(data, os.PathLike) or (file_like and "\n" not in path):
        raise InputError(f"`data` is {path!r}, but there is no such file or folder: check the path.")
    if HUB_ID.fullmatch(path):
        return "hub", *_hub(path, source, chat)
    raise InputError(
        f"`data` is the string {brief(path)}, neither a path nor the id of a Hub dataset: "
        "pass one of these, or a list of strings to use it as text itself, [text]."
    )


def _undivided(source: Source, what: str, split: str = "train", files: int | None = None) -> dict[str, Any]:
    """What there is to say of data of one split and no configuration, after a look whether others were asked for."""
    for name, only in (("split", split), ("config", "default")):
        if (value := source.get(name)) not in (None, only, folders.EVERY if name == "split" else None):
            raise InputError(
                f"`{name}` is {value!r}, but `data` is {what} and has no other than {only!r}: leave it out."
            )
    _no_revision(source)
    return {"split": source.get("split"), "config": source.get("config"), "files": files}


def _no_revision(source: Source) -> None:
    if (revision := source.get("data_revision")) is not None:
        raise InputError(
            f"`data_revision` is {revision!r}, which selects from a data set on the hub, but `data` is here: leave it "
            "out, and put that version in place."
        )


def _texts(data, source: Source, chat: Chat) -> Callable[[Reading], Iterator[Iterable[str]]]:
    name, wanted = f"`data` is of type {type(data).__name__}", "pass a list of strings"
    if isinstance(data, (bytes, Mapping, Set)) or not isinstance(data, Iterable) or getattr(data, "ndim", None) == 0:
        raise InputError(f"{name}, but texts in an order were wanted: {wanted}.")
    if iter(data) is data:
        raise InputError(f"{name}, which can be read only once: {wanted}, list(data).")
    if isinstance(data, Sized) and not len(data):
        raise InputError(f"{name} and empty: {wanted}.")

    def documents(_: Reading) -> Iterator[Iterable[str]]:
        for i, item in enumerate(data):
            if not isinstance(item, (str, Mapping)):
                raise InputError(f"`data[{i}]` is of type {type(item).__name__}, but a string was wanted: {wanted}.")
            yield (item if isinstance(item, str) else _text(item, source["column"], f"`data[{i}]`", chat),)

    for _ in documents(Reading(0)) if isinstance(data, (list, tuple)) else ():
        pass  # finds a bad one before any work is done
    return documents


def _local(path: str, source: Source, chat: Chat, as_before: bool) -> Documents:
    column = source["column"]
    if os.path.isdir(path):
        chosen = _of_folder(path, source, as_before)
        about: dict[str, Any] = {"split": chosen.split, "config": chosen.config, "files": len(chosen.files)}
        about |= {"unread": folders.endings(chosen.unread)}
    elif kind_of(path) is None:
        raise InputError(f"`data` is the file {path!r}, but {SUPPORTED} was wanted: convert or rename it.")
    elif not os.path.isfile(path):
        raise InputError(f"`data` is {path!r}, which is not a regular file: copy its content to a file first.")
    elif not os.path.getsize(path):
        raise InputError(f"`data` is the file {path!r}, which is empty: pass one with text in it.")
    else:
        chosen, about = folders.Chosen([path]), _undivided(source, "a file", files=1)
    for file in chosen.files:
        check_pointer(file)

    def documents(reading: Reading) -> Iterator[Iterable[str]]:
        for file in chosen.files:
            yield from _read(file, column, chat, reading)

    sizes = (os.path.getsize(file) for file in chosen.files if os.path.isfile(file))
    found = Documents(documents, about, 0 if any(map(os.path.isdir, chosen.files)) else sum(sizes))
    for document in islice(found(), 1):
        next(iter(document))  # finds a file of another kind before any work is done
    if chosen.unread:
        _warn(path, chosen.unread)
    return found


def _of_folder(path: str, source: Source, as_before: bool) -> folders.Chosen:
    """What is read of a folder."""
    if as_before:
        return folders.chosen_before(path)
    _no_revision(source)
    split, config = source.get("split"), source.get("config")
    if folders.is_saved(path):
        _undivided(source, "one data set", folders.saved_split(path))
        return folders.Chosen([path], split, config)
    if (splits := folders.saved_splits(path)) is None:
        chosen = folders.chosen_files(path, split, config, lambda file: _holds(file, source["column"]))
    else:
        chosen = _of_saved(path, splits, source)
    about = [file for file in chosen.files if not _has_column(file, source["column"])]
    if len(about) < len(chosen.files):
        chosen.files, chosen.unread = [f for f in chosen.files if f not in about], [*chosen.unread, *about]
    return chosen


def _of_saved(path: str, splits: Sequence[str], source: Source) -> folders.Chosen:
    """A split of what `DatasetDict.save_to_disk` wrote."""
    if (config := source.get("config")) not in (None, "default"):
        raise InputError(f"`config` is {config!r}, but the data set in {path!r} has no configurations: leave it out.")
    split = source.get("split") or ("train" if "train" in splits else folders.EVERY)
    if split != folders.EVERY and split not in splits:
        raise InputError(
            f"`split` is {split!r}, but the data set in {path!r} has {', '.join(map(repr, splits))}: choose one of "
            "these, or 'all'."
        )
    names = splits if split == folders.EVERY else [split]
    return folders.Chosen([os.path.join(path, name) for name in names], split, config)


def _holds(path: str, column: str) -> bool:
    """Whether a file whose name is that of one about data begins with a record that has text or messages."""
    try:
        _, first = next(iter(read_file(path, column, Reading(0))), ("", None))
    except InputError:
        return False
    return isinstance(first, Mapping) and (isinstance(first.get(column), str) or _is_chat(first.get(column)))


def _has_column(path: str, column: str) -> bool:
    """Whether a file that may be about the data holds some: whether its first record has the column."""
    if os.path.isdir(path) or kind_of(path) not in folders.MAY_BE_ABOUT:
        return True
    check_pointer(path)
    first = next(iter(read_file(path, column, Reading(0))), None)
    return first is not None and isinstance(first[1], Mapping) and column in first[1]


def _warn(path: str, unread: Sequence[str]) -> None:
    some = ", ".join(repr(os.path.relpath(file, path)) for file in unread[:3])
    kinds = ", ".join(f"{count:,} {ending}" for ending, count in folders.endings(unread).items())
    rest = f" and {len(unread) - 3:,} more ({kinds})" if len(unread) > 3 else ""
    warnings.warn(f"Not read in {path!r}: {some}{rest}.", Unread, stacklevel=2)


def _read(path: str, column: str, chat: Chat, reading: Reading) -> Iterator[Iterable[str]]:
    """The documents of one file, or of a folder of `save_to_disk`."""
    if os.path.isdir(path):
        yield from _saved(path, column, chat)
        return
    is_text = kind_of(path) == ".txt"
    for where, found in read_file(path, column, reading):
        yield found if is_text else (_text(found, column, where, chat),)


def _saved(path: str, column: str, chat: Chat) -> Iterator[Iterable[str]]:
    import datasets

    try:
        dataset: Any = datasets.load_from_disk(path)
    except Exception as error:  # whatever `datasets` raises
        raise InputError(f"`data`: {path!r} does not open as a data set ({brief(error)}): save it again.") from error
    _check_columns(dataset.column_names, column, path)
    yield from _streamed(dataset.select_columns([column]), column, repr(path), chat, "save it again")


def _check_columns(names: Sequence[str] | None, column: str, where: str) -> None:
    if names and column not in names:
        _text(dict.fromkeys(names), column, where, str)


def _streamed(dataset: Any, column: str, name: str, chat: Chat, advice: str) -> Iterator[Iterable[str]]:
    try:
        for number, record in enumerate(dataset):
            yield (_text(record, column, f"row {number} of {name}", chat),)
    except InputError:
        raise
    except Exception as error:  # whatever a network or a file format can raise
        raise InputError(f"`data`: {name} broke off ({brief(error)}): {advice}.") from error


def _hub(name: str, source: Source, chat: Chat) -> tuple[Documents, str | None]:
    """The documents of a streamed Hub dataset, and its commit where `datasets` tells it."""
    import datasets

    split, config, revision = source.get("split") or "train", source.get("config"), source.get("data_revision")
    column = source["column"]
    try:
        # What `load_dataset(..., streaming=True)` does, in two steps, since only the builder knows the commit.
        builder = datasets.load_dataset_builder(name, config, revision=revision)
        dataset = builder.as_streaming_dataset(split=split)
    except Exception as error:  # `datasets` raises anything, and lists the configs or splits there are
        raise InputError(
            f"`data` is {name!r}, neither a local path nor a Hub dataset that opens with split={split!r} and "
            f"config={config!r} ({brief(error)}): check them and the network, or pass {SUPPORTED}."
        ) from error
    _check_columns(dataset.column_names, column, f"the Hub dataset {name!r}")
    if dataset.column_names:
        dataset = dataset.select_columns([column])  # what else there is, images or audio, is not read

    def documents(_: Reading) -> Iterator[Iterable[str]]:
        return _streamed(dataset, column, f"Hub dataset {name!r}", chat, "try again")

    commit = str(builder.hash)
    kind = getattr(dataset.features, "get", lambda name: None)(column)  # known before a row is, of most
    is_chat = kind is not None and not isinstance(kind, datasets.Value)
    found = Documents(documents, {"split": split, "config": config, "files": None}, chat=is_chat)
    return found, commit if re.fullmatch("[0-9a-f]{40}", commit) else revision


def _text(record, column: str, where: str, chat: Chat) -> str:
    """The document of a record."""
    if not isinstance(record, Mapping):
        kind = type(record).__name__
        raise InputError(f'`data`: {where} is of type {kind}: write it as a JSON object, {{"{column}": "..."}}.')
    if column not in record:
        there = ", ".join(map(repr, record)) or "none"
        raise InputError(f"`data`: {where} has no column {column!r}, it has {there}: name one with `column`.")
    value = record[column]
    if _is_chat(value):
        return _chat_text(value, column, where, chat)
    if value is None or value == []:
        return ""
    if not isinstance(value, str):
        messages = " (nor messages, each with `role` and `content`)" if isinstance(value, list) else ""
        raise InputError(
            f"`data`: {column!r} of {where} is of type {type(value).__name__}, not text{messages}: name a text column "
            "with `column`."
        )
    return value


def _is_chat(value: Any) -> bool:
    """Whether a value is a list of messages, each with a role and a content."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, Mapping) and "role" in m for m in value)


def _chat_text(messages: list, column: str, where: str, chat: Chat) -> str:
    try:
        return chat([dict(message) for message in messages])
    except InputError as error:
        raise InputError(f"`data`: {column!r} of {where} is a chat, and {error}") from error
