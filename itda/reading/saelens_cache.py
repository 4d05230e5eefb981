"""The activation caches of SAELens, folders of Arrow files as `datasets` writes them, as a stream.

SAELens' `CacheActivationsRunner` writes rows of a column named for the hook point, (context, d) each, and `token_ids`.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from numpy import ndarray

from itda.devices import checked_device
from itda.disk import json_object, small_file
from itda.errors import InputError, counted, one_line
from itda.labels import Batch, Labels
from itda.reading.store import HOOK_NAME, chosen
from itda.settings import takes, verbs
from itda.shortages import shortage
from itda.text.prompts import Row, StreamHash

STATE, INFO, IDS = "state.json", "dataset_info.json", "token_ids"
DEEPEST = 20  # columns of columns


def is_cache(path: Any) -> bool:
    """Whether a folder is an activation cache; one that `save_to_disk` wrote of a data set with text looks alike."""
    if not isinstance(path, str | os.PathLike):
        return False
    folder = Path(path)
    looks = all(os.path.isfile(folder / name) for name in (STATE, INFO)) and any(folder.glob("*.arrow"))
    return looks and not _of_text(json_object(folder / INFO).get("features"))


def _of_text(features: Any) -> bool:
    """Whether any column of a data set, or what is in it, is text; also where none holds numbers that are not whole."""
    kinds = set(_kinds(features))
    return bool(kinds) and (bool(kinds & {"string", "large_string"}) or not any("float" in kind for kind in kinds))


def _kinds(features: Any, depth: int = 0) -> Iterator[str]:
    """The types of what is in the columns, as `datasets` writes them down."""
    if isinstance(features, dict) and isinstance(features.get("dtype"), str):
        yield features["dtype"]
    elif isinstance(features, dict | list) and depth < DEEPEST:
        for part in features.values() if isinstance(features, dict) else features:
            yield from _kinds(part, depth + 1)


class Cache:
    """An activation cache of SAELens, read as a stream; `itda.activations` makes one of its folder.

    A label's prompt is the row, and its token id is known where the cache has `token_ids`; there is no text. Position 0
    is left out unless `special_tokens`, and so is, wherever it stands, the id that opens both of the first two rows:
    that is BOS. `model` is whose activations they are, which a cache does not say.
    """

    @takes(verbs.CACHED)
    def __init__(
        self,
        path: str | os.PathLike,
        *,
        model: str | None = None,
        device: str | torch.device | None = None,
        **settings: Unpack[verbs.Cached],
    ):
        self.path, self.skipped = Path(path), 0
        self._budget, self._batch_rows = settings["tokens"], settings["batch_rows"]
        self._files = _arrow_files(self.path)
        row = next(self._rows(None), None)
        if row is None or not set(row) - {IDS}:
            raise InputError(f"{path} has no rows of activations: give a cache with activations in it.")
        columns = sorted(row)
        self._ids = IDS in columns
        names, self.single = chosen(
            [name for name in columns if name != IDS], settings["layer"], settings["hook"], None, path
        )
        self.hook_points = tuple(names)
        self._about = {hook: (row[hook].shape[1], str(row[hook].dtype)) for hook in names}
        self._model, self._special = model, settings["special_tokens"]
        self._device = checked_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._bos = None if self._special or not self._ids else self._opening()
        self.hash: str = StreamHash().hexdigest()
        self.skipped_hash: str | None = self.hash

    @property
    def tokens(self) -> int | None:
        """How many tokens an iteration yields at most; None if that is as many as there are."""
        return None if self._budget is None else max(0, self._budget - self.skipped)

    def count_tokens(self, limit: int | None = None) -> int:
        """How many tokens an iteration yields, or `limit` if that is fewer."""
        limits = [n for n in (self.tokens, limit) if n is not None]
        count, columns = -self.skipped, [IDS] if self._ids else [self.hook_points[0]]
        for row in self._rows(columns):
            if limits and count >= min(limits):
                break
            count += int(self._valid(row).sum())
        return max(0, min([count, *limits]))

    def skip(self, tokens: int) -> Cache:
        """The same without the first `tokens` tokens."""
        if tokens < 0:
            raise InputError(f"`tokens` is {tokens}, and no fewer than 0 can be skipped: pass how many were read.")
        rest = copy.copy(self)
        rest.skipped, rest.hash, rest.skipped_hash = self.skipped + tokens, StreamHash().hexdigest(), None
        return rest

    @property
    def provenance(self) -> dict:
        """What a cache says of itself; per hook point unless `single`."""
        stream = {"kind": "saelens", "data": os.fspath(self.path), "fingerprint": self._fingerprint, "hash": self.hash}
        rest = {"stream": stream, "batch_rows": self._batch_rows, "special_tokens": self._special, "padding": False}
        every = {}
        for hook, (d, dtype) in self._about.items():
            layer = re.search(r"\.(\d{1,9})(\.|$)", hook)
            said = {"id": self._model, "hook_point": hook, "layer": int(layer[1]) if layer else None}
            every[hook] = {"model": said | {"d": d, "dtype": dtype}, **rest}
        return every[self.hook_points[0]] if self.single else every

    def __iter__(self) -> Iterator[Batch] | Iterator[dict[str, Batch]]:
        stream, done = StreamHash(), 0
        self.hash = stream.hexdigest()
        group: list[tuple[int, dict[str, ndarray]]] = []
        columns = [*self.hook_points, *([IDS] if self._ids else [])]
        for number, row in enumerate(self._rows(columns)):
            group.append((number, row))
            if len(group) == self._batch_rows:
                done, found = self._batch(group, done, stream)
                if found is not None:
                    yield found
                group = []
                if done == self._budget:
                    break
        if group:
            done, found = self._batch(group, done, stream)
            if found is not None:
                yield found
        if done < self.skipped:
            raise InputError(
                f"{counted(self.skipped, 'token')} cannot be skipped, because {self.path} has {done}: pass "
                "the cache that was "
                "read before."
            )

    def labels(self) -> Iterator[tuple[Labels, str]]:
        """The labels of every batch, and the stream's hash as of it."""
        for item in self:
            batch = item if isinstance(item, Batch) else next(iter(item.values()))
            yield batch.labels, self.hash

    def _batch(self, group: list, done: int, stream: StreamHash) -> tuple[int, Any]:
        """How many tokens there were with those of a group of rows, and what of these comes after the skipped ones."""
        labels, places = [], []
        for number, row in group:
            for hook, about in self._about.items():
                if (row[hook].shape[1], str(row[hook].dtype)) != about:
                    raise _damaged(self.path, f"has other activations in row {number} than in the first")
            where = np.flatnonzero(self._valid(row))
            ids = row[IDS].astype(np.int64) if self._ids else np.full(len(self._of(row)), -1)
            # Where no ids are known, what the row begins with tells it from others.
            known = ids if self._ids else np.frombuffer(self._of(row)[:1].tobytes(), np.uint8).astype(np.int64)
            stream.update(Row(number, number, known, known, known, known < 0, "", 0))
            nothing, prompt = np.full(len(where), -1), np.full(len(where), number)
            labels.append(Labels(prompt, where, ids[where], nothing, nothing, nothing, nothing))
            places.append(where)
        self.hash = stream.hexdigest()
        size = sum(map(len, places))
        end = size if self._budget is None else min(size, self._budget - done)
        start = min(max(0, self.skipped - done), end)
        if self.skipped_hash is None and done + end >= self.skipped:
            self.skipped_hash = self.hash
        if start == end:
            return done + end, None
        every, batches = Labels.concat(labels)[start:end], {}
        for hook in self.hook_points:
            x = np.concatenate([row[hook][where] for (_, row), where in zip(group, places, strict=True)])
            batches[hook] = Batch(torch.from_numpy(x[start:end]).to(self._device), every)
        return done + end, batches[self.hook_points[0]] if self.single else batches

    def _of(self, row: dict[str, ndarray]) -> ndarray:
        return row[self.hook_points[0]]

    def _valid(self, row: dict[str, ndarray]) -> ndarray:
        valid = np.ones(len(row[IDS] if self._ids else self._of(row)), bool)
        if not self._special:
            valid[:1] = False
            if self._bos is not None:
                valid[row[IDS] == self._bos] = False
        return valid

    def _opening(self) -> int | None:
        """The id that opens both of the first two rows."""
        firsts = [int(row[IDS][0]) for row, _ in zip(self._rows([IDS]), range(2), strict=False) if len(row[IDS])]
        return firsts[0] if len(firsts) == 2 and firsts[0] == firsts[1] else None

    @property
    def _fingerprint(self) -> str | None:
        found = json.loads(small_file(self.path / STATE)).get("_fingerprint")
        return found if isinstance(found, str) else None

    def _rows(self, columns: Sequence[str] | None) -> Iterator[dict[str, ndarray]]:
        """The `columns` (all if None) of every row, activations as (context, d)."""
        import pyarrow as pa

        for path in self._files:
            try:
                with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
                    for batch in reader:
                        yield from _unpacked(batch, columns, path)
            except (pa.ArrowException, OSError, ValueError) as error:
                if isinstance(error, InputError):
                    raise
                if (said := shortage(error, f"{path} could not be read")) is not None:
                    raise said from error
                raise _damaged(path, f"is not a readable Arrow file ({error})") from error


def _damaged(path: Path, what: str) -> InputError:
    return InputError(f"{path} {one_line(what)}: copy the folder again, or make the cache anew.")


def _arrow_files(folder: Path) -> list[Path]:
    """The files of a cache in order, all of them in its folder."""
    state = folder / STATE
    try:
        document = json.loads(small_file(state))
        names = [part["filename"] for part in document["_data_files"]]
        if not names or not all(isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*\.arrow", name) for name in names):
            raise ValueError(f"the files are {names}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(state, f"does not name the Arrow files of a cache ({error})") from error
    for path in (folder / name for name in names):
        if path.is_symlink() or not path.is_file():
            raise _damaged(path, "is a link, and a file was wanted" if path.is_symlink() else "is missing")
    return [folder / name for name in names]


def _unpacked(batch: Any, columns: Sequence[str] | None, path: Path) -> Iterator[dict[str, ndarray]]:
    """The rows of a record batch."""
    found: dict[str, tuple[ndarray, ndarray]] = {}
    for name in batch.schema.names if columns is None else columns:
        if not HOOK_NAME.fullmatch(name) or name not in batch.schema.names:
            raise _damaged(path, f"has no column {name!r} that names a hook point")
        column = batch.column(name)
        column = getattr(column, "storage", column)  # `datasets` has a type of its own for (context, d), once imported
        column.validate(full=True)
        if column.null_count:
            raise _damaged(path, f"has gaps in {name!r}")
        lengths, values = _lengths(column), column.flatten()
        if name != IDS:
            widths = np.unique(_lengths(values))
            values = values.flatten()
            if len(widths) != 1 or widths[0] < 1 or values.null_count:
                raise _damaged(path, f"has activations of {len(widths)} widths in {name!r}")
            flat = values.to_numpy(zero_copy_only=False).reshape(-1, int(widths[0]))
            if flat.dtype.kind != "f":
                raise _damaged(path, f"has {flat.dtype} in {name!r}, and activations were wanted")
        else:
            flat = values.to_numpy(zero_copy_only=False)
            if flat.dtype.kind not in "iu":
                raise _damaged(path, f"has {flat.dtype} in {name!r}, and whole numbers were wanted")
        found[name] = flat, np.concatenate([[0], np.cumsum(lengths)])
    sizes = [where for _, where in found.values()]
    if any((where != sizes[0]).any() for where in sizes):
        raise _damaged(path, "has rows of other lengths in one column than in another")
    for i in range(batch.num_rows):
        yield {name: flat[where[i] : where[i + 1]] for name, (flat, where) in found.items()}


def _lengths(column: Any) -> ndarray:
    """How many values each list of a column has."""
    if hasattr(column.type, "list_size"):
        return np.full(len(column), column.type.list_size)
    if not hasattr(column, "value_lengths"):
        raise ValueError(f"{column.type} came, and lists were wanted")
    return np.asarray(column.value_lengths())
