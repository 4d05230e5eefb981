"""One local file -> its records, or its text: what kind it is, unpacked as it is read, and what is wrong with it."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, BinaryIO

from itda.errors import InputError, counted

BLOCK = 1 << 18  # bytes of a file read at a time
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
KINDS = (".txt", ".jsonl", ".parquet", ".json", ".ndjson", ".csv", ".tsv")
SUPPORTED = (
    "a .txt, .jsonl or .parquet file (.json, .csv and .tsv too, all but .parquet also as .gz, .zst, .bz2 or .xz) "
    "or a folder of these"
)
_POINTERS = {b"version https://git-lfs.github.com/spec/": "Git LFS", b"/annex/objects/": "git-annex"}
_FETCH = {"Git LFS": "git lfs pull", "git-annex": "git annex get ."}
_POINTER_BYTES = 1024
_UTF16 = ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16"))
_SPACE = re.compile(r"[ \t\r\n]*")
_WIDEST_FIELD = 1 << 31  # characters of a field of a .csv


class Reading:
    """How far the files that are read one after another have been read: `done` bytes of `size`."""

    def __init__(self, size: int) -> None:
        self.size, self.before, self.here = size, 0, 0

    @property
    def share(self) -> float:
        """The part of all bytes that has been read."""
        return min(1.0, (self.before + self.here) / self.size) if self.size else 1.0


def kind_of(path: str) -> str | None:
    """The ending that says how a file is read, without that of its compression; None for any other file."""
    name = path.lower()
    packed = next((ending for ending in COMPRESSED if name.endswith(ending)), "")
    kind = os.path.splitext(name.removesuffix(packed))[1]
    return kind if kind in KINDS and not (packed and kind == ".parquet") else None


def check_pointer(path: str) -> None:
    """Raise `InputError` where a file is only a pointer to the data, as a clone without its large files has it."""
    try:
        if not os.path.isfile(path) or os.path.getsize(path) > _POINTER_BYTES:
            return
        with open(path, "rb") as file:
            start = file.read(_POINTER_BYTES)
    except OSError:
        return  # which is said when it is read
    for mark, what in _POINTERS.items():
        if start.startswith(mark):
            raise InputError(
                f"`data`: {path!r} is a {what} pointer, not the data it stands for: run `{_FETCH[what]}` in its "
                "folder, or download the file itself."
            )


def read_file(path: str, column: str, reading: Reading) -> Iterator[tuple[str, Any]]:
    """What one file holds, with where it is: records, or of text one iterator over its blocks.

    Raises `InputError` for a file that is not what its ending says.
    """
    reading.here, kind = 0, kind_of(path)
    with _said(path), open(path, "rb") as raw:
        if kind == ".parquet":
            yield from _parquet_records(raw, path, column, reading)
        else:
            with _unpacked(raw, path) as file:
                start = file.read(BLOCK)
                check_text(start, path)
                yield from _OF_KIND[kind or ".txt"](_Counted(file, start, raw, reading), path, column)
    reading.before, reading.here = reading.before + _size(path), 0


@contextmanager
def _said(path: str) -> Iterator[None]:
    """What goes wrong inside with the file, in one sentence."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise _unsound(path, error) from error
    except OSError as error:
        if error.errno is None and _packing(path):  # of pyarrow, on what it cannot unpack
            raise _unsound(path, error) from error
        raise InputError(f"`data`: {path!r} cannot be read ({brief(error)}): check the file.") from error


def _unsound(path: str, error: Exception) -> InputError:
    return InputError(f"`data`: {path!r} is no sound {_packing(path)} file ({brief(error)}): fetch it again.")


def _size(path: str) -> int:
    return os.path.getsize(path) if os.path.exists(path) else 0


def _packing(path: str) -> str:
    return next((ending for ending in COMPRESSED if path.lower().endswith(ending)), "")


def _unpacked(raw: BinaryIO, path: str) -> Any:
    """A file as it is without compression."""
    ending = _packing(path)
    if ending == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if ending == ".xz":
        return lzma.LZMAFile(raw)
    if ending:
        import pyarrow as pa

        return pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), {".zst": "zstd", ".bz2": "bz2"}[ending])
    return raw


class _Counted(io.RawIOBase):
    """A file whose first bytes have been read already, which says how far it is; and never all in memory."""

    def __init__(self, file: Any, start: bytes, raw: BinaryIO, reading: Reading) -> None:
        self.file, self.start, self.raw, self.reading = file, start, raw, reading

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.start:
            data, self.start = self.start[: len(buffer)], self.start[len(buffer) :]
        else:
            data = self.file.read(len(buffer))
        buffer[: len(data)] = data
        # Of a file as it is, what was handed on; of one that is unpacked, what that took.
        self.reading.here = self.reading.here + len(data) if self.file is self.raw else self.raw.tell()
        return len(data)


def check_text(start: bytes, path: str) -> None:
    """Raise `InputError` where the first bytes of a file are no UTF-8 text, with what they are."""
    encoding = next((name for mark, name in _UTF16 if start.startswith(mark)), None)
    if encoding is None and b"\0" in start:
        even, odd = start[::2].count(0), start[1::2].count(0)
        half = max(1, len(start) // 2)
        if max(even, odd) > 0.3 * half and min(even, odd) < 0.05 * half:  # as of Latin letters in UTF-16
            encoding = "UTF-16"
    if encoding:
        raise InputError(
            f"`data`: {path!r} is {encoding} text, but UTF-8 was wanted: convert it, as with "
            f"`iconv -f {encoding} -t UTF-8`."
        )
    if b"\0" in start:
        raise InputError(f"`data`: {path!r} is a binary file, but UTF-8 text was wanted: convert or remove it.")


def _text(file: _Counted, path: str, _: str) -> Iterator[tuple[str, Any]]:
    yield repr(path), _text_blocks(file, path)  # read outside of this generator, hence the sentence there


def _text_blocks(file: _Counted, path: str) -> Iterator[str]:
    decoder, at, block = codecs.getincrementaldecoder("utf-8")(), 0, b"-"
    while block:
        with _said(path):
            block = file.read(BLOCK) or b""
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise not_utf8(path, at - pending + error.start) from error
        yield text if at else text.removeprefix("\ufeff")
        at += len(block)


def _json_lines(file: _Counted, path: str, _: str) -> Iterator[tuple[str, Any]]:
    at, lines = 0, io.BufferedReader(file, BLOCK)
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode().removeprefix("" if at else "\ufeff").strip()
            if text:
                yield f"line {number} of {path!r}", json.loads(text)
        except UnicodeDecodeError as error:
            raise not_utf8(path, at + error.start) from error
        except (ValueError, RecursionError) as error:
            if number == 1 and _goes_on(text, error, next(lines, b"")):
                raise InputError(
                    f"`data`: {path!r} is pretty-printed JSON, in which a record takes several lines, but .jsonl has "
                    "one on each line: rename it to .json, which may be either."
                ) from error
            raise InputError(
                f"`data`: line {number} of {path!r} is not JSON ({brief(error)}): mend or remove that line."
            ) from error
        at += len(line)


def _goes_on(line: str, error: Exception, after: bytes) -> bool:
    """Whether the first line of a file, which is not JSON, is the beginning of something that is."""
    ends = getattr(error, "pos", -1) == len(line)
    return line == "[" or (ends and bool(after.strip()) and not after.lstrip().startswith(b"{"))


# Of a list, what is allowed where a character of JSON stands that is no part of a record.
_NEXT = {("start", "["): "first", ("first", "]"): "over", ("next", ","): "record", ("next", "]"): "over"}


def _json(file: _Counted, path: str, _: str) -> Iterator[tuple[str, Any]]:
    """The records of a list, or those that stand one after another, as lines or over several; a part in memory."""
    decode, state, number = json.JSONDecoder().raw_decode, "start", 0
    ahead = _Ahead(_text_blocks(file, path))
    while sign := ahead.sign():
        if (state, sign) in _NEXT:
            state, ahead.at = _NEXT[state, sign], ahead.at + 1
            continue
        if state in ("next", "over"):
            where = "after its list" if state == "over" else f"before record {number}, where ',' or ']' was wanted"
            raise InputError(f"`data`: {path!r} is not JSON, since it has {sign!r} {where}: mend it there.")
        try:
            record, end = decode(ahead.text, ahead.at)
            if end == len(ahead.text) and ahead.more():
                continue  # a number may go on
        except (ValueError, RecursionError) as error:
            if _is_cut(error, len(ahead.text) - 16) and ahead.more():
                continue
            if state in ("first", "record") and _is_cut(error, len(ahead.text.rstrip()) - 1):
                raise _cut_short(path, number) from error
            raise InputError(
                f"`data`: record {number} of {path!r} is not JSON ({brief(error)}): mend or remove it."
            ) from error
        state = "loose" if state in ("start", "loose") else "next"
        ahead.at, ahead.size = end, 1
        yield f"record {number} of {path!r}", record
        number += 1
    if state in ("first", "next", "record"):
        raise _cut_short(path, number)


class _Ahead:
    """The text of blocks from the place `at` on that is reached; no more of it than is needed."""

    def __init__(self, blocks: Iterator[str]) -> None:
        self.blocks, self.text, self.at, self.size = blocks, next(blocks, ""), 0, 1

    def sign(self) -> str:
        """The next character that is no blank; none at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def more(self) -> bool:
        """Read on, and say whether there was more."""
        found = list(islice(self.blocks, self.size))
        if found:  # twice as much each time, so that a long record is not read again and again
            self.text, self.at, self.size = self.text[self.at :] + "".join(found), 0, 2 * self.size
        return bool(found)


def _cut_short(path: str, number: int) -> InputError:
    return InputError(
        f"`data`: {path!r} is cut short, since it ends in its list, at record {number}, without ']': fetch it again."
    )


def _is_cut(error: Exception, last: int) -> bool:
    """Whether what is wrong with JSON may be that more is to come: a string without end, or a fault after `last`."""
    unfinished = "Unterminated string" in str(error)
    return isinstance(error, json.JSONDecodeError) and (unfinished or error.pos > last)


def _table(separator: str) -> Callable[[_Counted, str, str], Iterator[tuple[str, Any]]]:
    def records(file: _Counted, path: str, column: str) -> Iterator[tuple[str, Any]]:
        csv.field_size_limit(_WIDEST_FIELD - 1)
        text = io.TextIOWrapper(io.BufferedReader(file, BLOCK), "utf-8-sig", newline="")
        rows = csv.reader(text, delimiter=separator, strict=True)
        number = 0
        try:
            names = next(rows, [])
            if names and column not in names:
                yield f"the first line of {path!r}", dict.fromkeys(names)  # refused
            _check_once(names, column, path)
            for number, row in enumerate(rows):
                if not row:
                    continue
                if len(row) != len(names):
                    raise InputError(
                        f"`data`: row {number} of {path!r} has {counted(len(row), 'field')}, but its first line names "
                        f"{len(names)}: mend or remove that row."
                    )
                yield f"row {number} of {path!r}", dict(zip(names, row, strict=True))
        except UnicodeDecodeError as error:
            raise InputError(f"`data`: {path!r} is not UTF-8: convert the file to UTF-8.") from error
        except csv.Error as error:
            raise InputError(
                f"`data`: row {number} of {path!r} is no sound {os.path.splitext(path)[1]} ({brief(error)}): mend it."
            ) from error

    return records


def _check_once(names: list[str], column: str, path: str) -> None:
    if (count := names.count(column)) > 1:
        raise InputError(f"`data`: {path!r} has {count} columns {column!r}: rename all but the one to read.")


def _parquet_records(file: BinaryIO, path: str, column: str, reading: Reading) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(file)
        names, rows, size = table.schema_arrow.names, table.metadata.num_rows, _size(path)
        if column not in names:
            yield repr(path), dict.fromkeys(names)  # refused
        _check_once(names, column, path)
        batches = table.iter_batches(batch_size=128, columns=[column])
        for number, record in enumerate(record for batch in batches for record in batch.to_pylist()):
            reading.here = size * (number + 1) // max(1, rows)
            yield f"row {number} of {path!r}", record
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"`data`: {path!r} is no sound parquet file ({brief(error)}): write it again.") from error


_OF_KIND: dict[str, Callable[[_Counted, str, str], Iterator[tuple[str, Any]]]] = {
    ".txt": _text,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _table(","),
    ".tsv": _table("\t"),
}


def not_utf8(path: str, byte: int) -> InputError:
    """What is said of a file with a byte that UTF-8 does not have there."""
    return InputError(f"`data`: {path!r} is not UTF-8 at byte {byte}: convert the file to UTF-8.")


def brief(what: Any) -> str:
    """The first two lines of an error's sentence, or a string as it can stand in one."""
    if isinstance(what, str):
        return repr(what if len(what) <= 60 else what[:57] + "...")
    return " ".join(str(what).split("\n")[:2])[:300] or type(what).__name__
