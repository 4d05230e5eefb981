"""What a person sees: one activation decomposed, what is in a dictionary, what one of its atoms is.

Each report has `to_json()`, plain values, and is drawn by `rich.print`. Texts come from models and data, so nothing in
them is taken for markup, and no control character of theirs reaches the terminal.
"""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import asdict, dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy import ndarray

from itda import drawing
from itda.drawing import SHOWN, short
from itda.errors import InputError, shortened
from itda.folder import is_number, section
from itda.labels import Labels
from itda.model import ITDA
from itda.pursuit import METHODS, MOST_STEPS, encode
from itda.pursuit.gram import Gram

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

BINS = 12
ENDLESS = 1 << 20  # tokens in a row of a model without a limit


@dataclass(frozen=True)
class Report:
    """What the reports have in common: `print` shows what the command line does, `to_json` holds all of it."""

    def __str__(self) -> str:
        return drawing.text(self)

    __repr__ = __str__

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        return finite(asdict(self))


@dataclass(frozen=True, repr=False)
class Decomposition(Report):
    """One activation as a sparse sum of atoms; made by `decompose`.

    `atoms` are dicts, one per atom in the order of first choice: atom, coefficient (its steps added up), share (of the
    activation's energy |x - mean|^2 that its steps explained), cumulative, and label (as `Labels` has it).
    """

    model: str
    hook_point: str
    text: str
    tokens: list[str]  # all but the special ones
    token: int  # which of them
    position: int  # its place in the row, special tokens counted
    start: int  # its first character in the text
    end: int  # and the one after its last
    norm: float  # |x|
    from_mean: float  # |x - mean|; |x| of a dictionary without a mean
    k: int
    method: str
    relative_error: float  # |x - x_hat|^2 / |x - mean|^2
    atoms: list[dict[str, Any]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        return drawing.decomposition(self, options)


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
    most_used: list[dict[str, Any]]  # atom, uses in the sample, norm, loss, label
    first: list[dict[str, Any]]

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
    loss: float
    moved: float | None  # of a refined atom, the cosine with the activation of its label
    sample_tokens: int
    uses: int  # tokens of the sample that it is used for
    negative: int  # of these, with a negative coefficient
    histogram: dict[str, list]  # edges (bins + 1) and counts (bins) of its coefficients
    positive_tokens: list[dict[str, Any]]  # coefficient and label, the largest first
    negative_tokens: list[dict[str, Any]]  # the most negative first

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        return drawing.atom_report(self, options)


@dataclass(frozen=True, repr=False)
class Found(Report):
    """The atoms of a token; made by `find`."""

    text: str
    n_atoms: int  # of the dictionary
    atoms: list[dict[str, Any]]  # atom, uses in the sample, norm, loss, label

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        return drawing.found(self, options)


# -- making them ------------------------------------------------------------------------------------------------------


def decompose(
    dictionary: ITDA | str | os.PathLike,
    text: str,
    token: int | str = -1,
    *,
    model: Any = None,
    tokenizer: Any = None,
    k: int | None = None,
    method: str | None = None,
    force: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> Decomposition:
    """Write the activation at one token of `text` as a sum of atoms (the paper's Figure 1 and Table 6).

    `token` counts the tokens of `text` that are not special (-1 is the last), or is the text of one, of which the last
    is taken. The model is the one that the dictionary was built on, or `model`, by name or loaded; `k` and `method`
    are the dictionary's unless given. An atom's share is that of its steps: |r|^2 before less |r|^2 after, over
    |x - mean|^2, where r is what the earlier steps left.

    Raises `InputError` for a model or tokenizer that is not the dictionary's (unless `force`), and for a text that
    does not fit into one row of the model.
    """
    dictionary = load(dictionary)
    how: dict[str, Any] = dict(force=force, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    hooked, hook = hooked_for(dictionary, model, tokenizer, **how)
    row = _row(text, hooked)
    places = np.flatnonzero(~row.special)
    spans = np.stack([row.starts, row.ends], axis=1)[places] - row.text_start
    tokens = [row.text[start:end] for start, end in spans.clip(0)]
    which = _which(tokens, token)
    x = hooked.read(row.ids[None], np.ones_like(row.ids[None]))[hook][0, places[which]].double().cpu()
    if not bool(torch.isfinite(x).all()):
        raise InputError(f"The activation of {tokens[which]!r} is not finite: use a wider `dtype`, such as 'float32'.")
    k = dictionary.k if k is None else k
    method = dictionary.cfg.get("method", "mp") if method is None else method
    rest = x if dictionary.mean is None else x - dictionary.mean.double()
    atoms, relative_error = _pursued(dictionary, rest, k, method)
    return Decomposition(
        model=str(hooked.provenance(hook)["id"]),
        hook_point=hook,
        text=text,
        tokens=tokens,
        token=which,
        position=int(places[which]),
        start=int(row.starts[places[which]]),
        end=int(row.ends[places[which]]),
        norm=float(x.norm()),
        from_mean=float(rest.norm()),
        k=k,
        method=method,
        relative_error=relative_error,
        atoms=atoms,
    )


def summary(dictionary: ITDA | str | os.PathLike) -> Summary:
    """What is in a dictionary: where it comes from, how good it is on its sample, and some of its atoms."""
    dictionary = load(dictionary)
    n, uses, sample = dictionary.n_atoms, _uses(dictionary), None
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
        most_used=[_listed(dictionary, uses, i) for i in most.tolist()],
        first=[_listed(dictionary, uses, i) for i in range(min(n, SHOWN))],
    )


def find(dictionary: ITDA | str | os.PathLike, text: str) -> Found:
    """The atoms whose token has `text` in it, upper and lower case alike; those that are this token alone come first.

    Of these, and of the others, the most used in the sample come first. A token without text (`<token 17>`) is found by
    its whole name only. Raises `InputError` for a dictionary whose labels have no text at all.
    """
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"`text` (`--find`) is {shortened(text)}: pass some characters of the token to find.")
    dictionary = load(dictionary)
    uses, wanted, labels = _uses(dictionary), text.strip().casefold(), dictionary.labels
    tokens = [labels.token(i).casefold() for i in range(len(labels))]
    spelt = (labels.row >= 0) & (labels.end > labels.start)
    found = [i for i, t in enumerate(tokens) if wanted == t.strip() or (spelt[i] and text.casefold() in t)]
    if not found and len(labels) and not spelt.any():
        raise InputError(
            f"The labels of {dictionary!r} have no text, as it was built on plain activations: name an atom by its "
            "number, with `atom_report` (`--atom`)."
        )
    found.sort(key=lambda i: (tokens[i].strip() != wanted, 0 if uses is None else -uses[i]))
    return Found(text, dictionary.n_atoms, [_listed(dictionary, uses, i) for i in found])


def atom_report(dictionary: ITDA | str | os.PathLike, atom: int, *, top: int = SHOWN, bins: int = BINS) -> AtomReport:
    """What atom number `atom` is, and in the sample the histogram of its coefficients and its `top` tokens by sign."""
    dictionary = load(dictionary)
    n, sample = dictionary.n_atoms, dictionary.sample
    if not 0 <= atom < n:
        raise InputError(f"`atom` is {atom}, but this ITDA has the atoms 0 to {n - 1}: choose one of them.")
    rows, values = np.zeros(0, np.int64), np.zeros(0, np.float32)
    sampled = Labels.counted(0, 0) if sample is None else sample.labels
    if sample is not None:
        used = (sample.codes.indices == atom) & (sample.codes.values != 0)
        rows, values = used.nonzero()[:, 0].numpy(), sample.codes.values[used].numpy()
    order = np.argsort(-values, kind="stable")
    counts, edges = np.histogram(values, bins) if len(values) and bins else (np.zeros(0, int), np.zeros(0))

    def tokens(places: ndarray) -> list[dict[str, Any]]:
        return [{"coefficient": float(values[i]), "label": _label(sampled, int(rows[i]))} for i in places]

    return AtomReport(
        atom=atom,
        n_atoms=n,
        label=_label(dictionary.labels, atom),
        norm=float(dictionary.norms[atom]),
        loss=float(dictionary.losses[atom]),
        moved=None if dictionary.moved is None else float(dictionary.moved[atom]),
        sample_tokens=len(sampled),
        uses=len(values),
        negative=int((values < 0).sum()),
        histogram={"edges": edges.tolist(), "counts": counts.tolist()},
        positive_tokens=tokens(order[values[order] > 0][:top]),
        negative_tokens=tokens(order[::-1][values[order[::-1]] < 0][:top]),
    )


def _uses(dictionary: ITDA) -> ndarray | None:
    """How many tokens of the sample use each atom; None without a sample."""
    if dictionary.sample is None:
        return None
    codes, n = dictionary.sample.codes, dictionary.n_atoms
    return np.bincount(codes.indices[codes.values != 0].numpy(), minlength=n)[:n]


def _listed(dictionary: ITDA, uses: ndarray | None, i: int) -> dict[str, Any]:
    """What a list says of atom `i`."""
    used = None if uses is None else int(uses[i])
    numbers = {"atom": i, "uses": used, "norm": float(dictionary.norms[i]), "loss": float(dictionary.losses[i])}
    return numbers | {"label": _label(dictionary.labels, i)}


def load(dictionary: ITDA | str | os.PathLike) -> ITDA:
    """The dictionary itself, or that of a folder or a hub repository; on the CPU, where reports are made."""
    return dictionary.to("cpu") if isinstance(dictionary, ITDA) else ITDA.from_pretrained(dictionary)


def finite(value: Any) -> Any:
    """`value` with None for every number that is not finite, as JSON wants it."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _pursued(dictionary: ITDA, x: torch.Tensor, k: int, method: str) -> tuple[list[dict[str, Any]], float]:
    """The atoms of the pursuit of `x` (d,) float64, steps of one atom put together, and the relative error."""
    if not isinstance(k, int) or not 1 <= k <= MOST_STEPS:
        raise InputError(f"`k` is {shortened(k)}: pass a whole number of pursuit steps, 1 to {MOST_STEPS:,}.")
    if method not in tuple(METHODS):
        raise InputError(f"`method` is {shortened(method)}; choose one of {', '.join(map(repr, METHODS))}.")
    gram = Gram(dictionary.atoms, max_bytes=0)
    (steps,) = encode(x.float()[None], gram, k, method, dictionary.cfg.get("nonneg", False))
    taken = steps.coefficients[0] != 0
    chosen, coefficients = steps.indices[0][taken], steps.coefficients[0][taken].double()
    spent = (coefficients[:, None] * dictionary.atoms[chosen].double()).cumsum(0)
    energy = torch.cat([x[None], x - spent]).square().sum(1)
    shares = -energy.diff() / energy[0] if len(chosen) else energy[:0]
    parts: dict[int, dict[str, Any]] = {}
    for atom, coefficient, share in zip(chosen.tolist(), coefficients.tolist(), shares.tolist(), strict=True):
        new = {"atom": atom, "coefficient": 0.0, "share": 0.0, "cumulative": 0.0}
        part = parts.setdefault(atom, new | {"label": _label(dictionary.labels, atom)})
        part["coefficient"] += coefficient
        part["share"] += share
    for part, total in zip(parts.values(), itertools.accumulate(p["share"] for p in parts.values()), strict=True):
        part["cumulative"] = total
    return list(parts.values()), float(energy[-1] / energy[0]) if energy[0] else 0.0


def hooked_for(
    dictionary: ITDA,
    model: Any = None,
    tokenizer: Any = None,
    *,
    force: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    head: bool = False,
) -> tuple[Any, str]:
    """The model to read, and the name of its hook point, after comparing it with the one the dictionary knows.

    With `head` it is the whole language model, where it is one. Raises `InputError` for another model unless `force`.
    """
    from itda import hooks

    was = section(dictionary.cfg, "model")
    if not was.get("hook_point") or (model is None and not was.get("id")):
        raise InputError(
            f"{dictionary!r} does not say which model it was built on, so it reads no text: use its `encode` on "
            "activations."
        )
    by_name = model is None or isinstance(model, str | os.PathLike)
    settings: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code}
    if by_name:
        settings |= {"dtype": dtype or was.get("dtype") or "auto", "revision": None if model else was.get("revision")}
    try:
        name = was["id"] if model is None else model
        loader = hooks.language_model if head else hooks.load
        hooked = loader(name, tokenizer, hooks=was["hook_point"], **settings)
    except InputError as error:
        if model is not None:
            raise
        advice = "name the place of the model with `model` (`--model`)"
        raise InputError(f"The model of this ITDA cannot be loaded ({str(error).rstrip('.')}): {advice}.") from error
    hook = hooked.hook_points[0]
    now = hooked.provenance(hook)
    named = {"fingerprint": "weights", "quantization": "quantisation", "tokenizer_hash": "tokenizer", "d": "width d"}
    if was.get("remote"):
        del named["fingerprint"]  # of which nothing was known
    differ = differences(was, now, named)
    if differ and (not force or was.get("d") != now["d"]):
        raise InputError(
            f"This ITDA was built on a model that differs from `{now['id']}` in its {' and its '.join(differ)}: give "
            "that model, or take this one all the same with `force` (`--force`)."
        )
    return hooked, hook


def differences(was: dict[str, Any], now: dict[str, Any], named: dict[str, str]) -> list[str]:
    """What two models are said to be, where it is not the same; `named` is what to call the keys."""
    return [
        f"{what} ({short(was.get(key))}, not {short(now.get(key))})"
        for key, what in named.items()
        if was.get(key) != now.get(key)
    ]


def _row(text: str, hooked):
    """`text` as one row of a token stream."""
    from itda.prompts import TokenStream

    if not isinstance(text, str) or not text:
        raise InputError(f"`text` is {shortened(text)}: pass some words.")
    limit = hooked.max_length or ENDLESS
    rows = list(itertools.islice(TokenStream([text], hooked.tokenizer, context_length=limit), 2))
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


def _label(labels: Labels, i: int) -> dict[str, Any]:
    before, token, after = labels.context(i)
    numbers = {name: int(getattr(labels, name)[i]) for name in ("prompt", "position", "token_id", "document")}
    return numbers | {"before": before, "token": token, "after": after}


def _quantiles(values: ndarray) -> dict[str, float]:
    names = {"min": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "max": 1.0}
    known = values[np.isfinite(values)]
    return {name: float(np.quantile(known, q)) if len(known) else math.nan for name, q in names.items()}
