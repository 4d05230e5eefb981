"""The tables of the folder `uses` as parquet files (docs/format.md): their columns, how they are written and read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from itda.disk import holds_text
from itda.errors import InputError, one_line
from itda.shortages import shortages_told

# Columns and their types; "[...]" is a list of such, none of which is null.
TEXTS = {"prompt": "int64", "document": "int64", "text_start": "int64", "text": "string"}
TEXTS |= {"position": "[int32]", "token_id": "[int32]", "start": "[int32]", "end": "[int32]"}
ATOMS = {"nearest": "[int32]", "cosine": "[float]"}
ATOMS |= {"up": "[int32]", "up_logit": "[float]", "down": "[int32]", "down_logit": "[float]"}
SIGNS = {"count": "int64", "histogram": "[int64]", "positions": "[int64]"}
SIGNS |= {"together": "[int32]", "together_tokens": "[int32]", "lift": "[float]"}
EXAMPLES = {"atom": "int32", "sign": "int8", "interval": "int8"}
EXAMPLES |= {"text": "int32", "position": "int32", "value": "float"}
TOKENS = {"token_id": "int32", "text": "string"}
MOST_TEXT = 1 << 31  # bytes of text that a file may unpack to


def schema(columns: Mapping[str, str]) -> Any:
    """The Arrow schema of a table."""
    import pyarrow as pa

    kinds = {name: getattr(pa, kind) for name, kind in _ARROW.items()}

    def kind_of(said: str) -> Any:
        if said.startswith("["):
            return pa.list_(pa.field("element", kinds[said[1:-1]](), nullable=False))
        return kinds[said]()

    return pa.schema([pa.field(name, kind_of(said), nullable=False) for name, said in columns.items()])


_ARROW = {"int8": "int8", "int32": "int32", "int64": "int64", "float": "float32", "string": "string"}


def table(columns: Mapping[str, str], values: Mapping[str, Any]) -> Any:
    """A table of `values` by name: arrays, lists of text, and of lists (offsets, all their entries)."""
    import pyarrow as pa

    wanted, arrays = schema(columns), []
    for field in wanted:
        given = values[field.name]
        if isinstance(given, tuple):
            entries = pa.array(np.asarray(given[1]), field.type.value_type)
            arrays.append(pa.ListArray.from_arrays(pa.array(given[0], pa.int32()), entries, type=field.type))
        else:
            arrays.append(pa.array(given, field.type))
    return pa.table(arrays, schema=wanted)


def lists(values: np.ndarray, counts: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The rows of `values` as lists, (offsets, entries); of each row the first so many."""
    counts = np.full(len(values), values.shape[1]) if counts is None else counts
    kept = np.arange(values.shape[1]) < counts[:, None]
    return np.cumsum(np.append(0, counts)), values[kept]


def joined(some: Sequence[Any]) -> Any:
    """Tables one below the other, in one piece."""
    import pyarrow as pa

    return pa.concat_tables(some).combine_chunks()


def empty(columns: Mapping[str, str]) -> Any:
    """A table without rows."""
    return schema(columns).empty_table()


def written(some: Any) -> Any:
    """The bytes of a parquet file of a table, or of several one below the other, a row group each."""
    import pyarrow as pa
    from pyarrow import parquet

    sink = pa.BufferOutputStream()
    parts: Iterable[Any] = [some] if isinstance(some, pa.Table) else some
    writer = None
    for part in parts:
        writer = writer or parquet.ParquetWriter(sink, part.schema, compression="zstd", store_schema=False)
        writer.write_table(part, row_group_size=max(1, len(part)))
    assert writer is not None, "a file has one table or more"
    writer.close()
    return sink.getvalue()


def read(path: Path, columns: Mapping[str, str], data: bytes | bytearray | None = None) -> Any:
    """The table in the file `path` (its bytes, where they were read); `InputError` for another one or a damaged one."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with shortages_told(f"{path} could not be read"):
            source = pa.py_buffer(path.read_bytes() if data is None else data)
            with parquet.ParquetFile(pa.BufferReader(source)) as file:
                if not file.schema_arrow.equals(schema(columns)):
                    raise damaged(path, f"has other columns than {', '.join(columns)}")
                texts = [name for name, kind in columns.items() if kind == "string"]
                if texts and not holds_text(pa.BufferReader(source), texts, MOST_TEXT):
                    raise damaged(path, "unpacks to more text than there can be")
                return file.read(use_threads=False).combine_chunks()
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise damaged(path, f"is not a readable parquet file ({error})") from error


def damaged(path: Path, what: str) -> InputError:
    """The error that says `what` is wrong with a file of uses, and what to do."""
    return InputError(f"{path} {one_line(what)}: remove {path.parent} and run `itda uses` again.")


def flat(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """A column of lists as (offsets, entries)."""
    import pyarrow as pa

    whole = column.combine_chunks()
    if isinstance(whole, pa.ChunkedArray):
        whole = pa.concat_arrays(whole.chunks) if whole.num_chunks else pa.array([], whole.type)
    offsets = whole.offsets.to_numpy()
    return offsets - offsets[0], whole.flatten().to_numpy(zero_copy_only=False)


def padded(column: Any, filler: float = -1) -> np.ndarray:
    """A column of lists as an array (rows, longest), short ones filled up."""
    offsets, entries = flat(column)
    counts = np.diff(offsets)
    out = np.full((len(counts), int(counts.max(initial=0))), filler, entries.dtype)
    out[np.arange(out.shape[1]) < counts[:, None]] = entries
    return out


def encodable(text: str) -> str:
    """`text` as UTF-8 can hold it: half a surrogate pair becomes �, so that lengths stay."""
    return re.sub("[\ud800-\udfff]", "�", text)
