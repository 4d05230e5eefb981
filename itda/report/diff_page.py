"""A diff as one HTML page that needs nothing else: no script, no font, no picture, nothing from the network.

All text comes from models and data and is escaped. Tokens are marked as strongly as they changed; radio buttons and
style rules choose the layer, so that the page works where scripts do not.
"""

from __future__ import annotations

import html as escaping
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from itda.disk import check_file
from itda.errors import InputError, counted, one_line
from itda.labels import Labels

TELLING = 8  # tokens that a prompt is ranked by
SHOWN_ATOMS = 12  # per layer and model
FAINT = 0.08  # strength below which a token is not marked
TEXTS = ("hook point", "position", "strongest at", "token", "atom", "resembles in base", "in tuned", "")

# What figures are, for the terminal too.
CHANGE = "a token's change is the distance of its two unit codes (directions, the models rotated together), 0 to 2"
LIMITS = {
    "model": ("the null's 99 %", "99 % of tokens score less when the tuned and the null model are exchanged"),
    "halves": (
        "measurement error",
        "every token is scored twice, once with shared atoms from each half of the data; 99 % of these pairs of scores "
        "differ by less",
    ),
}
ADVICE = "another fine-tune of the base, tokens that any tuning moves rank lower"
ONLY = (
    "tokens that the atoms of the other model explain there and, taken as they are, not in this one: the loss exceeds "
    "the threshold and is raised over 1.5 times as much as the usual token's, and more than the other way round; no "
    "token is in both lists. Tokens with much the same residual are one atom, and atoms are counted. An atom is beside "
    "(last, and marked *) if a token of the other list is within 8 of it: what a tuned sentence replaced is gone with "
    "it, so that both lists show one change (a loss of 0: the token is an atom there)"
)
BESIDE_OTHERS = "within 8 tokens of the other list: one change that shows in both"  # in the terminal, where it is met
TRANSFER = (
    "share of the tuned model's variance that dictionaries of one size leave unexplained: its own; the activations "
    "that it has at the tokens of the base's atoms; the base's atoms unchanged; random tokens. Greedy dictionaries are "
    "no better than random tokens in the mean, and worse on few tokens: they are chosen for what others explain badly. "
    "What tells is own beside the base's tokens and the base's vectors. Robust: without massive tokens; mean and "
    "median error: of single tokens"
)
BESIDE = {"robust": "robust", "mean error": "mean_error", "median error": "median_error"}  # of a transfer

# Controls, but for those of lines, and what turns the direction of the text after it.
_COMMANDS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

STYLE = """
:root{color-scheme:light dark;--ink:#1d1f23;--dim:#6a6f78;--paper:#fdfdfb;--card:#fff;--line:#e3e2dc;--mark:236,106,24;
--cold:52,104,192}
@media (prefers-color-scheme:dark){:root{--ink:#e6e5e1;--dim:#979ba3;--paper:#15171a;--card:#1c1f23;--line:#31353b;
--mark:255,138,52;--cold:110,160,255}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:66rem;padding:1.5rem 1.25rem 4rem;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.45rem;margin:0 0 .2rem;overflow-wrap:anywhere}h2{font-size:1.1rem;margin:2.2rem 0 .5rem}
p{margin:.3rem 0 .7rem;max-width:48rem}.dim,figcaption{color:var(--dim)}
code,.text,.context{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.86em}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.22rem .7rem .22rem 0;text-align:right;border-bottom:1px solid var(--line);vertical-align:top;
white-space:nowrap}th{font-weight:500;color:var(--dim)}.l{text-align:left}
.context{display:inline-block;white-space:normal;min-width:14rem;max-width:34rem;overflow-wrap:anywhere}
.bar{display:inline-block;height:.62em;min-width:1px;background:rgb(var(--mark));border-radius:1px}
.bar.null{background:rgb(var(--cold))}
mark{background:rgba(var(--mark),.45);color:inherit;border-radius:2px;padding:0 1px}
input{position:fixed;top:0;opacity:0;pointer-events:none}
nav{position:sticky;top:0;padding:.5rem 0;background:var(--paper);z-index:1}a{color:inherit}
nav label{display:inline-block;margin:0 .35rem .2rem 0;padding:.05rem .6rem;border:1px solid var(--line);
border-radius:1rem;color:var(--dim);cursor:pointer;font-size:.87rem}
article{background:var(--card);border:1px solid var(--line);border-radius:6px;padding:.6rem .85rem;margin:.7rem 0}
article h3{font-size:.85rem;font-weight:500;color:var(--dim);margin:0 0 .3rem}
.text{white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.65}
.text span{background:rgba(var(--mark),var(--s));border-radius:2px}
.legend span{color:var(--ink);padding:0 .5rem;border-radius:2px;background:rgba(var(--mark),var(--s))}
details{margin:.5rem 0}summary{cursor:pointer}
"""


# -- what the page shows of the texts ---------------------------------------------------------------------------------


def changed_rows(labels: Labels, scores: Float[ndarray, "layers tokens"], n: int) -> list[dict[str, Any]]:
    """The `n` prompts whose `TELLING` highest scores have the largest mean, each as its text in pieces."""
    score = scores.mean(0)
    cuts = np.flatnonzero(np.diff(labels.prompt)) + 1
    prompts = np.split(np.arange(len(labels)), cuts)
    worth = [float(np.sort(score[places])[-TELLING:].mean()) for places in prompts]
    out = []
    for p in np.argsort(-np.array(worth), kind="stable")[:n].tolist():
        first = prompts[p][0]
        where = {"prompt": int(labels.prompt[first]), "document": int(labels.document[first])}
        out.append(where | {"score": worth[p], "pieces": _pieces(labels, prompts[p], scores)})
    return out


def _pieces(labels: Labels, places: Int[ndarray, " n"], scores: Float[ndarray, "layers tokens"]) -> list[dict]:
    """The text of a prompt cut at its tokens, in order; what is no token of both models has no score."""
    row = int(labels.row[places[0]])
    text, origin = (labels.texts[row], int(labels.text_start[row])) if row >= 0 else ("", 0)
    out: list[dict[str, Any]] = []
    done = 0
    for i in places.tolist():
        numbers = [round(float(value), 4) for value in (scores[:, i].mean(), *scores[:, i])]
        own = labels.token(i)
        if row >= 0 and labels.end[i] > labels.start[i]:
            start, end = max(done, int(labels.start[i]) - origin), int(labels.end[i]) - origin
            if start > done:
                out.append({"text": text[done:start]})
            own, done = text[start:end], max(done, end)
        out.append({"text": own, "score": numbers[0], "layers": numbers[1:]})
    return [*out, {"text": text[done:]}] if done < len(text) else out


def check(path: str | os.PathLike) -> None:
    """Raise `InputError` if no page could be written to the file `path`, which is better known before hours of work."""
    check_file("html", path)
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"`html` is {str(path)!r}: name a file that ends with .html.")


# -- the page ---------------------------------------------------------------------------------------------------------


def html(report: dict[str, Any]) -> str:
    """The page of a diff, of which `report` is what its `to_json()` returns."""
    title = f"{report['base']} → {report['tuned']}"
    names = {"p": "all layers", **{f"l{i}": hook for i, hook in enumerate(report["hook_points"])}}
    # The buttons stand before all else, out of sight, so that style rules can say what follows one that is checked.
    rules = "".join(
        f"#{name}:checked~main .text span{{--s:var(--{name},0)}}#{name}:checked~main [for={name}]{{color:var(--ink);"
        f"border-color:rgb(var(--mark))}}#{name}:focus-visible~main [for={name}]{{outline:2px solid rgb(var(--mark))}}"
        for name in names
    )
    buttons = "".join(f'<input type="radio" name="layer" id="{name}"{" checked" * (name == "p")}>' for name in names)
    labels = "".join(f'<label for="{name}">{_safe(text)}</label>' for name, text in names.items())
    parts = [_head(report), _layers(report), _texts(report, labels), _top(report), _atoms(report), _positions(report)]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{_safe(title)}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{STYLE}{rules}</style></head>\n<body>{buttons}<main>{''.join(parts)}</main></body></html>\n"
    )


def _head(report: dict[str, Any]) -> str:
    """What was compared, and what scores are held against."""
    null, pooled = report["null"], report["pooled"]
    usual = "what is usual at the token's position"
    held = f"what {_code(null['name'])} changed at the same token" if null["kind"] == "model" else usual
    limit, means = LIMITS[null["kind"]]
    advice = "" if null["kind"] == "model" else f" With a null model, {ADVICE}."
    shares = ", ".join(f"{name} {share:.0%}" for name, share in report["shares"].items())
    named = (("texts", "Texts"), ("tokens", "Tokens"), ("atoms", "Atoms"), ("positions", "Positions"))
    links = " · ".join(f'<a href="#{name}">{text}</a>' for name, text in named)
    return (
        f"<h1>{_safe(report['base'])} → {_safe(report['tuned'])}</h1>"
        f"<p>What fine-tuning changed in {counted(report['tokens'], 'token')} at "
        f"{counted(len(report['hook_points']), 'hook point')}. A "
        f"token's score is its change, in units of the usual one, beyond {held}. {_percent(pooled['above'])} of the "
        f"tokens are beyond {limit} ({_number(null['99 %'])}): {means}.{advice}</p>"
        f'<p class="dim">The null is {_safe(null["shows"])}. Tokens compared, of those each model has: {shares}.</p>'
        f"<p>{links}</p>"
    )


def _texts(report: dict[str, Any], labels: str) -> str:
    """The choice of a layer, how to read the marks, and the texts."""
    shades = ((0.1, "little"), (0.45, "more"), (0.9, "most"))
    scale = " ".join(f'<span style="--s:{s}">{text}</span>' for s, text in shades)
    return (
        f'<h2 id="texts">Texts, most changed first</h2><nav>{labels}</nav>'
        f'<p class="legend dim">Changed {scale}; rest the pointer on a token for its scores.</p>'
        + "".join(_row(row, report) for row in report["rows"])
    )


def _row(row: dict[str, Any], report: dict[str, Any]) -> str:
    pooled, scores = report["pooled"], [layer["score"] for layer in report["layers"]]
    limits = [(max(report["null"]["99 %"], pooled["95 %"]), pooled["max"])]
    limits += [(max(score["null 99 %"], score["95 %"]), score["max"]) for score in scores]
    text = "".join(_piece(piece, limits) for piece in row["pieces"])
    where = f"document {row['document']}, " if row["document"] >= 0 else ""
    return (
        f'<article><h3>{where}prompt {row["prompt"]} · score {_number(row["score"])}</h3><div class="text">{text}</div>'
        "</article>"
    )


def _piece(piece: dict[str, Any], limits: list[tuple[float, float]]) -> str:
    """A token, with how strongly to mark it pooled (--p) and by layer (--l0, ...), and its scores as a title."""
    if "score" not in piece:
        return _safe(piece["text"])
    scores = [piece["score"], *piece["layers"]]
    names = ["p", *(f"l{i}" for i in range(len(piece["layers"])))]
    strengths = [_strength(score, *limit) for score, limit in zip(scores, limits, strict=True)]
    style = ";".join(f"--{name}:{s:.2g}" for name, s in zip(names, strengths, strict=True) if s >= FAINT)
    if not style:
        return f'<span title="{_number(scores[0])}">{_safe(piece["text"])}</span>'
    title = f"score {_number(scores[0])}; by layer {', '.join(map(_number, scores[1:]))}"
    return f'<span style="{style}" title="{title}">{_safe(piece["text"])}</span>'


def _strength(score: float | None, low: float, high: float) -> float:
    """0 up to `low`, 0.9 at the highest score, and between them the square root, so that few tokens are faint."""
    if score is None or high <= 0:
        return 0.0
    low = min(low, high / 2)
    return 0.9 * math.sqrt(min(1.0, max(0.0, (score - low) / (high - low))))


def _layers(report: dict[str, Any]) -> str:
    """What changed at each hook point, and how well the base's atoms transfer."""
    most = max((layer["change"]["99 %"] or 0.0 for layer in report["layers"]), default=0.0)
    rows, transfers, concentrated = [], [], []
    for layer in report["layers"]:
        change, null, moved = layer["change"], layer["null_change"], layer["transfer"]
        cells = [_number(change[name]) for name in ("median", "mean", "99 %")]
        cells += [_number(null["mean"]), _number(null["99 %"])] if null else []
        cells += [_percent(layer["above"]), _bar(change["mean"], most), f"{layer['n_base']:,}", f"{layer['n_tuned']:,}"]
        rows.append([layer["hook_point"], *cells, f"{layer['common']:,}"])
        fvus = [_number(moved[name]) for name in ("own", "reread", "as_is", "random")]
        transfers.append([layer["hook_point"], f"{moved['n_atoms']:,}", *fvus])
        for what, key in BESIDE.items():
            beside = [_number(moved[key].get(name)) for name in ("own", "reread", "as_is", "random")]
            transfers.append([what, "", *beside])
        concentrated += [f"{layer['hook_point']}: {said}"] if (said := moved["concentrated"]) else []
    names = ["median", "mean", "99 %"] + (["null mean", "null 99 %"] if report["layers"][0]["null_change"] else [])
    head = ["hook point", *names, "beyond", "", "base atoms", "tuned atoms", "common"]
    return (
        f"<h2>Layers</h2><p class='dim'>{_sentence(CHANGE)}</p>{_table(head, rows)}"
        f"<h2>Transfer</h2><p class='dim'>{_sentence(TRANSFER)}</p>"
        + _table(["hook point", "atoms", "own", "base's tokens", "base's vectors", "random"], transfers)
        + "".join(f"<p class='dim'>{_sentence(each)}</p>" for each in concentrated)
    )


def _positions(report: dict[str, Any]) -> str:
    """The mean change by position in the row."""
    most = max((part["change"] for part in report["positions"]), default=0.0)
    rows = []
    for part in report["positions"]:
        where = f"{part['first']}" if part["first"] == part["last"] else f"{part['first']}–{part['last']}"
        null = [_number(part["null_change"])] if part["null_change"] is not None else []
        rows.append([where, f"{part['tokens']:,}", _number(part["change"]), *null, _bar(part["change"], most)])
    null = ["null"] if report["null"]["kind"] == "model" else []
    table = _table(["position", "tokens", "change", *null, ""], rows)
    return f'<h2 id="positions">Positions</h2><p class="dim">Mean change, all layers.</p>{table}'


def _top(report: dict[str, Any]) -> str:
    """The tokens of highest score, in context, with the shared atoms they are nearest to in both models."""
    rows: list[list[str]] = []
    for token in report["top"]:
        near = [_Html("<br>".join(_in_context(label) for label in token[model][:2])) for model in ("base", "tuned")]
        rows.append([_number(token["score"]), token["strongest"], _in_context(token["label"]), *near])
    head = ["score", "strongest at", "token", "resembles in base", "in tuned"]
    return f'<h2 id="tokens">Tokens that changed most</h2>{_table(head, rows)}'


def _atoms(report: dict[str, Any]) -> str:
    """Atoms that one of the models needs and the other does not, layer by layer."""
    parts = []
    for layer in report["layers"]:
        for key, text in (("only_tuned", "only the tuned model"), ("only_base", "only the base")):
            atoms = layer[key]["atoms"]
            rows = [
                [
                    f"{atom['tokens']:,}{' *' * atom['beside']}",
                    *map(_number, atom["loss"].values()),
                    _in_context(atom["label"]),
                ]
                for atom in atoms[:SHOWN_ATOMS]
            ]
            head = ["tokens", *(f"loss in {name}" for atom in atoms[:1] for name in atom["loss"]), "atom"]
            parts.append(
                f"<details{' open' * bool(rows)}><summary>{_safe(layer['hook_point'])}: "
                f"{counted(layer[key]['count'], 'atom')} that {text} needs, for "
                f"{counted(layer[key]['tokens'], 'token')}"
                "</summary>"
                f"{_table(head, rows) if rows else ''}</details>"
            )
    return f'<h2 id="atoms">Atoms that only one model needs</h2><p class="dim">{_sentence(ONLY)}</p>{"".join(parts)}'


# -- pieces of HTML ---------------------------------------------------------------------------------------------------


class _Html(str):
    """Text that is HTML already; all other text is escaped where it meets any."""


def _table(head: list[str], rows: list[list[str]]) -> str:
    """A table; columns of text are set to the left, those of numbers to the right."""
    left = [i for i, name in enumerate(head) if name in TEXTS]
    top = "".join(f"<th{' class=l' * (i in left)}>{_safe(name)}</th>" for i, name in enumerate(head))
    body = ""
    for row in rows:
        cells = "".join(f"<td{' class=l' * (i in left)}>{_safe(cell)}</td>" for i, cell in enumerate(row))
        body += f"<tr>{cells}</tr>"
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def _in_context(label: dict[str, Any]) -> _Html:
    before, token, after = (_safe(one_line(label[name])) for name in ("before", "token", "after"))
    return _Html(f'<code class="context">{before}<mark>{token}</mark>{after}</code>')


def _bar(value: float | None, most: float) -> _Html:
    share = max(0.0, min(1.0, value / most)) if value is not None and most > 0 else 0.0
    return _Html(f'<span class="bar" style="width:{7 * share:.2f}rem"></span>')


def _sentence(text: str) -> str:
    return _safe(f"{text[0].upper()}{text[1:]}.")


def _code(text: str) -> _Html:
    return _Html(f"<code>{_safe(text)}</code>")


def _safe(text: str) -> str:
    return text if isinstance(text, _Html) else escaping.escape(_COMMANDS.sub("�", text), quote=True)


def _number(value: float | None) -> str:
    return f"{value if abs(value) > 1e-12 else 0:.3g}" if value is not None and math.isfinite(value) else "–"


def _percent(value: float | None) -> str:
    return f"{value:.1%}" if value is not None else "–"
