"""A training from names to folders: everything that `itda train` does is `train`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from itda import folder
from itda.build import PAPER, build
from itda.errors import InputError, check_whole
from itda.hooks import activations
from itda.labels import Batch, Labels
from itda.model import ITDA
from itda.progress import Progress, Step, reporter
from itda.pursuit.gram import free_bytes
from itda.refine import refine as refine_atoms
from itda.refine import select as select_atoms
from itda.report import finite

# What the published code does. Its threshold, 4e-4, is the default of the cosine loss.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "loss": PAPER["loss"],
        "admission": PAPER["admission"],
        "batch_rows": 128,
        "truncate": True,
        "special_tokens": True,
        "padding": True,
    }
}
REFINE_TOKENS = 200_000
DEFAULTS: dict[str, Any] = {"loss": "relative", "admission": "sequential", "batch_rows": 32}


@dataclass(frozen=True)
class Trained:
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

    def to_json(self) -> dict[str, Any]:
        """All of it, by name."""
        return finite(asdict(self))

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
    center: bool = False,
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
    chunk_size: int = 4096,
    candidates: int = 1,
    refine: int = 0,
    refine_tokens: int = REFINE_TOKENS,
    checkpoint_seconds: float = 30.0,
    overwrite: bool = False,
    progress: bool | Callable[[Progress | None], None] = False,
    stop: Callable[[], bool] = bool,
) -> list[Trained]:
    """Train a dictionary of `model` on `data` and save it as the folder `out`; goes on from where one was interrupted.

    `layer` and `hook`, and what says how to read, are those of `itda.activations`; what says how to build, of
    `itda.build`. With a list of layers or hook points, `out` holds one folder per hook point, named for it. `preset`
    "paper" is the published code's practice: `PRESETS` where nothing else is given. `loss` is "relative", `admission`
    "sequential" and `batch_rows` 32 without it. With `candidates`, a dictionary of so many times `n_atoms` is built and
    the atoms of most use are kept (`itda.refine.select`); with `refine`, atoms are moved in so many passes
    (`itda.refine.refine`). Both are done on the first `refine_tokens` tokens, which are read again and held in memory;
    `progress` then is also called with a `Step`.

    Raises `InputError` for what cannot be read, built or saved, a folder that is not ours, a dictionary that is there
    already unless `overwrite`, and `Interrupted` when `stop` said so.
    """
    _check_improvements(n_atoms, candidates, refine, refine_tokens)
    chosen = _preset(
        preset, dict(loss=loss, admission=admission, batch_rows=batch_rows), truncate, special_tokens, padding
    )
    read: dict[str, Any] = dict(
        layer=layer, hook=hook, context_length=context_length, pack=pack, seed=seed, column=column, split=split
    )
    read |= dict(config=config, data_revision=data_revision, tokenizer=tokenizer, dtype=dtype, device=device)
    read |= {name: chosen.pop(name) for name in ("batch_rows", "truncate", "special_tokens", "padding")}
    grow: dict[str, Any] = dict(
        k=k,
        threshold=threshold,
        n_atoms=n_atoms * candidates if candidates > 1 and n_atoms else n_atoms,
        center=center,
        max_atoms=max_atoms,
        chunk_size=chunk_size,
    )
    began = time.monotonic()
    single = _is_one(layer) and _is_one(hook)
    shown = Path(out)
    out = _checked_out(out, single, overwrite)
    if read["truncate"] and str(data).lower().endswith(".txt"):
        raise InputError(
            f"`truncate` keeps the first row of each document, and {data} is one document: give a .jsonl, a .parquet "
            "or a folder of files, or leave out `truncate` (which preset 'paper' sets)."
        )
    stream = activations(model, data, tokens=tokens, revision=revision, trust_remote_code=trust_remote_code, **read)
    folders = {"": out} if single else {name: out / name for name in stream.hook_points}
    watch = _Watch(progress)
    with ExitStack() as locks:
        for target in folders.values():
            locks.enter_context(_locked(target))
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
            if refine or candidates > 1:
                keep = n_atoms if candidates > 1 else None
                models = _improved(models, stream, keep, refine, refine_tokens, watch, stop)
        except KeyboardInterrupt:
            raise Interrupted(min(map(_kept, folders.values()))) from None
        finally:
            watch.end()
        for name, dictionary in models.items():
            dictionary.save(folders[name])
        # Only now: a run that is killed between two saves goes on from its checkpoints.
        for target in folders.values():
            (target / folder.CHECKPOINT).unlink(missing_ok=True)
    return [_trained(models[name], shown / name, watch, began) for name in folders]


def _check_improvements(n_atoms: int | None, candidates: int, refine: int, refine_tokens: int) -> None:
    given = (("candidates", candidates, 1), ("refine", refine, 0), ("refine_tokens", refine_tokens, 1))
    for name, value, least in given:
        check_whole(name, value, least)
    if candidates > 1 and n_atoms is not None:
        check_whole("n_atoms", n_atoms, 1)
    if candidates > 1 and n_atoms is None:
        raise InputError(f"`candidates` is {candidates}, times as many as `n_atoms`: give that too (`--n-atoms`).")


def _improved(
    models: dict[str, ITDA],
    stream: Any,
    keep: int | None,
    passes: int,
    tokens: int,
    watch: _Watch,
    stop: Callable[[], bool],
) -> dict[str, ITDA]:
    """The dictionaries with `keep` of their atoms, moved in so many passes, to fit the first `tokens` tokens.

    These are read once more.
    """

    def report(step: Step | None) -> None:
        watch.step(step)
        if stop():
            raise KeyboardInterrupt

    tokens = min([tokens, *(int(model.cfg["tokens"]) for model in models.values())])  # nothing that was not judged
    d = sum(model.d for model in models.values())
    if (need := 4.0 * d * tokens) > 0.5 * free_bytes(torch.device("cpu")):
        raise InputError(
            f"Refining on {tokens:,} tokens holds {need / 1e9:.1f} GB of activations, more than half of what is free: "
            "choose fewer `refine_tokens` (`--refine-tokens`)."
        )
    parts: dict[str, list[Batch]] = {name: [] for name in models}
    count, began = 0, time.monotonic()
    for item in stream:
        batches = {"": item} if isinstance(item, Batch) else item
        size = min(len(next(iter(batches.values())).labels), tokens - count)
        for name, (x, labels) in batches.items():
            parts[name].append(Batch(x[:size].float().cpu(), labels[:size]))
        count += size
        report(Step("reading again", count, tokens, time.monotonic() - began))
        if count == tokens:
            break
    found = {}
    for name, model in models.items():
        x, labels = torch.cat([part.activations for part in parts[name]]), [part.labels for part in parts.pop(name)]
        how: dict[str, Any] = dict(labels=Labels.concat(labels), progress=report)
        model = select_atoms(model, x, min(keep, len(model)), **how) if keep else model
        found[name] = refine_atoms(model, x, passes=passes, **how) if passes else model
    return found


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


def _is_one(given: Any) -> bool:
    return isinstance(given, str) or not isinstance(given, Iterable)


def _checked_out(out: str | os.PathLike, single: bool, overwrite: bool) -> Path:
    """The folder to write to, after every check that needs no model."""
    if single:
        target = folder.check_writable_target(out)
        _check_targets({"": target}, overwrite)
        return target
    target = folder.check_writable_target(Path(out) / "any").parent
    if (target / folder.MANIFEST).exists():
        raise InputError(f"{target} is an ITDA, and several hook points need a folder for theirs: choose another.")
    return target


def _check_targets(folders: dict[str, Path], overwrite: bool) -> None:
    """Refuse folders that hold something else, and finished dictionaries that may not be overwritten.

    A checkpoint beside a dictionary says that the training which wrote it had not finished, so it may.
    """
    for target in folders.values():
        folder.check_writable_target(target)
    finished = [target for target in folders.values() if (target / folder.MANIFEST).is_file()]
    going_on = any((target / folder.CHECKPOINT).is_file() for target in folders.values())
    if finished and not going_on and not overwrite:
        raise InputError(
            f"{finished[0]} holds a finished ITDA already: choose another folder, or replace it with `overwrite` "
            "(`--overwrite`)."
        )


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Make the folder, and keep another process from training into it meanwhile, where the system can do that.

    It is the folder itself that is locked, so nothing is left behind; a folder that was made and not used goes again.
    """
    new = not target.is_dir()
    target.mkdir(parents=True, exist_ok=True)
    descriptor = None
    try:
        with suppress(ImportError):  # Windows
            import fcntl

            descriptor = os.open(target, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"Another process is training into {target}: wait for it to end, or choose another folder."
                ) from None
            except OSError:
                pass  # a file system without locks
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
        if new:
            with suppress(OSError):
                target.rmdir()


class _Watch:
    """Hands progress on, remembers the last, and ends the display once."""

    def __init__(self, progress: bool | Callable[[Progress | None], None]) -> None:
        self._report: Callable[[Any], None] | None = reporter(progress)
        self.last: Progress | None = None
        self._open = True

    def step(self, step: Step | None) -> None:
        """Hand on what comes after the building."""
        self._open = True
        if self._report and step is not None:
            self._report(step)

    def __call__(self, progress: Progress | None) -> None:
        if progress is None:
            self.end()
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
