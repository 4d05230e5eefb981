"""`Codes`: the one sparse format of the library."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from itda.errors import InputError, counted


@dataclass(frozen=True, repr=False)
class Codes:
    """Sparse codes of a batch of activations over a dictionary of `n_atoms`.

    `indices` (..., k) int64 are distinct atoms, in the order in which they were first chosen; `values` (..., k) are
    their signed coefficients. Unused places stand at the end: index 0, value 0.
    """

    indices: Int[Tensor, "*batch k"]
    values: Float[Tensor, "*batch k"]
    n_atoms: int

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.indices.shape[:-1]))
        many = f"{shape} activation{'s' * (shape != '1')}" if shape else "one activation"
        return f"Codes({many}, k={self.indices.shape[-1]}, {counted(self.n_atoms, 'atom')})"

    def dense(self) -> Float[Tensor, "*batch n_atoms"]:
        """The codes with their zeros, (..., n_atoms). Costs the memory that the sparse form saves."""
        out = self.values.new_zeros(*self.values.shape[:-1], self.n_atoms)
        # Padding adds 0 to atom 0; without atoms there are no places to add to.
        return out.scatter_add_(-1, self.indices, self.values) if self.n_atoms else out

    def decode(self, atoms: Float[Tensor, "n_atoms d"] | ndarray) -> Float[Tensor, "*batch d"]:
        """The sparse sums x_hat = code @ atoms, (..., d). `atoms` must be the dictionary of the codes."""
        atoms = (
            torch.from_numpy(np.array(atoms, atoms.dtype.newbyteorder("="))) if isinstance(atoms, ndarray) else atoms
        )
        if not isinstance(atoms, Tensor):
            raise InputError(f"`atoms` is of type {type(atoms).__name__}; a tensor (n_atoms, d) was wanted.")
        if atoms.ndim != 2 or len(atoms) != self.n_atoms:
            raise InputError(
                f"`atoms` has shape {tuple(atoms.shape)}, but these codes are over {counted(self.n_atoms, 'atom')}: "
                "pass the dictionary (n_atoms, d) that they were made with."
            )
        *batch, k = self.indices.shape
        if not self.n_atoms or not k:
            return self.values.new_zeros(*batch, atoms.shape[1])
        bags, weights = self.indices.reshape(-1, k), self.values.reshape(-1, k)
        x_hat = embedding_bag(bags, atoms.to(weights.dtype), per_sample_weights=weights, mode="sum")
        return x_hat.reshape(*batch, atoms.shape[1])

    def l0(self) -> Int[Tensor, "*batch"]:
        """Realised L0: how many coefficients are not zero."""
        return (self.values != 0).sum(-1)

    def energy(self) -> Float[Tensor, "*batch"]:
        """Sum of squared coefficients, float64; |x|^2 - |r|^2 where matching pursuit chose no atom twice."""
        return self.values.double().square().sum(-1)

    def __getitem__(self, index) -> Codes:
        """The codes of a part of the batch."""
        return Codes(self.indices[index], self.values[index], self.n_atoms)

    def reshape(self, *batch: int) -> Codes:
        """The same codes with other batch axes."""
        k = self.indices.shape[-1]
        return Codes(self.indices.reshape(*batch, k), self.values.reshape(*batch, k), self.n_atoms)

    def to(self, device: torch.device | str) -> Codes:
        """The same codes on `device`."""
        return Codes(self.indices.to(device), self.values.to(device), self.n_atoms)

    def trimmed(self) -> Codes:
        """The same codes without places at the end that no activation uses."""
        used = self.values != 0
        while used.ndim > 1:
            used = used.any(0)
        most = int(used.nonzero()[-1]) + 1 if used.any() else 0
        return Codes(self.indices[..., :most], self.values[..., :most], self.n_atoms)

    @classmethod
    def of_dense(cls, dense: Float[Tensor, "tokens n_atoms"]) -> Codes:
        """The codes (tokens, most) of dense ones, largest first; `most` is the largest number that a token has."""
        most = int((dense != 0).sum(1).max()) if len(dense) else 0
        indices = dense.abs().topk(most, dim=1).indices
        values = dense.gather(1, indices).float()
        return cls(torch.where(values != 0, indices, 0), values, dense.shape[1])

    @classmethod
    def concat(cls, parts: list[Codes]) -> Codes:
        """Codes over one dictionary, joined along the first batch axis, with as many places as the widest has."""
        most = max(part.values.shape[-1] for part in parts)
        indices, values = (
            torch.cat([pad(getattr(part, name), (0, most - part.values.shape[-1])) for part in parts])
            for name in ("indices", "values")
        )
        return cls(indices, values, parts[0].n_atoms)
