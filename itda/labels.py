"""What an atom or a token *is*: prompt, position, token, and where it stands in its document."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from numpy import ndarray
from torch import Tensor

from itda.errors import InputError, counted, one_line

GROUPS = 20  # stretches of text that a bootstrap draws where there are fewer documents
MOST_GROUPS = 200  # and where there are more: neighbouring documents are drawn together


@dataclass(frozen=True, repr=False)
class Labels:
    """Labels of `n` tokens of one token stream, in stream order; every array has shape (n,) and dtype int64.

    `prompt` is the row of the stream, `position` the token's place in the row (0 is the first, often BOS).
    `document` and the half-open span `[start, end)` in characters say where the token stands in its document; they
    are -1 where there is no text (plain arrays). `row` points into `texts`, the text of the rows these tokens came
    from, whose first character is character `text_start[row]` of the document. `stream` is what is known of the token
    stream, as a dictionary's `cfg["stream"]` has it; {} if nothing is.
    """

    prompt: Int[ndarray, " n"]
    position: Int[ndarray, " n"]
    token_id: Int[ndarray, " n"]
    document: Int[ndarray, " n"]
    start: Int[ndarray, " n"]
    end: Int[ndarray, " n"]
    row: Int[ndarray, " n"]
    texts: Sequence[str] = field(default=())
    text_start: Int[ndarray, " rows"] = field(default_factory=lambda: np.zeros(0, np.int64))
    stream: Any = field(default_factory=dict)  # a mapping

    @classmethod
    def counted(cls, start: int, n: int) -> Labels:
        """Labels of `n` tokens without text: prompt 0, and a position that counts tokens from `start`."""
        nothing = np.full(n, -1, np.int64)
        return cls(np.zeros(n, np.int64), np.arange(start, start + n), nothing, nothing, nothing, nothing, nothing)

    def __len__(self) -> int:
        return len(self.prompt)

    def __repr__(self) -> str:
        return f"Labels({counted(len(self), 'token')} of {counted(len(np.unique(self.prompt)), 'prompt')})"

    def __getitem__(self, index) -> Labels:
        """The labels at `index` (a slice, an integer, an array of them or a mask), with only the texts they need."""
        index = [index] if isinstance(index, Integral) else index
        arrays = {name: getattr(self, name)[index] for name in LABEL_ARRAYS}
        kept, row = np.unique(arrays["row"], return_inverse=True)
        if len(kept) and kept[0] < 0:  # tokens without text keep row -1
            kept, row = kept[1:], row - 1
        arrays["row"] = row.reshape(-1).astype(np.int64)
        texts = tuple(self.texts[r] for r in kept)
        return Labels(**arrays, texts=texts, text_start=self.text_start[kept], stream=self.stream)

    @classmethod
    def concat(cls, parts: Iterable[Labels]) -> Labels:
        """All labels of `parts`, in order; what they do not all say of their stream is left out."""
        parts = [part for part in parts if len(part)] or [cls.counted(0, 0)]
        first = parts[0].stream
        alike = all(part.stream is first or part.stream == first for part in parts)
        offsets = np.cumsum([0] + [len(part.texts) for part in parts[:-1]])
        rows = [np.where(part.row < 0, -1, part.row + offset) for part, offset in zip(parts, offsets, strict=True)]
        arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in LABEL_ARRAYS}
        return cls(
            **{**arrays, "row": np.concatenate(rows)},
            texts=tuple(text for part in parts for text in part.texts),
            text_start=np.concatenate([part.text_start for part in parts]),
            stream=first if alike else {},
        )

    def pairs(self) -> Int[ndarray, "n 2"]:
        """(prompt, position) of every label: its identity within the token stream, as rows of an int64 array."""
        return np.stack([self.prompt, self.position], axis=1)

    def __and__(self, other: Labels) -> Labels:
        """The labels that `other` has too, in this order.

        Raises `InputError`, as `-` and `|` do, if both are known to come from different token streams.
        """
        return self[_isin(self, other)]

    def __sub__(self, other: Labels) -> Labels:
        """The labels that `other` does not have, in this order."""
        return self[~_isin(self, other)]

    def __or__(self, other: Labels) -> Labels:
        """These labels, then those of `other` that are new."""
        both = Labels.concat([self, other - self])
        return replace(both, stream=both.stream or self.stream)

    def token(self, i: int) -> str:
        """The text of token `i`; `<token 17>` where it has none of its own (a special token, a plain array)."""
        start, end = self._span(i)
        return self.texts[self.row[i]][start:end] if end > start else f"<token {self.token_id[i]}>"

    def context(self, i: int, before: int = 240, after: int = 120) -> tuple[str, str, str]:
        """The text before token `i`, the token, and the text after it, in its row (at most so many characters)."""
        if self.row[i] < 0:
            return "", self.token(i), ""
        text = self.texts[self.row[i]]
        start, end = self._span(i)
        return text[max(0, start - before) : start], self.token(i), text[end : end + after]

    def describe(self, i: int) -> dict[str, Any]:
        """Label `i` as results have it: prompt, position, token_id, document, and before, token, after of its text."""
        before, token, after = self.context(i)
        numbers = {name: int(getattr(self, name)[i]) for name in ("prompt", "position", "token_id", "document")}
        return numbers | {"before": before, "token": token, "after": after}

    def text(self, i: int, before: int = 60, after: int = 30, marks: tuple[str, str] = ("⟦", "⟧")) -> str:
        """Token `i` in its context on one line, marked: `The quick ⟦brown⟧ fox`."""
        left, token, right = self.context(i, before, after)
        return one_line(left) + marks[0] + one_line(token) + marks[1] + one_line(right)

    def _span(self, i: int) -> tuple[int, int]:
        """The token's span in the text of its row."""
        if self.row[i] < 0:
            return 0, 0
        origin = self.text_start[self.row[i]]
        return max(0, int(self.start[i] - origin)), max(0, int(self.end[i] - origin))


class Batch(NamedTuple):
    """The valid tokens of one group of rows, in stream order: activations (tokens, d) and their labels."""

    activations: Tensor
    labels: Labels


LABEL_ARRAYS = tuple(f.name for f in fields(Labels) if f.name not in ("texts", "text_start", "stream"))
CUT = ("context_length", "truncate", "pack", "seed", "prefix")  # how rows are cut from a text, in a stream's provenance


def check_same_stream(one: Mapping[str, Any], other: Mapping[str, Any], whose: str = "The labels") -> None:
    """Raise `InputError`, naming both, if two token streams, as `Labels.stream` has them, are known to differ.

    Streams with a hash are the same if their hashes are. Without one, of what is still being read, tokenizers and the
    way rows are cut can be compared.
    """
    hashed = one.get("hash") and other.get("hash")
    if hashed and one["hash"] == other["hash"]:
        return
    changed = [name for name in CUT if one.get(name) != other.get(name)]
    advice = "`itda.compare` aligns them if it is given the text (`data`, on the command line `--data TEXT`)"
    if not hashed and not (one.get("tokenizer_hash") and other.get("tokenizer_hash")):
        return
    if one.get("tokenizer_hash") != other.get("tokenizer_hash"):
        what = "made by different tokenizers"
    elif changed:
        what = f"cut differently ({changed[0]})"
    elif hashed:
        what, advice = "of different text, or of more of it", "train both on the same data and number of tokens"
    else:
        return
    raise InputError(
        f"{whose} come from token streams {what}, {_brief(one)} and {_brief(other)}, so that one prompt and position "
        f"is another token in each: {advice}."
    )


def _brief(stream: Mapping[str, Any]) -> str:
    hashed = f" ({stream['hash'][:8]})" if stream.get("hash") else ""
    return f"{stream.get('data') or stream.get('kind') or 'texts'}{hashed}"


def _isin(a: Labels, b: Any) -> ndarray:
    if not isinstance(b, Labels):
        raise InputError(f"Labels go together with labels, and a {type(b).__name__} came: pass those of a dictionary.")
    check_same_stream(a.stream, b.stream)
    kind = [("prompt", np.int64), ("position", np.int64)]
    left, right = (np.ascontiguousarray(labels.pairs()).view(kind).reshape(-1) for labels in (a, b))
    return np.isin(left, right)


def groups_of(labels: Labels) -> Int[ndarray, " tokens"]:
    """The group of each token: its document, or where there are few, one of `GROUPS` equal stretches of the text.

    Neighbouring tokens are alike, so a bootstrap that drew single ones would be too sure of itself.
    """
    if len(np.unique(labels.document)) >= GROUPS:
        return grouped(labels.document)
    group = np.empty(len(labels), np.int64)
    group[np.lexsort((labels.start, labels.document))] = np.arange(len(labels)) * GROUPS // len(labels)
    return group


def grouped(documents: Int[ndarray, " tokens"]) -> Int[ndarray, " tokens"]:
    """The group of tokens of each of the `documents`, by number: one for each, but no more than `MOST_GROUPS`."""
    ids, number = np.unique(documents, return_inverse=True)
    return number.reshape(-1).astype(np.int64) * min(MOST_GROUPS, len(ids)) // max(len(ids), 1)
