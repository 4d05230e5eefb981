"""The commands to look with: decompose, show, uses, page, hooks, demo."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import tempfile
from typing import Annotated, Any

from tyro.conf import Positional, arg

from itda.cli import flags, terminal
from itda.cli.flags import command
from itda.errors import InputError
from itda.settings import verbs

# Few steps make few, telling atoms; shuffled rows are of all of the library, not of the first modules in the alphabet.
DEMO: dict[str, Any] = {"k": 10, "threshold": 0.15, "tokens": 100_000, "seed": 0}
DEMO_TEXTS = [  # text and token
    ("Return the number of elements in the list.", " list"),
    ("If the file does not exist, an OSError is raised.", " raised"),
    ("Open the file for reading and return a file object.", " object"),
]


@command(verbs.DECOMPOSE, "k method model dtype")
def decompose(
    dictionary: flags.Dictionary,
    text: Annotated[
        Positional[tuple[str, ...]],
        arg(metavar="TEXT [TEXT ...]", help="what the model reads; each must fit into one row"),
    ],
    *,
    token: Annotated[
        str | None,
        flags.said(
            'of one text this token alone, by number (-1 is the last) or by its text; " 2" with a blank is a text'
        ),
    ] = None,
    json: flags.Json = False,
    **given: Any,
) -> None:
    """Decompose what the model makes of every token of a text, or of one: which atoms, and what they stand for.

    itda decompose gpt2-8 "The mouse sat on the carpet"

    itda decompose gpt2-8 "The mouse sat on the carpet" --token mouse
    """
    from itda import report

    if not text:
        raise InputError("TEXT is wanted and missing: give what the model is to read.")
    if token is None:
        every = report.decompose_all(dictionary, list(text), **given)
        terminal.output(every.to_json(), None if json else every)
        return
    if len(text) > 1:
        raise InputError(f"--token is of one text, and {len(text)} came: give one, or leave --token out.")
    which = int(token) if re.fullmatch(r"[+-]?\d{1,18}", token, re.ASCII) else token
    result = report.decompose(dictionary, text[0], which, **given)
    terminal.output(result.to_json(), None if json else result)


@command()
def show(
    dictionary: flags.Dictionary,
    *,
    atom: Annotated[flags.MaybeWhole, arg(help="number of an atom, from 0", help_behavior_hint="")] = None,
    find: Annotated[str | None, flags.said("the atoms whose token has this in it, or is a part of it")] = None,
    json: flags.Json = False,
) -> None:
    """Show what is in a dictionary, one of its atoms, or those of a token.

    itda show gpt2-8

    itda show gpt2-8 --atom 17

    itda show gpt2-8 --find mouse
    """
    from itda import report

    if atom is not None and find is not None:
        raise InputError("--atom and --find were both given: choose one of them.")
    if find is not None:
        result: Any = report.find(dictionary, find)
    else:
        result = report.summary(dictionary) if atom is None else report.atom_report(dictionary, atom)
    terminal.output(result.to_json(), None if json else result)


@command(verbs.USES, "tokens model column context_length k overwrite")
def uses(dictionary: flags.Dictionary, data: flags.Data, *, json: flags.Json = False, **given: Any) -> None:
    """See what every atom does over a million tokens, and keep that beside the dictionary: `itda show` tells it.

    itda uses gpt2-8 book.txt

    itda show gpt2-8 --atom 17
    """
    from itda.usage.uses import uses

    with terminal.signals.waited_for() as stop:
        result = uses(dictionary, data, **given, progress=True, stop=stop)
    terminal.output(result.to_json(), None if json else str(result))


@command()
def page(
    dictionary: flags.Dictionary,
    *,
    out: flags.Out,
    overwrite: Annotated[bool, arg(help="replace the pages that are there", help_behavior_hint="")] = False,
    json: flags.Json = False,
) -> None:
    """Write pages to look at a dictionary with, in any browser, from disk: they show what `itda uses` kept beside it.

    itda page gpt2-8 --out gpt2-8-page
    """
    from itda.pages.write import page

    result = page(dictionary, out, overwrite=overwrite)
    terminal.output(result.to_json(), None if json else str(result))


@command()
def hooks(
    model: flags.Model,
    *,
    revision: Annotated[str | None, flags.said(verbs.LOAD.settings["revision"].setting.help)] = None,
    trust_remote_code: Annotated[
        bool, arg(help=verbs.LOAD.settings["trust_remote_code"].setting.help, help_behavior_hint="")
    ] = False,
    json: flags.Json = False,
) -> None:
    """List where a model can be read: the names that --hook takes.

    itda hooks gpt2
    """
    from itda.report.hook_points import hook_points

    result = hook_points(model, revision=revision, trust_remote_code=trust_remote_code)
    terminal.output(result.to_json(), None if json else result)


@command()
def demo(
    *,
    out: Annotated[str | None, flags.said("keep the dictionary in this folder", "DIR")] = None,
    json: flags.Json = False,
) -> None:
    """Train a dictionary of the small model in the package, with no network, and look at it.

    itda demo

    itda demo --out demo-itda
    """
    from itda import ITDA, report
    from itda import demo as packaged
    from itda.models.loading import load_model
    from itda.training.train import train

    with tempfile.TemporaryDirectory(prefix="itda-demo-") as temporary:
        folder = out or os.path.join(temporary, "itda")
        model = load_model(packaged.model_path(), hooks=-1)
        layer = model.n_layers // 2
        name = out or "DIR"
        settings = " ".join(f"--{flag} {value}" for flag, value in {"layer": layer, **DEMO}.items())
        terminal.say(f"$ itda train MODEL TEXTS {settings} --out {name}")
        with terminal.signals.waited_for() as stop:
            (trained,) = train(model, packaged.corpus(), folder, layer=layer, **DEMO, progress=True, stop=stop)
        trained = dataclasses.replace(trained, path=name)
        terminal.say(str(trained))
        dictionary = ITDA.load(folder)
    done = []
    for text, token in DEMO_TEXTS:
        done.append(report.decompose(dictionary, text, token, model=model))
        if not json:
            terminal.output(None, f'\n$ itda decompose {name} "{text}" --token "{token}"')
            terminal.output(None, done[-1])
    # The strongest atoms of every decomposition in turn.
    ranks = itertools.zip_longest(*(sorted(d.atoms, key=lambda part: -part["share"]) for d in done))
    best = dict.fromkeys(part["atom"] for rank in ranks for part in rank if part)
    atoms = [report.atom_report(dictionary, atom, top=3, bins=0) for atom in itertools.islice(best, 5)]
    for atom in atoms if not json else ():
        terminal.output(None, f"\n$ itda show {name} --atom {atom.atom}")
        terminal.output(None, atom)
    if json:
        found = {"decompositions": [one.to_json() for one in done], "atoms": [one.to_json() for one in atoms]}
        terminal.output({"trained": trained.to_json(), **found})
