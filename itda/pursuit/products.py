"""Products in full float32, by the fastest library at hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from itda.devices import full_float32

MANY = 64  # rows; for products of fewer, oneDNN spends more on preparing for a shape that is new than it saves


def product(x: Float[Tensor, "tokens d"], atoms: Float[Tensor, "n d"]) -> Float[Tensor, "tokens n"]:
    """All correlations x @ atoms.T, without TF32."""
    suited = x.dtype == atoms.dtype == torch.float32 and x.device.type == "cpu" and min(len(x), len(atoms)) >= MANY
    faster = onednn() if suited else None
    with full_float32():
        return faster(x, atoms) if faster else x @ atoms.T


@cache
def onednn() -> Callable[[Tensor, Tensor], Tensor] | None:
    """oneDNN's product x @ atoms.T, where torch has it, it agrees with torch's own and is faster.

    Torch's own is MKL's on x86, which leaves the wider vectors of some processors unused. One trial of a few
    milliseconds decides; no result depends on it, as pursuit settles in float64 whatever float32 leaves open.
    """
    g = torch.Generator().manual_seed(0)
    x, atoms = (torch.randn(n, 512, generator=g, device="cpu", dtype=torch.float32) for n in (128, 2048))
    try:
        with full_float32():
            faster = _seconds(lambda: _linear(x, atoms)) < 0.8 * _seconds(lambda: x @ atoms.T)
            close = torch.allclose(_linear(x, atoms), x @ atoms.T, rtol=0, atol=512 * 2.0**-20)
    except (RuntimeError, AttributeError):  # not in this build of torch
        return None
    return _linear if faster and close else None


def _linear(x: Tensor, atoms: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, atoms, None, "none", [], "")


def _seconds(run: Callable[[], Any]) -> float:
    run()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
