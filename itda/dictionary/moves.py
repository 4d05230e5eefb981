"""How atoms move to where the tokens that use them want them: dictionary learning, a chunk of tokens at a time."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import embedding_bag

from itda.codes import Codes
from itda.pursuit import normalize

MEMORY = 8.0  # of m chunks the last m / MEMORY, or somewhat more, say how far an atom moves
START = 16  # chunks that an atom counts for as it begins: with fewer it is soon far from its token, with more it stays
USED = 1e-6  # of the mean energy: atoms below it are not moved
FEWEST, MOST = 256, 8192  # tokens of a chunk


def chunk_of(n_atoms: int) -> int:
    """How many tokens are encoded between two moves: as many as there are atoms, within limits.

    Atoms that moved have another Gram matrix, which costs as much as the correlations of so many tokens.
    """
    return min(max(n_atoms, FEWEST), MOST)


class Moves:
    """By what atoms move: their `energy` (n_atoms,), the sums of c^2 over the tokens of `chunks`, late ones most."""

    def __init__(self, n_atoms: int, device: torch.device | str = "cpu") -> None:
        self.energy, self.chunks = torch.zeros(n_atoms, dtype=torch.float64, device=device), 0

    def copy(self) -> Moves:
        """Another one that changes by itself."""
        out = Moves(0)
        out.energy, out.chunks = self.energy.clone(), self.chunks
        return out

    def of(
        self, x: Float[Tensor, "tokens d"], atoms: Float[Tensor, "n_atoms d"], codes: Codes
    ) -> Float[Tensor, "n_atoms d"]:
        """The unit `atoms` after a chunk of tokens: d + sum_t c_t r_t / energy, r_t what the code of token t leaves.

        With the energy of the chunk alone that would be least squares for each atom, all others held; with that of all
        before it is a smaller step of an atom that had much to do (Skretting & Engan 2010, by the diagonal alone). In
        the first chunk an atom has as much before it as in this one and the mean together, `START` times. Sums are
        taken in the order of the tokens, whatever the threads.
        """
        n, k = codes.n_atoms, codes.indices.shape[1]
        values, chosen = codes.values.flatten(), codes.indices.flatten()
        uses = torch.bincount(chosen, minlength=n)
        # Codes, turned about, are sums of what is left: the bag of an atom has the tokens that use it, in order.
        order, begins = chosen.argsort(stable=True), uses.cumsum(0) - uses
        rest = x - codes.decode(atoms)
        wanted = embedding_bag(order // max(k, 1), rest, begins, per_sample_weights=values[order], mode="sum")
        squares = values.double().square()[:, None]  # summed likewise: a weighted bincount on a GPU has no fixed order
        energy = embedding_bag(order, squares, begins, mode="sum")[:, 0]
        if not self.chunks:
            self.energy, self.chunks = START * (energy + energy.mean()), START
        self.energy = self.energy * (self.chunks / (self.chunks + MEMORY)) + energy
        self.chunks += 1
        used = self.energy > USED * self.energy.mean()
        step = wanted / self.energy[:, None].clamp_min(1e-30)
        return torch.where(used[:, None], normalize(atoms + step).float(), atoms)
