"""Files that a kill or a full disk cannot spoil: written beside their place, flushed, and moved there in one step."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISREG
from typing import Any

import torch
from torch import Tensor

from itda.errors import InputError, shortened
from itda.shortages import shortage

_LEFTOVER = re.compile(r"\.(.+)\.tmp-[0-9a-f]{16}", re.DOTALL)  # what a killed writer leaves behind
STATES_FORMAT = "itda-states"
STATES, STATES_MANIFEST = "states", "states.json"  # the folder of hidden states, in that of what is trained on them
_STATES_KEYS = {"format", "identity"}
_STATE = re.compile(r"(hidden|kept)-\d+\.bin")
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
ELSEWHERE = "choose another place"
LARGEST = 1 << 30  # bytes of a manifest
_NO_DIGEST = "0" * 64


def checked_path(path: str | os.PathLike) -> str:
    """`path` as text; raises `InputError` if it is empty, or a NUL or what is no character is in it."""
    if not (place := os.fsdecode(path)):
        raise InputError("The path is empty: give one, or . for the folder that you are in.")
    if "\0" in place:
        raise InputError(f"The path {place!r} has a NUL in it, which no path can have: choose another.")
    try:
        os.fsencode(place)
    except UnicodeEncodeError as error:
        raise InputError(
            f"The path {place!a} is not UTF-8 (a lone surrogate is in it): choose another path."
        ) from error
    return place


def check_file(name: str, path: str | os.PathLike) -> None:
    """Raise `InputError` if no file could be written to `path`, argument `name`: better known before hours of work."""
    path = Path(checked_path(path))
    if path.is_dir() or not path.parent.is_dir():
        what = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise InputError(f"`{name}` cannot be written to {path}, because {what}: choose another file.")


def make_folder(path: str | os.PathLike) -> None:
    """Make the folder `path`, and those above it, if it is not there; raises `InputError` if that cannot be."""
    checked_path(path)
    with as_input_error(f"{path} could not be made", ELSEWHERE):
        Path(path).mkdir(parents=True, exist_ok=True)


def write_file(path: str | os.PathLike, chunks: Iterable, advice: str = ELSEWHERE) -> None:
    """Write the buffers `chunks` (bytes, arrays) as one file: at any moment `path` is the old file or the new one.

    Raises `InputError`, which ends with `advice`, if the disk is full or the place cannot be written; nothing is left
    behind then.
    """
    path = Path(path)
    with as_input_error(f"{path} could not be written", advice), staged(path, chunks) as temporary:
        os.replace(temporary, path)
        sync_folder(path.parent)


@contextmanager
def staged(path: Path, chunks: Iterable) -> Iterator[Path]:
    """A file of its own beside `path`, written through to the disk, to be moved there; after an error it is gone."""
    temporary = path.parent / f".{path.name}.tmp-{secrets.token_hex(8)}"
    try:
        write_through(temporary, chunks)
        yield temporary
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_through(path: Path, chunks: Iterable) -> None:
    """Write a new file, through to the disk."""
    with open(path, "xb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def small_file(path: Path) -> bytes:
    """The bytes of a file that says what is in others; `OSError` for a pipe, and for one that is far too large."""
    found = os.stat(path)
    if not S_ISREG(found.st_mode) or found.st_size > LARGEST:
        raise OSError(f"a file of at most {LARGEST:,} bytes was wanted")
    return path.read_bytes()


def leftover_of(name: str) -> str | None:
    """The file that a killed writer of ours was to write, if this is the name of what it left; else None.

    A name of this form alone proves nothing: whoever removes it has to know the file as one of ours.
    """
    found = _LEFTOVER.fullmatch(name)
    return found[1] if found else None


def remove_leftovers(path: Path) -> None:
    """Remove what killed writers of the file `path` left beside it."""
    with suppress(OSError):
        for name in os.listdir(path.parent):
            if leftover_of(name) == path.name:
                with suppress(OSError):
                    (path.parent / name).unlink()


def is_states(path: Path, others: bool = False) -> bool:
    """Whether this is a folder that holds hidden states and nothing else, or `others` that are called otherwise.

    Names prove nothing: where there are any states, a manifest that we wrote says that they are ours.
    """
    if not path.is_dir() or path.is_symlink():
        return False
    names = set(os.listdir(path))
    found = set(filter(is_state, names))
    ours = True
    if any(leftover_of(name) is None for name in found):  # what is left of the first manifest is there before it
        known = json_object(path / STATES_MANIFEST)  # an empty one where it was damaged
        # Those of earlier versions had no format.
        ours = known.get("format", STATES_FORMAT) == STATES_FORMAT and (not known or bool(known.keys() & _STATES_KEYS))
        ours = ours and STATES_MANIFEST in names
    return ours and (others or found == names)


def is_state(name: str) -> bool:
    """Whether a file of this name in the folder of states is one of them."""
    return name == STATES_MANIFEST or _STATE.fullmatch(name) is not None or leftover_of(name) == STATES_MANIFEST


def sync_folder(folder: Path) -> None:
    """Make renames and removals in `folder` last through a power cut."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def as_input_error(what: str, advice: str) -> Iterator[None]:
    """Say an error of the operating system in one sentence; one that comes of a shortage as `Shortage`."""
    try:
        yield
    except (OSError, MemoryError) as error:
        if (said := shortage(error, what, advice)) is not None:
            raise said from error
        raise InputError(f"{what} ({getattr(error, 'strerror', None) or error}): {advice}.") from error


def sealed_json(document: dict, indent: int | None = 2) -> bytes:
    """A file of JSON whose "sha256", the first of 64 zeros in it, becomes its own, taken with zeros in its place."""
    data = (json.dumps({**document, "sha256": _NO_DIGEST}, indent=indent, allow_nan=False) + "\n").encode()
    return data.replace(_NO_DIGEST.encode(), hashlib.sha256(data).hexdigest().encode(), 1)


def json_object(path: Path) -> dict[str, Any]:
    """The object in the file of JSON `path`; an empty one where there is anything else, or nothing that can be read.

    Raises `Shortage` where it could not be read for want of something: then nothing is known of it.
    """
    try:
        document = strict_json(small_file(path))
    except (ValueError, RecursionError):
        return {}
    except (OSError, MemoryError) as error:
        if (said := shortage(error, f"{path} could not be read")) is not None:
            raise said from error
        return {}
    return document if isinstance(document, dict) else {}


def strict_json(data: bytes) -> Any:
    """What a file of JSON says; `ValueError` where a key stands twice, of which readers take either."""

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        document = dict(found)
        if len(document) < len(found):
            twice = next(key for i, (key, _) in enumerate(found) if key in dict(found[:i]))
            raise TwiceError(shortened(twice))
        return document

    return json.loads(data, object_pairs_hook=pairs)


class TwiceError(ValueError):
    """A key stands twice in an object of JSON."""


def unspeakable(document: Any) -> str | None:
    """Where a number is in a document that JSON has no word for (NaN, Infinity), though Python reads one; or None."""
    left: list[tuple[str, Any]] = [("", document)]
    while left:
        name, value = left.pop()
        if isinstance(value, float) and not math.isfinite(value):
            return name
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        left += [(f"{name}.{key}".strip("."), item) for key, item in items]
    return None


def is_sealed(data: bytes, document: dict) -> bool:
    """Whether the file `data`, read as `document`, is as `sealed_json` wrote it."""
    digest = document.get("sha256")
    blank = data.replace(digest.encode(), _NO_DIGEST.encode(), 1) if isinstance(digest, str) else b""
    return hashlib.sha256(blank).hexdigest() == digest


def read_sealed(
    data: bytes, kind: tuple[str, int], damaged: Callable[[str], InputError], foreign: InputError, path: Path
) -> dict:
    """The document in the file `data` as `sealed_json` wrote it, if it is of this format and version.

    Raises `foreign` for one of another format, and what `damaged` makes of a sentence's end for anything else.
    """
    format, newest = kind
    try:
        document = strict_json(data)
    except TwiceError as error:
        raise damaged(f"has the key {error} twice in one object") from error
    except (ValueError, RecursionError) as error:
        raise damaged("is not JSON") from error
    if not isinstance(document, dict) or document.get("format") != format:
        raise foreign
    version = document.get("version")
    if type(version) is int and version > newest:
        raise InputError(f"{path} has format version {version}, and this itda reads version {newest}: upgrade itda.")
    if type(version) is not int or version != newest:
        raise damaged(f"has format version {version!r}, but {newest} was wanted")
    if not is_sealed(data, document):
        raise damaged("was changed after it was written (its sha256 differs)")
    return document


# -- parquet ----------------------------------------------------------------------------------------------------------


def holds_text(source: Any, names: Sequence[str], most: int) -> bool:
    """Whether the text columns `names` of a parquet file (path or buffer) unpack to no more than `most` bytes.

    A file says what its pages unpack to, but in these a text may stand once for many rows. So they are read before
    any row is made of them, some rows at a time, with each text once.
    """
    from pyarrow import compute, parquet

    with parquet.ParquetFile(source, read_dictionary=list(names)) as file:
        places = [i for i, column in enumerate(file.schema.names) if column in names]
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        if max(sum(g.column(i).total_uncompressed_size for g in groups for i in places), 0) > most:
            return False
        total = 0
        for batch in file.iter_batches(1024, columns=list(names), use_threads=False):
            for column in batch.columns:
                sizes = compute.binary_length(column.dictionary).cast("int64")
                total += compute.sum(sizes.take(column.indices)).as_py() or 0
            if total > most:
                return False
    return True


# -- safetensors ------------------------------------------------------------------------------------------------------


def safetensors_chunks(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> list:
    """The buffers of a safetensors file, byte for byte what `safetensors.torch.save` makes, without copying tensors.

    Its own writer turns a full disk into an exception of its own and wants either a path or all of the bytes twice.
    """
    cpu = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    head, places = safetensors_head({name: (t.dtype, t.shape) for name, t in cpu.items()}, metadata)
    return [head, *(bytes_of(cpu[name]) for name in places)]


def safetensors_head(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: dict[str, str] | None = None
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """What a safetensors file of such tensors begins with; and where each of them starts and ends in it, in order."""
    sizes = {name: dtype.itemsize for name, (dtype, _) in tensors.items()}
    names = sorted(sizes, key=lambda name: (-sizes[name], name))  # so that every tensor is aligned
    header: dict = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offsets, end = {}, 0
    for name in names:
        dtype, shape = tensors[name]
        start, end = end, end + sizes[name] * math.prod(shape)
        header[name] = {"dtype": DTYPES[dtype], "shape": [*shape], "data_offsets": [start, end]}
        offsets[name] = start, end
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    head = len(head).to_bytes(8, "little") + head
    return head, {name: (len(head) + start, len(head) + end) for name, (start, end) in offsets.items()}


def bytes_of(tensor: Tensor) -> Any:
    """The memory of a contiguous tensor; its strides may still be odd where it has one entry or none."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()


def read_safetensors(data: Any) -> dict[str, tuple[str, list[int], int, int]]:
    """What the header of the safetensors file `data` says, by name: dtype, shape, and where it starts and ends in it.

    Raises `ValueError` unless the file is one, has no metadata, and holds the tensors without gaps. Only for the dtypes
    in `DTYPES`, whose sizes are known here, are shapes held against bytes.
    """
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise ValueError("its header is longer than the file")
    header = strict_json(bytes(data[8 : 8 + size]))
    if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
        raise ValueError("its header is no object of objects")
    if "__metadata__" in header:
        raise ValueError("it has metadata, and none was wanted")
    sizes, found = {name: dtype.itemsize for dtype, name in DTYPES.items()}, {}
    for name, entry in header.items():
        if set(entry) != {"dtype", "shape", "data_offsets"} or not isinstance(entry["dtype"], str):
            raise ValueError(f"its header does not say what {shortened(name)} is")
        numbers = entry["shape"], entry["data_offsets"]
        if not all(isinstance(n, list) and all(type(i) is int and i >= 0 for i in n) for n in numbers):
            raise ValueError(f"its header gives no counts for {shortened(name)}")
        start, end = entry["data_offsets"] if len(entry["data_offsets"]) == 2 else (0, -1)
        each = sizes.get(entry["dtype"])
        if each is not None and end - start != each * math.prod(entry["shape"]):
            raise ValueError(f"the shape of {shortened(name)} does not fit its bytes")
        found[name] = entry["dtype"], entry["shape"], 8 + size + start, 8 + size + end
    at = 8 + size
    for _, _, start, end in sorted(found.values(), key=lambda one: one[2:]):
        if start != at or end < start:
            raise ValueError("its tensors do not follow one another")
        at = end
    if at != len(data):
        raise ValueError("it is not as long as its header says")
    return found
