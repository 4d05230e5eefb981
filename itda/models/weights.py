"""The safetensors of a checkpoint, file by file: which hold a block's weights, and no more of them read than that."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Set
from pathlib import Path

from torch import Tensor

from itda.errors import InputError, one_line
from itda.shortages import shortage

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
LARGEST_INDEX = 256 * 2**20


class Weights:
    """The weights of the checkpoint `model`, found by the blocks that they belong to.

    `fetch` gives the local path of one of its files, or None if it has none of that name; from the hub, that is when
    the file is downloaded, once. `blocks` is the path of the list of blocks, and `parts` are the weights of a block by
    their paths in it. A checkpoint may have the list under another path, beside others (a model that also sees or
    hears); it is then known by what its blocks hold, and its weights are called as the model calls them.
    `bytes_read` counts what was asked for.
    """

    def __init__(self, model: str, blocks: str, parts: Set[str], fetch: Callable[[str], str | None]) -> None:
        self.model, self.bytes_read = model, 0
        self._fetch = functools.cache(fetch)
        self._files = self._index()  # tensor -> file
        self._own: dict[str, str] = {}  # what the model calls a tensor that is called otherwise here
        named = re.compile(rf"(.*?){re.escape(blocks)}\.(\d{{1,9}})\.")
        prefixes = {match[1] for name in self._files if (match := named.match(name))}
        if len(prefixes) != 1:
            named, prefixes = self._known_by(parts, blocks, len(prefixes)), {""}
        self._prefix = prefixes.pop()
        self._blocks: dict[int, list[str]] = {}
        self._others: list[str] = []
        for name in self._files:
            if match := named.match(name):
                self._blocks.setdefault(int(match[2]), []).append(name)
            else:
                self._others.append(name)

    def _known_by(self, parts: Set[str], blocks: str, called: int) -> re.Pattern:
        """The names of the weights in the one list whose blocks hold the `parts`; raises `InputError` if none does."""
        lists: dict[str, set[str]] = {}
        for name in self._files:
            if (match := re.match(r"(.+?)\.\d{1,9}\.(.+)", name)) is not None:
                lists.setdefault(match[1], set()).add(match[2])
        alike = [path for path, found in lists.items() if found == parts]
        if len(alike) != 1:
            raise InputError(
                f"The weights of `{self.model}` do not say which belong to which block ({called} lists of them are "
                f"called `{blocks}`, and {len(alike)} hold what its blocks do): read it whole, without streaming "
                "(`--no-stream-layers`)."
            )
        (path,) = alike
        here, there = (f"{each.rpartition('.')[0]}." if "." in each else "" for each in (path, blocks))
        for name in self._files:
            if name.startswith(f"{path}."):
                self._own[name] = blocks + name.removeprefix(path)
            elif name.startswith(here):
                self._own[name] = there + name.removeprefix(here)
        return re.compile(rf"({re.escape(path)})\.(\d{{1,9}})\.")

    def block(self, number: int) -> dict[str, Tensor]:
        """The weights of a block by their names, read into memory."""
        if number not in self._blocks:
            raise InputError(
                f"`{self.model}` has no weights for block {number}, and its config has that block: its config and its "
                "weights do not belong together, so download or save it again."
            )
        return self._read(self._blocks[number])

    def outside(self, names: Set[str]) -> dict[str, Tensor]:
        """Those of the weights outside the blocks that the model calls `names`."""
        return self._read(self._outside(names))

    def stamps(self, blocks: Iterable[int], names: Set[str]) -> list[list]:
        """Name, size and time of the files with the weights of these blocks, or with `names` outside of them."""
        wanted = [*(name for block in blocks for name in self._blocks.get(block, ())), *self._outside(names)]
        files = sorted({self._files[name] for name in wanted})
        stats = [os.stat(self._path(file)) for file in files]
        return [[file, stat.st_size, stat.st_mtime_ns] for file, stat in zip(files, stats, strict=True)]

    def _outside(self, names: Set[str]) -> list[str]:
        own = self._own
        return [name for name in self._others if names & {own.get(name, name), name.removeprefix(self._prefix)}]

    def _index(self) -> dict[str, str]:
        """The file of every tensor."""
        if (single := self._fetch(SINGLE)) is not None:
            return dict.fromkeys(self._names(single), SINGLE)
        path = self._fetch(INDEX)
        if path is None:
            raise InputError(
                f"`{self.model}` has neither {SINGLE} nor {INDEX}: save it as safetensors (`save_pretrained` does)."
            )
        try:
            if os.path.getsize(path) > LARGEST_INDEX:
                raise ValueError(f"it has more than {LARGEST_INDEX} bytes")
            files = json.loads(Path(path).read_bytes())["weight_map"]
            if not isinstance(files, dict) or not files:
                raise ValueError("its weight_map is not a table")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise shortage(error, f"{INDEX} of `{self.model}` could not be read") or InputError(
                f"{INDEX} of `{self.model}` cannot be read ({one_line(str(error))}): download or save it again."
            ) from error
        for name, file in files.items():
            if not is_plain(file):
                raise InputError(
                    f"{INDEX} of `{self.model}` says that {name!r} is in {file!r}, which is no file of its own folder: "
                    "do not use it, or download it again."
                )
        return files

    def _read(self, names: list[str]) -> dict[str, Tensor]:
        from safetensors import SafetensorError, safe_open

        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self._files[name], []).append(name)
        out = {}
        for file, wanted in sorted(by_file.items()):
            path = self._path(file)
            try:
                with safe_open(path, framework="pt") as opened:
                    there = set(opened.keys())
                    for name in wanted:
                        if name not in there:
                            raise InputError(
                                f"{file} of `{self.model}` has no {name!r}, and {INDEX} says so: download or save it "
                                "again."
                            )
                        own = self._own.get(name, name)
                        out[own] = opened.get_tensor(name).clone()  # it was mapped, and is read now
            except (SafetensorError, OSError, MemoryError) as error:
                raise shortage(error, f"{file} of `{self.model}` could not be read") or InputError(
                    f"{file} of `{self.model}` is damaged ({one_line(str(error))}): download or save it again."
                ) from error
        self.bytes_read += sum(tensor.nbytes for tensor in out.values())
        return out

    def _names(self, path: str) -> list[str]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as opened:
                return list(opened.keys())
        except (SafetensorError, OSError, MemoryError) as error:
            if (said := shortage(error, f"{SINGLE} of `{self.model}` could not be read")) is not None:
                raise said from error
            reason = one_line(str(error))
            raise InputError(f"{SINGLE} of `{self.model}` is damaged ({reason}): download or save it again.") from error

    def _path(self, file: str) -> str:
        path = self._fetch(file)
        if path is None:
            raise InputError(f"`{self.model}` lacks {file}, which {INDEX} names: download or save it again.")
        return path


def is_plain(file: object) -> bool:
    """Whether this is the name of a safetensors file, and no path."""
    return (
        isinstance(file, str)
        and file.endswith(".safetensors")
        and not set(file) & set("/\\:\0")
        and not file.startswith(".")
        and file.isprintable()
        and len(file.encode()) < 256  # what a system takes
    )
