"""The one error of the library that a user can mend, and text that is safe to show."""


class InputError(ValueError):
    """Bad input, said in one sentence: what came, what was wanted, what to do next.

    The command line prints the sentence and exits with status 2; library callers can catch it as `ValueError`.
    """


def one_line(text: str) -> str:
    """`text` as it can be shown on one line of a terminal: line breaks as ↵ (a lone CR as ␍), other controls as �."""
    text = text.replace("\r\n", "↵").replace("\n", "↵").replace("\r", "␍").replace("\t", " ")
    return "".join(c if c.isprintable() else "�" for c in text)


def check_whole(name: str, value: object, least: int) -> None:
    """Raise `InputError` unless `value` is a whole number, `least` or more."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"`{name}` is {value!r}; a whole number, {least} or more, was wanted.")
