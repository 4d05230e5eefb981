"""Pictures of a `Comparison`, by matplotlib, which is an extra (`itda[plot]`).

Comparisons are of type Any here: they know how they are drawn, and imports go one way.
"""

from __future__ import annotations

import importlib.util
import io
import os
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from itda.disk import check_file, write_file
from itda.errors import InputError, counted, one_line
from itda.report.drawing_comparisons import layer_numbers

ENDINGS = (".png", ".svg", ".pdf")
FEW = 8  # layers of which the values are written into their squares


def check(path: str | os.PathLike, name: str = "heatmap") -> Path:
    """`path`, given as `name`, if a picture can be drawn there.

    Raises `InputError` for an ending other than PNG, SVG and PDF, a folder that is not there, and without matplotlib.
    """
    path = Path(path)
    if path.suffix.lower() not in ENDINGS:
        raise InputError(f"`{name}` is {str(path)!r}: name a file that ends with {' or '.join(ENDINGS)}.")
    check_file(name, path)
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(
            "Pictures need matplotlib, which is not installed: install it with `pip install 'itda[plot]'`."
        )
    return path


def heatmap(comparison: Any, path: str | os.PathLike, measure: str | None = None) -> None:
    """One square of similarities for each pair of models, the most similar layer of each row framed.

    `measure` is the first of the comparison unless given. Colours span the values between different models, so that a
    model compared with itself does not wash out the rest: what is beyond them has the colour of the end. Squares of few
    layers have their values in them. Raises `InputError` as `check` does, for a measure that is
    not there, and where the picture cannot be written.
    """
    path = check(path)
    name = next(iter(comparison.measures)) if measure is None else measure
    if name not in comparison.measures:
        raise InputError(
            f"There is no measure {name!r} in this comparison: choose of {', '.join(comparison.measures)}."
        )
    write(_drawn(comparison, name), path)


def write(figure: Any, path: Path) -> None:
    """Write a `figure` of matplotlib to `path`; without dates and random ids the same one gives the same bytes."""
    import matplotlib

    metadata: dict[str, Any] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower(), {})
    with matplotlib.rc_context({"svg.hashsalt": "itda"}):
        picture = io.BytesIO()
        figure.savefig(picture, format=path.suffix[1:].lower(), dpi=160, metadata=metadata)
    write_file(path, [picture.getbuffer()])


def _drawn(comparison: Any, name: str) -> Any:
    """The figure, made without the state that pyplot keeps."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    models = comparison.models
    names = [model["name"] for model in models]
    pairs = comparison.measures[name].pairs
    across = np.concatenate([matrix.ravel() for (a, b), matrix in pairs.items() if a != b])
    known = across[np.isfinite(across)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    figure = Figure(figsize=(1.2 + 2.2 * len(names), 1.0 + 2.2 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), len(names), squeeze=False)
    for row, a in enumerate(names):
        for column, b in enumerate(names):
            matrix, axis = pairs[a, b], axes[row, column]
            image = axis.imshow(matrix, vmin=low, vmax=high, cmap="viridis", aspect="auto")
            for i, values in enumerate(matrix):
                if np.isfinite(values).any():
                    best = int(np.nanargmax(values))
                    corner = (best - 0.5, i - 0.5)
                    frame = Rectangle(corner, 1, 1, fill=False, edgecolor="white", linewidth=1.2)
                    frame.set_path_effects([withStroke(linewidth=2.4, foreground="black")])  # seen on every colour
                    axis.add_patch(frame)
            if max(matrix.shape) <= FEW:
                _write_values(axis, matrix, (low + high) / 2)
            for set_ticks, model in ((axis.set_xticks, models[column]), (axis.set_yticks, models[row])):
                numbers = list(map(plain, layer_numbers(model["hook_points"])))
                set_ticks(_ticks(len(numbers)), numbers[:: max(1, len(numbers) // 6)])
            axis.tick_params(labelsize=7)
            if row == len(names) - 1:
                axis.set_xlabel(f"layer of {plain(b)}", fontsize=8)
            if column == 0:
                axis.set_ylabel(f"layer of {plain(a)}", fontsize=8)
    every = np.concatenate([matrix.ravel() for matrix in pairs.values()])
    below, above = bool((every < low).any()), bool((every > high).any())
    extend = {(True, True): "both", (True, False): "min", (False, True): "max"}.get((below, above), "neither")
    figure.colorbar(image, ax=axes, shrink=0.6, extend=extend)
    figure.align_ylabels()
    figure.suptitle(f"{name.replace('_', ' ')}, {counted(comparison.tokens, 'token')}", fontsize=10)
    said = "Framed: the most similar layer of each row. Colours span the values between different models."
    figure.supxlabel("\n".join(textwrap.wrap(said, 32 * len(names))), fontsize=7)
    return figure


def _write_values(axis: Any, matrix: Float[ndarray, "layers others"], middle: float) -> None:
    """The similarities in their cells, dark on the light half of the colours."""
    size = 7 - 0.4 * max(0, len(matrix.T) - 4)
    for (i, j), value in np.ndenumerate(matrix):
        if np.isfinite(value):
            colour = "black" if value > middle else "white"
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=size)


def _ticks(layers: int) -> list[int]:
    return list(range(0, layers, max(1, layers // 6)))


def plain(text: str) -> str:
    """Names of models and modules are no mathematics, and one line of text that XML can hold."""
    text = one_line(text)
    shown = text if len(text) <= 24 else text[:21] + "..."
    return shown.replace("$", r"\$")
