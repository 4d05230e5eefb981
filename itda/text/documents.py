"""Data of any kind -> its documents, each as blocks of text: a list, a file, a folder or a Hub dataset."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Set, Sized
from itertools import chain, islice
from typing import BinaryIO

from itda.errors import InputError
from itda.settings.groups import Source

BLOCK = 1 << 18  # bytes of a file read at a time

_ENDINGS = (".txt", ".jsonl", ".parquet")
_OTHER_ENDINGS = (".json", ".csv", ".tsv", ".gz", ".zst", ".zip", ".arrow", ".md", ".html", ".pdf")
_SUPPORTED = "a .txt, .jsonl or .parquet file or a folder of these"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)

Documents = Callable[[], Iterator[Iterable[str]]]  # every call starts again; a document is blocks of text, in order


def open_documents(data, source: Source):
    """What `data` is: its kind, its documents, and the revision that was found."""
    if not isinstance(data, (str, os.PathLike)):
        return "texts", _texts(data, source["column"]), None
    path = os.fsdecode(data)
    if os.path.exists(path):
        return ("folder" if os.path.isdir(path) else "file"), _local(path, source["column"]), None
    file_like = path.lower().endswith(_ENDINGS + _OTHER_ENDINGS) or path.startswith((".", "~", os.sep))
    if isinstance(data, os.PathLike) or (file_like and "\n" not in path):
        raise InputError(f"`data` is {path!r}, but there is no such file or folder: check the path.")
    if _HUB_ID.fullmatch(path):
        return "hub", *_hub(path, source)
    raise InputError(
        f"`data` is the string {_brief(path)}, neither a path nor the id of a Hub dataset: "
        "pass one of these, or a list of strings to use it as text itself, [text]."
    )


def _texts(data, column: str) -> Documents:
    name, wanted = f"`data` is of type {type(data).__name__}", "pass a list of strings"
    if isinstance(data, (bytes, Mapping, Set)) or not isinstance(data, Iterable):
        raise InputError(f"{name}, but texts in an order were wanted: {wanted}.")
    if iter(data) is data:
        raise InputError(f"{name}, which can be read only once: {wanted}, list(data).")
    if isinstance(data, Sized) and not len(data):
        raise InputError(f"{name} and empty: {wanted}.")

    def documents() -> Iterator[Iterable[str]]:
        for i, item in enumerate(data):
            if not isinstance(item, (str, Mapping)):
                raise InputError(f"`data[{i}]` is of type {type(item).__name__}, but a string was wanted: {wanted}.")
            yield (item if isinstance(item, str) else _text(item, column, f"`data[{i}]`"),)

    for _ in documents() if isinstance(data, (list, tuple)) else ():
        pass  # finds a bad one before any work is done
    return documents


def _local(path: str, column: str) -> Documents:
    if os.path.isdir(path):
        files = _listed(path)
    elif not path.lower().endswith(_ENDINGS):
        raise InputError(f"`data` is the file {path!r}, but {_SUPPORTED} was wanted: convert or rename it.")
    elif not os.path.isfile(path):
        raise InputError(f"`data` is {path!r}, which is not a regular file: copy its content to a file first.")
    elif not os.path.getsize(path):
        raise InputError(f"`data` is the file {path!r}, which is empty: pass one with text in it.")
    else:
        files = [path]

    def documents() -> Iterator[Iterable[str]]:
        return chain.from_iterable(_read(file, column) for file in files)

    for document in islice(documents(), 1):
        next(iter(document))  # finds a file of another kind before any work is done
    return documents


def _listed(folder: str) -> list[str]:
    """The files of a folder that can be read, sorted by name level by level."""

    def refuse(error: OSError):
        raise InputError(f"`data`: {error.filename!r} cannot be read ({_brief(error)}): check the folder.") from error

    found = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(parent, name) for name in names if not name.startswith(".")]
    files = [file for file in found if file.lower().endswith(_ENDINGS)]
    files = [file for file in files if os.path.isfile(file) or not os.path.exists(file)]  # a broken link is said later
    if not files:
        others = sorted({os.path.splitext(file)[1] or os.path.basename(file) for file in found})
        raise InputError(
            f"`data` is the folder {folder!r} with {', '.join(map(repr, others[:8])) or 'no files'}, "
            "but .txt, .jsonl or .parquet files were wanted in it: add some or pass another."
        )
    return sorted(files, key=lambda file: file.split(os.sep))


def _read(path: str, column: str) -> Iterator[Iterable[str]]:
    """The documents of one file."""
    try:
        with open(path, "rb") as file:
            ending = os.path.splitext(path)[1].lower()
            if ending != ".parquet" and b"\0" in file.read(BLOCK):
                raise InputError(f"`data`: {path!r} is a binary file, but UTF-8 text was wanted: convert or remove it.")
            file.seek(0)
            if ending == ".txt":
                yield _text_blocks(file, path)
                return
            records = _json_records(file, path) if ending == ".jsonl" else _parquet_records(file, path, column)
            for where, record in records:
                yield (_text(record, column, where),)
    except OSError as error:
        raise InputError(f"`data`: {path!r} cannot be read ({_brief(error)}): check the file.") from error


def _text_blocks(file: BinaryIO, path: str) -> Iterator[str]:
    decoder, at, block = codecs.getincrementaldecoder("utf-8")(), 0, b"-"
    while block:
        block = file.read(BLOCK)
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise _not_utf8(path, at - pending + error.start) from error
        yield text if at else text.removeprefix("\ufeff")
        at += len(block)


def _json_records(file: BinaryIO, path: str) -> Iterator[tuple[str, object]]:
    at = 0
    for number, line in enumerate(file, 1):
        try:
            text = line.decode().removeprefix("" if at else "\ufeff").strip()
            if text:
                yield f"line {number} of {path!r}", json.loads(text)
        except UnicodeDecodeError as error:
            raise _not_utf8(path, at + error.start) from error
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"`data`: line {number} of {path!r} is not JSON ({_brief(error)}): mend or remove that line."
            ) from error
        at += len(line)


def _parquet_records(file: BinaryIO, path: str, column: str) -> Iterator[tuple[str, object]]:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(file)
        _text(dict.fromkeys(table.schema_arrow.names), column, repr(path))  # refuses a missing column
        batches = table.iter_batches(batch_size=128, columns=[column])
        for number, record in enumerate(record for batch in batches for record in batch.to_pylist()):
            yield f"row {number} of {path!r}", record
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"`data`: {path!r} is no sound parquet file ({_brief(error)}): write it again.") from error


def _hub(name: str, source: Source) -> tuple[Documents, str | None]:
    """The documents of a streamed Hub dataset, and its commit where `datasets` tells it."""
    import datasets

    split, config, revision = source["split"], source["config"], source["data_revision"]
    column = source["column"]
    try:
        # What `load_dataset(..., streaming=True)` does, in two steps, since only the builder knows the commit.
        builder = datasets.load_dataset_builder(name, config, revision=revision)
        dataset = builder.as_streaming_dataset(split=split)
    except Exception as error:  # `datasets` raises anything, and lists the configs or splits there are
        raise InputError(
            f"`data` is {name!r}, neither a local path nor a Hub dataset that opens with split={split!r} and "
            f"config={config!r} ({_brief(error)}): check them and the network, or pass {_SUPPORTED}."
        ) from error
    if dataset.column_names:
        _text(dict.fromkeys(dataset.column_names), column, f"the Hub dataset {name!r}")  # refuses a missing column
        dataset = dataset.select_columns([column])  # what else there is, images or audio, is not read

    def documents() -> Iterator[Iterable[str]]:
        try:
            for number, record in enumerate(dataset):
                yield (_text(record, column, f"row {number} of {name!r}"),)
        except InputError:
            raise
        except Exception as error:  # whatever a network or a file format can raise
            raise InputError(f"`data`: Hub dataset {name!r} broke off ({_brief(error)}): try again.") from error

    commit = str(builder.hash)
    return documents, commit if re.fullmatch("[0-9a-f]{40}", commit) else revision


def _text(record, column: str, where: str) -> str:
    """The document of a record."""
    if not isinstance(record, Mapping):
        kind = type(record).__name__
        raise InputError(f'`data`: {where} is of type {kind}: write it as a JSON object, {{"{column}": "..."}}.')
    if column not in record:
        there = ", ".join(map(repr, record)) or "none"
        raise InputError(f"`data`: {where} has no column {column!r}, it has {there}: name one with `column`.")
    if not isinstance(record[column], str | None):
        kind = type(record[column]).__name__
        raise InputError(
            f"`data`: {column!r} of {where} is of type {kind}, not text: name a text column with `column`."
        )
    return record[column] or ""


def _not_utf8(path: str, byte: int) -> InputError:
    return InputError(f"`data`: {path!r} is not UTF-8 at byte {byte}: convert the file to UTF-8.")


def _brief(what) -> str:
    """The first two lines of an error's sentence, or a string as it can stand in one."""
    if isinstance(what, str):
        return repr(what if len(what) <= 60 else what[:57] + "...")
    return " ".join(str(what).split("\n")[:2])[:300] or type(what).__name__
