"""Where the blocks of a model are, and what its hook points are called."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from itda.errors import InputError, NoSuchHook

_LENS_NAME = re.compile(r"blocks\.(\d+)\.hook_(resid_post|resid_pre|attn_out|mlp_out)")  # TransformerLens
_ATTENTION, _MLP = ("attn", "self_attn", "attention"), ("mlp", "feed_forward", "fc2")


@dataclass(frozen=True)
class Layout:
    """Where the blocks of a model are. Paths are those in the base model, which has no language modelling head."""

    model: str  # what errors call it
    model_type: str
    prefix: str  # the base model's name in the causal LM, "" where it has none
    blocks: str  # path of the list of blocks
    n_layers: int
    paths: frozenset[str]  # of every module

    @classmethod
    def of(cls, base: Any, model: str) -> Layout:
        """The layout of `base`: its blocks are the one `ModuleList` as long as its config has hidden layers."""
        n_layers = getattr(base.config.get_text_config(), "num_hidden_layers", -1)
        lists = [name for name, m in base.named_modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
        outer = [name for name in lists if not any(name.startswith(other + ".") for other in lists)]
        if len(outer) != 1:
            raise InputError(
                f"The blocks of `{model}` cannot be told: a {type(base).__name__} has {len(outer)} lists of as many "
                f"modules as its config has hidden layers ({n_layers}), and one was wanted; use a causal language "
                "model or an encoder."
            )
        paths = frozenset(name for name, _ in base.named_modules() if name)
        return cls(model, base.config.model_type, base.base_model_prefix, outer[0], n_layers, paths)

    def name(self, path: str) -> str:
        """The canonical name of the hook point at `path`: as the causal LM has it, `transformer.h.8`."""
        return f"{self.prefix}.{path}" if self.prefix else path

    def layer(self, path: str) -> int | None:
        """The block that `path` is, or lies in; None outside the blocks."""
        head, _, rest = path.partition(self.blocks + ".")
        return int(rest.partition(".")[0]) if rest and not head else None

    def needed(self, hooks: Sequence[int | str]) -> int | None:
        """How many blocks must run for `hooks`; None for all, where one is outside and may come after them."""
        layers = [self.layer(self.path(hook)) for hook in hooks]
        inside = [layer for layer in layers if layer is not None]
        return max(inside) + 1 if inside == layers else None

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
        known = {self.name(path): path for path in self.paths}
        near = difflib.get_close_matches(self.name(hook.removeprefix(self.prefix + ".")), sorted(known), 3, 0.5)
        raise InputError(
            f"`{self.model}` has no module `{hook}`: name a layer (0 to {self.n_layers - 1}) or one of its modules "
            "(`itda hooks` lists them)"
            + (f", such as {', '.join(f'`{name}`' for name in near)}." if near else f", such as `{self._example()}`.")
        )

    def _block(self, layer: int) -> str:
        if isinstance(layer, bool) or not hasattr(layer, "__index__"):
            raise InputError(f"A layer is a whole number, not {layer!r}: pass one of 0 to {self.n_layers - 1}.")
        if not -self.n_layers <= layer < self.n_layers:
            raise InputError(
                f"`{self.model}` has no layer {int(layer)}: it has {self.n_layers} layers, "
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
                f"name the module that you mean by its path in the model, such as `{self._example()}`."
            )
        return f"{block}.{attention if what == 'attn_out' else mlp}"

    def _example(self) -> str:
        inner = sorted(path for path in self.paths if path.startswith(f"{self.blocks}.0."))
        return self.name(inner[0] if inner else f"{self.blocks}.0")
