"""Where a model can be read: the names of its hook points, before any of its weights is."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from itda.arguments import FLAG, PATH, TEXT, checks
from itda.devices import checked_device
from itda.errors import InputError, counted, one_line
from itda.models.layout import Layout
from itda.models.pretrained import survey
from itda.report.tables import columns
from itda.results import Report

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

LENS = ("resid_post", "attn_out", "mlp_out")  # of TransformerLens' names, those that modules have


@dataclass(frozen=True, repr=False)
class HookPoints(Report):
    """The modules of a model, by the names that `hook` takes; made by `hook_points`.

    Those that a text does not pass through, or that give no vector for each token, are refused when they are read.
    """

    model: str
    model_type: str
    n_layers: int
    d: int | None  # width of the residual stream, as the config says it
    hook_points: list[dict[str, Any]]  # name, layer (None outside of the blocks), kind (its class), alias or None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        width = "" if self.d is None else f" of width {self.d}"
        head = f"{self.model} · {self.model_type} · {counted(self.n_layers, 'layer')}{width}"
        yield Text(one_line(head), style="bold", overflow="fold")
        table = columns("what it is", label="the same as", first="hook point", left=["what it is"])
        for name, (layers, kinds, alias) in self._alike().items():
            which = "" if len(layers) in (0, self.n_layers) else f" (N: {', '.join(map(str, layers))})"
            table.add_row(Text(one_line(name + which)), Text(one_line(", ".join(kinds))), alias)
        yield table
        number = f"N is 0 to {self.n_layers - 1}" if self.n_layers > 1 else "N is 0"
        said = "a hook point is the output of its module, and can be read if that is one vector for each token"
        yield Text(f"{number}; {said}", style="dim")

    def _alike(self) -> dict[str, tuple[list[int], list[str], str]]:
        """What all blocks have at one place, by its name with N for the number of the block: layers, kinds, alias."""
        found: dict[str, tuple[list[int], list[str], str]] = {}
        for point in self.hook_points:
            name, layer, alias = point["name"], point["layer"], point["alias"] or ""
            if layer is not None:
                name, alias = (re.sub(rf"\.{layer}(?=\.|$)", ".N", one, count=1) for one in (name, alias))
                alias += ", --layer N" * alias.endswith("resid_post")
            layers, kinds, _ = found.setdefault(name, ([], [], alias))
            layers += [] if layer is None else [layer]
            kinds += [] if point["kind"] in kinds else [point["kind"]]
        return found


@checks(model=PATH, revision=TEXT, trust_remote_code=FLAG)
def hook_points(
    model: str | os.PathLike, *, revision: str | None = None, trust_remote_code: bool = False
) -> HookPoints:
    """Where the model of a hub id or folder can be read; from its config alone, without its weights.

    Raises `InputError` for what is no such model, and for one that says what it is made of only in its weights.
    """
    found = survey(str(model), checked_device("cpu"), {"revision": revision, "trust_remote_code": trust_remote_code})
    if found.skeleton is None:
        raise InputError(
            f"What `{model}` is made of cannot be told without its weights: load it in Python, and list its "
            "`named_modules()`."
        )
    layout, width = found.layout, getattr(found.config.get_text_config(), "hidden_size", None)
    aliases = {}
    for alias in (f"blocks.{layer}.hook_{what}" for layer in range(layout.n_layers) for what in LENS):
        with suppress(InputError):
            aliases[layout.path(alias)] = alias
    return HookPoints(
        model=layout.model,
        model_type=layout.model_type,
        n_layers=layout.n_layers,
        d=width if isinstance(width, int) else None,  # vision models have one for each stage
        hook_points=[_point(layout, path, module, aliases) for path, module in _modules(found.skeleton)],
    )


def _modules(base: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that are more than a list of others, by their paths."""
    return [(path, m) for path, m in base.named_modules() if path and not isinstance(m, nn.ModuleList | nn.ModuleDict)]


def _point(layout: Layout, path: str, module: nn.Module, aliases: dict[str, str]) -> dict[str, Any]:
    kind = type(module).__name__
    return {"name": layout.name(path), "layer": layout.layer(path), "kind": kind, "alias": aliases.get(path)}
