"""Sparse codes of non-negative values on the CPU, in numba: choosing them, decoding them, and the gradients of both.

Codes of a batch stand one token after another: those of token t are `latent[first[t]:last[t]]` and as many of `value`.
Sums over tokens are taken latent by latent, in the order of the tokens, so that no result depends on the number of
threads.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from itda.pursuit.cpu import kernel, spread
from itda.pursuit.dense import Steps

BLOCK = 16  # pre-activations that are passed over together where none is large enough


class Sparse(NamedTuple):
    """The codes of a batch; `first` and `last` (tokens,), `latent` and `value` (places,)."""

    first: Int[ndarray, " tokens"]
    last: Int[ndarray, " tokens"]
    latent: Int[ndarray, " places"]
    value: Float[ndarray, " places"]

    def l0(self) -> int:
        """How many are not zero, of all tokens together."""
        return int((self.last - self.first).sum())


class ByLatent(NamedTuple):
    """The same latent by latent: those of latent j are at `start[j]` to `start[j + 1]`, by token and by place."""

    start: Int[ndarray, " latents_and_one"]
    token: Int[ndarray, " places"]
    place: Int[ndarray, " places"]

    def tokens(self) -> Int[ndarray, " latents"]:
        """How many tokens have each latent."""
        return np.diff(self.start)


def largest(pre: Float[Tensor, "tokens n"], k: int) -> Sparse:
    """Of each token the k largest, as far as they are positive; of equal ones those of lowest index."""
    pre_, (tokens, n) = pre.numpy(), pre.shape
    k = min(k, n)
    index, value, first = np.empty(tokens * k, np.int32), np.empty(tokens * k, np.float32), np.arange(tokens) * k
    last = first.copy()
    spread(_largest, np.arange(tokens), pre_, k, index, value, last)
    return Sparse(first, last, index, value)


def above(pre: Float[Tensor, "tokens n"], least: Float[Tensor, " tokens"]) -> Sparse:
    """Of each token what is positive and `least` or more."""
    pre_, tokens = pre.numpy(), np.arange(len(pre))
    count = np.zeros(len(pre) + 1, np.int64)
    spread(_count, tokens, pre_, least.numpy(), count[1:])
    start = count.cumsum()
    index, value = np.empty(start[-1], np.int32), np.empty(start[-1], np.float32)
    spread(_fill, tokens, pre_, least.numpy(), start, index, value)
    return Sparse(start[:-1], start[1:], index, value)


def of_batch(pre: Float[Tensor, "tokens n"], count: int, guess: float) -> Sparse:
    """Of all tokens together the `count` largest, as far as they are positive, and those equal to the last of them.

    `guess` is what the last of them may be, which saves time where it is near and changes nothing.
    """
    found = above(pre, torch.full((len(pre),), guess))
    if found.l0() < count and guess > 0:
        found = above(pre, torch.zeros(len(pre)))
    if found.l0() <= count:
        return found
    least = np.partition(found.value, found.l0() - count)[found.l0() - count]
    keep = found.value >= least
    ends = np.concatenate([[0], keep.cumsum()])
    return Sparse(ends[found.first], ends[found.last], found.latent[keep], found.value[keep])


def by_latent(codes: Sparse, n: int) -> ByLatent:
    """`codes` in the order of their latents, and of each latent in that of the tokens."""
    start = np.zeros(n + 1, np.int64)
    token, place = np.empty(codes.l0(), np.int32), np.empty(codes.l0(), np.int64)
    _sort(codes.first, codes.last, codes.latent, start, token, place)
    return ByLatent(start, token, place)


def residuals(
    codes: Sparse, atoms: Float[Tensor, "n d"], bias: Float[Tensor, " d"], x: Float[Tensor, "tokens d"]
) -> tuple[Float[Tensor, "tokens d"], Float[ndarray, " places"]]:
    """x_hat - x, with x_hat = codes @ atoms + bias; and of each place of the codes <x_hat - x, atom>."""
    error, slope = torch.empty_like(x), np.empty_like(codes.value)
    spread(_residuals, np.arange(len(x)), *codes, atoms.numpy(), bias.numpy(), x.numpy(), error.numpy(), slope)
    return error, slope


def sums(
    order: ByLatent, value: Float[ndarray, " places"], rows: Float[Tensor, "tokens d"], out: Float[Tensor, "n d"]
) -> None:
    """out[j] = sum over the tokens t of latent j of its value there times rows[t]."""
    spread(_sums, np.arange(len(out)), *order, value, rows.numpy(), out.numpy(), True)


def totals(order: ByLatent, value: Float[ndarray, " places"]) -> Float[Tensor, " n"]:
    """The sum of the values of each latent."""
    out = torch.empty(len(order.start) - 1)
    _totals(*order, value, out.numpy())
    return out


def unrolled(
    x: Float[Tensor, "tokens d"], steps: Steps, atoms: Float[Tensor, "n d"], slope: float, out: Float[Tensor, "n d"]
) -> tuple[Float[Tensor, "tokens d"], Float[Tensor, "tokens d"]]:
    """The gradient of slope |r|^2 / 2 by the atoms, into `out`, with r what matching pursuit leaves of x.

    Steps are taken back one by one: of r' = r - z d with z = <r, d>, the gradient g' by r' gives -z g' - <g', d> r by
    the atom, and g' - <g', d> d by r. Returns r and the gradient by x.
    """
    (tokens, d), k = x.shape, steps.indices.shape[1]
    rest, back = torch.empty_like(x), torch.empty_like(x)
    at_once, length = max(1, (1 << 24) // (k * d)), steps.length.numpy()
    index, value = steps.indices.numpy(), steps.coefficients.numpy()
    for start in range(0, tokens, at_once):
        some = slice(start, start + at_once)
        first = np.arange(len(length[some])) * k
        parts = np.empty((len(first) * k, d), np.float32)
        spread(
            *(_unrolled, np.arange(len(first)), x[some].numpy(), index[some], value[some], length[some]),
            *(atoms.numpy(), np.float32(slope), rest[some].numpy(), back[some].numpy(), parts),
        )
        codes = Sparse(first, first + length[some], index[some].ravel(), np.ones(len(parts), np.float32))
        order = by_latent(codes, len(out))
        spread(
            _sums,
            np.arange(len(out)),
            order.start,
            order.place,
            order.place,
            codes.value,
            parts,
            out.numpy(),
            not start,
        )
    return rest, back


@kernel
def _unrolled(todo, x, index, value, length, atoms, slope, rest, back, parts):
    k, d = index.shape[1], x.shape[1]
    for t in todo:
        r, g = rest[t], back[t]
        r[:] = x[t]
        for s in range(length[t]):
            atom, z = atoms[index[t, s]], np.float32(value[t, s])
            for q in range(d):
                r[q] -= z * atom[q]
        for q in range(d):
            g[q] = slope * r[q]
        before = r.copy()
        for s in range(length[t] - 1, -1, -1):
            atom, z, part, along = atoms[index[t, s]], np.float32(value[t, s]), parts[t * k + s], np.float32(0)
            for q in range(d):
                before[q] += z * atom[q]
                along += g[q] * atom[q]
            for q in range(d):
                part[q] = -z * g[q] - along * before[q]
                g[q] -= along * atom[q]


@kernel
def _largest(todo, pre, k, index, value, last):
    n = pre.shape[1]
    whole = n // BLOCK * BLOCK
    heap, at = np.empty(k, np.float32), np.empty(k, np.int32)  # the smallest is at the top; among equal ones the last
    for t in todo:
        row, count, bar = pre[t], 0, np.float32(0)
        for start in range(0, n, BLOCK):
            stop = min(start + BLOCK, n)
            if start < whole:
                top = row[start]
                for q in range(BLOCK):
                    top = max(top, row[start + q])
                if top <= bar:
                    continue
            for j in range(start, stop):
                v = row[j]
                if v <= bar:
                    continue
                if count < k:
                    i = count  # goes up while it is smaller than what is above it
                    count += 1
                    while i > 0 and heap[(i - 1) // 2] >= v:
                        heap[i], at[i] = heap[(i - 1) // 2], at[(i - 1) // 2]
                        i = (i - 1) // 2
                    heap[i], at[i] = v, j
                else:
                    i = 0  # takes the place of the smallest, and goes down
                    while True:
                        child = 2 * i + 1
                        if child >= k:
                            break
                        if child + 1 < k and (
                            heap[child + 1] < heap[child]
                            or (heap[child + 1] == heap[child] and at[child + 1] > at[child])
                        ):
                            child += 1
                        if heap[child] >= v:
                            break
                        heap[i], at[i] = heap[child], at[child]
                        i = child
                    heap[i], at[i] = v, j
                if count == k:
                    bar = heap[0]
        for i in range(count):
            index[t * k + i], value[t * k + i] = at[i], heap[i]
        last[t] = t * k + count


@kernel
def _count(todo, pre, least, count):
    for t in todo:
        row, bar, found = pre[t], least[t], 0
        for j in range(len(row)):
            found += (row[j] >= bar) & (row[j] > 0)
        count[t] = found


@kernel
def _fill(todo, pre, least, start, index, value):
    for t in todo:
        row, bar, i = pre[t], least[t], start[t]
        for j in range(len(row)):
            if (row[j] >= bar) & (row[j] > 0):
                index[i], value[i] = j, row[j]
                i += 1


@kernel
def _sort(first, last, index, start, token, place):
    for t in range(len(first)):
        for i in range(first[t], last[t]):
            start[index[i] + 1] += 1
    for j in range(1, len(start)):
        start[j] += start[j - 1]
    at = start.copy()
    for t in range(len(first)):
        for i in range(first[t], last[t]):
            q = at[index[i]]
            token[q], place[q] = t, i
            at[index[i]] = q + 1


@kernel
def _residuals(todo, first, last, index, value, atoms, bias, x, error, slope):
    d = x.shape[1]
    for t in todo:
        e = error[t]
        for q in range(d):
            e[q] = bias[q] - x[t, q]
        for i in range(first[t], last[t]):
            atom, v = atoms[index[i]], value[i]
            for q in range(d):
                e[q] += v * atom[q]
        for i in range(first[t], last[t]):
            atom, found = atoms[index[i]], np.float32(0)
            for q in range(d):
                found += e[q] * atom[q]
            slope[i] = found


@kernel
def _sums(todo, start, token, place, value, rows, out, fresh):
    d = out.shape[1]
    for j in todo:
        o = out[j]
        if fresh:
            o[:] = 0
        for i in range(start[j], start[j + 1]):
            row, v = rows[token[i]], value[place[i]]
            for q in range(d):
                o[q] += v * row[q]


@kernel
def _totals(start, token, place, value, out):
    for j in range(len(out)):
        found = np.float32(0)
        for i in range(start[j], start[j + 1]):
            found += value[place[i]]
        out[j] = found
