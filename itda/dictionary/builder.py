"""One dictionary being built: what it has seen, and what is still needed before the first token can be judged."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from itda._version import __version__
from itda.dictionary.admission import Batched, Sequential
from itda.dictionary.itda import ITDA, measured
from itda.dictionary.online import HEAD, Online
from itda.dictionary.sample import SpacedSample
from itda.dictionary.standard import Massive, estimated, within
from itda.dictionary.threshold import QUIET, Schedule, pilot, pilot_tokens
from itda.disk import bytes_of
from itda.errors import InputError, counted, shortened
from itda.labels import Batch, Labels
from itda.pursuit import MOST_STEPS, as_tensor, check_entries, too_large
from itda.settings import takes, verbs

MEAN_TOKENS = 8192  # the fixed prefix of the stream on which `center=True` estimates the mean
DEFAULT_THRESHOLD = {"relative": 0.2, "cosine": 4e-4}
SETTINGS = ("k", "nonneg", "loss", "admission", "center", "max_atoms", "threshold", "n_atoms")


class Builder:
    """One dictionary being built: `update` with batches in stream order, then `finish`.

    Between two calls its state is that of a whole number of batches, which `checkpoint.save` writes and
    `checkpoint.restore` brings back.
    """

    @takes(verbs.GROW)
    def __init__(
        self, *, total: int | None = None, max_gram_bytes: int | float | None = None, **grow: Unpack[verbs.Grow]
    ) -> None:
        grow["admission"] = grow["admission"] or "sequential"
        _check_together(grow)
        n_atoms, loss, threshold = grow["n_atoms"], grow["loss"], grow["threshold"]
        if n_atoms is not None and total is None and grow["admission"] == "sequential":
            raise InputError("`n_atoms` needs to know how long the stream is: give `tokens`, or a `threshold` instead.")
        if n_atoms is not None and total is not None and n_atoms > total:
            raise InputError(
                f"`n_atoms` is {n_atoms:,} but the stream has {counted(total, 'token')}, and an atom is one token: "
                "ask for fewer atoms or give more text."
            )
        given: dict[str, Any] = dict(grow)
        self.settings: dict[str, Any] = {name: given[name] for name in SETTINGS}
        # Those that say nothing where they are not given: dictionaries and checkpoints without them stay as they were.
        self.settings |= {name: given[name] for name in ("max_norm", "scale") if given[name] not in (None, "none")}
        self.settings["total"] = total
        self.chunk_size, self.max_gram_bytes = grow["chunk_size"], max_gram_bytes
        self.total = total or 0
        self.position = 0  # tokens of the stream that were given to `update`
        self.seen = 0  # of them, those judged: not those that came when it was full
        self.stream_hash: str | None = None  # of the rows up to `position`, when a checkpoint was last written
        self.fingerprint: str | None = None  # of the model that the checkpoint it goes on from had
        self.content: Content | None = None  # of the activations, where the stream does not say what it reads
        self.content_hash: str | None = None  # of those that the checkpoint it goes on from had
        self.labels: list[Labels] = []
        self.mean: Tensor | None = None
        self.scale: Tensor | None = None
        self.massive: Massive | None = None
        self._dictionary: Sequential | Batched | Online | None = None
        self.sample = SpacedSample()
        self.head: list[Batch] = []  # what waits for the first token to be judged
        self.tell: Callable[[int], None] = QUIET  # called while a threshold is chosen
        # Without a threshold, `_start` chooses one.
        self.schedule = Schedule([[0, DEFAULT_THRESHOLD.get(loss, math.nan) if threshold is None else threshold]])

    @property
    def dictionary(self) -> Sequential | Batched | Online:
        """The dictionary, once `started`."""
        assert self._dictionary is not None, "not started"
        return self._dictionary

    @property
    def started(self) -> bool:
        """Whether all that must be known before the first token is judged is known."""
        return self._dictionary is not None

    @property
    def full(self) -> bool:
        """Whether `max_atoms` is reached, so that nothing further can change the dictionary."""
        return len(self) >= (self.settings["max_atoms"] or math.inf)

    def __len__(self) -> int:
        return len(self.dictionary) if self.started else 0

    def update(self, activations: Tensor | np.ndarray, labels: Labels) -> None:
        """Take the next batch: activations (tokens, d) and one label each."""
        activations = _checked(activations, labels, self._d())
        if self.content is not None:
            self.content.add(activations)
        self.position += len(activations)
        if self._head_wanted():
            self.head.append(Batch(activations.clone(), labels))  # the stream may use its memory again
            if sum(len(batch.activations) for batch in self.head) >= self._head_wanted():
                self._start()
        elif len(activations):
            self._judge(Batch(activations, labels))

    def pass_over(self, activations: Tensor | np.ndarray) -> None:
        """Compare the next of the activations that a checkpoint had with those it was written for."""
        if self.content is None:
            return
        if (x := as_tensor(activations)) is not None:
            self.content.add(x)
        if self.content.tokens >= self.position and self.content.hash() != self.content_hash:
            raise InputError(
                f"The activations have changed in their first {counted(self.position, 'token')} since this "
                f"build began: give "
                "the same ones to go on, or another folder to start anew."
            )

    def settle(self) -> None:
        """Judge what waited for more to estimate the mean or the threshold from: the stream has ended."""
        if self.head:
            self._start()

    def finish(self, provenance: Mapping[str, Any] | None = None) -> ITDA:
        """The dictionary of all tokens seen. `provenance` goes into its `cfg` ("model", "stream")."""
        self.settle()
        if not self.started or not self.seen:
            raise InputError("The stream held no valid token, so there is nothing to build on: give it more text.")
        atoms = self.dictionary.finished().clone().cpu()
        cfg = self.settings | {
            "threshold": self.schedule.threshold,
            "thresholds": self.schedule.history,
            "n_atoms_wanted": self.settings["n_atoms"],
            "tokens": self.seen,
            "itda_version": __version__,
        }
        del cfg["n_atoms"], cfg["total"]
        moved = None
        if isinstance(self.dictionary, Online):
            cfg |= {"threshold": None, "thresholds": []}
            moved = (atoms.double() * self.dictionary.start.cpu().double()).sum(1).float()
        if self.massive is not None:
            cfg["massive"] = self.massive.to_json()
        labels = Labels.concat(self.labels)
        found = (self.dictionary.norms, self.dictionary.losses)
        norms, losses = (torch.tensor(values, dtype=torch.float32, device="cpu") for values in found)
        model = ITDA(atoms, labels, self.settings["k"], self.mean, norms, losses, cfg | dict(provenance or {}))
        x, tokens = self.sample.tokens()
        model = replace(model, scale=self.scale, moved=moved)
        return measured(model.named(x, tokens), x, tokens)

    @property
    def settled(self) -> float:
        """Share of all decisions, which atom and whether to admit, that was taken in float64.

        It varies a little with chunks, threads and interruptions, as the dictionary does not, so it is no part of it.
        """
        if not self.seen:
            return 0.0
        counts = self.dictionary
        return (counts.settled + counts.replayed) / (counts.choices + self.seen)

    def _d(self) -> int | None:
        if self.started:
            return self.dictionary.d
        return self.head[0].activations.shape[1] if self.head else None

    def _head_wanted(self) -> int:
        """How many tokens must be at hand before the first can be judged; 0 once they were."""
        if self.started:
            return 0
        wanted = MEAN_TOKENS if any(self.settings.get(name) for name in ("center", "max_norm", "scale")) else 1
        if self.settings["admission"] == "online":
            return max(wanted, HEAD * self.settings["n_atoms"])
        return max(wanted, pilot_tokens(self.total)) if self.settings["n_atoms"] else wanted

    def _start(self) -> None:
        """Estimate the mean, choose the threshold, and judge the tokens that waited for both.

        While a threshold is chosen it may be interrupted, and nothing has changed then.
        """
        device = self.head[-1].activations.device  # that of a checkpoint is on the CPU
        head = [Batch(batch.activations.to(device), batch.labels) for batch in self.head]
        x = torch.cat([batch.activations for batch in head])
        if not len(x):
            self.head = []
            return
        how: dict[str, Any] = {name: self.settings.get(name) for name in ("center", "scale", "max_norm")}
        if any(how.values()):
            self.mean, self.scale, self.massive = estimated(x[:MEAN_TOKENS], **how)
        if self.settings["n_atoms"] and self.settings["admission"] == "sequential":
            self._choose(x[: pilot_tokens(self.total)])
        first = slice(self._head_wanted())  # however long the batches
        self.head = []
        self.prepare(x.shape[1], x.device)
        if isinstance(self.dictionary, Online):
            self._draw(self.dictionary, x[first], Labels.concat(batch.labels for batch in head)[first])
        for batch in head:
            self._judge(batch)

    def prepare(self, d: int, device: torch.device | str) -> None:
        """Make the empty dictionary."""
        if self.settings["admission"] == "online":
            self._dictionary = Online(d, self.settings["k"], device, self.settings["nonneg"])
            return
        shared = dict(max_gram_bytes=self.max_gram_bytes)
        args = (d, self.settings["k"], self.settings["loss"], device)
        shared["nonneg"] = self.settings["nonneg"]
        if self.settings["admission"] == "sequential":
            self._dictionary = Sequential(*args, chunk_size=self.chunk_size, **shared)
        else:
            self._dictionary = Batched(*args, paper=self.settings["admission"] == "paper", **shared)

    def _draw(self, dictionary: Online, x: Tensor, labels: Labels) -> None:
        """Draw the atoms to begin with from the first tokens."""
        kept = self._kept(x)
        kept = np.arange(len(x)) if kept is None else kept
        inner = self._standardised(x[torch.from_numpy(kept).to(x.device)])
        self.labels.append(labels[kept[dictionary.draw(inner, self.settings["n_atoms"])]])
        if not len(dictionary):
            raise InputError(
                f"The first {counted(len(x), 'activation')} came as zero, so none can be an atom: give others."
            )

    def _choose(self, x: Tensor) -> None:
        """Choose the threshold for the wished number of atoms, from the first tokens."""
        wish, k, loss, nonneg = (self.settings[name] for name in ("n_atoms", "k", "loss", "nonneg"))
        total, kept = max(self.total, 1), self._kept(x)
        if kept is None:
            self.schedule = pilot(self._standardised(x), wish, total, k, loss, nonneg, self.tell)
        else:  # of the stream such a share is judged; milestones count all of it
            some = self._standardised(x)[torch.from_numpy(kept).to(x.device)]
            found = pilot(some, wish, max(1, round(total * len(kept) / len(x))), k, loss, nonneg, self.tell)
            self.schedule = replace(found, total=total, milestone=len(x))

    def _standardised(self, x: Tensor) -> Tensor:
        x = x.float()
        x = x if self.mean is None else x - self.mean.to(x.device)
        if self.scale is None:
            return x
        x = x / self.scale.to(x.device)
        if (where := too_large(x)) is not None:
            raise InputError(
                f"Coordinate {where[1]} of an activation is {x[where].item():.3g} deviations from its mean, more than "
                "can be computed with: leave out `scale`, or drop that token."
            )
        return x

    def _kept(self, x: Tensor) -> np.ndarray | None:
        """The tokens that may be admitted; None for all, unless some are too large."""
        if self.massive is None or self.massive.left_out is None:
            return None
        kept = within(x, self.massive.norm)
        return None if len(kept) == len(x) else kept

    def _judge(self, batch: Batch) -> None:
        x, seen, admitted = self._standardised(batch.activations), self.seen, []
        if self.dictionary.device != x.device:  # a checkpoint is read on the CPU
            self.dictionary.to(x.device)
        start, kept = 0, self._kept(batch.activations)
        while start < len(x) and not self.full:
            ahead = self.schedule.until(seen + start)
            stop = len(x) if ahead is None else min(len(x), start + ahead)
            rows, losses = self._judge_some(x, start, stop, kept)
            if self.full:  # what comes after the last admission was not judged, however long the batch
                stop = max(rows) + 1
            admitted += rows
            self.schedule.losses += losses.tolist()
            self.schedule.advance(seen + stop, len(self))
            start = stop
        if kept is not None and self.massive is not None:
            self.massive.left_out = (self.massive.left_out or 0) + start - int(np.searchsorted(kept, start))
        self.sample.add(batch, start, seen)
        self.labels.append(batch.labels[np.array(admitted, np.int64)])
        self.seen = seen + start

    def _judge_some(self, x: Tensor, start: int, stop: int, kept: np.ndarray | None) -> tuple[list[int], np.ndarray]:
        """Judge those of the tokens from `start` to `stop` that are `kept`; which became atoms, and losses to watch.

        A token that is left out has loss 0, as one that is never admitted.
        """
        room = (self.settings["max_atoms"] or math.inf) - len(self)
        watch, threshold = self.schedule.watch(self.seen + start, stop - start), self.schedule.threshold
        if kept is None:
            rows, losses = self.dictionary.judge(x[start:stop], threshold, room, watch)
            return [start + row for row in rows], losses
        there = kept[slice(*np.searchsorted(kept, (start, stop)))]
        known = None if watch is None else np.isin(start + watch, there)
        losses = np.zeros(0 if watch is None else len(watch))
        if not len(there):
            return [], losses
        some = None if watch is None else np.searchsorted(there, start + watch[known])
        rows, found = self.dictionary.judge(x[torch.from_numpy(there).to(x.device)], threshold, room, some)
        if known is not None:  # fewer where the dictionary was full before the last
            losses[np.flatnonzero(known)[: len(found)]] = found
        return there[rows].tolist(), losses


class Content:
    """A running sha256 of activations, by which a build that goes on knows that they are those it began with."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self.tokens = 0

    def add(self, activations: Tensor) -> None:
        """Take the next of them."""
        self._digest.update(bytes_of(activations.cpu().contiguous()))
        self.tokens += len(activations)

    def hash(self) -> str:
        """The sha256 of all so far."""
        return self._digest.hexdigest()


def _checked(activations, labels: Labels, d: int | None) -> Tensor:
    """One batch as a float tensor (tokens, d), or an `InputError` that says what is wrong with it."""
    x = as_tensor(activations)
    if x is None or x.ndim != 2 or (len(x) and not x.shape[1]):
        kind = type(activations).__name__
        shape = f"{activations.dtype} of shape {tuple(activations.shape)}" if hasattr(activations, "shape") else kind
        raise InputError(f"A batch of activations is {shape}: pass a floating-point tensor (tokens, d).")
    if d is not None and x.shape[1] != d:
        raise InputError(
            f"A batch of activations has shape {tuple(x.shape)}, but those before it had d = {d}: pass those of one "
            "hook point."
        )
    if len(labels) != len(x):
        raise InputError(
            f"A batch has {counted(len(x), 'activation')} but {counted(len(labels), 'label')}: pass one for each."
        )
    check_entries(x, labels)
    return x.detach().cpu() if x.device.type == "mps" else x.detach()  # MPS has no float64


def _check_together(grow: Mapping[str, Any]) -> None:
    """Raise `InputError` for settings that do not go together, each of them being right by itself."""
    k, threshold, n_atoms, loss = (grow[name] for name in ("k", "threshold", "n_atoms", "loss"))
    if k > MOST_STEPS:
        raise InputError(f"`k` is {shortened(k)}: pass at most {MOST_STEPS:,} pursuit steps.")
    if threshold is not None and n_atoms is not None:
        raise InputError(f"Both `threshold` ({threshold}) and `n_atoms` ({n_atoms}) were given: choose one of them.")
    if n_atoms is not None and (admission := grow["admission"]) not in ("sequential", "online"):
        raise InputError(
            f"`n_atoms` works with admission 'online' and 'sequential', not {admission!r}: give a `threshold`, and "
            "`max_atoms`."
        )
    if grow["admission"] == "online":
        _check_online(grow)
    elif threshold is None and n_atoms is None and loss not in DEFAULT_THRESHOLD:
        raise InputError(f"Loss {loss!r} has the units of the activations and no default: give a `threshold`.")
    if (max_norm := grow["max_norm"]) is not None and not 1 <= max_norm < math.inf:
        raise InputError(
            f"`max_norm` is {shortened(max_norm)}: pass how many times the median norm a token may have, 1 or more (5 "
            "leaves massive tokens alone out)."
        )
    most = {"relative": 1.0, "cosine": 4.0, "squared": math.inf}[loss]
    if threshold is not None and not 0 <= threshold < most:
        raise InputError(f"`threshold` is {shortened(threshold)}; loss {loss!r} needs one from 0 to below {most:g}.")


def _check_online(grow: Mapping[str, Any]) -> None:
    """Raise `InputError` for what would have no effect where nothing is admitted."""
    if grow["n_atoms"] is None:
        raise InputError("Admission 'online' draws its atoms: say how many (`n_atoms`), or choose another admission.")
    if grow["loss"] != "relative" or grow["max_atoms"] is not None:
        name = "max_atoms" if grow["max_atoms"] is not None else "loss"
        raise InputError(
            f"`{name}` is {grow[name]!r}, which says what is admitted, and admission 'online' admits nothing: leave "
            "one of them out."
        )
