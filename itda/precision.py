"""Float32 products in float32, whatever the caller has set."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


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
