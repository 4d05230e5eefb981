"""One SAE while it is trained: its weights, and the loss and the gradients of one batch.

With e = x_hat - x over activations x of about norm sqrt(d), the loss is mean |e|^2 / d, and beside it

  relu        l1 * mean sum_i f_i / sqrt(d); without an `l1` it is steered so that the mean L0 becomes k
  top-afa     afa * mean (|f| - |x - b_dec|)^2, which has a gradient through the latents that are kept alone
  all others  and top-afa: latents that have not been active for `dead_after` tokens write what is left of x, and 1/32
              of that loss is added (AuxK, Gao et al., arXiv 2406.04093)

Gradients are written out. A few in a hundred codes are not zero, so that sums over these take a small part of the time
of products of matrices; where more are, or the weights are not on a CPU, they are such products.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from itda.pursuit import cpu_sparse, encode, normalize
from itda.pursuit.cpu_sparse import Sparse
from itda.pursuit.dense import Steps
from itda.pursuit.gram import Gram
from itda.saes import activations
from itda.saes.top_afa import kept

AUX = 1 / 32  # the weight of what dead latents write
SPARSE = 0.05  # of the codes at most are not zero where sums are taken over these alone
HOMOGENEOUS: dict[str, Callable[[Tensor, int], Tensor]] = {  # kinds whose codes grow with the encoder
    "topk": activations.topk,
    "batchtopk": activations.batchtopk,
    "relu": lambda pre, k: pre.relu(),
}
STEER, DAMP, MOST_OFF = 0.002, 0.5, 1.0  # how the logarithm of l1 follows that of L0 / k: its sum, itself, at most
GUESS = 0.8  # of the last threshold, which the next is above as a rule


@dataclass(frozen=True)
class Aim:
    """What an SAE is to become: the settings that it has for itself."""

    kind: str
    n_atoms: int
    dead_after: int
    k: int | None = None
    afa: float = 0.0
    l1: float | None = None


class Figures(NamedTuple):
    """Of one batch: the loss with everything in it, the mean of |e|^2 / d, and that of how many latents were active."""

    loss: float
    error: float
    l0: float


class Learner:
    """An SAE in training; `parameters` have their gradients in `.grad` after `backward`."""

    def __init__(self, aim: Aim, atoms: Float[Tensor, "n d"], bias: Float[Tensor, " d"], forget: float = 0.01) -> None:
        self.aim, self.forget = aim, forget  # of the running mean of thresholds, with each step
        self.W_dec, self.b_dec = atoms.clone(), bias.clone()
        self.parameters = {"W_dec": self.W_dec, "b_dec": self.b_dec}
        if aim.kind != "mp":
            self.W_enc, self.b_enc = atoms.clone(), atoms.new_zeros(len(atoms))  # (n, d): a latent in a row
            self.parameters |= {"W_enc": self.W_enc, "b_enc": self.b_enc}
        self.grad = {name: torch.zeros_like(tensor) for name, tensor in self.parameters.items()}
        for name, tensor in self.parameters.items():
            tensor.grad = self.grad[name]
        self.k = aim.k or 0
        self.idle = torch.zeros(len(atoms), dtype=torch.long, device=atoms.device)  # tokens since each was active
        self.threshold: float | None = None  # of batchtopk, a running mean
        self.bar = 0.0  # of batchtopk, the last one
        self.l1 = 1.0 if aim.l1 is None else aim.l1
        self.off: float | None = None  # of relu, the logarithm of L0 / k

    @torch.no_grad()
    def scale_encoder(self, x: Float[Tensor, "tokens d"]) -> None:
        """Scale the encoder so that what its first codes write is, by least squares, nearest to `x`.

        Atoms that resemble each other write the same thing many times over: those of an ITDA up to fourteen times.
        """
        if self.aim.kind not in HOMOGENEOUS:
            return
        xc = x - self.b_dec
        acts = HOMOGENEOUS[self.aim.kind](xc @ self.W_enc.T, self.k)
        written = acts @ self.W_dec
        energy = float(written.square().sum(dtype=torch.float64))
        if energy > 0:
            self.W_enc *= float((written * xc).sum(dtype=torch.float64)) / energy

    def state(self) -> dict[str, float | None]:
        """What changes and is no tensor."""
        return {"threshold": self.threshold, "bar": self.bar, "l1": self.l1, "off": self.off}

    @property
    def dead(self) -> Bool[Tensor, " n"]:
        """Which latents have not been active for long."""
        return self.idle >= self.aim.dead_after

    @torch.no_grad()
    def backward(self, x: Float[Tensor, "tokens d"], share: float) -> Figures:
        """Put the gradients of the loss on `x` into the parameters; `share`, 0 to 1, is how much of `l1` counts."""
        slope, xc = 2 / x.numel(), x - self.b_dec
        if self.aim.kind == "mp":
            return self._pursued(xc, slope)
        pre = torch.addmm(self.b_enc, xc, self.W_enc.T)
        codes = self._codes(pre, xc)
        if isinstance(codes, Sparse):
            error, active, l0, more = self._by_sums(codes, x, xc, slope, share)
        else:
            error, active, l0, more = self._by_products(codes, x, xc, slope, share)
        self.grad["b_dec"].copy_(slope * error.sum(0) - self.grad["b_enc"] @ self.W_enc)
        if self.aim.kind == "relu" and self.aim.l1 is None and share == 1:
            off = math.log(max(l0, 1e-3) / self.k)
            off = min(MOST_OFF, max(-MOST_OFF, off))
            self.l1 *= math.exp(STEER * off + DAMP * (off - (off if self.off is None else self.off)))
            self.off = off
        return self._figures(error, active, l0, more, (pre, xc))

    def _codes(self, pre: Tensor, xc: Tensor) -> Sparse | Tensor:
        """The codes of a batch, with or without their zeros."""
        kind, k, (tokens, n) = self.aim.kind, self.k, pre.shape
        sparse = pre.device.type == "cpu" and k <= SPARSE * n
        if kind == "topk":
            return cpu_sparse.largest(pre, k) if sparse else activations.topk(pre, k)
        if kind == "batchtopk":
            found = cpu_sparse.of_batch(pre, k * tokens, GUESS * self.bar) if sparse else activations.batchtopk(pre, k)
            values = torch.from_numpy(found.value) if isinstance(found, Sparse) else found[found > 0]
            self.bar = float(values.min()) if len(values) else 0.0
            before = self.bar if self.threshold is None else self.threshold
            self.threshold = before + self.forget * (self.bar - before)
            return found
        acts = pre.relu()
        if kind == "top-afa":
            acts *= kept(acts, xc.norm(dim=1))
        if pre.device.type == "cpu" and int(acts.count_nonzero()) <= SPARSE * acts.numel():
            return cpu_sparse.above(acts, torch.zeros(tokens))
        return acts

    def _by_sums(self, codes: Sparse, x: Tensor, xc: Tensor, slope: float, share: float) -> tuple:
        """The gradients of all but b_dec; the error, which latents were active, the mean L0, the rest of the loss."""
        error, back = cpu_sparse.residuals(codes, self.W_dec, self.b_dec, x)
        back *= np.float32(slope)
        order = cpu_sparse.by_latent(codes, len(self.W_dec))
        more = 0.0
        if self.aim.kind == "relu":
            rate = share * self.l1 / (len(x) * math.sqrt(x.shape[1]))
            back += np.float32(rate)
            more = rate * float(codes.value.sum(dtype=np.float64))
        elif self.aim.kind == "top-afa":
            rows = np.repeat(np.arange(len(x)), codes.last - codes.first)
            length = np.sqrt(np.bincount(rows, np.square(codes.value, dtype=np.float64), len(x)))
            pull, more = self._pull(torch.from_numpy(length).float(), xc)
            back += pull.numpy()[rows] * codes.value
        cpu_sparse.sums(order, codes.value * np.float32(slope), error, self.grad["W_dec"])
        cpu_sparse.sums(order, back, xc, self.grad["W_enc"])
        self.grad["b_enc"].copy_(cpu_sparse.totals(order, back))
        return error, torch.from_numpy(order.tokens() > 0), codes.l0() / len(x), more

    def _by_products(self, acts: Tensor, x: Tensor, xc: Tensor, slope: float, share: float) -> tuple:
        """The same of codes with their zeros."""
        error = torch.addmm(self.b_dec, acts, self.W_dec).sub_(x)
        back = (error @ self.W_dec.T).mul_(slope)
        more = 0.0
        if self.aim.kind == "relu":
            rate = share * self.l1 / (len(x) * math.sqrt(x.shape[1]))
            back += rate
            more = rate * float(acts.sum(dtype=torch.float64))
        elif self.aim.kind == "top-afa":
            pull, more = self._pull(acts.norm(dim=1), xc)
            back.addcmul_(pull[:, None], acts)
        active = acts > 0
        back *= active
        torch.mm(acts.T, error, out=self.grad["W_dec"]).mul_(slope)
        torch.mm(back.T, xc, out=self.grad["W_enc"])
        torch.sum(back, 0, out=self.grad["b_enc"])
        return error, active.any(0), float(active.sum()) / len(x), more

    def _pull(self, length: Float[Tensor, " tokens"], xc: Float[Tensor, "tokens d"]) -> tuple[Tensor, float]:
        """What the gradient of afa * mean (|f| - |xc|)^2 has of each f, and that loss; decoder rows have length one."""
        off = length - xc.norm(dim=1)
        rate = 2 * self.aim.afa / len(xc)
        return rate * off / length.clamp(min=1e-8), self.aim.afa * float(off.square().mean())

    def _pursued(self, xc: Tensor, slope: float) -> Figures:
        """The same for matching pursuit, whose encoder is the dictionary."""
        parts = list(encode(xc, Gram(self.W_dec), self.k, nonneg=True))
        steps = Steps(*map(torch.cat, zip(*parts, strict=True)))
        unroll = cpu_sparse.unrolled if xc.device.type == "cpu" else unrolled
        rest, back = unroll(xc, steps, self.W_dec, slope, self.grad["W_dec"])
        torch.sum(-back, 0, out=self.grad["b_dec"])
        taken = torch.arange(self.k, device=xc.device) < steps.length[:, None]
        active = torch.zeros(len(self.W_dec), dtype=torch.bool, device=xc.device)
        active[steps.indices[taken]] = True
        return self._figures(-rest, active, float(taken.sum()) / len(xc), 0.0, (None, rest))

    def _figures(self, error: Tensor, active: Tensor, l0: float, more: float, read: tuple) -> Figures:
        """What a batch showed, after it is known which latents are dead, and these have had their part of the loss."""
        self.idle += len(error)
        self.idle[active.to(self.idle.device)] = 0
        dead = self.dead.nonzero()[:, 0] if self.aim.kind != "relu" else self.idle[:0]
        more += self._revived(dead, error, *read) if len(dead) else 0.0
        mean = float(error.square().mean())
        return Figures(mean + more, mean, l0)

    def _revived(self, dead: Int[Tensor, " dead"], error: Tensor, pre: Tensor | None, read: Tensor) -> float:
        """AuxK: the largest pre-activations of dead latents write what is left; its gradients are added."""
        atoms = self.W_dec[dead]
        pre = read @ atoms.T if pre is None else pre[:, dead]
        values, at = pre.topk(min(len(dead), max(1, atoms.shape[1] // 2)), dim=1)
        acts = torch.zeros_like(pre).scatter_(1, at, values.relu())
        off = torch.addmm(error, acts, atoms)
        slope = AUX * 2 / off.numel()
        back = (off @ atoms.T).mul_(slope) * (acts > 0)
        self.grad["W_dec"].index_add_(0, dead, (acts.T @ off).mul_(slope))
        self.grad["W_dec" if self.aim.kind == "mp" else "W_enc"].index_add_(0, dead, back.T @ read)
        if self.aim.kind != "mp":
            self.grad["b_enc"].index_add_(0, dead, back.sum(0))
        return AUX * float(off.square().mean())

    def project(self) -> None:
        """Take from the gradient of the decoder what is parallel to its rows."""
        along = torch.linalg.vecdot(self.grad["W_dec"], self.W_dec)
        self.grad["W_dec"].addcmul_(along[:, None], self.W_dec, value=-1)

    def fold(self) -> None:
        """Give the rows of the decoder length one."""
        self.W_dec.copy_(normalize(self.W_dec))


def unrolled(
    x: Float[Tensor, "tokens d"], steps: Steps, atoms: Float[Tensor, "n d"], slope: float, out: Float[Tensor, "n d"]
) -> tuple[Float[Tensor, "tokens d"], Float[Tensor, "tokens d"]]:
    """`cpu_sparse.unrolled` on any device."""
    values = steps.coefficients.to(x)
    rest = x.clone()
    for s in range(values.shape[1]):
        rest.addcmul_(atoms[steps.indices[:, s]], values[:, s, None], value=-1)
    before, back = rest.clone(), slope * rest
    out.zero_()
    for s in reversed(range(values.shape[1])):
        atom, value, some = atoms[steps.indices[:, s]], values[:, s, None], (s < steps.length)[:, None]
        before = before + value * atom
        along = (back * atom).sum(1, keepdim=True) * some
        out.index_add_(0, steps.indices[:, s], -(value * back + along * before))
        back = back - along * atom
    return rest, back
