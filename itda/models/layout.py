"""Where the blocks of a model are, and what its hook points are called."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from itda.errors import InputError, NoSuchHook, counted
from itda.models.outputs import readable

_LENS_NAME = re.compile(r"blocks\.(\d+)\.hook_(resid_post|resid_pre|attn_out|mlp_out)")  # TransformerLens
_ATTENTION, _MLP = ("attn", "self_attn", "attention"), ("mlp", "feed_forward", "fc2")


@dataclass(frozen=True)
class Layout:
    """Where the blocks of a model are. Paths are those in the base model, which has no language modelling head."""

    model: str  # what errors call it
    model_type: str
    prefix: str  # the base model's name in the causal LM, "" where it has none
    blocks: str  # path of the list of blocks; "" where that cannot be told
    n_layers: int
    paths: frozenset[str]  # of every module
    untold: str = ""  # why the blocks cannot be told
    base: Any = field(default=None, compare=False, repr=False)  # to try an example on

    @classmethod
    def of(cls, base: Any, model: str) -> Layout:
        """The layout of `base`: its blocks are the one `ModuleList` as long as its config has hidden layers.

        Of a model that also sees or hears, that is looked for in the part that reads text. Where there is none, or
        more than one, hook points are paths.
        """
        modules = {name: m for name, m in base.named_modules() if name}
        own = base.base_model_prefix
        prefix = "" if isinstance(getattr(base, own, None) if own else None, nn.Module) else own
        part, n_layers = _text_part(base, modules)
        lists = [name for name, m in modules.items() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
        outer = [name for name in lists if not any(name.startswith(other + ".") for other in lists)]
        if len(inner := [name for name in outer if name.startswith(part)]) == 1:
            outer = inner
        blocks, untold = outer[0] if len(outer) == 1 else "", ""
        if not blocks:
            untold = (
                f"The blocks of `{model}` cannot be told: a {type(base).__name__} has {len(outer)} lists of as many "
                f"modules as its config has hidden layers ({n_layers}), and one was wanted; name a module by its path "
                "in place of a layer (`--hook`; `itda hooks` lists them)."
            )
        return cls(model, base.config.model_type, prefix, blocks, max(1, n_layers), frozenset(modules), untold, base)

    def __reduce__(self) -> tuple:  # other processes need no modules for it
        kept = (self.model, self.model_type, self.prefix, self.blocks, self.n_layers, self.paths, self.untold)
        return Layout, kept

    def name(self, path: str) -> str:
        """The canonical name of the hook point at `path`: as the causal LM has it, `transformer.h.8`."""
        return f"{self.prefix}.{path}" if self.prefix else path

    def layer(self, path: str) -> int | None:
        """The block that `path` is, or lies in; None outside the blocks."""
        if not self.blocks:
            return None
        head, _, rest = path.partition(self.blocks + ".")
        return int(rest.partition(".")[0]) if rest and not head else None

    def needed(self, hooks: Sequence[int | str]) -> int | None:
        """How many blocks must run for `hooks`; None for all, where one is outside and may come after them."""
        layers = [self.layer(self.path(hook)) for hook in hooks]
        inside = [layer for layer in layers if layer is not None]
        return max(inside) + 1 if inside and inside == layers else None

    def path(self, hook: int | str) -> str:
        """The path that `hook` names: a layer, a module path with or without the prefix, a TransformerLens name.

        Raises `NoSuchHook` for what is none of them here.
        """
        try:
            return self._path(hook)
        except InputError as error:
            raise NoSuchHook(str(error), hook) from None

    def _path(self, hook: int | str) -> str:
        if not isinstance(hook, str):
            return self._block(hook)
        if match := _LENS_NAME.fullmatch(hook):
            return self._lens(hook, int(match[1]), match[2])
        for path in (hook.removeprefix(self.prefix + "."), hook):
            if path in self.paths:
                return path
        tried = self._readable()
        known = [self.name(path) for path in tried or sorted(self.paths)]
        near = difflib.get_close_matches(self.name(hook.removeprefix(self.prefix + ".")), sorted(known), 3, 0.5)
        layers = f"a layer (0 to {self.n_layers - 1}) or " if self.blocks else ""
        raise InputError(
            f"`{self.model}` has no module `{hook}`: name {layers}one of its modules (`itda hooks` lists them)"
            + (f", such as {', '.join(f'`{name}`' for name in near)}." if near else f"{self._example(tried)}.")
        )

    def _block(self, layer: int) -> str:
        if isinstance(layer, bool) or not hasattr(layer, "__index__"):
            raise InputError(f"A layer is a whole number, not {layer!r}: pass one of 0 to {self.n_layers - 1}.")
        if self.untold:
            raise InputError(self.untold)
        if not -self.n_layers <= layer < self.n_layers:
            raise InputError(
                f"`{self.model}` has no layer {int(layer)}: it has {counted(self.n_layers, 'layer')}, "
                f"so pass one of 0 to {self.n_layers - 1}."
            )
        return f"{self.blocks}.{layer % self.n_layers}"

    def _lens(self, hook: str, layer: int, what: str) -> str:
        """The path of TransformerLens' `hook`. Its processing of the weights (folding, centring) is not ours."""
        if what == "resid_pre":
            if layer == 0:
                raise InputError(
                    f"`{hook}` is the input of the first block, which is no module's output: "
                    "name the embedding's module instead."
                )
            return self._block(layer - 1)
        block = self._block(layer)
        if what == "resid_post":
            return block
        children = [path[len(block) + 1 :] for path in self.paths if path.startswith(block + ".")]
        attention, mlp = (next((c for c in kind if c in children), None) for kind in (_ATTENTION, _MLP))
        if "post_feedforward_layernorm" in children:  # what is added to the residual stream is normalised first
            attention, mlp = "post_attention_layernorm", "post_feedforward_layernorm"
        if attention is None or mlp is None:  # as in BERT, whose `attention` ends with the sum and its norm
            raise InputError(
                f"`{hook}` has no counterpart in `{self.model}` ({self.model_type}): "
                f"name the module that you mean by its path in the model{self._example(self._readable())}."
            )
        return f"{block}.{attention if what == 'attn_out' else mlp}"

    def _readable(self) -> list[str]:
        """The paths of the modules that can be read, tried on what is at hand; none where that cannot be tried."""
        device = next((p.device for p in self.base.parameters()), None) if self.base is not None else None
        return sorted(readable(self.base, device) or ()) if device is not None else []

    def _example(self, tried: list[str]) -> str:
        """Words that name one of these modules, in the first block where that is known."""
        inner = [path for path in tried if self.layer(path) == 0 and path != f"{self.blocks}.0"]
        return f", such as `{self.name((inner or tried)[0])}`" if tried else ""


def _text_part(base: Any, modules: dict[str, nn.Module]) -> tuple[str, int]:
    """What the paths in the part of `base` that reads text begin with, "" for all; and how many layers that has."""
    candidates: list[Any] = []
    if not getattr(base.config, "is_encoder_decoder", False):
        with suppress(Exception):  # code from elsewhere
            candidates.append(base.get_decoder())
        candidates += [getattr(base, name, None) for name in ("language_model", "text_model")]
    for path, module in modules.items():
        if any(module is candidate for candidate in candidates):
            n_layers = _n_layers(getattr(module, "config", None))
            return f"{path}.", _n_layers(base.config) if n_layers < 0 else n_layers
    return "", _n_layers(base.config)


def _n_layers(config: Any) -> int:
    """The hidden layers of a text model by its config; -1 where it says none."""
    with suppress(AttributeError):
        n_layers = getattr(config.get_text_config(), "num_hidden_layers", -1)
        return n_layers if isinstance(n_layers, int) else -1
    return -1
