"""Reports as rich draws them. Each function takes a report of `itda.report` and yields what is printed of it.

The reports are of type Any here: they know how they are drawn, and imports go one way.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from itda.errors import one_line
from itda.provenance import section

if TYPE_CHECKING:
    from rich.console import ConsoleOptions, RenderResult
    from rich.table import Table
    from rich.text import Text

SHOWN, FOUND = 12, 40  # rows of a table in the terminal
CONTEXT = 100  # columns of a token in its context at most
ATOMS = "uses: sampled tokens that use it; norm: of its activation, from the mean; loss: when it was admitted"
PLAIN_WIDTH = 120  # columns where there is no terminal


def decomposition(report: Any, options: ConsoleOptions) -> RenderResult:
    """The text with its token marked, the figures of the pursuit, and its atoms."""
    from rich.text import Text

    cuts = (report.text[: report.start], report.text[report.start : report.end], report.text[report.end :])
    before, token, after = map(one_line, cuts)
    yield Text.assemble(before, *_marked(token), after, overflow="fold")
    centred = report.from_mean != report.norm
    mean = f", {report.from_mean:.4g} from the mean" if centred else ""
    error = f"error {report.relative_error:.3f} of {'|x - mean|²' if centred else '|x|²'}"
    same = [i for i, other in enumerate(report.tokens) if other.strip() == report.tokens[report.token].strip()]
    more = ", ..." if len(same) > SHOWN else ""
    alike = f" (one of {', '.join(map(str, same[:SHOWN]))}{more})" if len(same) > 1 else ""
    yield Text(
        one_line(
            f"token {report.token}{alike} of 0 to {len(report.tokens) - 1} · {report.model} · {report.hook_point} · "
            f"norm {report.norm:.4g}{mean} · k = {report.k} · {error} · atoms as they were chosen"
        ),
        style="dim",
    )
    yield Text()
    table, shown = columns("coefficient", "atom", "share", "cumulative"), report.atoms[:SHOWN]
    width = room(options, 58)
    for part in shown:
        bar = _bar(part["cumulative"], 10)
        table.add_row(
            f"{part['coefficient']:+.4g}",
            f"{part['atom']}",
            f"{part['share']:.1%}",
            f"{bar} {part['cumulative']:6.1%}",
            in_context(part["label"], width),
        )
    yield table
    if rest := report.atoms[SHOWN:]:
        yield Text(f"and {len(rest)} more atoms with {sum(p['share'] for p in rest):.1%} together", style="dim")


def summary(report: Any, options: ConsoleOptions) -> RenderResult:
    """What a dictionary is, the quantiles of its atoms' norms and losses, and some of the atoms."""
    from rich.table import Table
    from rich.text import Text

    yield Text(f"{report.n_atoms:,} atoms, d = {report.d}, k = {report.k}", style="bold")
    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(report):
        facts.add_row(Text(name, style="dim"), Text(one_line(value), overflow="fold"))
    yield facts
    table = columns(*report.norms, label="", first="quantiles")
    for name, quantiles in (("norm", report.norms), ("admission loss", report.losses)):
        table.add_row(name, *(digits(value) for value in quantiles.values()))
    yield Text()
    yield table
    for title, rows in (("most used in the sample", report.most_used), ("first atoms", report.first)):
        if rows:
            yield Text()
            yield _atoms(title, rows, options)
    yield Text(ATOMS, style="dim")


def found(report: Any, options: ConsoleOptions) -> RenderResult:
    """The atoms of a token."""
    from rich.text import Text

    said = f"{counted(len(report.atoms), 'atom')} of {report.n_atoms:,} with {report.text!r} in their token"
    yield Text(one_line(said), style="bold", overflow="fold")
    if report.atoms:
        yield _atoms("label in context", report.atoms[:FOUND], options)
        rest = len(report.atoms) - FOUND
        yield Text(ATOMS + (f"; {rest:,} more are in --json" if rest > 0 else ""), style="dim")


def _atoms(title: str, rows: list[dict[str, Any]], options: ConsoleOptions) -> Table:
    """A list of atoms."""
    table, width = columns("atom", "uses", "norm", "loss", label=title), room(options, 36)
    for row in rows:
        uses = "" if row["uses"] is None else f"{row['uses']:,}"
        numbers = (f"{row['atom']}", uses, digits(row["norm"]), digits(row["loss"]))
        table.add_row(*numbers, in_context(row["label"], width))
    return table


def atom_report(report: Any, options: ConsoleOptions) -> RenderResult:
    """What an atom is, the histogram of its coefficients, and its strongest tokens in context."""
    from rich.text import Text

    where = ", ".join(f"{name} {report.label[name]}" for name in ("prompt", "position", "token_id"))
    yield Text(f"atom {report.atom} of 0 to {report.n_atoms - 1}: {where}", style="bold")
    yield in_context(report.label, room(options, 0, 2 * CONTEXT))
    if report.moved is not None:
        yield Text(f"refined: cosine {digits(report.moved)} with the activation of this label", style="bold")
    share = report.uses / max(1, report.sample_tokens)
    yield Text(
        f"norm {digits(report.norm)} · admission loss {digits(report.loss)} · used for {report.uses:,} of "
        f"{report.sample_tokens:,} sampled tokens ({share:.1%}), for {report.negative:,} with a negative coefficient",
        style="dim",
    )
    table, edges = columns("from", "to", "tokens", label="coefficients"), report.histogram["edges"]
    for low, high, count in zip(edges, edges[1:], report.histogram["counts"], strict=False):
        bar = _bar(count / max(report.histogram["counts"]), 30, "")
        table.add_row(f"{low:+.4g}", f"{high:+.4g}", f"{count:,}", bar)
    if edges:
        yield Text()
        yield table
    for title, rows in (("largest", report.positive_tokens), ("most negative", report.negative_tokens)):
        table = columns("coefficient", label=f"{title}, in context")
        for row in rows:
            table.add_row(f"{row['coefficient']:+.4g}", in_context(row["label"], room(options, 14)))
        if rows:
            yield Text()
            yield table


def _facts(report: Any) -> list[tuple[str, str]]:
    """What stands at the head of a summary, as names and values."""
    cfg = report.cfg
    model, stream = (section(cfg, part) for part in ("model", "stream"))
    revision = f" @ {model['revision']}" if model.get("revision") else ""
    facts = [("model", f"{model.get('id', 'not known')}{revision}")]
    facts += [("hook point", f"{model['hook_point']}")] if model.get("hook_point") else []
    data = stream.get("data") or stream.get("kind") or "plain activations"
    facts += [("data", f"{data}, {_whole(cfg.get('tokens') or 0)} tokens")]
    if stream.get("hash"):
        rows = f"rows of {stream.get('context_length')} tokens, {cfg.get('batch_rows')} at a time"
        facts += [("stream", f"{str(stream['hash'])[:12]}, {rows}")]
    if threshold := report.threshold:
        centred = ", centred" if cfg.get("center") else ""
        facts += [("admission", f"{cfg.get('admission')}, {cfg.get('loss')} loss above {threshold}{centred}")]
    refined, selected = section(cfg, "refined"), section(cfg, "selected")
    if selected:
        how = f"on {_whole(selected.get('tokens'))} tokens in {_whole(selected.get('rounds'))} rounds"
        facts += [("selected", f"those of most use of {_whole(selected.get('from'))} atoms, {how}")]
    if report.moved is not None:
        how = f"{_whole(refined.get('passes'))} passes over {_whole(refined.get('tokens'))} tokens"
        median, least = (digits(report.moved[name]) for name in ("median", "min"))
        facts += [("refined", f"{how}; cosine of atoms with their labels' activations: median {median}, least {least}")]
    if report.sample is not None:
        fvu = cfg.get("fvu")
        quality = f"FVU {fvu:.4f}, " if isinstance(fvu, float) else ""
        facts += [("on its sample", f"{quality}L0 {report.sample['l0']:.1f}, of {report.sample['tokens']:,} tokens")]
        facts += [("atoms in use", f"{report.sample['share_alive']:.1%} in the sample")]
    return facts


def counted(n: int, what: str) -> str:
    """So many of `what`, which is given in the singular."""
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def columns(*numbers: str, label: str = "label in context", first: str = "") -> Table:
    """A table of right-aligned columns, after one of names if `first` and before one of text if `label`."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in (first, *numbers, label):
        if name:
            justify: Literal["left", "right"] = "right" if name in numbers else "left"
            table.add_column(Text(one_line(name)), justify=justify, no_wrap=True, overflow="ellipsis")
    return table


def room(options: ConsoleOptions, used: int, most: int = CONTEXT) -> int:
    """Columns for text beside `used` others."""
    return max(24, min(most, options.max_width - used))


def _bar(share: float, width: int, empty: str = "░") -> str:
    full = round(max(0.0, min(1.0, share)) * width)
    return "█" * full + empty * (width - full)


def digits(value: float) -> str:
    """Four digits; what is below 1e-12 is what rounding leaves of a zero."""
    return f"{value if abs(value) > 1e-12 else 0:.4g}" if math.isfinite(value) else "-"


def _whole(value: Any) -> str:
    """A count of a dictionary from elsewhere, which may be anything."""
    return f"{value:,}" if isinstance(value, int) else "?"


def _marked(token: str) -> list[tuple[str, str]]:
    return [("⟦", "dim"), (token, "bold"), ("⟧", "dim")]


def in_context(label: dict[str, Any], width: int) -> Text:
    """A token, marked, on one line with as much of its context as `width` columns hold."""
    from rich.cells import cell_len, set_cell_size
    from rich.text import Text

    before, token, after = (one_line(label[name]) for name in ("before", "token", "after"))
    if cell_len(token) > width - 2:
        token = set_cell_size(token, width - 3).rstrip() + "…"
    room = width - 2 - cell_len(token)
    right = min(cell_len(after), max(room // 3, room - cell_len(before)))
    if cell_len(before) > room - right:
        kept = max(0, room - right - 1)
        before = "…" * (room > right) + set_cell_size(before[::-1], kept)[::-1]
    if cell_len(after) > right:
        after = set_cell_size(after, max(0, right - 1)) + "…" * (right > 0)
    return Text.assemble(before, *_marked(token), after, no_wrap=True)


def evaluation(report: Any, options: ConsoleOptions) -> RenderResult:
    """A row for the dictionary and for each control, and what they were measured on."""
    from rich.text import Text

    yield Text(one_line(f"{report.dictionary} at {report.hook_point} of {report.model}"), style="bold", overflow="fold")
    held = report.held_out
    documents = counted(held["documents"], "document")
    where = f"{report.tokens:,} tokens of {documents}, held out by {held['by']}"
    drawn = f"; random tokens are from {held['random_tokens_from']}" if "random tokens" in report.systems else ""
    yield Text(f"{where}{drawn}", style="dim")
    scores = any(row["ce"] for row in report.systems.values())
    ce = ("CE score", "95 %", "KL") if scores else ()
    table = columns("atoms", "FVU", "95 %", "error", "L0", *ce, "alive", first="system", label="")
    tails = ("90 %", "99 %", "99.9 %")
    threshold = section(report.settings, "dictionary").get("threshold")
    above = "above" if threshold is None else f"above {digits(threshold)}"
    rest = (above, "cosine", *(("CE from mean",) if scores else ()), "negative", "coherence")
    more = columns(*tails, *rest, first="errors at", label="")
    for name, row in report.systems.items():
        parts = [f"{row['n_atoms']:,}", f"{row['fvu']:.4f}", _span(row["fvu_interval"]), f"{row['relative_error']:.4f}"]
        parts += [f"{row['l0']:.1f}", *(_scores(row["ce"]) if scores else ()), _share(row["alive"])]
        table.add_row(Text(one_line(name)), *parts)
        parts = [*(f"{row['tails'][tail]:.3f}" for tail in tails), _share(row["above"]), f"{row['cosine']:.4f}"]
        parts += [f"{row['ce']['score_mean']:.4f}" if row["ce"] else "-"] if scores else []
        more.add_row(Text(one_line(name)), *parts, _share(row["negative"]), digits(row["coherence"]["max"]))
    yield Text()
    yield table
    yield Text()
    yield more
    if report.clean:
        levels = ", ".join(f"{name} {report.clean[name]:.3f}" for name in ("clean", "mean", "zero"))
        yield Text(f"cross-entropy of {report.clean['tokens']:,} tokens, in nats: {levels}", style="dim")
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
    places = [f"{part['first']:,}: {part['fvu']:.4f}" for part in first["positions"] if math.isfinite(part["fvu"])]
    yield Text(f"FVU of positions from {', '.join(places)}", style="dim")


def _probes(probing: dict[str, Any]) -> RenderResult:
    """Accuracies of linear probes, by system and number of latents."""
    from rich.text import Text

    tops = list(next(iter(probing["systems"].values())))
    table = columns(*tops, first="probe on", label="")
    for name, scores in probing["systems"].items():
        table.add_row(Text(one_line(name)), *(f"{scores[top]:.3f}" for top in tops))
    yield table
    said = f"accuracy on {probing['test']:,} held-out texts of {len(probing['labels'])} classes, "
    said += f"each against as many of the rest: 0.5 is chance, one text is {1 / probing['test']:.3f}"
    said += f"; {counted(probing['repeated'], 'repeated text')} left out" if probing["repeated"] else ""
    yield Text(said, style="dim")


def _span(interval: Any) -> str:
    return f"{interval[0]:.3f}-{interval[1]:.3f}" if interval and math.isfinite(interval[0]) else "-"


def _share(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.1%}"


def _scores(ce: dict[str, Any] | None) -> tuple[str, ...]:
    return (f"{ce['score']:.4f}", _span(ce["score_interval"]), f"{ce['kl']:.4f}") if ce else ("-",) * 3
