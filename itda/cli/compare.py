"""The commands that set models side by side: compare, diff."""

from __future__ import annotations

from typing import Annotated, Any

from tyro.conf import Positional, arg

from itda.cli import flags, terminal
from itda.cli.flags import command
from itda.settings import verbs


@command(verbs.COMPARE, "layer hook tokens measures controls k n_atoms context_length seed align names")
def compare(
    models: Annotated[
        Positional[tuple[str, ...]],
        arg(
            metavar="MODEL MODEL [MODEL ...]",
            help="two or more models by id or folder, with --data; or folders of dictionaries (of several layers, the "
            "folder of their folders) or of activations (itda collect) without",
            help_behavior_hint="",
        ),
    ],
    *,
    data: Annotated[
        str | None, flags.said("the text that models read; for dictionaries, the one they were built on", "DATA")
    ] = None,
    heatmap: Annotated[tuple[str, ...], flags.some("draw the first measure as .png, .svg or .pdf", "PICTURE")] = (),
    json: flags.Json = False,
    **given: Any,
) -> None:
    """Compare the layers of two or more models that read one text, or of their dictionaries.

    itda compare gpt2 distilgpt2 --data book.txt --heatmap layers.png

    itda compare gpt2-8 other-8
    """
    from itda.comparison.compare import compare as run
    from itda.report import plots

    for picture in heatmap:
        plots.check(picture)
    result = run(models, data, **given, progress=True)
    try:
        for picture in heatmap:
            result.heatmap(picture)
            terminal.say(f"{picture} written")
    finally:  # nothing is lost where a picture cannot be written
        terminal.output(result.to_json(), None if json else result)


@command(verbs.DIFF, "layer hook tokens null n_atoms k top context_length column dtype")
def diff(
    base: Annotated[Positional[str], arg(metavar="BASE", help="id of a model, or its folder")],
    tuned: Annotated[
        Positional[str],
        arg(metavar="TUNED", help="the same for what became of it, or the folder of an adapter"),
    ],
    data: Annotated[
        Positional[str],
        arg(metavar="DATA", help="the text that both read; best what the tuning was meant for, mixed with other text"),
    ],
    *,
    html: Annotated[str | None, flags.said("write a page with the texts and the changed tokens marked", "FILE")] = None,
    json: flags.Json = False,
    **given: Any,
) -> None:
    """Show what fine-tuning changed: the tokens that moved most, and the atoms that only one model needs.

    itda diff gpt2 gpt2-tuned mixed.txt --layer 4 8 --html diff.html

    itda diff gpt2 gpt2-tuned mixed.txt --null gpt2-tuned-on-other-text
    """
    from itda.comparison.diff import diff as run
    from itda.report.diff_page import check

    if html is not None:
        check(html)
    result = run(base, tuned, data, **given, progress=True)
    try:
        if html is not None:
            result.save_html(html)
            terminal.say(f"{html} written")
    finally:  # nothing is lost where the page cannot be written
        terminal.output(result.to_json(), None if json else result)
