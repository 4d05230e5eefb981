"""The commands that make something: one function each, one library call each; signatures and docstrings are the help.

Those that answer are in `itda.queries`; what is said of flags that several have is in `itda.flags`.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import shlex
import tempfile
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from itda import flags, terminal
from itda.errors import InputError

# Few steps make few, telling atoms; shuffled rows are of all of the library, not of the first modules in the alphabet.
DEMO: dict[str, Any] = {"k": 10, "threshold": 0.15, "tokens": 100_000, "seed": 0}
DEMO_TEXTS = [  # text and token
    ("Return the number of elements in the list.", " list"),
    ("If the file does not exist, an OSError is raised.", " raised"),
    ("Open the file for reading and return a file object.", " object"),
]


def train(
    model: flags.Model,
    data: flags.Data,
    *,
    out: flags.Out,
    layer: flags.Layers = (),
    hook: flags.Hook = (),
    k: flags.Whole = 40,
    threshold: flags.MaybeReal = None,
    n_atoms: flags.MaybeWhole = None,
    tokens: flags.Tokens = 1_000_000,
    preset: Annotated[Literal["paper"] | None, arg(metavar="paper", help_behavior_hint="")] = None,
    loss: Annotated[
        Literal["relative", "cosine", "squared"] | None,
        arg(metavar="{relative,cosine,squared}", help_behavior_hint="(default: relative)"),
    ] = None,
    admission: Annotated[
        Literal["sequential", "batch", "paper"] | None,
        arg(metavar="{sequential,batch,paper}", help_behavior_hint="(default: sequential)"),
    ] = None,
    no_center: flags.Flag = False,
    max_atoms: flags.MaybeWhole = None,
    context_length: flags.ContextLength = 128,
    batch_rows: flags.BatchRows = None,
    truncate: flags.Truncate = False,
    pack: flags.Pack = False,
    seed: flags.Seed = None,
    column: flags.Column = "text",
    split: flags.Split = "train",
    config: flags.Config = None,
    data_revision: flags.DataRevision = None,
    special_tokens: flags.SpecialTokens = False,
    padding: flags.Padding = False,
    tokenizer: flags.Tokenizer = None,
    dtype: flags.Text = "auto",
    device: flags.Device = None,
    revision: flags.Revision = None,
    trust_remote_code: flags.TrustRemoteCode = False,
    backend: Annotated[Literal["hooks", "nnsight"], arg(metavar="{hooks,nnsight}")] = "hooks",
    remote: flags.Flag = False,
    device_map: flags.DeviceMap = None,
    tensor_parallel: flags.TensorParallel = None,
    chunk_size: flags.Whole = 4096,
    candidates: flags.Whole = 1,
    refine: flags.Whole = 0,
    refine_tokens: flags.Whole = 200_000,
    checkpoint_seconds: flags.Real = 30.0,
    stream_layers: flags.StreamLayers = False,
    no_stream_layers: flags.NoStreamLayers = False,
    state_gb: flags.StateGb = None,
    overwrite: flags.Flag = False,
    workers: flags.MaybeWhole = None,
    ray: flags.Ray = None,
    json: flags.Json = False,
) -> None:
    """Train a dictionary of real activations, in one pass over the data.

    An interrupted training goes on with the same command, to the same result.

    itda train gpt2 book.txt --layer 8 --out gpt2-8

    itda train gpt2 Salesforce/wikitext --config wikitext-103-raw-v1 --layer 2 6 10 --n-atoms 4096 --out gpt2

    Args:
        data: id of a dataset on the hub (streamed), or a .txt, .jsonl or .parquet file, or a folder of these, or one of
            activations, as collect writes it
        out: the folder to make; with several layers or hook points, of their folders
        layer: read the residual stream after this block (-1 is the last); several train as many dictionaries
        k: pursuit steps, the L0 budget
        threshold: admit a token whose loss exceeds this; 0.2 by default, 4e-4 with the cosine loss
        n_atoms: aim at so many atoms instead of at a threshold
        preset: the published code's practice: cosine loss, its admission, truncated, padded rows, 128 at a time
        loss: |x - x_hat|^2 / |x|^2 of x less the mean, or the published code's, or |x - x_hat|^2
        admission: one token after another, or a batch at a time, or as the published code does
        no_center: do not subtract the mean of the first tokens
        max_atoms: stop at so many atoms
        dtype: of the model: auto, float32, bfloat16 or float16
        backend: what reads the model; the activations are the same
        remote: with nnsight, read it on NDIF, which needs a key (NDIF_API_KEY)
        chunk_size: tokens pursued together; changes memory and speed alone
        candidates: build a dictionary of so many times --n-atoms, and keep the atoms of most use
        refine: move the atoms in so many passes, so that they reconstruct better; they are real activations no more
        refine_tokens: do both on so many tokens, which are read again
        checkpoint_seconds: how often progress is kept
        overwrite: replace a dictionary that is there
        workers: read with so many processes, to the same result
    """
    given = {name: value for name, value in locals().items() if name not in ("json", "no_stream_layers", "no_center")}
    given["center"] = False if no_center else None
    given["stream_layers"] = _choice(stream_layers, no_stream_layers)
    given["ray"] = _address(ray)
    for name in ("layer", "hook"):
        if len(given[name]) < 2:  # with one, `out` is the dictionary's own folder
            given[name] = next(iter(given[name]), None)
    from itda.caches import is_stored

    results = _train(**given)
    documents = [result.to_json() for result in results]
    terminal.output(documents if len(results) > 1 else documents[0], None if json else "\n".join(map(str, results)))
    if any(result.n_atoms < 2 * result.k for result in results):
        terminal.say(f"few atoms for k = {k}: a lower --threshold or --n-atoms gives more, --seed 0 more varied ones")
    elif n_atoms is not None and seed is None and not is_stored(data):
        terminal.say(
            "rows came in the text's own order, and a dictionary grows fastest at first: --seed 0 shuffles them"
        )
    full = all(result.n_atoms == max_atoms for result in results)  # so that reading stopped before the end
    if is_stored(data) and results[0].tokens < tokens and not full:
        terminal.say(f"{data} holds no more tokens: itda collect with more --tokens adds to it")
    terminal.say(f"look at it with: itda show {shlex.quote(results[0].path)}")


def collect(
    model: flags.Model,
    data: flags.Data,
    *,
    out: flags.Out,
    layer: flags.Layers = (),
    hook: flags.Hook = (),
    tokens: flags.Tokens = 1_000_000,
    context_length: flags.ContextLength = 128,
    batch_rows: flags.BatchRows = 32,
    truncate: flags.Truncate = False,
    pack: flags.Pack = False,
    seed: flags.Seed = None,
    column: flags.Column = "text",
    split: flags.Split = "train",
    config: flags.Config = None,
    data_revision: flags.DataRevision = None,
    special_tokens: flags.SpecialTokens = False,
    padding: flags.Padding = False,
    tokenizer: flags.Tokenizer = None,
    dtype: flags.Text = "auto",
    device: flags.Device = None,
    revision: flags.Revision = None,
    trust_remote_code: flags.TrustRemoteCode = False,
    device_map: flags.DeviceMap = None,
    tensor_parallel: flags.TensorParallel = None,
    stream_layers: flags.StreamLayers = False,
    no_stream_layers: flags.NoStreamLayers = False,
    state_gb: flags.StateGb = None,
    overwrite: flags.Flag = False,
    json: flags.Json = False,
) -> None:
    """Write activations with their labels to disk, where train, eval and compare read them without the model.

    An interrupted collecting goes on with the same command; more --tokens add to what is there.

    itda collect gpt2 book.txt --layer 4 8 --out gpt2-acts

    itda train gpt2 gpt2-acts --layer 8 --out gpt2-8

    Args:
        data: id of a dataset on the hub (streamed), or a .txt, .jsonl or .parquet file, or a folder of these
        out: the folder to make
        layer: read the residual stream after this block (-1 is the last), or after several
        dtype: of the model, and so of what is written: auto, float32, bfloat16 or float16
        overwrite: replace activations that are there
    """
    given = {k: v for k, v in locals().items() if k not in ("json", "layer", "hook", "no_stream_layers", "device_map")}
    given["stream_layers"] = _choice(stream_layers, no_stream_layers)
    given |= {"device_map": device_map} if device_map else {}
    from itda.collect import collect as run

    with terminal.signals.waited_for() as stop:
        result = run(**given, layer=layer or None, hook=hook or None, progress=True, stop=stop)
    terminal.output(result.to_json(), None if json else str(result))
    words = ["itda", "train", str(model), str(out), "--out", "DIR"]
    terminal.say(f"build a dictionary from it with: {shlex.join(words)}")


def sweep(
    file: Annotated[Positional[str | None], arg(metavar="[FILE]", help_behavior_hint="")] = None,
    *,
    out: flags.Out,
    model: flags.Words = (),
    data: flags.Words = (),
    layer: flags.Layers = (),
    hook: flags.Hooks = (),
    k: flags.Wholes = (),
    threshold: flags.Reals = (),
    n_atoms: flags.Wholes = (),
    seed: flags.Wholes = (),
    revision: flags.Words = (),
    tokens: flags.Wholes = (),
    context_length: flags.Wholes = (),
    workers: flags.MaybeWhole = None,
    ray: flags.Ray = None,
    json: flags.Json = False,
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
    """
    given = {name: list(v) for name, v in locals().items() if isinstance(v, tuple) and v and name != "ray"}
    from itda.grid import read_grid
    from itda.sweep import sweep as run

    settings = {**(read_grid(file, whole=False) if file is not None else {}), **given}
    with terminal.signals.waited_for() as stop:
        result = run(settings, out, workers=workers, ray=_address(ray), progress=True, stop=stop)
    terminal.output(result.to_json(), None if json else result)
    if result.problems:
        raise InputError(
            f"{len(result.problems)} of {len(result.rows)} dictionaries are missing "
            f"({result.problems[0].rstrip('.')}): the same command tries them again."
        )


def export(
    dictionary: flags.Dictionary,
    *,
    to: Annotated[Literal["saelens"], arg(metavar="{saelens}")],
    out: flags.Out,
    architecture: Annotated[
        Literal["matching_pursuit", "itda"], arg(metavar="{matching_pursuit,itda}")
    ] = "matching_pursuit",
    json: flags.Json = False,
) -> None:
    """Write a dictionary in the format of another library.

    itda export gpt2-8 --to saelens --out gpt2-8-sae

    Args:
        to: for SAELens, `SAE.load_from_disk` reads the result
        out: the folder; an export that is there already is replaced
        architecture: SAELens' own, with two latents for each atom of signed codes; or one that needs this library
    """
    from itda import report
    from itda.interop import saelens

    found = report.load(dictionary)
    path = saelens.export(found, out, architecture=architecture)
    latents = len(found) * (1 if architecture == "itda" or found.cfg.get("nonneg") else 2)
    result = {"path": str(path), "architecture": architecture, "n_atoms": len(found), "latents": latents}
    terminal.output(result, None if json else f"{path}: {latents:,} latents of {len(found):,} atoms, for {to}")
    first = "after `itda.interop.saelens.register()` " if architecture == "itda" else ""
    terminal.say(f"load it {first}with: sae_lens.SAE.load_from_disk({str(path)!r})")


def demo(
    *, out: Annotated[str | None, arg(metavar="DIR", help_behavior_hint="")] = None, json: flags.Json = False
) -> None:
    """Train a dictionary of the small model in the package, with no network, and look at it.

    itda demo

    itda demo --out demo-itda

    Args:
        out: keep the dictionary in this folder
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

    with terminal.signals.waited_for() as stop:
        return runs.train(**given, progress=True, stop=stop)


def _choice(stream_layers: bool, no_stream_layers: bool) -> bool | None:
    """What the two flags say together; None where neither is given."""
    if stream_layers and no_stream_layers:
        raise InputError("Both `--stream-layers` and `--no-stream-layers` were given: choose one of them.")
    return True if stream_layers else False if no_stream_layers else None


def _address(ray: tuple[str, ...] | None) -> bool | str:
    """What `--ray` says: nothing, this machine, or an address."""
    if ray is None or not ray:
        return ray is not None
    if len(ray) > 1:
        raise InputError(f"--ray: {' '.join(ray)!r} came, and one address or none was wanted: put FILE before it.")
    return ray[0]
