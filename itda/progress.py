"""How far a long work is: one line on the terminal, or whatever the caller makes of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from itda.errors import one_line


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
        parts = [f"{self.tokens:,}" + (f" of {self.total:,}" if self.total else "") + " tokens"]
        parts += [f"{self.tokens_per_second:,.0f}/s"]
        if self.atoms:
            parts += [f"{self.atoms:,} atoms", f"{self.admitted:.1%} admitted"]
        else:
            parts += ["reading what the mean and the threshold are chosen on"]
        if self.total and self.tokens_per_second:
            left = max(0, round((self.total - self.tokens) / self.tokens_per_second))
            parts.append(f"{left // 60}:{left % 60:02d} left")
        return " · ".join(parts)


class Step(NamedTuple):
    """How far one of several works is: `tokens` done of `total`, and seconds since it began."""

    what: str
    tokens: int
    total: int | None
    seconds: float

    def __str__(self) -> str:
        parts = [self.what, f"{self.tokens:,}" + (f" of {self.total:,}" if self.total else "")]
        if self.total and self.tokens and self.seconds:
            left = max(0, round(self.seconds / self.tokens * (self.total - self.tokens)))
            parts.append(f"{left // 60}:{left % 60:02d} left")
        return " · ".join(parts)


def bar() -> Callable[[Progress | Step | None], None]:
    """A reporter that keeps one line of standard error up to date, if that is a terminal; None ends the line."""
    if not sys.stderr.isatty():
        return lambda progress: None
    from rich.console import Console
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    console = Console(stderr=True)
    live = Live(console=console, transient=True, refresh_per_second=8)

    def report(progress: Progress | Step | None) -> None:
        if progress is None:
            live.stop()
            return
        if not live.is_started:
            live.start()
        words = Text(one_line(str(progress)), no_wrap=True)
        words.truncate(max(1, console.width - 7), overflow="ellipsis")
        room = console.width - 1 - len(words)  # what the words leave, 6 columns or more
        grid = Table.grid(padding=(0, 1))
        grid.add_row(ProgressBar(progress.total, progress.tokens, width=min(24, room)), words)
        live.update(grid)

    return report


def reporter(progress: Any) -> Any:
    """What progress is told to: the function given, a bar for True, None for nothing."""
    return progress if callable(progress) else bar() if progress else None
