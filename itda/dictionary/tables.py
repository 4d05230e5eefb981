"""Labels and codes as parquet tables, the files labels.parquet and sample.parquet of a dictionary (docs/format.md)."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

from itda.devices import free_bytes
from itda.dictionary.folder import MANIFEST, damaged
from itda.disk import holds_text
from itda.errors import InputError, counted
from itda.labels import Labels
from itda.shortages import shortages_told

COLUMNS = ("prompt", "position", "token_id", "document", "start", "end")
TEXTS = ("before", "token", "after")
TEXT_BYTES = 4096  # of a row: 360 characters around a token, which may be long, but not in all rows
PACKED = 64  # bytes of text from one in the file


def labels_chunks(labels: Labels, codes: tuple[np.ndarray, np.ndarray] | None = None, losses=None) -> list:
    """The parquet file of `labels`, one row each; of a sample with codes (indices, values), each (n, k), and losses."""
    import pyarrow as pa
    from pyarrow import parquet

    schema = _schema(codes is not None)
    columns = [pa.array(getattr(labels, name), pa.int64()) for name in COLUMNS]
    # A token without text of its own is shown as <token 17>; that is no text, and would be read back as some.
    own = (labels.row >= 0) & (labels.end > labels.start)
    texts = [labels.context(i) for i in range(len(labels))]
    texts = [(before, token if o else "", after) for (before, token, after), o in zip(texts, own, strict=True)]
    columns += [pa.array([_encodable(t[i]) for t in texts], pa.string()) for i in range(3)]
    if codes is not None:
        offsets = pa.array(np.arange(len(labels) + 1) * codes[0].shape[1], pa.int32())
        for name, array in zip(("indices", "values"), codes, strict=True):
            kind = schema.field(name).type
            columns.append(pa.ListArray.from_arrays(offsets, pa.array(array.reshape(-1), kind.value_type), type=kind))
        columns.append(pa.array(losses, pa.float32()))
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table(columns, schema=schema), sink, compression="zstd", store_schema=False)
    return [sink.getvalue()]


def read_labels(
    path: Path, n: int | None = None, sample: bool = False, data: bytes | bytearray | None = None
) -> tuple[Labels, dict[str, np.ndarray]]:
    """Labels of `n` rows (any number if None); of a sample also indices (n, k), values (n, k), losses (n,).

    `data` are the bytes of the file `path` where they were read already.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with shortages_told(f"{path} could not be read"):
            source = pa.py_buffer(path.read_bytes() if data is None else data)
            with parquet.ParquetFile(pa.BufferReader(source)) as file:
                found, wanted = file.schema_arrow, _schema(sample)
                if not found.equals(wanted):
                    came, want = (", ".join(f"{field.name}: {field.type}" for field in s) for s in (found, wanted))
                    raise damaged(path, f"has the columns {came}, but {want}, none nullable, were wanted")
                if file.metadata.metadata:
                    raise damaged(path, "has metadata, and none was wanted")
                if n is not None and file.metadata.num_rows != n:
                    raise damaged(
                        path, f"has {counted(file.metadata.num_rows, 'row')} where {MANIFEST} says n_atoms = {n}"
                    )
                _check_size(path, file.metadata, source)
                table = file.read(use_threads=False)
            return _labels_of(table), _codes_of(path, table) if sample else {}
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise damaged(path, f"is not a readable parquet file ({error})") from error


def _check_size(path: Path, metadata, source) -> None:
    """Raise unless what the file, the buffer `source`, unpacks to is what labels are, and has room."""
    import pyarrow as pa

    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    rows = max(metadata.num_rows, sum(group.num_rows for group in groups))
    values = sum(group.column(i).num_values for group in groups for i in range(group.num_columns))
    if (need := 8.0 * max(values, rows * metadata.num_columns)) > 0.8 * free_bytes(torch.device("cpu")):
        raise damaged(path, f"unpacks to {need / 1e9:.1f} GB, more than is free")
    if not holds_text(pa.BufferReader(source), TEXTS, TEXT_BYTES * rows + PACKED * source.size + (1 << 26)):
        raise damaged(path, "unpacks to more text than labels have")


def _labels_of(table) -> Labels:
    """The inverse of `labels_chunks`; atoms with the same text share it."""
    arrays = {name: np.array(table[name].to_numpy(), dtype=np.int64) for name in COLUMNS}
    rows: dict[tuple[str, int], int] = {}
    row = np.full(len(table), -1, np.int64)
    parts = zip(*(table[name].to_pylist() for name in TEXTS), strict=True)
    for i, (before, token, after) in enumerate(parts):
        if before or token or after:
            row[i] = rows.setdefault((before + token + after, int(arrays["start"][i]) - len(before)), len(rows))
    origins = np.array([origin for _, origin in rows], np.int64)
    return Labels(**arrays, row=row, texts=tuple(text for text, _ in rows), text_start=origins)


def _codes_of(path: Path, table) -> dict[str, np.ndarray]:
    out = {"losses": np.array(table["loss"].to_numpy(), dtype=np.float32)}
    k = len(table["indices"][0]) if len(table) else 0
    for name, dtype in (("indices", np.int64), ("values", np.float32)):
        lists = table[name].combine_chunks()
        if (lists.value_lengths().to_numpy() != k).any():
            raise damaged(path, f"must have as many `{name}` in every row as `indices` in the first")
        out[name] = lists.flatten().to_numpy().astype(dtype).reshape(len(table), k)
    return out


def _schema(sample: bool):
    import pyarrow as pa

    fields = [(name, pa.int64()) for name in COLUMNS] + [(name, pa.string()) for name in TEXTS]
    if sample:
        element = {"indices": pa.int32(), "values": pa.float32()}
        fields += [(name, pa.list_(pa.field("element", kind, nullable=False))) for name, kind in element.items()]
        fields += [("loss", pa.float32())]
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields])


def _encodable(text: str) -> str:
    """`text` as UTF-8 can hold it: half a surrogate pair becomes �, so that lengths stay."""
    return re.sub("[\ud800-\udfff]", "�", text)
