"""Reports as rich draws them. Each function takes a report of `itda.report` and yields what is printed of it.

The reports are of type Any here: they know how they are drawn, and imports go one way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from itda.errors import counted, one_line
from itda.metrics import MASSIVE, concentrated
from itda.provenance import is_number, section
from itda.report.tables import CONTEXT, Columns, columns, room

if TYPE_CHECKING:
    from rich.console import ConsoleOptions, RenderResult
    from rich.text import Text

SHOWN, FOUND = 12, 40  # rows of a table in the terminal
STRONGEST, WORD = 3, 16  # atoms of a token in the table of all tokens, and columns of a token there
ATOMS = "uses: sampled tokens that use it; norm: of its activation, from the mean; loss: when it was admitted"
# Figures of a dictionary on its sample, in `cfg`, and what they are called.
QUALITY = {
    "fvu": "FVU",
    "fvu_robust": "robust",
    "fvu_standardised": "standardised",
    "relative_error": "mean error",
    "median_error": "median",
}
MARK = "†"  # after the number of an atom that is a massive token
MASSIVE_ATOMS = f"{MARK} a massive token, of |x| beyond 5 times the median: it may stand for no more than that"
EXPLAINED = (
    "coefficient: how much of the atom is added (below 0: of its opposite); share: of |x - mean|² what it explains; "
    "error: what all of them leave; FVU: the same of many tokens together"
)


def decomposition(report: Any, options: ConsoleOptions) -> RenderResult:
    """The text with its token marked, the figures of the pursuit, and its atoms."""
    from rich.text import Text

    cuts = (report.text[: report.start], report.text[report.start : report.end], report.text[report.end :])
    before, token, after = map(one_line, cuts)
    yield Text.assemble(before, *_marked(token), after, overflow="fold")
    centred = report.from_mean != report.norm
    mean = f", {report.from_mean:.4g} from the mean" if centred else ""
    weighed = ", each coordinate over its scale" if report.scaled else ""
    error = f"error {report.relative_error:.3f} of {'|x - mean|²' if centred else '|x|²'}{weighed}"
    if report.usual_error is not None:
        error += f" ({report.usual_error:.0%} of sampled tokens have less)"
    massive = f", massive: {report.norm / report.usual_norm:.0f} times the median" if report.massive else ""
    same = [i for i, other in enumerate(report.tokens) if other.strip() == report.tokens[report.token].strip()]
    more = ", ..." if len(same) > SHOWN else ""
    alike = f" (one of {', '.join(map(str, same[:SHOWN]))}{more})" if len(same) > 1 else ""
    yield Text(
        one_line(
            f"token {report.token}{alike} of 0 to {len(report.tokens) - 1} · {report.model} · {report.hook_point} · "
            f"norm {report.norm:.4g}{massive}{mean} · k = {report.k} · {error} · atoms as they were chosen"
        ),
        style="dim",
    )
    if not report.in_training:
        yield Text("the first token of a row is not among the tokens that this dictionary was built on", style="dim")
    yield Text()
    table, shown = columns("coefficient", "atom", "share", "cumulative"), report.atoms[:SHOWN]
    width = room(options, 58)
    labels = {part["atom"]: part["label"] for part in report.atoms}
    for part in shown:
        table.add_row(
            f"{part['coefficient']:+.4g}",
            f"{part['atom']}{MARK * part['massive']}",
            f"{part['share']:.1%}",
            f"{bar(part['cumulative'], 10)} {part['cumulative']:6.1%}",
            _explained(part, labels, width),
        )
    yield table
    if rest := report.atoms[SHOWN:]:
        yield Text(
            f"and {counted(len(rest), 'more atom')} with {sum(p['share'] for p in rest):.1%} together", style="dim"
        )
    if any(part["massive"] for part in report.atoms):
        yield Text(MASSIVE_ATOMS, style="dim")
    yield Text(EXPLAINED, style="dim")


def _explained(part: dict[str, Any], labels: dict[int, dict[str, Any]], width: int) -> Text:
    """An atom's label in context, and below it why its coefficient is negative, if it is."""
    from rich.text import Text

    label = in_context(part["label"], width)
    if part["coefficient"] >= 0:
        return label
    why = "the activation itself points away from it"
    if (other := part["corrects"]) is not None:
        token = one_line(labels[other["atom"]]["token"])
        why = f"takes back what atom {other['atom']} ⟦{token}⟧ brought (cosine {other['cosine']:+.2f})"
    return Text.assemble(label, "\n", (why, "dim"), no_wrap=True)


def decompositions(report: Any, options: ConsoleOptions) -> RenderResult:
    """The tokens of every text, a row each: their error, how usual it is, and their strongest atoms."""
    from rich.text import Text

    any_massive = any(token.massive for text in report.texts for token in text)
    for number, tokens in enumerate(report.texts):
        if number:
            yield Text()
        yield Text(one_line(tokens[0].text), style="bold", overflow="fold")
        table = columns("token", "", "error", "less", label="strongest atoms", left={""}, folds=True)
        for one in tokens:
            less = "" if one.usual_error is None else f"{one.usual_error:.0%}"
            name = in_context({"before": "", "token": one.tokens[one.token], "after": ""}, WORD)
            name = Text.assemble(name, MARK * one.massive)
            table.add_row(f"{one.token}", name, f"{one.relative_error:.3f}", less, _strongest(one.atoms))
        yield table
    first = report.texts[0][0]
    what = "|x - mean|²" if first.from_mean != first.norm else "|x|²"
    said = f"{first.model} · {first.hook_point} · k = {first.k} · error: of {what}, what {counted(first.k, 'atom')} "
    said += "leave; less: the share of sampled tokens with less; atoms by share: coefficient · number, label; "
    said += "--token shows one"
    yield Text(one_line(said), style="dim", overflow="fold")
    if any_massive:
        yield Text(f"{MARK} a massive token, of |x| beyond {MASSIVE:g} times the median", style="dim")


def _strongest(parts: list[dict[str, Any]]) -> Text:
    """The atoms of the largest shares, in a line."""
    from rich.text import Text

    best = sorted(parts, key=lambda part: -part["share"])[:STRONGEST]
    found = []
    for part in best:  # no blank within, so that lines end between two of them
        token = in_context({"before": "", "token": part["label"]["token"].strip(), "after": ""}, WORD)
        number = f"{part['coefficient']:+.4g}·{part['atom']}{MARK * part['massive']}"
        found.append(Text.assemble(number, token))
    return Text("  ").join(found)


def summary(report: Any, options: ConsoleOptions) -> RenderResult:
    """What a dictionary is, the quantiles of its atoms' norms and losses, and some of the atoms."""
    from rich.table import Table
    from rich.text import Text

    yield Text(f"{counted(report.n_atoms, 'atom')}, d = {report.d}, k = {report.k}", style="bold")
    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(report):
        facts.add_row(Text(name, style="dim"), Text(one_line(value), overflow="fold"))
    yield facts
    table = columns(*report.norms, label="", first="quantiles")
    for name, quantiles in (("norm", report.norms), ("admission loss", report.losses)):
        table.add_row(name, *(digits(value) for value in quantiles.values()))
    yield Text()
    yield table
    for title, rows in (
        ("most used in the sample", report.most_used),
        ("first atoms", report.first),
    ):
        if rows:
            yield Text()
            yield _atoms(title, rows, options)
    yield Text(ATOMS, style="dim")
    if any(row["massive"] for row in (*report.most_used, *report.first)):
        yield Text(MASSIVE_ATOMS, style="dim")


def found(report: Any, options: ConsoleOptions) -> RenderResult:
    """The atoms of a token."""
    from rich.text import Text

    kinds = [atom["match"] for atom in report.atoms]
    whole = len(kinds) - kinds.count("part of it")
    theirs = "its token" if whole == 1 else "their token"
    said = f"{counted(whole, 'atom')} of {report.n_atoms:,} with {report.text!r} in {theirs}"
    said += f", {len(kinds) - whole:,} whose token is a part of it" if whole < len(kinds) else ""
    yield Text(one_line(said), style="bold", overflow="fold")
    if report.atoms:
        yield _atoms("label in context", report.atoms[:FOUND], options)
        rest = len(report.atoms) - FOUND
        yield Text(ATOMS + (f"; {rest:,} more are in --json" if rest > 0 else ""), style="dim")
        if any(row["massive"] for row in report.atoms[:FOUND]):
            yield Text(MASSIVE_ATOMS, style="dim")


def _atoms(title: str, rows: list[dict[str, Any]], options: ConsoleOptions) -> Columns:
    """A list of atoms."""
    table, width = columns("atom", "uses", "norm", "loss", label=title), room(options, 36)
    for row in rows:
        uses = "" if row["uses"] is None else f"{row['uses']:,}"
        numbers = (f"{row['atom']}{MARK * row['massive']}", uses, digits(row["norm"]), digits(row["loss"]))
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
    used = (
        f"used for {report.uses:,} of {counted(report.sample_tokens, 'sampled token')} "
        f"({report.uses / report.sample_tokens:.1%}), for {report.negative:,} with a negative coefficient"
        if report.sample_tokens
        else "no sample was kept, so its uses are not known (itda.refine keeps one if it is given `labels`)"
    )
    norm = f"{digits(report.norm)}{', massive' * report.massive}"
    many = getattr(report, "seen", None) is not None  # then what follows says more than the sample
    yield Text(f"norm {norm} · admission loss {digits(report.loss)}" + ("" if many else f" · {used}"), style="dim")
    if many:
        return
    table, edges = columns("from", "to", "tokens", label="coefficients"), report.histogram["edges"]
    for low, high, count in zip(edges, edges[1:], report.histogram["counts"], strict=False):
        share = count / max(report.histogram["counts"])
        table.add_row(f"{low:+.4g}", f"{high:+.4g}", f"{count:,}", bar(share, 30, ""))
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
    facts += [("data", f"{data}, {_counted(cfg.get('tokens') or 0, 'token')}")]
    if stream.get("hash"):
        rows = f"rows of {_counted(stream.get('context_length'), 'token')}, {cfg.get('batch_rows')} at a time"
        facts += [("stream", f"{str(stream['hash'])[:12]}, {rows}")]
    online = cfg.get("admission") == "online"
    if (threshold := report.threshold) or online:
        how = ", centred" if cfg.get("center") else ""
        how += {"std": ", each coordinate over its deviation", "sqrt": ", each over the root of its deviation"}.get(
            str(cfg.get("scale")), ""
        )
        how += ", coefficients of 0 or more" if cfg.get("nonneg") else ""
        how += f", tokens beyond {cfg['max_norm']:g} median norms left out" if is_number(cfg.get("max_norm")) else ""
        what = "online" if online else f"{cfg.get('admission')}, {cfg.get('loss')} loss above {threshold}"
        facts += [("admission", what + how)]
    if facts_of_massive := left_out(section(cfg, "massive")):
        facts += [("massive tokens", facts_of_massive.removeprefix("massive tokens: "))]
    refined, selected = section(cfg, "refined"), section(cfg, "selected")
    if selected:
        how = f"on {_counted(selected.get('tokens'), 'token')} in {_counted(selected.get('rounds'), 'round')}"
        facts += [("selected", f"those of most use of {_counted(selected.get('from'), 'atom')}, {how}")]
    if report.moved is not None:
        how = f"{_counted(refined.get('passes'), 'pass')} over {_counted(refined.get('tokens'), 'token')}"
        how = "in the one pass" if online else how
        median, least = (digits(report.moved[name]) for name in ("median", "min"))
        facts += [("moved", f"{how}; cosine of atoms with their labels' activations: median {median}, least {least}")]
    if report.sample is not None:
        quality = f"{said}, " if (said := quality_of(cfg)) else ""
        facts += [
            ("on its sample", f"{quality}L0 {report.sample['l0']:.1f}, of {counted(report.sample['tokens'], 'token')}")
        ]
        facts += [("where its variance is", few)] if (few := concentrated(section(cfg, "variance"))) else []
        facts += [("atoms in use", f"{report.sample['share_alive']:.1%} in the sample")]
    if massive := report.massive["atoms"]:
        limit = MASSIVE * report.massive["usual_norm"]
        facts += [("massive atoms", f"{massive:,} of |x| beyond {digits(limit)}, {MASSIVE:g} times the median")]
    return facts


def left_out(massive: Mapping[str, Any]) -> str:
    """What tokens were left out for their size, of what."""
    of = {"left_out": "not admitted", "left_out_of_mean": "not in the mean"}
    parts = [f"{_whole(massive[name])} {what}" for name, what in of.items() if massive.get(name)]
    norm: Any = massive.get("norm")
    if not parts or not is_number(norm):
        return ""
    return f"massive tokens: those of |x| beyond {digits(norm)} are left out: {' and '.join(parts)}"


def quality_of(cfg: Mapping[str, Any]) -> str:
    """FVU, robust and standardised, with mean and median error, as far as `cfg` has them."""
    return ", ".join(f"{said} {fraction(cfg[name])}" for name, said in QUALITY.items() if is_number(cfg.get(name)))


def fraction(value: float) -> str:
    """Four places; of what would be 0.000 then, two digits."""
    return f"{value:.1e}" if 0 < value < 0.0005 else f"{value:.4f}"


def bar(share: float, width: int, empty: str = "░") -> str:
    """A bar of so many columns, of which a share is full."""
    full = round(max(0.0, min(1.0, share)) * width)
    return "█" * full + empty * (width - full)


def digits(value: float) -> str:
    """Four digits; what is below 1e-12 is what rounding leaves of a zero."""
    return f"{value if abs(value) > 1e-12 else 0:.4g}" if math.isfinite(value) else "-"


def _whole(value: Any) -> str:
    """A count of a dictionary from elsewhere, which may be anything."""
    return f"{value:,}" if isinstance(value, int) else "?"


def _counted(value: Any, what: str) -> str:
    """So many of `what`, by such a count."""
    return counted(value, what) if isinstance(value, int) else f"? {what}s"


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
