"""Put something else in place of a hook point's output while the model runs: what it costs in cross-entropy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from itda.errors import InputError
from itda.models.hooked_model import HookedModel
from itda.text.prompts import Row, valid

BUDGET = 1e9  # bytes of logits, the clean ones and those beside them
COPIES = 4  # of the logits of a pass: as the head gives them and as they are picked, clean and spliced
FLOAT32 = 4  # bytes
PIECE = 8e6  # bytes of those whose probabilities are computed together: larger ones are no faster, and leave holes
Replacement = Callable[[Float[Tensor, "tokens d"]], Float[Tensor, "tokens d"]]


@dataclass
class Spliced:
    """What became of the predictions; made by `spliced`.

    `cross_entropy` has by name the cross-entropy, in nats, of every token that is predicted, "clean" that of the model
    as it is; `kl` the Kullback-Leibler divergence of the predictions from the clean ones, KL(clean || spliced). All are
    (predicted,) float64, in stream order; `prompt` and `position` say which token is predicted.
    """

    cross_entropy: dict[str, Float[ndarray, " predicted"]] = field(default_factory=dict)
    kl: dict[str, Float[ndarray, " predicted"]] = field(default_factory=dict)
    prompt: Int[ndarray, " predicted"] = field(default_factory=lambda: np.zeros(0, np.int64))
    position: Int[ndarray, " predicted"] = field(default_factory=lambda: np.zeros(0, np.int64))


def spliced(
    model: HookedModel,
    rows: Iterable[Row],
    hook: str,
    replacements: Mapping[str, Replacement],
    *,
    special_tokens: bool = False,
    batch_rows: int = 8,
    budget: float = BUDGET,
    progress: Callable[[int], None] = lambda rows: None,
) -> Spliced:
    """Run `rows` through the language model as it is, and once more with every one of `replacements` at `hook`.

    A replacement is a function of activations (tokens, d), in the dtype and on the device of the model; it is given the
    valid tokens of a few rows at a time, and every other token passes untouched: padding, and unless `special_tokens`
    special tokens and position 0. The clean pass of a few rows serves all replacements.

    Logits and what is computed of them take no more than `budget` bytes beside the model's own, where a vocabulary is
    large: then fewer than `batch_rows` rows run together, and of a row that is too long by itself the logits come in
    pieces, for which it is run once more each. `progress` is told how many rows are done. Raises `InputError` for a
    model without a language modelling head.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in ("clean", *replacements)}
    apart: dict[str, list[Tensor]] = {name: [] for name in replacements}
    prompts, positions, done = [], [], 0
    tokens = max(1, int(budget / (COPIES * FLOAT32 * model.vocabulary)))
    for group in _groups(rows, batch_rows, tokens):
        ids, mask, chosen = _table(group, special_tokens)
        runs = {name: {hook: _at(chosen, function)} for name, function in replacements.items()}
        for places in _places(ids.shape[1], tokens if len(group) == 1 else None):
            after = torch.arange(1, ids.shape[1]) if places is None else places + 1
            target, there = ids[:, after], mask[:, after].bool()
            row, place = there.nonzero(as_tuple=True)
            prompts.append(np.array([r.prompt for r in group])[row.numpy()])
            positions.append(after[place].numpy())
            _predict(model, (ids, mask, places), (target, there), runs, found, apart)
        done += len(group)
        progress(done)
    if not prompts:
        raise InputError("There is no row of text, so nothing can be predicted: give some text.")
    out = Spliced(prompt=np.concatenate(prompts), position=np.concatenate(positions))
    out.cross_entropy = {name: torch.cat(parts).numpy() for name, parts in found.items()}
    out.kl = {name: torch.cat(parts).numpy() for name, parts in apart.items()}
    return out


def _predict(model, text, wanted, runs, found, apart) -> None:
    """Run a few rows clean, and once with each of `runs`: cross-entropies into `found`, divergences into `apart`."""
    (ids, mask, places), (target, there) = text, wanted
    clean = _those(model.logits(ids, mask, None, places), there)
    goal = target[there].to(clean.device)
    piece = max(1, int(PIECE / (FLOAT32 * model.vocabulary)))
    level = torch.cat([part.float().logsumexp(1) for part in clean.split(piece)]) if len(clean) else clean.sum(1)
    pick = torch.arange(len(goal), device=clean.device)
    found["clean"].append((level - clean[pick, goal].float()).double().cpu())
    for name, replace in runs.items():
        other = _those(model.logits(ids, mask, replace, places), there)
        losses, divergences = [], []
        for at in pick.split(piece):
            mine = other[at].float()
            mine -= mine.logsumexp(1, keepdim=True)
            real = clean[at].float() - level[at, None]
            losses.append(-mine.gather(1, goal[at, None])[:, 0].double().cpu())
            divergences.append((real.exp() * (real - mine)).sum(1).double().cpu())
        found[name] += losses
        apart[name] += divergences


def _at(chosen: Tensor, function: Replacement) -> Replacement:
    """`function` of the tokens that `chosen` (rows, length) marks; the others stay."""

    def replaced(x: Tensor) -> Tensor:
        where = chosen.to(x.device)
        out = x.clone()
        out[where] = function(x[where]).to(x)
        return out

    return replaced


def _those(logits: Tensor, there: Tensor) -> Float[Tensor, "predicted vocabulary"]:
    """Of the tokens before those that stand there, as the model gives them."""
    return logits[:, : there.shape[1]][there.to(logits.device)]


def _places(length: int, tokens: int | None) -> Iterator[Int[Tensor, " places"] | None]:
    """Positions of a row whose logits are computed together; None for all."""
    if tokens is None or length - 1 <= tokens:
        yield None
        return
    yield from torch.arange(length - 1).split(tokens)


def _groups(rows: Iterable[Row], size: int, tokens: int) -> Iterator[list[Row]]:
    """Up to `size` rows at a time, of no more than so many tokens with what they are filled up by, or one row alone."""
    group: list[Row] = []
    for row in rows:
        longest = max(len(each.ids) for each in (*group, row))
        if group and (len(group) == size or (len(group) + 1) * longest > tokens):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _table(group: Sequence[Row], special_tokens: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and which tokens are replaced, rows filled on the right."""
    width = max(len(row.ids) for row in group)
    ids, mask = torch.zeros(len(group), width, dtype=torch.long), torch.zeros(len(group), width, dtype=torch.long)
    chosen = torch.zeros(len(group), width, dtype=torch.bool)
    for i, row in enumerate(group):
        n = len(row.ids)
        ids[i, :n], mask[i, :n] = torch.from_numpy(row.ids), 1
        chosen[i, :n] = torch.from_numpy(valid(row, special_tokens))
    return ids, mask, chosen
