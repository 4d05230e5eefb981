"""The commands that make dictionaries, SAEs and what they are made from: train, sae, sweep, collect."""

from __future__ import annotations

import shlex
from typing import Annotated, Any

from tyro.conf import Positional, arg

from itda.cli import flags, terminal
from itda.cli.flags import command
from itda.errors import InputError, counted
from itda.settings import verbs


@command(
    verbs.TRAIN,
    "layer hook tokens k threshold n_atoms context_length seed column dtype stream_layers overwrite refine",
)
def train(
    model: flags.Model,
    data: flags.Data,
    *,
    out: Annotated[
        str, arg(metavar="DIR", help="the folder to make; with several layers, the folder of their folders")
    ],
    json: flags.Json = False,
    **given: Any,
) -> None:
    """Train a dictionary in one pass over the data: tokens are drawn and moved, or with --threshold kept as they are.

    An interrupted training goes on with the same command, to the same result.

    itda train gpt2 book.txt --layer 8 --out gpt2-8

    itda train gpt2 Salesforce/wikitext --config wikitext-103-raw-v1 --layer 2 6 10 --n-atoms 4096 --out gpt2-layers
    """
    from itda.reading.on_disk import is_stored
    from itda.training.train import train as run

    with terminal.signals.waited_for() as stop:
        results = run(model, data, out, **given, progress=True, stop=stop)
    documents = [result.to_json() for result in results]
    terminal.output(documents if len(results) > 1 else documents[0], None if json else "\n".join(map(str, results)))
    k, tokens = results[0].k, given.get("tokens", verbs.TRAIN.settings["tokens"].default)
    if any(result.n_atoms < 2 * k for result in results):
        more = (
            "a larger --n-atoms" if given.get("n_atoms") is not None else "a lower --threshold, or a size (--n-atoms),"
        )
        varied = "" if given.get("seed") is not None or is_stored(data) else ", and --seed 0 more varied ones"
        terminal.say(f"few atoms for k = {k}: {more} gives more{varied}; or write tokens with fewer (--k)")
    elif given.get("n_atoms") is not None and given.get("seed") is None and not is_stored(data):
        terminal.say("rows were read in the text's own order: --seed 0 shuffles them, and gives more varied atoms")
    full = all(result.n_atoms == given.get("max_atoms") for result in results)  # so that reading stopped before the end
    if is_stored(data) and results[0].tokens < tokens and not full:
        terminal.say(f"{data} holds no more tokens: itda collect with more --tokens adds to it")
    terminal.say(f"look at it with: itda show {shlex.quote(results[0].path)}")


@command(verbs.TRAIN_SAE, "layer hook tokens kind k afa l1 n_atoms from_itda context_length seed column overwrite")
def sae(model: flags.Model, data: flags.Data, *, out: flags.Out, json: flags.Json = False, **given: Any) -> None:
    """Train sparse autoencoders, of several kinds on the same activations, as folders that SAELens loads.

    An interrupted training goes on with the same command, to the same result.

    itda sae gpt2 book.txt --layer 8 --kind topk --k 32 --n-atoms 4096 --out gpt2-8-topk

    itda sae gpt2 gpt2-acts --layer 8 --kind topk batchtopk relu top-afa mp --k 32 --out gpt2-8-saes
    """
    from itda.saes.train import train_sae

    with terminal.signals.waited_for() as stop:
        results = train_sae(model, data, out, **given, progress=True, stop=stop)
    documents = [result.to_json() for result in results]
    terminal.output(documents if len(results) > 1 else documents[0], None if json else "\n".join(map(str, results)))
    paths = shlex.join(result.path for result in results)
    terminal.say(f"measure it beside a dictionary with: itda eval DIR DATA --sae {paths}")


@command(verbs.COLLECT, "layer hook tokens context_length seed column dtype overwrite")
def collect(model: flags.Model, data: flags.Data, *, out: flags.Out, json: flags.Json = False, **given: Any) -> None:
    """Write activations with their labels to disk, where train, eval and compare read them without the model.

    An interrupted collecting goes on with the same command; more --tokens add to what is there.

    itda collect gpt2 book.txt --layer 4 8 --out gpt2-acts

    itda train gpt2 gpt2-acts --layer 8 --out gpt2-8
    """
    from itda.reading.collect import collect as run

    with terminal.signals.waited_for() as stop:
        result = run(model, data, out, **given, progress=True, stop=stop)
    terminal.output(result.to_json(), None if json else str(result))
    terminal.say(f"build a dictionary from it with: {shlex.join(['itda', 'train', model, out, '--out', 'DIR'])}")


SIDE_BY_SIDE = "train so many dictionaries side by side"


@command(verbs.GRID, "layer hook tokens k threshold n_atoms context_length seed revision", many=True)
def sweep(
    file: Annotated[
        Positional[str | None],
        arg(
            metavar="[FILE]",
            help="a TOML file of settings, each a value or a list: k = [20, 40]",
            help_behavior_hint="",
        ),
    ] = None,
    *,
    out: Annotated[str, arg(metavar="DIR", help="the folder for dictionaries, results.json and results.csv")],
    model: Annotated[tuple[str, ...], flags.some("ids or folders of models", "MODEL")] = (),
    data: Annotated[tuple[str, ...], flags.some("texts, as for train", "DATA")] = (),
    workers: Annotated[flags.MaybeWhole, arg(help=SIDE_BY_SIDE, help_behavior_hint="")] = None,
    ray: Annotated[
        tuple[str, ...] | None,
        arg(metavar="[ADDRESS]", help=verbs.SWEEP.settings["ray"].setting.help, help_behavior_hint=""),
    ] = None,
    json: flags.Json = False,
    **given: Any,
) -> None:
    """Train a dictionary for every combination of settings, and put them into one table.

    What was interrupted goes on with the same command; what is finished is not trained again.

    itda sweep --model gpt2 distilgpt2 --data book.txt --layer 2 4 --k 20 40 --out sweep

    itda sweep sweep.toml --out sweep --workers 4
    """
    from itda.training.grid import read_grid
    from itda.training.sweep import sweep as run

    named = {name: list(values) for name, values in {"model": model, "data": data}.items() if values}
    settings = {**(read_grid(file, whole=False) if file is not None else {}), **named, **given}
    here = False if ray is None else flags.address(ray)
    with terminal.signals.waited_for() as stop:
        result = run(settings, out, workers=workers, ray=here, progress=True, stop=stop)
    terminal.output(result.to_json(), None if json else result)
    if result.problems:
        alone = len(result.problems) == 1
        raise InputError(
            f"{len(result.problems):,} of {counted(len(result.rows), 'dictionary')} {'is' if alone else 'are'} missing "
            f"({result.problems[0].rstrip('.')}): the same command tries them again."
        )
