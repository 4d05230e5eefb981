"""The commands that judge a dictionary and hand it on: eval, export."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from tyro.conf import arg

from itda.cli import flags, terminal
from itda.cli.flags import command
from itda.errors import counted
from itda.settings import verbs


@command(verbs.EVALUATE, "tokens ce_tokens controls tol probe in_sample k method model column")
def eval_(
    dictionary: flags.Dictionary,
    data: flags.Data,
    *,
    sae: Annotated[
        tuple[str, ...],
        flags.some("measure these SAEs on the same tokens: folders, or names that SAELens has for the hub", "SAE"),
    ] = (),
    zf: Annotated[
        tuple[str, ...],
        flags.some("draw norms of codes against those of activations, as .png, .svg or .pdf", "PICTURE"),
    ] = (),
    out: Annotated[
        str | None, flags.said("write all figures to this file, not to eval.json in the dictionary's folder", "FILE")
    ] = None,
    json: flags.Json = False,
    **given: Any,
) -> None:
    """Measure a dictionary on text that it was not built on, beside random tokens and an untrained model.

    Of the text that it was built on, the documents that it has not read are used.

    itda eval gpt2-8 other-book.txt

    itda eval gpt2-8 other-book.txt --sae sae-folder
    """
    from itda.disk import check_file
    from itda.evaluation.evaluate import evaluate
    from itda.report import plots

    if out is not None:
        check_file("out", out)
    for picture in zf:
        plots.check(picture, "zf")
    systems = []
    if sae:
        from itda.interop.saelens import load_sae

        systems = [load_sae(folder) for folder in sae]
    result = evaluate(dictionary, data, **given, systems=systems, progress=True)
    terminal.output(result.to_json(), None if json else result)
    if out is not None or os.path.isdir(dictionary):  # only now, so that nothing is lost where it cannot be written
        terminal.say(f"{result.save(dictionary if out is None else out)} written")
    for picture in zf:
        result.zf(picture)
        terminal.say(f"{picture} written")


@command()
def export(
    dictionary: flags.Dictionary,
    *,
    to: Annotated[
        Literal["saelens"], arg(metavar="{saelens}", help="for SAELens: `SAE.load_from_disk` reads the result")
    ],
    out: Annotated[str, arg(metavar="DIR", help="the folder; an export that is there already is replaced")],
    architecture: Annotated[
        Literal["matching_pursuit", "itda"],
        arg(
            metavar="{matching_pursuit,itda}",
            help="SAELens' own, with two latents for each atom of signed codes; or one that needs this library",
        ),
    ] = "matching_pursuit",
    json: flags.Json = False,
) -> None:
    """Write a dictionary in the format of another library.

    itda export gpt2-8 --to saelens --out gpt2-8-sae
    """
    from itda import ITDA
    from itda.interop import saelens

    found = ITDA.of(dictionary)
    path = saelens.export(found, out, architecture=architecture)
    n, nonneg = len(found), found.nonneg
    signs = {"positive" if nonneg else "both": [0, n]}  # from latent, to before latent
    said = f"latent i is atom i, with coefficients {'of zero or more' if nonneg else 'of both signs'}"
    if architecture == "matching_pursuit" and not nonneg:
        signs = {"positive": [0, n], "negative": [n, 2 * n]}
        said = f"latent i is atom i with a positive coefficient, latent {n:,} + i the same atom with a negative one"
    latents = max(end for _, end in signs.values())
    result = {"path": str(path), "architecture": architecture, "n_atoms": n, "latents": latents, "signs": signs}
    terminal.output(
        result, None if json else f"{path}: {counted(latents, 'latent')} of {counted(n, 'atom')}, for {to}; {said}"
    )
    first = "after `itda.interop.saelens.register()` " if architecture == "itda" else ""
    terminal.say(f"load it {first}with: sae_lens.SAE.load_from_disk({str(path)!r})")
