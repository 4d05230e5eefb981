"""Hidden states between two blocks, in files, so that a streamed reading goes on where it was interrupted."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from stat import S_ISREG
from typing import Any

import torch
from torch import Tensor

from itda.disk import (
    DTYPES,
    STATES_FORMAT,
    STATES_MANIFEST,
    as_input_error,
    bytes_of,
    is_state,
    is_states,
    json_object,
    make_folder,
    write_file,
)
from itda.errors import InputError
from itda.models.hooked_model import Group

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
MOST_ITEMS = 64  # that a block puts out
ADVICE = "give a smaller --state-gb, or choose another place"


class States:
    """The states of some groups of rows after each block, in the files of `folder`.

    Those of two blocks are kept, one to read and one to write, so that what the manifest names is whole whenever the
    process ends; besides them, what is kept for longer (activations at a hook point of a lower block). `identity` says
    what they are states of: those in the folder are gone on from if theirs is the same.
    """

    def __init__(self, folder: str | os.PathLike, identity: Any) -> None:
        self.folder, self._identity = Path(folder), hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        make_folder(self.folder)
        self._open: dict[str, Any] = {}
        self.forms: dict[str, list] = {}  # width and dtype, by name
        self.block = -1  # the last one that is finished
        self.notes: dict[str, Any] = {}  # what else must be known to go on
        self.groups: list[tuple[int, str, int]] = []  # index, hash and tokens
        self._starts: dict[int, int] = {}
        self._load()

    def holds(self, groups: Sequence[Group], widths: Mapping[str, int]) -> bool:
        """Whether all of these groups are among those that the states are of, and those of these widths are whole."""
        known = {index: (digest, tokens) for index, digest, tokens in self.groups}
        there = bool(groups) and all(known.get(g.index) == (digest_of(g), g.ids.numel()) for g in groups)
        return there and all(self._is_whole(name, width) for name, width in widths.items())

    def _is_whole(self, name: str, width: int) -> bool:
        """Whether the file of a state is as long as what the manifest says of it, and that is what it must say."""
        d, dtype = self.forms.get(name, (0, "float32"))
        size = sum(tokens for _, _, tokens in self.groups) * width * _DTYPES[dtype].itemsize
        with suppress(OSError):
            found = os.lstat(self.folder / f"{name}.bin")
            return (
                d == width and _DTYPES[dtype].is_floating_point and (found.st_size, S_ISREG(found.st_mode)) == (size, 1)
            )
        return False

    def begin(self, groups: Sequence[Group]) -> None:
        """Forget what there is, and begin anew with these groups."""
        self.close()
        self.block, self.forms = -1, {}
        with as_input_error(f"{self.folder} could not be written", ADVICE):
            if not is_states(self.folder, others=True):
                raise InputError(
                    f"{self.folder} holds files called as hidden states are, and no {STATES_MANIFEST} that says "
                    "that they are: move them away, or choose another place (`--state-dir`)."
                )
            _clear(self.folder)
        self._name([(group.index, digest_of(group), group.ids.numel()) for group in groups])

    def put(self, name: str, group: Group, x: Tensor) -> None:
        """Keep `x`, of as many tokens as the group has, as the state `name` of it."""
        x = x.detach().cpu().contiguous()
        self.forms[name] = [x.shape[-1], str(x.dtype).removeprefix("torch.")]
        with as_input_error(f"{self.folder} could not be written", ADVICE):
            data, at = memoryview(bytes_of(x)).cast("B"), self._starts[group.index] * x.shape[-1] * x.element_size()
            file = self._file(name)
            while len(data):  # a write may take less than it is given
                done = os.pwrite(file, data, at)
                data, at = data[done:], at + done

    def get(self, name: str, group: Group) -> Tensor:
        """The state `name` (rows, length, d) of a group."""
        with as_input_error(f"{self.folder} could not be read", "remove it and run the same command again"):
            if name not in self.forms:
                raise OSError(f"it has no {name}")
            d, dtype = self.forms[name]
            size = d * _DTYPES[dtype].itemsize
            at = self._starts[group.index] * size
            if os.fstat(self._file(name)).st_size < at + group.ids.numel() * size:  # before any memory is taken
                raise OSError(f"{name} is too short")
            x = torch.empty(*group.ids.shape, d, dtype=_DTYPES[dtype])
            data = memoryview(bytes_of(x)).cast("B")
            while len(data):
                done = os.preadv(self._file(name), [data], at)
                if not done:
                    raise OSError(f"{name} is too short")
                data, at = data[done:], at + done
        return x

    def finish(self, block: int) -> None:
        """Say, for good, that the states after `block` are whole."""
        with as_input_error(f"{self.folder} could not be written", ADVICE):
            for file in self._open.values():
                os.fsync(file)
        self.block = block
        kept = dict(format=STATES_FORMAT, identity=self._identity, block=block, forms=self.forms, notes=self.notes)
        kept |= dict(groups=self.groups)
        write_file(self.folder / STATES_MANIFEST, [json.dumps(kept).encode()], ADVICE)

    def close(self) -> None:
        """Close the files."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _load(self) -> None:
        try:
            kept = json_object(self.folder / STATES_MANIFEST)  # an empty one where there is none, or none of use
            if kept["identity"] == self._identity:
                self._name([(_count(i), str(digest), _count(tokens)) for i, digest, tokens in kept["groups"]])
                self.forms = {name: [_count(d), _DTYPES[dtype] and dtype] for name, (d, dtype) in kept["forms"].items()}
                self.block, self.notes = _count(kept["block"]), dict(kept["notes"])
                if self.notes.keys() != {"tuple", "samples"}:
                    raise ValueError("notes are missing")
                if self.notes["tuple"] is not None and not 1 <= _count(self.notes["tuple"]) <= MOST_ITEMS:
                    raise ValueError("a block puts out fewer items")
                for sample in self.notes["samples"].values():
                    bytes.fromhex(sample)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self.block, self.groups, self.forms = -1, [], {}

    def _name(self, groups: list[tuple[int, str, int]]) -> None:
        self.groups, self._starts, tokens = groups, {}, 0
        for index, _, size in groups:
            self._starts[index] = tokens
            tokens += size

    def _file(self, name: str) -> int:
        if name not in self._open:
            self._open[name] = os.open(self.folder / f"{name}.bin", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        return self._open[name]


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 40:
        raise ValueError(f"{value!r} is no count")
    return value


def digest_of(group: Group) -> str:
    """A sha256 of what a group asks of the model."""
    shape = f"{tuple(group.ids.shape)} ".encode()
    return hashlib.sha256(
        shape + bytes_of(group.ids.contiguous()).tobytes() + bytes_of(group.mask.contiguous()).tobytes()
    ).hexdigest()


def _clear(folder: Path) -> None:
    """Remove the files of states, and leave a manifest that names none: it says that those to come are ours."""
    write_file(folder / STATES_MANIFEST, [json.dumps({"format": STATES_FORMAT, "block": None}).encode()], ADVICE)
    for path in list(folder.iterdir()):
        if is_state(path.name) and path.name != STATES_MANIFEST:
            path.unlink(missing_ok=True)


def remove(folder: str | os.PathLike) -> None:
    """Remove what `States` wrote into `folder`, and nothing else; the folder too, if it is empty then."""
    folder = Path(folder)
    if not folder.is_dir() or folder.is_symlink() or not is_states(folder, others=True):
        return
    with as_input_error(f"{folder} could not be removed", "remove it"):
        _removed(folder)


def _removed(folder: Path) -> None:
    _clear(folder)
    (folder / STATES_MANIFEST).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()
