"""From what was seen to the files of the folder `uses` (docs/format.md)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from itda._version import __version__
from itda.beside import USES_FORMAT, USES_MANIFEST, USES_STATE, USES_TABLES, content_hash
from itda.dictionary.itda import ITDA
from itda.disk import as_input_error, sealed_json, write_file
from itda.models import lens
from itda.results import finite
from itda.text.tokenizers import special_ids
from itda.usage import columns
from itda.usage.bounded import Found, drawn
from itda.usage.kept import LARGEST, VERSION, Uses
from itda.usage.neighbours import nearest, together
from itda.usage.seen import Seen
from itda.usage.texts import ADVICE, Spool

FIFTHS, EACH = 5, 4  # intervals of equally many uses, and examples kept of each
TOP = 10  # tokens that an atom raises, and that it lowers

Told = Callable[[str, int], Callable[[int], None]]


def write(target: Path, itda: ITDA, seen: Seen, spool: Spool, model: Any, about: Mapping[str, Any], told: Told) -> Uses:
    """Write all files, the manifest last, and remove the state of the pass; what was there is replaced.

    The same state gives the same bytes. `model` is None where nothing is to be known of what atoms promote.
    """
    n = len(itda)
    examples, prompts = _examples(seen)
    made = {
        "signs.parquet": _signs(seen, told("counting what is used together", 2 * n)),
        "examples.parquet": columns.table(columns.EXAMPLES, examples),
    }
    atoms, tokens = _atoms(itda, model, told)
    made |= {"atoms.parquet": atoms, "tokens.parquet": tokens}
    told("writing uses", n)(0)
    files = {name: columns.written(made[name]) for name in USES_TABLES if name != "texts.parquet"}
    files["texts.parquet"] = columns.written(spool.of(prompts))
    entries = {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in sorted(files.items())
    }
    own = {"sha256": content_hash(itda), "n_atoms": n, "d": itda.d}
    head: dict[str, Any] = {"format": USES_FORMAT, "version": VERSION, "sha256": "", "dictionary": own}
    head |= {"tokens": seen.tokens, "l0": seen.used / max(1, seen.tokens), "massive": {"left_out": seen.massive}}
    head |= {"lowest": seen.low, "positions": seen.token_places.tolist(), "sampled": len(seen.sample.all())}
    document = finite(head | dict(about) | {"itda_version": __version__, "files": entries})
    with as_input_error(f"{target} could not be written", ADVICE):
        (target / USES_MANIFEST).unlink(missing_ok=True)
        for name, data in files.items():
            write_file(target / name, [data], ADVICE)
        manifest = sealed_json(document)
        write_file(target / USES_MANIFEST, [manifest], ADVICE)
        spool.remove()
        (target / USES_STATE).unlink(missing_ok=True)
    return Uses.of_tables(
        target, json.loads(manifest), {**made, "texts.parquet": columns.read(target / "texts.parquet", columns.TEXTS)}
    )


def _examples(seen: Seen) -> tuple[dict[str, ndarray], Int[ndarray, " prompts"]]:
    """The columns of the examples, and the prompts that they are of, which ascend: one is a row of the texts."""
    large, some = seen.largest.all(), seen.drawn.all()
    interval, kept = _fifths(some)
    some, interval = some.at(kept), interval[kept]
    found = Found(*(np.concatenate(parts) for parts in zip(large, some, strict=True)))
    interval = np.concatenate([np.full(len(large.key), LARGEST), interval])
    order = np.lexsort((found.position, found.prompt, -found.size, -interval, found.key))
    found, interval = found.at(order), interval[order]
    prompts, text = np.unique(found.prompt, return_inverse=True)
    sign = np.where(found.key % 2, -1, 1)
    return {
        "atom": (found.key // 2).astype(np.int32),
        "sign": sign.astype(np.int8),
        "interval": interval.astype(np.int8),
        "text": text.reshape(-1).astype(np.int32),
        "position": found.position.astype(np.int32),
        "value": (sign * found.size).astype(np.float32),
    }, prompts


def _fifths(some: Found) -> tuple[Int[ndarray, " uses"], Int[ndarray, " kept"]]:
    """The fifth, by size, that each of the uses drawn for its key is in; and which are kept, of each the first drawn.

    Of a key's uses in the order of their size, ties by prompt and position, the rth of n is in the fifth 5 r / n.
    """
    order = np.lexsort((some.position, some.prompt, some.size, some.key))
    rank, count = _ranks(some.key[order])
    interval = np.empty(len(order), np.int64)
    interval[order] = rank * FIFTHS // np.maximum(count, 1)
    again = np.lexsort((drawn(some), interval, some.key))
    within, _ = _ranks(some.key[again] * FIFTHS + interval[again])
    return interval, np.sort(again[within < EACH])


def _ranks(group: Int[ndarray, " uses"]) -> tuple[ndarray, ndarray]:
    """The rank of each within its group, which stand together, and how many its group has."""
    _, begins, counts = np.unique(group, return_index=True, return_counts=True)
    return np.arange(len(group)) - np.repeat(begins, counts), np.repeat(counts, counts)


def _signs(seen: Seen, told: Callable[[int], None]) -> Any:
    other, shared, lift = together(seen.sample.all(), 2 * seen.n, told)
    filled = (other >= 0).sum(1)
    return columns.table(
        columns.SIGNS,
        {
            "count": seen.count,
            "histogram": columns.lists(seen.histogram),
            "positions": columns.lists(seen.places),
            "together": columns.lists(other.astype(np.int32), filled),
            "together_tokens": columns.lists(shared.astype(np.int32), filled),
            "lift": columns.lists(lift.astype(np.float32), filled),
        },
    )


def _atoms(itda: ITDA, model: Any, told: Told) -> tuple[Any, Any]:
    """The table of atoms, and that of the tokens which they promote."""
    n = len(itda)
    near, cosine = nearest(itda.atoms, told("comparing atoms", n))
    values = {"nearest": columns.lists(near.astype(np.int32)), "cosine": columns.lists(cosine)}
    ids: set[int] = set()
    for name, (token, logit) in zip(("up", "down"), promoted_by(itda, model, told), strict=True):
        values |= {name: columns.lists(token.astype(np.int32)), f"{name}_logit": columns.lists(logit)}
        ids.update(np.unique(token).tolist())
    spelt = sorted(ids)
    texts = [] if model is None else [text_of(model.tokenizer, token) for token in spelt]
    tokens = {"token_id": np.array(spelt, np.int32), "text": texts}
    return columns.table(columns.ATOMS, values), columns.table(columns.TOKENS, tokens)


def promoted_by(itda: ITDA, model: Any, told: Told, top: int = TOP) -> list[tuple[ndarray, ndarray]]:
    """Tokens and logits (n, top) that each atom raises, and that it lowers; (n, 0) without a model.

    An atom goes through the lens as the direction that it is in activations: times its norm, and the scale if any.
    """
    if model is None:
        return [(np.zeros((len(itda), 0), np.int64), np.zeros((len(itda), 0), np.float32))] * 2
    x = itda.norms[:, None] * itda.atoms
    x = x if itda.scale is None else x * itda.scale
    without = special_ids(model.tokenizer)
    ends = lens.promoted(model, x, top, without, told("asking what atoms promote", len(itda)))
    return [(token.numpy(), logit.numpy()) for token, logit in ends]


def text_of(tokenizer: Any, token: int) -> str:
    """The text of a token by itself."""
    try:
        return columns.encodable(tokenizer.decode([token]))
    except Exception:  # code from elsewhere; a vocabulary may have more places than tokens
        return f"<token {token}>"
