"""`Uses`: what a dictionary's atoms do, as it is kept beside the dictionary and read again (docs/format.md)."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from itda.arguments import PATH, TEXT, checks
from itda.beside import USES, USES_FORMAT, USES_MANIFEST, USES_TABLES, content_hash
from itda.dictionary.itda import ITDA
from itda.disk import as_input_error, checked_path, read_sealed, small_file
from itda.errors import InputError, counted, shortened
from itda.results import Report, finite
from itda.usage import columns
from itda.usage.seen import BINS, PLACES, edges

VERSION = 1
LARGEST = 5  # in place of an interval: one of the largest
BEFORE, AFTER = 60, 30  # characters around a token that count as its context
SCHEMAS = dict(
    zip(USES_TABLES, (columns.ATOMS, columns.SIGNS, columns.EXAMPLES, columns.TEXTS, columns.TOKENS), strict=True)
)


@dataclass(frozen=True, repr=False)
class Uses(Report):
    """What each of n atoms does, with coefficients above 0 (index 0 of an axis of 2) and below (index 1).

    Made by `itda.uses`, read by `Uses.load`. An atom is `up` and `down` to tokens as it stands; where its coefficient
    is negative they change places.
    """

    path: Path
    about: dict[str, Any]  # the manifest
    count: Int[ndarray, "n 2"]  # tokens that use it
    histogram: Int[ndarray, "n 2 bins"]  # of |coefficient|, in the bins between `edges`
    positions: Int[ndarray, "n 2 places"]  # tokens that use it at position 0, 1, 2 to 3, 4 to 7, ...
    nearest: Int[ndarray, "n most"]  # the atoms of the largest |cosine|, and that
    cosine: Float[ndarray, "n most"]
    together: Int[ndarray, "n 2 others"]  # 2 atom + negative, -1 for none, the most telling first
    together_tokens: Int[ndarray, "n 2 others"]  # of those sampled, at which both are used
    lift: Float[ndarray, "n 2 others"]  # how much more often than by chance
    up: Int[ndarray, "n top"]  # tokens that the atom raises, the most first; none without a lens
    up_logit: Float[ndarray, "n top"]  # above the mean of all tokens
    down: Int[ndarray, "n top"]
    down_logit: Float[ndarray, "n top"]
    tokens_text: dict[int, str]  # the tokens in `up` and `down`
    _examples: dict[str, ndarray]
    _texts: Any

    # -- reading ------------------------------------------------------------------------------------------------------

    @classmethod
    @checks(path=PATH)
    def load(cls, path: str | os.PathLike, dictionary: ITDA | None = None) -> Uses:
        """The uses in the dictionary's folder `path`, every file checked; of `dictionary`, if it was loaded already.

        Raises `InputError` where there are none, for damaged ones, and for those of another dictionary than is there.
        """
        folder = Path(checked_path(path)) / USES
        if not (folder / USES_MANIFEST).is_file():
            raise InputError(f"{path} has no uses of its atoms: `itda uses {path} DATA` makes them.")
        with as_input_error(f"{folder} could not be read", "run `itda uses` again"):
            about = _manifest(folder)
            data = {name: _checked(folder / name, about["files"][name]) for name in USES_TABLES}
        current = content_hash(ITDA.load(path) if dictionary is None else dictionary)
        if about["dictionary"]["sha256"] != current:
            raise InputError(
                f"The uses in {folder} are of another dictionary than is there now: run `itda uses {path} DATA "
                "--overwrite`."
            )
        return cls.of_tables(folder, about, {n: columns.read(folder / n, SCHEMAS[n], d) for n, d in data.items()})

    @classmethod
    def exist(cls, path: str | os.PathLike) -> bool:
        """Whether there are any in the dictionary's folder `path`."""
        return (Path(path) / USES / USES_MANIFEST).is_file()

    @classmethod
    def of_tables(cls, folder: Path, about: dict[str, Any], found: dict[str, Any]) -> Uses:
        """What the tables say; `InputError` where they do not fit one another."""
        atoms, signs, examples, texts, tokens = (found[name] for name in USES_TABLES)
        n = about["dictionary"]["n_atoms"]
        own = {name: columns.padded(atoms[name]) for name in columns.ATOMS}
        both = {name: columns.padded(signs[name]) for name in columns.SIGNS if name != "count"}
        sizes = both["histogram"].shape[1] == BINS and both["positions"].shape[1] == PLACES
        if len(atoms) != n or len(signs) != 2 * n or (n and not sizes):
            raise columns.damaged(folder / USES_MANIFEST, "does not fit the tables beside it")
        flat = {name: examples[name].to_numpy() for name in columns.EXAMPLES}
        within = all(
            ((low <= flat[name]) & (flat[name] < high)).all()
            for name, low, high in (("atom", 0, n), ("text", 0, len(texts)), ("interval", 0, LARGEST + 1))
        )
        if not within or (both["together"] >= 2 * n).any() or (own["nearest"] >= max(n, 1)).any():
            raise columns.damaged(folder / USES_TABLES[2], "points at what is not there")
        spelt = dict(zip(tokens["token_id"].to_pylist(), tokens["text"].to_pylist(), strict=True))
        return cls(
            path=folder,
            about=about,
            count=signs["count"].to_numpy().reshape(n, 2),
            **{name: values.reshape(n, 2, -1) for name, values in both.items()},
            **own,
            tokens_text=spelt,
            _examples=flat,
            _texts=texts,
        )

    # -- asking -------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.count)

    @property
    def tokens(self) -> int:
        """How many tokens the counts are of."""
        return int(self.about["tokens"])

    @property
    def density(self) -> Float[ndarray, "n 2"]:
        """The share of tokens that use each atom, by sign."""
        return self.count / max(1, self.tokens)

    @property
    def edges(self) -> Float[ndarray, " edges"]:
        """The edges of the histogram's bins; the first bin has all that is smaller too, the last all that is larger."""
        return edges(self.about["lowest"])

    @cached_property
    def position_tokens(self) -> Int[ndarray, " places"]:
        """How many tokens stand at position 0, 1, 2 to 3, 4 to 7, ..."""
        return np.array(self.about["positions"], np.int64)

    @cached_property
    def _begins(self) -> Int[ndarray, " keys"]:
        key = 2 * self._examples["atom"].astype(np.int64) + (self._examples["sign"] < 0)
        return np.searchsorted(key, np.arange(2 * len(self) + 1))

    def examples(self, atom: int, negative: bool = False) -> list[dict[str, Any]]:
        """Tokens that use an atom with this sign: the largest first, then those of the strongest fifth to the weakest.

        Each has `interval` (5: one of the largest of all; 4 to 0: drawn from that fifth of its uses), `coefficient`,
        `text`, the number of its row of text in `row_of`, and `label`, as `Labels.describe` has it.
        """
        key = 2 * atom + negative
        return [self._example(i) for i in range(*self._begins[[key, key + 1]].tolist())]

    def points(self, atom: int, negative: bool = False) -> list[tuple[int, float, int, int]]:
        """The same examples, each as interval, coefficient, text and position alone, which is far quicker."""
        key = 2 * atom + negative
        some = slice(*self._begins[[key, key + 1]].tolist())
        columns = (self._examples[name][some].tolist() for name in ("interval", "value", "text", "position"))
        return list(zip(*columns, strict=True))

    @property
    def n_texts(self) -> int:
        """How many rows of text there are."""
        return len(self._texts)

    def _example(self, i: int) -> dict[str, Any]:
        text, position = int(self._examples["text"][i]), int(self._examples["position"][i])
        said = {"interval": int(self._examples["interval"][i]), "coefficient": float(self._examples["value"][i])}
        return said | {"text": text, "label": self.label(text, position)}

    def row_of(self, text: int) -> dict[str, Any]:
        """Row `text` of the texts: prompt, document, text_start, text; position, token_id, start, end of its tokens.

        `start` and `end` are characters of its text, -1 for none.
        """
        return {name: self._texts[name][text].as_py() for name in columns.TEXTS}

    def label(self, text: int, position: int) -> dict[str, Any]:
        """The token at `position` of a text, with what stands around it, as `Labels.describe` has it."""
        row = self.row_of(text)
        place = row["position"].index(position)
        start, end = max(0, row["start"][place]), max(0, row["end"][place])
        token = row["text"][start:end] if end > start else f"<token {row['token_id'][place]}>"
        numbers = {"prompt": row["prompt"], "position": position, "token_id": row["token_id"][place]}
        around = {"before": row["text"][max(0, start - 240) : start], "token": token}
        return numbers | {"document": row["document"], **around, "after": row["text"][end : end + 120]}

    def promoted(self, atom: int, negative: bool = False) -> dict[str, list[dict[str, Any]]]:
        """The tokens that an atom with this sign raises (`up`) and lowers (`down`): token_id, token, logit."""
        ends = {"up": (self.up, self.up_logit), "down": (self.down, self.down_logit)}
        if negative:
            ends = {"up": ends["down"], "down": ends["up"]}
        sign = -1 if negative else 1
        return {
            name: [
                {"token_id": int(t), "token": self.tokens_text.get(int(t), f"<token {t}>"), "logit": sign * float(v)}
                for t, v in zip(ids[atom], logits[atom], strict=True)
            ]
            for name, (ids, logits) in ends.items()
        }

    @checks(text=TEXT)
    def find(self, text: str) -> list[dict[str, Any]]:
        """The atoms that are used on a token of `text`, or within its context, by the examples; upper and lower alike.

        Dicts of atom, negative, match ("used on it", "near it"), examples (how many), and the strongest of them; those
        used on it first, and then by how many.
        """
        if not text.strip():
            raise InputError(f"`text` is {shortened(text)}: pass some characters to find.")
        found: dict[tuple[int, bool], dict[str, list[int]]] = {}
        for example, on_it in self._matches(text.strip()):
            key = int(self._examples["atom"][example]), bool(self._examples["sign"][example] < 0)
            found.setdefault(key, {"used on it": [], "near it": []})["used on it" if on_it else "near it"].append(
                example
            )
        rows = []
        for (atom, negative), kinds in found.items():
            match = "used on it" if kinds["used on it"] else "near it"
            strongest = max(kinds[match], key=lambda i: (abs(self._examples["value"][i]), -i))
            said = {"atom": atom, "negative": negative, "match": match, "examples": len(kinds[match])}
            rows.append(said | {"example": self._example(strongest)})
        return sorted(rows, key=lambda row: (row["match"] == "near it", -row["examples"], row["atom"], row["negative"]))

    def _matches(self, wanted: str) -> Iterator[tuple[int, bool]]:
        """Examples (each token once) with `wanted` on their token or around it, and whether it is on it."""
        pattern = re.compile(re.escape(wanted), re.IGNORECASE)
        order, texts = self._by_text
        for number, text in enumerate(self._texts["text"].to_pylist()):
            spans = [match.span() for match in pattern.finditer(text)]
            if not spans:
                continue
            row, seen = self.row_of(number), set()
            place = {position: i for i, position in enumerate(row["position"])}
            for example in order[slice(*np.searchsorted(texts, [number, number + 1]))].tolist():
                one = tuple(int(self._examples[name][example]) for name in ("atom", "sign", "position"))
                if one in seen:
                    continue
                seen.add(one)
                start, end = row["start"][place[one[2]]], row["end"][place[one[2]]]
                if any(start < last and first < end for first, last in spans):
                    yield example, True
                elif any(start - BEFORE <= first and last <= end + AFTER for first, last in spans):
                    yield example, False

    @cached_property
    def _by_text(self) -> tuple[ndarray, ndarray]:
        order = np.argsort(self._examples["text"], kind="stable")
        return order, self._examples["text"][order]

    # -- showing ------------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """The manifest, and what the counts come to; the rest is in the files."""
        used = int((self.count.sum(1) > 0).sum())
        more = {"path": str(self.path), "atoms_used": used, "examples": len(self._examples["atom"])}
        return finite(self.about | more | {"texts": len(self._texts)})

    def __str__(self) -> str:
        n, used = len(self), int((self.count.sum(1) > 0).sum())
        size = sum(entry["size"] for entry in self.about["files"].values())
        negative = self.count[:, 1].sum() / max(1, self.count.sum())
        lens = f"; no lens, since {why}" if (why := self.about["no_lens"]) else "; tokens that each atom promotes"
        massive = f", {counted(m, 'massive token')} left out" if (m := self.about["massive"]["left_out"]) else ""
        return (
            f"{self.path}: {counted(self.tokens, 'token')}{massive}, {used:,} of {counted(n, 'atom')} used, L0 "
            f"{self.about['l0']:.1f}, {negative:.0%} of the coefficients negative; "
            f"{counted(len(self._examples['atom']), 'example')} in {counted(len(self._texts), 'row')} of text{lens}; "
            f"{size / 1e6:.1f} MB"
        )

    __repr__ = __str__


def _manifest(folder: Path) -> dict[str, Any]:
    """uses.json, with everything checked that is read again."""
    path = folder / USES_MANIFEST
    foreign = InputError(f'{path} is not of uses ("format": "{USES_FORMAT}"): give the folder of a dictionary.')
    about = read_sealed(small_file(path), (USES_FORMAT, VERSION), partial(columns.damaged, path), foreign, path)
    try:
        own, files = about["dictionary"], about["files"]
        counts = [about["tokens"], about["lowest"] + 200, own["n_atoms"], *about["positions"]]
        counts += [about["massive"]["left_out"], *(entry["size"] for entry in files.values())]
        if not all(type(count) is int and count >= 0 for count in counts) or set(files) != set(USES_TABLES):
            raise ValueError("a count is none")
        if not isinstance(about["l0"], float) or len(about["positions"]) != PLACES:
            raise ValueError("a figure is missing")
        _ = own["sha256"], about["no_lens"], about["settings"], about["model"], about["stream"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise columns.damaged(path, f"does not say what a manifest says ({error})") from error
    return about


def _checked(path: Path, entry: dict[str, Any]) -> bytes:
    """The bytes of a file that are those that the manifest says."""
    if not path.is_file() or path.stat().st_size != entry["size"]:
        raise columns.damaged(path, "is missing or was cut short")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise columns.damaged(path, "was changed after it was written (its sha256 differs)")
    return data
