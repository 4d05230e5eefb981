"""One training of a sweep after another, in a worker or in the process of the sweep itself."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from itda.dictionary.folder import CHECKPOINT, read_manifest
from itda.disk import json_object, make_folder, remove_leftovers, write_file
from itda.errors import InputError, Interrupted, NoSuchHook, first_line
from itda.models import loading
from itda.models.hooked_model import HookedModel
from itda.models.streamed_model import StreamedModel
from itda.progress import Progress, Step
from itda.provenance import is_number, section
from itda.reading.activations import activations
from itda.reading.on_disk import is_stored
from itda.settings import verbs
from itda.shortages import Shortage, shortage
from itda.training.cluster import Surroundings
from itda.training.grid import Job
from itda.training.train import LOADING, train

NOTE = "job.json"  # in the folder of a training: its settings, and what became of them


@dataclass(frozen=True)
class Outcome:
    """How a training ended: well, with a `problem`, or `stopped` with so many tokens in its checkpoint.

    `missing` says, by layer or hook point, why the model has no such one; the others were trained.
    """

    problem: str | None = None
    stopped: int | None = None
    missing: dict[int | str, str] = field(default_factory=dict)


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
        missing: dict[int | str, str] = {}
        try:
            note = read_note(out, job)  # before anything is trained: it says that what comes is of this sweep
            write_note(out, note)
            given: dict[str, Any] = dict(job.settings)
            if is_stored(given["data"]):
                named, n_layers = _on_disk(job, places, missing)
            else:
                model, places = self._found(job, places, missing)
                named = {place: model.canonical(place) for place in places} if model is not None else {}
                n_layers = None if model is None else model.n_layers
                if not isinstance(model, StreamedModel):  # which keeps its states beside the dictionary
                    given = {name: value for name, value in given.items() if name not in LOADING} | {"model": model}
            if not named:
                return Outcome(missing=missing)
            note |= {} if n_layers is None else {"n_layers": n_layers}
            given[job.kind] = list(named)
            train(out=out, overwrite=True, progress=self._note, stop=self._stopped, **given)
            seconds = round(time.monotonic() - began, 3)
            entries = {place: {"hook_point": hook, "seconds": seconds} for place, hook in named.items()}
            note["done"] |= {
                name: entry for place, entry in entries.items() for name in (_key(note, place), named[place])
            }
            write_note(out, note)
        except InputError as error:
            return Outcome(str(error), missing=missing)
        except Interrupted as error:
            return Outcome(stopped=error.tokens, missing=missing)
        except Exception as error:
            if (said := shortage(error, "It could not be trained")) is not None:
                return Outcome(str(said), missing=missing)
            return Outcome(
                f"This should not have happened ({type(error).__name__}: {first_line(error)}): please report it."
            )
        finally:
            self._at = None
        return Outcome(missing=missing)

    def _found(self, job: Job, places: tuple, missing: dict[int | str, str]) -> tuple[HookedModel | None, tuple]:
        """The model, and those of the places that it has; why it has not the others goes into `missing`."""
        while places:
            try:
                return self._loaded(job, places), places
            except NoSuchHook as error:  # said before any weight is read
                missing[error.hook] = str(error)
                places = tuple(place for place in places if place != error.hook)
        return None, places

    def _loaded(self, job: Job, places: tuple) -> HookedModel:
        settings = {name: job.settings[name] for name in LOADING if name in job.settings}
        key = (job.settings["model"], settings, job.kind, places)
        if self._model is None or self._key != key:
            self._model = None  # room for the next
            self._model = loading.load_model(job.settings["model"], hooks=list(places), **settings)
            self._key = key
        return self._model

    def _note(self, progress: Progress | Step | None) -> None:
        self._at = self._at if progress is None else progress
        self._tell()

    def _stopped(self) -> bool:
        return self._stopping or self._asked()


def _on_disk(job: Job, places: tuple, missing: dict[int | str, str]) -> tuple[dict[int | str, str], int | None]:
    """The hook points of those of the places that the activations on disk have, and how many blocks their model has.

    No model is loaded for it. Why the others are not there goes into `missing`.
    """
    reading = {name: value for name, value in job.settings.items() if name in verbs.ACTIVATIONS.settings}
    named: dict[int | str, str] = {}
    n_layers = None
    for place in places:
        try:
            found: Any = activations(job.settings["model"], job.settings["data"], **reading | {job.kind: place})
        except NoSuchHook as error:
            missing[place] = str(error)
        else:
            named[place], n_layers = found.hook_points[0], getattr(found, "n_layers", None)
    return named, n_layers


def read_note(out: str | Path, job: Job) -> dict[str, Any]:
    """What the folder `out` says of `job`; of another one, or none, nothing."""
    note = json_object(Path(out) / NOTE)
    done = section(note, "done") if note.get("settings") == job.settings else {}
    known = {"n_layers": n} if type(n := note.get("n_layers")) is int and n > 0 else {}
    return {"settings": job.settings, **known, "done": {name: e for name, e in done.items() if _is_entry(e)}}


def _key(note: dict[str, Any], place: int | str) -> str:
    """What stands for `place` in a note: one number for each layer, once it is known how many there are."""
    n_layers = note.get("n_layers", 0)
    return str(place + n_layers if isinstance(place, int) and -n_layers <= place < 0 else place)


def _is_entry(entry: Any) -> bool:
    """Whether this may stand in a note: the folder of a dictionary, named for a hook point, and seconds."""
    hook = entry.get("hook_point") if isinstance(entry, dict) else None
    plain = isinstance(hook, str) and hook.isprintable() and not set("/\\") & set(hook) and hook[:1] not in ("", ".")
    return plain and is_number(entry.get("seconds"))


def write_note(out: str | Path, note: dict[str, Any]) -> None:
    """The folder `out` with what it says of a training."""
    make_folder(out)
    remove_leftovers(Path(out) / NOTE)
    write_file(Path(out) / NOTE, [(json.dumps(note, indent=2) + "\n").encode()])


def finished(out: Path, note: dict[str, Any], place: int | str) -> tuple[dict[str, Any], str, float] | None:
    """The manifest of the dictionary at `place`, its folder's name and its seconds, if it is there and undamaged."""
    entry = note["done"].get(_key(note, place))
    if entry is None or os.path.exists(out / entry["hook_point"] / CHECKPOINT):
        return None
    try:
        return read_manifest(out / entry["hook_point"]), entry["hook_point"], float(entry["seconds"])
    except Shortage:  # nothing is known of it, and it is not to be trained again for that
        raise
    except InputError:
        return None
