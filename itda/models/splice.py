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
    progress: Callable[[int], None] = lambda rows: None,
) -> Spliced:
    """Run `rows` through the language model as it is, and once more with every one of `replacements` at `hook`.

    A replacement is a function of activations (tokens, d), in the dtype and on the device of the model; it is given the
    valid tokens of a few rows at a time, and every other token passes untouched: padding, and unless `special_tokens`
    special tokens and position 0. `progress` is told how many rows are done. Raises `InputError` for a model without a
    language modelling head.
    """
    found: dict[str, list] = {name: [] for name in ("clean", *replacements)}
    apart: dict[str, list] = {name: [] for name in replacements}
    prompts, positions, done = [], [], 0
    for group in _groups(rows, batch_rows):
        ids, mask, chosen = _table(group, special_tokens)
        target = ids[:, 1:].clone()
        there = mask[:, 1:].bool()
        row, place = there.nonzero(as_tuple=True)
        prompts.append(np.array([r.prompt for r in group])[row.numpy()])
        positions.append(place.numpy() + 1)
        clean = _log_probabilities(model.logits(ids, mask), there)
        goal = target[there].to(clean.device)[:, None]
        found["clean"].append(-clean.gather(1, goal)[:, 0].double().cpu())
        for name, function in replacements.items():
            logits = model.logits(ids, mask, {hook: _at(chosen, function)})
            other = _log_probabilities(logits, there)
            found[name].append(-other.gather(1, goal)[:, 0].double().cpu())
            apart[name].append((clean.exp() * (clean - other)).sum(1).double().cpu())
        done += len(group)
        progress(done)
    if not prompts:
        raise InputError("There is no row of text, so nothing can be predicted: give some text.")
    out = Spliced(prompt=np.concatenate(prompts), position=np.concatenate(positions))
    out.cross_entropy = {name: torch.cat(parts).numpy() for name, parts in found.items()}
    out.kl = {name: torch.cat(parts).numpy() for name, parts in apart.items()}
    return out


def _at(chosen: Tensor, function: Replacement) -> Replacement:
    """`function` of the tokens that `chosen` (rows, length) marks; the others stay."""

    def replaced(x: Tensor) -> Tensor:
        where = chosen.to(x.device)
        out = x.clone()
        out[where] = function(x[where]).to(x)
        return out

    return replaced


def _log_probabilities(logits: Tensor, there: Tensor) -> Float[Tensor, "predicted vocabulary"]:
    """Of the tokens after those that stand there, float32."""
    return logits[:, :-1][there.to(logits.device)].float().log_softmax(1)


def _groups(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    group: list[Row] = []
    for row in rows:
        group.append(row)
        if len(group) == size:
            yield group
            group = []
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
