"""Algorithm 1: an iterator of activations in, an ITDA out; one pass, constant memory, resumable."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from itda.devices import is_full_float32
from itda.dictionary import checkpoint as checkpoints
from itda.dictionary.builder import Builder, Content
from itda.dictionary.folder import check_writable_target
from itda.dictionary.itda import ITDA
from itda.dictionary.threshold import TRIES
from itda.errors import InputError, counted
from itda.labels import Batch, Labels
from itda.locks import locked
from itda.progress import Progress, Step, reporter
from itda.provenance import FINGERPRINT, checked_rest, identity
from itda.settings import pick, takes, verbs

# The settings of the published code, for `build(stream, **PAPER)`; its stream has padding and BOS.
PAPER = {"k": 40, "threshold": 4e-4, **{name: verbs.PRESETS["paper"][name] for name in ("loss", "admission", "center")}}


@takes(verbs.BUILD)
def build(stream: Iterable, **settings: Unpack[verbs.Build]) -> ITDA | dict[str, ITDA]:
    """Build a dictionary from a stream of activations in one pass (Algorithm 1, or "online").

    stream      iterable of `Batch` or (activations, labels), or of activations (tokens, d) alone, or one such array; or
                of dicts by hook point, which builds several dictionaries at once. `itda.activations` makes one
    k           pursuit steps
    nonneg      pursue with coefficients of zero or more alone; the dictionary encodes in this way from then on
    threshold   admit a token whose loss exceeds this; 0.2 for "relative", 4e-4 for "cosine" if nothing is given
    n_atoms     in place of a threshold: the size wished for at the end of the stream, met to 10 % by a threshold that
                is chosen on a pilot and corrected on the way (`cfg["thresholds"]`); the stream's length must be known.
                With "online", how many tokens to draw: fewer where the head of the stream has fewer directions
    loss        "relative" |x - x_hat|^2 / |x|^2; "cosine", the published code's; "squared" |x - x_hat|^2 (eq. 6)
    admission   "sequential": each token is judged by the dictionary grown from all before it, whatever the batches;
                "batch": each batch by the dictionary before it; "paper": the published code (see `PAPER`); "online":
                none is judged, `n_atoms` tokens are drawn and moved by all that come (`itda.dictionary.online`)
    center      subtract the mean of the first 8192 tokens, which the dictionary keeps, so that atoms and losses are of
                what differs from it; massive tokens, of |x| beyond 5 times the median, are left out of it
    max_norm    never admit a token whose |x| is beyond so many times the median of the first 8192 tokens, and leave it
                out of the mean and the scale; it is still encoded and measured
    scale       "std": divide each coordinate by its deviation in the first 8192 tokens, in loss and pursuit; "sqrt":
                by the square root of that; the dictionary keeps these, and decodes to the units of the stream
    max_atoms   stop when there are so many
    tokens      read so many tokens at most
    chunk_size  tokens pursued together at most; changes memory and speed, never the result
    progress    True for a bar on the terminal, or a function called with a `Progress` per batch, with a `Step` while
                the threshold for `n_atoms` is chosen, and with None at the end
    checkpoint  the folder the dictionary will be saved to (with several, the folder of their folders): progress is
                kept there every `checkpoint_seconds`, and a build that finds some goes on from it, to the same result
    stop        asked after every batch, and while a threshold is chosen; when it says True, the checkpoint is written
                and `KeyboardInterrupt` raised

    Returns an `ITDA`; from a stream of dicts, a dict of them by hook point. The result is a function of the
    activations, their order and the settings alone. Raises `InputError` for settings out of range, activations that are
    not finite (naming prompt and position), and streams without tokens.
    """
    if isinstance(stream, Tensor | np.ndarray) and stream.ndim == 2:
        stream = [stream]
    grow: dict[str, Any] = pick(verbs.Grow, settings)
    tokens, checkpoint = settings["tokens"], settings["checkpoint"]
    if grow["n_atoms"] is not None:
        grow["total"] = _length(stream, tokens)
    Builder(**grow)  # bad settings are refused before anything is read
    names, items = _peek(stream)
    builders = {name: Builder(**grow) for name in names}
    folders = {} if checkpoint is None else {name: Path(checkpoint) / _file_name(name) for name in names}
    with ExitStack() as held:
        for folder in folders.values():
            check_writable_target(folder)
            held.enter_context(locked(Path(os.path.realpath(folder)), "building into", within=True))
        return _built(stream, items, builders, folders, settings)


def _built(
    stream: Any, items: Iterator | None, builders: dict[str, Builder], folders: dict[str, Path], settings: Any
) -> ITDA | dict[str, ITDA]:
    """Go on from the checkpoints that there are, read the rest, and finish."""
    tokens, checkpoint, stop, names = settings["tokens"], settings["checkpoint"], settings["stop"], list(builders)
    start = _resume(builders, folders, stream)
    if tokens is not None and start > tokens:
        raise InputError(
            f"The unfinished training in {checkpoint} has read {counted(start, 'token')}, more than the "
            f"`tokens` = {tokens:,} "
            "given: give as many or more to go on, or another folder to start anew."
        )
    if start and hasattr(stream, "skip"):
        stream = stream.skip(start)
        hashes = {builder.stream_hash for builder in builders.values() if builder.position == start}
        items = _of_one_model(checked_rest(stream, hashes, "training"), stream, builders)
    else:
        items, start = items if items is not None else iter(stream), 0
    report = reporter(settings["progress"])
    every = settings["checkpoint_seconds"]
    read = _drive(stream, items, builders, folders, start, tokens, report, every, stop)
    provenance = _provenance(stream, names)
    for said in provenance.values():
        if "hash" in said.get("stream", {}):
            # What was read of it, which is more than was judged where another dictionary was full later.
            tokens = max(builder.position for builder in builders.values())
            documents = {"documents": stream.documents(tokens)} if hasattr(stream, "documents") else {}
            said["stream"] |= {"hash": read, "tokens": tokens, **documents}
    for name, said in provenance.items():
        if said.get("model", {}).get("fingerprint", "") is None:  # streamed, and all of it read before
            said["model"]["fingerprint"] = builders[name].fingerprint
    models = {name: builder.finish(provenance[name]) for name, builder in builders.items()}
    return models if set(models) != {""} else models[""]


def _drive(stream, items, builders, folders, start, tokens, report, checkpoint_seconds, stop) -> str | None:
    """Feed the builders from the stream, report, and keep checkpoints; the hash of what was read of the stream."""
    began = saved = time.monotonic()
    total = tokens if tokens is not None else getattr(stream, "tokens", None)
    position = start
    read, kept = getattr(stream, "hash", None), start
    for name, builder in builders.items():
        builder.tell = _teller(report, stop, name or (getattr(stream, "hook_points", ()) or [""])[0])
    patience = min(max(1.0, checkpoint_seconds), threading.TIMEOUT_MAX)
    for item, hashed in _ahead(stream, items, patience):
        if item is None:  # it takes its time, as a model that is streamed does before its first
            if folders and position > kept:
                _save(stream, read, builders, folders, position)
                kept, saved = position, time.monotonic()
            if stop():
                raise KeyboardInterrupt
            continue
        read = hashed
        batches = _batches(item, position)
        there = _size(batches, builders)
        size = there if tokens is None else min(there, tokens - position)
        atoms = sum(map(len, builders.values()))
        try:
            _give(batches, builders, position, size)
        except _Stopped:
            _save(stream, read, builders, folders, position + size)
            raise
        position += size
        now = time.monotonic()
        report(_progress(builders, _likely(stream, total), position, size, atoms, now - began, start))
        stopping = stop()
        if folders and (stopping or now - saved > checkpoint_seconds):
            _save(stream, read, builders, folders, position)
            kept, saved = position, time.monotonic()
        if stopping:
            raise KeyboardInterrupt
        if position == tokens or all(builder.full for builder in builders.values()):
            break
    else:
        read = getattr(stream, "hash", None)
        ahead = max(builder.position for builder in builders.values())
        if position < ahead:
            raise InputError(
                f"The stream ends after {counted(position, 'token')}, and the unfinished build has read "
                f"{ahead:,}: give the "
                "same activations to go on, or another folder to start anew."
            )
    try:
        waited = _settled(builders)
    except _Stopped:
        _save(stream, read, builders, folders, position)
        raise
    if waited:
        seconds = time.monotonic() - began
        report(_progress(builders, _likely(stream, total), position, position, 0, seconds, start))
    _save(stream, read, builders, folders, position)  # what comes next, and saving one by one, may be killed too
    report(None)
    return read


class _Stopped(KeyboardInterrupt):
    """A builder was stopped while it chose a threshold, in the state of a whole number of batches."""


def _give(batches: dict[str, Batch], builders: dict[str, Builder], position: int, size: int) -> None:
    """The first `size` tokens of an item, which begins at `position`, to every builder."""
    for name, (activations, labels) in batches.items():
        skipped = min(size, max(0, builders[name].position - position))  # its checkpoint may be ahead of the others
        if skipped:
            builders[name].pass_over(activations[:skipped])
        if skipped < size:
            builders[name].update(activations[skipped:size], labels[skipped:size])


def _progress(
    builders: dict[str, Builder], total: int | None, position: int, size: int, before: int, seconds: float, start: int
) -> Progress:
    """Where a build is after `size` more tokens, at the start of which there were `before` atoms."""
    atoms, settled = sum(map(len, builders.values())), max(builder.settled for builder in builders.values())
    return Progress(position, total, atoms, (atoms - before) / max(1, size * len(builders)), seconds, start, settled)


def _likely(stream: Any, total: int | None) -> int | None:
    """How many tokens will be read: no more than `total`, and as many as the stream says it has."""
    return min((n for n in (total, getattr(stream, "expected", None)) if n is not None), default=None)


def _teller(report: Callable[[Any], None], stop: Callable[[], bool], name: Any) -> Callable[[int], None]:
    """What a builder calls while it chooses a threshold; `name` is its hook point, "" if that is not known."""
    what, began = f"choosing a threshold for {name}" if name else "choosing a threshold", 0.0

    def tell(tried: int) -> None:
        nonlocal began
        began = began if tried else time.monotonic()  # of several builders, one begins after the other
        report(Step(what, tried, TRIES, time.monotonic() - began))
        if stop():
            raise _Stopped

    return tell


def _settled(builders: dict[str, Builder]) -> bool:
    """Judge what waits for more tokens, of which none will come; whether anything did."""
    waited = not all(builder.started for builder in builders.values())
    for builder in builders.values():
        builder.settle()
    return waited


def _ahead(stream: Any, items: Iterator, patience: float) -> Iterator[tuple[Any, str | None]]:
    """Every item with the stream's hash as of it; of a model, the next is read while the last is used.

    While the next one takes longer than `patience` seconds, (None, None) comes instead.

    Only where the stream is the library's own, since others may not expect another thread, nor to be asked for more;
    and where no setting of the caller's would make a difference in that thread.
    """
    plain = is_full_float32() and not torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda")
    if not (plain and hasattr(stream, "hook_points")):
        yield from ((item, getattr(stream, "hash", None)) for item in items)
        return
    end = object()
    with ThreadPoolExecutor(1, "itda-reading") as thread:  # which waits for what is being read when it is left

        def read() -> tuple[Any, str | None]:
            return next(items, end), stream.hash

        reading = thread.submit(read)
        while True:
            if not wait([reading], patience).done:
                yield None, None
                continue
            result = reading.result()
            if result[0] is end:
                return
            reading = thread.submit(read)
            yield result


def _peek(stream: Any) -> tuple[list[str], Iterator | None]:
    """The names of the dictionaries to build ("" for the only one); and the iterator, if it had to be started."""
    if hasattr(stream, "hook_points"):
        return [""] if stream.single else list(stream.hook_points), None
    if not isinstance(stream, Iterable) or getattr(stream, "ndim", None) == 0:
        single = " of a single number" if isinstance(stream, Iterable) else ""
        raise InputError(f"The stream is of type {type(stream).__name__}{single}: pass an iterable of activations.")
    items = iter(stream)
    first = next(items, None)
    if first is None or (isinstance(first, Mapping) and not first):
        raise InputError("The stream is empty, so there is nothing to build on: give it some activations.")
    return list(first) if isinstance(first, Mapping) else [""], itertools.chain([first], items)


def _batches(item, position: int) -> dict[str, Batch]:
    if isinstance(item, Mapping):
        return {name: _batches(part, position)[""] for name, part in item.items()}
    pair = isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Labels)
    shape: Any = getattr(item[0] if pair else item, "shape", ())
    if not len(shape):
        raise InputError(
            f"An item of the stream is of type {type(item).__name__}: pass activations (tokens, d), a pair of them and "
            "their labels, or a dict of these by hook point."
        )
    if pair and len(item[1]) != shape[0]:  # before both are cut to the tokens that are wanted
        raise InputError(
            f"A batch has {counted(shape[0], 'activation')} but {counted(len(item[1]), 'label')}: pass one for each."
        )
    return {"": Batch(*item) if pair else Batch(item, Labels.counted(position, shape[0]))}


def _file_name(name: Any) -> str:
    """A hook point of the stream, which becomes the name of a folder, if it can."""
    if not isinstance(name, str) or set(name) & set("/\\\0") or name in (".", ".."):
        raise InputError(
            f"The stream has a hook point {name!r}, and with a `checkpoint` each has a folder of its name: give it a "
            "name without slashes."
        )
    return name


def _size(batches: dict[str, Batch], names: Iterable[str]) -> int:
    """How many tokens an item of the stream has, the same at every one of the hook points `names`."""
    sizes = {name: len(batch.activations) for name, batch in batches.items()}
    if sizes.keys() != set(names) or len(set(sizes.values())) != 1:
        raise InputError(
            f"An item of the stream has {sizes or 'no'} tokens by hook point: pass as many at each of {list(names)}."
        )
    return next(iter(sizes.values()))


def _length(stream: Any, tokens: int | None) -> int | None:
    """How many tokens will be read, as far as it can be known before reading."""
    if hasattr(stream, "count_tokens"):
        known = stream.count_tokens(tokens)
    elif isinstance(stream, list | tuple):
        known = sum(len(_batches(item, 0).popitem()[1].activations) for item in stream)
    else:
        known = None
    return min((n for n in (known, tokens) if n is not None), default=None)


def _resume(builders: dict[str, Builder], folders: dict[str, Path], stream: Any) -> int:
    """Restore what checkpoints there are; how many tokens of the stream every builder has had."""
    identity = _identity(stream, builders)
    for name, folder in folders.items():
        if not hasattr(stream, "hash"):
            builders[name].content = Content()
        checkpoints.restore(builders[name], folder, identity[name])
    return min(builder.position for builder in builders.values())


def _of_one_model(items: Iterator, stream: Any, builders: dict[str, Builder]) -> Iterator:
    """The items of a stream whose model is the one that the checkpoints had; one that is streamed says so late."""
    for item in items:
        for name, said in _identity(stream, builders).items():
            if builders[name].fingerprint not in (None, said.get(FINGERPRINT)):
                raise InputError(
                    "The weights of the model have changed since this training began: restore them to go on, or give "
                    "another folder to start anew."
                )
        yield item
        break
    yield from items


def _save(stream: Any, read: str | None, builders: dict[str, Builder], folders: dict[str, Path], position: int) -> None:
    """Keep the state of every builder that has had just the first `position` tokens of the stream, hashed as `read`.

    One that is ahead, since its checkpoint was, has not been compared with the stream yet: its checkpoint stays.
    """
    identity = _identity(stream, builders) if folders else {}
    for name, folder in folders.items():
        if builders[name].position != position:
            continue
        builders[name].stream_hash = read
        if identity[name].get(FINGERPRINT, "") is None:  # streamed, and nothing read since it was restored
            identity[name][FINGERPRINT] = builders[name].fingerprint
        checkpoints.save(builders[name], folder, identity[name])


def _identity(stream: Any, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What must be equal for a build to go on: provenance, less what changes on the way."""
    out = {}
    for name, provenance in _provenance(stream, names).items():
        out[name] = identity(provenance)
    return out


def _provenance(stream: Any, names: Iterable[str]) -> dict[str, dict]:
    """What the stream says of itself, per dictionary."""
    provenance = getattr(stream, "provenance", {})
    return {name: provenance.get(name, {}) if name else provenance for name in names}
