"""A model and a text in, activations with their labels out; the model runs no further than its last hook point."""

from __future__ import annotations

import copy
import itertools
import os
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Unpack

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy import ndarray

from itda.arguments import places_of
from itda.errors import InputError, counted
from itda.labels import Batch, Labels
from itda.models.hooked_model import Group, HookedModel
from itda.models.loading import load_model
from itda.reading.on_disk import from_disk, is_stored
from itda.reading.saelens_cache import Cache
from itda.reading.store import Store
from itda.settings import groups, names, pick, takes, verbs
from itda.text.documents import open_documents
from itda.text.prompts import Row, StreamHash, TokenStream, valid


@takes(verbs.ACTIVATIONS)
def activations(model: Any, data: Any, **settings: Unpack[verbs.Reading]) -> Activations | Store | Cache:
    """The activations of `model` on `data` with their labels: an iterable of `Batch`, one per `batch_rows` rows.

    Give `layer` (the residual stream after that block; -1 is the last) or `hook` (a module path or a TransformerLens
    name). With a list of them every item is a dict of batches by hook point, from one forward pass. `model` is a hub
    id, a folder, a loaded module with its `tokenizer`, or what `itda.load_model` returned; `data` a hub id, a path,
    texts, or a `TokenStream` (which has the settings of the stream already). What is no setting here goes to
    `from_pretrained`. Iteration ends after `tokens` valid tokens.

    `data` may also be a folder of activations, which `itda collect` or SAELens has written: they are read from there,
    at all hook points if none is given, and no model is loaded, so `model` may be None.

    Valid is no padding, no special token and not position 0, unless `special_tokens`; with `padding`, rows are filled
    to `context_length` and the filling is read like text, as the paper's code does.

    What says how the model is loaded is as for `itda.load_model`. With `device_map="auto"` (and
    `max_memory`, `offload_folder`) accelerate spreads the model over GPUs, memory and disk; `quantization_config`
    quantises it, which its provenance says. (Nothing of this was run on several GPUs.)
    """
    given: dict[str, Any] = dict(settings)
    if is_stored(data):
        return from_disk(model, data, given)
    if model is None:
        raise InputError("`model` is None: name a model, or give the folder of activations on disk as `data`.")
    hooks, single = places_of(given["layer"], given["hook"], needed=True)
    if isinstance(data, str | os.PathLike):
        open_documents(data, pick(groups.Source, given))  # or refused, before a model is loaded
    others = {name: value for name, value in given.items() if name not in names(verbs.Reading)}
    how = pick(verbs.Loading, given) | others
    hooked = load_model(model, given["tokenizer"], hooks=hooks, **how)
    if not isinstance(data, TokenStream):
        data = TokenStream(data, hooked.tokenizer, **pick(verbs.Text, given))
    counted = {name: given[name] for name in ("tokens", "special_tokens", "padding")}
    return Activations(hooked, data, given["batch_rows"], single=single, **counted)


class Activations:
    """Made by `activations`. Iterable, again and again, of `Batch` (`single`), or of {hook point: `Batch`}."""

    def __init__(
        self,
        model: HookedModel,
        stream: TokenStream,
        batch_rows: int = 32,
        *,
        tokens: int | None = None,
        special_tokens: bool = False,
        padding: bool = False,
        single: bool = False,
    ):
        if model.max_length is not None and stream.context_length > model.max_length:
            raise InputError(
                f"`context_length` is {stream.context_length}, and `{model._layout.model}` has {model.max_length} "
                f"positions: pass {model.max_length} or fewer."
            )
        self.model, self.hook_points = model, model.hook_points
        self._stream, self._batch_rows, self._budget = stream, batch_rows, tokens
        self.skipped = 0  # valid tokens that an iteration leaves out at the beginning
        self._special_tokens, self._padding, self.single = special_tokens, padding, single
        self.hash: str = StreamHash().hexdigest()  # over the rows that the latest iteration has read so far
        self.skipped_hash: str | None = self.hash
        self._documents = _Documents(stream.seed is not None)
        self._valid = self._read = 0  # tokens of text in the rows so far, and the valid ones

    def __repr__(self) -> str:
        tokens = "all tokens" if self.tokens is None else counted(self.tokens, "token")
        data = self._stream.provenance["data"] or "texts in memory"
        return f"Activations({self.model._layout.model!r} at {', '.join(self.hook_points)}, {tokens} of {data})"

    @property
    def tokens(self) -> int | None:
        """How many valid tokens an iteration yields at most; None if that is as many as the data has."""
        return None if self._budget is None else max(0, self._budget - self.skipped)

    @property
    def expected(self) -> int | None:
        """How many valid tokens an iteration is likely to yield in all, skipped ones too; None if nobody can tell.

        It is told from the part of the files that the latest iteration has read, and gets exact as that ends.
        """
        there = self._stream.tally.expected
        if there is None or not self._read:
            return self._budget
        found = round(there * self._valid / self._read)
        return found if self._budget is None else min(found, self._budget)

    def documents(self, tokens: int) -> int:
        """How many documents the first valid `tokens` are of, as far as the latest iteration has read."""
        return self._documents.until(tokens)

    def count_tokens(self, limit: int | None = None) -> int:
        """How many valid tokens an iteration yields, or `limit` if that is fewer; runs no model."""
        limits = [n for n in (self.tokens, limit) if n is not None]
        count, rows = -self.skipped, iter(self._stream)
        while (not limits or count < min(limits)) and (row := next(rows, None)) is not None:
            count += int(valid(row, self._special_tokens).sum())
            count += self._padding * (self._stream.context_length - len(row.ids))
        return max(0, min([count, *limits]))

    def skip(self, tokens: int) -> Activations:
        """The same without the first `tokens` valid tokens; the model runs on no group of rows that lies in these.

        Their rows are still tokenised and hashed, so that the stream keeps its hash.
        """
        if tokens < 0:
            raise InputError(f"`tokens` is {tokens}, and no fewer than 0 can be skipped: pass how many were read.")
        rest = copy.copy(self)
        rest.skipped, rest.hash = self.skipped + tokens, StreamHash().hexdigest()
        rest.skipped_hash = None  # that of the rows skipped, once iteration has passed them
        return rest

    @property
    def provenance(self) -> dict:
        """Where the activations come from, as JSON can hold it; per hook point if a list of them was given.

        The stream's hash is that of the rows read so far by the latest iteration.
        """
        rest = {
            "stream": {**self._stream.provenance, "hash": self.hash},
            "batch_rows": self._batch_rows,
            "special_tokens": self._special_tokens,
            "padding": self._padding,
            "versions": _versions() | ({"processor": kind} if (kind := self.model.processor) else {}),
        }
        every = {hook: {"model": self.model.provenance(hook), **rest} for hook in self.hook_points}
        return every[self.hook_points[0]] if self.single else every

    def __iter__(self) -> Iterator[Batch] | Iterator[dict[str, Batch]]:
        asked: deque[_Asked] = deque()  # a model may want more groups before it gives the first
        for read in self.model.read_all(self._groups(asked)):
            group = asked.popleft()
            self.hash = group.hash
            where = group.where
            batches = {hook: Batch(x.flatten(0, 1)[where.to(x.device)], group.labels) for hook, x in read.items()}
            yield batches[self.hook_points[0]] if self.single else batches
        for group in asked:
            self.hash = group.hash

    def _groups(self, asked: deque[_Asked]) -> Iterator[Group]:
        """The groups of rows that have tokens to yield; what becomes of their activations goes into `asked`."""
        stream_hash = StreamHash()
        rows, done = iter(self._stream), 0
        self._documents = _Documents(self._stream.seed is not None)
        self._valid = self._read = 0
        for index in itertools.count():
            if done == self._budget or not (group := list(itertools.islice(rows, self._batch_rows))):
                break
            for row in group:
                stream_hash.update(row)
            ids, mask, valid, labels = self._table(group)
            self._documents.add(labels.document)
            self._valid += len(labels)
            self._read += sum(int((row.starts >= 0).sum()) for row in group)
            end = len(labels) if self._budget is None else min(len(labels), self._budget - done)
            start = min(max(0, self.skipped - done), end)
            done += end
            if self.skipped_hash is None and done >= self.skipped:
                self.skipped_hash = stream_hash.hexdigest()  # with the rows of the whole group, as a checkpoint has it
            if start < end:
                # The whole group runs whatever is taken of it. Row-major: row by row, as the labels.
                where = torch.from_numpy(valid.reshape(-1).nonzero()[0][start:end])
                labels = labels if end - start == len(labels) else labels[start:end]
                asked.append(_Asked(where, labels, stream_hash.hexdigest()))
                yield Group(index, torch.from_numpy(ids), torch.from_numpy(mask))
        if done < self.skipped:
            raise InputError(
                f"{counted(self.skipped, 'token')} cannot be skipped, because `data` has {done}: pass what "
                "was read before."
            )
        asked.append(_Asked(torch.zeros(0), Labels.counted(0, 0), stream_hash.hexdigest()))  # rows without such tokens

    def _table(self, group: Sequence[Row]) -> tuple[ndarray, ndarray, Bool[ndarray, "rows length"], Labels]:
        """A group of rows side by side: ids, attention mask, which tokens are valid, and the labels of those.

        Rows are filled on the right, to the longest of the group; its make-up depends on the stream alone, because
        the last bits of an activation depend on the shape of what the model is given.
        """
        width = self._stream.context_length if self._padding else max(len(row.ids) for row in group)
        ids = np.full((len(group), width), self._filler(), np.int64)
        starts, ends = np.full_like(ids, -1), np.full_like(ids, -1)
        mask, kept = np.zeros_like(ids), np.full(ids.shape, self._padding)
        for i, r in enumerate(group):
            n = len(r.ids)
            kept[i, :n] = valid(r, self._special_tokens)
            ids[i, :n], starts[i, :n], ends[i, :n], mask[i, :n] = r.ids, r.starts, r.ends, 1
        if self._padding:
            mask[:] = 1  # the published code gives no mask
        row, position = kept.nonzero()
        labels = Labels(
            prompt=np.array([r.prompt for r in group], np.int64)[row],
            position=position,
            token_id=ids[row, position],
            document=np.array([r.document for r in group], np.int64)[row],
            start=starts[row, position],
            end=ends[row, position],
            row=row,
            texts=tuple(r.text for r in group),
            text_start=np.array([r.text_start for r in group], np.int64),
            stream=self._stream.provenance,
        )
        return ids, mask, kept, labels

    def _filler(self) -> int:
        """The id of padding: that of the tokenizer, or its EOS; 0 if the model knows neither."""
        tokenizer = self.model.tokenizer
        ids = (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None))
        return next((i for i in ids if i is not None and 0 <= i < self.model._vocabulary), 0)


class _Documents:
    """At which token which document begins; those in the data's own order are told without holding their numbers."""

    def __init__(self, shuffled: bool) -> None:
        self._starts, self._tokens, self._last = array("q"), 0, -1
        self._seen: set[int] | None = set() if shuffled else None

    def add(self, documents: Int[ndarray, " tokens"]) -> None:
        """The documents of the next valid tokens."""
        for at in np.flatnonzero(np.r_[True, documents[1:] != documents[:-1]][: len(documents)]).tolist():
            document = int(documents[at])
            if document > self._last if self._seen is None else document not in self._seen:
                self._starts.append(self._tokens + at)
                self._last = document
            if self._seen is not None:
                self._seen.add(document)
        self._tokens += len(documents)

    def until(self, tokens: int) -> int:
        """How many the first `tokens` are of."""
        return bisect_left(self._starts, tokens)


class _Asked(NamedTuple):
    where: torch.Tensor  # of the group's tokens, row by row, those to yield
    labels: Labels
    hash: str  # of the rows up to the end of the group


def _versions() -> dict[str, str]:
    """Of the libraries that decide the last bits."""
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}
