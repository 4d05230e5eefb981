"""Comparisons and diffs of models as rich draws them. Each function takes a report and yields what is printed of it.

The reports are of type Any here: they know how they are drawn, and imports go one way.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from itda.errors import counted, one_line
from itda.report import diff_page
from itda.report.drawing import SHOWN, digits, in_context
from itda.report.tables import columns, room

if TYPE_CHECKING:
    from rich.console import ConsoleOptions, RenderResult

FEWEST = 3  # layers from which on it says something which of them is the most similar
SHARED = {"sums": "products of layers", "sets": "dictionaries"}
CONTROLS = {
    "shuffled": "unrelated tokens",
    "untrained": "models with random weights",
    "random": "random sets of the same sizes",
    "random by token": "random sets of the same token ids",
}


def comparison(report: Any, options: ConsoleOptions) -> RenderResult:
    """Who was compared on what, a row for each measure with its controls, and the first one layer by layer."""
    from rich.text import Text

    for model in report.models:
        shared = "" if model["share"] == 1 else f", {model['share']:.1%} of them in common"
        sizes = sorted({end(model["n_atoms"]) for end in (min, max) if model["n_atoms"]})
        atoms = f", {' to '.join([*(f'{size:,}' for size in sizes[:-1]), counted(sizes[-1], 'atom')])}" if sizes else ""
        read, blocks = len(model["hook_points"]), model["n_layers"]
        depth = counted(read, "layer") if blocks in (None, read) else f"{read} of {counted(blocks, 'layer')}"
        line = f"{model['name']}: {depth}, {counted(model['tokens'], 'token')}{shared}{atoms}"
        yield Text(one_line(line), overflow="fold")
    where = f"at the same {'character' if report.aligned else 'row and position'}"
    most = "up to " * any(model["tokens"] < report.tokens for model in report.models)  # as dictionaries have read
    yield Text(f"{most}{counted(report.tokens, 'token')} compared, {where}", style="dim")
    yield Text()
    # Of one or two layers chance finds the right one too often, and of other depths no layer is the right one.
    if min(len(model["hook_points"]) for model in report.models) >= FEWEST:
        if all(measure.matching for measure in report.measures.values()):
            yield from _matched(report)
        else:
            yield from _nearest(report)
    kinds = list(dict.fromkeys(kind for measure in report.measures.values() for kind in measure.controls))
    table = columns("alike", *kinds, "seconds", first="measure", label="")
    for name, measure in report.measures.items():
        levels = [_level(measure.alike), *(_level(measure.controls.get(kind)) for kind in kinds)]
        table.add_row(name, *levels, f"{measure.seconds:.1f}")
    yield table
    which = "all layers" if measure.alike["diagonal"] is None else "layers of equal number"
    if all(len(model["hook_points"]) == 1 for model in report.models):
        which = "the layers compared"
    shared = report.seconds.get("shared", {})
    also = "".join(f", {shared[name]:.1f} for {what}" for name, what in SHARED.items() if name in shared)
    same = "".join(f"; {kind}: the same of {CONTROLS[kind]}" for kind in kinds if kind in CONTROLS)
    own = f"; seconds: of this measure, without what several share{also}" if also else ""
    yield Text(f"alike: mean similarity of {which}{same}{own}", style="dim")
    if report.settings:
        yield Text("dictionaries were built here without taking off a mean, unlike by itda train", style="dim")
    if "jaccard" in report.measures:
        unions = report.measures["jaccard"].models.values()
        union = digits(sum(unions) / len(unions))
        yield Text(f"jaccard of the atoms of all layers together (eq. 10): {union}", style="dim")
    if report.sizes:
        cuts = (f"{_level(cut)} at {counted(cut['n_atoms'], 'atom')} ({digits(cut['random'])})" for cut in report.sizes)
        said = f"jaccard, mean of {which}, of dictionaries cut to their first atoms (and of random sets): "
        hint = "; the first atoms are mostly the first tokens of the text"
        yield Text(said + ", ".join(cuts) + hint, style="dim")
    yield from _layer_by_layer(report)


def _matched(report: Any) -> RenderResult:
    """How well every measure matches layers."""
    from rich.text import Text

    measures = report.measures
    table = columns("matched", "95 %", "ties", "with self", "rank", "margin", first="measure", label="")
    for name, measure in measures.items():
        score, both = measure.matching.without_self, measure.matching.with_self
        margin = f"{score.margin_sd:.2f}" if math.isfinite(score.margin_sd) else "-"
        numbers = (digits(score.accuracy), _interval(measure), str(score.ties), digits(both.accuracy))
        table.add_row(name, *numbers, f"{score.reciprocal_rank:.2f}", margin)
    yield table
    said = (
        "matched: share of layers whose most similar layer in another model is the one of equal number (eq. 9), its "
        "interval; with self: the same where every model is compared with itself too; ties: layers with several most "
        "similar ones, of which the lowest counts; rank: mean of 1 / rank of that layer; margin: its lead on the best "
        "other one, in standard deviations of the row"
    )
    if any(model["n_layers"] is None for model in report.models):
        said += "; all of it for models that have as many layers as each other, which is not known here"
    yield Text(said, style="dim")
    yield Text()


def _nearest(report: Any) -> RenderResult:
    """The most similar layer of another model for each layer, by the first measure: where none is the right one."""
    from rich.text import Text

    name, first = next(iter(report.measures)), report.models[0]
    best = report.measures[name].best
    for other in report.models[1:3]:
        rows, offsets = best[first["name"], other["name"]], []
        table = columns("at", "most similar", "at ", name, first=f"layer of {first['name']}", label="")
        mine, theirs = (layer_numbers(model["hook_points"]) for model in (first, other))
        for i, j in enumerate(rows):
            here, there = _depth(first, i), _depth(other, j)
            offsets += [abs(here - there)] if here is not None and there is not None else []
            value = report.measures[name].pairs[first["name"], other["name"]][i, j]
            cells = (_share(here), theirs[j] if j >= 0 else "-", _share(there), digits(value))
            table.add_row(Text(one_line(mine[i])), *map(one_line, cells))
        yield table
        apart = f"; they are {sum(offsets) / len(offsets):.0%} of the depth apart in the mean" if offsets else ""
        said = (
            f"most similar: the layer of {other['name']} of the largest {name}; at: share of the model's layers up to "
        )
        yield Text(one_line(f"{said}and with it{apart}"), style="dim")
        yield Text()


def _depth(model: dict[str, Any], i: int) -> float | None:
    """How far down its model the i-th layer read is: 1 for the last block."""
    layer = model["layers"][i] if i >= 0 else None
    return None if layer is None or not model["n_layers"] else (layer + 1) / model["n_layers"]


def _share(depth: float | None) -> str:
    return "-" if depth is None else f"{depth:.0%}"


def _interval(measure: Any) -> str:
    """Of the accuracy, the wider of the intervals over models and over documents."""
    found = [i for i in (measure.documents, measure.matching.interval) if i]
    low, high = max(found, key=lambda interval: interval[1] - interval[0], default=(math.nan, math.nan))
    return f"{low:.2f}-{high:.2f}" if found else "-"


def _level(of: dict[str, Any] | None) -> str:
    """The similarity that a measure or a control gives: of layers of equal number, or where depths differ of all."""
    of = of or {"all": math.nan}
    return digits(of["all"] if of.get("diagonal") is None else of["diagonal"])


def _layer_by_layer(report: Any) -> RenderResult:
    """The first measure between the first model and each other one, while there is room for it."""
    from rich.text import Text

    name, first = next(iter(report.measures)), report.models[0]["name"]
    for other in [model["name"] for model in report.models[1:3]]:
        matrix = report.measures[name].pairs[first, other]
        if len(matrix.T) > SHOWN:
            continue
        label = f"{name}: layer of {one_line(first)} in rows, of {one_line(other)} in columns"
        yield Text()
        yield Text(label, style="bold")
        numbers = {model["name"]: layer_numbers(model["hook_points"]) for model in report.models}
        table = columns(*numbers[other], first=" ", label="")
        for i, row in enumerate(matrix):
            best = row.argmax() if not any(map(math.isnan, row)) else -1
            cells = (Text(f"{v:.3f}", style="bold" if j == best else "") for j, v in enumerate(row))
            table.add_row(Text(one_line(numbers[first][i])), *cells)
        yield table


def layer_numbers(hook_points: list[str]) -> list[str]:
    """What tells these hook points apart: the number of the layer and what follows it (2, 2.mlp), or the place."""
    numbers = [found[1] for hook in hook_points if (found := re.search(r"(?:^|\.)(\d+(\..*)?)$", hook))]
    return numbers if len(set(numbers)) == len(hook_points) else [str(i) for i in range(len(hook_points))]


def diff(report: Any, options: ConsoleOptions) -> RenderResult:
    """What fine-tuning changed: layers, transfer, the tokens that changed most, and the atoms of only one model."""
    from rich.text import Text

    null, held = report.null, "what is usual at its position"
    if null["kind"] == "model":
        held = f"what {one_line(null['name'])} changed there"
    yield Text(one_line(f"{report.base} → {report.tuned}"), style="bold")
    where = f"{counted(report.tokens, 'token')} at {counted(len(report.hook_points), 'hook point')}"
    limit = diff_page.LIMITS[null["kind"]][0]
    beyond = f"{report.pooled['above']:.1%} of tokens beyond {limit} ({digits(null['99 %'])})"
    yield Text(f"{where} · score: a token's change beyond {held} · {beyond}", style="dim")
    yield Text(one_line(f"{limit}: {diff_page.LIMITS[null['kind']][1]}"), style="dim")
    if null["kind"] != "model":
        yield Text(f"with --null MODEL, {diff_page.ADVICE}", style="dim")
    yield from _layers(report)
    table, width = columns("score", label="tokens that changed most", first="strongest at"), room(options, 34)
    for token in report.top[:SHOWN]:
        table.add_row(Text(one_line(token["strongest"])), digits(token["score"]), in_context(token["label"], width))
    yield Text()
    yield table
    yield from _rest(report.top)
    for key, who in (("only_tuned", "only the tuned model"), ("only_base", "only the base")):
        found = [(layer, atom) for layer in report.layers for atom in layer[key]["atoms"]]
        found.sort(key=lambda pair: (pair[1]["beside"], _ratio(pair[1]["loss"], key, pair[0]["threshold"])))
        total, tokens = (sum(layer[key][name] for layer in report.layers) for name in ("count", "tokens"))
        title = f"{counted(total, 'atom')} that {who} needs, for {counted(tokens, 'token')}"
        table = columns("in tuned", "in base", "tokens", label=title, first="losses at")
        width = room(options, 52)
        for layer, atom in found[:SHOWN]:
            losses = (digits(atom["loss"][name]) for name in ("tuned", "base"))
            cells: Any = (*losses, f"{atom['tokens']:,}", in_context(atom["label"], width))
            place = f"{layer['hook_point']}{' *' * atom['beside']}"
            table.add_row(Text(one_line(place)), *cells)
        if found:
            yield Text()
            yield table
            yield from _rest(found, total)
            if any(atom["beside"] for _, atom in found[:SHOWN]):
                yield Text(f"* {diff_page.BESIDE_OTHERS}", style="dim")


def _rest(rows: list[Any], total: int | None = None) -> RenderResult:
    """How many of `rows` are not shown, and what shows them; there may be more in `total` than are listed."""
    from rich.text import Text

    total = len(rows) if total is None else total
    if total > SHOWN:
        fewer = f"; {len(rows):,} of all are listed there" if len(rows) < total else ""
        yield Text(f"and {total - SHOWN:,} more (--json, --html{fewer})", style="dim")


def _layers(report: Any) -> RenderResult:
    """How much changed at every hook point, and how well the base's atoms transfer."""
    from rich.text import Text

    nulls = ["of null"] if report.null["kind"] == "model" else []
    changes = columns("change", *nulls, "beyond", "only tuned", "only base", label="", first="layer")
    fvus = {"own": "own", "reread": "base's tokens", "as_is": "base's vectors", "random": "random"}
    transfers = columns("base", "tuned", "common", *fvus.values(), label="", first="transfer")
    for layer in report.layers:
        place = Text(one_line(layer["hook_point"]))
        moved = [digits(layer[name]["mean"]) for name in ("change", "null_change") if layer[name] is not None]
        only = [f"{layer[name]['count']:,}" for name in ("only_tuned", "only_base")]
        changes.add_row(place, *moved, f"{layer['above']:.1%}", *only)
        sizes = [f"{layer[name]:,}" for name in ("n_base", "n_tuned", "common")]
        errors = ["-" if layer["transfer"][name] is None else digits(layer["transfer"][name]) for name in fvus]
        transfers.add_row(place, *sizes, *errors)
        for what, key in diff_page.BESIDE.items():
            beside = [layer["transfer"][key].get(name) for name in fvus]
            transfers.add_row(f"  {what}", "", "", "", *("-" if e is None else digits(e) for e in beside))
    yield Text()
    yield changes
    beyond = f"beyond: share of tokens that changed more than {diff_page.LIMITS[report.null['kind']][0]} there"
    yield Text(
        f"change: mean over tokens; {diff_page.CHANGE}; {beyond}; only tuned, only base: {diff_page.ONLY}", style="dim"
    )
    yield Text()
    yield transfers
    yield Text(f"base, tuned, common: atoms; the others: {diff_page.TRANSFER}", style="dim")
    for layer in report.layers:
        if said := layer["transfer"]["concentrated"]:
            yield Text(one_line(f"{layer['hook_point']}: {said}"), overflow="fold")


def _ratio(loss: dict[str, float], key: str, threshold: float) -> float:
    """The largest loss of an atom in a model that does not need it, over that in the only one that does.

    Below a hundredth of the threshold, losses differ by rounding.
    """
    need = loss[key.removeprefix("only_")]
    return max(threshold / 100, *(other for name, other in loss.items() if key != f"only_{name}")) / need
