"""What did fine-tuning change? Two models read the same text: tokens that moved among the others, and atoms.

A token is known here by its direction in the frame of shared atoms: the activations of some tokens, the same ones for
both models, each with its own activations there. The rotation that brings the atoms of one model closest to those of
the other (orthogonal Procrustes) makes codes of two models comparable, whatever their basis, width or scale. The change
of a token is the distance of its two unit codes, and its score is how far that exceeds what else changes it: a third
model, another fine-tune of the base on neutral text (the null), at that very token; or, without one, what is usual at
its position. Differences of sparse codes find far less: which of several alike atoms a pursuit takes is an accident.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from itda.comparison.common_tokens import Reading, read
from itda.comparison.dictionaries import is_dictionary
from itda.comparison.token_changes import NAMES, at_places, compare_atoms, draw_anchors, label, measure
from itda.disk import write_file
from itda.errors import InputError, counted
from itda.labels import Labels
from itda.progress import Step, reporter
from itda.report import diff_page, drawing_comparisons
from itda.results import Report
from itda.settings import pick, takes, verbs

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

ANCHORS = 4096  # shared atoms, unless there are fewer than twice as many tokens
NEIGHBOURS = 3  # shared atoms that a top token is nearest to, of each model


@dataclass(frozen=True, repr=False)
class Diff(Report):
    """What fine-tuning changed; made by `diff`. Lists by layer follow `hook_points`.

    `null` says what scores are held against: kind ("model" or "halves"), name, what it shows, and the 95 and 99 %
    quantiles of what scores would be by chance. `layers` are dicts: hook_point; change (mean and quantiles over tokens,
    between 0 and 2), null_change (of the null model), above (share of tokens beyond the null's 99 %), score, positions
    (mean change by bucket), transfer, threshold and sizes of the dictionaries, rise (by which factor the loss of a
    usual token in base or tuned is larger with the other's atoms), only_tuned and
    only_base (count of new atoms, tokens that they stand for, the most telling atoms; `diff_page.ONLY` says which).
    `pooled` has the quantiles of scores averaged over layers, `positions` the mean change over layers.
    `top` are the tokens of highest score, `rows` the prompts with most of it.
    """

    base: str
    tuned: str
    null: dict[str, Any]
    hook_points: list[str]
    tokens: int
    shares: dict[str, float]  # of each model's valid tokens, those that all models have
    settings: dict[str, Any]  # n_anchors, n_atoms, k, seed
    layers: list[dict[str, Any]]
    pooled: dict[str, Any]
    positions: list[dict[str, Any]]  # first, last, tokens, change, null_change
    top: list[
        dict[str, Any]
    ]  # score, layers (scores), strongest, times, false, label, base and tuned (what it is like)
    rows: list[dict[str, Any]]  # prompt, document, score, pieces: text, score, layers

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        return drawing_comparisons.diff(self, options)

    def html(self) -> str:
        """One self-contained page: the texts with the changed tokens marked, and all tables."""
        return diff_page.html(self.to_json())

    def save_html(self, path: str | os.PathLike) -> None:
        """Write `html()` to the file `path`; raises `InputError` if that cannot be."""
        diff_page.check(path)
        write_file(path, [self.html().encode("utf-8", "replace")])


@takes(verbs.DIFF)
def diff(base: Any, tuned: Any, data: Any, **settings: Unpack[verbs.Diff]) -> Diff:
    """Compare what `base` and `tuned` make of the text `data`, layer by layer (all blocks if no place is given).

    base, tuned  models: hub ids, folders, adapters, or what `itda.load_model` returned
    data         text on which the fine-tune may show: what it was meant for mixed with other text is best
    null         a third model, best another fine-tune of `base` of equal length on neutral text: a token's score is its
                 change less that of the null at the same token, and the null's quantiles are those of its own changes.
                 Without one, both halves of the data measure every token, each with its own shared atoms; this shows
                 which differences are accidents of these, and not which ones any fine-tune would have made
    n_atoms      size of the base's dictionary, met to a tenth by a threshold at each hook point; the tuned model's is
                 built at the same threshold, to whatever size comes
    n_anchors    shared atoms of the codes, drawn at random with `seed`; None for 4,096, or half of the tokens. If they
                 are fewer than the models are wide, only directions that they span are compared
    k            pursuit steps of dictionaries
    top, rows    tokens, and prompts, that are reported

    With tokenizers that differ, the tokens in common are compared. Raises `InputError` for settings out of range.
    """
    null = settings["null"]
    models = [base, tuned] if null is None else [base, tuned, null]
    for model in models:
        if is_dictionary(model):
            raise InputError(
                f"{model} is a dictionary, and `diff` reads models: give these, or compare dictionaries with `compare`."
            )
    tokens, n_atoms = settings["tokens"], settings["n_atoms"]
    if tokens is not None and n_atoms > tokens // 2:
        raise InputError(
            f"`n_atoms` is {n_atoms:,}, and at most half of the `tokens` = {tokens:,} can be atoms: give a smaller "
            "`n_atoms` (`--n-atoms`) or more `tokens` (`--tokens`)."
        )
    settings["progress"] = reporter(settings["progress"])  # one bar for all of it
    readings = read(models, data, **pick(verbs.ReadSeveral, settings))
    return of_readings(readings, **pick(verbs.Changed, settings))


@takes(verbs.CHANGED)
def of_readings(readings: Sequence[Reading], **settings: Unpack[verbs.Changed]) -> Diff:
    """`diff` of what was read already: base, tuned and, if there is one, the null, of the same tokens."""
    base, tuned, *null = readings
    hooks, positions = _same_places(readings), base.labels.position
    n_atoms, k, seed, report = settings["n_atoms"], settings["k"], settings["seed"], reporter(settings["progress"])
    n_anchors = _fitting(len(base), settings["n_anchors"], n_atoms)
    anchors = draw_anchors(len(base), n_anchors, seed)
    measured, layers, began = [], [], time.monotonic()
    for i, names in enumerate(hooks):

        def told(part: str, i: int = i, name: str = names[0]) -> None:
            report(Step(f"comparing at {name}: {part}", i, len(hooks), time.monotonic() - began))

        told("changes of tokens")
        measured.append(measure(at_places(readings, names), anchors, positions))
        atoms = compare_atoms(readings, names, n_atoms, k, seed, told)
        layers.append({"hook_point": names[0], **_layer(measured[-1], positions), **atoms})
    report(None)
    pooled = {name: np.mean([m[name] for m in measured], axis=0) for name in measured[0]}
    scores = np.stack([m["score"] for m in measured])
    return Diff(
        base=base.name,
        tuned=tuned.name,
        null=_null(null[0].name if null else None, pooled["noise"]),
        hook_points=[names[0] for names in hooks],
        tokens=len(base),
        shares={name: reading.share for name, reading in zip(NAMES, readings, strict=False)},
        settings={"n_anchors": anchors.size, "n_atoms": n_atoms, "k": k, "seed": seed},
        layers=layers,
        pooled=_quantiles(pooled["score"]) | {"above": _above(pooled["score"], pooled["noise"])},
        positions=_by_position(pooled["change"], pooled.get("null_change"), positions),
        top=_top(readings, hooks, anchors, scores, settings["top"]),
        rows=diff_page.changed_rows(base.labels, scores, settings["rows"]),
    )


def token_scores(
    readings: Sequence[Reading], *, n_anchors: int | None = None, seed: int = 0
) -> Float[ndarray, "layers tokens"]:
    """The scores alone, by layer, of what was read already; their mean over layers is what tokens are ranked by."""
    anchors = draw_anchors(len(readings[0]), _fitting(len(readings[0]), n_anchors), seed)
    places, positions = _same_places(readings), readings[0].labels.position
    return np.stack([measure(at_places(readings, names), anchors, positions)["score"] for names in places])


# -- what is reported -------------------------------------------------------------------------------------------------


def _layer(measured: dict[str, ndarray], positions: Int[ndarray, " tokens"]) -> dict[str, Any]:
    """One hook point's changes: their distribution, that of the null, and where in the rows they are."""
    change, null_change = measured["change"], measured.get("null_change")
    beyond = _above(measured["score"], measured["noise"])
    if null_change is not None:
        beyond = float((change > np.quantile(null_change, 0.99)).mean())
    return {
        "change": _quantiles(change),
        "null_change": None if null_change is None else _quantiles(null_change),
        "above": beyond,
        "score": _quantiles(measured["score"]) | {"null 99 %": float(np.quantile(measured["noise"], 0.99))},
        "positions": _by_position(change, null_change, positions),
    }


def _quantiles(values: Float[ndarray, " tokens"]) -> dict[str, float]:
    names = {"median": 0.5, "95 %": 0.95, "99 %": 0.99, "max": 1.0}
    return {"mean": float(values.mean())} | {name: float(np.quantile(values, q)) for name, q in names.items()}


def _above(score: ndarray, noise: ndarray) -> float:
    """Share of tokens whose score is beyond 99 % of the noise."""
    return float((score > np.quantile(noise, 0.99)).mean())


def _by_position(change: ndarray, null_change: ndarray | None, positions: ndarray) -> list[dict[str, Any]]:
    """Mean change of the tokens at positions 0, 1, 2-3, 4-7, 8-15, and so on."""
    bucket = np.frexp(positions)[1]  # of 0 it is 0, of 2^n to 2^(n+1) - 1 it is n + 1
    out = []
    for b in np.unique(bucket).tolist():
        there = bucket == b
        part = {"first": 2 ** (b - 1) if b else 0, "last": 2**b - 1, "tokens": int(there.sum())}
        part["change"] = float(change[there].mean())
        out.append(part | {"null_change": None if null_change is None else float(null_change[there].mean())})
    return out


def _null(name: str | None, noise: ndarray) -> dict[str, Any]:
    """What the scores are held against, in words and in figures."""
    if name is None:
        shows = (
            "the difference between two sets of shared atoms, one from each half of the data; not what any fine-tune "
        )
        shows += "would change"
    else:
        shows = "these scores with the tuned and the null model exchanged"
    quantiles = {"95 %": float(np.quantile(noise, 0.95)), "99 %": float(np.quantile(noise, 0.99))}
    return {"kind": "halves" if name is None else "model", "name": name, "shows": shows} | quantiles


def _top(
    readings: Sequence[Reading],
    hooks: list[tuple[str, ...]],
    anchors: ndarray,
    scores: Float[ndarray, "layers tokens"],
    n: int,
) -> list[dict[str, Any]]:
    """The `n` tokens of highest score, with what each model likens them to where they changed most.

    `false` estimates, with a null model, which share of the tokens down to this one, or of some longer list, would be
    there were the tuned model another null: as many as score as low. Tokens of rows that begin alike are one, and
    counted (`times`).
    """
    score, anchors, labels = scores.mean(0), anchors.reshape(-1), readings[0].labels
    order, low = np.argsort(-score, kind="stable"), np.sort(-score)
    as_low = len(score) - np.searchsorted(low, score[order])
    false = np.minimum.accumulate(((1 + as_low) / np.arange(1, len(score) + 1))[::-1])[::-1].clip(max=1)
    out: dict[tuple, dict[str, Any]] = {}
    for rank, i in enumerate(order.tolist()):
        which = (int(labels.token_id[i]), int(labels.position[i]), f"{score[i]:.4g}")
        if score[i] <= 0 or (len(out) == n and which not in out):
            break
        if which in out:  # rows that begin alike have the same activations, as far as they do
            out[which]["times"] += 1
            continue
        at = int(scores[:, i].argmax())
        near = [_nearest(r.activations[name], i, anchors) for r, name in zip(readings[:2], hooks[at], strict=False)]
        token = {"score": float(score[i]), "layers": scores[:, i].tolist(), "strongest": hooks[at][0], "times": 1}
        token |= {"false": float(false[rank]) if len(readings) == 3 else None, "label": label(labels, i)}
        out[which] = token | {who: _named(labels, rows) for who, rows in zip(NAMES[:2], near, strict=True)}
    return list(out.values())


def _nearest(x: Float[Tensor, "tokens d"], i: int, anchors: ndarray) -> list[int]:
    """The anchors of the largest cosines to token `i`, itself excepted."""
    others, mean = anchors[anchors != i], x.mean(0)
    cosines = torch.nn.functional.cosine_similarity(x[torch.from_numpy(others)] - mean, x[i] - mean, dim=1)
    return others[cosines.topk(min(NEIGHBOURS, len(others))).indices.numpy()].tolist()


def _named(labels: Labels, rows: list[int]) -> list[dict[str, str]]:
    parts = (labels.context(i, 30, 15) for i in rows)
    return [{"before": before, "token": token, "after": after} for before, token, after in parts]


def _fitting(tokens: int, n_anchors: int | None, n_atoms: int = 1) -> int:
    """How many shared atoms to take, after checking that there are tokens enough for these and for the dictionaries."""
    n_anchors = max(2, min(ANCHORS, tokens // 2)) if n_anchors is None else n_anchors
    if max(n_anchors, n_atoms) > tokens // 2:
        raise InputError(
            f"{'`n_atoms`' if n_atoms >= n_anchors else '`n_anchors`'} is {max(n_atoms, n_anchors)}, but the models "
            f"have {counted(tokens, 'token')} in common: read more `tokens`, or choose at most half as many "
            "as there are."
        )
    return n_anchors


def _same_places(readings: Sequence[Reading]) -> list[tuple[str, ...]]:
    """The hook points side by side; by place in the forward pass, since models may name them differently."""
    counts = {reading.name: len(reading.hook_points) for reading in readings}
    if len(set(counts.values())) > 1:
        raise InputError(
            f"The numbers of hook points are {counts}, which cannot be compared one by one: name with `layer` those "
            "that all have."
        )
    return list(zip(*(reading.hook_points for reading in readings), strict=True))
