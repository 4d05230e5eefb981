"""A training from names to folders: everything that `itda train` does is `train`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from itda import folder, states
from itda.build import PAPER, build
from itda.builder import Builder
from itda.caches import is_stored
from itda.cluster import check_unshared
from itda.disk import STATES, checked_path, locked
from itda.errors import InputError
from itda.hooks import activations
from itda.improving import Improvement
from itda.model import ITDA
from itda.progress import Progress, Step, reporter
from itda.report import Report
from itda.streaming import StreamedModel
from itda.workers import workers_of

# What the published code does. Its threshold, 4e-4, is the default of the cosine loss.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "loss": PAPER["loss"],
        "admission": PAPER["admission"],
        "center": PAPER["center"],
        "batch_rows": 128,
        "truncate": True,
        "special_tokens": True,
        "padding": True,
    }
}
# What loading a model takes, of the settings.
LOADING = (
    *("tokenizer", "dtype", "device", "revision", "trust_remote_code", "backend", "remote", "device_map"),
    "tensor_parallel",
)
REFINE_TOKENS = 200_000
DEFAULTS: dict[str, Any] = {"loss": "relative", "admission": "sequential", "center": True, "batch_rows": 32}


@dataclass(frozen=True)
class Trained(Report):
    """One dictionary that `train` saved, and what it cost."""

    path: str  # its folder
    hook_point: str
    n_atoms: int
    tokens: int  # judged
    threshold: float  # the last one, where it was corrected on the way
    k: int
    fvu: float  # on a sample of the tokens
    settled_share: float | None  # of all decisions (which atom, admit or not), those taken in float64
    seconds: float  # of this call: loading, reading, building and saving
    tokens_per_second: float | None  # reading and building; None if nothing was left to read

    def __str__(self) -> str:
        speed = f", reading and building at {self.tokens_per_second:,.0f} tokens/s" if self.tokens_per_second else ""
        return (
            f"{self.path}: {self.n_atoms:,} atoms of {self.tokens:,} tokens at {self.hook_point} (threshold "
            f"{self.threshold:.4g}, k = {self.k}, FVU {self.fvu:.4f}) in {self.seconds:.1f} s{speed}"
        )


class Interrupted(KeyboardInterrupt):
    """A training that was stopped; `tokens` is how many are in the checkpoint from which the same call goes on."""

    def __init__(self, tokens: int) -> None:
        super().__init__(f"interrupted after {tokens} tokens")
        self.tokens = tokens


def train(
    model: Any,
    data: Any,
    out: str | os.PathLike,
    *,
    layer: int | Sequence[int] | None = None,
    hook: str | Sequence[str] | None = None,
    k: int = 40,
    threshold: float | None = None,
    n_atoms: int | None = None,
    tokens: int | None = 1_000_000,
    preset: str | None = None,
    loss: str | None = None,
    admission: str | None = None,
    center: bool | None = None,
    max_atoms: int | None = None,
    context_length: int = 128,
    batch_rows: int | None = None,
    truncate: bool = False,
    pack: bool = False,
    seed: int | None = None,
    column: str = "text",
    split: str = "train",
    config: str | None = None,
    data_revision: str | None = None,
    special_tokens: bool = False,
    padding: bool = False,
    tokenizer: Any = None,
    dtype: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    backend: str = "hooks",
    remote: bool | str = False,
    device_map: Any = None,
    tensor_parallel: int | None = None,
    chunk_size: int = 4096,
    candidates: int = 1,
    refine: int = 0,
    refine_tokens: int = REFINE_TOKENS,
    checkpoint_seconds: float = 30.0,
    overwrite: bool = False,
    workers: int | None = None,
    ray: bool | str = False,
    stream_layers: bool | None = None,
    state_gb: float | None = None,
    progress: bool | Callable[[Progress | Step | None], None] = False,
    stop: Callable[[], bool] = bool,
) -> list[Trained]:
    """Train a dictionary of `model` on `data` and save it as the folder `out`; goes on from where one was interrupted.

    `layer` and `hook`, and what says how to read, are those of `itda.activations`; what says how to build, of
    `itda.build`. With a list of layers or hook points, `out` holds one folder per hook point, named for it. `preset`
    "paper" is the published code's practice: `PRESETS` where nothing else is given. `loss` is "relative", `admission`
    "sequential", `center` True and `batch_rows` 32 without it. With `candidates`, a dictionary of so many times
    `n_atoms` is built and the atoms of most use are kept (`itda.refine.select`); with `refine`, atoms are moved in so
    many passes (`itda.refine.refine`). Both are done on the first `refine_tokens` tokens, which are read again and held
    in memory; `progress` then is also called with a `Step`.

    With `workers` or `ray`, so many processes on this machine, or on those of the Ray cluster at that address, read the
    model together (`itda.workers`), and the dictionary is the same. With `stream_layers` (None: where the model does
    not fit into memory) its blocks come into memory one after another; the states between two of them lie in `out`, so
    that an interrupted training goes on after the last block that was finished.

    Raises `InputError` for what cannot be read, built or saved, a folder that is not ours, a dictionary that is there
    already unless `overwrite`, and `Interrupted` when `stop` said so.
    """
    improvement = Improvement(n_atoms, candidates, refine, refine_tokens)
    given = dict(loss=loss, admission=admission, center=center, batch_rows=batch_rows)
    chosen = _preset(preset, given, truncate, special_tokens, padding)
    read: dict[str, Any] = dict(
        layer=layer, hook=hook, context_length=context_length, pack=pack, seed=seed, column=column, split=split
    )
    read |= dict(config=config, data_revision=data_revision, tokenizer=tokenizer, dtype=dtype, device=device)
    read |= {name: chosen.pop(name) for name in ("batch_rows", "truncate", "special_tokens", "padding")}
    read |= dict(revision=revision, trust_remote_code=trust_remote_code, backend=backend, remote=remote)
    read |= dict(tensor_parallel=tensor_parallel) | ({} if device_map is None else {"device_map": device_map})
    grow: dict[str, Any] = dict(k=k, threshold=threshold, n_atoms=n_atoms, max_atoms=max_atoms, chunk_size=chunk_size)
    Builder(**grow, **chosen, total=n_atoms)  # bad settings are refused as they were given, before anything is loaded
    began = time.monotonic()
    single = _is_single(layer, hook, data)
    shown = Path(out)
    out = _checked_out(out, single, overwrite)
    _check_documents(data, read["truncate"])
    watch = _Watch(progress)
    with ExitStack() as held:
        if not is_stored(data):
            read |= dict(stream_layers=stream_layers, state_gb=state_gb, state_dir=out / STATES)
        if workers is not None or ray:
            watch.step(Step("starting workers", 0, workers, 0.0))
            model, read = _by_workers(held, model, read, workers, ray)
        stream = activations(model, data, tokens=tokens, **read)
        reader = getattr(stream, "model", None)
        if isinstance(reader, StreamedModel):
            reader.stop, reader.report = stop, watch.step
        grow["n_atoms"] = improvement.wish(stream, max_atoms, tokens)
        folders = {"": out} if single else {name: out / name for name in stream.hook_points}
        for target in folders.values():
            held.enter_context(locked(target, "training into"))
        _check_targets(folders, overwrite)
        try:
            built = build(
                stream,
                **grow,
                **chosen,
                tokens=tokens,
                progress=watch,
                checkpoint=out,
                checkpoint_seconds=checkpoint_seconds,
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
        states.remove(out / STATES)
        for target in folders.values():
            (target / folder.CHECKPOINT).unlink(missing_ok=True)
    return [_trained(models[name], shown / name, watch, began) for name in folders]


def _by_workers(held: ExitStack, model: Any, read: dict, workers: int | None, ray: bool | str) -> tuple[Any, dict]:
    """Workers in place of `model` until `held` is left, and what there is to say besides of how to read."""
    if read.get("stream_layers"):
        raise InputError(
            "A model that is streamed is read by one process: drop `stream_layers`, or `workers` and `ray`."
        )
    check_unshared(read["tensor_parallel"])
    hooks = read["hook"] if read["layer"] is None else read["layer"]
    if hooks is None:
        return model, read  # which is refused
    own = {name: value for name, value in read.items() if name in LOADING}
    hooks = [hooks] if isinstance(hooks, str) or not isinstance(hooks, Iterable) else list(hooks)
    found = held.enter_context(workers_of(model, hooks, workers=workers, ray=ray, **own))
    said = (*own, "stream_layers", "state_gb", "state_dir")
    return found, {name: value for name, value in read.items() if name not in said}


def _check_documents(data: Any, truncate: bool) -> None:
    if truncate and str(data).lower().endswith(".txt"):
        raise InputError(
            f"`truncate` keeps the first row of each document, and {data} is one document: give a .jsonl, a .parquet "
            "or a folder of files, or leave out `truncate` (which preset 'paper' sets)."
        )


def _preset(name: str | None, given: dict[str, Any], truncate: bool, special_tokens: bool, padding: bool) -> dict:
    """What is given, else what the preset says, else the default."""
    if name is not None and name not in PRESETS:
        raise InputError(f"`preset` is {name!r}; choose {' or '.join(map(repr, PRESETS))}, or leave it out.")
    preset = DEFAULTS | PRESETS.get(name or "", {})
    flags = dict(truncate=truncate, special_tokens=special_tokens, padding=padding)
    return (
        preset
        | {key: v for key, v in given.items() if v is not None}
        | {key: v or preset.get(key, False) for key, v in flags.items()}
    )


def _is_single(layer: Any, hook: Any, data: Any) -> bool:
    """Whether one dictionary is to be built; of activations on disk all that are there, unless some are chosen."""
    if layer is None and hook is None and is_stored(data):
        return activations(None, data).single
    return all(isinstance(given, str) or not isinstance(given, Iterable) for given in (layer, hook))


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
        self._report: Callable[[Any], None] | None = reporter(progress)
        self.last: Progress | None = None
        self._open = True

    def step(self, step: Step | None) -> None:
        """Hand on what comes after the building."""
        self._open = True
        if self._report and step is not None:
            self._report(step)

    def __call__(self, progress: Progress | Step | None) -> None:
        if progress is None:
            self.end()
            return
        if isinstance(progress, Step):
            self.step(progress)
            return
        self.last = progress
        if self._report:
            self._report(progress)

    def end(self) -> None:
        if self._report and self._open:
            self._report(None)
        self._open = False


def _kept(target: Path) -> int:
    """How many tokens are in the checkpoint in `target`; 0 without one."""
    from safetensors import safe_open

    try:
        with safe_open(target / folder.CHECKPOINT, framework="pt") as file:
            return int(json.loads(file.metadata()["state"])["seen"])
    except Exception:  # there is none, or none that is of use
        return 0


def _trained(model: ITDA, path: Path, watch: _Watch, began: float) -> Trained:
    cfg = model.cfg
    return Trained(
        path=str(path),
        hook_point=cfg["model"]["hook_point"],
        n_atoms=model.n_atoms,
        tokens=cfg["tokens"],
        threshold=cfg["threshold"],
        k=model.k,
        fvu=cfg["fvu"],
        settled_share=round(watch.last.settled, 6) if watch.last else None,
        seconds=round(time.monotonic() - began, 3),
        tokens_per_second=round(watch.last.tokens_per_second, 1) if watch.last else None,
    )
