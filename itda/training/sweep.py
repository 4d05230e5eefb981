"""A grid of settings -> a dictionary for each, and a table of results: everything that `itda sweep` does is `sweep`."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from itda.arguments import GRID, PATH, checks
from itda.disk import as_input_error, checked_path, json_object, make_folder, remove_leftovers, write_file
from itda.errors import InputError, Interrupted, counted, one_line
from itda.locks import locked
from itda.metrics import concentrated
from itda.progress import Progress, Step, reporter
from itda.provenance import section
from itda.report.drawing import QUALITY
from itda.report.tables import columns
from itda.results import Report, finite
from itda.settings import takes, verbs
from itda.training.cluster import POLL, Crew, Surroundings, check_unshared, connected, shares
from itda.training.grid import ONE_PASS, Job, default, jobs_of, read_grid
from itda.training.sweep_worker import Outcome, Trainer, finished, read_note

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

RESULTS, TABLE, FORMAT = "results.json", "results.csv", "itda sweep"
MEASURED = ("hook_point", "k", "threshold", "n_atoms", "fvu", "tokens", "seconds")
ERRORS = tuple(QUALITY)[1:]  # beside FVU


@dataclass(frozen=True, repr=False)
class Sweep(Report):
    """The dictionaries of a grid, one row each; made by `sweep`.

    A row has the `settings` that the grid names, the `folder`, and of the dictionary `hook_point`, `k`, `threshold`,
    `n_atoms`, `fvu` on its sample, `tokens` judged, and `seconds` of the pass that made it (and the other layers of
    that pass); then of the same sample `fvu_robust`, `fvu_standardised`, `relative_error` and `median_error` (as
    `itda.training.train.Trained` has them), and in `concentrated` the sentence where few tokens or one coordinate hold
    most of the variance. `problem` says why there is none, else it is None.
    """

    path: str
    grid: dict[str, list]
    rows: list[dict[str, Any]]
    skipped: int  # dictionaries that were there before

    @property
    def problems(self) -> list[str]:
        """Why dictionaries are missing."""
        return [row["problem"] for row in self.rows if row["problem"]]

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        return {"format": FORMAT, **super().to_json()}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        several = [name for name, values in self.grid.items() if len(values) > 1 and name not in MEASURED]
        several = [name for name in several if name not in ONE_PASS]
        places, named = _places(self.rows)
        settings = [*several, named]
        table = columns(*settings, *MEASURED[1:], label="folder", left=settings, folds=True)
        for row, place in zip(self.rows, places, strict=True):
            cells = [*(row["settings"].get(name) for name in several), place, *(row[name] for name in MEASURED[1:])]
            last = Text(one_line(row["problem"] or row["folder"]), style="red" if row["problem"] else "")
            table.add_row(*(Text(one_line(_cell(cell))) for cell in cells), last)
        yield table
        varied = [name for name, values in self.grid.items() if len(values) > 1 and name not in ONE_PASS]
        yield from self._errors([*varied, named], varied, places)
        yield Text(
            f"{counted(len(self.rows) - len(self.problems), 'dictionary')} in {self.path}, {self.skipped:,} "
            "there before"
        )

    def _errors(self, names: list[str], several: list[str], places: list[str]) -> RenderResult:
        """What there is of errors beside FVU."""
        from rich.text import Text

        table = columns(*QUALITY.values(), label="", first=" ".join(names))
        for row, place in zip(self.rows, places, strict=True):
            which = " ".join(_cell(value) for value in (*(row["settings"].get(name) for name in several), place))
            table.add_row(Text(one_line(which)), *(_cell(row.get(name)) for name in QUALITY))
        yield Text()
        yield table
        for said in dict.fromkeys(said for row in self.rows if (said := row.get("concentrated"))):
            which = ", ".join(row["folder"] for row in self.rows if row.get("concentrated") == said)
            yield Text(one_line(f"{which}: {said}"), overflow="fold")


@takes(verbs.SWEEP)
@checks(settings=GRID, out=PATH)
def sweep(settings: Mapping[str, Any] | str | os.PathLike, out: str | os.PathLike, **how: Unpack[verbs.Sweep]) -> Sweep:
    """Train a dictionary for every combination of `settings`, into the folder `out`; goes on from where one ended.

    `settings` are those of `itda.train` by name, each a value or a list of them, or the path of a TOML file with them.
    `model`, `data`, and `layer` or `hook` must be there. Layers and hook points are read in one pass; `threshold` and
    `n_atoms` are alternatives, so that the sizes of both lists are tried. A dictionary that is finished is not trained
    again. A training that fails is told in its row, and the others go on.

    With `workers` or `ray`, so many trainings run side by side, on this machine or on those of the Ray cluster at that
    address, which must all see `out` and the data.

    Raises `InputError` for settings that are not understood, and for a dictionary in `out` that was trained by another
    admission than these settings mean now, before anything is trained, and `Interrupted` if `stop`
    said so.
    """
    workers, ray, stop = how["workers"], how["ray"], how["stop"]
    grid = read_grid(settings)
    jobs, shown = jobs_of(grid), str(out)
    make_folder(out)
    out = Path(os.path.realpath(checked_path(out)))
    _check_ours(out)
    with locked(out, "sweeping into"):
        for name in (RESULTS, TABLE):
            remove_leftovers(out / name)
        table = _Table(out, grid, jobs)
        todo = [job for job in jobs if table.missing(job)]
        view = _View(todo, reporter(how["progress"]), stop)
        calls = ((job, table.missing(job), str(out / job.name)) for job in view.started())
        wants = {name: todo[0].settings.get(name) for name in ("device", "device_map")} if todo else {}
        alone = not todo or (workers is None and not ray)
        for job in [] if alone else todo:
            check_unshared(job.settings.get("tensor_parallel"))
        try:
            table.write()
            outcomes = _here(calls, view) if alone else _there(calls, view, out, workers, ray, wants)
            for number, outcome in outcomes:
                view.ended(number, outcome)
                table.add(todo[number], outcome)
                table.write()
        finally:
            view.end()
    if view.stopping:
        raise Interrupted(view.kept)
    return Sweep(shown, grid, table.rows, table.skipped)


def _here(calls: Iterable[tuple], view: _View) -> Iterator[tuple[int, Outcome]]:
    """One training after another, in this process."""
    trainer = Trainer(view.stop, lambda: view.tell([trainer.state()]))
    for number, call in enumerate(calls):
        yield number, trainer.run(*call)


def _there(
    calls: Iterable[tuple], view: _View, out: Path, workers: int | None, ray: bool | str, wants: dict[str, Any]
) -> Iterator[tuple[int, Outcome]]:
    """Trainings side by side, by workers of Ray."""
    with connected(ray, workers) as module, _mark(out) as mark:
        number, gpus = shares(module, workers, **wants)
        crew = Crew(module, Trainer, (Surroundings.here(), mark), number, gpus=gpus, at_once=2)
        told = set()

        def tick() -> None:
            ready = [worker for worker in crew.workers if worker.ready]
            if ready:
                states, _ = module.wait([w.actor.state.remote() for w in ready], num_returns=len(ready), timeout=POLL)
                with suppress(*crew.losses):  # of one that died, which is noticed elsewhere
                    view.tell(module.get(states))
            if view.stop():
                for worker in ready:
                    if worker not in told:
                        worker.actor.stop.remote()
                        told.add(worker)

        try:
            yield from crew.run("run", calls, tick=tick, instead=lambda error: Outcome(str(error)))
        finally:
            crew.close()


@contextmanager
def _mark(out: Path) -> Iterator[str]:
    """A file in `out` for workers to see, as long as they work."""
    mark = out / f".{RESULTS}.tmp-{secrets.token_hex(8)}"
    with as_input_error(f"{out} could not be written", "choose another folder"):
        mark.touch()
    try:
        yield str(mark)
    finally:
        mark.unlink(missing_ok=True)


class _Table:
    """The rows of a sweep, in memory and in its folder."""

    def __init__(self, out: Path, grid: dict[str, list], jobs: list[Job]) -> None:
        self._out, self._grid, self._jobs = out, grid, jobs
        self._rows: dict[tuple[str, int | str], dict[str, Any]] = {}
        self._done: set[tuple[str, int | str]] = set()
        for job in jobs:
            self.add(job, Outcome())
        self.skipped = sum(row["hook_point"] is not None for row in self.rows)

    def missing(self, job: Job) -> tuple[int | str, ...]:
        """The hook points of `job` that have no dictionary yet."""
        return tuple(place for place in job.places if (job.name, place) not in self._done)

    def add(self, job: Job, outcome: Outcome) -> None:
        """Take down what became of `job`, from what is in its folder."""
        note = read_note(self._out / job.name, job)
        for place in job.places:
            settings = {name: job.settings.get(name, default(name)) for name in self._grid if name != job.kind}
            row: dict[str, Any] = {"settings": {**settings, job.kind: place}, "folder": job.name}
            row |= dict.fromkeys((*MEASURED, *ERRORS, "concentrated"))
            problem = outcome.missing.get(place, outcome.problem)
            if found := finished(self._out / job.name, note, place):
                cfg, hook, seconds = found
                _check_method(self._out / job.name / hook, cfg, job)
                row |= {name: cfg.get(name) for name in (*MEASURED, *ERRORS)}
                row["concentrated"] = concentrated(section(cfg, "variance"))
                row |= {"hook_point": hook, "seconds": seconds, "folder": f"{job.name}/{hook}"}
                self._done.add((job.name, place))
            self._rows[job.name, place] = row | {"problem": None if found else problem}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One for each dictionary, in the order of the grid; layers -1 and 3 may be one."""
        rows: dict[Any, dict[str, Any]] = {}
        for (_, place), row in self._rows.items():
            rows.setdefault((row["folder"], row["hook_point"] or place), row)
        return [finite(row) for row in rows.values()]

    def write(self) -> None:
        """Put them into the folder."""
        document = {"format": FORMAT, "grid": self._grid, "rows": self.rows}
        write_file(self._out / RESULTS, [(json.dumps(document, indent=2, allow_nan=False) + "\n").encode()])
        names = [name for name in self._grid if name not in MEASURED]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        measured = (*MEASURED, "folder", "problem", *ERRORS)
        writer.writerow([*names, *measured])
        for row in self.rows:
            given = [row["settings"].get(name) for name in names]
            writer.writerow(given + [row[name] for name in measured])
        write_file(self._out / TABLE, [text.getvalue().encode()])


class _View:
    """How far the trainings are that were begun, all of them together."""

    def __init__(self, todo: list[Job], report: Callable[[Step | None], None], stop: Callable[[], bool]) -> None:
        self._todo, self._report, self._stop = todo, report, stop
        self._began, self._running, self._ended = time.monotonic(), 0, 0
        self._tokens, self._total = 0, 0  # of those that ended; what the longest has
        self._last: list[Progress] = []
        self.stopping, self.kept = False, 0

    def started(self) -> Iterator[Job]:
        """The jobs, until they are to stop."""
        for job in self._todo:
            if self.stop():
                return
            self._running += 1
            yield job

    def stop(self) -> bool:
        """Whether they are to stop."""
        self.stopping = self.stopping or self._stop()
        return self.stopping

    def ended(self, number: int, outcome: Outcome) -> None:
        """One is no longer running."""
        self._running, self._ended, self.kept = self._running - 1, self._ended + 1, self.kept + (outcome.stopped or 0)
        self._tokens += self._total
        self._last = []

    def tell(self, states: Iterable[Progress | Step | None]) -> None:
        """Report, from where those are that run."""
        self._last = [state for state in states if isinstance(state, Progress)]
        self._total = max([self._total, *(state.total or 0 for state in self._last)])
        speed = sum(state.tokens_per_second for state in self._last)
        done = f"{self._ended:,} of {counted(len(self._todo), 'training')} done"
        what = f"{done} · {self._running} running · {speed:,.0f} tokens/s"
        tokens = self._tokens + sum(state.tokens for state in self._last)
        total = max(tokens, self._total * len(self._todo)) or None
        self._report(Step(what, tokens, total, time.monotonic() - self._began))

    def end(self) -> None:
        """The display is left."""
        self._report(None)


def _check_ours(out: Path) -> None:
    """Raise `InputError` where another's results would be written over."""
    ours = json_object(out / RESULTS).get("format") == FORMAT
    for name in (RESULTS, TABLE):
        if (out / name).exists() and not ours:
            raise InputError(f"{out / name} is not of a sweep: choose another folder, or move it away.")


def _check_method(path: Path, cfg: Mapping[str, Any], job: Job) -> None:
    """Raise `InputError` where the dictionary at `path` is older than the method that `job` now means."""
    if (there := cfg.get("admission", job.admission)) != job.admission:
        raise InputError(
            f"{path} was trained by admission {one_line(repr(there))}, and these settings mean {job.admission!r} now: "
            "sweep into another folder, since one table would mix two methods."
        )


def _places(rows: list[dict[str, Any]]) -> tuple[list[str], str]:
    """What tells the hook points of `rows` apart, shortly, and what that is called; folders have the whole names."""
    asked = [next(row["settings"][kind] for kind in ONE_PASS if kind in row["settings"]) for row in rows]
    whole = [str(asked[i] if row["hook_point"] is None else row["hook_point"]) for i, row in enumerate(rows)]
    every = list(dict.fromkeys(whole))
    short = [found[1] if (found := re.search(r"(?:^|\.)(-?\d+(\..*)?)$", place)) else place for place in every]
    if len(set(short)) < len(every) or short == every:
        return whole, "hook point" if any("." in place for place in every) else "layer"
    number = dict(zip(every, short, strict=True))
    return [number[place] for place in whole], "layer"


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
