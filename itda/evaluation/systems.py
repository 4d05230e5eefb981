"""What can stand in one table: anything that writes activations as sparse sums of directions."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from itda.codes import Codes
from itda.dictionary.itda import ITDA
from itda.errors import InputError, shortened
from itda.progress import tell
from itda.saes.sae import SAE, standardised

MOST = 1024  # atoms of one token, where it may have as many as it needs
ENTRIES = 1 << 21  # of codes that are held at a time before their unused places are cut off


@dataclass(frozen=True)
class System:
    """Anything that writes activations as a sparse sum: `run` maps (tokens, d) to reconstructions and codes.

    `atoms` (n_atoms, d) are its directions, of unit norm. Errors of tokens are relative to `mean` (d,) and over `scale`
    (d,), if not None: the dictionary's, as its loss has them, also for what is measured beside it. `cost` is what is
    known of the making, for the table.

    x_hat = sum_i code_i row_i + `bias`, with `rows` (n_atoms, d) in the units of x, `atoms` if None; where tokens are
    scaled one by one, this holds of `inner(x)` in place of x.
    """

    name: str
    atoms: Float[Tensor, "n_atoms d"]
    run: Callable[[Float[Tensor, "tokens d"]], tuple[Float[Tensor, "tokens d"], Codes]]
    k: int | None = None
    cost: dict[str, Any] = field(default_factory=dict)
    hook_point: str | None = None  # where it was made for, if it says so
    mean: Float[Tensor, " d"] | None = None
    scale: Float[Tensor, " d"] | None = None
    made_for: str | None = None  # the model, if it says that
    rows: Float[Tensor, "n_atoms d"] | None = None
    bias: Float[Tensor, " d"] | None = None
    inner: Callable[[Float[Tensor, "tokens d"]], Float[Tensor, "tokens d"]] | None = None

    @classmethod
    def of(cls, dictionary: ITDA, name: str, **settings: Any) -> System:
        """An ITDA, encoded with `settings` (k, method)."""

        def run(x: Tensor) -> tuple[Tensor, Codes]:
            codes = dictionary.encode(x, **settings)
            return dictionary.decode(codes), codes

        k, scale = settings.get("k"), dictionary.scale
        own: dict[str, Any] = {"mean": dictionary.mean, "scale": scale, "bias": dictionary.mean}
        own["rows"] = None if scale is None else dictionary.atoms * scale
        return cls(name, dictionary.atoms, run, dictionary.k if k is None else k, **own)

    @classmethod
    def needed(cls, dictionary: ITDA, name: str, tol: float, **settings: Any) -> System:
        """An ITDA of which every token has as many atoms as leave a relative error of `tol` or less of it.

        At most as many as there are dimensions, or `MOST`.
        """
        most = min(MOST, dictionary.d)
        plain = cls.of(dictionary, name, **settings | {"k": most, "tol": tol})

        def run(x: Tensor) -> tuple[Tensor, Codes]:
            found = [plain.run(part) for part in x.split(max(1, ENTRIES // most))]
            parts, codes = zip(*found, strict=True)
            return torch.cat(parts), Codes.concat([each.trimmed() for each in codes])

        return replace(plain, run=run, k=None)

    @classmethod
    def of_sae(cls, sae: SAE, name: str, **cost: Any) -> System:
        """An SAE."""

        def run(x: Tensor) -> tuple[Tensor, Codes]:
            codes = sae.encode(x)
            return sae.decode(codes, x), codes

        model = sae.metadata.get("model_name")
        made_for = model if isinstance(model, str) and model else None
        own: dict[str, Any] = {"rows": sae.W_dec, "bias": sae.b_dec}
        own |= {} if sae.normalize == "none" else {"inner": standardised}
        return cls(name, sae.atoms, run, sae.k, cost, sae.hook_point, made_for=made_for, **own)


def check_model(system: System, model: str, known: bool = True) -> None:
    """Raise `InputError` for a system that says it was made for another model than `model`, a hub id or a folder.

    TransformerLens has names of its own, which leave out the organisation. A folder may be called anything, and
    of a loaded module (not `known`) there may be no name: then it is told, and measured all the same.
    """
    if system.made_for is None or _bare(system.made_for) == _bare(model):
        return
    if os.path.exists(model) or not known:
        tell(f"{system.name} was made for {system.made_for}; whether {model} is that cannot be told")
        return
    raise InputError(
        f"{system.name} was made for the model {shortened(system.made_for)}, and the dictionary for "
        f"{shortened(model)}: give one of the same model, or measure it all the same with `force` (`--force`)."
    )


def check_hook(system: System, hook: str, layer: int | None) -> None:
    """Raise `InputError` for a system of another hook point than `hook`, in block `layer`; no model is at hand."""
    own = system.hook_point
    block = hook.rpartition(".")[2] == str(layer)
    if own is not None and own != hook and not (block and own == f"blocks.{layer}.hook_resid_post"):
        raise InputError(
            f"{system.name} was made for {shortened(own)}, and the dictionary for {hook}: give one of the same "
            "place, or measure it all the same with `force` (`--force`)."
        )


def _bare(model: str) -> str:
    """A model's name without organisation or folder, as TransformerLens may have it."""
    name = model.rstrip("/").rpartition("/")[2].lower()
    return {"gpt2-small": "gpt2"}.get(name, name)
