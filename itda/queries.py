"""The commands that answer: what a token, a dictionary or a model is made of, how good, how alike, what changed."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any

from tyro.conf import Positional, arg

from itda import flags, terminal
from itda.errors import InputError


def decompose(
    dictionary: flags.Dictionary,
    text: Annotated[Positional[str], arg(metavar="TEXT")],
    *,
    token: flags.Text = "-1",
    model: flags.OtherModel = None,
    tokenizer: flags.Tokenizer = None,
    k: flags.OtherK = None,
    method: flags.OtherMethod = None,
    force: flags.Force = False,
    dtype: flags.OtherDtype = None,
    device: flags.Device = None,
    trust_remote_code: flags.TrustRemoteCode = False,
    json: flags.Json = False,
) -> None:
    """Decompose what the model makes of one token of a text: which atoms, and what they stand for.

    itda decompose gpt2-8 "The mouse sat on the carpet"

    itda decompose gpt2-8 "The mouse sat on the carpet" --token mouse

    Args:
        text: what the model reads; it must fit into one row
        token: which token, by number (-1 is the last) or by its text; " 2" with a blank is a text
    """
    given = {name: value for name, value in locals().items() if name != "json"}
    from itda import report

    given["token"] = int(token) if re.fullmatch(r"[+-]?\d{1,18}", token, re.ASCII) else token
    result = report.decompose(**given)
    terminal.output(result.to_json(), None if json else result)


def show(
    dictionary: flags.Dictionary,
    *,
    atom: flags.MaybeWhole = None,
    find: flags.MaybeText = None,
    json: flags.Json = False,
) -> None:
    """Show what is in a dictionary, one of its atoms, or those of a token.

    itda show gpt2-8

    itda show gpt2-8 --atom 17

    itda show gpt2-8 --find mouse

    Args:
        atom: number of an atom, from 0
        find: the atoms whose token has this in it
    """
    from itda import report

    if atom is not None and find is not None:
        raise InputError("--atom and --find were both given: choose one of them.")
    if find is not None:
        result: report.Report = report.find(dictionary, find)
    else:
        result = report.summary(dictionary) if atom is None else report.atom_report(dictionary, atom)
    terminal.output(result.to_json(), None if json else result)


def hooks(
    model: flags.Model,
    *,
    revision: flags.Revision = None,
    trust_remote_code: flags.TrustRemoteCode = False,
    json: flags.Json = False,
) -> None:
    """List where a model can be read: the names that --hook takes.

    itda hooks gpt2
    """
    from itda.places import hook_points

    result = hook_points(model, revision=revision, trust_remote_code=trust_remote_code)
    terminal.output(result.to_json(), None if json else result)


def compare(
    models: Annotated[Positional[tuple[str, ...]], arg(metavar="MODEL MODEL [MODEL ...]", help_behavior_hint="")],
    *,
    data: flags.MaybeText = None,
    measure: flags.Words = (),
    layer: flags.Layers = (),
    hook: flags.Hooks = (),
    tokens: flags.Tokens = 50_000,
    n_atoms: flags.MaybeWhole = None,
    threshold: flags.MaybeReal = None,
    k: flags.Whole = 8,
    atoms: flags.MaybeWhole = None,
    no_controls: flags.Flag = False,
    align: flags.Flag = False,
    names: flags.Words = (),
    heatmap: Annotated[tuple[str, ...], arg(metavar="PICTURE [PICTURE ...]", help_behavior_hint="")] = (),
    context_length: flags.ContextLength = 128,
    seed: flags.Seed = None,
    column: flags.Column = "text",
    split: flags.Split = "train",
    config: flags.Config = None,
    dtype: flags.Text = "auto",
    device: flags.Device = None,
    trust_remote_code: flags.Flag = False,
    json: flags.Json = False,
) -> None:
    """Compare the layers of two or more models that read one text, or of their dictionaries.

    itda compare gpt2 distilgpt2 --data book.txt --heatmap layers.png

    itda compare gpt2-itda other-itda

    Args:
        models: two or more models by id or folder, with --data; or folders of dictionaries (of several layers, the
            folder of their folders) or of activations (itda collect) without
        data: the text that models read; with dictionaries, the one they were built on, which aligns different rows
        measure: only these of shared_atoms_procrustes, shared_atoms, jaccard, jaccard_corrected, jaccard_by_token,
            overlap, soft_overlap, cka, cka_standardised, cka_debiased, cca, svcca, linear_regression, procrustes,
            relative, relative_centred
        layer: read models after these blocks only
        hook: read models at these modules instead
        n_atoms: aim at so many atoms in each layer's dictionary; a hundredth of the tokens by default
        threshold: build dictionaries at this threshold instead, to whatever size comes
        k: pursuit steps
        atoms: how many atoms the models share; 1500, or half of the tokens where these are few
        no_controls: leave out untrained models and shuffled tokens, which cost two thirds of the time
        align: compare tokens by where they end in the text also where rows are alike
        names: what to call the models
        heatmap: draw the first measure as .png, .svg or .pdf
        dtype: of the models: auto, float32, bfloat16 or float16
        trust_remote_code: run code that the models' repositories bring
    """
    from itda import plots
    from itda.compare import compare as run

    for picture in heatmap:
        plots.check(picture)
    reading: dict[str, Any] = dict(
        context_length=context_length, seed=seed, column=column, split=split, config=config, dtype=dtype
    )
    result = run(
        models,
        data,
        measures=measure or None,
        layer=layer or None,
        hook=hook or None,
        tokens=tokens,
        n_atoms=n_atoms,
        threshold=threshold,
        k=k,
        atoms=atoms,
        controls=not no_controls,
        align=align or None,
        names=names or None,
        progress=True,
        device=device,
        trust_remote_code=trust_remote_code,
        **reading,
    )
    try:
        for picture in heatmap:
            result.heatmap(picture)
            terminal.say(f"{picture} written")
    finally:  # nothing is lost where a picture cannot be written
        terminal.output(result.to_json(), None if json else result)


def diff(
    base: Annotated[Positional[str], arg(metavar="BASE")],
    tuned: Annotated[Positional[str], arg(metavar="TUNED")],
    data: flags.Data,
    *,
    layer: flags.Layers = (),
    hook: flags.Hooks = (),
    tokens: flags.Tokens = 50_000,
    null: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="")] = None,
    n_atoms: flags.Whole = 512,
    k: flags.Whole = 16,
    top: flags.Whole = 100,
    rows: flags.Whole = 40,
    html: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None,
    context_length: flags.ContextLength = 128,
    column: flags.Column = "text",
    split: flags.Split = "train",
    config: flags.Config = None,
    dtype: flags.Text = "auto",
    device: flags.Device = None,
    trust_remote_code: flags.Flag = False,
    json: flags.Json = False,
) -> None:
    """Show what fine-tuning changed: the tokens that moved most, and the atoms that only one model needs.

    itda diff gpt2 gpt2-tuned mixed.txt --layer 4 8 --html diff.html

    itda diff gpt2 gpt2-tuned mixed.txt --null gpt2-tuned-on-other-text

    Args:
        base: id of a model, or its folder
        tuned: the same for what became of it; merge adapters into the weights first
        data: the text that both read: what the tuning was meant for, mixed with other text, is best
        layer: compare after these blocks; after all by default
        hook: compare at these modules instead
        null: another fine-tune of the base, on neutral text, for what any tuning changes
        n_atoms: give the base's dictionaries so many atoms, to a tenth; the tuned model's have their threshold
        k: pursuit steps
        top: how many tokens to report; the terminal shows the first twelve
        rows: how many prompts to show on the page
        html: write a page with the texts and the changed tokens marked
        dtype: of the models: auto, float32, bfloat16 or float16
        trust_remote_code: run code that the models' repositories bring
    """
    given = {name: value for name, value in locals().items() if name not in ("json", "html", "layer", "hook")}
    from itda.diff import diff as run
    from itda.page import check

    if html is not None:
        check(html)
    result = run(**given, layer=layer or None, hook=hook or None, progress=True)
    try:
        if html is not None:
            result.save_html(html)
            terminal.say(f"{html} written")
    finally:  # nothing is lost where the page cannot be written
        terminal.output(result.to_json(), None if json else result)


def eval(
    dictionary: flags.Folder,
    data: flags.Data,
    *,
    model: flags.OtherModel = None,
    tokenizer: flags.Tokenizer = None,
    tokens: flags.Whole = 50_000,
    ce_tokens: flags.Whole = 10_000,
    k: flags.OtherK = None,
    method: flags.OtherMethod = None,
    no_controls: flags.Flag = False,
    sae: Annotated[tuple[str, ...], arg(metavar="FOLDER [FOLDER ...]", help_behavior_hint="")] = (),
    probe: flags.MaybeText = None,
    probe_column: flags.Text = "text",
    probe_label: flags.Text = "label",
    in_sample: flags.Flag = False,
    force: flags.Force = False,
    seed: flags.Whole = 0,
    column: flags.MaybeText = None,
    split: flags.MaybeText = None,
    config: flags.MaybeText = None,
    dtype: flags.OtherDtype = None,
    device: flags.Device = None,
    trust_remote_code: flags.TrustRemoteCode = False,
    out: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None,
    json: flags.Json = False,
) -> None:
    """Measure a dictionary on text that it was not built on, beside random tokens and an untrained model.

    itda eval gpt2-8 other-book.txt

    itda eval gpt2-8 other-book.txt --sae sae-folder

    Args:
        dictionary: folder of a dictionary, or its repository on the hub
        data: text; of what the dictionary was built on, the documents that it has not read
        tokens: measure on so many tokens at most
        ce_tokens: splice reconstructions into the running model on so many of them; 0 for none
        no_controls: leave out random tokens, random directions and the untrained model
        sae: measure these SAEs, in SAELens' format, on the same tokens
        probe: a .jsonl or .parquet file of labelled texts, whose labels are told from one latent, a few, and all
        probe_column: where the text of a record is
        probe_label: where its label is
        in_sample: measure on text that the dictionary was built on all the same
        seed: of what is drawn
        column: where the text of a record is, if not where it was in training
        split: of a hub dataset, if not that of training
        config: of a hub dataset, if not that of training
        out: write all figures to this file, and not to eval.json in the dictionary's folder, which is replaced
    """
    given = {name: v for name, v in locals().items() if name not in ("json", "no_controls", "sae", "out")}
    from itda.disk import check_file
    from itda.evaluate import evaluate

    if out is not None:
        check_file("out", out)

    systems = []
    if sae:
        from itda.interop.saelens import load_sae

        systems = [load_sae(folder) for folder in sae]
    text = {"column": given.pop("column"), "split": given.pop("split"), "config": given.pop("config")}
    given |= {name: value for name, value in text.items() if value is not None}
    result = evaluate(**given, controls=not no_controls, systems=systems, progress=True)
    terminal.output(result.to_json(), None if json else result)
    if out is not None or os.path.isdir(dictionary):  # only now, so that nothing is lost where it cannot be written
        terminal.say(f"{result.save(dictionary if out is None else out)} written")
