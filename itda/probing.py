"""Sparse probing: can a linear classifier tell labels of texts from one latent of a dictionary, a few, or all of them?

A text is the mean of its codes over its valid tokens, signed codes split into a positive and a negative latent. The K
latents whose means differ most between the classes go into a logistic regression (Gurnee et al. 2023; SAEBench).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from itda.errors import InputError
from itda.hooks import Activations
from itda.prompts import TokenStream
from itda.reading import HookedModel
from itda.systems import System

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix


TOPS = (1, 2, 5)
LEAST = 4  # texts of each class on either side of the split


def labelled(data: Any, column: str = "text", label: str = "label") -> list[dict[str, str]]:
    """`records` as {text, label}, after a look whether a probe could be fitted at all."""
    _check_sklearn()
    return [{"text": text, "label": name} for text, name in zip(*records(data, column, label), strict=True)]


def _check_sklearn() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise InputError("Probing needs scikit-learn: install it with `pip install 'itda[probe]'`.") from error


def records(data: Any, column: str = "text", label: str = "label") -> tuple[list[str], list[str]]:
    """Texts and their labels, from a .jsonl or .parquet file or a sequence of mappings.

    Raises `InputError` for other files, and for a record without a text or a label.
    """
    if isinstance(data, str | os.PathLike):
        data = _read(Path(data), column, label)
    if not isinstance(data, Iterable):
        raise InputError(f"Labelled texts came as {type(data).__name__}; a file, or a list of records, was wanted.")
    texts, labels = [], []
    for number, record in enumerate(data):
        text, name = (record.get(key) if isinstance(record, Mapping) else None for key in (column, label))
        if not isinstance(text, str) or name is None:
            raise InputError(
                f"Record {number} (from 0) has no text {column!r} or no label {label!r}: name its columns "
                "(`--probe-column`, `--probe-label`)."
            )
        texts.append(text)
        labels.append(str(name))
    return texts, labels


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
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as labelled texts ({error}): give another file.") from error
    raise InputError(f"{path} is neither .jsonl nor .parquet: give one of these, with a text and a label per record.")


def probe(
    model: HookedModel,
    hook: str,
    systems: Sequence[System],
    data: Any,
    *,
    column: str = "text",
    label: str = "label",
    tops: Sequence[int] = TOPS,
    context_length: int = 128,
    special_tokens: bool = False,
    test: float = 0.25,
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracies of probes on the codes of `systems` and, beside them, on the activations themselves.

    `data` holds texts with labels (`records`), of which each is read as far as one row reaches. Of every class against
    the rest, as many texts of either are kept, so that chance is 0.5; `test` of them, drawn with `seed`, is held out.
    Returns texts, labels, and by system the accuracies by "top 1", "top 2", "top 5" and "all" latents, means over the
    classes. Raises `InputError` for fewer than two classes or too few texts, and without scikit-learn.
    """
    _check_sklearn()
    if not 0 < test < 1:
        raise InputError(f"`test` is {test!r}; a share of the texts between 0 and 1 was wanted.")
    texts, names = records(data, column, label)
    if not texts:
        raise InputError("There is no labelled text: give some.")
    dense, codes, there = _means(model, hook, systems, texts, context_length, special_tokens)
    classes, y = np.unique(np.array(names)[there], return_inverse=True)
    tasks = _tasks(y, len(classes), test, seed)
    found = {}
    for name, features in {**codes, "activations": dense}.items():
        scores = [_accuracies(features[rows], y[rows] == c, train, tops) for c, rows, train in tasks]
        found[name] = {key: float(np.mean([score[key] for score in scores])) for key in scores[0]}
    about = {"texts": len(y), "labels": classes.tolist(), "train": int(tasks[0][2].sum())}
    return about | {"test": int((~tasks[0][2]).sum()), "systems": found}


def _means(
    model: HookedModel, hook: str, systems: Sequence[System], texts: list[str], length: int, special_tokens: bool
) -> tuple[Float[ndarray, "texts d"], dict[str, csr_matrix], Int[ndarray, " texts"]]:
    """Mean activations and mean codes of the texts that have valid tokens, and which texts these are."""
    from scipy.sparse import csr_matrix

    stream = TokenStream(texts, model.tokenizer, context_length=length, truncate=True)
    total, count = np.zeros((len(texts), model.d[hook])), np.zeros(len(texts))
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
    there = np.flatnonzero(count)
    if not len(there):
        raise InputError("No labelled text has a valid token, one neither special nor first: give longer ones.")
    found = {}
    for system in systems:
        values, which, latent = (np.concatenate(columns) for columns in zip(*parts[system.name], strict=True))
        shape = (len(texts), 2 * len(system.atoms))
        found[system.name] = csr_matrix((values / count[which], (which, latent)), shape=shape)[there]
    return total[there] / count[there, None], found, there


def _tasks(y: Int[ndarray, " texts"], classes: int, test: float, seed: int) -> list[tuple[int, ndarray, ndarray]]:
    """For each class its number, the rows of as many texts of it as of others, and which of these train the probe."""
    generator, tasks = np.random.default_rng([seed, 6]), []
    for c in range(classes if classes > 2 else classes - 1):
        inside = generator.permutation(np.flatnonzero(y == c))
        outside = generator.permutation(np.flatnonzero(y != c))
        n = min(len(inside), len(outside))
        held = round(test * n)
        if held < LEAST or n - held < LEAST:
            raise InputError(
                f"A class has {n} texts to compare, and at least {LEAST} of each were wanted on either side of the "
                "split: give more labelled texts."
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
