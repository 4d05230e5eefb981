"""The logit lens: which tokens a direction of the residual stream raises and lowers, by the model's own last steps.

What stands between the last block and the unembedding is not looked up by name: the model is run with the directions in
the place of what its last block puts out, and stopped where they reach its head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from itda.errors import InputError
from itda.models.hooked_model import HookedModel, Stop
from itda.models.outputs import rows_of
from itda.pursuit.products import product

ROWS, LENGTH = 16, 32  # directions go through the model as tokens of so many rows
AT_ONCE, VOCABULARY = 1024, 1 << 14  # directions and tokens whose products are held at once


def no_lens(model: HookedModel, d: int) -> str | None:
    """Why the lens cannot be had of directions of width `d`, in a few words; None where it can."""
    if type(model)._logits is not HookedModel._logits:
        return "the model is not held as one module here"
    if (why := model.no_logits) is not None:
        return why
    try:
        last = model.canonical(_last(model))
    except InputError as error:
        return str(error).partition(":")[0].rstrip(".")
    width = model.at([last], model.tokenizer).d[last]
    if width != d:
        return f"directions of width {d} are none of the residual stream, whose width is {width}"
    weight = _head(model).weight
    if not isinstance(weight, Tensor) or weight.is_meta or not weight.is_floating_point():
        return "the unembedding of the model is not in memory, or quantised"
    return None


def _last(model: HookedModel) -> int:
    """The number of the last block."""
    return model.n_layers - 1


def _head(model: HookedModel) -> Any:
    module: Any = model.module
    return module.get_output_embeddings()


def before_head(model: HookedModel, x: Float[Tensor, "n d"]) -> Float[Tensor, "n inner"]:
    """What the head is given where the last block puts out `x`, float32, less what it is given for zeros.

    So the bias of a last norm, the same for every direction, is left out.
    """
    parts = [_before_head(model, part) for part in torch.cat([torch.zeros_like(x[:1]), x]).split(ROWS * LENGTH)]
    found = torch.cat(parts)
    return found[1:] - found[0]


def _before_head(model: HookedModel, x: Float[Tensor, "n d"]) -> Float[Tensor, "n inner"]:
    length = min(LENGTH, model.max_length or LENGTH, len(x))
    rows = -(-len(x) // length)
    filled = torch.cat([x, x[:1].expand(rows * length - len(x), -1)]).reshape(rows, length, -1)
    ids = torch.zeros(rows, length, dtype=torch.int64)
    caught: list[Tensor] = []

    def replaced(output: Tensor) -> Tensor:
        return filled.to(output.device, output.dtype)

    def catch(module: object, arguments: tuple, named: dict) -> None:
        given = rows_of(arguments or tuple(named.values()), rows, length)
        assert given is not None, "a head is given one vector for every token"
        caught.append(given.detach().float().cpu())
        raise Stop

    handle = _head(model).register_forward_pre_hook(catch, with_kwargs=True)
    try:
        model.logits(ids, torch.ones_like(ids), {model.canonical(_last(model)): replaced})
    except Stop:
        pass
    finally:
        handle.remove()
    return caught[0].flatten(0, 1)[: len(x)]


def promoted(
    model: HookedModel,
    x: Float[Tensor, "n d"],
    top: int,
    without: Sequence[int] = (),
    told: Callable[[int], None] = lambda count: None,
) -> Iterator[tuple[Int[Tensor, "n top"], Float[Tensor, "n top"]]]:
    """Tokens and logits that directions `x` raise most, the most first, and then those that they lower most.

    Logits are those above the mean of all tokens; a cap on them and a bias of the head change no order, or are no
    direction's, and are left out. Tokens in `without` are passed over.
    """
    weight = _head(model).weight.detach()
    allowed = torch.ones(len(weight), dtype=torch.bool)
    allowed[[token for token in without if token < len(weight)]] = False
    ids = allowed.nonzero()[:, 0]
    top, found = min(top, len(ids)), []
    for done, part in enumerate(before_head(model, x.float().cpu()).split(AT_ONCE)):
        found.append(_ends(part, weight, ids, top))
        told(min(len(x), (done + 1) * AT_ONCE))
    for end in (0, 1):
        tokens, values = (torch.cat([pair[end][i] for pair in found]) if found else None for i in (0, 1))
        yield (
            (tokens, values)
            if tokens is not None and values is not None
            else (torch.zeros(0, top, dtype=torch.int64), torch.zeros(0, top))
        )


def _ends(part: Tensor, weight: Tensor, ids: Tensor, top: int) -> list[tuple[Tensor, Tensor]]:
    """Of some directions the `top` tokens of `ids` and their logits, the largest and then the smallest."""
    kept: list[list[tuple[Tensor, Tensor]]] = [[], []]
    total = torch.zeros(len(part), dtype=torch.float64)
    for some in ids.split(VOCABULARY):
        logits = product(part, weight[some.to(weight.device)].float().cpu())
        total += logits.double().sum(1)
        for pairs, sign in zip(kept, (1, -1), strict=True):
            value, place = (sign * logits).topk(min(top, len(some)), dim=1)
            pairs.append((some[place], sign * value))
    mean, out = (total / max(1, len(ids)))[:, None], []
    for pairs, sign in zip(kept, (1, -1), strict=True):
        token, value = (torch.cat([pair[i] for pair in pairs], 1) for i in (0, 1))
        order = torch.from_numpy(np.lexsort((token.numpy(), -sign * value.numpy()))[:, :top])
        out.append((token.gather(1, order), (value.gather(1, order).double() - mean).float()))
    return out
