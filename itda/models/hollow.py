"""Models and blocks without their weights: zeros that take no memory, and what runs of them before the first block."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from itda.errors import InputError
from itda.models.hooked_model import HookedModel, Stop
from itda.models.layout import Layout


def before_blocks(skeleton: Any, layout: Layout) -> set[str]:
    """The paths of the modules with parameters of their own that run before the first block."""
    ran: set[str] = set()
    own = [(path, m) for path, m in skeleton.named_modules() if not f"{path}.".startswith(layout.blocks + ".")]
    handles = [m.register_forward_pre_hook(lambda *_, path=path: ran.add(path)) for path, m in own if m._parameters]

    def stop(*args: Any, **kwargs: Any) -> None:
        raise Stop

    blocks = skeleton.get_submodule(layout.blocks)
    skeleton.set_submodule(layout.blocks, nn.ModuleList())
    hollow(skeleton, torch.float32)
    skeleton.set_submodule(layout.blocks, blocks)
    blocks[0].forward = stop
    ids = torch.zeros(2, 3, dtype=torch.int64)
    try:
        with torch.no_grad(), suppress(Stop):
            skeleton.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), **HookedModel._taken_by(skeleton))
    finally:
        for handle in handles:
            handle.remove()
    return ran


def hollow(module: nn.Module, dtype: torch.dtype) -> None:
    """Give all of a module without storage parameters and buffers that are zeros, which take no memory to be read."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = nn.Parameter(_zeros(p.shape, dtype), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)


def _zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros whose memory the system has promised and not given: torch would write them."""
    try:
        return torch.from_numpy(np.zeros((*shape, dtype.itemsize), np.uint8)).view(dtype).squeeze(-1)
    except (MemoryError, ValueError) as error:
        raise InputError(
            f"The config of the model asks for a weight of shape {tuple(shape)}, which no memory here can hold: check "
            "it, or download it again."
        ) from error
