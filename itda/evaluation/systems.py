"""What can stand in one table: anything that writes activations as sparse sums of directions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from itda.codes import Codes
from itda.dictionary.itda import ITDA


@dataclass(frozen=True)
class System:
    """Anything that writes activations as a sparse sum: `run` maps (tokens, d) to reconstructions and codes.

    `atoms` (n_atoms, d) are its directions, of unit norm. Errors of tokens are relative to `mean` (d,) and over `scale`
    (d,), if not None: the dictionary's, as its loss has them, also for what is measured beside it. `cost` is what is
    known of the making, for the table.
    """

    name: str
    atoms: Float[Tensor, "n_atoms d"]
    run: Callable[[Float[Tensor, "tokens d"]], tuple[Float[Tensor, "tokens d"], Codes]]
    k: int | None = None
    cost: dict[str, Any] = field(default_factory=dict)
    hook_point: str | None = None  # where it was made for, if it says so
    mean: Float[Tensor, " d"] | None = None
    scale: Float[Tensor, " d"] | None = None

    @classmethod
    def of(cls, dictionary: ITDA, name: str, **settings: Any) -> System:
        """An ITDA, encoded with `settings` (k, method)."""

        def run(x: Tensor) -> tuple[Tensor, Codes]:
            codes = dictionary.encode(x, **settings)
            return dictionary.decode(codes), codes

        k = settings.get("k")
        own: dict[str, Any] = {"mean": dictionary.mean, "scale": dictionary.scale}
        return cls(name, dictionary.atoms, run, dictionary.k if k is None else k, **own)
