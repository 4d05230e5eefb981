"""How far a long work is: one line on the terminal, one now and then elsewhere, or what the caller makes of it."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from itda.errors import counted, one_line

SELDOM = 30.0  # seconds between two lines where there is no terminal: nothing for short works, few in a log of hours


class Progress(NamedTuple):
    """Where a build is: tokens read of `total` (None: not known), atoms so far, the share of the last batch's tokens
    that was admitted, and seconds since this process began it. Several dictionaries are added up."""

    tokens: int
    total: int | None
    atoms: int
    admitted: float
    seconds: float
    start: int = 0  # tokens that an earlier process had done
    settled: float = 0.0  # share of all decisions (which atom, admit or not) taken in float64

    @property
    def tokens_per_second(self) -> float:
        """Mean speed of this process."""
        return (self.tokens - self.start) / self.seconds if self.seconds > 0 else 0.0

    def __str__(self) -> str:
        return " · ".join(self.parts())

    def parts(self, width: int | None = None) -> list[str]:
        """What there is to say, in order; of it, what is most telling and fits into `width` columns."""
        tokens = (f"{self.tokens:,} of " if self.total else "") + counted(self.total or self.tokens, "token")
        found = [(0, tokens), (3, f"{self.tokens_per_second:,.0f}/s")]
        if self.atoms:
            found += [(2, counted(self.atoms, "atom"))]
            found += [(4, f"{self.admitted:.1%} admitted")] if self.admitted else []
        else:
            found += [(5, "reading what the mean and the threshold are chosen on")]
        if self.total and self.tokens_per_second:
            found += [(1, left((self.total - self.tokens) / self.tokens_per_second))]
        return fitting(found, width)


class Step(NamedTuple):
    """How far one of several works is: `tokens` done of `total`, and seconds since it began."""

    what: str
    tokens: int
    total: int | None
    seconds: float

    def __str__(self) -> str:
        return " · ".join(self.parts())

    def parts(self, width: int | None = None) -> list[str]:
        """What there is to say, in order; of `width` columns, the name of the work has what the numbers leave."""
        counts = bool(self.tokens or self.total)
        numbers = [(0, f"{self.tokens:,}" + (f" of {self.total:,}" if self.total else ""))] * counts
        if self.total and self.tokens and self.seconds:
            numbers += [(1, left(self.seconds / self.tokens * (self.total - self.tokens)))]
        if width is None:
            return [self.what, *fitting(numbers, None)]
        least = min(len(self.what), 20)
        kept = fitting(numbers, width - least - 3)
        room = max(least, width - sum(len(part) + 3 for part in kept))
        what = self.what if len(self.what) <= room else self.what[: room - 1] + "…"
        return [what, *kept]


class Learning(NamedTuple):
    """Where a training of SAEs is: tokens used of `total`, and recent figures of each kind."""

    tokens: int
    total: int
    seconds: float
    start: int  # tokens that an earlier process had used
    figures: Mapping[str, tuple[float, float, float, float]]  # by kind: loss, fvu, l0, share of dead latents

    @property
    def tokens_per_second(self) -> float:
        """Mean speed of this process."""
        return (self.tokens - self.start) / self.seconds if self.seconds > 0 else 0.0

    def __str__(self) -> str:
        return " · ".join(self.parts())

    def parts(self, width: int | None = None) -> list[str]:
        """What there is to say, in order; of it, what is most telling and fits into `width` columns."""
        found = [(0, f"{self.tokens:,} of {counted(self.total, 'token')}"), (3, f"{self.tokens_per_second:,.0f}/s")]
        for i, (kind, (loss, fvu, l0, dead)) in enumerate(self.figures.items()):
            name = f"{kind} " if len(self.figures) > 1 else ""
            found.append((2 + 2 * i, f"{name}loss {loss:.3g}, FVU {fvu:.3f}, L0 {l0:.0f}, {dead:.1%} dead"))
        if self.tokens_per_second:
            found += [(1, left((self.total - self.tokens) / self.tokens_per_second))]
        return fitting(found, width)


def left(seconds: float) -> str:
    """The time that is left, as 4:05 or 1:04:05."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return (f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}") + " left"


def fitting(parts: list[tuple[int, str]], width: int | None) -> list[str]:
    """The texts of `parts`, (rank, text): while they do not fit into `width` columns, that of the last rank goes."""
    kept = list(parts)
    while width is not None and len(kept) > 1 and len(" · ".join(text for _, text in kept)) > width:
        kept.remove(max(kept))
    return [text for _, text in kept]


def bar() -> Callable[[Progress | Step | Learning | None], None]:
    """A reporter that keeps one line of standard error up to date; None ends the line.

    Where standard error is no terminal, it writes a line there every `SELDOM` seconds, the first after so many.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        return _lines()
    from rich.console import Console
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    console = Console(stderr=True)
    live = Live(console=console, transient=True, refresh_per_second=8)

    def report(progress: Progress | Step | Learning | None) -> None:
        if progress is None:
            live.stop()
            return
        if not live.is_started:
            live.start()
        words = Text(one_line(" · ".join(progress.parts(console.width - 7))), no_wrap=True)
        words.truncate(max(1, console.width - 7), overflow="ellipsis")
        room = console.width - 1 - words.cell_len  # what the words leave, 6 columns or more
        grid = Table.grid(padding=(0, 1))
        grid.add_row(ProgressBar(progress.total, progress.tokens, width=min(24, room)), words)
        live.update(grid)

    return report


def _lines() -> Callable[[Progress | Step | Learning | None], None]:
    """A reporter for logs: a line of standard error now and then."""
    last = time.monotonic()

    def report(progress: Progress | Step | Learning | None) -> None:
        nonlocal last
        now = time.monotonic()
        if progress is None or now - last < SELDOM or sys.stderr is None:
            return
        last = now
        with contextlib.suppress(OSError, ValueError):  # a log that is full or closed ends no work
            print(one_line(str(progress)), file=sys.stderr, flush=True)

    return report


def reporter(progress: Any) -> Callable[[Progress | Step | Learning | None], None]:
    """What progress is told to: the function given, a bar for True, nobody for anything else."""
    return progress if callable(progress) else bar() if progress else _silent


def stage(report: Callable[[Step], None], what: str, total: int | None = None) -> Callable[[int], None]:
    """Tell `report` that the work `what` begins; and with every call of what is returned, how many of `total` are done.

    The time that is left is told from the first one that is done.
    """
    began = time.monotonic()

    def done(count: int) -> None:
        report(Step(what, count, total, time.monotonic() - began))

    done(0)
    return done


def part_of(
    report: Callable[[Step], None], what: str, total: int | None = None
) -> Callable[[Progress | Step | None], None]:
    """A reporter for what is done as a part of the work `what`: `report` is told of it with that name before it.

    `total` is how many tokens a build will read, where it does not know that itself.
    """

    def told(progress: Progress | Step | None) -> None:
        if isinstance(progress, Progress):
            report(Step(f"{what}: building", progress.tokens, progress.total or total, progress.seconds))
        elif progress is not None:  # the end of a part is not the end
            report(progress._replace(what=f"{what}: {progress.what}"))

    return told


def _silent(progress: Progress | Step | Learning | None) -> None:
    """Nobody listens."""


_listeners: list[Callable[[str], None]] = []


@contextlib.contextmanager
def telling(listener: Callable[[str], None]) -> Iterator[None]:
    """Inside, `listener` is told what `tell` says, on a terminal or not; outside, as before, or nobody."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def tell(stage: str) -> None:
    """Say at which stage a work is, once, to whom it may concern: the command line, on standard error."""
    for listener in _listeners[-1:]:
        listener(stage)
