"""The folder of a dictionary on disk (docs/format.md): complete or not an ITDA when written, checked when read."""

from __future__ import annotations

import hashlib
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from itda.beside import EVAL, USES, is_evaluation, is_uses, remove_uses
from itda.disk import (
    ELSEWHERE,
    STATES,
    as_input_error,
    checked_path,
    is_states,
    json_object,
    leftover_of,
    read_safetensors,
    read_sealed,
    sealed_json,
    small_file,
    sync_folder,
    unspeakable,
    write_through,
)
from itda.errors import InputError, counted, one_line, shortened
from itda.locks import PATIENCE, is_locked, locked, settled, stamp_of
from itda.provenance import is_number

FORMAT, VERSION = "itda", 1
MANIFEST, ATOMS, LABELS, SAMPLE = "cfg.json", "atoms.safetensors", "labels.parquet", "sample.parquet"
CHECKPOINT = "checkpoint.safetensors"  # of a training that has not finished; never part of a dictionary
RESERVED = ("format", "version", "sha256", "n_atoms", "d", "files")  # keys of cfg.json that the format itself writes
_STAGE = "itda"  # the folder `.itda.tmp-*`, in which a dictionary is written
MOST = 1 << 53  # tokens: what is more float64 cannot count


_COUNT = "a count", lambda value: type(value) is int and 0 <= value <= MOST
_WHOLE = "a whole number", lambda value: type(value) is int
_NUMBER = "a number", is_number
_FLAG = "true or false", lambda value: type(value) is bool
_TEXT = "a text", lambda value: type(value) is str
# What settings are, where the library reads them again; each may be null, or not there.
_SETTINGS: dict[str, Any] = {
    **dict.fromkeys(("tokens", "batch_rows"), _COUNT),
    **dict.fromkeys(("threshold", "fvu", "max_norm"), _NUMBER),
    **dict.fromkeys(("special_tokens", "padding", "nonneg", "center"), _FLAG),
    **dict.fromkeys(("method", "loss", "admission", "scale"), _TEXT),
    "model": {"layer": _WHOLE, "d": _COUNT}
    | dict.fromkeys(("id", "revision", "hook_point", "dtype", "fingerprint", "tokenizer_hash"), _TEXT),
    "stream": {"context_length": _COUNT, "tokens": _COUNT, "seed": _WHOLE, "truncate": _FLAG, "pack": _FLAG}
    | dict.fromkeys(("kind", "data", "revision", "config", "split", "column", "hash", "tokenizer_hash"), _TEXT),
}


def wrong_setting(settings: Mapping[str, Any], wanted: Mapping[str, Any] = _SETTINGS) -> str | None:
    """The first of the settings that is not what the library reads: its name, what came, what was wanted."""
    for name in wanted:
        value, kind = settings.get(name), wanted[name]
        said, is_right = kind if isinstance(kind, tuple) else ("an object", lambda value: isinstance(value, dict))
        if value is not None and not is_right(value):
            return f"`{name}` = {shortened(value)}, but {said} was wanted"
        if isinstance(kind, dict) and value and (inner := wrong_setting(value, kind)):
            return f"{name}: {inner}"
    return None


# -- writing ----------------------------------------------------------------------------------------------------------


def check_writable_target(path: str | os.PathLike, within: bool = True) -> Path:
    """The folder (links resolved) that a dictionary may be saved to at `path`; creates and changes nothing.

    What lies in it is looked at unless `within` is False, which is for those who wait for another writer first.

    Raises `InputError` for a file, for a folder that holds anything but an ITDA or an unfinished training of one, for
    a path that is not UTF-8 and for a place without permission to write. Call it before a long training, so that the
    end of it can be saved.
    """
    place = checked_path(path)
    try:
        place = os.path.realpath(place)
        place.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{place!a} is not UTF-8, and no ITDA can be read there: choose another path.") from error
    target = Path(place)
    with as_input_error(f"{target} could not be used", ELSEWHERE):
        if target.is_dir():
            above = target
            if within:
                _check_ours(target)
        elif os.path.lexists(target):
            raise InputError(f"{target} is a file, and an ITDA is saved as a folder: choose another path.")
        else:
            above = next(p for p in target.parents if os.path.lexists(p))
            if not above.is_dir():
                raise InputError(f"{target} cannot be a folder, because {above} is a file: choose another path.")
            for name in target.relative_to(above).parts:  # one that is too long is so in any folder
                with suppress(FileNotFoundError):
                    os.lstat(above / name)
        if not os.access(above, os.W_OK | os.X_OK):
            raise InputError(f"No permission to write into {above}: choose another place for {target}.")
    return target


def write_folder(path: str | os.PathLike, n_atoms: int, d: int, settings: dict, files: Mapping[str, Iterable]) -> None:
    """Write `files` (name -> buffers) and their manifest as the dictionary at `path`.

    A new folder is written beside its place and renamed into it. An old one is written inside the folder, then the old
    manifest goes first and the new one comes last, so a kill at any moment leaves the old dictionary, the new one, or
    none. The folder is locked meanwhile; another writer is waited for. Raises `InputError` as `check_writable_target`
    and `write_file` do, and where the other one does not end.
    """
    target = check_writable_target(path, within=False)
    with (
        locked(target, patience=PATIENCE, within=True) as new,
        as_input_error(f"{target} could not be written", ELSEWHERE),
    ):
        check_writable_target(target)  # once more: others may have written while it was waited for
        # Inside an existing folder and not beside it: that folder may be a mount point, or its parent read-only.
        stage = (target.parent if new else target) / f".{_STAGE}.tmp-{secrets.token_hex(8)}"
        try:
            stage.mkdir()
            entries = {name: _write(stage / name, chunks) for name, chunks in files.items()}
            _write(stage / MANIFEST, [_manifest_bytes(n_atoms, d, entries, settings)])
            sync_folder(stage)
            if new:
                if os.name == "nt":  # where nothing is renamed over an empty folder
                    target.rmdir()
                os.rename(stage, target)
        except BaseException:
            with suppress(OSError):
                _remove_leftover(stage)
            raise
        if new:
            sync_folder(target.parent)
        else:
            _move_in(stage, target, list(files))


def _manifest_bytes(n_atoms: int, d: int, entries: dict, settings: dict) -> bytes:
    head = dict(zip(RESERVED, (FORMAT, VERSION, "", n_atoms, d, entries), strict=True))
    return sealed_json({**head, **settings})


def _write(path: Path, chunks: Iterable) -> dict:
    """Write a new file through to the disk; returns its size and sha256."""
    digest, size = hashlib.sha256(), 0

    def counted() -> Iterator:
        nonlocal size
        for chunk in chunks:
            yield chunk
            digest.update(chunk)
            size += memoryview(chunk).nbytes

    write_through(path, counted())
    return {"size": size, "sha256": digest.hexdigest()}


def _move_in(stage: Path, target: Path, names: list[str]) -> None:
    """Put the files of `stage` into `target`; the manifest in `stage` says meanwhile that what lies there is ours."""
    (target / MANIFEST).unlink(missing_ok=True)
    sync_folder(target)
    for name in names:
        os.replace(stage / name, target / name)
    for name in {ATOMS, LABELS, SAMPLE, EVAL} - set(names):
        (target / name).unlink(missing_ok=True)
    remove_uses(target / USES)
    sync_folder(target)
    os.replace(stage / MANIFEST, target / MANIFEST)
    sync_folder(target)
    for path in sorted(target.iterdir()):
        if _is_leftover(path):
            _remove_leftover(path)


def _remove_leftover(path: Path) -> None:
    if path.is_dir():
        for name in (ATOMS, LABELS, SAMPLE, MANIFEST):  # and nothing else: a folder with more in it stays
            (path / name).unlink(missing_ok=True)
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def _check_ours(folder: Path) -> None:
    """`_check_nothing_foreign`, while another process may be replacing what is there."""
    for last in (False, True):
        try:
            return _check_nothing_foreign(folder)
        except (InputError, OSError):
            if is_locked(folder):
                raise InputError(
                    f"Another process is writing into {folder}: wait for it to end, or choose another folder."
                ) from None
            if last:
                raise


def _check_nothing_foreign(folder: Path) -> None:
    """Raise unless all that `folder` holds was written by this library."""
    names = sorted(os.listdir(folder))
    leftovers = [n for n in names if _is_leftover(folder / n)]
    ours = {CHECKPOINT, EVAL} if is_evaluation(folder / EVAL) else {CHECKPOINT}
    # File names alone prove nothing: `labels.parquet` may be anybody's data.
    if any(_is_manifest(folder / place / MANIFEST) for place in ("", *leftovers)):
        ours |= {MANIFEST, ATOMS, LABELS, SAMPLE}
    leftovers += [n for n in names if n == STATES and is_states(folder / n)]
    leftovers += [n for n in names if n == USES and is_uses(folder / n)]
    foreign = [n for n in names if not (n in leftovers or (n in ours and (folder / n).is_file()))]
    if foreign:
        raise InputError(
            f"{folder} holds {foreign[0]!r}, which is not part of an ITDA, so nothing was written: choose a new or "
            "empty folder."
        )


def _is_leftover(path: Path) -> bool:
    """Whether this is what a killed writer of a dictionary left, by its name, kind and what is in it."""
    of = leftover_of(path.name)
    if path.is_symlink():
        return False
    if of == _STAGE:
        return path.is_dir() and set(os.listdir(path)) <= {ATOMS, LABELS, SAMPLE, MANIFEST}
    return of in (CHECKPOINT, EVAL) and path.is_file()


def _is_manifest(path: Path) -> bool:
    return json_object(path).get("format") == FORMAT


# -- reading ----------------------------------------------------------------------------------------------------------


def read_manifest(path: str | os.PathLike) -> dict:
    """The manifest of the dictionary at `path`, after checking it and the size and sha256 of every file it names."""
    return _whole(Path(path), False)[0]


def read_files(path: str | os.PathLike) -> tuple[dict, dict[str, bytearray]]:
    """The manifest of the dictionary at `path`, and the bytes of every file it names, all of them checked.

    It is these bytes that are to be used: whoever opens a file again by its name may find another one there.
    """
    return _whole(Path(path), True)


def _whole(folder: Path, kept: bool) -> tuple[dict, dict[str, bytearray]]:
    """The manifest and, if they are to be kept, the files; of one dictionary, while others may replace it."""

    def read() -> tuple[dict, dict[str, bytearray]]:
        with as_input_error(f"{folder} could not be read", "give the folder of a saved ITDA"):
            manifest = _found_manifest(folder)
            return manifest, {
                name: _checked_file(folder / name, entry, kept) for name, entry in manifest["files"].items()
            }

    def is_being_replaced() -> bool:
        with suppress(OSError):
            stages = [name for name in os.listdir(folder) if leftover_of(name) == _STAGE]
            return any((folder / stage / MANIFEST).exists() for stage in stages) and is_locked(folder)
        return False

    return settled(read, lambda: stamp_of(folder / MANIFEST), is_being_replaced)


def _found_manifest(folder: Path) -> dict:
    if not os.path.lexists(folder):
        raise InputError(f"There is no folder {folder}: give the folder of a saved ITDA.")
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder, and an ITDA is one: give the folder that `{MANIFEST}` is in.")
    if not (folder / MANIFEST).is_file():
        if (folder / CHECKPOINT).is_file():
            raise InputError(f"The training of {folder} has not finished: the same `itda train` command goes on.")
        if inside := sorted(path.parent.name for path in folder.glob(f"[!.]*/{MANIFEST}")):
            raise InputError(
                f"{folder} holds the ITDAs {', '.join(inside)}: give the folder of one, {folder / inside[0]}."
            )
        if (folder / "config.json").is_file():
            raise InputError(f"{folder} is a model: give the folder of a dictionary that was built on one.")
        raise InputError(
            f"{folder} has no {MANIFEST}: it is not an ITDA, or one whose training did not finish; give the "
            "folder of a saved ITDA, or train it again."
        )
    return _parse_manifest(folder / MANIFEST)


def damaged(path: Path, what: str) -> InputError:
    """The error that says `what` is wrong with a file of a dictionary, and what to do."""
    return InputError(f"{path} {one_line(what)}: copy the whole folder of the ITDA again, or train it again.")


def _parse_manifest(path: Path) -> dict:
    foreign = InputError(f'{path} is not the manifest of an ITDA ("format": "itda"): give the folder of a saved ITDA.')
    manifest = read_sealed(small_file(path), (FORMAT, VERSION), partial(damaged, path), foreign, path)
    for key in ("n_atoms", "d", "k"):
        if type(manifest.get(key)) is not int or manifest[key] < 0:
            raise damaged(path, f"says {key} = {manifest.get(key)!r}, but a count was wanted")
    if wrong := wrong_setting(manifest):
        raise damaged(path, f"says {wrong}")
    if (where := unspeakable(manifest)) is not None:
        raise damaged(path, f"has a number in {shortened(where)} that JSON has no word for (null was wanted)")
    files = manifest.get("files")  # the names are compared with ours, never used as paths
    if not isinstance(files, dict) or not {ATOMS, LABELS} <= set(files) <= {ATOMS, LABELS, SAMPLE}:
        named = ", ".join(map(repr, files)) if isinstance(files, dict) else repr(files)
        raise damaged(path, f"names the files {named}, but {ATOMS}, {LABELS} and perhaps {SAMPLE} were wanted")
    for name, entry in files.items():
        if not isinstance(entry, dict) or {key: type(entry[key]) for key in entry} != {"size": int, "sha256": str}:
            raise damaged(path, f"must give the size and the sha256 of {name}, but says {entry!r}")
    return manifest


def _checked_file(path: Path, entry: dict, kept: bool) -> bytearray:
    """The bytes of a file, if they are to be kept, after their number and sha256 were compared."""
    if not path.is_file():
        raise damaged(path, "is missing")
    digest, at = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size != entry["size"]:  # before memory is taken
            came = f"has {counted(size, 'byte')} where {MANIFEST} says {entry['size']}"
            raise damaged(path, f"{came}, so it was cut short or replaced")
        data = bytearray(size if kept else min(size, 1 << 20))
        with memoryview(data) as memory:
            while count := file.readinto(memory[at:] if kept else memory):
                digest.update(memory[at : at + count] if kept else memory[:count])
                at += count
    if at != size or digest.hexdigest() != entry["sha256"]:
        raise damaged(path, "is damaged or was changed (its sha256 differs)")
    return data


def read_atoms(data: bytearray, path: Path, n_atoms: int, d: int) -> dict[str, Tensor]:
    """The tensors atoms (n_atoms, d), norms, losses and, if there, moved (n_atoms,), mean and scale (d,), all float32.

    They are made of `data`, the bytes of the file `path`, which is used up.
    """
    shapes = {"atoms": [n_atoms, d], "losses": [n_atoms], "moved": [n_atoms], "norms": [n_atoms]}
    shapes |= {"mean": [d], "scale": [d]}
    some = {"mean", "moved", "scale"}  # only where atoms are centred, refined, or weighed
    try:
        found = read_safetensors(data)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"is not a readable safetensors file ({error})") from error
    if set(found) | some != set(shapes):
        wanted = f"{sorted(set(shapes) - some)}, mean if centred, moved if refined, scale if weighed, were wanted"
        raise damaged(path, f"holds the tensors {sorted(found)}, but {wanted}")
    out = {}
    for name in sorted(found):
        dtype, shape, start, end = found[name]
        if dtype != "F32" or shape != shapes[name]:
            raise damaged(path, f"has `{name}` as {dtype} {shape}, but {MANIFEST} wants F32 {shapes[name]}")
        count = math.prod(shape)
        whole = data if start % 4 == 0 else data[start:end]  # others than our writer may not align
        offset = start if whole is data else 0
        part = torch.frombuffer(whole, dtype=torch.float32, count=count, offset=offset) if count else torch.empty(0)
        # Those that are small get memory of their own, so that they can be sent without the others.
        out[name] = part.view(shape) if name == "atoms" else part.view(shape).clone()
    return out
