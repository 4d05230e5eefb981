"""Products in full float32, by the fastest library at hand."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

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


def is_full_float32() -> bool:
    """Whether the caller's own settings leave float32 products as they are."""
    places = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    if not hasattr(places[0], "fp32_precision"):  # before torch 2.9
        return torch.get_float32_matmul_precision() == "highest"
    return all(place.fp32_precision in ("none", "ieee") for place in places)


_precision = threading.RLock()


def renew_lock() -> None:
    """After a fork: the thread that held the lock may be gone."""
    global _precision
    _precision = threading.RLock()


@contextmanager
def full_float32() -> Iterator[None]:
    """Float32 products in float32: TF32, bfloat16 short cuts and autocast off, the caller's settings restored.

    They are the process's, so that one thread at a time may change them.
    """
    with _precision, torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False), _settings():
        yield


@contextmanager
def _settings() -> Iterator[None]:
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
