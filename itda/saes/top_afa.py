"""top-AFA (arXiv 2503.24277): as many latents of a token as make the code as long as what it encodes, without a k."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from itda.errors import InputError

FIRST = 64  # latents of a token that are sorted at first; twice as many where these do not reach its target


def top_afa(
    acts: Float[Tensor, "tokens n"],
    target: Float[Tensor, " tokens"],
    norms: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, "tokens n"]:
    """`acts` with all but the largest of each token set to zero: as many as come nearest to its `target`.

    acts     activations of latents, none below 0, of any floating dtype
    target   the norm that the code of a token should have: |x - b_dec|, finite
    norms    |W_dec,i| of each latent; 1 if not given

    With f_i = acts_i norms_i in falling order, the lowest index first among equal ones, k* is the smallest k for which
    | sqrt(f_1^2 + ... + f_k^2) - target | is least (in float64): at least one latent, and never all of several, since
    the weakest has an infinite norm instead. What is kept has the gradient of `acts`; the others have none, and nor
    have `target` and `norms`, which only choose.

    Raises `InputError` for shapes that do not fit, and for entries that are negative or not finite.
    """
    _check(acts, target, norms)
    return torch.where(kept(acts, target, norms), acts, 0.0)


@torch.no_grad()
def kept(
    acts: Float[Tensor, "tokens n"], target: Float[Tensor, " tokens"], norms: Float[Tensor, " n"] | None = None
) -> Bool[Tensor, "tokens n"]:
    """Which of the positive `acts` `top_afa` keeps; arguments are not checked."""
    length = acts if acts.dtype == torch.float64 else acts.float()
    length = length if norms is None else length * norms.to(length)
    count, least = _counts(length, target.double())
    out = length > least[:, None]
    out |= (length == least[:, None]) & (least > 0)[:, None]
    # Of equal ones only so many as there is room for, the lowest index first; elsewhere all of them are kept.
    many = (out.sum(1) > count).nonzero()[:, 0]
    if len(many):
        equal = length[many] == least[many, None]
        room = count[many] - (length[many] > least[many, None]).sum(1)
        out[many] &= ~equal | (equal.cumsum(1) <= room[:, None])
    return out


def _counts(length: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """k* of each token, and the smallest of the k* largest of its `length` (tokens, n)."""
    tokens, n = length.shape
    count, least = torch.ones(tokens, dtype=torch.long, device=length.device), length.new_zeros(tokens)
    rows, most = torch.arange(tokens, device=length.device), min(n, FIRST)
    while len(rows) and n:
        top = (length if len(rows) == tokens else length[rows]).topk(most, dim=1).values
        norm = top.double().square().cumsum(1).sqrt()
        # Beyond the target the distance only grows, and after the last positive latent it stays what it is.
        done = (norm[:, -1] >= target[rows]) | (top[:, -1] <= 0)
        if most == n:
            norm[:, -1], done[:] = torch.inf, True
        best = (norm - target[rows, None]).abs().argmin(1)[done]
        count[rows[done]], least[rows[done]] = best + 1, top[done].gather(1, best[:, None])[:, 0]
        rows, most = rows[~done], min(n, 2 * most)
    return count, least


def _check(acts: Tensor, target: Tensor, norms: Tensor | None) -> None:
    if acts.ndim != 2 or not acts.is_floating_point():
        raise InputError(
            f"`acts` has shape {tuple(acts.shape)} and dtype {acts.dtype}: pass activations (tokens, n) of a floating "
            "dtype."
        )
    if target.shape != acts.shape[:1]:
        raise InputError(
            f"`target` has shape {tuple(target.shape)}, and `acts` {tuple(acts.shape)}: pass one norm for each token."
        )
    if norms is not None and norms.shape != acts.shape[1:]:
        raise InputError(
            f"`norms` has shape {tuple(norms.shape)}, and `acts` {tuple(acts.shape)}: pass one norm for each latent."
        )
    for name, values in {"acts": acts, "target": target, "norms": norms}.items():
        if values is not None and values.numel():
            low, high = values.detach().aminmax()
            if not bool((low >= 0) & (high < torch.inf)):  # NaN compares false
                raise InputError(
                    f"`{name}` goes from {low.item():g} to {high.item():g}: pass finite values, 0 or more."
                )
