"""Encode activations against fixed atoms (Algorithm 2): `pursue` checks its arguments once and asks a backend.

What enters here is a kernel: tensors in, tensors out, no files and no models, with `reference` as its judge.
May use the vocabulary; everything else may use it.
"""

from __future__ import annotations

import importlib
import math
import os
import warnings
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from numbers import Real
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from itda import devices
from itda.arguments import TEXT, checks
from itda.codes import Codes
from itda.errors import InputError, shortened
from itda.labels import Labels
from itda.pursuit import dense, orthogonal, reference
from itda.pursuit.gram import Gram

METHODS = ("mp", "omp", "gp")
BACKENDS = ("auto", "dense", "cpu", "gpu", "reference")

# The largest entry that is computed with: norms and correlations, of up to 100,000 entries, stay finite in this dtype.
LARGEST = {torch.float16: 65504.0, torch.bfloat16: 1e36, torch.float32: 1e36, torch.float64: 1e150}

MOST_STEPS = 1 << 16  # of a pursuit

# What one chunk of tokens may take beside atoms and Gram matrix. `dense` goes over all of it at every step, so that it
# should stay in cache on a CPU; `cpu` goes over one token at a time, and large products are faster.
WORKSPACE_BYTES = {"dense": 8e6, "cpu": 3e7, "gpu": 1e9}


def _after_fork() -> None:
    """A forked child has none of its parent's threads, for which OpenMP would wait forever, as for a lock they held."""
    torch.set_num_threads(1)
    devices.renew_lock()
    _kept.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@checks(method=TEXT, backend=TEXT)
@torch.inference_mode(False)  # a Gram matrix made in it could not grow outside, and it is kept
@torch.no_grad()
def pursue(
    x: Float[Tensor, "*batch d"] | ndarray,
    atoms: Float[Tensor, "n_atoms d"] | ndarray,
    k: int,
    *,
    method: str = "mp",
    nonneg: bool = False,
    tol: float = 0.0,
    backend: str = "auto",
    max_gram_bytes: int | float | None = None,
) -> Codes:
    """Write each activation as a sparse sum of at most `k` atoms, x ~ sum_j code_j atom_j.

    x        activations (..., d) of any floating dtype; float16 and bfloat16 are computed in float32
    atoms    dictionary (n_atoms, d), rows of unit norm
    k        pursuit steps, the L0 budget; matching pursuit may choose an atom again, so realised L0 can be smaller
    method   "mp" matching pursuit (ITDA, Algorithm 2): c = <r, d_j>, r <- r - c d_j for the atom of largest |<r, d_j>|;
             "omp" orthogonal: least squares on the support at every step; "gp" gradient pursuit
    nonneg   choose the largest correlation instead of the largest absolute one; coefficients are >= 0
    tol      a token stops once its relative residual energy |r|^2 / |x|^2 is at most `tol`, 0 <= tol <= 1
    backend  "cpu" (numba, as many threads as torch), "gpu" (Triton, on CUDA devices), "dense" (torch, any device and
             dtype), "reference" (NumPy float64, one vector at a time), or "auto": the fastest that can do it
    max_gram_bytes   what the rows of the atoms' Gram matrix may take, 2 bytes an entry; None: half of what is free.
             Where they do not all fit, those used last are kept ("cpu"), or correlations recomputed at every step

    Returns `Codes` (values float32, or float64 for float64 x). Ties go to the lowest index. A zero vector has an
    empty code, and a token stops when no atom correlates with its residual by more than 1e-5 |x|. Every backend makes
    the same choices: those that float32 cannot decide are made in float64. For the next call with the same atoms their
    Gram matrix is kept, as long as the atoms are and memory has room.

    Raises `InputError` for arguments of the wrong shape, type or range, non-finite x, atoms that are not unit-norm, and
    a backend that cannot compute this.
    """
    given, k = atoms, int(k) if isinstance(k, np.integer) else k
    x, atoms = _checked(x, atoms)
    _check_settings(k, method, nonneg, tol, backend, max_gram_bytes)
    if x.device.type == "mps":  # which has no float64
        codes = pursue(x.cpu(), atoms.cpu(), k, method=method, nonneg=nonneg, tol=tol, backend=backend)
        return codes.to(x.device)
    if backend == "reference":
        check_unit_norm(given)
        return _pursue_reference(x, atoms, k, method, nonneg, tol)
    flat = x.reshape(-1, x.shape[-1])
    gram = _prepared(given, atoms, max_gram_bytes)
    try:
        parts = [_pack(steps, gram.n, x.dtype) for steps in encode(flat, gram, k, method, nonneg, float(tol), backend)]
    except BaseException:
        _kept.pop(id(given), None)  # interrupted, its rows may be half written
        raise
    codes = Codes.concat(parts) if parts else _pack(dense.no_steps(0, k, x.device), gram.n, x.dtype)
    return codes.reshape(*x.shape[:-1])


def encode(
    x: Float[Tensor, "tokens d"],
    gram: Gram,
    k: int,
    method: str = "mp",
    nonneg: bool = False,
    tol: float = 0.0,
    backend: str = "auto",
    corr: Float[Tensor, "tokens width"] | None = None,
) -> Iterator[dense.Steps]:
    """Yield the `Steps` of `x` chunk by chunk, so that memory beside the result stays within a fixed workspace.

    A chunk is at least one token, whose row of correlations is smaller than the atoms themselves. Where all tokens'
    `corr` are at hand (`Gram.correlate`), matching pursuit starts from them, and writes over them.
    """
    with gram.lock:
        name, function = _encoder(x, gram, k, method, backend)
    workspace = WORKSPACE_BYTES["gpu" if x.device.type != "cpu" else name]
    refits = 1 if method == "mp" or name != "dense" else k  # which hold their support, and OMP its basis, in float64
    per_token = (4 if name == "dense" else 1) * gram.n * x.element_size() + 24 * refits * x.shape[1] + 128 * k
    size = max(1, int(workspace // max(per_token, 1)))
    for start in range(0, len(x), size):
        known = {} if corr is None else {"corr": corr[start : start + size]}
        with gram.lock:
            steps = function(x[start : start + size], gram, k, nonneg, tol, **known)
        yield steps


def _encoder(x: Tensor, gram: Gram, k: int, method: str, backend: str) -> tuple[str, Callable[..., dense.Steps]]:
    """The backend that encodes `x`, and its function; the Gram matrix is filled where that pays.

    It costs as much as the correlations of n tokens, and to do without it k such products a token.
    """
    name = _backend(x, backend)
    gram.asked += len(x) * k
    if name == "cpu" and method == "mp":
        return name, _kernels("cpu").mp
    filled = gram.complete or (gram.asked >= gram.n and (name == "cpu" or method == "mp") and gram.fill())
    if name == "gpu" and method == "mp" and filled:
        return name, _kernels("gpu").mp
    if name == "cpu" and filled:
        return name, getattr(_kernels("cpu_orthogonal"), method)
    return "dense", dense.mp if method == "mp" else getattr(orthogonal, method)


def _backend(x: Tensor, backend: str) -> str:
    """What `backend` stands for with these activations, or an `InputError`."""
    device = "cpu" if x.device.type == "cpu" else "gpu"
    if backend == "auto":
        return device if x.dtype == torch.float32 and _kernels(device) else "dense"
    if backend != "dense":
        if device != backend:
            raise InputError(f"`backend` is {backend!r} but `x` is on {x.device}: move it, or leave `backend` out.")
        if x.dtype != torch.float32:
            raise InputError(f"`backend` {backend!r} computes in float32, but `x` is float64: pass `x.float()`.")
        if not _kernels(backend):
            library = {"cpu": "numba", "gpu": "triton"}[backend]
            raise InputError(f"`backend` {backend!r} needs {library}, which cannot be imported: install {library}.")
    return backend


@cache
def _kernels(name: str) -> Any:
    """The module of compiled kernels, or None, which is said once, where its compiler cannot be imported."""
    try:
        return importlib.import_module(f"itda.pursuit.{name}")
    except ImportError as error:
        library = "triton" if name == "gpu" else "numba"
        warnings.warn(
            f"{library} cannot be imported ({error}): pursuit runs in plain torch, with the same results but slower. "
            f"Install {library} to mend it.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


KEPT = 32  # dictionaries, as many as may stand in one table of `eval`
_kept: dict[int, tuple[weakref.ref, Gram]] = {}  # by the `id` of the atoms given, as long as somebody holds them


def _prepared(given: Tensor | ndarray, atoms: Tensor, max_bytes: int | float | None) -> Gram:
    """The Gram matrix of `atoms`, checked: one that was kept, if it is of the same atoms with the same values."""
    key = id(given)
    _, gram = _kept.get(key, (None, None))
    if gram is not None:
        if gram.is_of(atoms) and max_bytes in (gram.limit, gram.max_bytes):
            return gram
        _kept.pop(key, None)
    check_unit_norm(given)
    gram = Gram(atoms, max_bytes)
    while others := list(_kept.items()):
        if len(others) < KEPT and sum(old.table.nbytes for _, (_, old) in others) + gram.table.nbytes <= gram.max_bytes:
            break
        _kept.pop(others[0][0], None)
    _kept[key] = weakref.ref(given, lambda _: _kept.pop(key, None)), gram
    return gram


def normalize(atoms: Float[Tensor, "n d"] | ndarray) -> Float[Tensor, "n d"]:
    """`atoms` with unit rows, (n, d), normalised in float64. Zero rows stay zero."""
    rows = as_tensor(atoms)
    if rows is None:
        kind = getattr(atoms, "dtype", type(atoms).__name__)
        raise InputError(f"`atoms` are {kind}; a dense floating-point tensor (n, d) was wanted.")
    exact = rows.double()
    norm = exact.square().sum(-1, keepdim=True).sqrt()
    return torch.where(norm > 0, exact / norm.clamp_min(1e-300), 0.0).to(rows.dtype)


def _pack(steps: dense.Steps, n_atoms: int, dtype: torch.dtype) -> Codes:
    """Steps as codes: the coefficients of an atom chosen several times added, its first place kept, padding last."""
    indices, coefficients = steps.indices, steps.coefficients
    k = indices.shape[1]
    if not k or not n_atoms:
        return Codes(indices, coefficients.to(dtype), n_atoms)
    # The first step that chose an atom, without a table of k x k: in a stable order by atom, where its run begins.
    place = torch.arange(k, device=indices.device)
    atom = torch.where(coefficients != 0, indices, n_atoms + place)  # a step without a coefficient is no other's first
    order = atom.argsort(dim=1, stable=True)
    runs = atom.gather(1, order)
    begins = torch.zeros_like(order)
    begins[:, 1:] = torch.where(runs[:, 1:] != runs[:, :-1], place[1:], 0)
    first = torch.empty_like(order).scatter_(1, order, order.gather(1, begins.cummax(1).values))
    values = torch.zeros_like(coefficients).scatter_add_(1, first, coefficients)
    # What cancelled, or what a refit found no use for, leaves rounding errors, which are no coefficients.
    values = torch.where(values.abs() > reference.TIE * values.abs().amax(1, keepdim=True), values, 0.0).to(dtype)
    order = (values == 0).to(torch.uint8).argsort(dim=1, stable=True)
    values = values.gather(1, order)
    return Codes(torch.where(values != 0, indices.gather(1, order), 0), values, n_atoms)


def _pursue_reference(x: Tensor, atoms: Tensor, k: int, method: str, nonneg: bool, tol: float) -> Codes:
    rows = x.reshape(-1, x.shape[-1]).double().cpu().numpy()
    exact = atoms.double().cpu().numpy()
    indices, values = np.zeros((len(rows), k), np.int64), np.zeros((len(rows), k))
    for t, row in enumerate(rows):
        chosen, coefficients, _ = getattr(reference, method)(row, exact, k, nonneg, tol)
        indices[t, : len(chosen)], values[t, : len(chosen)] = chosen, coefficients
    steps = dense.no_steps(len(rows), k, torch.device("cpu"))
    steps = steps._replace(indices=torch.from_numpy(indices), coefficients=torch.from_numpy(values))
    codes = _pack(steps, len(atoms), x.dtype)
    return codes.reshape(*x.shape[:-1]).to(x.device)


def as_tensor(a) -> Tensor | None:
    """An array or tensor of float16, bfloat16, float32 or float64 as a tensor, of any strides; None for others."""
    if isinstance(a, ndarray) and a.dtype.kind == "f" and a.dtype.itemsize <= 8:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*not writable", UserWarning)  # nothing here writes into it
            a = torch.from_numpy(np.asarray(a, a.dtype.newbyteorder("="), order="C"))
    usable = isinstance(a, Tensor) and a.dtype in LARGEST and a.layout == torch.strided and not a.is_meta
    return a if usable else None


def too_large(x: Tensor) -> tuple[int, ...] | None:
    """Where the first entry of `x` is that is not finite or beyond `LARGEST`, or None."""
    if not x.numel():
        return None
    low, high = x.detach().aminmax()
    if bool((low >= -LARGEST[x.dtype]) & (high <= LARGEST[x.dtype])):  # NaN compares false
        return None
    return tuple((~(x.abs() <= LARGEST[x.dtype])).nonzero()[0].tolist())


def _checked(x, atoms) -> tuple[Tensor, Tensor]:
    given, (x, atoms) = (x, atoms), (as_tensor(x), as_tensor(atoms))
    for name, a, came in (("x", x, given[0]), ("atoms", atoms, given[1])):
        if a is None:
            array = isinstance(came, Tensor | ndarray)
            kind = f"dtype {came.dtype}" if array else f"type {type(came).__name__}"
            advice = f"pass `{name}.astype('float32')`" if isinstance(came, ndarray) else f"pass `{name}.float()`"
            if isinstance(came, Tensor) and came.dtype in LARGEST:
                kind, advice = f"device {came.device}, layout {came.layout}", "pass one of entries in memory"
            raise InputError(f"`{name}` has {kind}; a dense floating-point tensor was wanted: {advice}.")
    if atoms.ndim != 2:
        raise InputError(f"`atoms` has shape {tuple(atoms.shape)}: pass a dictionary (n_atoms, d).")
    if not atoms.shape[1]:
        raise InputError(f"`atoms` has shape {tuple(atoms.shape)}: pass vectors of one entry or more.")
    if x.ndim < 1 or x.shape[-1] != atoms.shape[1]:
        raise InputError(
            f"`x` has shape {tuple(x.shape)} but `atoms` {tuple(atoms.shape)}: the last axes must be the same d."
        )
    if x.device != atoms.device:
        raise InputError(f"`x` is on {x.device} but `atoms` on {atoms.device}: move one of them with `.to(device)`.")
    where = too_large(x)
    if where is not None:
        limit = f"at most {LARGEST[x.dtype]:g}" if bool(torch.isfinite(x[where])) else "finite"
        raise InputError(f"`x` must be {limit}; the entry at {where} is {x[where].item()}. Drop or repair that token.")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.detach().to(dtype), atoms.detach().to(dtype)


def check_unit_norm(atoms: Float[Tensor, "n d"] | ndarray) -> None:
    """Raise `InputError` naming the first row of `atoms` whose norm is not 1 (to 1e-4, or 1e-2 in half precision)."""
    rows = as_tensor(atoms)
    assert rows is not None, "checked before"
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    allowed = 1e-2 if torch.finfo(rows.dtype).bits < 32 else 1e-4
    wrong = (~((norms - 1).abs() <= allowed)).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise InputError(
            f"`atoms` must have unit-norm rows; row {row} has norm {norms[row]:.4g}. "
            "Normalise with `itda.normalize(atoms)`."
        )


def _check_settings(k, method, nonneg, tol, backend, max_gram_bytes) -> None:
    if not isinstance(k, int) or isinstance(k, bool) or not 0 <= k <= MOST_STEPS:
        raise InputError(f"`k` is {shortened(k)}: pass a whole number of pursuit steps, 0 to {MOST_STEPS:,}.")
    if method not in tuple(METHODS):
        raise InputError(f"`method` is {shortened(method)}; choose one of {', '.join(map(repr, METHODS))}.")
    if not isinstance(nonneg, bool | np.bool_):
        raise InputError(f"`nonneg` is {shortened(nonneg)}: pass True or False.")
    if not isinstance(tol, Real) or not 0 <= float(tol) <= 1:
        raise InputError(f"`tol` is {shortened(tol)}: pass a share of the energy between 0 and 1.")
    if backend not in BACKENDS:
        raise InputError(f"`backend` is {shortened(backend)}; choose one of {', '.join(map(repr, BACKENDS))}.")
    if max_gram_bytes is not None and not (isinstance(max_gram_bytes, Real) and float(max_gram_bytes) >= 0):
        raise InputError(
            f"`max_gram_bytes` is {shortened(max_gram_bytes)}: pass a number of bytes, 0 or more, or None."
        )


def check_entries(x: Tensor, labels: Labels) -> None:
    """Raise `InputError` for the first entry of `x` (tokens, d) that is not finite, or too large to be squared."""
    where = too_large(x.float() if x.dtype == torch.float64 else x)  # judged in float32
    if where is not None:
        t, i = where
        kind, advice = "not finite", "read the model in a wider dtype (`dtype='float32'`)"
        if math.isfinite(x[where]):
            kind, advice = "too large", "scale all activations down"
        raise InputError(
            f"The activation at prompt {labels.prompt[t]}, position {labels.position[t]} is {kind} (entry {i} is "
            f"{x[where].item()}): {advice}, or leave that text out."
        )
