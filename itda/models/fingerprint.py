"""Which weights an activation depends on, as one hash: of samples of the parameters, so that it is quickly taken."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

_SAMPLE = 256  # values per parameter


def sample_of(name: str, values: Tensor) -> bytes:
    """What a parameter adds to a fingerprint."""
    values = values.detach()
    sample = values.reshape(-1)[:: max(1, -(-values.numel() // _SAMPLE))].to("cpu", torch.bfloat16)
    return (
        f"{name} {tuple(values.shape)} ".encode()
        + sample.contiguous().view(torch.int16).numpy().astype("<i2").tobytes()
    )


def fingerprint(samples: Mapping[str, bytes]) -> str:
    """The sha256 of parameters by their samples, in the order of their names."""
    return hashlib.sha256(b"".join(samples[name] for name in sorted(samples))).hexdigest()
