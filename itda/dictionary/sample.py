"""The sample of tokens that a dictionary keeps."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from itda.labels import Batch, Labels

SAMPLE_TOKENS = 8192  # tokens kept, evenly spaced, to measure the finished dictionary on
SAMPLE_BYTES = 64e6


class SpacedSample:
    """Every `stride`-th token seen, at most `SAMPLE_TOKENS` of them: when they are more, every other one is dropped."""

    def __init__(self) -> None:
        self.stride = 1
        self.activations: list[Tensor] = []
        self.labels: list[Labels] = []

    def add(self, batch: Batch, tokens: int, seen: int) -> None:
        """Take from the first `tokens` of a batch that comes after `seen` tokens."""
        rows = np.arange(-seen % self.stride, tokens, self.stride)
        self.activations.append(batch.activations[torch.from_numpy(rows).to(batch.activations.device)].float().cpu())
        self.labels.append(batch.labels[rows])
        limit = min(SAMPLE_TOKENS, max(1, int(SAMPLE_BYTES / (4 * batch.activations.shape[1]))))
        while sum(map(len, self.labels)) > limit:
            x, labels = self.tokens()
            self.activations, self.labels = [x[::2].clone()], [labels[np.arange(0, len(labels), 2)]]
            self.stride *= 2

    def tokens(self) -> tuple[Tensor, Labels]:
        """Activations (tokens, d) float32 and their labels."""
        return torch.cat(self.activations), Labels.concat(self.labels)
