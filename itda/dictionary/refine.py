"""Improve a dictionary: keep those of its atoms that are of most use, or move them to where the data want them.

`select` gives a dictionary of real activations, whose labels stay true. `refine` gives atoms that are activations no
more: each is called by the token whose activation is nearest, and says how near.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from itda.arguments import ITDA as ITDA_KIND
from itda.arguments import LABELS, TEXT, checks
from itda.codes import Codes
from itda.dictionary.itda import ITDA, MEASURED, measured
from itda.dictionary.moves import Moves, chunk_of
from itda.dictionary.sample import SpacedSample
from itda.dictionary.standard import within
from itda.errors import InputError, counted, whole
from itda.labels import Batch, Labels
from itda.progress import Step
from itda.provenance import is_number, section
from itda.pursuit import METHODS, as_tensor, pursue, too_large
from itda.pursuit.products import product

CHUNK = 8192  # tokens whose codes are held at once in choosing
BLOCK = 2048  # atoms whose cosines with all others are held at once
ROUNDS = 4  # of pruning
SILENT: Callable[[Step | None], None] = lambda step: None  # noqa: E731


@checks(candidates=ITDA_KIND, labels=LABELS)
def select(
    candidates: ITDA,
    x: Tensor | ndarray,
    n_atoms: int,
    *,
    labels: Labels | None = None,
    k: int | None = None,
    rounds: int = ROUNDS,
    progress: Callable[[Step | None], None] = SILENT,
) -> ITDA:
    """The `n_atoms` of the atoms of `candidates` that are of most use in writing the activations `x` (tokens, d).

    In each of `rounds` the activations are encoded with `k` steps (the dictionary's, if None), and the atoms that would
    be missed least go (`removal_costs`), but none whose nearest atom, which would take its place, went in that round.
    The sizes of the rounds are a geometric series. Atoms, labels and order stay those of `candidates`; with the
    `labels` of `x` a spaced sample of it is kept, as in building.

    Raises `InputError` for more atoms than there are.
    """
    x, usual = _checked(candidates, x, labels)
    n_atoms, rounds = whole("n_atoms", n_atoms, 1), whole("rounds", rounds, 1)
    if n_atoms > len(candidates):
        raise InputError(f"`n_atoms` is {n_atoms:,}, out of {counted(len(candidates), 'candidate')}: choose fewer.")
    k = candidates.k if k is None else k
    kept, how, began = torch.arange(len(candidates), device="cpu"), _how(candidates), time.monotonic()
    sizes = np.geomspace(len(candidates), n_atoms, rounds + 1)[1:].round().astype(int)
    for done, size in enumerate(sizes.tolist()):
        atoms = candidates.atoms[kept]
        nearest, cost = _nearest(atoms, how["nonneg"]), torch.zeros(len(kept), dtype=torch.float64, device="cpu")
        for part in usual.split(CHUNK):
            cost += removal_costs(part, atoms, pursue(part, atoms, k, **how), nearest, how["nonneg"])
        kept = kept[_spared(cost, nearest, size)]
        progress(Step("selecting atoms", done + 1, rounds, time.monotonic() - began))
    chosen = kept.numpy()
    model = ITDA(
        atoms=candidates.atoms[kept],
        labels=candidates.labels[chosen],
        k=candidates.k,
        mean=candidates.mean,
        norms=candidates.norms[kept],
        losses=candidates.losses[kept],
        moved=None if candidates.moved is None else candidates.moved[kept],
        scale=candidates.scale,
        cfg=candidates.cfg | {"selected": {"from": len(candidates), "tokens": len(usual), "rounds": rounds, "k": k}},
    )
    return _sampled(model, x, labels)


def removal_costs(
    x: Float[Tensor, "tokens d"],
    atoms: Float[Tensor, "n_atoms d"],
    codes: Codes,
    nearest: Int[Tensor, " n_atoms"],
    nonneg: bool = False,
) -> Float[Tensor, " n_atoms"]:
    """What the squared error of `x` would rise by without each of the `atoms`, float64.

    The one `nearest` to an atom takes its place, with the coefficient that is best (not below zero if `nonneg`); all
    others keep theirs: for a token that leaves r and has c a, |r + c a|^2 - (b (r + c a))^2 - |r|^2.
    """
    rest = x.float() - codes.decode(atoms)
    error = rest.square().sum(1)
    found = torch.zeros(len(atoms), dtype=torch.float64, device="cpu")
    for indices, c in zip(codes.indices.T, codes.values.T, strict=True):
        without = rest + c[:, None] * atoms[indices]
        instead = (without * atoms[nearest[indices]]).sum(1)
        instead = instead.clamp_min(0) if nonneg else instead
        rise = without.square().sum(1) - instead.square() - error
        found.index_add_(0, indices, torch.where(c != 0, rise, 0.0).double())
    return found


def _nearest(atoms: Float[Tensor, "n_atoms d"], nonneg: bool) -> Int[Tensor, " n_atoms"]:
    """Of each atom the other one of the largest |cosine|, or cosine if `nonneg`; an only atom is its own."""
    found = []
    for start in range(0, len(atoms), BLOCK):
        cosine = product(atoms[start : start + BLOCK], atoms)
        cosine = cosine if nonneg else cosine.abs()
        cosine.diagonal(start).fill_(-1)
        found.append(cosine.argmax(1))
    return torch.cat(found)


def _spared(cost: Float[Tensor, " n_atoms"], nearest: Int[Tensor, " n_atoms"], size: int) -> Int[Tensor, " kept"]:
    """The `size` atoms that stay, in order: those of least `cost` go, unless the `nearest` of one went before it."""
    there, near, later = np.ones(len(cost), bool), nearest.numpy(), []
    order = cost.argsort(stable=True).tolist()
    left = len(cost) - size
    for atom in order:
        if not left:
            break
        if not there[near[atom]]:
            later.append(atom)
            continue
        there[atom] = False
        left -= 1
    there[later[:left]] = False
    return torch.from_numpy(np.flatnonzero(there))


@checks(model=ITDA_KIND, labels=LABELS, method=TEXT)
def refine(
    model: ITDA,
    x: Tensor | ndarray,
    *,
    labels: Labels | None = None,
    passes: int = 3,
    k: int | None = None,
    method: str | None = None,
    seed: int = 0,
    progress: Callable[[Step | None], None] = SILENT,
) -> ITDA:
    """Move the atoms to where the activations `x` (tokens, d) want them: online dictionary learning from real atoms.

    In each of `passes` over `x`, in an order drawn with `seed`, chunks of tokens are encoded with `k` steps of `method`
    (those of the dictionary, if None), and each atom goes towards what is left of the tokens that use it
    (`itda.dictionary.moves`). Atoms keep unit norm; those that no token uses stay where they are. `labels` are those of
    `x`, of which a spaced sample is kept.

    Returns a dictionary of which `moved` is the cosine of each atom with the activation of its label: where one of `x`
    has come nearer, and `labels` are given, its label is that token's (`ITDA.named`). The others stay; `cfg["refined"]`
    says what was done. Raises `InputError` for a dictionary that has been refined already: its atoms are the labels' no
    more, so how far they moved would not be known.
    """
    x, usual = _checked(model, x, labels)
    passes, seed = whole("passes", passes, 1), whole("seed", seed, 0)
    if model.moved is not None:
        raise InputError(f"{model!r} is refined already: refine what it was made from, with more `passes`.")
    k, how = model.k if k is None else k, _how(model)
    if method is not None:
        how["method"] = method
    if how["method"] not in METHODS:
        raise InputError(f"`method` is {method!r}; choose one of {', '.join(map(repr, METHODS))}.")
    atoms, moves = model.atoms, Moves(len(model))
    began, done = time.monotonic(), 0
    for number in range(passes):
        order = torch.from_numpy(np.random.default_rng([seed, number]).permutation(len(usual)))
        for rows in order.split(chunk_of(len(model))):
            part = usual[rows]
            atoms = moves.of(part, atoms, pursue(part, atoms, k, **how))
            done += len(part)
            progress(Step("refining atoms", done, passes * len(usual), time.monotonic() - began))
    moved = (atoms.double() * model.atoms.double()).sum(1).float()
    said = {"passes": passes, "tokens": len(usual), "k": k, "method": how["method"], "seed": seed}
    return _sampled(replace(model, atoms=atoms, moved=moved, cfg=model.cfg | {"refined": said}), x, labels)


def _sampled(model: ITDA, x: Float[Tensor, "tokens d"], labels: Labels | None) -> ITDA:
    """With a sample of `x`, which is as the pursuit has it; without labels none: the old one's codes are of others."""
    cfg = {key: value for key, value in model.cfg.items() if key not in MEASURED}
    model = replace(model, sample=None, cfg=cfg)
    if labels is None:
        return model
    sample, restored = SpacedSample(), model.restored(x)
    sample.add(Batch(restored, labels), len(x), 0)
    return measured(model.named(restored, labels), *sample.tokens())


def _how(model: ITDA) -> dict[str, Any]:
    return {"method": model.method, "nonneg": model.nonneg}


def _checked(model: ITDA, activations: Any, labels: Labels | None) -> tuple[Tensor, Tensor]:
    """The activations as float32 (tokens, d), as the dictionary's pursuit has them, on the CPU; and those to fit.

    A dictionary that was built without massive tokens (`max_norm`) is not fitted to them either.
    """
    x = as_tensor(activations)
    if x is None or x.ndim != 2 or x.shape[1] != model.d:
        shape = tuple(getattr(activations, "shape", ())) or type(activations).__name__
        raise InputError(f"`x` is {shape}: pass activations (tokens, {model.d}) of floating point.")
    if labels is not None and len(labels) != len(x):
        raise InputError(
            f"`labels` has {counted(len(labels), 'entry')} and `x` {counted(len(x), 'activation')}: give one for each."
        )
    if not len(x) or not len(model):
        raise InputError("There is nothing to improve on: give activations, and a dictionary with atoms.")
    if (where := too_large(x)) is not None:
        raise InputError(f"`x` must be finite; the entry at {where} is {x[where].item()}. Drop or repair that token.")
    x = x.detach().float().cpu()
    massive, inner = section(model.cfg, "massive"), model.standardised(x)
    limit: Any = massive.get("norm")
    if massive.get("left_out") is None or not is_number(limit):
        return inner, inner
    kept = within(x, limit)
    if not len(kept):
        raise InputError(
            f"{counted(len(x), 'activation')} came, and none within the {limit:.4g} beyond which this "
            f"dictionary leaves tokens "
            "out (`max_norm`): give others."
        )
    return inner, inner[torch.from_numpy(kept)]
