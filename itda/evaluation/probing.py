"""Sparse probing: can a linear classifier tell labels of texts from one latent of a dictionary, a few, or all of them?

A text is the mean of its codes over its valid tokens, signed codes split into a positive and a negative latent. The K
latents whose means differ most between the classes go into a logistic regression (Gurnee et al. 2023; SAEBench).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from itda.errors import InputError, counted, one_line, shortened
from itda.evaluation.systems import System
from itda.models.hooked_model import HookedModel
from itda.progress import part_of, reporter, stage
from itda.reading.activations import Activations
from itda.text.prompts import Row, TokenStream

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix


TOPS = (1, 2, 5)
LEAST = 4  # texts of each class on either side of the split


class Labelled(NamedTuple):
    """Texts with a label each; made by `labelled`."""

    texts: list[str]
    labels: list[str]


def labelled(data: Any, column: str = "text", label: str = "label") -> Labelled:
    """Texts and their labels, from a .jsonl or .parquet file or a sequence of mappings.

    Raises `InputError` for other files, for a record without a text or a label, for labels of different kinds (1 and
    "1" may be one class or two), and without scikit-learn.
    """
    _check_sklearn()
    if isinstance(data, str | os.PathLike):
        data = _read(Path(data), column, label)
    if not isinstance(data, Iterable):
        raise InputError(
            f"Labelled texts (`probe`) are of type {type(data).__name__}: pass a file, or a list of records."
        )
    texts: list[str] = []
    labels: list[Any] = []
    for number, record in enumerate(data):
        text, name = (record.get(key) if isinstance(record, Mapping) else None for key in (column, label))
        if not isinstance(text, str) or name is None or (isinstance(name, float) and math.isnan(name)):
            raise InputError(
                f"Record {number} (from 0) has no text {column!r} or no label {label!r}: name its columns "
                "(`--probe-column`, `--probe-label`)."
            )
        if labels and type(name) is not type(labels[0]):
            raise InputError(
                f"Record {number} (from 0) has the label {shortened(name)}, of another type than the first, "
                f"{shortened(labels[0])}: give all labels in one type, such as text."
            )
        texts.append(text)
        labels.append(name)
    return Labelled(texts, list(map(str, labels)))


def _check_sklearn() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise InputError("Probing needs scikit-learn: install it with `pip install 'itda[probe]'`.") from error


def _read(path: Path, column: str, label: str) -> Iterable[Mapping[str, Any]]:
    if not path.is_file():
        raise InputError(f"There is no file {path}: give a .jsonl or .parquet file of labelled texts.")
    try:
        kind = path.suffix.lower()
        if kind == ".parquet":
            from pyarrow import parquet

            return parquet.read_table(path, columns=[column, label]).to_pylist()
        if kind == ".jsonl":
            return [json.loads(line) for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except Exception as error:  # whatever a file format can raise
        reason = one_line(str(error))
        raise InputError(f"{path} cannot be read as labelled texts ({reason}): give another file.") from error
    raise InputError(f"{path} is neither .jsonl nor .parquet: give one of these, with a text and a label per record.")


def probe(
    model: HookedModel,
    hook: str,
    systems: Sequence[System],
    data: Any,
    *,
    tops: Sequence[int] = TOPS,
    context_length: int = 128,
    special_tokens: bool = False,
    bos: Any = "auto",
    test: float = 0.25,
    seed: int = 0,
    progress: Any = False,
) -> dict[str, Any]:
    """Accuracies of probes on the codes of `systems` and, beside them, on the activations themselves.

    `data` holds texts with labels (`labelled`), of which each is read as far as one row reaches; a row that was there
    already is left out, whatever its label, since none may be on both sides of the split. Of every class against the
    rest, as many texts of either are kept, so that chance is 0.5; `test` of them, drawn with `seed`, is held out.
    Returns texts, repeated (how many were left out), labels, and by system the accuracies by "top 1", "top 2", "top 5"
    and "all" latents, means over the classes. Raises `InputError` for fewer than two classes or too few texts, and as
    `labelled` does.
    """
    if not 0 < test < 1:
        raise InputError(f"`test` is {shortened(test)}: pass a share of the texts between 0 and 1.")
    texts, names = data if isinstance(data, Labelled) else labelled(data)
    if not texts:
        raise InputError("There is no labelled text: give records with a text and a label.")
    stream, repeated = _rows(model, texts, context_length, bos)
    report = part_of(reporter(progress), "probing")
    told = stage(report, "reading texts", len(texts))
    dense, codes, there = _means(model, hook, systems, stream, len(texts), special_tokens, told)
    classes, y = np.unique(np.array(names)[there], return_inverse=True)
    tasks = _tasks(y, classes.tolist(), test, seed)
    found, told = {}, stage(report, "fitting", len(codes) + 1)
    for done, (name, features) in enumerate({**codes, "activations": dense}.items()):
        scores = [_accuracies(features[rows], y[rows] == c, train, tops) for c, rows, train in tasks]
        found[name] = {key: float(np.mean([score[key] for score in scores])) for key in scores[0]}
        told(done + 1)
    about = {"texts": len(y), "repeated": repeated, "labels": classes.tolist(), "train": int(tasks[0][2].sum())}
    return about | {"test": int((~tasks[0][2]).sum()), "systems": found}


def _rows(model: HookedModel, texts: list[str], length: int, bos: Any = "auto") -> tuple[TokenStream, int]:
    """The first row of each text, those left out that were there already; and how many these are."""
    stream = TokenStream(texts, model.tokenizer, context_length=length, truncate=True, bos=bos)
    rows = list(stream)
    first: dict[bytes, Row] = {}
    for row in rows:
        first.setdefault(row.ids.tobytes(), row)
    return stream.of(list(first.values())), len(rows) - len(first)


def _means(
    model: HookedModel,
    hook: str,
    systems: Sequence[System],
    stream: TokenStream,
    texts: int,
    special_tokens: bool,
    told,
) -> tuple[Float[ndarray, "texts d"], dict[str, csr_matrix], Int[ndarray, " texts"]]:
    """Mean activations and mean codes of those of so many texts that have valid tokens, and which these are."""
    from scipy.sparse import csr_matrix

    total, count = np.zeros((texts, model.d[hook])), np.zeros(texts)
    parts: dict[str, list[tuple[ndarray, ndarray, ndarray]]] = {system.name: [] for system in systems}
    batches: Any = Activations(model, stream, special_tokens=special_tokens, single=True)
    for batch in batches:
        text, x = batch.labels.document, batch.activations.float().cpu()
        np.add.at(total, text, x.double().numpy())
        np.add.at(count, text, 1)
        for system in systems:
            codes = system.run(x)[1].to("cpu")
            values, latents = codes.values.numpy(), codes.indices.numpy()
            used = values != 0
            which = np.broadcast_to(text[:, None], values.shape)[used]
            latent = latents[used] + np.where(values[used] < 0, codes.n_atoms, 0)  # its negative is a latent too
            parts[system.name].append((np.abs(values[used]), which, latent))
        told(int(text[-1]) + 1)
    there = np.flatnonzero(count)
    if not len(there):
        raise InputError("No labelled text has a valid token, one neither special nor first: give longer ones.")
    found = {}
    for system in systems:
        values, which, latent = (np.concatenate(columns) for columns in zip(*parts[system.name], strict=True))
        shape = (texts, 2 * len(system.atoms))
        found[system.name] = csr_matrix((values / count[which], (which, latent)), shape=shape)[there]
    return total[there] / count[there, None], found, there


def _tasks(y: Int[ndarray, " texts"], classes: list, test: float, seed: int) -> list[tuple[int, ndarray, ndarray]]:
    """For each class its number, the rows of as many texts of it as of others, and which of these train the probe."""
    generator, tasks = np.random.default_rng([seed, 6]), []
    for c in range(len(classes) if len(classes) > 2 else len(classes) - 1):
        inside = generator.permutation(np.flatnonzero(y == c))
        outside = generator.permutation(np.flatnonzero(y != c))
        n = min(len(inside), len(outside))
        held = round(test * n)
        if held < LEAST or n - held < LEAST:
            raise InputError(
                f"The label {shortened(classes[c])} has {counted(len(inside), 'different text')}, and all others have "
                f"{len(outside)}: give more, so that {LEAST} of each are on either side of the split."
            )
        rows = np.concatenate([inside[:n], outside[:n]])
        train = np.concatenate([np.arange(n) >= held] * 2)
        tasks.append((c, rows, train))
    if not tasks:
        raise InputError("All texts have one label: give texts of two classes or more.")
    return tasks


def _accuracies(features: Any, y: ndarray, train: ndarray, tops: Sequence[int]) -> dict[str, float]:
    """Held-out accuracies of logistic regressions on the latents that differ most, and on all of them."""
    from sklearn.linear_model import LogisticRegression

    means = (np.asarray(features[train & (y == kind)].mean(axis=0)).ravel() for kind in (True, False))
    order = np.argsort(-np.abs(np.subtract(*means)), kind="stable")
    out = {}
    for name, chosen in {**{f"top {n}": order[:n] for n in tops}, "all": np.arange(features.shape[1])}.items():
        some = features[:, chosen]
        fitted = LogisticRegression(C=1.0, max_iter=1000).fit(some[train], y[train])
        out[name] = float((fitted.predict(some[~train]) == y[~train]).mean())
    return out
