"""One training of a sweep after another, in a worker or in the process of the sweep itself."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from itda import hooks
from itda.cluster import Surroundings, short
from itda.disk import make_folder, write_file
from itda.errors import InputError
from itda.folder import CHECKPOINT, read_manifest
from itda.grid import Job
from itda.progress import Progress, Step
from itda.reading import HookedModel
from itda.runs import LOADING, Interrupted, train
from itda.streaming import StreamedModel

NOTE = "job.json"  # in the folder of a training: its settings, and what became of them


@dataclass(frozen=True)
class Outcome:
    """How a training ended: well, with a `problem`, or `stopped` with so many tokens in its checkpoint."""

    problem: str | None = None
    stopped: int | None = None


class Trainer:
    """Does what it is given, and keeps the model as long as the next training reads it too."""

    def __init__(self, asked: Callable[[], bool] = bool, tell: Callable[[], None] = lambda: None) -> None:
        self._asked, self._tell, self._stopping = asked, tell, False
        self._at: Progress | Step | None = None
        self._model: HookedModel | None = None
        self._key: Any = None

    def start(self, around: Surroundings, mark: str) -> int:
        """In a worker: take over what it needs from the process of the sweep, and look for the file `mark` of that.

        The id of this process.
        """
        self._around = around
        around.enter()
        if not Path(mark).exists():
            raise InputError(
                f"A worker does not see {Path(mark).parent}: choose a folder on a file system that all machines share."
            )
        return os.getpid()

    def stop(self) -> None:
        """Let the training end at its next batch, with a checkpoint."""
        self._stopping = True

    def state(self) -> Progress | Step | None:
        """How far the training is that runs."""
        return self._at

    def run(self, job: Job, places: tuple, out: str) -> Outcome:
        """Train `job` for the hook points `places` into the folder `out`; what goes wrong is in what it returns."""
        if hasattr(self, "_around"):
            self._around.enter()  # threads are counted by thread, and this may be another
        self._at, began = None, time.monotonic()
        try:
            note = read_note(out, job)  # before anything is trained: it says that what comes is of this sweep
            write_note(out, note)
            model = self._loaded(job, places)
            named = {str(place): model.canonical(place) for place in places}
            given: dict[str, Any] = {**job.settings, job.kind: list(places)}
            if not isinstance(model, StreamedModel):  # which keeps its states beside the dictionary
                given = {name: value for name, value in given.items() if name not in LOADING} | {"model": model}
            train(out=out, overwrite=True, progress=self._note, stop=self._stopped, **given)
            seconds = round(time.monotonic() - began, 3)
            note["done"] |= {place: {"hook_point": hook, "seconds": seconds} for place, hook in named.items()}
            write_note(out, note)
        except InputError as error:
            return Outcome(str(error))
        except Interrupted as error:
            return Outcome(stopped=error.tokens)
        except Exception as error:
            return Outcome(f"This should not have happened ({type(error).__name__}: {short(error)}): please report it.")
        finally:
            self._at = None
        return Outcome()

    def _loaded(self, job: Job, places: tuple) -> HookedModel:
        settings = {name: job.settings[name] for name in (*LOADING, "stream_layers") if name in job.settings}
        key = (job.settings["model"], settings, job.kind, places)
        if self._model is None or self._key != key:
            self._model = None  # room for the next
            self._model = hooks.load(job.settings["model"], hooks=list(places), **settings)
            self._key = key
        return self._model

    def _note(self, progress: Progress | Step | None) -> None:
        self._at = self._at if progress is None else progress
        self._tell()

    def _stopped(self) -> bool:
        return self._stopping or self._asked()


def read_note(out: str | Path, job: Job) -> dict[str, Any]:
    """What the folder `out` says of `job`; of another one, or none, nothing."""
    fresh = {"settings": job.settings, "done": {}}
    try:
        note = json.loads((Path(out) / NOTE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return fresh
    good = isinstance(note, dict) and note.get("settings") == job.settings and isinstance(note.get("done"), dict)
    return note if good else fresh


def write_note(out: str | Path, note: dict[str, Any]) -> None:
    """The folder `out` with what it says of a training."""
    make_folder(out)
    write_file(Path(out) / NOTE, [(json.dumps(note, indent=2) + "\n").encode()])


def finished(out: Path, note: dict[str, Any], place: int | str) -> tuple[dict[str, Any], str, float] | None:
    """The manifest of the dictionary at `place`, its folder's name and its seconds, if it is there and undamaged."""
    entry = note["done"].get(str(place))
    if not isinstance(entry, dict) or not isinstance(entry.get("hook_point"), str):
        return None
    hook = entry["hook_point"]
    if "/" in hook or "\\" in hook or hook.startswith(".") or (out / hook / CHECKPOINT).exists():
        return None
    try:
        return read_manifest(out / hook), hook, float(entry.get("seconds", 0.0))
    except (InputError, TypeError, ValueError):
        return None
