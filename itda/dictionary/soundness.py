"""Whether a dictionary is sound: the rules that hold for every ITDA that is saved or loaded."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from itda.dictionary import folder
from itda.errors import InputError, counted, shortened
from itda.labels import LABEL_ARRAYS, Labels

UNIT_NORM_TOLERANCE = 1e-5
DEEPEST, LARGEST_INT = 100, 1023  # of what `cfg` holds: levels, and bits, as many as a double has
TENSORS = ("atoms", "norms", "losses", "mean", "moved", "scale")  # the first three are always there


def problem_of(model: Any) -> tuple[str, str] | None:
    """What is wrong with a dictionary, as (the file it would be in, the reason), or None. Shapes first, then values."""
    for name in TENSORS:
        kind = type(tensor := getattr(model, name)).__name__
        if not isinstance(tensor, Tensor) and (tensor is not None or name in TENSORS[:3]):
            said = f"`{name}` is of type {kind}, and a torch tensor was wanted"
            return folder.ATOMS, said + " (`torch.from_numpy` makes one)" * (kind == "ndarray")
    for name, wanted in (("labels", Labels), ("cfg", dict)):
        if not isinstance(value := getattr(model, name), wanted):
            return folder.MANIFEST, f"`{name}` is of type {type(value).__name__}, and {wanted.__name__} was wanted"
    n, atoms = len(model.atoms) if model.atoms.ndim else 0, folder.ATOMS
    if type(model.k) is not int or model.k < 0:
        return folder.MANIFEST, f"k = {model.k!r} is not a count of pursuit steps"
    if model.atoms.ndim != 2:
        return atoms, f"`atoms` has shape {tuple(model.atoms.shape)}, but (n_atoms, d) was wanted"
    shapes = {"atoms": (n, model.d), "norms": (n,), "losses": (n,), "moved": (n,)}
    shapes |= {"mean": (model.d,), "scale": (model.d,)}
    for name, shape in shapes.items():
        tensor = getattr(model, name)
        if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype != torch.float32):
            came = f"{tensor.dtype} {tuple(tensor.shape)}"
            return atoms, f"`{name}` is {came}, but torch.float32 {shape} was wanted"
    if len(model.labels) != n:
        return folder.LABELS, f"{counted(len(model.labels), 'label')} came for {counted(n, 'atom')}"
    size = torch.linalg.vector_norm(model.atoms, dim=1)  # not finite where the row is not
    wrong = (~((size - 1).abs() <= UNIT_NORM_TOLERANCE)).nonzero()
    if len(wrong):
        row = int(wrong[0])
        kind = "unit norm" if math.isfinite(size[row]) else "finite entries"
        return atoms, f"`atoms` must have rows of {kind}, and row {row} has norm {size[row]:.7g}"
    for name in ("norms", "mean", "moved", "scale"):
        tensor = getattr(model, name)
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            return atoms, f"`{name}` must be finite, and entry {int((~torch.isfinite(tensor)).nonzero()[0])} is not"
    if model.scale is not None and bool((model.scale <= 0).any()):
        return atoms, f"`scale` must be above 0, and entry {int((model.scale <= 0).nonzero()[0])} is not"
    pairs, first, count = np.unique(model.labels.pairs(), axis=0, return_index=True, return_counts=True)
    if len(pairs) != n:
        prompt, position = pairs[count > 1][0]
        twice = f"(prompt {prompt}, position {position}) stands {counted(int(count[count > 1][0]), 'time')}"
        return folder.LABELS, f"labels must be unique, and {twice}, first in row {first[count > 1][0]}"
    if negative := _negative(model.labels):
        return folder.LABELS, negative
    if any(key in model.cfg for key in folder.RESERVED):
        return folder.MANIFEST, f"`cfg` may not have the keys {', '.join(folder.RESERVED)}, which the format writes"
    return None if model.sample is None else _sample_problem(model.sample, n)


def _negative(labels: Labels) -> str | None:
    """The first number of `labels` that is less than there can be; -1 says that there is none, where there may be."""
    for name in LABEL_ARRAYS:
        least = 0 if name in ("prompt", "position") else -1
        wrong = np.flatnonzero(getattr(labels, name) < least)
        if len(wrong):
            value = int(getattr(labels, name)[wrong[0]])
            return f"`{name}` of row {wrong[0]} is {value}, and {least} is the least that it can be"
    return None


def _sample_problem(sample: Any, n_atoms: int) -> tuple[str, str] | None:
    if negative := _negative(sample.labels):
        return folder.SAMPLE, negative
    indices, values = sample.codes.indices, sample.codes.values
    lengths = (len(sample.labels), len(indices), len(values), len(sample.losses))
    if len(set(lengths)) > 1 or indices.ndim != 2 or indices.shape != values.shape:
        came = f"{counted(lengths[0], 'label')}, codes {tuple(indices.shape)} and {counted(lengths[3], 'loss')}"
        return folder.SAMPLE, f"the sample has {came}, but as many of each were wanted"
    # Without atoms there is nothing to point at, and padding points at 0 all the same.
    wrong = ((indices < 0) | (indices >= max(n_atoms, 1))).nonzero()
    if len(wrong):
        row, place = wrong[0].tolist()
        return folder.SAMPLE, f"row {row} of the sample uses atom {int(indices[row, place])} of {n_atoms}"
    if not bool(torch.isfinite(values).all()):
        return folder.SAMPLE, "the codes of the sample must be finite, and are not"
    return None


def plain_of(value, name: str, room: int = DEEPEST):
    """`value` as JSON has it: NumPy scalars as numbers, numbers that are not finite as null; at most `room` deep."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, int) and value.bit_length() > LARGEST_INT:
        raise InputError(
            f"`{name}` is an integer of more than {LARGEST_INT} bits, which no reader of JSON keeps: drop it."
        )
    if isinstance(value, dict | list | tuple) and not room:
        top = name.partition("[")[0]
        raise InputError(f"`{top}` is nested more than {DEEPEST} deep, or holds itself: save what is flatter.")
    if isinstance(value, dict):
        keys = [str(plain_of(key, name)) if isinstance(key, int) else str(key) for key in value]
        if len(set(keys)) < len(keys):
            twice = shortened(next(key for key in keys if keys.count(key) > 1))
            raise InputError(f"`{name}` has two keys that are {twice} in JSON, where keys are text: rename one.")
        inner = zip(keys, value.values(), strict=True)
        return {key: plain_of(item, f"{name}[{shortened(key)}]", room - 1) for key, item in inner}
    if isinstance(value, list | tuple):
        return [plain_of(item, f"{name}[{i}]", room - 1) for i, item in enumerate(value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    kind = type(value).__name__
    raise InputError(f"`{name}` is a {kind}, but numbers, strings, lists and dicts can be saved: convert or drop it.")
