"""Products in full float32, by the fastest library at hand."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def product(x: Float[Tensor, "tokens d"], atoms: Float[Tensor, "n d"]) -> Float[Tensor, "tokens n"]:
    """All correlations x @ atoms.T, without TF32."""
    with full_float32():
        return x @ atoms.T


def pack(atoms: Float[Tensor, "n d"]) -> Tensor:
    """A copy of the atoms for `onednn`."""
    return atoms.to_mkldnn()


@cache
def onednn() -> Callable[[Tensor, Tensor], Tensor] | None:
    """oneDNN's float32 product of x and packed atoms, where torch has it, it agrees with torch's own and is faster.

    Torch's own is MKL's on x86, which leaves the wider vectors of some processors unused. One trial of a few
    milliseconds decides; no result depends on it, as pursuit settles in float64 whatever float32 leaves open.
    """
    g = torch.Generator().manual_seed(0)
    x, atoms = torch.randn(128, 512, generator=g), torch.randn(2048, 512, generator=g)
    try:
        packed = pack(atoms)
        with full_float32():
            faster = _seconds(lambda: _linear(x, packed)) < 0.8 * _seconds(lambda: x @ atoms.T)
            close = torch.allclose(_linear(x, packed), x @ atoms.T, rtol=0, atol=512 * 2.0**-20)
    except (RuntimeError, AttributeError):  # not in this build of torch
        return None
    return _linear if faster and close else None


def _linear(x: Tensor, packed: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def _seconds(run: Callable[[], Any]) -> float:
    run()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


@contextmanager
def full_float32() -> Iterator[None]:
    """Float32 products in float32: TF32 and bfloat16 short cuts off, the caller's setting restored."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # before torch 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    # The older functions raise where a caller has used the newer settings; these see both.
    places: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    settings = [place.fp32_precision for place in places]
    for place in places:
        place.fp32_precision = "ieee"
    try:
        yield
    finally:
        for place, setting in zip(places, settings, strict=True):
            place.fp32_precision = setting
