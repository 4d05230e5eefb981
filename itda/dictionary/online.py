"""A dictionary in one pass that fits the text: tokens drawn at the start, moved by all that goes by.

Algorithm 1 asks of a token whether the dictionary writes it well enough. Where a size is wanted there is nothing to
ask: `n_atoms` tokens are drawn from the head of the stream, and whenever a chunk of tokens has been encoded, all atoms
take a step to where their squared error would be less (`itda.dictionary.moves`). Nothing is read twice, and memory does
not grow with the tokens. Chunks are counted from the first token on, so the batches in which these come change nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from itda.dictionary.admission import first_of_each
from itda.dictionary.moves import Moves, chunk_of
from itda.pursuit import normalize, pursue

HEAD = 2  # tokens to draw an atom from, at least
SEED = 0  # of the draw


class Online:
    """The atoms as they are after the last step, and the tokens that have come since.

    `start` (n_atoms, d) are those drawn; `norms` were theirs, and `losses` are NaN, since none was admitted.
    """

    choices = settled = replayed = 0  # no choice decides whether an atom is there

    def __init__(self, d: int, k: int, device: torch.device | str = "cpu", nonneg: bool = False) -> None:
        self.k, self.nonneg = k, nonneg
        self.start = torch.zeros(0, d, dtype=torch.float32, device=device)
        self.norms: list[float] = []
        self.pending: list[Tensor] = []
        self.current, self.moves = self.start, Moves(0, device)

    def __len__(self) -> int:
        return len(self.start)

    @property
    def losses(self) -> list[float]:
        """None was admitted."""
        return [np.nan] * len(self)

    @property
    def chunk(self) -> int:
        """How many tokens are encoded between two steps."""
        return chunk_of(len(self))

    @property
    def d(self) -> int:
        """The size of an activation."""
        return self.start.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the atoms are."""
        return self.start.device

    def finished(self) -> Float[Tensor, "n_atoms d"]:
        """The atoms if the stream ends here: moved by the tokens since the last step too. Nothing changes."""
        return self._moved(torch.cat(self.pending), self.moves.copy()) if self.pending else self.current

    def draw(self, x: Float[Tensor, "tokens d"], wish: int) -> list[int]:
        """Take `wish` of the tokens `x`, no two in one direction, or as many as there are; the rows, in order."""
        order = np.random.default_rng(SEED).permutation(np.flatnonzero(x.any(1).cpu().numpy()))
        size, rows = min(wish, len(order)), np.zeros(0, np.int64)
        while len(rows) < wish and len(rows) < len(order):
            some = order[:size]
            rows = some[first_of_each(x[torch.from_numpy(some).to(x.device)], self.nonneg)][:wish]
            if size == len(order):
                break
            size = min(2 * size, len(order))
        rows = np.sort(rows)
        drawn = x[torch.from_numpy(rows).to(x.device)]
        self.load(normalize(drawn), torch.linalg.vector_norm(drawn, dim=1, dtype=torch.float64).tolist())
        return rows.tolist()

    def load(self, start: Float[Tensor, "n_atoms d"], norms: list[float]) -> None:
        """Begin with these atoms, of which no token has been encoded."""
        self.start, self.norms, self.pending = start, norms, []
        self.current, self.moves = start, Moves(len(start), start.device)

    def to(self, device: torch.device | str) -> None:
        """Move it to `device`."""
        self.start, self.current = self.start.to(device), self.current.to(device)
        self.pending, self.moves.energy = [part.to(device) for part in self.pending], self.moves.energy.to(device)

    def judge(
        self, x: Float[Tensor, "tokens d"], threshold: float, room: Any = None, watch: Any = None
    ) -> tuple[list[int], Float[ndarray, " 0"]]:
        """Take the next tokens; no row becomes an atom, and no loss is watched."""
        self.pending.append(x)
        while (waiting := sum(map(len, self.pending))) >= self.chunk:
            tokens = torch.cat(self.pending)
            self.current = self._moved(tokens[: self.chunk], self.moves)
            self.pending = [tokens[self.chunk :].clone()] if waiting > self.chunk else []
        return [], np.zeros(0)

    def _moved(self, x: Float[Tensor, "tokens d"], moves: Moves) -> Float[Tensor, "n_atoms d"]:
        """The atoms after a chunk, of which `moves` take note."""
        return moves.of(x, self.current, pursue(x, self.current, self.k, nonneg=self.nonneg))
