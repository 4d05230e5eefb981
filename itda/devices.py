"""Which device, how much memory is free there, and float32 products that are in float32."""

from __future__ import annotations

import os
import platform
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from itda.errors import InputError, first_line


def is_full_float32() -> bool:
    """Whether the caller's own settings leave float32 products as they are."""
    places = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    if not hasattr(places[0], "fp32_precision"):  # before torch 2.9
        return torch.get_float32_matmul_precision() == "highest"
    return all(place.fp32_precision in ("none", "ieee") for place in places)


def has_bfloat16() -> bool:
    """Whether the processor has instructions for products of bfloat16 (AMX): without, float32's are faster."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def processor(device: torch.device) -> str:
    """The kind of processor that `device` is, on which the last bits of products depend: a GPU's name.

    Of a CPU, who made it and the widest instructions that products take: the libraries choose by these.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return f"{_maker()} {device.type}"
    more = {"AMX": has_bfloat16(), "AVX512_BF16": getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()}
    return " ".join(
        [_maker(), torch.backends.cpu.get_cpu_capability(), *(name for name, there in more.items() if there)]
    )


@lru_cache(maxsize=1)
def _maker() -> str:
    with suppress(OSError):
        found = re.search(
            r"^(?:vendor_id|CPU implementer)\s*:\s*(\S+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )
        if found:
            return found[1]
    return platform.machine()


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


def checked_device(device: str | torch.device | None) -> torch.device:
    """`device`, after trying it; without one the fastest there is."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device is None:
        return torch.device(next(name for name, is_there in there.items() if is_there))
    try:
        torch.zeros(1, device=device).item()
        return torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        names = " or ".join(repr(name) for name, is_there in there.items() if is_there)
        why = first_line(error)
        raise InputError(f"`device` is {str(device)!r}, which cannot be used here ({why}): pass {names}.") from error


def free_bytes(device: torch.device) -> float:
    """Memory that is free on `device`: of the machine, and of the control group this process is in."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = []
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free.append(1024.0 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    with suppress(OSError, ValueError):  # memory.max is "max" where there is no limit
        group = Path("/sys/fs/cgroup")
        used = int((group / "memory.current").read_text())
        free.append(float(int((group / "memory.max").read_text()) - used))
    if not free:  # no Linux: a quarter of all there is
        with suppress(OSError, ValueError, AttributeError):
            free.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 4.0)
    return max(min(free, default=4e9), 0.0)
