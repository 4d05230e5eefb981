"""Text or dataset -> token rows in a fixed, hashed order.

The rows depend on the texts, the tokenizer and the settings alone: the same documents give the same rows from a list, a
`.txt`, a `.jsonl`, a `.parquet`, a folder or the Hub. Part of that definition is the *piece*: no document is tokenised
whole, but in pieces that end at the first line end from their character `PIECE` on, or at `2 * PIECE` without one.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import chain, groupby, islice, repeat
from typing import Unpack

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

from itda.errors import InputError
from itda.labels import Labels
from itda.settings import groups, pick, takes, verbs
from itda.text.documents import open_documents
from itda.text.tokenizers import chat, chat_hash, encoder, frame, special_ids, tokenizer_hash

PIECE = 1 << 16  # characters
GROUP = (1024, 1 << 20)  # pieces and characters tokenised in one call, a piece on a core
SHUFFLE_TOKENS = 1 << 21  # the shuffle buffer: 16,384 rows of 128 tokens

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # no UTF-8 form; JSON makes them from "\\ud800"


@dataclass(frozen=True, eq=False, slots=True)
class Row:
    """One prompt. Spans are characters of the document, half-open; -1 for tokens that were put in (BOS, SEP, EOS)."""

    prompt: int  # index of the row in the stream
    document: int  # index of its document in the data's own order (0 if packed)
    ids: Int[ndarray, " length"]
    starts: Int[ndarray, " length"]
    ends: Int[ndarray, " length"]
    special: Bool[ndarray, " length"]  # BOS, EOS and their kind, put in or spelled out in the text; [UNK] is text
    text: str  # of the document, from the first token's start to the last token's end
    text_start: int  # the character of the document at which `text` begins


def valid(row: Row, special_tokens: bool = False) -> Bool[ndarray, " length"]:
    """Which tokens of `row` count: neither special nor at position 0; all of them with `special_tokens=True`."""
    if special_tokens:
        return np.ones(len(row.ids), bool)
    return ~row.special & (np.arange(len(row.ids)) > 0)


class StreamHash:
    """The identity of a token stream: the documents, lengths and ids of its rows, in order.

    It begins as SHA-256 of nothing; a row makes it SHA-256 of (itself, document, length, ids), numbers as little-endian
    int64. `hexdigest` may be asked for at any row, and `StreamHash(digest)` goes on from there: it is the whole state.
    """

    def __init__(self, digest: str | None = None):
        self._digest = bytes.fromhex(digest) if digest else sha256().digest()

    def update(self, row: Row) -> None:
        head = np.array([row.document, len(row.ids)], "<i8").tobytes()
        self._digest = sha256(self._digest + head + row.ids.astype("<i8").tobytes()).digest()

    def hexdigest(self) -> str:
        return self._digest.hex()


def hash_rows(rows: Iterable[Row]) -> str:
    """The `StreamHash` of all `rows`."""
    stream = StreamHash()
    for row in rows:
        stream.update(row)
    return stream.hexdigest()


class TokenStream:
    """The rows of `data`, the same ones in every iteration.

    `data` is the id of a Hub dataset (streamed), a local `.txt` (one document), `.jsonl`, `.json`, `.csv`, `.tsv` or
    `.parquet` (`column` of a record is one document), one of these (not `.parquet`) as `.gz` or `.zst`, what
    `save_to_disk` of `datasets` wrote, a folder of these (sorted by name, hidden files skipped, linked folders read
    once), or a list of strings or records. `split` and `config` select from a Hub dataset, and from a folder by the
    conventions of `datasets`; `data_revision` from a Hub dataset. A column of messages, dicts of `role` and `content`,
    is made text by the tokenizer's chat template.

    A document becomes successive rows of `context_length` tokens, each opened by BOS (else CLS) and closed by SEP where
    the tokenizer has CLS and SEP; both count. `bos` "auto" does so where the tokenizer itself begins a text with that
    token, "always" where it has one, "never" nowhere. A row of text that begins with BOS (or blanks and BOS) or ends in
    SEP itself gets no second one. None is the rule of dictionaries that do not say one: "always", and a second one. The
    last row of a document is as short as it comes.

    `truncate` keeps the first row of each document. `pack` joins all documents that have tokens into one: document 0,
    whose text is theirs with nothing between them, whose spans count its characters, and whose ids have EOS between
    them where the tokenizer has one. `seed` shuffles the rows, holding `SHUFFLE_TOKENS` tokens at a time. Lone
    surrogates are read as U+FFFD, null as an empty document. `provenance` says all this in JSON. What is wrong with
    the input is said at once where it shows at its beginning, else when iteration gets there, in an `InputError`.

    `as_before` reads a folder as it was before splits were told apart (every .txt, .jsonl and .parquet file): for the
    rows of a dictionary that does not say how many files it has read.
    """

    @takes(verbs.TEXT)
    def __init__(self, data, tokenizer, *, as_before: bool = False, **settings: Unpack[verbs.Text]):
        eos = getattr(tokenizer, "eos_token_id", None)
        self.bos: str | None = settings["bos"]
        self.prefix, self.suffix = frame(tokenizer, self.bos)
        least = len(self.prefix) + len(self.suffix) + 1
        self.context_length, self.truncate = settings["context_length"], settings["truncate"]
        self.pack, self.seed = settings["pack"], settings["seed"]
        if self.context_length < least:
            raise InputError(
                f"`context_length` is {self.context_length}, but rows of this tokenizer need at least {least} tokens, "
                f"{least - 1} of them special: pass a larger integer."
            )
        if self.truncate and self.pack:
            raise InputError(
                "`truncate` and `pack` exclude each other (all is one document when packed): pass one of them."
            )
        self._room = self.context_length - least + 1
        self._once = self.bos is not None  # whether what the text has itself is not put in a second time
        self._opening, self._closing = _without_span(self.prefix), _without_span(self.suffix)
        self._between = _without_span([] if eos is None else [eos])
        self._special_ids = np.array(special_ids(tokenizer), np.int64)  # ascending
        self._encode = encoder(tokenizer)
        self._some: tuple[Row, ...] | None = None
        self.tally = Tally()
        source = pick(groups.Source, settings)
        kind, self._documents, revision = open_documents(data, source, chat(tokenizer), as_before)
        about = dict(self._documents.about)
        self.provenance = {
            "kind": kind,
            "data": os.fsdecode(data) if isinstance(data, (str, os.PathLike)) else None,
            "revision": revision,
            "config": about.pop("config"),
            "split": about.pop("split"),
            "column": settings["column"],
            **pick(groups.Rows, settings),
            **pick(groups.Order, settings),
            "tokenizer_hash": tokenizer_hash(tokenizer),
            "prefix": self.prefix,
            "suffix": self.suffix,
            **about,
        }
        if self._documents.chat:
            self.provenance["chat_template"] = chat_hash(tokenizer)

    def of(self, rows: Sequence[Row]) -> TokenStream:
        """Some rows of the stream, as a stream of the same settings that has these alone, numbered as they are."""
        some = copy.copy(self)
        some._some = tuple(rows)
        return some

    def __iter__(self) -> Iterator[Row]:
        if self._some is not None:
            yield from self._some
            return
        rows = self._rows()
        if self.seed is not None:
            rows = _shuffled(rows, self.seed, max(1, SHUFFLE_TOKENS // self.context_length))
        prompt = -1
        for prompt, row in enumerate(rows):
            yield replace(row, prompt=prompt)
        if prompt < 0:
            raise InputError("`data` holds no tokens: every document in it is empty; pass data with text in it.")

    def _rows(self) -> Iterator[Row]:
        """The rows in the data's own order, not yet numbered."""
        self.tally = Tally(getattr(self._documents, "share", None))
        pieces = self._pieces(self.tally)
        for document, own in groupby(self._packed(pieces) if self.pack else pieces, key=lambda piece: piece.document):
            rows = self._cut(document, own)
            yield from islice(rows, 1) if self.truncate else rows

    def _pieces(self, tally: Tally) -> Iterator[_Piece]:
        """The pieces of all documents with their tokens; short documents are tokenised together."""
        group, characters = [], 0
        for document, blocks in enumerate(self._documents()):
            n_tokens = 0
            for start, text in _cut_text(tally.of(blocks)):
                group.append((document, start, text))
                characters += len(text)
                if len(group) < GROUP[0] and characters < GROUP[1]:
                    continue
                pieces, group, characters = self._counted(group, tally), [], 0
                yield from pieces
                n_tokens += sum(len(piece.tokens) for piece in pieces if piece.document == document)
                if self.truncate and n_tokens >= self.context_length:
                    tally.skip()
                    break  # its first row is full: the rest of a large document is not read
        yield from self._counted(group, tally)

    def _counted(self, group: list[tuple[int, int, str]], tally: Tally) -> list[_Piece]:
        pieces = self._tokenised(group)
        tally.add(pieces, self._room if self.truncate else None)
        return pieces

    def _tokenised(self, group: list[tuple[int, int, str]]) -> list[_Piece]:
        tokens = self._encode([text for _, _, text in group]) if group else []
        return [_Piece(*piece, ids + _shift(piece[1])) for piece, ids in zip(group, tokens, strict=True)]

    def _packed(self, pieces: Iterable[_Piece]) -> Iterator[_Piece]:
        """The same pieces as those of one document, with EOS between the tokens of two."""
        document, base, end, held, between, ended = -1, 0, 0, False, False, False
        for piece in pieces:
            if piece.document != document:
                document, base, between = piece.document, end, held
            end = base + piece.start + len(piece.text)
            tokens = piece.tokens + _shift(base)
            if len(tokens):
                same = self._once and between and (ended or tokens[0, 0] in self._between[:, 0])
                ended = tokens[-1, 0] in self._between[:, 0]
                tokens = np.concatenate([self._between, tokens]) if between and not same else tokens
                held, between = True, False
            yield _Piece(0, base + piece.start, piece.text, tokens)

    def _cut(self, document: int, pieces: Iterable[_Piece]) -> Iterator[Row]:
        """The rows of one document."""
        tokens, text, start = self._opening[:0], "", 0  # what is in no row yet, and the character it starts at
        for piece in pieces:
            text, start = (text + piece.text, start) if text else (piece.text, piece.start)
            tokens, at = np.concatenate([tokens, piece.tokens]), 0
            while len(tokens) - at >= (
                room := self._room + len(self._opening) - len(self._put_in(tokens[at:], text, start)[0])
            ):
                yield self._row(document, tokens[at : at + room], text, start)
                at += room
            tokens = tokens[at:]
            first = max(start, _span(tokens, start + len(text))[0])
            text, start = text[first - start :], first
        if len(tokens):
            yield self._row(document, tokens, text, start)

    def _put_in(self, tokens: ndarray, text: str, start: int) -> tuple[ndarray, ndarray]:
        """What opens and closes a row of `tokens`: nothing that they begin, after blanks, or end with themselves."""
        opening, closing = self._opening, self._closing
        if self._once and len(tokens):
            if len(opening) and self._begins(tokens[: self._room + 1], text, start):
                opening = opening[:0]
            closing = closing[: len(closing) - (len(closing) and tokens[-1, 0] == closing[0, 0])]
        return opening, closing

    def _begins(self, tokens: ndarray, text: str, start: int) -> bool:
        """Whether `tokens` of the text from character `start` on have BOS at first, or after nothing but blanks."""
        if not (found := np.flatnonzero(tokens[:, 0] == self._opening[0, 0])).size:
            return False
        before = tokens[: found[0]]
        blanks = len(before) == 0 or text[max(0, before[0, 1] - start) : before[-1, 2] - start].isspace()
        return bool(blanks and (before[:, 1] >= 0).all())

    def _row(self, document: int, tokens: ndarray, text: str, start: int) -> Row:
        """One row of `tokens`; `text` holds theirs and begins at character `start` of the document."""
        first, last = (max(start, character) for character in _span(tokens, start))
        opening, closing = self._put_in(tokens, text, start)
        ids, starts, ends = np.ascontiguousarray(np.concatenate([opening, tokens, closing]).T)
        special = _among(ids, self._special_ids)
        return Row(-1, document, ids, starts, ends, special, text[first - start : last - start], first)


class Tally:
    """What an iteration has read so far, for an estimate of how many tokens there are in all.

    `share` says which part of the data has been read, in bytes; None where that is not known.
    """

    def __init__(self, share: Callable[[], float | None] | None = None) -> None:
        self.share, self.tokens = share, 0
        self._read, self._cut = 0, 0  # characters, and those of them that are in pieces
        self._document, self._kept = -1, 0

    def of(self, blocks: Iterable[str]) -> Iterator[str]:
        """The same blocks, counted."""
        for block in blocks:
            self._read += len(block)
            yield block

    def add(self, pieces: Sequence[_Piece], most: int | None) -> None:
        """Count the tokens of pieces, of each document no more than `most`."""
        for piece in pieces:
            self._cut += len(piece.text)
            if piece.document != self._document:
                self._document, self._kept = piece.document, 0
            new = len(piece.tokens) if most is None else min(len(piece.tokens), most - self._kept)
            self.tokens, self._kept = self.tokens + new, self._kept + new

    def skip(self) -> None:
        """What has come of a document is not cut any further."""
        self._cut = self._read

    @property
    def expected(self) -> float | None:
        """How many tokens of text there are likely to be in all; None where nobody can tell."""
        share = self.share() if self.share and self._cut else None
        return self.tokens / (share * self._cut / self._read) if share else None


@dataclass(frozen=True, slots=True)
class _Piece:
    document: int
    start: int  # its first character in the document
    text: str
    tokens: Int[ndarray, "n 3"]  # id, start and end of each, in characters of the document


def _among(ids: Int[ndarray, " n"], some: Int[ndarray, " m"]) -> Bool[ndarray, " n"]:
    """Which `ids` are among `some`, which ascend: `np.isin`, without sorting thousands of them for every row."""
    if not len(some):
        return np.zeros(len(ids), bool)
    found: Bool[ndarray, " n"] = some[np.searchsorted(some[:-1], ids)] == ids
    return found


def _without_span(ids: list[int]) -> Int[ndarray, "n 3"]:
    return np.array([[token, -1, -1] for token in ids], np.int64).reshape(-1, 3)


def _shift(characters: int) -> Int[ndarray, " 3"]:
    return np.array([0, characters, characters])


def _span(tokens: Int[ndarray, "n 3"], default: int) -> tuple[int, int]:
    """First and last character of `tokens`; `default` twice where none of them has a span."""
    tokens = tokens[tokens[:, 1] >= 0]
    return (int(tokens[0, 1]), int(tokens[:, 2].max())) if len(tokens) else (default, default)


def _cut_text(blocks: Iterable[str]) -> Iterator[tuple[int, str]]:
    """The pieces of a document with the character each begins at, however the document came in blocks."""
    start, text = 0, ""
    for block in blocks:
        text, at = text + _LONE_SURROGATE.sub("\ufffd", block), 0
        while end := _piece_end(text, at):
            yield start + at, text[at:end]
            at = end
        start, text = start + at, text[at:]
    if text:
        yield start, text


def _piece_end(text: str, at: int) -> int:
    """Where the piece that begins at `at` ends; 0 if that takes more text to say."""
    last = at + 2 * PIECE
    return text.find("\n", at + PIECE - 1, last) + 1 or (last if len(text) >= last else 0)


def _shuffled(rows: Iterable[Row], seed: int, size: int) -> Iterator[Row]:
    """`rows` in a random order, `size` of them held. Raw bits, since NumPy promises these alone never to change."""
    bits, held = np.random.PCG64(seed), []
    for row in chain(rows, repeat(None)):
        if row is not None:
            held.append(row)
        if not held:
            return
        if row is None or len(held) > size:
            i = bits.random_raw() % len(held)
            held[i], held[-1] = held[-1], held[i]
            yield held.pop()


def row_labels(row: Row) -> Labels:
    """Those of all tokens of a row, without text."""
    length = len(row.ids)
    prompt, document, nothing = (np.full(length, number) for number in (row.prompt, row.document, -1))
    ids, starts, ends = (np.asarray(values, np.int64) for values in (row.ids, row.starts, row.ends))
    return Labels(prompt, np.arange(length), ids, document, starts, ends, nothing)
