"""Text that a dictionary was not built on, and the activations there: what `itda.evaluate` measures on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import Tensor

from itda.aligned import row_labels
from itda.drawing import section
from itda.errors import InputError
from itda.hooks import Activations, load
from itda.labels import Batch, Labels
from itda.model import ITDA
from itda.progress import Step
from itda.prompts import Row, StreamHash, TokenStream, valid
from itda.pursuit.gram import free_bytes
from itda.reading import HookedModel
from itda.saved import CUT as ROWS

POOL = 4  # tokens for the controls to draw from, per atom
LEAST_POOL = 20_000
OWN = "what the dictionary was built on"
CUT = (*ROWS, "column", "split", "config")


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

    def read(self, model: HookedModel, what: str) -> Held:
        """All activations at the hook point."""
        model = load(model, hooks=self.hook)
        batches = list(self._batches(model, self.split.held, True, what))
        x, labels = torch.cat([b.activations for b in batches]), Labels.concat([b.labels for b in batches])
        scored = np.concatenate([valid(row, self.special_tokens) for row in self.split.held])
        beyond = np.flatnonzero(scored)[self.split.tokens :]
        if len(beyond):  # the last row may hold more tokens than were asked for
            x, labels, scored = x[: beyond[0]], labels[: beyond[0]], scored[: beyond[0]]
        pool = self._batches(model, self.split.pool, self.special_tokens, f"{what} for the controls")
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
        began, done, total = time.monotonic(), 0, sum(int(valid(row, special).sum()) for row in rows)
        source = self.split.stream.of(rows)
        batches: Any = Activations(model, source, self.batch_rows, special_tokens=special, single=True)
        for batch in batches:
            done += len(batch.labels)
            yield Batch(batch.activations.float().cpu(), batch.labels)
            self.report(Step(what, done, total, time.monotonic() - began))


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
    Raises `InputError` where nothing is left.
    """
    cfg = section(dictionary.cfg, "stream")
    own_cut = {name: cfg[name] for name in CUT if cfg.get(name) is not None}
    stream = TokenStream(data, tokenizer, **own_cut | settings)
    wanted = 2 * max(tokens, pool) if pool else tokens
    read, rest = _read_before(dictionary, cfg, stream, wanted, special_tokens)
    own = read or _own_rows(dictionary, cfg, tokenizer, special_tokens)
    about: dict[str, Any] = {"data": stream.provenance["data"]}
    if not read and own:
        cut_anew = any((own_cut | settings).get(name) != own_cut.get(name) for name in ROWS)
        as_read = TokenStream(data, tokenizer, **settings | own_cut) if cut_anew else None
        before, (read, rest) = rest, _known(own, rest, as_read)
        if not rest and len(every := list(stream)) > len(before):  # what is new may come late
            read, rest = _known(own, every, as_read)
    about["read_in_training"] = len(read) > 0
    if in_sample and read:
        held, drawn = [*read, *rest], own
        about |= {"by": "nothing: the dictionary was built on this text", "random_tokens_from": "the same text"}
    elif own:
        seen = {row.document for row in read}
        held, drawn = [row for row in rest if row.document not in seen], own
        about |= {"by": "document", "random_tokens_from": OWN}
        if not held and rest:
            held, one = rest, len({row.document for row in rest}) == 1
            about["by"] = f"rows after those read, of {'one document' if one else 'documents that it has read in part'}"
        if not held:
            raise InputError(
                "All documents of this text were read when the dictionary was built: give other text, or measure on it "
                "all the same with `in_sample` (`--in-sample`)."
            )
    else:
        held, drawn = _halves(rest) if pool else (rest, [])
        by = "document" if len({row.document for row in rest}) > 1 else "halves of the one document"
        other = "other documents of this text" if by == "document" else "its other half"
        unknown = "; what the dictionary was built on was not there to compare with"
        about |= {"by": by + unknown, "random_tokens_from": other}
    held = list(_until(held, tokens, special_tokens))
    if not any(valid(row, special_tokens).any() for row in held):
        raise InputError("The text holds no valid token to measure on: give more.")
    about["documents"] = len({row.document for row in held})
    order = np.random.default_rng([seed, 5]).permutation(len(drawn))
    some = sorted(_until((drawn[i] for i in order), pool, special_tokens), key=lambda row: row.prompt) if pool else []
    if pool and not any(valid(row, special_tokens).any() for row in some):
        raise InputError("The text is too short to draw controls from: give more, or none (`--no-controls`).")
    return Split(stream, held, some, about, tokens, special_tokens)


def _known(own: list[Row], rows: list[Row], as_read: Iterable[Row] | None) -> tuple[list[Row], list[Row]]:
    """`rows` up to the last one of each document that has a row of `own`, and the others.

    Rows are known by their ids, BOS aside. If these rows are cut otherwise than `own`, `as_read` has the text cut as
    that, and a document with any row of `own` counts as read altogether.
    """

    def key(row: Row) -> bytes:
        return row.ids[~row.special].tobytes()

    known = {key(row) for row in own if (~row.special).any()}
    if as_read is not None:
        wanted = {row.document for row in rows}
        seen = {row.document for row in as_read if row.document in wanted and key(row) in known}
        return [r for r in rows if r.document in seen], [r for r in rows if r.document not in seen]
    last: dict[int, int] = {}
    for i, row in enumerate(rows):
        if key(row) in known:
            last[row.document] = i + 1  # the row after may have been read in part
    read = [row for i, row in enumerate(rows) if i <= last.get(row.document, -1)]
    return read, [row for i, row in enumerate(rows) if i > last.get(row.document, -1)]


def _own_rows(dictionary: ITDA, cfg: dict[str, Any], tokenizer: Any, special_tokens: bool) -> list[Row]:
    """The rows that the dictionary was built on, from where it says they are; none if they are not there any more."""
    if not cfg.get("hash") or not isinstance(cfg.get("data"), str):
        return []
    settings = {name: cfg[name] for name in (*CUT, "revision") if cfg.get(name) is not None}
    try:
        stream = TokenStream(cfg["data"], tokenizer, **settings)
        return _read_before(dictionary, cfg, stream, 0, special_tokens)[0]
    except InputError:
        return []


def _read_before(
    dictionary: ITDA, cfg: dict[str, Any], stream: TokenStream, wanted: int, special_tokens: bool
) -> tuple[list[Row], list[Row]]:
    """The rows that the dictionary has read, if `stream` begins with these, and so many tokens of those after them.

    The hash that a dictionary has of its stream is that after one of its groups of rows, or at the end of the text.
    """
    until, group = cfg.get("hash"), int(dictionary.cfg.get("batch_rows") or 1)
    own_special = bool(dictionary.cfg.get("special_tokens"))
    budget = int(dictionary.cfg.get("tokens") or 0)
    rows: list[Row] = []
    so_far, count, after, end = StreamHash(), 0, 0, None
    for row in stream:
        rows.append(row)
        here = int(valid(row, special_tokens).sum())
        if end is not None or until is None:
            after += here
        else:
            so_far.update(row)
            count += int(valid(row, own_special).sum())
            if so_far.hexdigest() == until:
                end = len(rows)
            elif count > budget + group * len(row.ids) + 2 * stream.context_length * group:  # other text
                until, after = None, count
        if (end is not None or until is None) and after >= wanted and _next_document(rows):
            break
    if end is None and until is not None and so_far.hexdigest() == until:
        end = len(rows)
    return (rows[:end], rows[end:]) if end else ([], rows)


def _next_document(rows: list[Row]) -> bool:
    """Whether more than one document has been seen among the rows, or there are so many that it does not matter."""
    return len(rows) > 1 and (rows[-1].document != rows[-2].document or len(rows) > 100_000)


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
