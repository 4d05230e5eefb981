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
from itda.dictionary.itda import ITDA, Sample
from itda.dictionary.threshold import QUIET, Schedule, pilot, pilot_tokens
from itda.disk import bytes_of
from itda.errors import InputError, shortened
from itda.labels import Batch, Labels
from itda.metrics import LOSSES, fvu
from itda.pursuit import MOST_STEPS, as_tensor, check_entries
from itda.settings import takes, verbs

MEAN_TOKENS = 8192  # the fixed prefix of the stream on which `center=True` estimates the mean
SAMPLE_TOKENS = 8192  # tokens kept, evenly spaced, to measure the finished dictionary on
SAMPLE_BYTES = 64e6
DEFAULT_THRESHOLD = {"relative": 0.2, "cosine": 4e-4}
ADMISSIONS = ("sequential", "batch", "paper")


class Builder:
    """One dictionary being built: `update` with batches in stream order, then `finish`.

    Between two calls its state is that of a whole number of batches, which `checkpoint.save` writes and
    `checkpoint.restore` brings back.
    """

    @takes(verbs.GROW)
    def __init__(
        self, *, total: int | None = None, max_gram_bytes: int | float | None = None, **grow: Unpack[verbs.Grow]
    ) -> None:
        _check_together(grow)
        n_atoms, loss, threshold = grow["n_atoms"], grow["loss"], grow["threshold"]
        if n_atoms is not None and total is None:
            raise InputError("`n_atoms` needs to know how long the stream is: give `tokens`, or a `threshold` instead.")
        if n_atoms is not None and n_atoms > (total or 0):
            raise InputError(
                f"`n_atoms` is {n_atoms:,} but the stream has {total:,} tokens, and an atom is one token: "
                "ask for fewer atoms or give more text."
            )
        kept = ("k", "nonneg", "loss", "admission", "center", "max_atoms", "threshold", "n_atoms")
        self.settings: dict[str, Any] = {name: grow[name] for name in kept}
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
        self._dictionary: Sequential | Batched | None = None
        self.sample = SpacedSample()
        self._head: list[Batch] = []
        self._head_tokens = 0
        self.tell: Callable[[int], None] = QUIET  # called while a threshold is chosen
        # Without a threshold, `_start` chooses one.
        self.schedule = Schedule([[0, DEFAULT_THRESHOLD.get(loss, math.nan) if threshold is None else threshold]])

    @property
    def dictionary(self) -> Sequential | Batched:
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
            self._head.append(Batch(activations.clone(), labels))  # the stream may use its memory again
            self._head_tokens += len(activations)
            if self._head_tokens >= self._head_wanted():
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
                f"The activations have changed in their first {self.position:,} tokens since this build began: give "
                "the same ones to go on, or another folder to start anew."
            )

    def settle(self) -> None:
        """Judge what waited for more to estimate the mean or the threshold from: the stream has ended."""
        if self._head:
            self._start()

    def finish(self, provenance: Mapping[str, Any] | None = None) -> ITDA:
        """The dictionary of all tokens seen. `provenance` goes into its `cfg` ("model", "stream")."""
        self.settle()
        if not self.started or not self.seen:
            raise InputError("The stream held no valid token, so there is nothing to build on: give it more text.")
        atoms = self.dictionary.gram.atoms.clone().cpu()
        cfg = self.settings | {
            "threshold": self.schedule.threshold,
            "thresholds": self.schedule.history,
            "n_atoms_wanted": self.settings["n_atoms"],
            "tokens": self.seen,
            "itda_version": __version__,
        }
        del cfg["n_atoms"], cfg["total"]
        labels = Labels.concat(self.labels)
        found = (self.dictionary.norms, self.dictionary.losses)
        norms, losses = (torch.tensor(values, dtype=torch.float32, device="cpu") for values in found)
        model = ITDA(atoms, labels, self.settings["k"], self.mean, norms, losses, cfg | dict(provenance or {}))
        return measured(model, *self.sample.tokens())

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
            return self.dictionary.gram.atoms.shape[1]
        return self._head[0].activations.shape[1] if self._head else None

    def _head_wanted(self) -> int:
        """How many tokens must be at hand before the first can be judged; 0 once they were."""
        if self.started:
            return 0
        wanted = MEAN_TOKENS if self.settings["center"] else 1
        return max(wanted, pilot_tokens(self.total)) if self.settings["n_atoms"] else wanted

    def _start(self) -> None:
        """Estimate the mean, choose the threshold, and judge the tokens that waited for both."""
        head, self._head, self._head_tokens = self._head, [], 0
        x = torch.cat([batch.activations for batch in head])
        if not len(x):
            return
        if self.settings["center"]:
            # NumPy adds row after row, in one order on every machine and for any number of threads.
            self.mean = torch.from_numpy(x[:MEAN_TOKENS].double().cpu().numpy().mean(axis=0)).float()
        if self.settings["n_atoms"]:
            x = x[: pilot_tokens(self.total)]
            wish, *how = (self.settings[name] for name in ("n_atoms", "k", "loss", "nonneg"))
            self.schedule = pilot(self._centred(x), wish, max(self.total, 1), *how, tell=self.tell)
        self.prepare(x.shape[1], x.device)
        for batch in head:
            self._judge(batch)

    def prepare(self, d: int, device: torch.device | str) -> None:
        """Make the empty dictionary."""
        shared = dict(max_gram_bytes=self.max_gram_bytes)
        args = (d, self.settings["k"], self.settings["loss"], device)
        shared["nonneg"] = self.settings["nonneg"]
        if self.settings["admission"] == "sequential":
            self._dictionary = Sequential(*args, chunk_size=self.chunk_size, **shared)
        else:
            self._dictionary = Batched(*args, paper=self.settings["admission"] == "paper", **shared)

    def _centred(self, x: Tensor) -> Tensor:
        x = x.float()
        return x if self.mean is None else x - self.mean.to(x.device)

    def _judge(self, batch: Batch) -> None:
        x, seen, admitted = self._centred(batch.activations), self.seen, []
        if self.dictionary.gram.atoms.device != x.device:  # a checkpoint is read on the CPU
            self.dictionary.to(x.device)
        start = 0
        while start < len(x) and not self.full:
            ahead = self.schedule.until(seen + start)
            stop = len(x) if ahead is None else min(len(x), start + ahead)
            room = (self.settings["max_atoms"] or math.inf) - len(self)
            watch = self.schedule.watch(seen + start, stop - start)
            rows, losses = self.dictionary.judge(x[start:stop], self.schedule.threshold, room, watch)
            if self.full:  # what comes after the last admission was not judged, however long the batch
                stop = start + max(rows) + 1
            admitted += [start + row for row in rows]
            self.schedule.losses += losses.tolist()
            self.schedule.advance(seen + stop, len(self))
            start = stop
        self.sample.add(batch, start, seen)
        self.labels.append(batch.labels[np.array(admitted, np.int64)])
        self.seen = seen + start


def measured(model: ITDA, x: Tensor, labels: Labels) -> ITDA:
    """The dictionary with the tokens `x` (tokens, d) and their `labels` as its sample, and its FVU on them."""
    codes = model.encode(x)
    x_hat = model.decode(codes)
    cfg = model.cfg | {"fvu": fvu(x.double(), x_hat.double()), "sample_tokens": len(x)}
    centred = x.float() if model.mean is None else x.float() - model.mean
    loss = LOSSES[cfg.get("loss", "relative")](centred.double(), codes.decode(model.atoms).double())
    return replace(model, cfg=cfg, sample=Sample(labels, codes, loss.float()))


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


class SpacedSample:
    """Every `stride`-th token seen, at most `SAMPLE_TOKENS` of them: when they are more, every other one is dropped."""

    def __init__(self) -> None:
        self.stride = 1
        self.activations: list[Tensor] = []
        self.labels: list[Labels] = []

    def add(self, batch: Batch, tokens: int, seen: int) -> None:
        """Take from the first `tokens` of a batch that comes after `seen` tokens."""
        rows = np.arange(-seen % self.stride, tokens, self.stride)
        self.activations.append(batch.activations[torch.from_numpy(rows).to(batch.activations.device)].float().cpu())
        self.labels.append(batch.labels[rows])
        limit = min(SAMPLE_TOKENS, max(1, int(SAMPLE_BYTES / (4 * batch.activations.shape[1]))))
        while sum(map(len, self.labels)) > limit:
            x, labels = self.tokens()
            self.activations, self.labels = [x[::2].clone()], [labels[np.arange(0, len(labels), 2)]]
            self.stride *= 2

    def tokens(self) -> tuple[Tensor, Labels]:
        """Activations (tokens, d) float32 and their labels."""
        return torch.cat(self.activations), Labels.concat(self.labels)


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
        raise InputError(f"A batch has {len(x)} activations but {len(labels)} labels: pass one for each.")
    check_entries(x, labels)
    return x.detach().cpu() if x.device.type == "mps" else x.detach()  # MPS has no float64


def _check_together(grow: Mapping[str, Any]) -> None:
    """Raise `InputError` for settings that do not go together, each of them being right by itself."""
    k, threshold, n_atoms, loss = (grow[name] for name in ("k", "threshold", "n_atoms", "loss"))
    if k > MOST_STEPS:
        raise InputError(f"`k` is {shortened(k)}: pass at most {MOST_STEPS:,} pursuit steps.")
    if threshold is not None and n_atoms is not None:
        raise InputError(f"Both `threshold` ({threshold}) and `n_atoms` ({n_atoms}) were given: choose one of them.")
    if n_atoms is not None and (admission := grow["admission"]) != "sequential":
        raise InputError(
            f"`n_atoms` works with admission 'sequential' only, not {admission!r}: give a `threshold`, and `max_atoms`."
        )
    if threshold is None and n_atoms is None and loss not in DEFAULT_THRESHOLD:
        raise InputError(f"Loss {loss!r} has the units of the activations and no default: give a `threshold`.")
    most = {"relative": 1.0, "cosine": 4.0, "squared": math.inf}[loss]
    if threshold is not None and not 0 <= threshold < most:
        raise InputError(f"`threshold` is {shortened(threshold)}; loss {loss!r} needs one from 0 to below {most:g}.")
