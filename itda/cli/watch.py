"""Where memory or processes are limited, libraries end a process with no word: a second one says why.

The command then runs in a child, which this process watches. Signals are passed on, the status is the child's.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from itda.cli import terminal
from itda.shortages import are_processes_few, is_memory_limited, presumed, shortage

PASSED_ON = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGTSTP", "SIGWINCH")
LOOK = 5.0  # seconds between two looks at the child
STUCK = 60.0  # seconds in which no thread of it ran and each waited for another
_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux


def is_needed() -> bool:
    """Whether a library may end this process before anything can be said: on Linux, under a limit."""
    return sys.platform == "linux" and (is_memory_limited() or are_processes_few())


def watched(run: Callable[[], int], here: str) -> int:
    """Call `run` in a child process and return its status, there and here.

    If the child ended before `run` returned, if all of its threads wait for one another, or if there can be no child,
    a sentence that begins with `here` says so, and the status is 2.
    """
    numbers = {getattr(signal, name) for name in PASSED_ON}
    watcher, (said, says) = os.getpid(), os.pipe()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, *numbers})
    try:
        child = os.fork()
    except OSError as error:
        return terminal.fail(str(shortage(error, f"{here} could not begin") or error), False)
    if not child:
        _settle(watcher, before)
        status = run()
        os.write(says, bytes([status]))
        return status
    how = _end_of(child, numbers)
    os.set_blocking(said, False)
    with suppress(BlockingIOError):
        return os.read(said, 1)[0]
    if how is not None and -how in numbers:
        return 128 - how
    return terminal.fail(presumed(f"{here} {_told(how)}"), False)


def _told(how: int | None) -> str:
    if how is None:
        return "stood still"
    return f"was ended by {signal.Signals(-how).name}" if how < 0 else "was ended by a library"


def _settle(watcher: int, mask: set) -> None:
    """In the child: end with the watcher, and get each signal once, from it, not from the terminal as well."""
    import ctypes

    ctypes.CDLL(None).prctl(_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != watcher:  # gone already
        os._exit(1)
    os.setpgid(0, 0)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # it may write to the terminal all the same
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if (
        is_memory_limited()
    ):  # OpenBLAS asks for the buffers of its threads again and again, for ever, if there is no room
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def _end_of(child: int, numbers: set[int]) -> int | None:
    """Pass signals on until `child` has ended; its exit status, negative for a signal; None if it was stuck."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a parent may have had it ignored
    last, since = "", time.monotonic()
    while True:
        came = signal.sigtimedwait({signal.SIGCHLD, *numbers}, LOOK)
        if came is not None and came.si_signo != signal.SIGCHLD:
            with suppress(ProcessLookupError):
                os.kill(child, came.si_signo)
        ended, status = os.waitpid(child, os.WNOHANG | os.WUNTRACED)
        if ended and os.WIFSTOPPED(status):
            os.kill(os.getpid(), signal.SIGSTOP)  # and here again, when the shell lets both go on
            os.kill(child, signal.SIGCONT)
        elif ended:
            return os.waitstatus_to_exitcode(status)
        elif came is None:
            now = _standstill(child)
            if not now or now != last:
                last, since = now, time.monotonic()
            elif time.monotonic() - since > STUCK:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return None


def _standstill(child: int) -> str:
    """How long each thread of `child` has run, if all of them wait for another thread; else nothing."""
    ran = []
    with suppress(OSError):
        for task in sorted(Path(f"/proc/{child}/task").iterdir()):
            if not (task / "wchan").read_text().startswith("futex"):
                return ""
            ran.append(f"{task.name} {(task / 'schedstat').read_text()}")
        return " ".join(ran)
    return ""
