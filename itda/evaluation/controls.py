"""What chance gives: the dictionaries that an evaluation measures beside the one that it is of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from itda.dictionary.build import build
from itda.dictionary.itda import ITDA
from itda.evaluation.heldout import Held, Reader
from itda.evaluation.measures import CHUNK
from itda.evaluation.systems import System
from itda.labels import Labels
from itda.models import loading
from itda.progress import part_of
from itda.pursuit import normalize
from itda.results import named

CONTROLS = ("random tokens", "gaussian", "untrained model")
RESERVED = ("itda", *CONTROLS, "clean", "zero", "mean", "activations")


def systems_of(
    dictionary: ITDA,
    held: Held,
    wanted: list[str],
    settings: Mapping[str, Any],
    systems: Sequence[System],
    seed: int,
    tol: float | None = None,
) -> list[System]:
    """The dictionary, those of its controls that are measured on the same activations, and the other systems.

    With `tol` also the dictionary with as many atoms as each token needs, and at the end that with so many for every
    token, as the mean over those `held` of the other, rounded.
    """
    every = [System.of(dictionary, "itda", **settings)]
    if "random tokens" in wanted:
        every.append(_random_tokens(dictionary, held, settings, seed))
    if "gaussian" in wanted:
        every.append(_gaussian(dictionary, settings, seed))
    if tol is not None:
        every += _needed(dictionary, held, tol, settings)
    reserved = list(dict.fromkeys([*RESERVED, *(s.name for s in every)]))
    names = named(None, [*reserved, *(s.name for s in systems)])[len(reserved) :]
    own = zip(systems, names, strict=True)
    return every + [replace(s, name=n, mean=dictionary.mean, scale=dictionary.scale) for s, n in own]


def _needed(dictionary: ITDA, held: Held, tol: float, settings: Mapping[str, Any]) -> list[System]:
    """The dictionary with as many atoms as each token needs, and with the same number for all, about their mean."""
    needed = System.needed(dictionary, f"itda, tol {tol:g}", tol, **settings)
    scored = held.x[torch.from_numpy(held.scored)]
    many = sum(int(needed.run(part)[1].l0().sum()) for part in scored.split(CHUNK))
    k = max(1, round(many / max(1, len(scored))))
    return [needed, System.of(dictionary, f"itda, k {k}", **{**settings, "k": k})]


def _random_tokens(dictionary: ITDA, held: Held, settings: Mapping[str, Any], seed: int) -> System:
    """As many activations of the same stream, drawn without looking."""
    return System.of(_drawn(dictionary, held, seed), "random tokens", **like(dictionary, settings))


def _drawn(dictionary: ITDA, held: Held, seed: int) -> ITDA:
    x = dictionary.standardised(held.pool.float())
    x = x[x.square().sum(1) > 0]
    rows = np.random.default_rng([seed, 4]).permutation(len(x))[: len(dictionary)]
    return _plain(normalize(x[torch.from_numpy(np.sort(rows))]), dictionary)


def _gaussian(dictionary: ITDA, settings: Mapping[str, Any], seed: int) -> System:
    """As many directions drawn from the sphere."""
    noise = torch.randn(len(dictionary), dictionary.d, generator=torch.Generator().manual_seed(seed))
    return System.of(_plain(normalize(noise), dictionary), "gaussian", **like(dictionary, settings))


def _plain(atoms: Tensor, dictionary: ITDA) -> ITDA:
    ones = torch.ones(len(atoms))
    own: dict[str, Any] = {"mean": dictionary.mean, "scale": dictionary.scale}
    return ITDA(atoms.cpu(), Labels.counted(0, len(atoms)), dictionary.k, norms=ones, losses=ones, **own)


def like(dictionary: ITDA, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The dictionary's own settings of the pursuit, and those given."""
    own = {"method": dictionary.method, "nonneg": dictionary.nonneg}
    return {"k": dictionary.k} | own | dict(settings)


def untrained(
    dictionary: ITDA, hooked: Any, reader: Reader, settings: Mapping[str, Any], seed: int
) -> tuple[System, Held]:
    """A dictionary of as many atoms, built as this one, of a model with random weights; and what it is measured on."""
    other = loading.load_model(loading.untrained(hooked, hooked.tokenizer, seed=seed), hooks=reader.hook)
    held = replace(reader, report=part_of(reader.report, "untrained model")).read(other)
    grow: dict[str, Any] = {"center": dictionary.mean is not None, "loss": dictionary.cfg.get("loss") or "relative"}
    grow["nonneg"] = dictionary.nonneg
    grow |= {"max_norm": dictionary.cfg.get("max_norm"), "scale": dictionary.cfg.get("scale") or "none"}
    wish = min(len(dictionary), len(held.pool))
    online = dictionary.cfg.get("admission") == "online"
    grow |= {"admission": "online"} if online else {"max_atoms": wish}
    told = part_of(reader.report, "untrained model", len(held.pool))
    built = build(held.pool, k=dictionary.k, n_atoms=wish, progress=told, **grow)
    assert isinstance(built, ITDA)
    return System.of(built, "untrained model", **like(dictionary, settings)), held
