"""One activation as a sum of atoms."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import numpy as np
import torch
from jaxtyping import Float64, Int
from numpy import ndarray

from itda.dictionary.itda import ITDA
from itda.dictionary.usual import massive_atoms, share_with_less, usual_norm
from itda.errors import InputError, shortened
from itda.metrics import MASSIVE
from itda.provenance import section
from itda.pursuit import METHODS, MOST_STEPS, encode
from itda.pursuit.gram import Gram
from itda.reading.own_model import model_of
from itda.report import drawing
from itda.results import Report
from itda.settings import takes, verbs
from itda.text.prompts import Row
from itda.text.reread import settings_of

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

SHARED = ("model", "hook_point", "text", "tokens", "usual_norm", "scaled", "k", "method")  # by all tokens of a text
ENDLESS = 1 << 20  # tokens in a row of a model without a limit


@dataclass(frozen=True, repr=False)
class Decomposition(Report):
    """One activation as a sparse sum of atoms; made by `decompose`.

    `atoms` are dicts, one per atom in the order of first choice: atom, coefficient (its steps added up), share (of the
    activation's energy |x - mean|^2 that its steps explained), cumulative, label (as `Labels` has it), massive:
    whether its |x| is beyond five times the median, alone: the product of the activation with it, and corrects: of a
    negative one the earlier atom, with its cosine, that brought most of what it takes back, None where the activation
    itself points away from it. Of a dictionary with a scale, energies have coordinates over that.
    """

    model: str
    hook_point: str
    text: str
    tokens: list[str]  # all but the special ones
    token: int  # which of them
    position: int  # its place in the row, special tokens counted
    in_training: bool  # whether tokens at such a place are among those that the dictionary was built on
    start: int  # its first character in the text
    end: int  # and the one after its last
    norm: float  # |x|
    from_mean: float  # |x - mean|; |x| of a dictionary without a mean
    usual_norm: float  # the median |x| of the dictionary's sample
    massive: bool  # whether |x| is beyond five times that
    scaled: bool  # whether the dictionary has a scale, so that shares and the error are of x - mean over it
    k: int
    method: str
    relative_error: float  # |x - x_hat|^2 / |x - mean|^2
    usual_error: float | None  # the share of sampled tokens with less; None with other settings than the dictionary's
    atoms: list[dict[str, Any]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        return drawing.decomposition(self, options)


@dataclass(frozen=True, repr=False)
class Decompositions(Report):
    """All tokens of some texts as sums of atoms; made by `decompose_all`."""

    texts: list[list[Decomposition]]  # by text and token

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON can hold it; what is the same for all tokens of a text stands there once."""
        texts = []
        for tokens in self.texts:
            every = [token.to_json() for token in tokens]
            said = {name: every[0][name] for name in SHARED}
            texts.append(said | {"decompositions": [{n: v for n, v in e.items() if n not in SHARED} for e in every]})
        return {"texts": texts}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        return drawing.decompositions(self, options)


@takes(verbs.DECOMPOSE)
def decompose(
    dictionary: ITDA | str | os.PathLike, text: str, token: int | str = -1, **settings: Unpack[verbs.Decompose]
) -> Decomposition:
    """Write the activation at one token of `text` as a sum of atoms (the paper's Figure 1 and Table 6).

    `token` counts the tokens of `text` that are not special (-1 is the last), or is the text of one, of which the last
    is taken. The model is the one that the dictionary was built on, or `model`, by name or loaded; `k`, `method` and
    `nonneg` are the dictionary's unless given. An atom's share is that of its steps: |r|^2 before less |r|^2 after,
    over |x - mean|^2, where r is what the earlier steps left.

    Raises `InputError` for a model or tokenizer that is not the dictionary's (unless `force`), and for a text that
    does not fit into one row of the model.
    """
    _check_text(text)
    reader = _Reader(ITDA.of(dictionary), settings)
    row = reader.row(text)
    which = _which(row.tokens, token)
    return reader.at(row, which, reader.read(row))


@takes(verbs.DECOMPOSE)
def decompose_all(
    dictionary: ITDA | str | os.PathLike, texts: str | Sequence[str], **settings: Unpack[verbs.Decompose]
) -> Decompositions:
    """Write every token of one or several texts as a sum of atoms, special tokens left out; the model is loaded once.

    What is said of each token is what `decompose` says of it, which takes the same settings and raises the same.
    """
    given = [texts] if isinstance(texts, str) else texts
    if isinstance(given, bytes) or not isinstance(given, Sequence) or not given:
        raise InputError(f"`texts` is {shortened(texts)}: pass a text or a list of texts.")
    for text in given:
        _check_text(text)
    reader = _Reader(ITDA.of(dictionary), settings)
    found = []
    for row in [reader.row(text) for text in given]:
        x = reader.read(row)
        found.append([reader.at(row, which, x) for which in range(len(row.tokens))])
    return Decompositions(found)


def _check_text(text: Any) -> None:
    if not isinstance(text, str) or not text:
        raise InputError(f"`text` is {shortened(text)}: pass some words.")


class _Words(NamedTuple):
    """A text as one row of the token stream, and those of its tokens that are not special."""

    text: str
    row: Row
    places: Int[ndarray, " tokens"]  # in the row
    tokens: list[str]


class _Reader:
    """A dictionary with its model and the settings of the pursuit."""

    def __init__(self, dictionary: ITDA, settings: Any) -> None:
        self.dictionary = dictionary
        self.hooked, self.hook = model_of(dictionary.cfg, settings)
        self.bos = settings_of(section(dictionary.cfg, "stream")).get("bos", "auto")
        self.k, self.method = settings["k"] or dictionary.k, settings["method"] or dictionary.method
        self.nonneg = dictionary.nonneg if settings["nonneg"] is None else settings["nonneg"]
        self.usual, self.model = usual_norm(dictionary), str(self.hooked.provenance(self.hook)["id"])

    def row(self, text: str) -> _Words:
        """The row of a text; `InputError` for one that is too long, or of special tokens alone."""
        row = _row(text, self.hooked, self.bos)
        places = np.flatnonzero(~row.special)
        spans = np.stack([row.starts, row.ends], axis=1)[places] - row.text_start
        return _Words(text, row, places, [row.text[start:end] for start, end in spans.clip(0)])

    def read(self, words: _Words) -> Float64[torch.Tensor, "tokens d"]:
        """The activations at the tokens that are not special."""
        ids = words.row.ids[None]
        return self.hooked.read(ids, np.ones_like(ids))[self.hook][0, words.places].double().cpu()

    def at(self, words: _Words, which: int, every: Float64[torch.Tensor, "tokens d"]) -> Decomposition:
        """What the activation of token `which` is made of."""
        return _decomposed(self, words, which, every[which])


def _decomposed(reader: _Reader, words: _Words, which: int, x: Float64[torch.Tensor, " d"]) -> Decomposition:
    dictionary, row, places, tokens = reader.dictionary, words.row, words.places, words.tokens
    if not bool(torch.isfinite(x).all()):
        raise InputError(f"The activation of {tokens[which]!r} is not finite: use a wider `dtype`, such as 'float32'.")
    k, method, nonneg = reader.k, reader.method, reader.nonneg
    rest, norm, usual = dictionary.standardised(x), float(x.norm()), reader.usual
    atoms, relative_error = _pursued(dictionary, rest, k, method, nonneg)
    own = (dictionary.k, dictionary.method, dictionary.nonneg)
    less = None
    if (k, method, bool(nonneg)) == own:
        spent = (part["coefficient"] * dictionary.atoms[part["atom"]].double() for part in atoms)
        less = share_with_less(dictionary, rest, sum(spent, torch.zeros_like(rest)))
    return Decomposition(
        model=reader.model,
        hook_point=reader.hook,
        text=words.text,
        tokens=tokens,
        token=which,
        position=int(places[which]),
        in_training=int(places[which]) > 0 or bool(dictionary.cfg.get("special_tokens")),
        start=int(row.starts[places[which]]),
        end=int(row.ends[places[which]]),
        norm=norm,
        from_mean=norm if dictionary.mean is None else float((x - dictionary.mean.double()).norm()),
        usual_norm=usual,
        massive=norm > MASSIVE * usual,
        scaled=dictionary.scale is not None,
        k=k,
        method=method,
        relative_error=relative_error,
        usual_error=less,
        atoms=atoms,
    )


def _pursued(
    dictionary: ITDA, x: torch.Tensor, k: int, method: str, nonneg: bool = False
) -> tuple[list[dict[str, Any]], float]:
    """The atoms of the pursuit of `x` (d,) float64, steps of one atom put together, and the relative error."""
    if not isinstance(k, int) or not 1 <= k <= MOST_STEPS:
        raise InputError(f"`k` is {shortened(k)}: pass a whole number of pursuit steps, 1 to {MOST_STEPS:,}.")
    if method not in tuple(METHODS):
        raise InputError(f"`method` is {shortened(method)}; choose one of {', '.join(map(repr, METHODS))}.")
    gram = Gram(dictionary.atoms, max_bytes=0)
    (steps,) = encode(x.float()[None], gram, k, method, nonneg)
    taken = steps.coefficients[0] != 0
    chosen, coefficients = steps.indices[0][taken], steps.coefficients[0][taken].double()
    spent = (coefficients[:, None] * dictionary.atoms[chosen].double()).cumsum(0)
    energy = torch.cat([x[None], x - spent]).square().sum(1)
    shares = -energy.diff() / energy[0] if len(chosen) else energy[:0]
    parts: dict[int, dict[str, Any]] = {}
    for atom, coefficient, share in zip(chosen.tolist(), coefficients.tolist(), shares.tolist(), strict=True):
        new = {"atom": atom, "coefficient": 0.0, "share": 0.0, "cumulative": 0.0}
        part = parts.setdefault(atom, new | {"label": dictionary.labels.describe(atom)})
        part["coefficient"] += coefficient
        part["share"] += share
    for part, total in zip(parts.values(), itertools.accumulate(p["share"] for p in parts.values()), strict=True):
        part["cumulative"] = total
    _explain(dictionary, x, list(parts.values()))
    for part, massive in zip(parts.values(), massive_atoms(dictionary, [*parts]), strict=True):
        part["massive"] = massive
    return list(parts.values()), float(energy[-1] / energy[0]) if energy[0] else 0.0


def _explain(dictionary: ITDA, x: torch.Tensor, parts: list[dict[str, Any]]) -> None:
    """Say of each part its `alone`, <x, d_j>, and of negative ones which earlier atom they correct, if any does.

    That is the atom i before it of the largest a_i <d_i, d_j>, unless x itself is further from d_j than that.
    """
    atoms = dictionary.atoms[[part["atom"] for part in parts]].double()
    alone, cosines = (atoms @ x).tolist(), atoms @ atoms.T
    brought = torch.tensor([part["coefficient"] for part in parts], dtype=torch.float64)[:, None] * cosines
    for j, part in enumerate(parts):
        part["alone"], part["corrects"] = alone[j], None
        if part["coefficient"] < 0 and j:
            i = int(brought[:j, j].argmax())
            if brought[i, j] > max(0.0, -alone[j]):
                part["corrects"] = {"atom": parts[i]["atom"], "cosine": float(cosines[i, j])}


def _row(text: str, hooked, bos: Any):
    """`text` as one row of a token stream, opened as the dictionary's rows were."""
    from itda.text.prompts import TokenStream

    limit = hooked.max_length or ENDLESS
    rows = list(itertools.islice(TokenStream([text], hooked.tokenizer, context_length=limit, bos=bos), 2))
    if len(rows) > 1:
        raise InputError(f"`text` has more tokens than the {limit} that the model has positions for: shorten it.")
    if rows[0].special.all():
        raise InputError("`text` has special tokens only: pass some words.")
    return rows[0]


def _which(tokens: list[str], token: int | str) -> int:
    """The number of the token that is meant."""
    there = ", ".join(f"{i} {t!r}" for i, t in enumerate(tokens[:40])) + (", ..." if len(tokens) > 40 else "")
    if isinstance(token, str):
        same = [i for i, t in enumerate(tokens) if t == token]
        same = same or [i for i, t in enumerate(tokens) if t.strip() and t.strip() == token.strip()]
        if same:
            return same[-1]
        if spelt := _spelt(tokens, token.strip()):
            there = f"{there}; it is spelt by those from {spelt[0]} to {spelt[1]}"
    elif isinstance(token, Integral) and -len(tokens) <= token < len(tokens):
        return int(token) % len(tokens)
    raise InputError(f"`token` is {token!r}, which is no token of the text: name one by number or text, of {there}.")


def _spelt(tokens: list[str], word: str) -> tuple[int, int] | None:
    """The last tokens, from the first to the last of them, that `word` is made of."""
    for first in reversed(range(len(tokens))):
        for last in range(first + 1, min(len(tokens), first + len(word))):
            if "".join(tokens[first : last + 1]).strip() == word:
                return first, last
    return None
