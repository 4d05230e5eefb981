"""Activations from a model to disk: everything that `itda collect` does is `collect`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import torch

from itda.arguments import PATH, checks, listed
from itda.disk import DTYPES, as_input_error, checked_path, write_file
from itda.errors import InputError, Interrupted, counted
from itda.labels import Batch
from itda.locks import locked
from itda.models.streamed_model import StreamedModel
from itda.progress import Step, reporter
from itda.provenance import FINGERPRINT, checked_rest, differing, identity, said_of
from itda.pursuit import check_entries
from itda.reading import shards, store
from itda.reading.activations import activations
from itda.reading.on_disk import is_stored
from itda.reading.store import JOURNAL, MANIFEST, Contents
from itda.results import Report, text_read
from itda.settings import groups, takes, verbs

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES if dtype.is_floating_point}
SHARD_BYTES = 1 << 27  # of activations; a shard ends with the batch that reaches it


@dataclass(frozen=True)
class Collected(Report):
    """What `collect` wrote, and what it cost."""

    path: str
    hook_points: list[str]
    tokens: int  # in all
    new: int  # of them, those of this call
    shards: int
    bytes: int  # of activations
    hash: str  # of the stream
    files: int | None  # of text that were read; None of what is no local file
    documents: int | None  # that the tokens are of; None where nothing was left to read
    unread: dict[str, int]  # files in the folder of the text that were not read, by what they end in
    seconds: float
    tokens_per_second: float | None  # None if nothing was left to read

    def __str__(self) -> str:
        speed = f", {self.tokens_per_second:,.0f} tokens/s" if self.tokens_per_second else ""
        return (
            f"{self.path}: {counted(self.tokens, 'token')} ({self.new:,} of them new) at "
            f"{', '.join(self.hook_points)}, "
            f"{self.bytes / 1e6:,.1f} MB in {counted(self.shards, 'shard')}, in {self.seconds:.1f} s{speed}"
            + (f"\n{read}" if (read := text_read(vars(self))) else "")
        )


@takes(verbs.COLLECT)
@checks(out=PATH)
def collect(model: Any, data: Any, out: str | os.PathLike, **settings: Unpack[verbs.Collect]) -> Collected:
    """Write the activations of `model` on `data`, with their labels, to the folder `out`, for `itda.Store` to read.

    `layer`, `hook` and what says how to read are those of `itda.activations`, and so are the activations, in the
    model's dtype. A
    call that was interrupted goes on after the last whole shard with the same call, to the same files; one that was
    not, with more `tokens`, adds to what is there, which stays readable meanwhile. `overwrite` starts anew where there
    is something else. Raises `InputError` for what cannot be read or written, a folder with anything else in it, other
    settings or text than before, and a full disk; `Interrupted` when `stop` said so.
    """
    reading: dict[str, Any] = {**settings}
    overwrite, report, stop = (reading.pop(name) for name in ("overwrite", "progress", "stop"))
    report = reporter(report)
    tokens = reading["tokens"]
    began = time.monotonic()
    target = _checked_out(out)
    for name in groups.Places.__annotations__:
        reading[name] = None if reading[name] is None else listed(reading[name])
    if reading["layer"] is None and reading["hook"] is None and is_stored(data):  # all that is there, in our format
        reading["hook"] = list(activations(model, data).hook_points)
    stream: Any = activations(model, data, **reading)
    if is_stored(data) and os.path.realpath(stream.path) == str(target):
        raise InputError(f"{target} is what would be read, and cannot be written to: choose another folder for `out`.")
    if isinstance(reader := getattr(stream, "model", None), StreamedModel):
        reader.stop, reader.report = stop, report
    with locked(target, "collecting into"), Writer(target) as writer:
        try:
            writer.open(stream, overwrite)
            start = writer.contents.tokens
            if tokens is not None and start > tokens:
                raise InputError(
                    f"{target} has {counted(start, 'token')} already, more than the `tokens` = {tokens:,} "
                    "given: give as many "
                    "or more, or another folder."
                )
            documents = None
            if start != tokens:
                documents = _read(stream, writer, tokens, report, stop)
            writer.finish()
        except KeyboardInterrupt:
            writer.settle()
            raise Interrupted(writer.contents.tokens) from None
        finally:
            report(None)
    contents, seconds = writer.contents, time.monotonic() - began
    text = next(iter(contents.provenance.values()))["stream"]
    new = contents.tokens - start
    return Collected(
        path=str(out),
        hook_points=list(contents.places),
        tokens=contents.tokens,
        new=new,
        shards=len(contents.shards),
        bytes=contents.tokens * sum(dtype.itemsize * d for dtype, d in contents.places.values()),
        hash=contents.hash,
        files=text.get("files"),
        documents=documents,
        unread=text.get("unread") or {},
        seconds=round(seconds, 3),
        tokens_per_second=round(new / seconds, 1) if new else None,
    )


def _read(stream: Any, writer: Writer, tokens: int | None, report: Callable, stop: Callable[[], bool]) -> int | None:
    """Hand what is left of the stream to the writer; of how many documents it then is, as far as that is known."""
    done = start = writer.contents.tokens
    rest = stream.skip(start) if start else stream
    before = writer.contents.shards[-1].batches[-1][1] if start else None
    began = time.monotonic()
    for item in checked_rest(rest, {before}, "collecting") if start else rest:
        writer.add(item, rest.hash)
        done += len(next(iter(item.values())).labels)
        seconds = (time.monotonic() - began) * done / (done - start)  # as if all of it had been read at this speed
        total = min((n for n in (tokens, getattr(rest, "expected", None)) if n is not None), default=None)
        report(Step("collecting", done, total, seconds))
        if stop():
            raise KeyboardInterrupt
    if not done:
        raise InputError("The text holds no valid token, so there is nothing to collect: give it more text.")
    writer.flush()
    writer.contents = replace(writer.contents, ended=tokens is None or done < tokens, hash=rest.hash)
    return rest.documents(done) if hasattr(rest, "documents") else None


def _checked_out(out: str | os.PathLike) -> Path:
    """The folder to write to, links resolved, after every check that needs no model."""
    target = Path(os.path.realpath(checked_path(out)))
    with as_input_error(f"{target} could not be used", "choose another place"):
        if os.path.lexists(target) and not target.is_dir():
            raise InputError(f"{target} is a file, and activations are kept in a folder: choose another path.")
        if (name := store.foreign(target)) is not None:
            raise InputError(
                f"{target} holds {name!r}, which is no part of activations on disk, so nothing was written: choose a "
                "new or empty folder."
            )
    return target


class Writer:
    """Adds shards to a folder: a batch at a time, a shard being written while the next is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.contents = Contents({}, None, {})
        self._held: list[tuple[Mapping[str, Batch], str]] = []
        self._bytes = 0
        self._stream: Any = None
        self._thread = ThreadPoolExecutor(1, "itda-writing")
        self._writing: Future | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: Any) -> None:
        self._thread.shutdown()

    def open(self, stream: Any, overwrite: bool) -> None:
        """Find out what is there, and whether it can be added to."""
        for name in os.listdir(self.folder):
            if store.is_leftover(self.folder / name):
                with suppress(OSError):
                    (self.folder / name).unlink()
        if odd := [hook for hook in stream.hook_points if not store.HOOK_NAME.fullmatch(hook)]:
            raise InputError(
                f"A store has no place for {odd[0]!a}: choose hook points of letters, digits, `_` and dots."
            )
        self._stream, said = stream, _said(stream)
        places = {
            hook: (_DTYPES.get(own["model"]["dtype"], torch.float32), own["model"]["d"]) for hook, own in said.items()
        }
        n_layers = getattr(getattr(stream, "model", stream), "n_layers", None)
        new = Contents(said, n_layers, places)
        manifest, journal = (self.folder / name for name in (MANIFEST, JOURNAL))
        there = next((path for path in (journal, manifest) if path.is_file()), None)
        if there is None:
            self.begin(new)
            return
        anew = overwrite and manifest.is_file()
        differs = None
        if not anew:
            try:
                old = store.read_contents(there)
                differs = _difference(old, new)
            except InputError:
                if not overwrite:
                    raise
                anew = True
        if differs and not overwrite:
            raise InputError(
                f"{self.folder} was collected with {said_of(*differs)}, another folder, or `overwrite` (`--overwrite`)."
            )
        if anew or differs:
            self.begin(new)
            return
        for number, shard in enumerate(old.shards):
            shards.check_files(self.folder, number, shard, old.places)
        self.contents = old

    def begin(self, contents: Contents) -> None:
        """Start with nothing, in a folder that may have a store: its manifest goes before what it names."""
        self.contents = contents
        self._keep(JOURNAL)
        with as_input_error(f"{self.folder} could not be emptied", "choose another folder"):
            (self.folder / MANIFEST).unlink(missing_ok=True)
            for name in os.listdir(self.folder):
                if store.OUR_FILES.fullmatch(name):
                    (self.folder / name).unlink()

    def _keep(self, name: str) -> None:
        write_file(self.folder / name, [self.contents.to_bytes()], self._advice())

    def _advice(self) -> str:
        tokens = self.contents.tokens
        return f"choose another place; the same command goes on after {counted(tokens, 'token')}"

    def add(self, item: Mapping[str, Batch], read: str) -> None:
        """Take a batch, and the stream's hash as of it; `InputError` for activations that no dictionary can take."""
        for batch in item.values():
            check_entries(batch.activations, batch.labels)
        item = {hook: Batch(batch.activations.cpu(), batch.labels) for hook, batch in item.items()}
        self._held.append((item, read))
        self._bytes += sum(batch.activations.nbytes for batch in item.values())
        if self._bytes >= SHARD_BYTES:
            self.flush(wait=False)

    def flush(self, wait: bool = True) -> None:
        """Write what is held as a shard; the one before it has been written when this returns, and with `wait` it."""
        self._settle()
        if self._held:
            self._identify()
            self._writing = self._thread.submit(self._write, self._held)
            self._held, self._bytes = [], 0
        if wait:
            self._settle()

    def _identify(self) -> None:
        """Take down which weights were read, which a model that is streamed says only now."""
        said = _said(self._stream) if self._stream is not None else {}
        if any(_differ(self.contents.provenance[hook], own) == FINGERPRINT for hook, own in said.items()):
            raise InputError(
                f"The weights of the model have changed since {self.folder} was begun: restore them to go on, or give "
                "another folder to start anew."
            )
        known = {hook: own for hook, own in said.items() if own["model"].get("fingerprint") is not None}
        self.contents = replace(self.contents, provenance=self.contents.provenance | known)

    def _write(self, batches: list) -> None:
        advice, number = self._advice(), len(self.contents.shards)
        read = {hook: (batch.activations.dtype, batch.activations.shape[1]) for hook, batch in batches[0][0].items()}
        if not number:  # a module may compute in another dtype than its model
            self.contents = replace(self.contents, places=read)
        shard = shards.write(self.folder, number, batches, self.contents.places, advice)
        self.contents = replace(self.contents, shards=[*self.contents.shards, shard], hash=batches[-1][1], ended=False)
        self._keep(JOURNAL)

    def _settle(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def settle(self) -> None:
        """Wait for what is being written; whatever becomes of it was not asked for any more."""
        with suppress(InputError):
            self._settle()

    def finish(self) -> None:
        """Write the manifest, last."""
        path = self.folder / MANIFEST
        if not path.is_file() or path.read_bytes() != self.contents.to_bytes():
            self._keep(MANIFEST)
        (self.folder / JOURNAL).unlink(missing_ok=True)


def _difference(old: Contents, new: Contents) -> tuple[str, Any, Any] | None:
    """The first setting that is not what it was, and both."""
    if list(old.places) != list(new.places):
        return "hook points", list(old.places), list(new.places)
    for hook in old.places:
        was, now = old.provenance[hook], new.provenance[hook]
        if (name := _differ(was, now)) is not None:
            return name, identity(was).get(name), identity(now).get(name)
    return None


def _differ(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """What two provenances do not agree on; weights that are not known yet agree with any."""
    was, now = identity(old), identity(new)
    name = differing(was, now)
    return None if name == FINGERPRINT and None in (was.get(name), now.get(name)) else name


def _said(stream: Any) -> dict[str, dict]:
    """A stream's provenance as JSON has it, without the hash."""
    every = json.loads(json.dumps(stream.provenance))
    for said in every.values():
        said["stream"].pop("hash", None)
    return every
