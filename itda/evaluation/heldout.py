"""Text that a dictionary was not built on, and the activations there: what `itda.evaluate` measures on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import Tensor

from itda.devices import free_bytes
from itda.dictionary.itda import ITDA
from itda.errors import InputError, one_line
from itda.labels import Batch, Labels
from itda.models.hooked_model import HookedModel
from itda.models.loading import load_model
from itda.progress import Step, stage
from itda.provenance import section
from itda.reading.activations import Activations
from itda.text.prompts import Row, TokenStream, hash_rows, row_labels, valid
from itda.text.reread import CUT, cut_of, read_until, stream_of

POOL = 4  # tokens for the controls to draw from, per atom
LEAST_POOL = 20_000
OWN = "what the dictionary was built on"
ENDLESS = 100_000  # rows of a document, after which it is taken for the last


@dataclass(frozen=True, repr=False)
class Split:
    """Rows to measure on, rows that controls are made of, and in `about` what they are."""

    stream: TokenStream
    held: list[Row]
    pool: list[Row]
    about: dict[str, Any]
    tokens: int
    special_tokens: bool

    def first(self, tokens: int | None) -> list[Row]:
        """The first of the rows to measure on, with as many valid tokens or a few more."""
        return list(_until(self.held, tokens, self.special_tokens))


@dataclass(frozen=True, repr=False)
class Held:
    """Activations (tokens, d) float32 with labels, special tokens and position 0 among them; `scored` marks the others.

    `pool` are those that controls are made of.
    """

    x: Float[Tensor, "tokens d"]
    labels: Labels
    scored: Bool[ndarray, " tokens"]
    pool: Float[Tensor, "pooled d"]


@dataclass(frozen=True, repr=False)
class Reader:
    """Reads a split with one model after another."""

    split: Split
    hook: str
    special_tokens: bool
    report: Callable[[Step | None], None]
    batch_rows: int = 32

    def read(self, model: HookedModel) -> Held:
        """All activations at the hook point."""
        model = load_model(model, hooks=self.hook)
        batches = list(self._batches(model, self.split.held, True, "reading held-out text"))
        x, labels = torch.cat([b.activations for b in batches]), Labels.concat([b.labels for b in batches])
        scored = np.concatenate([valid(row, self.special_tokens) for row in self.split.held])
        beyond = np.flatnonzero(scored)[self.split.tokens :]
        if len(beyond):  # the last row may hold more tokens than were asked for
            x, labels, scored = x[: beyond[0]], labels[: beyond[0]], scored[: beyond[0]]
        pool = self._batches(model, self.split.pool, self.special_tokens, "reading text for the controls")
        found = [b.activations for b in pool]
        return Held(x, labels, scored, torch.cat(found) if found else x[:0])

    def _batches(self, model: HookedModel, rows: list[Row], special: bool, what: str) -> Iterator[Batch]:
        if not rows:
            return
        need = 4.0 * model.d[self.hook] * sum(len(row.ids) for row in rows)
        if need > 0.8 * free_bytes(torch.device("cpu")):
            raise InputError(
                f"The activations take {need / 1e9:.1f} GB, more than is free: measure on fewer `tokens` (`--tokens`)."
            )
        told, done = stage(self.report, what, sum(int(valid(row, special).sum()) for row in rows)), 0
        source = self.split.stream.of(rows)
        batches: Any = Activations(model, source, self.batch_rows, special_tokens=special, single=True)
        for batch in batches:
            done += len(batch.labels)
            yield Batch(batch.activations.float().cpu(), batch.labels)
            told(done)


def pool_size(n_atoms: int) -> int:
    """How many tokens controls for so many atoms are drawn from."""
    return max(LEAST_POOL, POOL * n_atoms)


def split(
    dictionary: ITDA,
    data: Any,
    tokenizer: Any,
    tokens: int,
    pool: int,
    special_tokens: bool,
    in_sample: bool,
    seed: int,
    settings: dict[str, Any],
) -> Split:
    """Rows of `data` of which the dictionary has read no document, and rows with `pool` tokens for its controls.

    The latter are drawn from what it has read, where that is still to be had; else every other document is theirs, or
    of a single document the second half. Of a document that it has read in part, and no other, the rest is measured on.
    A single document is read whole, also where the dictionary has the first rows of documents alone (`truncate`).
    Raises `InputError` where nothing is left.
    """
    cfg = section(dictionary.cfg, "stream")
    own_cut = cut_of(cfg, data)
    stream = TokenStream(data, tokenizer, **own_cut | settings)
    if stream.truncate and "truncate" not in settings and len(list(islice(stream, 2))) == 1:
        settings = settings | {"truncate": False}
        stream = TokenStream(data, tokenizer, **own_cut | settings)
    read, rows = _read_before(dictionary, cfg, stream)
    own = read or own_rows(dictionary, cfg, tokenizer)
    as_read = None
    anew = {name for name in CUT if (own_cut | settings).get(name) != own_cut.get(name)}
    if anew - ({"truncate"} if own_cut.get("truncate") else set()):  # first rows are rows of a whole document too
        as_read = TokenStream(data, tokenizer, **settings | own_cut | {"seed": None})
    known, partly = _Known(own, as_read), {row.document for row in read}
    rows = (row for row in rows if row.document not in partly or not known.has(row))
    wanted = tokens if own or not pool else 2 * max(tokens, pool)
    seen, held, after = _unread(rows, known, set(partly), wanted, special_tokens)
    about: dict[str, Any] = {"data": stream.provenance["data"], "read_in_training": len(seen) > 0}
    about |= {name: stream.provenance[name] for name in ("files", "unread") if stream.provenance.get(name)}
    drawn = own
    if in_sample and seen:
        held = list(_until(stream, tokens, special_tokens))
        about |= {"by": "nothing: the dictionary was built on this text", "random_tokens_from": "the same text"}
    elif own:
        about |= {"by": "document", "random_tokens_from": OWN}
        if not held and after:
            held, one = after, len({row.document for row in after}) == 1
            about["by"] = f"rows after those read, of {'one document' if one else 'documents that it has read in part'}"
            if cfg.get("seed") is not None:
                about["by"] += ", shuffled: they stand between rows that were read"
        if not held:
            raise InputError(
                "All documents of this text were read when the dictionary was built: give other text, or measure on it "
                "all the same with `in_sample` (`--in-sample`)."
            )
    else:
        by, other = "document", "other documents of this text"
        if len({row.document for row in held}) == 1:
            by, other = "halves of the one document", "its other half"
        held, drawn = _halves(held) if pool else (held, [])
        name = f" ({one_line(str(cfg['data']))})" if cfg.get("data") else ""
        unknown = f"; what the dictionary was built on{name} was not there to compare with"
        about |= {"by": (by if pool else "nothing") + unknown, "random_tokens_from": other}
    held = list(_until(held, tokens, special_tokens))
    if not any(valid(row, special_tokens).any() for row in held):
        raise InputError("The text holds no valid token to measure on: give more text.")
    about["documents"] = len({row.document for row in held})
    order = np.random.default_rng([seed, 5]).permutation(len(drawn))
    some = sorted(_until((drawn[i] for i in order), pool, special_tokens), key=lambda row: row.prompt) if pool else []
    if pool and not any(valid(row, special_tokens).any() for row in some):
        raise InputError(
            "The text is too short to draw controls from: give more, or pass `controls=False` (`--no-controls`)."
        )
    return Split(stream, held, some, about, tokens, special_tokens)


def _read_before(dictionary: ITDA, cfg: dict[str, Any], stream: Iterable[Row]) -> tuple[list[Row], Iterator[Row]]:
    """The rows that the dictionary has read, if `stream` begins with these, and all others one after another."""
    rows, until = iter(stream), cfg.get("hash")
    if not until:
        return [], rows
    tokens = cfg.get("tokens") or dictionary.cfg.get("tokens") or 0
    read = list(read_until(rows, until, int(dictionary.cfg.get("batch_rows") or 1), int(tokens)))
    return (read, rows) if hash_rows(read) == until else ([], chain(read, rows))


def own_rows(dictionary: ITDA, cfg: dict[str, Any], tokenizer: Any) -> list[Row]:
    """The rows that the dictionary was built on, from where it says they are; none if they are not there any more."""
    if not cfg.get("hash") or not isinstance(cfg.get("data"), str):
        return []
    try:
        return _read_before(dictionary, cfg, stream_of(cfg, cfg["data"], tokenizer))[0]
    except InputError:
        return []


class _Known:
    """Whether a row is one of `own`, known by its ids, BOS aside.

    If the text is now cut otherwise than `own`, `as_read` has it cut as that, in the order of its documents; all rows
    of a document with any row of `own` then count.
    """

    def __init__(self, own: list[Row], as_read: Iterable[Row] | None) -> None:
        self.keys = {self.key(row) for row in own if (~row.special).any()}
        self.as_read = None if as_read is None else iter(as_read)
        self.documents: set[int] = set()
        self.last = -1  # document that `as_read` was read to

    @staticmethod
    def key(row: Row) -> bytes:
        """What is compared of a row."""
        return row.ids[~row.special].tobytes()

    def has(self, row: Row) -> bool:
        """Whether there is such a row."""
        return self.key(row) in self.keys

    def __call__(self, row: Row) -> bool:
        if not self.keys or self.as_read is None:
            return self.has(row)
        while self.last <= row.document and (other := next(self.as_read, None)) is not None:
            self.last = other.document
            if self.has(other):
                self.documents.add(other.document)
        return row.document in self.documents


class _Some:
    """Rows, by document, up to the one with which they have so many valid tokens."""

    def __init__(self, tokens: int, special_tokens: bool) -> None:
        self.tokens, self.special_tokens, self.count = tokens, special_tokens, 0
        self.parts: dict[int, list[Row]] = {}

    @property
    def full(self) -> bool:
        """Whether there are as many as are wanted."""
        return self.count >= self.tokens

    def add(self, row: Row) -> None:
        """Take one more, unless they are `full`."""
        if not self.full:
            self.parts.setdefault(row.document, []).append(row)
            self.count += int(valid(row, self.special_tokens).sum())

    def drop(self, document: int) -> None:
        """Give up those of a document."""
        self.count -= sum(int(valid(row, self.special_tokens).sum()) for row in self.parts.pop(document, []))

    def rows(self) -> list[Row]:
        """All of them, in stream order."""
        return sorted(chain.from_iterable(self.parts.values()), key=lambda row: row.prompt)


def _unread(
    rows: Iterable[Row], known: Callable[[Row], bool], seen: set[int], wanted: int, special_tokens: bool
) -> tuple[set[int], list[Row], list[Row]]:
    """The documents that were read, `seen` or with a row `known`; rows of others; and rows after all those known.

    Of either there are so many that they have `wanted` valid tokens. No other document is waited for beyond `ENDLESS`
    rows of one that was read.
    """
    new, after = _Some(wanted, special_tokens), _Some(wanted, special_tokens)
    waited, cut = 0, None
    for row in rows:
        was_read = known(row)
        if was_read or row.document == cut:  # the row after one that was read may have been read in part
            seen.add(row.document)
            new.drop(row.document)
            after.drop(row.document)
        elif row.document in seen:
            after.add(row)
        else:
            new.add(row)
        cut, waited = (row.document, 0) if was_read else (None, waited + 1)
        if new.full or (after.full and not new.parts and waited > ENDLESS):
            break
    return seen, new.rows(), after.rows()


def _halves(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Every other document, or of one document the halves."""
    documents = list(dict.fromkeys(row.document for row in rows))
    if len(documents) == 1:
        middle = (len(rows) + 1) // 2
        return rows[:middle], rows[middle:]
    first = set(documents[::2])
    return [row for row in rows if row.document in first], [row for row in rows if row.document not in first]


def _until(rows: Iterable[Row], tokens: int | None, special_tokens: bool) -> Iterator[Row]:
    """`rows` up to the one with which they have so many valid tokens."""
    count = 0
    for row in rows:
        if tokens is not None and count >= tokens:
            return
        yield row
        count += int(valid(row, special_tokens).sum())


def labels_of(rows: Iterable[Row]) -> Labels:
    """The labels of all tokens of `rows`, without text."""
    return Labels.concat([row_labels(row) for row in rows])
