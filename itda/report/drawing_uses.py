"""What a million tokens say of an atom, as rich draws it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from itda.errors import counted, one_line
from itda.report.drawing import FOUND, MARK, bar, digits, in_context
from itda.report.tables import columns, room

if TYPE_CHECKING:
    from rich.console import ConsoleOptions, RenderResult
    from rich.text import Text

FIFTHS = ("weakest", "weaker", "middle", "stronger", "strongest")
SHOWN, EACH = 6, 2  # examples of a sign in the terminal: of the largest, and of each fifth
OCTAVE = 4  # bins in which sizes double
NEAR = 5
WORDS = 8  # tokens that an atom promotes


def seen(report: Any, options: ConsoleOptions) -> RenderResult:
    """Of an atom: what it promotes, how often and how strongly it is used, examples, and which atoms are beside it."""
    from rich.text import Text

    said = report.seen
    signs = [(said["positive"], False), (said["negative"], True)]
    if said["no_lens"]:
        yield Text(one_line(f"what it promotes is not known, since {said['no_lens']}"), style="dim", overflow="fold")
    else:
        for name, what in (("up", "promotes"), ("down", "lowers")):
            yield Text.assemble((f"{what}: ", "dim"), *_words(said["positive"][name]), overflow="fold")
    counts = [f"{part['count']:,} {'below' if below else 'above'} 0" for part, below in signs]
    both = sum(part["count"] for part, _ in signs)
    share = f"{both / said['tokens']:.2%}" if said["tokens"] else "-"
    tokens = counted(said["tokens"], "token")
    yield Text(f"used for {both:,} of {tokens} ({share}): {', '.join(counts)}", style="dim", overflow="fold")
    if said["tokens"] and both:
        yield Text()
        yield _histogram(signs)
        if (where := _positions(said)) is not None:
            yield where
    for part, below in signs:
        yield from _examples(part, below, options)
    yield from _beside(said, signs, options)


def _words(promoted: list[dict[str, Any]]) -> list[Any]:
    found: list[Any] = []
    for row in promoted[:WORDS]:
        found += [("⟦", "dim"), (one_line(row["token"]), "bold"), ("⟧", "dim"), " "]
    return found


def _histogram(signs: list[tuple[dict[str, Any], bool]]) -> Any:
    """The coefficients of both signs, in steps of a factor two."""
    rows: list[tuple[float, float, int]] = []
    for part, below in signs:
        edges, counts = part["histogram"]["edges"], part["histogram"]["counts"]
        for i in range(0, len(counts), OCTAVE):
            if count := sum(counts[i : i + OCTAVE]):
                low, high = edges[i], edges[i + OCTAVE]
                rows.append((-high, -low, count) if below else (low, high, count))
    table, most = columns("from", "to", "tokens", label="coefficients"), max(count for *_, count in rows)
    for low, high, count in sorted(rows):
        table.add_row(f"{low:+.4g}", f"{high:+.4g}", f"{count:,}", bar(count / most, 30, ""))
    return table


def _positions(said: dict[str, Any]) -> Text | None:
    """Where in a row it is used more than twice or less than half as often as everywhere, in a line."""
    from rich.text import Text

    shares = [
        (i, (a or 0.0) + (b or 0.0))
        for i, (a, b) in enumerate(zip(said["positive"]["positions"], said["negative"]["positions"], strict=True))
        if a is not None
    ]
    usual = sum(part["count"] for part in (said["positive"], said["negative"])) / said["tokens"]
    odd = [f"{_places(i)}: {share / usual:.1f}" for i, share in shares if not 0.5 <= share / usual <= 2]
    if not odd:
        return None
    return Text(f"by position in the row, times as often as everywhere: {', '.join(odd)}", style="dim", overflow="fold")


def _places(i: int) -> str:
    first, last = (1 << i) >> 1, (1 << i) - 1
    return f"{first}" if first >= last else f"{first} to {last}"


def _examples(part: dict[str, Any], below: bool, options: ConsoleOptions) -> RenderResult:
    from rich.text import Text

    if not part["count"]:
        return
    yield Text()
    title = "most negative, in context" if below else "largest, in context"
    table, width = columns("coefficient", "of its uses", label=title, left={"of its uses"}), room(options, 28)
    for row in part["largest"][:SHOWN]:
        table.add_row(f"{row['coefficient']:+.4g}", "largest", in_context(row["label"], width))
    for fifth in reversed(range(len(FIFTHS))):
        for row in [row for row in part["drawn"] if row["interval"] == fifth][:EACH]:
            table.add_row(f"{row['coefficient']:+.4g}", FIFTHS[fifth], in_context(row["label"], width))
    yield table


def _beside(said: dict[str, Any], signs: list[tuple[dict[str, Any], bool]], options: ConsoleOptions) -> RenderResult:
    """The atoms that are used at the same tokens, and those that point the same way."""
    from rich.text import Text

    rows = [(row, below) for part, below in signs for row in part["together"]]
    if rows:
        rows.sort(key=lambda pair: -pair[0]["tokens"])
        table, width = columns("it", "with", "tokens", "lift", label="used together, beyond chance"), room(options, 32)
        for row, below in rows[:SHOWN]:
            other = f"{row['atom']} {'-' if row['negative'] else '+'}"
            figures = ("-" if below else "+", other, f"{row['tokens']:,}", digits(round(row["lift"], 1)))
            table.add_row(*figures, in_context(row["label"], width))
        yield Text()
        yield table
    if said["nearest"]:
        table, width = columns("cosine", "atom", label="nearest atoms"), room(options, 20)
        for row in said["nearest"][:NEAR]:
            table.add_row(f"{row['cosine']:+.2f}", f"{row['atom']}", in_context(row["label"], width))
        yield Text()
        yield table
    note = "fifths: of all its uses by size, drawn by chance; lift: times as often as chance has it"
    more = f", of {counted(said['sampled'], 'token')}" if said["sampled"] < said["tokens"] else ""
    yield Text(f"{note}{more}; the rest is in --json", style="dim", overflow="fold")


def contexts(report: Any, options: ConsoleOptions) -> RenderResult:
    """The atoms that are used on a token of the text that was looked for, or near it."""
    from rich.text import Text

    kinds = [row["match"] for row in report.contexts]
    on_it = kinds.count("used on it")
    yield Text()
    said = f"{counted(on_it, 'use')} of atoms on it, {len(kinds) - on_it:,} near it, among the examples"
    yield Text(said, style="bold", overflow="fold")
    rows = report.contexts[:FOUND]
    if rows:
        table, width = columns("atom", "", "examples", "coefficient", label="the strongest"), room(options, 42)
        for row in rows:
            place = "on it" if row["match"] == "used on it" else "near"
            mark = MARK * row.get("massive", False)
            figures = (f"{row['atom']}{mark}", place, f"{row['examples']}", f"{row['example']['coefficient']:+.4g}")
            table.add_row(*figures, in_context(row["example"]["label"], width))
        yield table
        if len(report.contexts) > len(rows):
            yield Text(f"{len(report.contexts) - len(rows):,} more are in --json", style="dim")
