"""What moves atoms: sums over codes c and activations x, and a descent on the squared error that they say.

With A the sum of c c^T and B that of c x^T over all tokens so far, older ones forgotten little by little, the squared
error as a function of the atoms D is tr(D^T A D) - 2 tr(D^T B) and a constant (Mairal, Bach, Ponce & Sapiro 2009,
algorithms 1 and 2). `Sums.descend` takes one step of block coordinate descent for every atom and keeps it at unit norm.

Codes have k entries of thousands, so A and B are added up entry by entry on the CPU: of each atom, in the order of the
tokens, whatever the threads.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from itda.codes import Codes
from itda.devices import full_float32
from itda.pursuit import normalize
from itda.pursuit.cpu import kernel, spread

MEMORY = 3.0  # updates after which the sums have forgotten a third of what they were, at the beginning
USED = 1e-6  # of the mean energy: atoms below it are not moved
TOGETHER = 64  # atoms that move together


class Sums:
    """The sums after `updates` chunks: `products` (n_atoms, n_atoms) of c c^T, and `targets` (n_atoms, d) of c x^T."""

    def __init__(self, atoms: Float[Tensor, "n_atoms d"]) -> None:
        self.products = atoms.new_zeros(len(atoms), len(atoms))
        self.targets, self.updates = torch.zeros_like(atoms), 0

    def copy(self) -> Sums:
        """Another one that changes by itself."""
        out = Sums(self.targets[:0])
        out.products, out.targets, out.updates = self.products.clone(), self.targets.clone(), self.updates
        return out

    def to(self, device: torch.device | str) -> Sums:
        """The same on `device`."""
        self.products, self.targets = self.products.to(device), self.targets.to(device)
        return self

    @full_float32()
    def add(self, x: Float[Tensor, "tokens d"], codes: Codes) -> None:
        """Take the codes of a chunk, after forgetting a part of what was before."""
        kept = max(0.0, 1 - MEMORY / (self.updates + MEMORY)) if self.updates else 0.0
        self.products.mul_(kept)
        self.targets.mul_(kept)
        self.updates += 1
        if x.device.type == "cpu":
            _add_sparse(self.products, self.targets, x, codes)
        else:
            dense = codes.dense()
            self.products.addmm_(dense.T, dense)
            self.targets.addmm_(dense.T, x)

    @full_float32()
    def descend(self, atoms: Float[Tensor, "n_atoms d"]) -> Float[Tensor, "n_atoms d"]:
        """One sweep of block coordinate descent over all atoms that are used."""
        atoms, energy = atoms.clone(), self.products.diagonal()
        used = energy > USED * energy.mean()
        for start in range(0, len(atoms), TOGETHER):
            block = slice(start, start + TOGETHER)
            rest = self.targets[block] - self.products[block] @ atoms
            step = atoms[block] + rest / energy[block, None].clamp_min(1e-30)
            atoms[block] = torch.where(used[block, None], normalize(step), atoms[block])
        return atoms


def _add_sparse(products: Tensor, targets: Tensor, x: Tensor, codes: Codes) -> None:
    """Add c c^T and c x^T of every token: atoms are spread over threads, and each takes its tokens in their order."""
    indices, values = codes.indices.numpy(), codes.values.numpy()
    order = np.argsort(indices.reshape(-1), kind="stable")  # places by atom, then by token
    starts = np.searchsorted(indices.reshape(-1)[order], np.arange(codes.n_atoms + 1))
    arrays = (starts, order, indices, values, x.contiguous().numpy(), products.numpy(), targets.numpy())
    spread(_add_of, np.flatnonzero(np.diff(starts)), *arrays)


@kernel
def _add_of(atoms, starts, order, indices, values, x, products, targets):
    """The sums of some atoms: those rows of A and B."""
    k = indices.shape[1]
    for atom in atoms:
        for place in order[starts[atom] : starts[atom + 1]]:
            token = place // k
            c = values[token, place % k]
            if c != 0:
                for i in range(k):
                    products[atom, indices[token, i]] += c * values[token, i]
                for i in range(x.shape[1]):
                    targets[atom, i] += c * x[token, i]
