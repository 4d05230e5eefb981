"""What the pages of a dictionary show, as small files of script: an index, shards of atoms, texts, contexts.

A page that is opened from disk may read no files, but may add scripts. So each file calls `itda.data` with its name and
what it says. It is ASCII, whatever is in the texts, so that no server and no character can make it anything else.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterator
from typing import Any

import numpy as np

from itda._version import __version__
from itda.dictionary.itda import ITDA
from itda.dictionary.usual import massive_atoms, sampled_uses
from itda.results import finite
from itda.usage.kept import Uses

SHARD = 256  # atoms in a file
FIGURES = ("n_atoms", "k", "l0", "fvu", "fvu_robust", "relative_error", "cosine", "alive", "negative")
BEFORE, AFTER = 60, 60  # characters around a label's token in the index


def script(name: str, said: Any) -> bytes:
    """The file of script that hands over `said` as `name`."""
    text = json.dumps(finite(said), separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return f"itda.data({json.dumps(name)},{text});\n".encode("ascii")


def files(dictionary: ITDA, uses: Uses | None, evaluation: dict[str, Any] | None) -> Iterator[tuple[str, bytes]]:
    """The files of the folder `data`, name and bytes, one after the other."""
    n = len(dictionary)
    massive = massive_atoms(dictionary, [*range(n)])
    yield "index.js", script("index", _index(dictionary, uses, evaluation, massive))
    texts = None if uses is None else Texts(uses)
    for first in range(0, n, SHARD):
        name = f"atoms-{first // SHARD:03d}"
        atoms = [_atom(dictionary, uses, texts, atom) for atom in range(first, min(n, first + SHARD))]
        yield f"{name}.js", script(name, atoms)
    if texts is not None:
        yield "texts.js", script("texts", texts.all)
        yield "contexts.js", script("contexts", texts.contexts())


def _index(dictionary: ITDA, uses: Uses | None, evaluation: Any, massive: list[bool]) -> dict[str, Any]:
    """What the overview shows, and of every atom what the list and the search need."""
    labels, n = dictionary.labels, len(dictionary)
    around = [labels.context(i, BEFORE, AFTER) for i in range(n)]
    counts = sampled_uses(dictionary)
    seen = None
    if uses is not None:
        about = {name: uses.about[name] for name in ("tokens", "l0", "no_lens", "sampled", "stream")}
        about |= {"massive_left_out": uses.about["massive"]["left_out"], "edges": uses.edges.tolist()}
        seen = about | {"positions": uses.position_tokens.tolist()}
    return {
        "version": __version__,
        "shard": SHARD,
        "n_atoms": n,
        "d": dictionary.d,
        "k": dictionary.k,
        "cfg": dictionary.cfg,
        "evaluation": None if evaluation is None else _evaluated(evaluation),
        "uses": seen,
        "before": [before for before, _, _ in around],
        "token": [token for _, token, _ in around],
        "after": [after for _, _, after in around],
        "spelt": ((labels.row >= 0) & (labels.end > labels.start)).astype(int).tolist(),
        "norm": [_short(norm) for norm in dictionary.norms.tolist()],
        "massive": np.flatnonzero(massive).tolist(),
        "sampled": None if counts is None else counts.tolist(),
        "positive": None if uses is None else uses.count[:, 0].tolist(),
        "negative": None if uses is None else uses.count[:, 1].tolist(),
    }


def _evaluated(report: dict[str, Any]) -> dict[str, Any]:
    """What the overview shows of what `itda eval` measured: the verdict, and some figures of every system."""
    systems = {}
    for name, system in report["systems"].items():
        figures = {figure: system[figure] for figure in FIGURES if isinstance(system.get(figure), int | float)}
        ce = system.get("ce")
        score = ce.get("score") if isinstance(ce, dict) else None
        systems[name] = figures | ({"ce_score": score} if isinstance(score, int | float) else {})
    verdict, held = report.get("verdict"), report["held_out"]
    data = held.get("data") if isinstance(held, dict) else None
    said = {"verdict": verdict if isinstance(verdict, str) else None, "tokens": report.get("tokens")}
    return said | {"data": data if isinstance(data, str) else None, "systems": systems}


def _atom(dictionary: ITDA, uses: Uses | None, texts: Texts | None, atom: int) -> dict[str, Any]:
    """Everything about one atom; keys are 2 atom + (1 below 0), as those of the uses are."""
    said: dict[str, Any] = {"label": dictionary.labels.describe(atom), "loss": _short(float(dictionary.losses[atom]))}
    if dictionary.moved is not None:
        said["moved"] = _short(float(dictionary.moved[atom]))
    if uses is None or texts is None:
        return said
    near = zip(uses.nearest[atom].tolist(), uses.cosine[atom].tolist(), strict=True)
    said["nearest"] = [[other, _short(cosine)] for other, cosine in near if other >= 0]
    promoted = uses.promoted(atom)
    for end in ("up", "down"):
        said[end] = [[token["token"], _short(token["logit"])] for token in promoted[end]]
    said["signs"] = [_sign(uses, texts, atom, negative) for negative in (False, True)]
    return said


def _sign(uses: Uses, texts: Texts, atom: int, negative: bool) -> dict[str, Any]:
    at = atom, int(negative)
    beside = zip(uses.together[at].tolist(), uses.together_tokens[at].tolist(), uses.lift[at].tolist(), strict=True)
    histogram = uses.histogram[at]
    used = np.flatnonzero(histogram)
    first, last = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)
    return {
        "first": first,  # bin of the histogram that has any
        "histogram": histogram[first:last].tolist(),
        "positions": uses.positions[at].tolist(),
        "together": [[key, tokens, _short(lift)] for key, tokens, lift in beside if key >= 0],
        "examples": [
            [interval, _short(coefficient), text, *texts.span(text, position)]
            for interval, coefficient, text, position in uses.points(atom, negative)
        ],
    }


class Texts:
    """The texts of examples, and where their tokens stand, counted as browsers count: in units of UTF-16."""

    def __init__(self, uses: Uses) -> None:
        self.uses = uses
        rows = [uses.row_of(number) for number in range(uses.n_texts)]
        self.all = [row["text"] for row in rows]
        self._spans = [
            {place: span for place, *span in zip(row["position"], row["start"], row["end"], strict=True)}
            for row in rows
        ]
        self._far = [[i for i, character in enumerate(text) if character > "\uffff"] for text in self.all]

    def span(self, text: int, position: int) -> list[int]:
        """Position, start and end of a token in a text; -1 and -1 where it has no text of its own."""
        start, end = self._spans[text][position]
        far = self._far[text]
        return [position, start + bisect_left(far, start), end + bisect_left(far, end)]

    def contexts(self) -> list[list[int]]:
        """Of each text key, start and end of every example in it, each token and sign once; for the search."""
        found: list[dict[tuple[int, int], list[int]]] = [{} for _ in self.all]
        for key in range(2 * len(self.uses)):
            for _, _, text, position in self.uses.points(key // 2, bool(key % 2)):
                found[text][key, position] = [key, *self.span(text, position)[1:]]
        return [[number for _, entry in sorted(one.items()) for number in entry] for one in found]


def _short(value: float) -> float | None:
    """Four digits are as many as anybody reads, and make the files small."""
    return float(f"{value:.4g}") if np.isfinite(value) else None
