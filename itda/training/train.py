"""A training from names to folders: everything that `itda train` does is `train`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from itda.arguments import PATH, checks, places_of
from itda.dictionary import folder
from itda.dictionary.build import build
from itda.dictionary.builder import Builder
from itda.dictionary.itda import ITDA
from itda.disk import STATES, checked_path
from itda.errors import InputError, Interrupted, counted
from itda.locks import locked
from itda.metrics import concentrated
from itda.models import hidden_states
from itda.models.streamed_model import StreamedModel
from itda.progress import Progress, Step, reporter
from itda.reading.activations import activations
from itda.reading.on_disk import is_stored
from itda.report.drawing import QUALITY, left_out, quality_of
from itda.results import Report, text_read
from itda.settings import groups, names, pick, takes, verbs
from itda.text.files import kind_of
from itda.training.cluster import check_unshared
from itda.training.defaults import admission_of, n_atoms_of
from itda.training.improve import Improvement
from itda.training.reading_workers import workers_of

LOADING = ("tokenizer", *names(verbs.Loading))
STREAMING = ("stream_layers", "state_gb", "state_dir")


@dataclass(frozen=True)
class Trained(Report):
    """One dictionary that `train` saved, and what it cost."""

    path: str  # its folder
    hook_point: str
    n_atoms: int
    tokens: int  # judged
    threshold: float | None  # the last one, where it was corrected on the way; None where none was admitted
    moved: float | None  # of atoms that were moved, the median cosine with the activation of their label
    k: int
    fvu: float  # on a sample of the tokens, as what follows
    fvu_robust: float  # without massive tokens
    fvu_standardised: float  # without these, and each coordinate over its deviation
    relative_error: float  # mean over tokens
    median_error: float
    variance: dict[str, Any]  # where that of the activations lies (`itda.metrics.variance`)
    massive: dict[str, Any] | None  # the |x| from which tokens were left out, and how many of what
    settled_share: float | None  # of all decisions (which atom, admit or not), those taken in float64
    files: int | None  # that were read; None of what is no local file
    documents: int | None  # that the tokens judged are of; None where nobody can tell
    unread: dict[str, int]  # files in the folder of the text that were not read, by what they end in
    seconds: float  # of this call: loading, reading, building and saving
    tokens_per_second: float | None  # reading and building; None if nothing was left to read

    def __str__(self) -> str:
        speed = f", reading and building at {self.tokens_per_second:,.0f} tokens/s" if self.tokens_per_second else ""
        more = text_read(vars(self)), left_out(self.massive or {}), concentrated(self.variance)
        how = [] if self.threshold is None else [f"threshold {self.threshold:.4g}"]
        how += [] if self.moved is None else [f"moved to a cosine of {self.moved:.2f} with their tokens"]
        return (
            f"{self.path}: {counted(self.n_atoms, 'atom')} of {counted(self.tokens, 'token')} at "
            f"{self.hook_point} ({', '.join(how)}, "
            f"k = {self.k}; on a sample of this text: {quality_of(vars(self))}) in "
            f"{self.seconds:.1f} s{speed}" + "".join(f"\n{line}" for line in more if line)
        )


@takes(verbs.TRAIN)
@checks(out=PATH)
def train(model: Any, data: Any, out: str | os.PathLike, **settings: Unpack[verbs.Train]) -> list[Trained]:
    """Train a dictionary of `model` on `data` and save it as the folder `out`; goes on from where one was interrupted.

    `layer` and `hook`, and what says how to read, are those of `itda.activations`; what says how to build, of
    `itda.build`. With a list of layers or hook points, `out` holds one folder per hook point, named for it. `preset`
    "paper" is the published code's practice: `itda.settings.verbs.PRESETS` where nothing else is given.

    Unless something is asked for that only admission has (a `threshold`, `max_atoms`, a `loss`, `candidates`, `refine`,
    a preset, or an `admission`), tokens are drawn at the start and moved in the same pass (`itda.dictionary.online`):
    `n_atoms`, or eight for each coordinate, at most 16,384 and an eighth of the tokens. With
    `candidates`, a dictionary of so many times `n_atoms` is built and the atoms of most use are kept
    (`itda.refine.select`); with `refine`, atoms are moved in so many passes (`itda.refine.refine`). Both are done on
    the first `refine_tokens` tokens, which are read again and held in memory; `progress` is also called with a `Step`.

    With `workers` or `ray`, so many processes on this machine, or on those of the Ray cluster at that address, read the
    model together (`itda.training.reading_workers`), and the dictionary is the same. With `stream_layers` (None: where
    the model does not fit into memory) its blocks come into memory one after another; the states between two of them
    lie in `out`, so that an interrupted training goes on after the last block that was finished.

    Raises `InputError` for what cannot be read, built or saved, a folder that is not ours, a dictionary that is there
    already unless `overwrite`, and `Interrupted` when `stop` said so.
    """
    given: dict[str, Any] = dict(settings)
    improvement = Improvement(given["n_atoms"], given["candidates"], given["refine"], given["refine_tokens"])
    read, grow = pick(verbs.Reading, given), pick(verbs.Grow, given)
    overwrite, stop, tokens = given["overwrite"], given["stop"], given["tokens"]
    grow["admission"] = admission_of(given)
    online = grow["admission"] == "online"
    # Bad settings are refused as they were given, before anything is loaded.
    Builder(**grow | ({"n_atoms": given["n_atoms"] or 1} if online else {}), total=given["n_atoms"])
    began = time.monotonic()
    single = _is_single(given, data)
    shown = Path(out)
    out = _checked_out(out, single, overwrite)
    _check_documents(data, read["truncate"])
    watch = _Watch(given["progress"])
    with ExitStack() as held:
        if not is_stored(data):
            read["state_dir"] = given["state_dir"] or out / STATES
        if (given["workers"] is not None or given["ray"]) and is_stored(data):
            raise InputError("Activations on disk are read without a model: leave out `workers` and `ray`.")
        if given["workers"] is not None or given["ray"]:
            watch.step(Step("starting workers", 0, given["workers"], 0.0))
            model, read = _by_workers(held, model, read, pick(groups.Workers, given))
        stream = activations(model, data, **read)
        reader = getattr(stream, "model", None)
        if isinstance(reader, StreamedModel):
            reader.stop, reader.report = stop, watch.step
        if online:
            grow["n_atoms"] = n_atoms_of(stream, given["n_atoms"], tokens)
        else:
            grow["n_atoms"] = improvement.wish(stream)
        folders = {"": out} if single else {name: out / name for name in stream.hook_points}
        for target in folders.values():
            held.enter_context(locked(target, "training into"))
        _check_targets(folders, overwrite)
        try:
            built = build(
                stream,
                **grow,
                tokens=tokens,
                progress=watch,
                checkpoint=out,
                checkpoint_seconds=given["checkpoint_seconds"],
                stop=stop,
            )
            models = {"": built} if isinstance(built, ITDA) else built
            models = improvement.of(models, stream, watch.step, stop)
        except KeyboardInterrupt:
            raise Interrupted(min(map(_kept, folders.values()))) from None
        finally:
            watch.end()
        for name, dictionary in models.items():
            dictionary.save(folders[name])
        # Only now, and the checkpoints last: a run that is killed before or in between goes on from them.
        hidden_states.remove(out / STATES)
        for target in folders.values():
            (target / folder.CHECKPOINT).unlink(missing_ok=True)
    return [_trained(models[name], shown / name, watch, began) for name in folders]


def _by_workers(held: ExitStack, model: Any, read: dict, who: Mapping[str, Any]) -> tuple[Any, dict]:
    """Workers in place of `model` until `held` is left, and what there is to say besides of how to read."""
    if read.get("stream_layers"):
        raise InputError(
            "A model that is streamed is read by one process: drop `stream_layers`, or `workers` and `ray`."
        )
    check_unshared(read["tensor_parallel"])
    hooks, _ = places_of(read["layer"], read["hook"], needed=True)
    how = {name: value for name, value in read.items() if name in LOADING and name not in STREAMING}
    found = held.enter_context(workers_of(model, hooks, **who, **how))
    return found, {name: value for name, value in read.items() if name not in LOADING}


def _check_documents(data: Any, truncate: bool) -> None:
    if truncate and isinstance(data, str | os.PathLike) and kind_of(os.fsdecode(data)) == ".txt":
        raise InputError(
            f"`truncate` keeps the first row of each document, and {data} is one document: give a .jsonl, a .parquet "
            "or a folder of files, or leave out `truncate` (which preset 'paper' sets)."
        )


def _is_single(given: Mapping[str, Any], data: Any) -> bool:
    """Whether one dictionary is to be built; of activations on disk all that are there, unless some are chosen."""
    if given["layer"] is None and given["hook"] is None and is_stored(data):
        return activations(None, data).single
    return places_of(given["layer"], given["hook"])[1]


def _checked_out(out: str | os.PathLike, single: bool, overwrite: bool) -> Path:
    """The folder to write to, after every check that needs no model."""
    if single:
        target = folder.check_writable_target(out)
        _check_targets({"": target}, overwrite)
        return target
    target = folder.check_writable_target(Path(checked_path(out)) / "any").parent
    for name, what in ((folder.MANIFEST, "is an ITDA"), (folder.CHECKPOINT, "is one whose training has not finished")):
        if (target / name).exists():
            raise InputError(
                f"{target} {what}, and several hook points need a folder that holds one for each: choose a new folder."
            )
    return target


def _check_targets(folders: dict[str, Path], overwrite: bool) -> None:
    """Refuse folders that hold something else, and finished dictionaries that may not be overwritten.

    A checkpoint beside a dictionary says that the training which wrote it had not finished, so it may. Checkpoints are
    removed one after another, in this order, when all dictionaries are there.
    """
    for target in folders.values():
        folder.check_writable_target(target)
    saved = [target for target in folders.values() if (target / folder.MANIFEST).is_file()]
    finished = [target for target in saved if not (target / folder.CHECKPOINT).is_file()]
    going_on = saved == [*folders.values()] and saved != finished == saved[: len(finished)]
    if finished and not going_on and not overwrite:
        raise InputError(
            f"{finished[0]} holds a finished ITDA already: choose another folder, or replace it with `overwrite` "
            "(`--overwrite`)."
        )


class _Watch:
    """Hands progress on, remembers the last, and ends the display once."""

    def __init__(self, progress: bool | Callable[[Progress | Step | None], None]) -> None:
        self._report = reporter(progress)
        self.last: Progress | None = None
        self._open = True

    def step(self, step: Step | None) -> None:
        """Hand on what comes after the building."""
        self._open = True
        if step is not None:
            self._report(step)

    def __call__(self, progress: Progress | Step | None) -> None:
        if progress is None:
            self.end()
            return
        if isinstance(progress, Step):
            self.step(progress)
            return
        self.last = progress
        self._report(progress)

    def end(self) -> None:
        if self._open:
            self._report(None)
        self._open = False


def _kept(target: Path) -> int:
    """How many tokens are in the checkpoint in `target`; 0 without one."""
    from safetensors import safe_open

    try:
        with safe_open(target / folder.CHECKPOINT, framework="pt") as file:
            state = json.loads(file.metadata()["state"])
            return int(state["position"] if "head" in state else state["seen"])  # the head waits to be judged
    except Exception:  # there is none, or none that is of use
        return 0


def _read(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """How much text a dictionary was built on."""
    stream = cfg.get("stream", {})
    return {name: stream.get(name) for name in ("files", "documents")} | {"unread": stream.get("unread") or {}}


def _trained(model: ITDA, path: Path, watch: _Watch, began: float) -> Trained:
    cfg = model.cfg
    return Trained(
        path=str(path),
        hook_point=cfg["model"]["hook_point"],
        n_atoms=model.n_atoms,
        tokens=cfg["tokens"],
        threshold=cfg["threshold"],
        moved=None if model.moved is None else float(model.moved.median()),
        k=model.k,
        variance=cfg["variance"],
        massive=cfg.get("massive"),
        **{name: cfg[name] for name in QUALITY},
        settled_share=round(watch.last.settled, 6) if watch.last else None,
        **_read(cfg),
        seconds=round(time.monotonic() - began, 3),
        tokens_per_second=round(watch.last.tokens_per_second, 1) if watch.last else None,
    )
