"""The rows of text that examples point into: on disk while they come, and at the end those that are pointed at."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from itda.disk import as_input_error, write_file
from itda.errors import InputError
from itda.labels import Labels
from itda.usage import columns

ROWS = 4096  # of text, that are held and written together
ADVICE = "free some space, and the same command goes on"


def table_of(labels: Labels) -> Any:
    """The rows of text that consecutive tokens are of, one row of the table each, as `columns.TEXTS` has them."""
    begins = np.flatnonzero(np.r_[True, labels.prompt[1:] != labels.prompt[:-1]][: len(labels)])
    row = labels.row[begins]
    origin = np.where(row >= 0, labels.text_start[row], 0) if len(labels.text_start) else np.zeros(len(row), np.int64)
    shift = np.repeat(origin, np.diff(np.append(begins, len(labels))))
    spelt = labels.start >= 0
    offsets = np.append(begins, len(labels))
    values = {
        "prompt": labels.prompt[begins],
        "document": labels.document[begins],
        "text_start": origin,
        "text": [columns.encodable(labels.texts[r]) if r >= 0 else "" for r in row.tolist()],
        "position": (offsets, labels.position),
        "token_id": (offsets, labels.token_id),
        "start": (offsets, np.where(spelt, labels.start - shift, -1)),
        "end": (offsets, np.where(spelt, labels.end - shift, -1)),
    }
    return columns.table(columns.TEXTS, values)


class Spool:
    """Rows of text in files `rows-00000.parquet`, ... of a folder, as many files as a state says."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files = folder, 0
        self._held: list[Any] = []

    def begin(self, files: int) -> None:
        """Go on after so many files; what a killed process wrote after these is removed."""
        self.files = files
        known = {self._path(number).name for number in range(files)}
        with as_input_error(f"{self.folder} could not be used", "choose a dictionary in another place"):
            for name in os.listdir(self.folder):
                if "rows-" in name and name not in known:
                    (self.folder / name).unlink()
        for number in range(files):
            if not self._path(number).is_file():
                raise InputError(f"{self._path(number)} is missing: remove {self.folder} to start anew.")

    def _path(self, number: int) -> Path:
        return self.folder / f"rows-{number:05d}.parquet"

    def add(self, labels: Labels) -> None:
        """Take the rows that these tokens, all of theirs, are of."""
        if len(labels):
            self._held.append(table_of(labels))
        if sum(len(table) for table in self._held) >= ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what is held."""
        if self._held:
            data = columns.written(columns.joined(self._held))
            write_file(self._path(self.files), [data], ADVICE)
            self.files, self._held = self.files + 1, []

    def of(self, prompts: Int[ndarray, " some"]) -> Iterator[Any]:
        """The rows `prompts`, which ascend, as tables of `ROWS` rows and a last one of fewer."""
        self.flush()
        held: list[Any] = []
        for number in range(self.files):
            table = columns.read(self._path(number), columns.TEXTS)
            there = table["prompt"].to_numpy()
            place = np.searchsorted(prompts, there).clip(max=max(0, len(prompts) - 1))
            held.append(table.filter(prompts[place] == there if len(prompts) else np.zeros(len(there), bool)))
            while sum(map(len, held)) >= ROWS:
                every = columns.joined(held)
                yield every.slice(0, ROWS)
                held = [every.slice(ROWS)]
        yield columns.joined(held) if held else columns.empty(columns.TEXTS)

    def remove(self) -> None:
        """Remove all files."""
        for number in range(self.files):
            self._path(number).unlink(missing_ok=True)
        self.files = 0
