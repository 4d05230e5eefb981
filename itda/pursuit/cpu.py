"""Pursuit on the CPU, in numba: one product for all correlations, then a token at a time while its row is in cache.

A step reads one row of the Gram table, subtracts it from the token's correlations and takes the maximum of each block
of 64 in the same pass. Choices are made as in `dense`: correlations err by at most `dense.error_bound`, every atom
within twice that of the best is compared in float64 on the exact residual, and so is the floor. When that has cost a
token as much as a product with all atoms, its correlations are computed anew from the residual, so that they cannot
drift further.

A token whose next row is not in the table stops there; when all have, the missing rows are computed together and the
tokens go on. Tokens are spread over `torch.get_num_threads()` threads; no result depends on their number.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from itda.pursuit import reference
from itda.pursuit.dense import Steps, bound_factors, no_steps
from itda.pursuit.gram import BLOCK, STEP, Gram

LANES = 16
NEWEST = max(path.stat().st_mtime_ns for path in Path(__file__).parent.glob("*.py"))
FLAGS = {"reassoc", "nnan", "ninf", "nsz", "contract", "arcp"}  # sums in any order; no NaN comes in
FLOOR, TIE = reference.FLOOR, reference.TIE


def kernel(function: Callable) -> Callable:
    """`function` compiled when first called, without the GIL, and kept on disk where that is possible."""
    function = inspect.unwrap(function)  # from what checks types at run time
    options: Any = dict(nogil=True, fastmath=FLAGS, error_model="numpy")
    try:
        compiled = njit(cache=True, **options)(function)
    except RuntimeError:  # no folder can be written
        return njit(**options)(function)
    with suppress(AttributeError):
        _forgive(compiled._cache)
    with suppress(AttributeError):  # numba would look for changes in one file, but these take from several
        compiled._cache._cache_file._source_stamp = NEWEST
    return compiled


def _forgive(cache: Any) -> None:
    """A full disk, or files that are damaged, cost the time of compiling again and nothing else."""
    save, load = cache.save_overload, cache.load_overload

    def save_overload(*args: Any) -> None:
        with suppress(Exception):
            save(*args)

    def load_overload(*args: Any) -> Any:
        with suppress(Exception):
            return load(*args)

    cache.save_overload, cache.load_overload = save_overload, load_overload


@intrinsic
def subtract_block(context, out, source, start, table, rows, weights, first, last, mirror):
    """out[b] = source[b] - sum_i weights[i] table[rows[i], b] over a block b, first <= i < last, in registers.

    Returns the largest max(v, mirror v) of the block: mirror -1 gives |v|, 0 the positive part.
    """
    signature = types.float32(out, source, types.intp, table, rows, weights, types.intp, types.intp, types.float32)
    real, vector = ir.FloatType(), ir.VectorType(ir.FloatType(), LANES)
    whole = ir.VectorType(ir.IntType(16), LANES)

    def splat(builder, value):
        one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)

    def generate(context, builder, signature, arguments):
        out, source, start, table, rows, weights, first, last, mirror = arguments
        types_of = dict(zip(("out", "source", "start", "table", "rows", "weights"), signature.args, strict=False))

        def address(name, value, indices, kind):
            array = context.make_array(types_of[name])(context, builder, value)
            place = cgutils.get_item_pointer(context, builder, types_of[name], array, indices, wraparound=False)
            return builder.bitcast(place, kind.as_pointer()) if kind is not None else place

        def lanes(place, q, align):
            part = builder.load(builder.gep(place, [ir.Constant(ir.IntType(64), q)]))
            part.align = align
            return part

        count = BLOCK // LANES
        into, outof = address("out", out, [start], vector), address("source", source, [start], vector)
        sums = [cgutils.alloca_once(builder, vector) for _ in range(count)]
        for q, place in enumerate(sums):
            builder.store(lanes(outof, q, 4), place)
        with cgutils.for_range_slice(builder, first, last, ir.Constant(first.type, 1), first.type) as (i, _):
            row = builder.load(address("rows", rows, [i], None))
            entries = address("table", table, [row, start], whole)
            weight = splat(builder, builder.fneg(builder.load(address("weights", weights, [i], None))))
            for q, place in enumerate(sums):
                entry = builder.sitofp(lanes(entries, q, 2), vector)
                moved = builder.fmul(weight, entry, flags=("contract",))
                builder.store(builder.fadd(builder.load(place), moved, flags=("contract",)), place)
        mirrored, sizes = splat(builder, mirror), []
        for q, place in enumerate(sums):
            value = builder.load(place)
            builder.store(value, builder.gep(into, [ir.Constant(ir.IntType(64), q)])).align = 4
            sizes.append(_larger(builder, value, builder.fmul(mirrored, value)))
        while len(sizes) > 1:
            sizes.append(_larger(builder, sizes.pop(0), sizes.pop(0)))
        name = f"llvm.vector.reduce.fmax.v{LANES}f32"
        reduce = cgutils.get_or_insert_function(builder.module, ir.FunctionType(real, [vector]), name)
        return builder.call(reduce, sizes, fastmath=("nnan", "nsz"))

    return signature, generate


def _larger(builder, a, b):
    return builder.select(builder.fcmp_ordered(">", a, b, flags=("nnan", "nsz")), a, b)


@kernel
def subtract(out, source, table, rows, weights, first, last, mirror, tops):
    """`subtract_block` for all blocks; tops (blocks,) are their largest sizes."""
    for b in range(len(tops)):
        start = b * BLOCK
        tops[b] = subtract_block(out, source, start, table, rows, weights, first, last, mirror)  # type: ignore[call-arg]


@kernel
def dot(a, b):
    """<a, b> in float64."""
    total = 0.0
    for i in range(len(a)):
        total += a[i] * np.float64(b[i])
    return total


@kernel
def remove(residual, weight, atom):
    """residual -= weight * atom, in float64; as arguments, since entries of arrays would be read again each time."""
    for q in range(len(residual)):
        residual[q] -= weight * np.float64(atom[q])


@kernel
def candidates(corr, n, tops, bound, mirror, option):
    """Atoms whose float32 size is within twice `bound` of the largest, into `option`; how many."""
    best = np.float32(0)
    for b in range(len(tops)):
        best = max(best, tops[b])
    least, count = np.float32(best * (1 - 2.0**-22) - 2 * bound), 0
    for b in range(len(tops)):
        if tops[b] >= least:
            for i in range(b * BLOCK, min(b * BLOCK + BLOCK, n)):
                if max(corr[i], mirror * corr[i]) >= least:
                    option[count] = i
                    count += 1
    return count


@kernel
def choose(option, exact, count, mirror, norm):
    """The place of the choice among the candidates: largest exact size, lowest index on ties; -1 below the floor."""
    top = 0.0
    for i in range(count):
        top = max(top, max(exact[i], mirror * exact[i]))
    if top > FLOOR * norm:
        for i in range(count):
            if max(exact[i], mirror * exact[i]) >= top - TIE * norm:
                return i
    return -1


@kernel
def correlate(corr, residual, atoms, n, scratch):
    """Correlations of the residual with all atoms in float32, in place of those that were updated."""
    for i in range(len(residual)):
        scratch[i] = residual[i]
    for j in range(n):
        total = np.float32(0)
        for i in range(len(scratch)):
            total += scratch[i] * atoms[j, i]
        corr[j] = total


@kernel
def mp_tokens(todo, fresh, k, mirror, tol, bounds, gram, token, steps):
    """Matching pursuit of the tokens `todo`, each until it ends or needs a row of the table that is not there.

    `fresh` says that correlations were just computed, so that no row is to be subtracted first. `gram` are (atoms,
    table, slot, used), `token` the state (x, corr, residual, total, anchor, spent, work, waiting), `steps` the result.
    """
    atoms, table, slot, used = gram
    x, corr, residual, total, anchor, spent, work, waiting = token
    indices, coefficients, length, settled, energy, overlap = steps
    per_norm, per_step, underflow = bounds
    n, d = atoms.shape
    tops = np.empty(corr.shape[1] // BLOCK, np.float32)
    option, exact, scratch = np.empty(n, np.int64), np.empty(n), np.empty(d, np.float32)
    row, weight = np.zeros(1, np.int64), np.zeros(1, np.float32)
    for t in todo:
        c, r = corr[t], residual[t]
        if length[t] == 0:
            r[:] = x[t]
            total[t] = dot(r, r)
            anchor[t] = np.sqrt(total[t])
        if fresh:
            subtract(c, c, table, row, weight, 0, 0, mirror, tops)
        elif slot[waiting[t]] < 0:
            continue
        else:
            row[0], weight[0] = slot[waiting[t]], coefficients[t, length[t] - 1] * STEP
            used[row[0]] = 1
            subtract(c, c, table, row, weight, 0, 1, mirror, tops)
        waiting[t] = -1
        norm = np.sqrt(total[t])
        while length[t] < k and norm > 0:
            if tol > 0 and dot(r, r) <= (tol + TIE) * total[t]:
                break
            bound = per_norm * anchor[t] + per_step * spent[t] + underflow + TIE * norm
            count = candidates(c, n, tops, bound, mirror, option)
            work[t] += count - 1
            if work[t] > n and spent[t] > 0:
                correlate(c, r, atoms, n, scratch)
                subtract(c, c, table, row, weight, 0, 0, mirror, tops)
                anchor[t], spent[t], work[t] = np.sqrt(dot(r, r)), 0.0, 0
                continue
            for i in range(count):
                exact[i] = dot(r, atoms[option[i]])
            place = choose(option, exact, count, mirror, norm)
            settled[t] += count > 1 or (count == 1 and abs(abs(exact[0]) - FLOOR * norm) <= 2 * bound)
            if place < 0:
                break
            j, s = option[place], length[t]
            indices[t, s], coefficients[t, s] = j, exact[place]
            remove(r, exact[place], atoms[j])
            spent[t] += abs(exact[place])
            length[t] = s + 1
            if s + 1 == k:
                break
            if slot[j] < 0:
                waiting[t] = j
                break
            row[0], weight[0] = slot[j], exact[place] * STEP
            used[row[0]] = 1
            subtract(c, c, table, row, weight, 0, 1, mirror, tops)
        energy[t], overlap[t] = dot(r, r), dot(r, x[t])


def mp(
    x: Float[Tensor, "tokens d"],
    gram: Gram,
    k: int,
    nonneg: bool = False,
    tol: float = 0.0,
    corr: Float[Tensor, "tokens width"] | None = None,
) -> Steps:
    """Matching pursuit (Algorithm 2) of every row of `x`, float32 like the atoms; `corr`, if known, is written over."""
    tokens, d = x.shape
    steps = no_steps(tokens, k, x.device)
    if not gram.n or not k or not tokens:
        energy = x.double().square().sum(1)
        return steps._replace(energy=energy, overlap=energy)
    x, corr = x.contiguous(), gram.correlate(x) if corr is None else corr
    residual = x.new_empty(tokens, d, dtype=torch.float64)
    total, anchor, spent = x.new_zeros(3, tokens, dtype=torch.float64)
    work, waiting = x.new_zeros(tokens, dtype=torch.long), x.new_full((tokens,), -1, dtype=torch.long)
    token = tuple(a.numpy() for a in (x, corr, residual, total, anchor, spent, work, waiting))
    out = tuple(a.numpy() for a in steps)
    settings = (k, np.float32(0 if nonneg else -1), tol, bound_factors(d, x.dtype))
    todo, fresh = torch.arange(tokens, device=x.device), True
    while len(todo):
        tables = tuple(a.numpy() for a in (gram.atoms, gram.table, gram.slot, gram.used))
        spread(mp_tokens, todo.numpy(), fresh, *settings, tables, token, out)
        todo = (waiting >= 0).nonzero()[:, 0]
        fresh = not gram.usable
        if fresh and len(todo):
            corr[todo] = gram.correlate(residual[todo].float())
            anchor[todo], spent[todo] = residual[todo].square().sum(1).sqrt(), 0.0
        elif len(todo):
            gram.need(waiting[todo])
    return steps


_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def spread(function: Callable, todo: np.ndarray, *arguments) -> None:
    """`function(part of todo, *arguments)` on as many threads as torch uses; a pool serves one process only."""
    threads = torch.get_num_threads()
    if min(threads, len(todo)) == 1:
        return function(todo, *arguments)
    key = os.getpid(), threads
    pool = _pools.get(key)
    if pool is None:
        pool = ThreadPoolExecutor(threads, "itda-pursuit")
        _pools.clear()
        _pools[key] = pool
    parts = np.array_split(todo, min(len(todo), 4 * threads))
    for future in [pool.submit(function, part, *arguments) for part in parts]:
        future.result()
