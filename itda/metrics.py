"""How far a reconstruction is from its activation: each measure defined once, for torch tensors and NumPy arrays.

All are taken in float64, whatever the dtype: squares of activations in float16 overflow, and those of tiny ones vanish.
"""

from __future__ import annotations

from itda.errors import InputError

CHUNK = 16_384  # tokens whose float64 copies are held at a time


def _exact(x):
    """`x` in float64; from a device that has none, on the CPU."""
    if not hasattr(x, "double"):
        return x.astype("float64", copy=False)
    return (x.cpu() if x.device.type == "mps" else x).double()


def relative_error(x, x_hat):
    """|x - x_hat|^2 / |x|^2 of each activation, (..., d) -> (...). 0 for a zero activation."""
    x = _exact(x)
    total = (x * x).sum(-1)
    return squared_error(x, x_hat) / (total + (total == 0))


def squared_error(x, x_hat):
    """|x - x_hat|^2 of each activation, (..., d) -> (...) (eq. 6 as printed)."""
    rest = _exact(x) - _exact(x_hat)
    return (rest * rest).sum(-1)


def cosine_error(x, x_hat):
    """Mean over dimensions of (x/|x| - x_hat/(|x_hat| + 1e-9))^2, (..., d) -> (...): the published code's loss.

    Equals 2 (1 - cos) / d for a non-zero reconstruction: it depends on the width and is blind to magnitude. 0 for a
    zero activation.
    """
    x, x_hat = _exact(x), _exact(x_hat)
    norm, norm_hat = (x * x).sum(-1) ** 0.5, (x_hat * x_hat).sum(-1) ** 0.5
    unit = x / (norm + (norm == 0))[..., None]
    return ((unit - x_hat / (norm_hat + 1e-9)[..., None]) ** 2).mean(-1) * (norm > 0)


LOSSES = {"relative": relative_error, "cosine": cosine_error, "squared": squared_error}


def loss_of_residual(name: str, total, overlap, energy, d: int):
    """The loss `name` of activations of |x|^2 = `total` with <x, r> = `overlap` and |r|^2 = `energy`, r = x - x_hat.

    Float64 tensors of one shape; the same as `LOSSES[name](x, x - r)` up to rounding.
    """
    if name == "squared":
        return energy
    if name == "relative":
        return energy / (total + (total == 0))
    norm, norm_hat = total**0.5, (total - 2 * overlap + energy).clip(min=0) ** 0.5
    shrunk = norm_hat / (norm_hat + 1e-9)
    cosine = (total - overlap) / (norm * norm_hat + (norm * norm_hat == 0))
    return (1 - 2 * shrunk * cosine + shrunk**2) / d * (total > 0)


def fvu(x, x_hat) -> float:
    """Fraction of variance unexplained, sum |x - x_hat|^2 / sum |x - mean|^2: global over tokens (tokens, d), centred.

    NaN where the activations have no variance (one token, or equal ones).
    """
    if x.shape != x_hat.shape:
        raise InputError(f"`x_hat` has shape {tuple(x_hat.shape)}: pass one of the shape of `x`, {tuple(x.shape)}.")
    parts = [slice(start, start + CHUNK) for start in range(0, len(x), CHUNK)]
    mean = sum(_exact(x[part]).sum(0) for part in parts) / max(1, len(x))
    variance = sum(float(squared_error(x[part], mean).sum()) for part in parts)
    error = sum(float(squared_error(x[part], x_hat[part]).sum()) for part in parts)
    return error / variance if variance > 0 else float("nan")


def cosine(x, x_hat):
    """Cosine of each activation with its reconstruction, (..., d) -> (...). 0 where either is zero."""
    x, x_hat = _exact(x), _exact(x_hat)
    norms = ((x * x).sum(-1) * (x_hat * x_hat).sum(-1)) ** 0.5
    return (x * x_hat).sum(-1) / (norms + (norms == 0))


def ce_score(clean: float, loss: float, ablated: float) -> float:
    """(ablated - loss) / (ablated - clean), cross-entropies (eq. 7); NaN where the ablation costs nothing.

    1 for what changes nothing, 0 for the ablation, and negative for what is worse than that.
    """
    gap = float(ablated) - float(clean)
    return (float(ablated) - float(loss)) / gap if gap else float("nan")


def coherence(atoms, most: int = 4096) -> dict[str, float]:
    """|cosine| of pairs of different atoms (n, d) of unit norm: its maximum, 99.9th percentile and mean.

    Maximum and mean are over all pairs, the percentile over those of at most `most` atoms, evenly spaced. NaN for fewer
    than two atoms.
    """
    import torch

    from itda.devices import full_float32

    n = len(atoms)
    if n < 2:
        return dict.fromkeys(("max", "99.9 %", "mean"), float("nan"))
    unit = atoms / torch.linalg.vector_norm(atoms, dim=1, keepdim=True).clamp_min(1e-30)
    largest, total = 0.0, 0.0
    some = unit[:: -(-n // most)]
    with full_float32():
        for start in range(0, n, 1024):
            part = (unit[start : start + 1024] @ unit.T).abs()
            part.diagonal(start).fill_(0)
            largest, total = max(largest, float(part.amax())), total + float(part.sum(dtype=torch.float64))
        pairs = (some @ some.T).abs()
    above = pairs[torch.ones_like(pairs, dtype=torch.bool).triu(1)]
    place = max(1, round(0.999 * len(above)))
    return {"max": largest, "99.9 %": float(above.kthvalue(place).values), "mean": total / (n * (n - 1))}
