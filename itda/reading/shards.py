"""One shard of activations on disk: a safetensors file, a parquet file of labels, and what checks them."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from jaxtyping import Float
from torch import Tensor

from itda.disk import bytes_of, holds_text, safetensors_head, write_file
from itda.errors import InputError, counted, one_line
from itda.labels import LABEL_ARRAYS, Batch, Labels
from itda.shortages import shortage

CHUNK = 1 << 20  # bytes that are read and summed while they are in the processor's cache
Places = Mapping[str, tuple[torch.dtype, int]]  # dtype and width of the activations, by hook point


@dataclass(frozen=True)
class Shard:
    """What a manifest says of one shard, in the order of its keys."""

    tokens: int
    xxh64: dict[str, str]  # of the bytes at each hook point: nearly as fast as memory, and 64 bits
    labels: dict[str, Any]  # size and sha256 of the parquet file
    batches: list[list]  # tokens of each batch, and the stream's hash as of it


def files(folder: Path, number: int) -> tuple[Path, Path]:
    """The files of a shard. Names are made of its number, and never read from anywhere."""
    return folder / f"shard-{number:05d}.safetensors", folder / f"shard-{number:05d}.parquet"


def damaged(path: Path, what: str) -> InputError:
    """The error that says `what` is wrong with a file of a store, and what to do."""
    advice = "copy that file again, or collect all anew with `overwrite` (`--overwrite`)"
    return InputError(f"{path} {one_line(what)}: {advice}.")


# -- writing ----------------------------------------------------------------------------------------------------------


def write(
    folder: Path, number: int, batches: Sequence[tuple[Mapping[str, Batch], str]], places: Places, advice: str
) -> Shard:
    """Write batches, each with the stream's hash as of it, as a shard; their activations are on the CPU."""
    parts = {hook: [bytes_of(item[hook].activations) for item, _ in batches] for hook in places}
    labels = [next(iter(item.values())).labels for item, _ in batches]
    tokens = sum(map(len, labels))
    head, order = safetensors_head({hook: (dtype, (tokens, d)) for hook, (dtype, d) in places.items()})
    activations, table = files(folder, number)
    with ThreadPoolExecutor(1, "itda-checksums") as thread:
        sums = {hook: thread.submit(_xxh64, parts[hook]) for hook in order}
        write_file(activations, [head, *(part for hook in order for part in parts[hook])], advice)
        found = {hook: sums[hook].result() for hook in places}
    data = _labels_bytes(Labels.concat(labels))
    write_file(table, [data], advice)
    entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return Shard(tokens, found, entry, [[len(own), read] for own, (_, read) in zip(labels, batches, strict=True)])


def _xxh64(parts: Iterable) -> str:
    digest = xxhash.xxh64()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _labels_bytes(labels: Labels) -> bytes:
    """The parquet file of `labels`, a row for each token; the text of a row stands at its first token."""
    import pyarrow as pa
    from pyarrow import parquet

    labels = labels[:]  # with the texts that are needed alone
    _, first = np.unique(labels.row, return_index=True)
    first = first[labels.row[first] >= 0]
    text = np.full(len(labels), None, object)
    text[first] = labels.texts
    start = np.append(labels.text_start, 0)[labels.row]  # -1 finds the 0
    columns = [
        *(pa.array(getattr(labels, name)) for name in LABEL_ARRAYS),
        pa.array(text, pa.string()),
        pa.array(start),
    ]
    names, sink = [*LABEL_ARRAYS, "text", "text_start"], pa.BufferOutputStream()
    # What is not packed cannot burst. The same labels are the same bytes: dictionaries of texts were not, every time.
    how: dict[str, Any] = dict(compression="none", store_schema=False, use_dictionary=[*LABEL_ARRAYS, "text_start"])
    parquet.write_table(pa.table(columns, names=names), sink, row_group_size=max(1, len(labels)), **how)
    return sink.getvalue().to_pybytes()


# -- reading ----------------------------------------------------------------------------------------------------------


def check_size(path: Path, size: int) -> None:
    """Raise unless `path` is a file of so many bytes, in its own folder."""
    if path.is_symlink():
        raise damaged(path, "is a link, and a file was wanted")
    if not path.is_file():
        raise damaged(path, "is missing")
    if (found := path.stat().st_size) != size:
        raise damaged(path, f"has {counted(found, 'byte')} and not {size:,}, so it was cut short or replaced")


def check_files(folder: Path, number: int, shard: Shard, places: Places) -> None:
    """Raise unless both files are there and as large as they must be; reads nothing."""
    activations, table = files(folder, number)
    _, where = safetensors_head({hook: (dtype, (shard.tokens, d)) for hook, (dtype, d) in places.items()})
    check_size(activations, max(end for _, end in where.values()))
    check_size(table, shard.labels["size"])


def read(
    folder: Path, number: int, shard: Shard, places: Places, wanted: Sequence[str]
) -> tuple[dict[str, Float[Tensor, "tokens d"]], Labels]:
    """The activations at the hook points `wanted`, and the labels; all that is read is checked.

    Nothing is allocated before sizes are compared. Raises `InputError`, which names the file.
    """
    check_files(folder, number, shard, places)
    activations, table = files(folder, number)
    head, where = safetensors_head({hook: (dtype, (shard.tokens, d)) for hook, (dtype, d) in places.items()})
    found, at = {}, activations
    try:
        with open(activations, "rb", buffering=0) as file:
            if file.read(len(head)) != head:
                raise damaged(activations, "is damaged or was changed (its header differs)")
            for hook in wanted:
                if _xxh64(_chunks(file, *where[hook])) != shard.xxh64[hook]:
                    raise damaged(activations, f"is damaged or was changed (the checksum of {hook} differs)")
            # A private map: no copy is made of what the system holds of the file, and none is changed by a user.
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        for hook in wanted:
            dtype, d = places[hook]
            found[hook] = torch.frombuffer(memory, dtype=dtype, count=shard.tokens * d, offset=where[hook][0])
            found[hook] = found[hook].view(shard.tokens, d)
        at = table
        return found, _read_labels(table, shard)
    except (OSError, MemoryError) as error:
        if (said := shortage(error, f"{at} could not be read")) is not None:
            raise said from error
        raise damaged(at, f"cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _chunks(file: Any, start: int, stop: int) -> Iterator[memoryview]:
    """The bytes of `file` from `start` to `stop`, in memory that is used again."""
    memory = memoryview(bytearray(CHUNK))
    file.seek(start)
    while start < stop and (count := file.readinto(memory[: stop - start])):
        start += count
        yield memory[:count]


def _read_labels(path: Path, shard: Shard) -> Labels:
    import pyarrow as pa
    from pyarrow import parquet

    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != shard.labels["sha256"]:
        raise damaged(path, "is damaged or was changed (its sha256 differs)")
    try:
        with parquet.ParquetFile(pa.BufferReader(data)) as file:
            wanted = {**dict.fromkeys((*LABEL_ARRAYS, "text_start"), pa.int64()), "text": pa.string()}
            found = {field.name: field.type for field in file.schema_arrow}
            if found != wanted or file.metadata.num_rows != shard.tokens:
                raise damaged(path, f"has the columns {', '.join(found)} and {counted(file.metadata.num_rows, 'row')}")
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
            if any(g.column(i).compression != "UNCOMPRESSED" for g in groups for i in range(g.num_columns)):
                raise damaged(path, "is compressed")
            if not holds_text(pa.BufferReader(data), ["text"], len(data)):
                raise damaged(path, "unpacks to more text than is in it")
            table = file.read(use_threads=False)
        numbers = (*LABEL_ARRAYS, "text_start")
        if any(table[name].null_count for name in numbers):
            raise damaged(path, "has gaps")
        arrays = {name: np.array(table[name].to_numpy(), np.int64) for name in numbers}
        for name in LABEL_ARRAYS:
            if len(arrays[name]) and arrays[name].min() < (least := 0 if name in ("prompt", "position") else -1):
                raise damaged(path, f"has a `{name}` of {arrays[name].min()}, and {least} is the least that it can be")
        texts = table["text"].combine_chunks()
        rows, first = np.unique(arrays["row"], return_index=True)
        if (rows != np.arange(len(rows)) - (len(rows) > 0 and rows[0] < 0)).any():
            raise damaged(path, "does not number its rows from 0")
        first = first[rows >= 0]
        said = texts.take(pa.array(first)).to_pylist()
        if not all(isinstance(text, str) for text in said):
            raise damaged(path, "has a row without its text")
        arrays["text_start"] = arrays["text_start"][first]
        return Labels(**arrays, texts=tuple(said))
    except InputError:
        raise
    except (pa.ArrowException, KeyError, OSError, ValueError, OverflowError) as error:
        if (said := shortage(error, f"{path} could not be read")) is not None:
            raise said from error
        raise damaged(path, f"is not a readable parquet file ({error})") from error


def join(parts: Sequence[tuple[Mapping[str, Tensor], Labels]]) -> tuple[Labels, dict[str, Tensor]]:
    """Parts of one batch, which may have come to lie in several shards, as what it was."""
    labels = parts[0][1]
    for _, more in parts[1:]:
        labels = _joined(labels, more)
    hooks = parts[0][0]
    return labels, {hook: x if len(parts) == 1 else torch.cat([p[0][hook] for p in parts]) for hook, x in hooks.items()}


def _joined(a: Labels, b: Labels) -> Labels:
    """The labels of `a` and `b`, which may have been cut apart in the middle of a row."""
    both = Labels.concat([a, b])
    if a.row[-1] < 0 or b.row[0] < 0 or (a.prompt[-1], a.texts[-1]) != (b.prompt[0], b.texts[0]):
        return both
    row = np.where(np.arange(len(both)) < len(a), both.row, both.row - 1)
    texts, starts = (*a.texts, *b.texts[1:]), np.concatenate([a.text_start, b.text_start[1:]])
    return replace(both, row=row, texts=texts, text_start=starts)
