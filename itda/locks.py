"""Folders that one process writes at a time, and that others read meanwhile."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from itda.disk import ELSEWHERE, as_input_error
from itda.errors import InputError

T = TypeVar("T")
PATIENCE = 60.0  # seconds that a short writing waits for another one
SETTLING = 5.0  # seconds that a reader waits for a folder that is being replaced
MOST_CHANGES = 100  # of a folder, after which a reader gives up
_LOOK = 0.01  # seconds between two looks
_held: set[tuple[str, int, int]] = set()  # folder, process and thread


class NoLocks(RuntimeWarning):
    """A folder is where nothing can be locked: two processes that write there at once are not kept apart."""


@contextmanager
def locked(target: Path, doing: str = "writing into", *, patience: float = 0.0, within: bool = False) -> Iterator[bool]:
    """Make the folder, and keep everybody else from `doing` the same meanwhile; yields whether it is new and empty.

    It is the folder itself that is locked, so nothing is left behind; a folder that was made and not used goes again.
    A part of what holds the lock already, in the same thread, says so by `within`. Another holder is waited for
    `patience` seconds, and then `InputError` says that there is one. Where the system has no locks, a `NoLocks` warning
    says that.
    """
    key = os.path.realpath(target), os.getpid(), threading.get_ident()
    if within and key in _held:
        yield False
        return
    descriptor, new = None, False
    try:
        new = _make(target)
        descriptor = _lock(target, doing, time.monotonic() + patience)
        _held.add(key)
        try:
            yield new and not os.listdir(target)  # another may have been here before it was locked
        finally:
            _held.discard(key)  # also where another thread closes a generator that this is in
    finally:
        try:
            if new:
                with suppress(OSError):
                    target.rmdir()  # before others may use it
        finally:
            if descriptor is not None:
                os.close(descriptor)


def _lock(target: Path, doing: str, until: float) -> int | None:
    """A descriptor that holds the lock, or None where there are none."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    while True:
        with as_input_error(f"{target} could not be used", ELSEWHERE):
            descriptor = _opened(target)
        if descriptor is None:
            _unlocked(target)
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            if time.monotonic() >= until:
                raise InputError(
                    f"Another process is {doing} {target}: wait for it to end, or choose another folder."
                ) from None
            time.sleep(_LOOK)
            continue
        except OSError:
            os.close(descriptor)
            _unlocked(target)
            return None
        if _is_still(descriptor, target):
            return descriptor
        os.close(descriptor)  # another folder has come in its place meanwhile
        _make(target)


def _unlocked(target: Path) -> None:
    said = f"{target} cannot be locked there: see to it that no two processes write into it at once."
    warnings.warn(said, NoLocks, stacklevel=5)


def _make(target: Path) -> bool:
    """Make the folder if it is not there; whether it was made here."""
    with as_input_error(f"{target} could not be written", ELSEWHERE):
        if target.is_dir():
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            target.mkdir()
        except FileExistsError:
            if not target.is_dir():
                raise
            return False
        return True


def _opened(target: Path) -> int | None:
    try:
        return os.open(target, os.O_RDONLY)
    except PermissionError:  # one that may be written and not be listed
        return None
    except FileNotFoundError:  # its maker had no use for it
        _make(target)
        return _opened(target)


def _is_still(descriptor: int, target: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(target))
    return False


def is_locked(target: Path) -> bool:
    """Whether somebody else holds the lock of a folder; False where nobody can."""
    if (os.path.realpath(target), os.getpid(), threading.get_ident()) in _held:
        return False
    with suppress(ImportError, OSError):
        import fcntl

        descriptor = os.open(target, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
    return False


def settled(read: Callable[[], T], stamp: Callable[[], object], is_being_replaced: Callable[[], bool]) -> T:
    """What `read` returns; it is called again where what it reads was replaced in between, as `stamp` tells.

    While it is being replaced, for some seconds at most, it is waited for. What is wrong then is wrong.
    """
    until, changes = time.monotonic() + SETTLING, 0
    while True:
        before = stamp()
        try:
            return read()
        except InputError:
            if stamp() != before and changes < MOST_CHANGES:
                until, changes = time.monotonic() + SETTLING, changes + 1
            # Looked at twice: one replacement may end, and the next begin, between two looks.
            elif time.monotonic() >= until or not (is_being_replaced() or stamp() != before or is_being_replaced()):
                raise
        time.sleep(_LOOK)


def stamp_of(path: Path) -> tuple[int, int, int] | None:
    """What tells one file at `path` from the next; None where there is none."""
    with suppress(OSError, ValueError):  # of a name that no file can have
        found = os.stat(path)
        return found.st_ino, found.st_mtime_ns, found.st_size
    return None
