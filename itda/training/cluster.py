"""Processes on one machine or many, by Ray: who works, whose turn it is, and what a dead worker had is done again.

Ray starts processes, moves arrays between them and says which died; the rest is here, and nothing of what is computed.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from itda.errors import InputError, first_line

RETRIES = 3  # how often a piece of work that was lost with its worker is done again
PATIENCE = 900.0  # seconds for Ray to start a first worker
POLL = 0.5  # seconds between two looks at what goes on

# -- Ray --------------------------------------------------------------------------------------------------------------


@contextmanager
def connected(ray: bool | str, workers: int | None) -> Iterator[Any]:
    """The module `ray`, connected: as this process is already, to the cluster at an address, or to one started here.

    What was started here ends with it. Raises `InputError` where Ray is not installed or not reached.
    """
    module = _installed()
    if module.is_initialized():
        yield module
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody is told
    here = not isinstance(ray, str)
    cpus = {"num_cpus": max(workers or 1, os.cpu_count() or 1), "include_dashboard": False} if here else {}
    before = signal.getsignal(signal.SIGTERM)
    with redirect_stdout(sys.stderr):  # where Ray says which machine died, whatever it was told
        try:
            module.init("local" if here else ray, log_to_driver=False, logging_level=logging.ERROR, **cpus)
        except Exception as error:
            where = "could not be started here" if here else f"was not reached at {ray!r}"
            raise InputError(
                f"Ray {where} ({type(error).__name__}: {first_line(error)}): give the address of a cluster that "
                "`ray start` has started, or none for workers on this machine."
            ) from error
        finally:
            with suppress(ValueError, TypeError):  # not the main thread; Ray sets a handler of its own
                signal.signal(signal.SIGTERM, before)
        try:
            yield module
        finally:
            module.shutdown()


def _installed() -> Any:
    try:
        import ray
    except ImportError as error:
        raise InputError(
            "Several workers need Ray, which is not installed: `pip install 'itda[ray]'`, or leave out `workers` and "
            "`ray` (`--workers`, `--ray`)."
        ) from error
    return ray


# -- workers ----------------------------------------------------------------------------------------------------------


class Surroundings(NamedTuple):
    """What a worker takes over from the process that asks, so that it computes the same."""

    threads: int
    precision: str
    folder: str

    @classmethod
    def here(cls) -> Surroundings:
        return cls(torch.get_num_threads(), torch.get_float32_matmul_precision(), os.getcwd())

    def enter(self) -> None:
        """Make this process alike."""
        torch.set_num_threads(self.threads)
        torch.set_float32_matmul_precision(self.precision)
        with suppress(OSError):  # not there on this machine: then names are hub ids or absolute
            os.chdir(self.folder)


@dataclass(eq=False)
class _Worker:
    actor: Any
    started: Any  # Ray's reference to what `start` gives
    answer: Any = None  # which is this
    ready: bool = False


class Crew:
    """`size` processes on the machines of Ray, each with an object of `kind` whose `start(*args)` was called.

    One that dies is replaced, if there is room, and what it had is done again, by any. `check` sees what each `start`
    gave. Every worker asks Ray for one CPU and `gpus` GPUs; one method at a time runs in it, or `at_once`.
    """

    def __init__(
        self,
        ray: Any,
        kind: type,
        args: tuple,
        size: int,
        *,
        gpus: int = 0,
        at_once: int = 1,
        check: Callable[[Any], None] = lambda answer: None,
    ) -> None:
        self._ray, self._args, self._check, self.gpus = ray, args, check, gpus
        self.losses = (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError, ray.exceptions.WorkerCrashedError)
        wants = {"num_cpus": 1, "num_gpus": gpus, "max_concurrency": at_once, "scheduling_strategy": "SPREAD"}
        self._kind, self._deaths = ray.remote(**wants)(kind), 0
        self.workers = [self._hired() for _ in range(size)]

    def _hired(self) -> _Worker:
        actor = self._kind.remote()
        return _Worker(actor, actor.start.remote(*self._args))

    def close(self) -> None:
        """End all workers, whatever they do."""
        for worker in self.workers:
            with suppress(Exception):
                self._ray.kill(worker.actor)
        self.workers = []

    def first(self) -> None:
        """Wait until one worker is ready."""
        for _ in self.run("start", []):
            pass

    def run(
        self,
        method: str,
        calls: Iterable[tuple],
        *,
        each: int = 1,
        ahead: int | None = None,
        tick: Callable[[], None] = lambda: None,
        instead: Callable[[InputError], Any] | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """What `method` of some worker gives for each of `calls` (its arguments), with its index, as they are done.

        A worker has `each` of them at a time; none is begun that is `ahead` or more after the first that is not done.
        `tick` is called at least every `POLL` seconds. Raises what the method raised; `InputError` if a call was lost
        with its worker too often, unless `instead` makes a result of that, and if no worker comes.
        """
        todo, flying, asked = _Calls(calls, ahead), _Flying(), time.monotonic()
        while True:
            while (worker := self._free(flying, each)) and (call := todo.next()):
                flying[getattr(worker.actor, method).remote(*call.args)] = worker, call
            if not flying and any(worker.ready for worker in self.workers):
                return
            if not any(worker.ready for worker in self.workers) and time.monotonic() - asked > PATIENCE:
                raise self._nobody()
            starting = [worker.started for worker in self.workers if not worker.ready]
            done, _ = self._ray.wait([*flying, *starting], num_returns=1, timeout=POLL)
            tick()
            for reference in done:
                worker, call = flying.pop(reference, (self._starting(reference), None))
                if worker is None:  # one that was replaced meanwhile
                    continue
                found, value = self._got(reference, worker)
                if found and call is None:
                    self._check(value)
                    worker.answer, worker.ready = value, True
                elif call is not None:
                    if not found and (error := todo.lost(call, value)):
                        if instead is None:
                            raise error
                        found, value = True, instead(error)
                    if found:
                        todo.done(call)
                        yield call.number, value

    def _free(self, flying: _Flying, each: int) -> _Worker | None:
        """The worker with least to do that may have more."""
        load = Counter(id(worker) for worker, _ in flying.values())
        ready = [worker for worker in self.workers if worker.ready and load[id(worker)] < each]
        return min(ready, key=lambda worker: load[id(worker)], default=None)

    def _starting(self, reference: Any) -> _Worker | None:
        return next((worker for worker in self.workers if worker.started == reference), None)

    def _got(self, reference: Any, worker: _Worker) -> tuple[bool, Any]:
        """Whether there is a result, and it, or the error with which it was lost; a dead worker is replaced."""
        try:
            value = self._ray.get(reference)
        except self.losses as error:
            gone = isinstance(error, self._ray.exceptions.RayActorError) or not worker.ready
            if gone and worker in self.workers:
                self._replace(worker, error)
            return False, error
        except self._ray.exceptions.RayTaskError as error:
            cause = getattr(error, "cause", None)
            raise (cause if isinstance(cause, Exception) else error) from None
        self._deaths = 0
        return True, value

    def _replace(self, worker: _Worker, error: BaseException) -> None:
        self._deaths += 1
        if self._deaths > len(self.workers) + RETRIES:
            raise InputError(
                f"{self._deaths} workers died one after another ({first_line(error)}): look into Ray's logs for the "
                "reason; too little memory is the usual one, and fewer workers need less."
            )
        with suppress(Exception):
            self._ray.kill(worker.actor)  # if it is only out of reach
        self.workers[self.workers.index(worker)] = self._hired()

    def _nobody(self) -> InputError:
        there = self._ray.cluster_resources()
        return InputError(
            f"Ray has started no worker in {PATIENCE / 60:.0f} minutes: each wants a CPU and {self.gpus} GPUs, and the "
            f"cluster has {there.get('CPU', 0):.0f} CPUs and {there.get('GPU', 0):.0f} GPUs; wait until some are free, "
            "or choose another `device`."
        )


class _Call(NamedTuple):
    number: int
    args: tuple


_Flying = dict[Any, tuple[_Worker, _Call]]


class _Calls:
    """The calls of one `Crew.run`: in their order, but those first that were lost."""

    def __init__(self, calls: Iterable[tuple], ahead: int | None) -> None:
        self._rest, self._ahead, self._given = iter(calls), ahead, 0
        self._again: deque[_Call] = deque()
        self._open: set[int] = set()
        self._losses: Counter[int] = Counter()

    def next(self) -> _Call | None:
        if self._again:
            return self._again.popleft()
        if self._ahead is not None and self._open and self._given - min(self._open) >= self._ahead:
            return None
        for args in self._rest:
            call = _Call(self._given, args)
            self._open.add(call.number)
            self._given += 1
            return call
        return None

    def done(self, call: _Call) -> None:
        self._open.remove(call.number)

    def lost(self, call: _Call, error: BaseException) -> InputError | None:
        """Give it out again; or what to say if that was done often enough."""
        self._losses[call.number] += 1
        if self._losses[call.number] <= RETRIES:
            self._again.append(call)
            return None
        return InputError(
            f"A piece of work was lost with its worker {RETRIES + 1} times ({first_line(error)}): look into Ray's logs "
            "for the reason; too little memory is the usual one, and fewer `batch_rows` need less."
        )


def check_unshared(tensor_parallel: int | None) -> None:
    """Raise `InputError` for workers whose model would be shared between processes."""
    if tensor_parallel not in (None, 1):
        raise InputError("`workers` have a model each, and `tensor_parallel` has one in parts: drop one of the two.")


def shares(ray: Any, workers: int | None, device: str | None = None, device_map: Any = None) -> tuple[int, int]:
    """How many workers there will be, and how many GPUs each asks Ray for.

    One worker for each GPU, else for each machine; one GPU each, but with `device_map` an equal share of all.
    """
    total = int(ray.cluster_resources().get("GPU", 0))
    gpus = int(str(device).startswith("cuda")) if device is not None else min(1, total)
    if gpus and device_map is not None:
        gpus = max(1, total // (workers or 1))
        return workers or 1, gpus
    return workers or max(1, total if gpus else sum(node["Alive"] for node in ray.nodes())), gpus
