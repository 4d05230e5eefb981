"""Between the commands and the terminal: what is typed, what is printed, signals, and what is said of a failure."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from json import dumps
from typing import Any

import tyro

from itda.cli.flags import Command
from itda.errors import InputError, bounded, counted, one_line

PIPED_WIDTH = 400  # columns where neither a terminal nor COLUMNS says how many there are: no label is cut


def parsed(command: Command, words: list[str]) -> Callable[[], None]:
    """`command` with the arguments that `words` say. tyro's boxes become one sentence.

    `--help` shows what most people need, `--help-all` everything.
    """
    said, short = io.StringIO(), not {"--help-all"} & set(words) and bool({"-h", "--help"} & set(words))
    words = ["--help" if word == "--help-all" else word for word in words]
    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
    try:
        with contextlib.redirect_stderr(said):
            form: Any = tyro.cli(command.form(short), args=words, prog=f"itda {command.name}", config=config)
        return command.bound(form)
    except SystemExit as end:
        if not end.code:
            raise
    raise InputError(f"{_sentence(said.getvalue(), command.name)}: see `itda {command.name} --help`.")


def _sentence(box: str, name: str) -> str:
    """What one of tyro's boxes says: frame, rules and the invitation to read the help left out."""
    lines = [re.sub("\x1b\\[[0-9;]*m", "", line) for line in box.splitlines()]
    framed = [line.removeprefix("│").removesuffix("│") for line in lines if line.startswith("│")]
    # Where standard output is not UTF-8 there is no frame, but a title, a rule, and the rest one further to the right.
    inside = [line[1:].rstrip() for line in framed or [line[1:] for line in lines if line.strip()][2:]]
    parts = [list(part) for rule, part in itertools.groupby(inside, lambda line: not line.strip(" ─-")) if not rule]
    first, more = (parts[0] if parts else lines), parts[1:-1]
    if first[0].startswith("Missing from"):
        missing = [line.strip() for line in first if re.match(r" {4}\S", line)]
        return f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} wanted and missing"
    text = " ".join(line.strip() for line in first)
    if text.startswith("Unrecognized options: "):
        meant = [line.split()[0] for part in more for line in part if re.match(r" {4}-", line)]
        hint = f" (perhaps {' or '.join(dict.fromkeys(meant))} was meant)" if meant else ""
        return f"`itda {name}` has no use for {text.removeprefix('Unrecognized options: ')}{hint}"
    if choice := re.fullmatch(r"invalid choice (.*) for argument '(.*)'. Expected one of \((.*)\)\.", text):
        choices = [word for word in choice[3].replace("'", "").rstrip(",").split(", ") if word != "None"]
        return f"{choice[2]}: {choice[1]} came, and {' or '.join(sorted(choices))} was wanted"
    if value := re.match("Missing value for argument '(.*?)'", text):
        dashed = f"{value[1]}=VALUE" if value[1].startswith("-") else "after `--`"
        return f"{value[1]} wants a value ({dashed} if it begins with a dash)"
    if values := re.fullmatch(r"Error parsing (.*): Could not find valid parse for arguments: \[(.*)\]", text):
        return f"{values[1]}: {values[2]} came, and whole numbers were wanted"
    return text.removeprefix("Error parsing ").rstrip(".")


class Signals:
    """The first Ctrl-C or SIGTERM of a training waits for its batch to end; a second one, or another's, does not."""

    def __init__(self) -> None:
        self.number, self.waits = 0, False

    @contextlib.contextmanager
    def waited_for(self) -> Iterator[Callable[[], bool]]:
        """Inside, signals wait for the next call of what is yielded, after the first one."""
        try:
            yield self.stop
        finally:
            self.waits = False

    def stop(self) -> bool:
        """Asked by a training after every batch."""
        self.waits = True
        return self.number != 0

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Handle both signals inside, and as before outside."""
        self.number, self.waits = 0, False
        before = {}
        try:
            with contextlib.suppress(ValueError):  # not the main thread
                for number in (signal.SIGINT, signal.SIGTERM):
                    before[number] = signal.signal(number, self._handle)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        again, self.number = self.number != 0, number
        if again or not self.waits:
            raise KeyboardInterrupt
        with contextlib.suppress(OSError):
            if os.isatty(2):  # written past the buffers, which the signal may have found half full
                os.write(2, b"\nstopping when this batch is done; once more stops at once\n")


signals = Signals()


def interrupted(error: KeyboardInterrupt) -> int:
    """Say how far a command came before the signal that ended it; the exit status."""
    tokens = getattr(error, "tokens", None)
    if tokens:
        say(f"interrupted after {counted(tokens, 'token')}; the same command goes on from there")
    elif tokens is None:
        say("interrupted")
    else:
        say("interrupted before any token was kept; the same command starts again")
    return 128 + (signals.number or signal.SIGINT)


@contextlib.contextmanager
def notices() -> Iterator[None]:
    """Inside, a warning of the library's own is one line on standard error; those of others are as they were."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def shown(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
            if category.__module__.startswith("itda."):
                say(str(message))
            else:
                show(message, category, *rest, **more)

        warnings.showwarning = shown
        yield


def output(document: Any, drawn: Any = None) -> None:
    """Write a JSON document, or what is drawn for a person, to standard output."""
    if drawn is None:
        write(dumps(document, indent=2, allow_nan=False) + "\n")
        return
    from rich.console import Console

    if isinstance(drawn, str):
        drawn = "\n".join(map(one_line, drawn.split("\n")))
    width = None if sys.stdout.isatty() else _piped_width()
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    with console.capture() as captured:
        console.print(drawn, soft_wrap=isinstance(drawn, str))
    write(captured.get() if width is None else re.sub(r"[ \t]+\n", "\n", captured.get()))


def _piped_width() -> int:
    """Columns where standard output is no terminal: as many as COLUMNS says, if it does."""
    said = os.environ.get("COLUMNS", "")
    return int(said) if re.fullmatch("[1-9][0-9]{0,4}", said, re.ASCII) else PIPED_WIDTH


def write(text: str) -> None:
    """Write `text` to standard output."""
    sys.stdout.write(text)
    sys.stdout.flush()  # a closed pipe or a full disk shows here, not at exit


def say(text: str) -> None:
    """One line on standard error."""
    if sys.stderr is not None:  # `print` would take None for standard output
        with contextlib.suppress(OSError):
            print(one_line(text), file=sys.stderr, flush=True)


def fail(sentence: str, debug: bool) -> int:
    """Say what is wrong, after the traceback if `debug`; the exit status."""
    if debug:
        traceback.print_exc()
    say(f"itda: error: {bounded(sentence)}")
    return 2


def abandon_output() -> None:
    """Keep Python from writing what is left of standard output, which would fail again, when it ends."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
