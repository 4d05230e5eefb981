"""The ZF plot of an `Evaluation` (arXiv 2503.24277): norms of codes against norms of what they encode.

Evaluations are of type Any here: they know how they are drawn, and imports go one way.
"""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np

from itda.report import plots

GUIDES = (0.25, 0.5, 1.0)  # of c = eps (h - 1): |f|^2 is within |z|^2 / (1 + c) and |z|^2 / (1 - c)
ACROSS = 3  # squares in a row


def zf(evaluation: Any, path: str | os.PathLike) -> None:
    """One square for each system, a dot for each token: |x| across, the norm of its code with the bias upwards.

    Dots on the diagonal are codes as long as what they encode, below it shorter ones. Dashed lines are the bounds of
    `GUIDES`, the last of which has none above. Tokens are the last of each row. Raises `InputError` as `plots.check`
    does, and where the picture cannot be written.
    """
    path = plots.check(path, "zf")
    from matplotlib.figure import Figure

    systems = evaluation.systems
    across = min(ACROSS, len(systems))
    down = -(-len(systems) // across)
    figure = Figure(figsize=(0.8 + 2.6 * across, 1.0 + 2.7 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False)
    for axis in axes.ravel()[len(systems) :]:
        axis.axis("off")
    for axis, (name, row) in zip(axes.ravel(), systems.items(), strict=False):
        _square(axis, np.array(row["zf"], float).reshape(-1, 2))
        axis.set_title(plots.plain(name), fontsize=9)
    figure.supxlabel("|x|, the last token of each row", fontsize=8)
    figure.supylabel("norm of its code, with the bias", fontsize=8)
    plots.write(figure, path)


def _square(axis: Any, dots: np.ndarray) -> None:
    """The dots of one system, the diagonal and the guides, on axes of logarithms: a massive token is far out."""
    known = dots[(np.isfinite(dots) & (dots > 0)).all(1)]
    low, high = (float(known.min()) / 1.3, float(known.max()) * 1.3) if len(known) else (0.1, 10.0)
    ends = np.array([low, high])
    axis.plot(ends, ends, color="black", linewidth=0.8)
    for c in GUIDES:
        for factor in (1 / math.sqrt(1 + c), 1 / math.sqrt(1 - c) if c < 1 else None):
            if factor is not None:
                axis.plot(ends, factor * ends, color="grey", linewidth=0.6, linestyle="--")
    axis.scatter(*known.T, s=6, alpha=0.5, linewidths=0)
    axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal")
    axis.tick_params(labelsize=7)
