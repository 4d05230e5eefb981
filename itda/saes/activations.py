"""Activation functions of SAEs: pre-activations (tokens, n_atoms) in, codes out, most of them zero and none negative.

The dense forms are the definitions; `SAE.encode` and the training have sparse forms where these are faster.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def relu(pre: Float[Tensor, "tokens n_atoms"]) -> Float[Tensor, "tokens n_atoms"]:
    """What is positive."""
    return pre.relu()


def jumprelu(
    pre: Float[Tensor, "tokens n_atoms"], threshold: Float[Tensor, " n_atoms"]
) -> Float[Tensor, "tokens n_atoms"]:
    """What is positive and above the threshold of its latent (Rajamanoharan et al., arXiv 2407.14435)."""
    return torch.where(pre > threshold, pre, 0).relu()


def topk(pre: Float[Tensor, "tokens n_atoms"], k: int) -> Float[Tensor, "tokens n_atoms"]:
    """Of each token the k largest, as far as they are positive (Gao et al., arXiv 2406.04093)."""
    values, indices = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, indices, values.relu())


def batchtopk(pre: Float[Tensor, "tokens n_atoms"], k: int) -> Float[Tensor, "tokens n_atoms"]:
    """Of all tokens together the k * tokens largest, as far as they are positive (Bussmann et al., arXiv 2412.06410).

    A token's code depends on its batch, so it is for training alone: what is kept there ends at a threshold, which
    `jumprelu` takes afterwards.
    """
    values, indices = pre.flatten().topk(min(k * len(pre), pre.numel()))
    return torch.zeros_like(pre).flatten().scatter(0, indices, values.relu()).view_as(pre)
