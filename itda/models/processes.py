"""Processes on this machine that work in step with this one, and what becomes of them when one of them ends.

They are told over pipes what to do. A pipe that closes says that the process at its other end is gone, however it went.
"""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from itda.errors import InputError

# Ctrl-C and the signal that ends a job are for the first process, which may have something to finish.
FOLLOWER = (
    "import signal, sys; [signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGTERM)]; "
    "sys.path[:] = {path!r}; from itda.models.shared_model import follow; follow()"
)
PATIENCE = timedelta(minutes=10)  # for a process that lives and does not answer
LAST_WORDS = 3.0  # seconds in which a process that has failed says why


class Start(NamedTuple):
    """What a process is told first."""

    rank: int
    size: int
    kind: str  # of device
    store: str  # the file by which they find each other
    threads: int
    precision: str
    load: tuple[str, list, dict[str, Any]]  # model, hook points and settings

    def enter(self) -> None:
        """Become one of the group."""
        if self.kind == "cuda":
            torch.cuda.set_device(self.rank)
        store = dist.FileStore(self.store, self.size)
        backend = "nccl" if self.kind == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=PATIENCE)


class Team:
    """The processes that share a model, as the first of them sees the others."""

    def __init__(self, model: str, size: int, kind: str, load: tuple[str, list, dict[str, Any]]) -> None:
        self.model, self.size = model, size
        self._why: str | None = None  # they are of no use any more
        self._turn = threading.RLock()
        self._said: SimpleQueue[tuple[int, str, Any]] = SimpleQueue()
        self.processes: list[subprocess.Popen[bytes]] = []
        folder = tempfile.TemporaryDirectory(prefix="itda-")
        self._broken, ending = threading.Event(), threading.Event()
        self.close = weakref.finalize(self, _end, self.processes, folder, self._broken, ending)
        precision = torch.get_float32_matmul_precision()
        self._own = Start(0, size, kind, str(Path(folder.name, "group")), torch.get_num_threads(), precision, load)
        code = FOLLOWER.format(path=sys.path)
        for rank in range(1, size):
            process = subprocess.Popen(
                [sys.executable, "-c", code, folder.name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "LOCAL_RANK": str(rank)},  # by which transformers chooses its GPU
            )
            self.processes.append(process)
            args = (rank, process.stdout, self._said, ending, kind)
            threading.Thread(target=_listen, args=args, daemon=True, name=f"itda-part-{rank}").start()
            with suppress(OSError):  # gone already, which `meet` says
                _send(process, self._own._replace(rank=rank))

    def meet(self) -> None:
        """Wait for the others, and make a group of all."""
        self.hear("here")
        self._own.enter()

    def hear(self, word: str) -> list[Any]:
        """What each of the others says with `word`; `InputError` if one says something else, or is gone."""
        found: dict[int, Any] = {}
        while len(found) < self.size - 1:
            rank, said, what = self._said.get()
            if said != word:
                raise InputError(self._lost(rank, said, what))
            found[rank] = what
        return [found[rank] for rank in sorted(found)]

    @contextmanager
    def at_work(self, *task: Any) -> Iterator[None]:
        """The others do `task` while this process does the same; `InputError` if one of them is lost.

        An `InputError` from within is one that all have met, at the same place. After anything else they are not at
        the same place any more, and end.
        """
        with self._turn:
            try:
                self._check()
                for process in self.processes:
                    _send(process, task)
                yield
                self._check()
            except InputError:
                if self._why is not None:
                    self._leave()
                raise
            except BaseException as error:
                lost = self.reason(LAST_WORDS) if isinstance(error, Exception) else None
                self._leave()
                if lost is not None:
                    raise InputError(lost) from error
                raise

    def _check(self) -> None:
        if self._why is None and not self._said.empty():  # where nothing was asked
            self._lost(*self._said.get())
        if self._why is not None or not self.close.alive:
            raise InputError(self._why or f"`{self.model}` was closed: load it again.")

    def _leave(self) -> None:
        """End them wherever they are."""
        self._why = self._why or f"`{self.model}` was left in the middle of a forward pass: load it again."
        self._broken.set()
        self.close()

    def reason(self, seconds: float) -> str | None:
        """Which of the others was lost, and how; None if within `seconds` none was."""
        while self._why is None:
            try:
                rank, said, what = self._said.get(timeout=seconds)
            except Empty:
                break
            if said in ("failed", "ended"):
                return self._lost(rank, said, what)
        return self._why

    def _lost(self, rank: int, said: str, what: Any) -> str:
        """Take down which was lost first: one that ended without a word, before those that failed for want of it."""
        heard = {rank: (said, what)}
        with suppress(Empty):
            while True:
                rank, *found = self._said.get(timeout=0.5)
                heard.setdefault(rank, tuple(found))
        rank = next((rank for rank, (said, _) in heard.items() if said == "ended"), next(iter(heard)))
        said, what = heard[rank]
        who = f"Process {rank + 1} of {self.size} that share `{self.model}`"
        if said == "ended":
            with suppress(subprocess.TimeoutExpired):
                self.processes[rank - 1].wait(LAST_WORDS)
            code = self.processes[rank - 1].returncode or 0
            what = f"signal {-code}" if code < 0 else f"exit status {code}"
            self._why = f"{who} is gone ({what}): see that there is memory for its part, and give the same call again."
        else:
            self._why = f"{who} has failed ({what}): see that there is memory for its part, or drop `tensor_parallel`."
        return self._why


def connection() -> tuple[SimpleQueue[Any], Callable[[str, Any], None]]:
    """In another process: what the first wants, one thing after another, and a function that answers it."""
    said = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    tasks: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_receive, args=(tasks,), daemon=True).start()

    def say(word: str, what: Any) -> None:
        pickle.dump((word, what), said)
        said.flush()

    return tasks, say


def _receive(tasks: SimpleQueue[Any]) -> None:
    """In the others: what the first process wants; the end, however busy this one is, when that has ended."""
    with suppress(Exception):
        while True:
            tasks.put(pickle.load(sys.stdin.buffer))
    shutil.rmtree(sys.argv[1], ignore_errors=True)  # it is gone, or this process will be
    os._exit(0)


def _listen(rank: int, stream: Any, said: SimpleQueue, ending: threading.Event, kind: str) -> None:
    """In the first process: what another says, and that it is gone."""
    with suppress(Exception):
        while True:
            said.put((rank, *pickle.load(stream)))
    said.put((rank, "ended", None))
    if kind == "cuda" and not ending.is_set():  # NCCL would wait for it; gloo sees that its connection is closed
        _abort()


def _send(process: subprocess.Popen[bytes], what: Any) -> None:
    assert process.stdin is not None
    process.stdin.write(pickle.dumps(what))
    process.stdin.flush()


def _abort() -> None:
    with suppress(Exception):
        torch.distributed.distributed_c10d._abort_process_group()


def _end(processes: list[subprocess.Popen[bytes]], folder: Any, broken: threading.Event, ending: Any) -> None:
    """All others gone, and this process in no group any more."""
    ending.set()
    for process in processes:
        with suppress(OSError, ValueError):
            _send(process, None)
            if broken.is_set():  # it may wait for this process, and looks at nothing but this
                process.stdin.close()  # type: ignore[union-attr]
    if broken.is_set():
        _abort()
    if dist.is_initialized():
        dist.destroy_process_group()
    for process in processes:
        try:
            process.wait(LAST_WORDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
    folder.cleanup()
