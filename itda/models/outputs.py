"""What modules put out, as one vector for each token; and which modules of a model do."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor


def rows_of(output: Any, rows: int, length: int) -> Tensor | None:
    """A module's output as (rows, length, d), None if it is something else.

    Blocks return a tensor or, in transformers 4, a tuple; a bare `output[0]` would be the first row of the former.
    """
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, tuple | list) and output:
        output = output[0]
    if isinstance(output, Tensor) and output.ndim == 2 and len(output) == rows * length:
        output = output.unflatten(0, (rows, length))
    return output if isinstance(output, Tensor) and output.ndim == 3 and output.shape[:2] == (rows, length) else None


def with_rows(output: Any, x: Tensor) -> Any:
    """A module's `output` with `x` (rows, length, d) in place of what `rows_of` finds in it."""
    if isinstance(output, Mapping):
        first = next(iter(output))
        return type(output)(**{**output, first: with_rows(output[first], x)})
    if isinstance(output, tuple | list):
        return type(output)([with_rows(output[0], x), *output[1:]])
    return x.flatten(0, 1) if output.ndim == 2 else x


def readable(base: Any, device: torch.device) -> list[str] | None:
    """The paths of the modules of `base` that put out one vector per token, in the order of a forward pass.

    Two rows of three tokens are run; on the meta device that takes no weights. None where that cannot be done.
    """
    found: dict[str, bool] = {}
    ended = False

    def look(path: str, output: Any) -> None:
        found.setdefault(path, rows_of(output, 2, 3) is not None)  # when called again, the first output counts

    handles = [
        module.register_forward_hook(lambda _, args, output, path=path: look(path, output))
        for path, module in base.named_modules()
        if path
    ]
    ids = torch.zeros(2, 3, dtype=torch.int64, device=device)
    mask = {} if ids.is_meta else {"attention_mask": torch.ones_like(ids)}  # which is looked into, and has no values
    with suppress(Exception), torch.no_grad():  # of a model's own code; what ran before it counts
        base(input_ids=ids, **mask)
        ended = True
    for handle in handles:
        handle.remove()
    return [path for path, works in found.items() if works] if ended or not ids.is_meta else None
