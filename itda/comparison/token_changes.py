"""How far every token moved between two models, and which atoms only one of them needs: the measures of a diff."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from itda.comparison.common_tokens import Reading
from itda.dictionary.build import build
from itda.dictionary.itda import ITDA
from itda.labels import Labels
from itda.metrics import concentrated, reconstruction, relative_error, variance
from itda.pursuit import normalize, pursue

NAMES = ("base", "tuned", "null")
SAMPLE = 4096  # tokens that the transfer is measured on
MOST_ATOMS = 20  # that only one model needs and that are listed, per layer
TELLING = 1.5  # times the usual rise of a loss from which on a token counts for one model alone
NEAR = 8  # tokens between one and another that is beside it
TRIES = 12  # thresholds, for a size
ALIKE = 0.7  # cosine of residuals from which on two tokens would be one new atom
CHUNK = 4096  # tokens whose codes are held at a time
ROUNDING = 1e-5  # a change that float32 makes by itself

# -- changes of codes -------------------------------------------------------------------------------------------------


def code_change(
    x: Float[Tensor, "tokens d"], y: Float[Tensor, "tokens e"], anchors: Int[ndarray, " n"]
) -> Float[ndarray, " tokens"]:
    """How far each token moved among the shared atoms: the distance of its two unit codes, between 0 and 2.

    `x` and `y` are what two models make of the same tokens. Both are centred, their rows brought to unit norm, and
    rotated into the frame where the rows at `anchors` agree best: with x_a' y_a = U S V', codes are x U and y V.
    Unchanged by orthogonal maps, translations and positive scale of either.
    """
    if torch.equal(x, y):
        return np.zeros(len(x))
    x, y = (torch.nn.functional.normalize(a.float() - a.float().mean(0), dim=1) for a in (x, y))
    at = torch.from_numpy(anchors)
    u, s, v = torch.linalg.svd(x[at].T @ y[at], full_matrices=False)
    seen = s > s[0] * 1e-6  # beyond the span of the anchors, singular vectors are arbitrary
    parts = zip(x.split(CHUNK), y.split(CHUNK), strict=True)
    moved = [(a @ u[:, seen] - b @ v[seen].T).norm(dim=1) for a, b in parts]
    return torch.cat(moved).double().numpy()


def measure(x: list[Tensor], anchors: Int[ndarray, "2 n"], positions: Int[ndarray, " tokens"]) -> dict[str, ndarray]:
    """Change, score and noise of all tokens at one hook point; `x` of base, tuned and, if there is one, the null.

    With a null, noise is the score with tuned and null exchanged: were the tuned model but another such fine-tune, both
    would be distributed alike. Without one, it is half the difference of what both sets of anchors say, of either sign.
    """
    if len(x) == 3:
        change, null_change = (code_change(x[0], other, anchors.reshape(-1)) for other in x[1:])
        score = change / _usual(change) - null_change / _usual(null_change)
        return {"change": change, "null_change": null_change, "score": score, "noise": -score}
    halves = [code_change(x[0], x[1], half) for half in anchors]
    change = np.sqrt((halves[0] ** 2 + halves[1] ** 2) / 2)
    usual = _usual_at(change, positions)
    scale = np.maximum(usual, _usual(change) / 2)
    noise = (halves[0] - halves[1]) / scale / 2
    return {"change": change, "score": (change - usual) / scale, "noise": np.concatenate([noise, -noise])}


def _usual(change: Float[ndarray, " tokens"]) -> float:
    """What a layer's changes are measured in: their median; not far less than the mean, nor than rounding."""
    return max(float(np.median(change)), float(change.mean()) / 10, ROUNDING)


def _usual_at(change: Float[ndarray, " tokens"], positions: Int[ndarray, " tokens"]) -> Float[ndarray, " tokens"]:
    """The usual change at the position of each token, and at those next to it, up to a quarter of it away.

    The first tokens of a row have little context and change most under any fine-tune.
    """
    usual = np.empty_like(change)
    for position in np.unique(positions):
        near = np.abs(positions - position) <= position // 4
        usual[positions == position] = np.median(change[near])
    return usual


def draw_anchors(tokens: int, n: int, seed: int) -> Int[ndarray, "2 half"]:
    """Tokens to be shared atoms, drawn at random, as many from the first half of the data as from the second."""
    draw, middle = np.random.default_rng(seed), tokens // 2
    first = draw.choice(middle, n // 2, replace=False)
    return np.sort(np.stack([first, middle + draw.choice(tokens - middle, n // 2, replace=False)]), axis=1)


# -- dictionaries -----------------------------------------------------------------------------------------------------


def compare_atoms(
    readings: Sequence[Reading],
    names: tuple[str, ...],
    n_atoms: int,
    k: int,
    seed: int,
    told: Callable[[str], None] = lambda part: None,
) -> dict[str, Any]:
    """What dictionaries say at one hook point: their sizes, the tokens that only one model needs, and the transfer.

    Foreign atoms are worse on most tokens, the more so the farther two models are apart: `rise` says by which factor.
    """
    x, labels = at_places(readings, names), [reading.labels for reading in readings]
    threshold, base = _sized(x[0], k, n_atoms, told)
    told("dictionary of the tuned model")
    rows = base, _built(x[1], k, threshold=threshold).labels.position
    common = np.setdiff1d(np.arange(len(x[0])), np.concatenate(rows))
    rests, losses, rises, gains = {}, {}, {}, {}
    for i, j in ((1, 0), (0, 1)):  # the atoms of j, in i and in j itself
        told(f"atoms of the {NAMES[j]} model in the other")
        rests[i] = x[i] - _reconstructed(x[i], _placed(x[j], x[i], rows[j]), k)
        found = {i: relative_error(x[i], x[i] - rests[i]).numpy(), j: _losses(x[j], x[j][rows[j]], k)}
        if len(x) == 3:  # the base's atoms in the null; for those of the tuned model, the null's in the base
            there, own = (2, 0) if i else (0, 2)
            found[2] = _losses(x[there], _placed(x[own], x[there], rows[j]), k)
        losses[i] = {NAMES[m]: found[m] for m in sorted(found)}
        rises[NAMES[i]], gains[i] = _gain(found[i], found[j], common, threshold)
    marks, only = {}, {}
    for i, j in ((1, 0), (0, 1)):
        more = (gains[i] > TELLING) & (gains[i] > gains[j])
        only[f"only_{NAMES[i]}"] = _only(losses[i], NAMES[i], more, rests[i], labels[i], threshold)
        marks[i] = _needed(losses[i], NAMES[i], threshold) & more
    for i, j in ((1, 0), (0, 1)):
        _tell_near(only[f"only_{NAMES[i]}"]["atoms"], labels[i], marks[j])
    sizes = {"threshold": threshold, "rise": rises, "n_base": len(base), "n_tuned": len(rows[1])}
    told("transfer of atoms")
    sizes |= {"common": len(np.intersect1d(*rows))}
    return sizes | {"transfer": _transfer(x[0], x[1], *rows, k, seed)} | only


def _gain(
    there: Float[ndarray, " tokens"], own: Float[ndarray, " tokens"], common: Int[ndarray, " n"], threshold: float
) -> tuple[float, Float[ndarray, " tokens"]]:
    """By which factor the losses of atoms usually rise from their `own` model to another, and every token's over it.

    What is usual are the medians over the tokens in `common`, which are an atom of neither model, or over all if all
    are. A loss below the usual one counts as that, since factors of small losses say little.
    """
    common = common if len(common) else np.arange(len(own))
    least = max(float(np.median(own[common])), threshold / 100)
    rise = max(1.0, float(np.median(there[common])) / least)
    return rise, there / np.maximum(own, least) / rise


def _sized(x: Tensor, k: int, n_atoms: int, told: Callable[[str], None]) -> tuple[float, Int[ndarray, " n"]]:
    """A threshold, and the atoms it gives from the first token on: `n_atoms` to a tenth, or as near as was found."""
    told("dictionary of the base model")
    threshold, low, high = min(_built(x, k, n_atoms=n_atoms).cfg["threshold"], 0.999), 0.0, 1.0
    found: list[tuple[float, float, ndarray]] = []
    for tried in range(TRIES):
        told(f"dictionary of the base model, threshold {tried + 1} of {TRIES} at most")
        rows = _built(x, k, threshold=threshold).labels.position
        found.append((abs(len(rows) - n_atoms), threshold, rows))
        if found[-1][0] <= n_atoms / 10:
            break
        low, high = (threshold, high) if len(rows) > n_atoms else (low, threshold)
        step = threshold * min(max(len(rows) / n_atoms, 0.25), 4)  # sizes go about as 1 / threshold
        threshold = step if low == 0 or (high == 1 and step < 1) else (low * high) ** 0.5
    _, threshold, rows = min(found, key=lambda each: each[0])
    return threshold, rows


def _built(x: Tensor, k: int, **size: Any) -> ITDA:
    """A dictionary of `x` whose labels count tokens; uncentred, since its atoms are to explain another model too."""
    model = build([(x, Labels.counted(0, len(x)))], k=k, center=False, **size)
    assert isinstance(model, ITDA)
    return model


def _placed(own: Tensor, other: Tensor, rows: ndarray) -> Tensor:
    """The atoms of a model as they are, for another one to be explained by; re-read there if it has another width."""
    return own[rows] if own.shape[1] == other.shape[1] else other[rows]


def _needed(losses: dict[str, ndarray], who: str, threshold: float) -> Bool[ndarray, " tokens"]:
    """Tokens whose loss exceeds the threshold in the model `who` and in no other."""
    others = np.max([loss for name, loss in losses.items() if name != who], axis=0)
    return (losses[who] > threshold) & (others <= threshold)


def _tell_near(atoms: list[dict[str, Any]], labels: Labels, other: Bool[ndarray, " tokens"]) -> None:
    """Say of each listed atom whether it is `beside` a token of the `other` list, and put those that are last.

    A sentence that was tuned in is new in the tuned model, and what the base made of it is gone from there: it may well
    stand in both lists, and means one change.
    """
    prompt, position = labels.prompt[other], labels.position[other]
    for atom in atoms:
        here = atom["label"]
        atom["beside"] = bool(((prompt == here["prompt"]) & (np.abs(position - here["position"]) <= NEAR)).any())
    atoms.sort(key=lambda atom: atom["beside"])


def _only(
    losses: dict[str, ndarray],
    who: str,
    more: Bool[ndarray, " tokens"],
    rest: Float[Tensor, "tokens d"],
    labels: Labels,
    threshold: float,
) -> dict[str, Any]:
    """New atoms that the model `who` needs and no other does: their `count`, how many `tokens` they stand for, and the
    most telling of them, each with the tokens that it stands for.

    A model needs a token if its loss exceeds the threshold, and alone if the others' do not, and `more` says that it is
    raised more than usual. Those whose loss exceeds the others' by the largest factor come first; one whose residual
    (`rest`) is much like that of a token before it is no new atom, and is counted with that.
    """
    others = np.max([loss for name, loss in losses.items() if name != who], axis=0)
    found = np.flatnonzero(_needed(losses, who, threshold) & more)
    # Below a hundredth of the threshold, losses differ by rounding: then the largest come first.
    explained = np.maximum(others[found], threshold / 100)
    found = found[np.argsort(explained / losses[who][found], kind="stable")]
    stands_for: dict[int, int] = {}  # by the token that is the atom
    unit = torch.nn.functional.normalize(rest, dim=1)
    for i in found.tolist():
        kept = list(stands_for)
        cosines = unit[kept] @ unit[i]
        if kept and float(cosines.max()) >= ALIKE:
            stands_for[kept[int(cosines.argmax())]] += 1
        else:
            stands_for[i] = 1
    told = [
        {"tokens": n, "loss": {name: float(loss[i]) for name, loss in losses.items()}, "label": label(labels, i)}
        for i, n in list(stands_for.items())[:MOST_ATOMS]
    ]
    return {"count": len(stands_for), "tokens": len(found), "atoms": told}


def _losses(x: Float[Tensor, "tokens d"], atoms: Float[Tensor, "n d"], k: int) -> Float[ndarray, " tokens"]:
    """Relative errors of `x` under the activations `atoms`, which need not be normalised."""
    return relative_error(x, _reconstructed(x, atoms, k)).numpy()


def _reconstructed(x: Tensor, atoms: Tensor, k: int) -> Tensor:
    atoms = normalize(atoms[atoms.any(1)])  # what is an atom of one model may be zero in the other
    return pursue(x, atoms, k=k).decode(atoms)


def _transfer(x: Tensor, y: Tensor, base: ndarray, tuned: ndarray, k: int, seed: int) -> dict[str, Any]:
    """FVU of the tuned model `y` under dictionaries of equal size, on tokens that are an atom of none of them.

    Beside it by the same names `robust`, FVU without massive tokens, `mean_error` and `median_error` of single tokens,
    |y - y_hat|^2 / |y|^2; and in `concentrated` the sentence where few tokens or one coordinate hold most variance.
    """
    size, draw = min(len(base), len(tuned)), np.random.default_rng(seed)
    chance = draw.choice(len(y), size, replace=False)
    rest = np.setdiff1d(np.arange(len(y)), np.concatenate([base, tuned, chance]))
    rest = np.sort(draw.permutation(rest)[:SAMPLE])
    atoms = {"own": y[tuned[:size]], "reread": y[base[:size]], "as_is": x[base[:size]], "random": y[chance]}
    out: dict[str, Any] = {"n_atoms": size, "tokens": len(rest)}
    out |= {"concentrated": concentrated(variance(y[rest])), "robust": {}, "mean_error": {}, "median_error": {}}
    for name, chosen in atoms.items():
        out[name] = None
        if chosen.shape[1] == y.shape[1] and len(rest):
            y_hat = _reconstructed(y[rest], chosen, k)
            found, error = reconstruction(y[rest], y_hat), relative_error(y[rest], y_hat).numpy()
            out[name], out["robust"][name] = found["fvu"], found["fvu_robust"]
            out["mean_error"][name], out["median_error"][name] = float(error.mean()), float(np.median(error))
    return out


def label(labels: Labels, i: int) -> dict[str, Any]:
    """What token `i` is, as JSON can hold it, with some context."""
    before, token, after = labels.context(i, 120, 60)
    numbers = {name: int(getattr(labels, name)[i]) for name in ("prompt", "position", "token_id", "document", "start")}
    return numbers | {"before": before, "token": token, "after": after}


def at_places(readings: Sequence[Reading], names: tuple[str, ...]) -> list[Tensor]:
    """The activations of every reading at its hook point."""
    return [reading.activations[name] for reading, name in zip(readings, names, strict=True)]
