"""Activations on disk in place of a model that reads: what `itda.evaluate` measures on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy import ndarray

from itda.devices import free_bytes
from itda.dictionary.itda import ITDA
from itda.errors import InputError
from itda.evaluation.heldout import OWN, Held, own_rows
from itda.labels import Labels
from itda.models.hub import load_tokenizer
from itda.progress import stage
from itda.provenance import section
from itda.reading.on_disk import all_labels
from itda.text.prompts import valid
from itda.text.reread import cut_alike


def held(
    dictionary: ITDA, stream: Any, tokens: int, pool: int, in_sample: bool, seed: int, report: Callable
) -> tuple[Held, dict[str, Any]]:
    """Activations of documents that the dictionary has not read, others for its controls, and what they are.

    As `itda.evaluation.heldout.split` does it with text; a cache without documents is divided by rows.
    """
    labels, hashes = all_labels(stream)
    if not len(labels):
        raise InputError(f"{stream.path} holds no token to measure on: collect activations of more text.")
    document = labels.document if (labels.document >= 0).all() else labels.prompt
    read, known = _read_in_training(dictionary, stream, labels, hashes)
    if read.all() and not in_sample:
        raise InputError(
            "All documents of these activations were read when the dictionary was built: collect those of other text, "
            "or measure on them all the same with `in_sample` (`--in-sample`)."
        )
    new = ~np.isin(document, np.unique(document[read]))
    about: dict[str, Any] = {"data": str(stream.path), "read_in_training": bool(read.any()), "by": "document"}
    if in_sample and read.any():
        candidates, drawn = np.ones(len(document), bool), read
        about |= {"by": "nothing: the dictionary was built on this text", "random_tokens_from": "the same text"}
    elif read.any():
        candidates, drawn = new if new.any() else ~read, read
        if not new.any():
            about["by"] = "rows after those read, of documents that it has read in part"
        about["random_tokens_from"] = OWN
    else:
        every = np.unique(document)
        half = every[::2] if len(every) > 1 else every
        candidates = np.isin(document, half) if len(every) > 1 else np.arange(len(document)) < (len(document) + 1) // 2
        drawn = ~candidates
        about["random_tokens_from"] = "other documents of this text" if len(every) > 1 else "its other half"
        if not pool:
            candidates = np.ones(len(document), bool)
        if not known:
            about["by"] += "; what the dictionary was built on was not there to compare with"
    chosen = np.flatnonzero(candidates)[:tokens]
    some = np.random.default_rng([seed, 5]).permutation(np.flatnonzero(drawn))[:pool]
    if pool and not len(some):
        raise InputError(
            "Too few tokens are left to draw controls from: collect more, or pass `controls=False` (`--no-controls`)."
        )
    about["documents"] = len(np.unique(document[chosen]))
    x, own = _activations_at(stream, np.concatenate([chosen, some]), report), labels[chosen]
    return Held(x[: len(chosen)], own, np.ones(len(chosen), bool), x[len(chosen) :]), about


def _read_in_training(
    dictionary: ITDA, stream: Any, labels: Labels, hashes: list[tuple[int, str]]
) -> tuple[Bool[ndarray, " tokens"], bool]:
    """Which tokens are of rows that the dictionary was built on; and whether its own text was there to compare with."""
    cfg, cut = section(dictionary.cfg, "stream"), stream.provenance["stream"]
    until = next((count for count, read in hashes if read == cfg.get("hash")), None)
    if until is None and hashes and stream.hash == cfg.get("hash"):
        until = len(labels)
    starts = np.flatnonzero(np.r_[True, np.diff(labels.prompt) != 0])
    rows = list(zip(starts, np.r_[starts[1:], len(labels)], strict=True))
    if until is not None:
        read = np.arange(len(labels)) < until
        if len(labels) and labels.token_id[0] < 0:  # of a cache without ids, which do not tell rows apart
            return read, True
        known = {labels.token_id[start:stop].tobytes() for start, stop in rows if stop <= until}
        for start, stop in rows:
            read[start:stop] |= labels.token_id[start:stop].tobytes() in known  # the same text once more
        return read, True
    none = np.zeros(len(labels), bool)
    special = bool(stream.provenance.get("special_tokens"))
    own = []
    if cfg.get("tokenizer_hash") == cut.get("tokenizer_hash") and cfg.get("tokenizer_hash"):
        try:
            tokenizer = load_tokenizer(section(dictionary.cfg, "model")["id"])
            own = own_rows(dictionary, cfg, tokenizer)
        except (InputError, KeyError):
            return none, False
    if not own:
        return none, False
    if not cut_alike(cfg, cut) or stream.provenance.get("padding"):
        raise InputError(
            f"{stream.path} has its text cut into other rows than the dictionary's, so what was read cannot be told: "
            "collect with the same settings, or measure all the same with `in_sample` (`--in-sample`)."
        )
    cut_short = not stream.contents.ended
    known = {row.ids[valid(row, special)].tobytes() for row in own}
    for start, stop in rows:
        row = labels.token_id[start:stop].tobytes()
        # The last row may have been cut short, by how many tokens were asked for.
        none[start:stop] = row in known or (
            stop == len(labels) and cut_short and any(key.startswith(row) for key in known)
        )
    return none, True


def _activations_at(stream: Any, wanted: Int[ndarray, " n"], report: Callable) -> torch.Tensor:
    """The activations of the tokens `wanted`, in that order, float32 on the CPU."""
    d = stream.provenance["model"]["d"]
    if (need := 4.0 * d * len(wanted)) > 0.8 * free_bytes(torch.device("cpu")):
        raise InputError(
            f"The activations take {need / 1e9:.1f} GB, more than is free: measure on fewer `tokens` (`--tokens`)."
        )
    x, done, last = torch.empty(len(wanted), d), 0, int(wanted.max()) + 1
    told = stage(report, "reading held-out activations", last)
    order = np.argsort(wanted, kind="stable")
    for batch in stream:
        stop = done + len(batch.labels)
        here = order[slice(*np.searchsorted(wanted[order], [done, stop]))]
        rows = torch.from_numpy(wanted[here] - done).to(batch.activations.device)
        x[torch.from_numpy(here)] = batch.activations[rows].float().cpu()
        done = stop
        told(min(done, last))
        if done >= last:
            break
    return x
