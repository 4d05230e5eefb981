"""The commands: one function each, one library call each; their signatures and docstrings are flags and help."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import shlex
import tempfile
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from itda import terminal
from itda.errors import InputError
from itda.flags import (
    Architecture,
    BatchRows,
    Data,
    Dictionary,
    Flag,
    Hooks,
    Layers,
    MaybeReal,
    MaybeText,
    MaybeWhole,
    Method,
    Model,
    Ray,
    Real,
    Reals,
    Text,
    Whole,
    Wholes,
    Words,
)

# Few steps make few, telling atoms; shuffled rows are of all of the library, not of the first modules in the alphabet.
DEMO: dict[str, Any] = {"k": 10, "threshold": 0.15, "tokens": 100_000, "seed": 0}
DEMO_TEXTS = [  # text and token
    ("Return the number of elements in the list.", " list"),
    ("If the file does not exist, an OSError is raised.", " raised"),
    ("Open the file for reading and return a file object.", " object"),
]


def train(
    model: Model,
    data: Data,
    *,
    out: Annotated[str, arg(metavar="DIR")],
    layer: Layers = (),
    hook: Hooks = (),
    k: Whole = 40,
    threshold: MaybeReal = None,
    n_atoms: MaybeWhole = None,
    tokens: Whole = 1_000_000,
    preset: Annotated[Literal["paper"] | None, arg(metavar="paper", help_behavior_hint="")] = None,
    loss: Annotated[
        Literal["relative", "cosine", "squared"] | None,
        arg(metavar="{relative,cosine,squared}", help_behavior_hint="(default: relative)"),
    ] = None,
    admission: Annotated[
        Literal["sequential", "batch", "paper"] | None,
        arg(metavar="{sequential,batch,paper}", help_behavior_hint="(default: sequential)"),
    ] = None,
    no_center: Flag = False,
    max_atoms: MaybeWhole = None,
    context_length: Whole = 128,
    batch_rows: BatchRows = None,
    truncate: Flag = False,
    pack: Flag = False,
    seed: MaybeWhole = None,
    column: Text = "text",
    split: Text = "train",
    config: MaybeText = None,
    data_revision: MaybeText = None,
    special_tokens: Flag = False,
    padding: Flag = False,
    tokenizer: MaybeText = None,
    dtype: Text = "auto",
    device: MaybeText = None,
    revision: MaybeText = None,
    trust_remote_code: Flag = False,
    backend: Annotated[Literal["hooks", "nnsight"], arg(metavar="{hooks,nnsight}")] = "hooks",
    remote: Flag = False,
    device_map: MaybeText = None,
    tensor_parallel: MaybeWhole = None,
    chunk_size: Whole = 4096,
    candidates: Whole = 1,
    refine: Whole = 0,
    refine_tokens: Whole = 200_000,
    checkpoint_seconds: Real = 30.0,
    stream_layers: Flag = False,
    no_stream_layers: Flag = False,
    state_gb: MaybeReal = None,
    overwrite: Flag = False,
    workers: MaybeWhole = None,
    ray: Ray = None,
    json: Flag = False,
) -> None:
    """Train a dictionary of real activations, in one pass over the data.

    An interrupted training goes on with the same command, to the same result.

    itda train gpt2 book.txt --layer 8 --out gpt2-8

    itda train gpt2 Salesforce/wikitext --config wikitext-103-raw-v1 --layer 2 6 10 --n-atoms 4096 --out gpt2

    Args:
        model: id of a model on the Hugging Face hub, or its folder
        data: id of a dataset on the hub (streamed), or a .txt, .jsonl or .parquet file, or a folder of these, or one of
            activations, as collect writes it
        out: the folder to make; with several layers or hook points, of their folders
        layer: read the residual stream after this block (-1 is the last); several train as many dictionaries
        hook: read here instead, by module path (model.layers.8.mlp) or TransformerLens name
        k: pursuit steps, the L0 budget
        threshold: admit a token whose loss exceeds this; 0.2 by default, 4e-4 with the cosine loss
        n_atoms: aim at so many atoms instead of at a threshold
        tokens: read so many tokens at most
        preset: the published code's practice: cosine loss, its admission, truncated, padded rows, 128 at a time
        loss: |x - x_hat|^2 / |x|^2, or the published code's, or |x - x_hat|^2
        admission: one token after another, or a batch at a time, or as the published code does
        no_center: do not subtract the mean of the first tokens
        max_atoms: stop at so many atoms
        context_length: tokens in a row
        batch_rows: rows that go through the model together
        truncate: use the first row of each document only; a .txt file is one document
        pack: join the documents
        seed: shuffle the rows
        column: where the text of a record is
        split: of a hub dataset
        config: of a hub dataset
        data_revision: of a hub dataset
        special_tokens: read special tokens and position 0 too
        padding: fill rows up and read the filling like text
        tokenizer: id or folder, where it is not the model's
        dtype: of the model: auto, float32, bfloat16 or float16
        device: cpu, cuda, ...; the fastest there is by default
        revision: branch, tag or commit of the model
        trust_remote_code: run code that the model's repository brings
        backend: what reads the model; the activations are the same
        remote: with nnsight, read it on NDIF, which needs a key (NDIF_API_KEY)
        device_map: auto spreads the model over GPUs, memory and disk, with accelerate
        tensor_parallel: share every block of the model between so many GPUs of this machine, a process for each
        chunk_size: tokens pursued together; changes memory and speed alone
        candidates: build a dictionary of so many times --n-atoms, and keep the atoms of most use
        refine: move the atoms in so many passes, so that they reconstruct better; they are real activations no more
        refine_tokens: do both on so many tokens, which are read again
        checkpoint_seconds: how often progress is kept
        stream_layers: load the model block by block, as is done by itself where it does not fit into memory
        no_stream_layers: load it whole in any case
        state_gb: of hidden states on disk, when it is streamed, in 10^9 bytes; half of the free disk by default
        overwrite: replace a dictionary that is there
        workers: read with so many processes, to the same result
        ray: on the machines of the Ray cluster at this address; without one, on this machine
        json: print the result as JSON
    """
    if stream_layers and no_stream_layers:
        raise InputError("Both `--stream-layers` and `--no-stream-layers` were given: choose one of them.")
    given = {name: value for name, value in locals().items() if name not in ("json", "no_stream_layers", "no_center")}
    given["center"] = False if no_center else None
    given["stream_layers"] = True if stream_layers else False if no_stream_layers else None
    given["ray"] = _address(ray)
    for name in ("layer", "hook"):
        if len(given[name]) < 2:  # with one, `out` is the dictionary's own folder
            given[name] = next(iter(given[name]), None)
    results = _train(**given)
    documents = [result.to_json() for result in results]
    terminal.output(documents if len(results) > 1 else documents[0], None if json else "\n".join(map(str, results)))
    if any(result.n_atoms < 2 * result.k for result in results):
        terminal.say(f"few atoms for k = {k}: a lower --threshold or --n-atoms gives more, --seed 0 more varied ones")
    terminal.say(f"look at it with: itda show {shlex.quote(results[0].path)}")


def collect(
    model: Model,
    data: Data,
    *,
    out: Annotated[str, arg(metavar="DIR")],
    layer: Layers = (),
    hook: Hooks = (),
    tokens: Whole = 1_000_000,
    context_length: Whole = 128,
    batch_rows: Whole = 32,
    truncate: Flag = False,
    pack: Flag = False,
    seed: MaybeWhole = None,
    column: Text = "text",
    split: Text = "train",
    config: MaybeText = None,
    data_revision: MaybeText = None,
    special_tokens: Flag = False,
    padding: Flag = False,
    tokenizer: MaybeText = None,
    dtype: Text = "auto",
    device: MaybeText = None,
    revision: MaybeText = None,
    trust_remote_code: Flag = False,
    device_map: MaybeText = None,
    tensor_parallel: MaybeWhole = None,
    stream_layers: Flag = False,
    no_stream_layers: Flag = False,
    state_gb: MaybeReal = None,
    overwrite: Flag = False,
    json: Flag = False,
) -> None:
    """Write activations with their labels to disk, where train, eval and compare read them without the model.

    An interrupted collecting goes on with the same command; more --tokens add to what is there.

    itda collect gpt2 book.txt --layer 4 8 --out gpt2-acts

    itda train gpt2 gpt2-acts --layer 8 --out gpt2-8

    Args:
        model: id of a model on the Hugging Face hub, or its folder
        data: id of a dataset on the hub (streamed), or a .txt, .jsonl or .parquet file, or a folder of these
        out: the folder to make
        layer: read the residual stream after this block (-1 is the last), or after several
        hook: read here instead, by module path (model.layers.8.mlp) or TransformerLens name
        tokens: read so many tokens at most
        context_length: tokens in a row
        batch_rows: rows that go through the model together
        truncate: use the first row of each document only; a .txt file is one document
        pack: join the documents
        seed: shuffle the rows
        column: where the text of a record is
        split: of a hub dataset
        config: of a hub dataset
        data_revision: of a hub dataset
        special_tokens: read special tokens and position 0 too
        padding: fill rows up and read the filling like text
        tokenizer: id or folder, where it is not the model's
        dtype: of the model, and so of what is written: auto, float32, bfloat16 or float16
        device: cpu, cuda, ...; the fastest there is by default
        revision: branch, tag or commit of the model
        trust_remote_code: run code that the model's repository brings
        device_map: auto spreads the model over GPUs, memory and disk, with accelerate
        tensor_parallel: share every block of the model between so many GPUs of this machine, a process for each
        stream_layers: load the model block by block, as is done by itself where it does not fit into memory
        no_stream_layers: load it whole in any case
        state_gb: of hidden states on disk, when it is streamed, in 10^9 bytes; half of the free disk by default
        overwrite: replace activations that are there
        json: print the result as JSON
    """
    if stream_layers and no_stream_layers:
        raise InputError("Both --stream-layers and --no-stream-layers were given: choose one of them.")
    given = {k: v for k, v in locals().items() if k not in ("json", "layer", "hook", "no_stream_layers", "device_map")}
    given["stream_layers"] = True if stream_layers else False if no_stream_layers else None
    given |= {"device_map": device_map} if device_map else {}
    from itda.collect import collect as run

    try:
        result = run(**given, layer=layer or None, hook=hook or None, progress=True, stop=terminal.signals.stop)
    finally:
        terminal.signals.waits = False
    terminal.output(result.to_json(), None if json else str(result))
    words = ["itda", "train", str(model), str(out), "--out", "DIR"]
    terminal.say(f"build a dictionary from it with: {shlex.join(words)}")


def sweep(
    file: Annotated[Positional[str | None], arg(metavar="[FILE]", help_behavior_hint="")] = None,
    *,
    out: Annotated[str, arg(metavar="DIR")],
    model: Words = (),
    data: Words = (),
    layer: Layers = (),
    hook: Hooks = (),
    k: Wholes = (),
    threshold: Reals = (),
    n_atoms: Wholes = (),
    seed: Wholes = (),
    revision: Words = (),
    tokens: Wholes = (),
    context_length: Wholes = (),
    workers: MaybeWhole = None,
    ray: Ray = None,
    json: Flag = False,
) -> None:
    """Train a dictionary for every combination of settings, and put them into one table.

    What was interrupted goes on with the same command; what is finished is not trained again.

    itda sweep --model gpt2 distilgpt2 --data book.txt --layer 2 4 --k 20 40 --out sweep

    itda sweep sweep.toml --out sweep --workers 4

    Args:
        file: a TOML file of settings, the names those of `itda train`, each a value or a list: k = [20, 40]
        out: the folder for dictionaries, results.json and results.csv
        model: ids or folders
        data: as for `itda train`
        layer: read the residual stream after these blocks, in one pass
        hook: read here instead, by module path or TransformerLens name
        k: pursuit steps
        threshold: admit a token whose loss exceeds this
        n_atoms: aim at so many atoms; with thresholds too, both are tried
        seed: shuffle the rows
        revision: branches, tags or commits of the models
        tokens: read so many tokens at most
        context_length: tokens in a row
        workers: train so many dictionaries side by side
        ray: on the machines of the Ray cluster at this address; without one, on this machine
        json: print the result as JSON
    """
    given = {name: list(v) for name, v in locals().items() if isinstance(v, tuple) and v and name != "ray"}
    from itda.grid import read_grid
    from itda.sweep import sweep as run

    settings = {**(read_grid(file, whole=False) if file is not None else {}), **given}
    try:
        result = run(settings, out, workers=workers, ray=_address(ray), progress=True, stop=terminal.signals.stop)
    finally:
        terminal.signals.waits = False
    terminal.output(result.to_json(), None if json else result)
    if result.problems:
        raise InputError(
            f"{len(result.problems)} of {len(result.rows)} dictionaries are missing "
            f"({result.problems[0].rstrip('.')}): the same command tries them again."
        )


def decompose(
    dictionary: Dictionary,
    text: Annotated[Positional[str], arg(metavar="TEXT")],
    *,
    token: Text = "-1",
    model: MaybeText = None,
    tokenizer: MaybeText = None,
    k: MaybeWhole = None,
    method: Method = None,
    force: Flag = False,
    dtype: MaybeText = None,
    device: MaybeText = None,
    trust_remote_code: Flag = False,
    json: Flag = False,
) -> None:
    """Decompose what the model makes of one token of a text: which atoms, and what they stand for.

    itda decompose gpt2-8 "The mouse sat on the carpet"

    itda decompose gpt2-8 "The mouse sat on the carpet" --token mouse

    Args:
        dictionary: folder of a dictionary, or its repository on the hub
        text: what the model reads; it must fit into one row
        token: which token, by number (-1 is the last) or by its text; " 2" with a blank is a text
        model: id or folder, where it is not the one that the dictionary names
        tokenizer: id or folder, where it is not the model's
        k: pursuit steps, if not the dictionary's
        method: matching pursuit, orthogonal matching pursuit or gradient pursuit, if not the dictionary's
        force: use a model or tokenizer that is not the dictionary's
        dtype: of the model, if not as in training
        device: cpu, cuda, ...; the fastest there is by default
        trust_remote_code: run code that the model's repository brings
        json: print the result as JSON
    """
    given = {name: value for name, value in locals().items() if name != "json"}
    from itda import report

    given["token"] = int(token) if re.fullmatch(r"[+-]?\d+", token, re.ASCII) else token
    result = report.decompose(**given)
    terminal.output(result.to_json(), None if json else result)


def show(dictionary: Dictionary, *, atom: MaybeWhole = None, json: Flag = False) -> None:
    """Show what is in a dictionary, or one of its atoms.

    itda show gpt2-8

    itda show gpt2-8 --atom 17

    Args:
        dictionary: folder of a dictionary, or its repository on the hub
        atom: number of an atom, from 0
        json: print the result as JSON
    """
    from itda import report

    result = report.summary(dictionary) if atom is None else report.atom_report(dictionary, atom)
    terminal.output(result.to_json(), None if json else result)


def compare(
    models: Annotated[Positional[tuple[str, ...]], arg(metavar="MODEL MODEL [MODEL ...]")],
    *,
    data: MaybeText = None,
    measure: Words = (),
    layer: Layers = (),
    hook: Hooks = (),
    tokens: Whole = 50_000,
    n_atoms: MaybeWhole = None,
    threshold: MaybeReal = None,
    k: Whole = 8,
    atoms: MaybeWhole = None,
    no_controls: Flag = False,
    align: Flag = False,
    names: Words = (),
    heatmap: Annotated[tuple[str, ...], arg(metavar="PICTURE [PICTURE ...]", help_behavior_hint="")] = (),
    context_length: Whole = 128,
    seed: MaybeWhole = None,
    column: Text = "text",
    split: Text = "train",
    config: MaybeText = None,
    dtype: Text = "auto",
    device: MaybeText = None,
    trust_remote_code: Flag = False,
    json: Flag = False,
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
        tokens: read so many tokens at most
        n_atoms: aim at so many atoms in each layer's dictionary; a hundredth of the tokens by default
        threshold: build dictionaries at this threshold instead, to whatever size comes
        k: pursuit steps
        atoms: how many atoms the models share; 1500, or half of the tokens where these are few
        no_controls: leave out untrained models and shuffled tokens, which cost two thirds of the time
        align: compare tokens by where they end in the text also where rows are alike
        names: what to call the models
        heatmap: draw the first measure as .png, .svg or .pdf
        context_length: tokens in a row
        seed: shuffle the rows
        column: where the text of a record is
        split: of a hub dataset
        config: of a hub dataset
        dtype: of the models: auto, float32, bfloat16 or float16
        device: cpu, cuda, ...; the fastest there is by default
        trust_remote_code: run code that the models' repositories bring
        json: print the result as JSON
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
    for picture in heatmap:
        result.heatmap(picture)
        terminal.say(f"{picture} written")
    terminal.output(result.to_json(), None if json else result)


def diff(
    base: Annotated[Positional[str], arg(metavar="BASE")],
    tuned: Annotated[Positional[str], arg(metavar="TUNED")],
    data: Data,
    *,
    layer: Layers = (),
    hook: Hooks = (),
    tokens: Whole = 50_000,
    null: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="")] = None,
    n_atoms: Whole = 512,
    k: Whole = 16,
    top: Whole = 100,
    rows: Whole = 40,
    html: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None,
    context_length: Whole = 128,
    column: Text = "text",
    split: Text = "train",
    config: MaybeText = None,
    dtype: Text = "auto",
    device: MaybeText = None,
    trust_remote_code: Flag = False,
    json: Flag = False,
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
        tokens: read so many tokens at most
        null: another fine-tune of the base, on neutral text, for what any tuning changes
        n_atoms: aim at so many atoms in each dictionary
        k: pursuit steps
        top: how many tokens to report
        rows: how many prompts to show on the page
        html: write a page with the texts and the changed tokens marked
        context_length: tokens in a row
        column: where the text of a record is
        split: of a hub dataset
        config: of a hub dataset
        dtype: of the models: auto, float32, bfloat16 or float16
        device: cpu, cuda, ...; the fastest there is by default
        trust_remote_code: run code that the models' repositories bring
        json: print the result as JSON
    """
    given = {name: value for name, value in locals().items() if name not in ("json", "html", "layer", "hook")}
    from itda.diff import diff as run
    from itda.page import check

    if html is not None:
        check(html)
    result = run(**given, layer=layer or None, hook=hook or None, progress=True)
    if html is not None:
        result.save_html(html)
        terminal.say(f"{html} written")
    terminal.output(result.to_json(), None if json else result)


def eval(
    dictionary: Dictionary,
    data: Data,
    *,
    model: MaybeText = None,
    tokenizer: MaybeText = None,
    tokens: Whole = 50_000,
    ce_tokens: Whole = 10_000,
    k: MaybeWhole = None,
    method: Method = None,
    no_controls: Flag = False,
    sae: Annotated[tuple[str, ...], arg(metavar="FOLDER [FOLDER ...]", help_behavior_hint="")] = (),
    probe: MaybeText = None,
    probe_column: Text = "text",
    probe_label: Text = "label",
    in_sample: Flag = False,
    force: Flag = False,
    seed: Whole = 0,
    column: MaybeText = None,
    split: MaybeText = None,
    config: MaybeText = None,
    dtype: MaybeText = None,
    device: MaybeText = None,
    trust_remote_code: Flag = False,
    json: Flag = False,
) -> None:
    """Measure a dictionary on text that it was not built on, beside random tokens and an untrained model.

    itda eval gpt2-8 other-book.txt

    itda eval gpt2-8 other-book.txt --sae sae-folder

    Args:
        dictionary: folder of a dictionary, in which eval.json is written, or its repository on the hub
        data: text; of what the dictionary was built on, the documents that it has not read
        model: id or folder, where it is not the one that the dictionary names
        tokenizer: id or folder, where it is not the model's
        tokens: measure on so many tokens at most
        ce_tokens: splice reconstructions into the running model on so many of them; 0 for none
        k: pursuit steps, if not the dictionary's
        method: matching pursuit, orthogonal matching pursuit or gradient pursuit, if not the dictionary's
        no_controls: leave out random tokens, random directions and the untrained model
        sae: measure these SAEs, in SAELens' format, on the same tokens
        probe: a .jsonl or .parquet file of labelled texts, whose labels are told from one latent, a few, and all
        probe_column: where the text of a record is
        probe_label: where its label is
        in_sample: measure on text that the dictionary was built on all the same
        force: use a model or tokenizer that is not the dictionary's
        seed: of what is drawn
        column: where the text of a record is, if not where it was in training
        split: of a hub dataset, if not that of training
        config: of a hub dataset, if not that of training
        dtype: of the model, if not as in training
        device: cpu, cuda, ...; the fastest there is by default
        trust_remote_code: run code that the model's repository brings
        json: print the result as JSON
    """
    given = {name: v for name, v in locals().items() if name not in ("json", "no_controls", "sae")}
    from itda.evaluate import evaluate

    systems = []
    if sae:
        from itda.interop.saelens import load_sae

        systems = [load_sae(folder) for folder in sae]
    text = {"column": given.pop("column"), "split": given.pop("split"), "config": given.pop("config")}
    given |= {name: value for name, value in text.items() if value is not None}
    result = evaluate(**given, controls=not no_controls, systems=systems, progress=True)
    terminal.output(result.to_json(), None if json else result)
    if os.path.isdir(dictionary):  # only now, so that nothing is lost where it cannot be written
        result.save(dictionary)
        terminal.say(f"{os.path.join(dictionary, 'eval.json')} written")


def export(
    dictionary: Dictionary,
    *,
    to: Annotated[Literal["saelens"], arg(metavar="{saelens}")],
    out: Annotated[str, arg(metavar="DIR")],
    architecture: Architecture = "matching_pursuit",
    json: Flag = False,
) -> None:
    """Write a dictionary in the format of another library.

    itda export gpt2-8 --to saelens --out gpt2-8-sae

    Args:
        dictionary: folder of a dictionary, or its repository on the hub
        to: for SAELens, `SAE.load_from_disk` reads the result
        out: the new folder
        architecture: SAELens' own, with two latents for each atom of signed codes; or one that needs this library
        json: print the result as JSON
    """
    from itda import report
    from itda.interop import saelens

    found = report.load(dictionary)
    path = saelens.export(found, out, architecture=architecture)
    latents = len(found) * (1 if architecture == "itda" or found.cfg.get("nonneg") else 2)
    result = {"path": str(path), "architecture": architecture, "n_atoms": len(found), "latents": latents}
    terminal.output(result, None if json else f"{path}: {latents:,} latents of {len(found):,} atoms, for {to}")


def demo(*, out: Annotated[str | None, arg(metavar="DIR", help_behavior_hint="")] = None, json: Flag = False) -> None:
    """Train a dictionary of the small model in the package, with no network, and look at it.

    itda demo

    itda demo --out demo-itda

    Args:
        out: keep the dictionary in this folder
        json: print the result as JSON
    """
    from itda import ITDA, report
    from itda import demo as packaged
    from itda.hooks import load

    with tempfile.TemporaryDirectory(prefix="itda-demo-") as temporary:
        folder = out or os.path.join(temporary, "itda")
        model = load(packaged.model_path(), hooks=-1)
        layer = model.n_layers // 2
        name = out or "DIR"
        flags = " ".join(f"--{flag} {value}" for flag, value in {"layer": layer, **DEMO}.items())
        terminal.say(f"$ itda train MODEL TEXTS {flags} --out {name}")
        (trained,) = _train(model=model, data=packaged.corpus(), out=folder, layer=layer, **DEMO)
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


def _train(**given: Any) -> list[Any]:
    from itda import runs

    try:
        return runs.train(**given, progress=True, stop=terminal.signals.stop)
    finally:
        terminal.signals.waits = False


def _address(ray: tuple[str, ...] | None) -> bool | str:
    """What `--ray` says: nothing, this machine, or an address."""
    if ray is None or not ray:
        return ray is not None
    if len(ray) > 1:
        raise InputError(f"--ray: {' '.join(ray)!r} came, and one address or none was wanted: put FILE before it.")
    return ray[0]
