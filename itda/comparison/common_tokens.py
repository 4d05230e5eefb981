"""Several models read the same text: which tokens they have in common, and what each of them makes of these.

Models with one tokenizer see the same rows, so their tokens are compared as (prompt, position). With different
tokenizers a token is known by where it ends, (document, character), and the tokens in common are those whose end is
one for all tokenizers: there, every model has read the same characters of the document, as far as its row reaches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from itda.arguments import places_of
from itda.devices import free_bytes
from itda.errors import InputError, counted, shortened
from itda.labels import Batch, Labels
from itda.models.hooked_model import HookedModel
from itda.models.hub import load_tokenizer, place_of
from itda.models.loading import load_model, untrained
from itda.progress import reporter, stage
from itda.reading.activations import activations
from itda.results import named, told_apart
from itda.settings import groups, pick, takes, verbs
from itda.text.prompts import Row, TokenStream, row_labels, valid
from itda.text.tokenizers import tokenizer_hash


@dataclass(frozen=True, repr=False)
class Reading:
    """What one model makes of the tokens in common; made by `read`.

    `activations` has (tokens, d) float32 by hook point, on the CPU, in the order of the forward pass; rows are the same
    tokens for all models that were read together, in the stream order of the first. `labels` say what those tokens are
    in this model's stream. `valid` counts the tokens its stream had, common or not.
    """

    name: str
    activations: Mapping[str, Float[Tensor, "tokens d"]]
    labels: Labels
    valid: int
    provenance: dict[str, dict]
    n_layers: int | None = None  # blocks of the model, read or not
    known: tuple[Any, torch.dtype] | None = None  # the model's tokenizer, and the type of its numbers

    def __repr__(self) -> str:
        return f"Reading({self.name}, {counted(len(self), 'token')} at {counted(len(self.activations), 'hook point')})"

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def share(self) -> float:
        """Of the valid tokens that this model's tokenizer made, the share that all models have."""
        return len(self) / self.valid

    @property
    def hook_points(self) -> tuple[str, ...]:
        """Canonical names of the hook points."""
        return tuple(self.activations)

    @property
    def layers(self) -> list[int | None]:
        """The block of each hook point; None where it is in none, or that is not known."""
        return [self.provenance.get(hook, {}).get("model", {}).get("layer") for hook in self.activations]

    def batch(self, hook: str) -> Batch:
        """All activations at `hook` with their labels, as `itda.build` takes them."""
        return Batch(self.activations[hook], self.labels)


@takes(verbs.READ_ALL)
def read(
    models: Sequence[Any],
    data: Any,
    *,
    random_weights: int | None = None,
    known: Sequence[tuple[Any, torch.dtype] | None] | None = None,
    **settings: Unpack[verbs.ReadAll],
) -> list[Reading]:
    """Read `data` with every one of `models`, each in one pass over the text, and keep the tokens in common.

    `models` are hub ids, folders, or what `itda.load_model` returned; each is loaded, read and released in turn, at
    every block's residual stream if no place is given. With `align` tokens are compared by (document, character end)
    rather than by (prompt, position); None does so where tokenizers differ. `random_weights` is a seed: read models of
    the same configs that were never trained, as a control; `known` is what the readings of the trained ones know of
    them, so that these are read by the same tokenizers and in numbers of the same type.

    Raises `InputError` for different tokenizers with `align=False`, for models without a token in common, and where
    the activations would not fit into memory.
    """
    layer, hook, tokens = settings["layer"], settings["hook"], settings["tokens"]
    wanted, _ = places_of(layer, hook)
    if not wanted and (layer, hook) != (None, None):
        raise InputError("No hook point is given: pass at least one layer or module path, or none to read all blocks.")
    names = _checked(models, settings["names"])
    report = reporter(settings["progress"])
    stage(report, "tokenising the text")
    known = [None] * len(models) if known is None else known
    tokenizers = [
        before[0] if before else m.tokenizer if isinstance(m, HookedModel) else load_tokenizer(m)
        for m, before in zip(models, known, strict=True)
    ]
    streams = _streams(data, tokenizers, pick(verbs.Text, settings))
    where_common = _common(streams, tokens, settings["special_tokens"], settings["align"], names)
    how: dict[str, Any] = dict(tokens=tokens, **pick(groups.Batches, settings), **pick(groups.Special, settings))
    loading: dict[str, Any] = pick(groups.Device, settings)
    readings = []
    for i, (model, name) in enumerate(zip(models, names, strict=True)):
        if random_weights is not None:
            chosen = {name: loading[name] for name in ("device", "trust_remote_code")}
            dtype = before[1] if (before := known[i]) else torch.float32
            model = untrained(model, tokenizers[i], seed=random_weights + i, dtype=dtype, **chosen)
        elif not isinstance(model, HookedModel):
            model = load_model(
                model, tokenizers[i], hooks=wanted or -1, **loading
            )  # all blocks are loaded for the last
        every: Any = {"hook" if layer is None else "layer": wanted} if wanted else {"layer": range(model.n_layers)}
        what = f"reading {name} ({i + 1} of {len(models)})" if len(models) > 1 else f"reading {name}"
        source = activations(model, streams[i], **every, **how)
        read_here = gather(source, where_common[i], len(models) - i, what, report)
        readings.append(Reading(name, *read_here, model.n_layers, (tokenizers[i], model.dtype)))
    report(None)
    return readings


def _checked(models: Sequence[Any], names: Sequence[str] | None) -> list[str]:
    """The names of the models, after every check that needs no model."""
    if isinstance(models, str | Path | HookedModel) or not len(models):
        raise InputError(f"`models` is {shortened(models)}: pass a list of one or more models.")
    for model in models:
        if not isinstance(model, str | Path | HookedModel):
            raise InputError(
                f"A model is of type {type(model).__name__}: pass its id or folder, or load it with `itda.load_model`."
            )
    for model in models:
        if not isinstance(model, HookedModel):
            place_of(str(model))  # says what is wrong with a path before its tokenizer is asked for
    said = [model._layout.model if isinstance(model, HookedModel) else str(model) for model in models]
    return named(names, told_apart(said))


def _streams(data: Any, tokenizers: Sequence[Any], settings: dict[str, Any]) -> list[TokenStream]:
    """The stream of each tokenizer; one and the same for equal ones."""
    streams: dict[str, TokenStream] = {}
    hashes = [tokenizer_hash(tokenizer) for tokenizer in tokenizers]
    for key, tokenizer in zip(hashes, tokenizers, strict=True):
        if key not in streams:
            streams[key] = TokenStream(data, tokenizer, **settings)
    return [streams[key] for key in hashes]


def _common(
    streams: list[TokenStream], tokens: int | None, special_tokens: bool, align: bool | None, names
) -> list[ndarray]:
    """For each model the place that every valid token of its stream has among those in common; -1 if it is not."""
    keys = {id(stream): valid_tokens(stream, tokens, special_tokens)[1] for stream in streams}
    if len(keys) == 1 and not align:
        return [np.arange(len(keys[id(streams[0])]))] * len(streams)
    if align is False:
        a, b = names[0], next(n for n, stream in zip(names, streams, strict=True) if stream is not streams[0])
        raise InputError(
            f"{a} and {b} have different tokenizers, so their rows differ: compare them where tokens end at the same "
            "character with `align=True` (the default)."
        )
    advice = "give more text, or models whose tokenizers are more alike"
    found = dict(zip(keys, in_common(list(keys.values()), " and ".join(names), advice), strict=True))
    return [found[id(stream)] for stream in streams]


def in_common(keys: Sequence[Int[ndarray, " _"]], who: str, advice: str) -> list[Int[ndarray, " _"]]:
    """For each stream, of whose tokens `keys` has the `ends`, the places of these among those that all streams have.

    They are in the order of the first stream; the place of others is -1. Raises `InputError`, that `who` have no such
    token, with `advice`.
    """
    shared = reduce(np.intersect1d, (key[key >= 0] for key in keys))
    if not len(shared):
        raise InputError(f"{who} have no token in common, since none ends at the same character for all: {advice}.")
    in_order = keys[0][np.isin(keys[0], shared)]
    return [places(key, in_order) for key in keys]


def places(keys: Int[ndarray, " n"], among: Int[ndarray, " m"]) -> Int[ndarray, " n"]:
    """Where each of `keys` stands in `among`, which has each once; -1 where it does not."""
    by_key = np.argsort(among)
    at = by_key[np.minimum(np.searchsorted(among, keys, sorter=by_key), len(among) - 1)]
    return np.where(among[at] == keys, at, -1)


def valid_tokens(
    rows: Iterable[Row], tokens: int | None = None, special_tokens: bool = False
) -> tuple[Labels, Int[ndarray, " tokens"]]:
    """Labels, without texts, of the valid tokens of a stream's `rows`, the first `tokens` if given; and their `ends`.

    Raises `InputError` if there is none.
    """
    parts, kept, count, enough = [], [], 0, False
    for row in rows:
        parts.append(row_labels(row))
        kept.append(valid(row, special_tokens))
        count += int(kept[-1].sum())
        if enough:  # one row more, since it may begin with what is left of a character
            break
        enough = tokens is not None and count >= tokens
    if not count:
        raise InputError(
            "`data` holds no valid token, since all are special or first in their rows: give more or longer texts."
        )
    labels, found = Labels.concat(parts), np.flatnonzero(np.concatenate(kept))[:tokens]
    return labels[found], ends(labels)[found]


def ends(labels: Labels) -> Int[ndarray, " tokens"]:
    """(document, end) of each token as one number; -1 for tokens without text, and where a character is not all read.

    Byte-level tokens may hold a part of their last character, which is in their span nevertheless: then the next one
    begins inside it. Of tokens with one end only the last counts.
    """
    key = np.where(labels.end > labels.start, (labels.document << 40) + labels.end, -1)
    now, then = (np.flatnonzero(key >= 0)[part] for part in (slice(None, -1), slice(1, None)))
    inside = (labels.start[then] < labels.end[now]) & (labels.end[now] <= labels.end[then])
    key[now[inside & (labels.document[now] == labels.document[then])]] = -1
    last = np.zeros(len(key), bool)
    last[len(key) - 1 - np.unique(key[::-1], return_index=True)[1]] = True
    return np.where(last, key, -1)


def gather(
    stream: Any, place: Int[ndarray, " valid"], readings: int, what: str, report: Any
) -> tuple[dict[str, Tensor], Labels, int, dict[str, Any]]:
    """Activations by hook point, labels, count and provenance of the tokens that have a `place`, put into it.

    `readings` is how many as large as this one have to fit into memory.
    """
    common, done, told = int((place >= 0).sum()), 0, stage(report, what, len(place))
    read_at: dict[str, Tensor] = {}
    labels: list[Labels] = []
    for item in stream:
        size = len(next(iter(item.values())).activations)
        to = place[done : done + size]
        rows = np.flatnonzero(to >= 0)
        if not read_at:
            _check_room({name: batch.activations.shape[1] for name, batch in item.items()}, common, readings)
            read_at = {name: torch.empty(common, batch.activations.shape[1]) for name, batch in item.items()}
        for name, batch in item.items():
            x = batch.activations[torch.from_numpy(rows).to(batch.activations.device)].float().cpu()
            if not bool(torch.isfinite(x).all()):
                raise InputError(
                    f"An activation at {name} is not finite ({what}): use a wider `dtype`, such as 'float32'."
                )
            read_at[name][torch.from_numpy(to[rows])] = x
        labels.append(next(iter(item.values())).labels[rows])
        done += size
        told(done)
    kept = place[place >= 0]
    order = np.empty_like(kept)
    order[kept] = np.arange(len(kept))
    return read_at, Labels.concat(labels)[order], len(place), stream.provenance


def _check_room(widths: dict[str, int], tokens: int, readings: int) -> None:
    """Refuse at the first batch what would not fit at the last."""
    wanted = 4.0 * tokens * sum(widths.values()) * readings
    free = free_bytes(torch.device("cpu"))
    if wanted > 0.9 * free:
        raise InputError(
            f"{counted(tokens, 'activation')} at {counted(len(widths), 'hook point')} of "
            f"{counted(readings, 'model')} would take {wanted / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free: choose fewer `tokens` or fewer layers."
        )
