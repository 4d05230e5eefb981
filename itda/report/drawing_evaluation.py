"""What `itda eval` prints: a verdict, what to try, and a row for the dictionary and for each control."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from itda.errors import counted, one_line
from itda.metrics import COPY, concentrated
from itda.provenance import section
from itda.report.drawing import digits, fraction
from itda.report.tables import columns

if TYPE_CHECKING:
    from rich.console import ConsoleOptions, RenderResult

WORDS = {"error": "mean error", "tail": "error of the worst 1 %", "cross_entropy": "cross-entropy"}


def evaluation(report: Any, options: ConsoleOptions) -> RenderResult:
    """A row for the dictionary and for each control, and what they were measured on."""
    from rich.text import Text

    yield Text(one_line(f"{report.dictionary} at {report.hook_point} of {report.model}"), style="bold", overflow="fold")
    held = report.held_out
    documents = counted(held["documents"], "document")
    where = f"{counted(report.tokens, 'token')} of {documents}, held out by {held['by']}"
    drawn = f"; random tokens are from {held['random_tokens_from']}" if "random tokens" in report.systems else ""
    yield Text(f"{where}{drawn}", style="dim")
    yield Text()
    for line in _verdict(report):
        yield Text(line, overflow="fold")
    if few := concentrated(report.variance):
        yield Text(few, style="bold", overflow="fold")
    scores = any(row["ce"] for row in report.systems.values())
    ce = ("CE score", "95 %", "KL") if scores else ()
    table = columns("atoms", "FVU", "95 %", "robust", "stand.", "L0", *ce, "alive", first="system", label="")
    tails = ("90 %", "99 %", "99.9 %")
    threshold = section(report.settings, "dictionary").get("threshold")
    above = "above" if threshold is None else f"above {digits(threshold)}"
    rest = (above, "cosine", *(("CE from mean",) if scores else ()), "negative", "coherence")
    more = columns("mean", "median", *tails, *rest, first=f"error / {report.denominator.split(',')[0]}", label="")
    for name, row in report.systems.items():
        parts = [f"{row['n_atoms']:,}", fraction(row["fvu"]), _span(row["fvu_interval"])]
        parts += [fraction(row["fvu_robust"]), fraction(row["fvu_standardised"])]
        parts += [f"{row['l0']:.1f}", *(_scores(row["ce"]) if scores else ()), _share(row["alive"])]
        table.add_row(Text(one_line(name)), *parts)
        parts = [f"{row['relative_error']:.4f}", f"{row['median_error']:.4f}"]
        parts += [*(f"{row['tails'][tail]:.3f}" for tail in tails), _share(row["above"]), f"{row['cosine']:.4f}"]
        parts += [f"{row['ce']['score_mean']:.4f}" if row["ce"] else "-"] if scores else []
        more.add_row(Text(one_line(name)), *parts, _share(row["negative"]), digits(row["coherence"]["max"]))
    yield Text()
    yield table
    yield Text(
        "FVU: of all tokens; robust: without massive ones; stand.: and each coordinate over its deviation", "dim"
    )
    yield Text()
    yield more
    yield Text(f"error: |x - x̂|² of a token, divided by its {report.denominator}, as for the threshold", style="dim")
    yield Text()
    yield from _lengths(report.systems)
    if copies := _copies(report.systems):
        yield Text(copies, style="dim")
    if report.clean:
        levels = ", ".join(f"{name} {report.clean[name]:.3f}" for name in ("clean", "mean", "zero"))
        yield Text(f"cross-entropy of {counted(report.clean['tokens'], 'token')}, in nats: {levels}", style="dim")
    elif report.no_ce:
        yield Text(f"no cross-entropy: {one_line(report.no_ce)}", style="dim")
    if report.probing:
        yield Text()
        yield from _probes(report.probing)
    first = next(iter(report.systems.values()))
    if first["with_position_0"]:
        both = first["with_position_0"]
        line = f"with position 0 and special tokens: FVU {both['fvu']:.4f}, error {both['relative_error']:.4f}"
        yield Text(line, style="dim")
    places = [f"{part['first']:,}: {part['share']:.4f}" for part in first["positions"] if part["share"] is not None]
    if places:
        yield Text(f"squared error by position, over the variance of all tokens, from {', '.join(places)}", style="dim")


def _verdict(report: Any) -> list[str]:
    """Better or worse than random tokens, by how much, and what to try."""
    if report.verdict is None:
        return ["no verdict, since random tokens were not measured (`--controls`)"]
    said = {"better": "Better than", "worse": "Worse than", "mixed": "Better and worse than"}
    first = said.get(report.verdict["overall"], "Not told apart from")
    parts = [_compared(name, report.verdict[name]) for name in WORDS if report.verdict.get(name)]
    size = next(iter(report.systems.values()))["n_atoms"]
    lines = [f"{first} {counted(size, 'random token')}: {'; '.join(parts)}"]
    return [*lines, f"to try: {advice}"] if (advice := _advice(report)) else lines


def _compared(name: str, part: dict[str, Any]) -> str:
    """One of the quantities of the verdict."""
    low, high = sorted(part["interval"])
    if name == "cross_entropy":
        change, ends = f"{part['change']:+.4f} nats", f"{low:+.4f} to {high:+.4f}"
    else:
        change, ends = f"{part['change']:+.1%}", f"{low:+.1%} to {high:+.1%}"
    return f"{WORDS[name]} {change} (95 %: {ends}), {part['says']}"


def _advice(report: Any) -> str:
    """What was not done to this dictionary and lowers its error."""
    done = section(report.settings, "dictionary")
    ways = []
    if not done.get("selected"):
        ways.append("`itda train … --n-atoms N --candidates 6` keeps the most useful of six times as many atoms")
    if done.get("refined"):
        return "more atoms (`--n-atoms`) and more tokens (`--tokens`) leave less"
    ways.append("`--n-atoms N` alone draws atoms and moves them in the same pass, so that they are activations no more")
    return "; ".join(ways)


def _lengths(systems: dict[str, dict[str, Any]]) -> RenderResult:
    """How long codes are beside what they encode, without the bias and with it as an entry."""
    from rich.text import Text

    table = columns(
        "|f|/|x - b|",
        "over",
        "e",
        "interference",
        "unexplained",
        "|f, b|/|x|",
        "over",
        "e",
        first="norms of codes",
        label="",
    )
    for name, row in systems.items():
        parts = []
        for way, shown in (("centred", ("interference", "unexplained")), ("with_bias", ())):
            found = row["afa"][way]
            parts += [fraction(found["ratio"]), _share(found["over"]), fraction(found["e"])]
            parts += [f"{found[part]:+.3f}" for part in shown]
        table.add_row(Text(one_line(name)), *parts)
    yield table
    yield Text(
        "e: | |x - b|² - |f|² | / |f|², interference and unexplained its parts; medians. They tell of the coherence of "
        "atoms in use, not of quality (docs/quality.md)",
        style="dim",
    )


def _copies(systems: dict[str, dict[str, Any]]) -> str:
    """Why random tokens have the coherence that they have."""
    found = systems.get("random tokens", {}).get("coherence") or {}
    if not (copies := found.get("copies")) or not copies > 0:
        return ""
    return (
        f"coherence: of random tokens {copies:.1%} have another in nearly their direction (|cosine| {COPY:g} or more), "
        "since words come again in like places; to admission such a copy has an error of 0.02 at most"
    )


def _probes(probing: dict[str, Any]) -> RenderResult:
    """Accuracies of linear probes, by system and number of latents."""
    from rich.text import Text

    tops = list(next(iter(probing["systems"].values())))
    table = columns(*tops, first="probe on", label="")
    for name, scores in probing["systems"].items():
        table.add_row(Text(one_line(name)), *(f"{scores[top]:.3f}" for top in tops))
    yield table
    said = f"accuracy on {counted(probing['test'], 'held-out text')} of {counted(len(probing['labels']), 'class')}, "
    said += f"each against as many of the rest: 0.5 is chance, one text is {1 / probing['test']:.3f}"
    said += f"; {counted(probing['repeated'], 'repeated text')} left out" if probing["repeated"] else ""
    yield Text(said, style="dim")


def _span(interval: Any) -> str:
    return f"{interval[0]:.3f}-{interval[1]:.3f}" if interval and math.isfinite(interval[0]) else "-"


def _share(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.1%}"


def _scores(ce: dict[str, Any] | None) -> tuple[str, ...]:
    return (f"{ce['score']:.4f}", _span(ce["score_interval"]), f"{ce['kl']:.4f}") if ce else ("-",) * 3
