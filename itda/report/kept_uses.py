"""What the uses that are kept beside a dictionary say of one of its atoms, and of a text that is looked for."""

from __future__ import annotations

import os
from typing import Any

from itda.dictionary.itda import ITDA
from itda.usage.kept import LARGEST, Uses

SIGNS = ("positive", "negative")


def of_folder(path: Any, dictionary: ITDA) -> Uses | None:
    """The uses beside the dictionary that was read from `path`; None where there are none.

    Raises `InputError` for damaged ones and those of another dictionary.
    """
    return Uses.load(path, dictionary) if isinstance(path, str | os.PathLike) and Uses.exist(path) else None


def seen(uses: Uses, dictionary: ITDA, atom: int, top: int) -> dict[str, Any]:
    """Everything about one atom, as JSON can hold it: by sign, and what points the same way.

    `positive` and `negative` have count and density; `histogram` with edges and counts; `positions`, of each bin of
    positions (0, 1, 2 to 3, 4 to 7, ...) the share of its tokens that use it; `largest` and `drawn` examples,
    `together`, `up` and `down`.
    """
    about = {"tokens": uses.tokens, "massive_left_out": uses.about["massive"]["left_out"]}
    about |= {"sampled": uses.about["sampled"], "no_lens": uses.about["no_lens"]}
    signs = {name: _sign(uses, dictionary, atom, bool(i), top) for i, name in enumerate(SIGNS)}
    nearest = [
        {"atom": int(i), "cosine": float(c), "label": dictionary.labels.describe(int(i))}
        for i, c in zip(uses.nearest[atom], uses.cosine[atom], strict=True)
        if i >= 0
    ]
    return about | signs | {"nearest": nearest}


def _sign(uses: Uses, dictionary: ITDA, atom: int, negative: bool, top: int) -> dict[str, Any]:
    at = atom, int(negative)
    examples = uses.examples(atom, negative)
    keys = [int(key) for key in uses.together[at] if key >= 0]
    figures = zip(uses.together_tokens[at].tolist(), uses.lift[at].tolist(), strict=True)
    together = [
        {"atom": key // 2, "negative": bool(key % 2), "tokens": tokens, "lift": lift}
        | {"label": dictionary.labels.describe(key // 2)}
        for key, (tokens, lift) in zip(keys, figures, strict=False)
    ]
    places = [
        used / there if there else None
        for used, there in zip(uses.positions[at].tolist(), uses.position_tokens.tolist(), strict=True)
    ]
    return {
        "count": int(uses.count[at]),
        "density": float(uses.density[at]),
        "histogram": {"edges": uses.edges.tolist(), "counts": uses.histogram[at].tolist()},
        "positions": places,
        "largest": [example for example in examples if example["interval"] == LARGEST][:top],
        "drawn": [example for example in examples if example["interval"] < LARGEST],
        "together": together,
        **uses.promoted(atom, negative),
    }
