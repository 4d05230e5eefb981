"""What is in a dictionary, what one of its atoms is, and which atoms a token has."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy import ndarray

from itda.arguments import WHOLE, checks
from itda.dictionary.itda import ITDA
from itda.dictionary.usual import massive_atoms, sampled_uses, usual_norm
from itda.errors import InputError, shortened
from itda.labels import Labels
from itda.provenance import is_number
from itda.report import drawing, drawing_uses, kept_uses
from itda.report.drawing import SHOWN
from itda.results import Report

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

BINS = 12
MATCHES = ("token", "in token", "part of it")  # how an atom's token has to do with what was looked for


@dataclass(frozen=True, repr=False)
class Summary(Report):
    """What is in a dictionary; made by `summary`."""

    n_atoms: int
    d: int
    k: int
    cfg: dict[str, Any]
    sample: dict[str, Any] | None  # tokens, l0, share_alive: of the atoms, those that are used in the sample
    norms: dict[str, float]  # quantiles of the atoms' norms before they were normalised
    losses: dict[str, float]  # of their admission losses
    moved: dict[str, float] | None  # of refined atoms, quantiles of the cosine with the activation of their label
    most_used: list[dict[str, Any]]  # atom, uses in the sample, norm, loss, label, massive
    first: list[dict[str, Any]]  # the first atoms, of every row of text the first as long as there are rows
    massive: dict[str, Any]  # atoms whose |x| is beyond five times the usual_norm, the median of the sample

    @property
    def threshold(self) -> str | None:
        """Of admission; from the lowest to the highest where it was moved to meet a number of atoms."""
        last, history = self.cfg.get("threshold"), self.cfg.get("thresholds")
        if not is_number(last):
            return None
        pairs = [pair for pair in history if isinstance(pair, list | tuple)] if isinstance(history, list) else []
        tried = [value for pair in pairs for value in pair[1:] if is_number(value)]
        ends = [f"{end:.4g}" for end in (min([*tried, last]), max([*tried, last]))]
        return " to ".join(dict.fromkeys(ends))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        return drawing.summary(self, options)


@dataclass(frozen=True, repr=False)
class AtomReport(Report):
    """One atom: what it is and where the sample uses it; made by `atom_report`."""

    atom: int
    n_atoms: int
    label: dict[str, Any]
    norm: float
    massive: bool  # whether its |x| is beyond five times the median of the sample
    loss: float
    moved: float | None  # of a refined atom, the cosine with the activation of its label
    sample_tokens: int
    uses: int  # tokens of the sample that it is used for
    negative: int  # of these, with a negative coefficient
    histogram: dict[str, list]  # edges (bins + 1) and counts (bins) of its coefficients
    positive_tokens: list[dict[str, Any]]  # coefficient and label, the largest first
    negative_tokens: list[dict[str, Any]]  # the most negative first
    seen: dict[str, Any] | None = None  # what `itda uses` has kept of it (`itda.report.kept_uses.seen`)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from drawing.atom_report(self, options)
        if self.seen is not None:
            yield from drawing_uses.seen(self, options)


@dataclass(frozen=True, repr=False)
class Found(Report):
    """The atoms of a token or a word; made by `find`."""

    text: str
    n_atoms: int  # of the dictionary
    atoms: list[dict[str, Any]]  # atom, match (token, in token, part of it), uses in the sample, norm, loss, label
    contexts: list[dict[str, Any]] | None = None  # atoms whose kept examples are on it or near it (`itda.Uses.find`)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from drawing.found(self, options)
        if self.contexts is not None:
            yield from drawing_uses.contexts(self, options)


# -- making them ------------------------------------------------------------------------------------------------------


def summary(dictionary: ITDA | str | os.PathLike) -> Summary:
    """What is in a dictionary: where it comes from, how good it is on its sample, and some of its atoms."""
    dictionary = ITDA.of(dictionary)
    n, uses, sample = dictionary.n_atoms, sampled_uses(dictionary), None
    most: ndarray = np.zeros(0, np.int64)
    if uses is not None and dictionary.sample is not None:
        codes = dictionary.sample.codes
        most = np.argsort(-uses, kind="stable")[:SHOWN]
        most = most[uses[most] > 0]
        l0 = float(codes.l0().double().mean()) if len(codes.values) else math.nan
        alive = float((uses > 0).mean()) if n else math.nan
        sample = {"tokens": len(codes.values), "l0": l0, "share_alive": alive}

    return Summary(
        n_atoms=n,
        d=dictionary.d,
        k=dictionary.k,
        cfg=dictionary.cfg,
        sample=sample,
        norms=_quantiles(dictionary.norms.numpy()),
        losses=_quantiles(dictionary.losses.numpy()),
        moved=None if dictionary.moved is None else _quantiles(dictionary.moved.numpy()),
        most_used=_flagged(dictionary, [_listed(dictionary, uses, i) for i in most.tolist()]),
        first=_flagged(dictionary, [_listed(dictionary, uses, i) for i in _first(dictionary.labels)]),
        massive={"atoms": sum(massive_atoms(dictionary, [*range(n)])), "usual_norm": usual_norm(dictionary)},
    )


def find(dictionary: ITDA | str | os.PathLike, text: str) -> Found:
    """The atoms whose token is `text`, has it in it, or is a part of it where it stands, upper and lower case alike.

    They come in this order (`match`), since tokenizers cut words: of "whale", " wh" and "ale" are found where they
    follow each other. Of each kind the most used in the sample come first. A token without text (`<token 17>`) is found
    by its whole name only. Where `itda uses` has kept examples beside it, those atoms come too that are used on the
    text or near it. Raises `InputError` for a dictionary whose labels have no text at all.
    """
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"`text` (`--find`) is {shortened(text)}: pass some characters of the token to find.")
    path, dictionary = dictionary, ITDA.of(dictionary)
    uses, wanted, labels = sampled_uses(dictionary), text.strip().casefold(), dictionary.labels
    spelt = (labels.row >= 0) & (labels.end > labels.start)
    matches = {i: kind for i in range(len(labels)) if (kind := _match(labels, i, wanted, bool(spelt[i])))}
    if not matches and len(labels) and not spelt.any():
        raise InputError(
            f"The labels of {dictionary!r} have no text, as it was built on plain activations: name an atom by its "
            "number, with `atom_report` (`--atom`)."
        )
    found = sorted(matches, key=lambda i: (MATCHES.index(matches[i]), 0 if uses is None else -uses[i]))
    listed = [{"match": matches[i], **_listed(dictionary, uses, i)} for i in found]
    kept = kept_uses.of_folder(path, dictionary)
    contexts = None if kept is None else _flagged(dictionary, kept.find(text))
    return Found(text, dictionary.n_atoms, _flagged(dictionary, listed), contexts)


def _match(labels: Labels, i: int, wanted: str, spelt: bool) -> str | None:
    """How token `i` has to do with the text `wanted`, which is in lower case; None if it has not."""
    before, token, after = (part.casefold() for part in labels.context(i, len(wanted), len(wanted)))
    if token.strip() == wanted:
        return "token"
    if not spelt or wanted in token:
        return "in token" if spelt else None
    around, first = before + token + after, max(0, len(before) - len(wanted) + 1)
    place = around.find(wanted, first)  # the first that reaches into the token
    begin = len(before) + len(token) - len(token.lstrip())  # a blank in front is no part of a word
    return "part of it" if 0 <= place < len(before) + len(token) and place + len(wanted) > begin else None


@checks(atom=WHOLE, top=WHOLE, bins=WHOLE)
def atom_report(dictionary: ITDA | str | os.PathLike, atom: int, *, top: int = SHOWN, bins: int = BINS) -> AtomReport:
    """What atom number `atom` is, and in the sample the histogram of its coefficients and its `top` tokens by sign.

    Where `itda uses` has kept them beside it, also what it does over many more tokens, and what it promotes.
    """
    path, dictionary = dictionary, ITDA.of(dictionary)
    n, sample = dictionary.n_atoms, dictionary.sample
    if not 0 <= atom < n:
        raise InputError(f"`atom` is {atom}, but this ITDA has the atoms 0 to {n - 1}: choose one of them.")
    rows, values = np.zeros(0, np.int64), np.zeros(0, np.float32)
    sampled = Labels.counted(0, 0) if sample is None else sample.labels
    if sample is not None:
        used = (sample.codes.indices == atom) & (sample.codes.values != 0)
        rows, values = used.nonzero()[:, 0].numpy(), sample.codes.values[used].numpy()
    order = np.argsort(-values, kind="stable")
    kept = kept_uses.of_folder(path, dictionary)
    counts, edges = np.histogram(values, bins) if len(values) and bins else (np.zeros(0, int), np.zeros(0))

    def tokens(places: ndarray) -> list[dict[str, Any]]:
        return [{"coefficient": float(values[i]), "label": sampled.describe(int(rows[i]))} for i in places]

    return AtomReport(
        atom=atom,
        n_atoms=n,
        label=dictionary.labels.describe(atom),
        norm=float(dictionary.norms[atom]),
        massive=massive_atoms(dictionary, [atom])[0],
        loss=float(dictionary.losses[atom]),
        moved=None if dictionary.moved is None else float(dictionary.moved[atom]),
        sample_tokens=len(sampled),
        uses=len(values),
        negative=int((values < 0).sum()),
        histogram={"edges": edges.tolist(), "counts": counts.tolist()},
        positive_tokens=tokens(order[values[order] > 0][:top]),
        negative_tokens=tokens(order[::-1][values[order[::-1]] < 0][:top]),
        seen=None if kept is None else kept_uses.seen(kept, dictionary, atom, top),
    )


def _first(labels: Labels) -> list[int]:
    """The first atom of each of the first rows; of few rows, the first of all atoms beside these."""
    by_row = set(np.sort(np.unique(labels.prompt, return_index=True)[1])[:SHOWN].tolist())
    others = (i for i in range(len(labels)) if i not in by_row)
    return sorted([*by_row, *islice(others, SHOWN - len(by_row))])


def _listed(dictionary: ITDA, uses: ndarray | None, i: int) -> dict[str, Any]:
    """What a list says of atom `i`."""
    used = None if uses is None else int(uses[i])
    numbers = {"atom": i, "uses": used, "norm": float(dictionary.norms[i]), "loss": float(dictionary.losses[i])}
    return numbers | {"label": dictionary.labels.describe(i)}


def _flagged(dictionary: ITDA, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a list, each with whether its atom is a massive token."""
    massive = massive_atoms(dictionary, [row["atom"] for row in rows])
    return [{**row, "massive": flag} for row, flag in zip(rows, massive, strict=True)]


def _quantiles(values: ndarray) -> dict[str, float]:
    names = {"min": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "max": 1.0}
    known = values[np.isfinite(values)]
    return {name: float(np.quantile(known, q)) if len(known) else math.nan for name, q in names.items()}
