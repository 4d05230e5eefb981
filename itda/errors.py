"""The one error of the library that a user can mend, and text that is safe to show."""

import re
from collections.abc import Iterator
from numbers import Integral
from typing import SupportsIndex

LONGEST = 1000  # characters of a sentence about bad input
LONG_WORD = 200  # characters without a blank from which on, in a sentence that is too long, the middle is left out


class InputError(ValueError):
    """Bad input, said in one sentence: what came, what was wanted, what to do next.

    The command line prints the sentence and exits with status 2; library callers can catch it as `ValueError`. However
    long what came is, the sentence is not (`bounded`).
    """

    def __init__(self, said: object = "") -> None:
        super().__init__(bounded(str(said)))


def bounded(said: str) -> str:
    """`said` with no more than `LONGEST` characters.

    Of long words the middle is left out, and if that is not enough, of all of it: its end is what to do next.
    """
    if len(said) <= LONGEST:
        return said
    half = LONG_WORD // 2
    said = re.sub(rf"\S{{{LONG_WORD + 1},}}", lambda word: f"{word[0][:half]}...{word[0][-half + 3 :]}", said)
    return said if len(said) <= LONGEST else f"{said[: LONGEST // 2]} ... {said[-LONGEST // 2 + 5 :]}"


class NoSuchHook(InputError):
    """A model has no such layer or hook point; `hook` is as it was given."""

    def __init__(self, said: str, hook: int | str) -> None:
        super().__init__(said)
        self.hook = hook

    def __reduce__(self) -> tuple:
        return NoSuchHook, (str(self), self.hook)  # as one of an other process


def one_line(text: str) -> str:
    """`text` as it can be shown on one line of a terminal: line breaks as ↵ (a lone CR as ␍), other controls as �."""
    text = text.replace("\r\n", "↵").replace("\n", "↵").replace("\r", "␍").replace("\t", " ")
    return "".join(c if c.isprintable() else "�" for c in text)


def counted(n: SupportsIndex | float, what: str) -> str:
    """So many of `what`, which is given in the singular: "1 class", "2,000 classes"."""
    if n == 1:
        return f"{n:,} {what}"
    y, es = re.search("[^aeiou]y$", what), re.search("(s|x|z|ch|sh)$", what)
    return f"{n:,} {what[:-1]}ies" if y else f"{n:,} {what}{'es' if es else 's'}"


def first_line(error: BaseException) -> str:
    """The first line of what `error` says, fit for a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return one_line(lines[0]).rstrip(".:")[:240] if lines else "no reason given"


def causes(error: BaseException) -> Iterator[BaseException]:
    """`error` and what led to it, one after the other; not beyond one that was raised `from None`."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)


def shortened(value: object) -> str:
    """A value that came, as it can stand in a sentence: in ASCII, on one line, and no longer than that takes."""
    try:
        text = " ".join(line.strip() for line in ascii(value).split("\n"))
    except (RecursionError, ValueError):  # too deep, or a number of 5,000 digits
        text = type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."


def check_whole(name: str, value: object, least: int) -> None:
    """Raise `InputError` unless `value` is a whole number, `least` or more."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"`{name}` is {shortened(value)}: pass a whole number, {least} or more.")


def whole(name: str, value: object, least: int) -> int:
    """`value` as an int, NumPy's too, or an `InputError` as of `check_whole`."""
    value = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value
    check_whole(name, value, least)
    return value  # type: ignore[return-value]


class Interrupted(KeyboardInterrupt):
    """A training that was stopped; `tokens` is how many are in the checkpoint from which the same call goes on."""

    def __init__(self, tokens: int) -> None:
        super().__init__(f"interrupted after {counted(tokens, 'token')}")
        self.tokens = tokens
