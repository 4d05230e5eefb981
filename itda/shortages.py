"""What a machine runs out of, memory, files, room on the disk or threads: said as that, never as damage to a file."""

from __future__ import annotations

import errno
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from itda.errors import InputError, causes

# By errno, and by what libraries say that have an exception of their own for it; the first that fits.
_MEMORY, _FILES, _SYSTEM, _DISK, _THREADS = "memory", "files", "files of the system", "disk", "threads"
_NUMBERS = {
    errno.ENOMEM: _MEMORY,
    errno.EMFILE: _FILES,
    errno.ENFILE: _SYSTEM,
    errno.ENOSPC: _DISK,
    errno.EDQUOT: _DISK,
    errno.EAGAIN: _THREADS,
}
_WORDS = {
    _MEMORY: r"out of memory|not enough memory|(can't|cannot|unable to) allocate|bad_alloc|malloc of size|os error 12\b"
    r"|failed to map segment|OutOfMemory",
    _SYSTEM: r"too many open files in system|os error 23\b",
    _FILES: r"too many open files|os error 24\b",
    _DISK: r"no space left on device|disk quota exceeded|os error (28|122)\b",
    _THREADS: r"can't start new thread|resource temporarily unavailable|os error 11\b",
}
_FEW = 1024  # processes and threads; systems set more than that by themselves
_PROC, _GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# What is said where an allocation failed that nobody looked at: a shortage only where memory has a limit.
_UNDER_A_LIMIT = r"could not find/load shared object|error return without exception set|returned a result with an excep"
_SAID = {
    _MEMORY: (
        "memory ran out",
        "end other programs, raise the limit where one is set (`ulimit -v`), or take a machine with more",
    ),
    _FILES: (
        "this process has as many files open as it may",
        "raise the limit (`ulimit -n 4096` in this shell), and run it again",
    ),
    _SYSTEM: ("the system has as many files open as it can", "end other programs, and run it again"),
    _DISK: ("the disk is full", "free some space or choose another place"),
    _THREADS: (
        "no more threads or processes can be started",
        "end other programs, or raise the limit (`ulimit -u`), and run it again",
    ),
}


class Shortage(InputError):
    """The machine ran out of something: nothing is wrong with what was given, nor with any file."""


def lacking(error: BaseException) -> str | None:
    """What ran out, if that is what `error`, or one of those that led to it, is about; else None."""
    kind = next((kind for each in causes(error) if (kind := _kind(each)) is not None), None)
    # A thread takes room for its stack: where that has a limit, it is what is missing for one more.
    return _MEMORY if kind == _THREADS and _is_space_limited() and not are_processes_few() else kind


def _kind(error: BaseException) -> str | None:
    if isinstance(error, MemoryError):
        return _MEMORY
    if isinstance(error, OSError) and error.errno is not None:
        return _NUMBERS.get(error.errno)
    if isinstance(error, InputError) or not isinstance(error, Exception):
        return None  # a sentence of ours may quote anything
    text = str(error)[:4000]
    for kind, words in _WORDS.items():
        if re.search(words, text, re.IGNORECASE):
            return kind
    unsaid = isinstance(error, SystemError | OSError | ImportError) and re.search(_UNDER_A_LIMIT, text, re.IGNORECASE)
    return _MEMORY if unsaid and is_memory_limited() else None


def is_memory_limited() -> bool:
    """Whether this process may have so much memory only: by `ulimit -v` or `-d`, or its control group (version 2)."""
    return _is_space_limited() or _is_group_limited()


def are_processes_few() -> bool:
    """Whether this user may have fewer processes and threads than any system sets by itself (`ulimit -u`)."""
    return _limit("RLIMIT_NPROC") < _FEW


def _is_space_limited() -> bool:
    return any(math.isfinite(_limit(name)) for name in ("RLIMIT_AS", "RLIMIT_DATA"))


def _limit(name: str) -> float:
    """That of this process, infinite if there is none."""
    try:
        import resource
    except ImportError:  # Windows
        return math.inf
    found = resource.getrlimit(getattr(resource, name))[0]
    return math.inf if found == resource.RLIM_INFINITY else float(found)


def _is_group_limited() -> bool:
    """Whether a control group that this process is in has `memory.max`."""
    with suppress(OSError, ValueError):
        lines = (_PROC / "self/cgroup").read_text().splitlines()
        path = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
        group = _GROUPS / path
        found = (each / "memory.max" for each in (group, *group.parents) if each.is_relative_to(_GROUPS))
        return any(file.exists() and file.read_text().strip() != "max" for file in found)
    return False


def shortage(error: BaseException, what: str = "It could not be done", advice: str = "") -> Shortage | None:
    """`error` as one sentence if it comes of something that ran out, else None.

    `what` was not done; `advice` is what else may be done where the disk is full.
    """
    kind = lacking(error)
    if kind is None:
        return None
    if isinstance(error, Shortage):
        return error
    why, mend = _SAID[kind]
    if kind == _DISK and advice:
        mend = f"free some space or {advice}"
    return Shortage(f"{what}, because {why}: {mend}.")


def presumed(what: str) -> str:
    """The sentence for a process that `what` has been done to under a limit, of which it could not say anything."""
    why, mend = _SAID[_MEMORY if is_memory_limited() else _THREADS]
    return f"{what}, most likely because {why}: {mend}."


@contextmanager
def shortages_told(what: str) -> Iterator[None]:
    """Raise `Shortage`, which says that `what`, for whatever inside comes of something that ran out."""
    try:
        yield
    except Exception as error:
        if (said := shortage(error, what)) is not None and said is not error:
            raise said from error
        raise
