"""A model that several processes read together, each with all of it.

Nothing that a worker reads depends on which worker it is, and what they read comes back in the order of the stream, so
no result depends on how many there are.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from itda._version import __version__
from itda.errors import InputError, counted
from itda.models import loading as models
from itda.models.hooked_model import Group, HookedModel
from itda.progress import tell
from itda.training.cluster import Crew, Surroundings, connected, shares

EACH = 2  # groups of rows that a worker has at a time: the next is there when it is done with one
AHEAD = 4  # groups per worker that may be in flight or wait for an earlier one


@dataclass(frozen=True)
class Description:
    """What a worker says of the model it has loaded; all must say the same."""

    attributes: dict[str, Any] = field(repr=False)  # of its `HookedModel`
    max_length: int | None
    provenance: dict[str, dict]  # by hook point
    versions: dict[str, str]
    processor: str | None
    threads: int
    pid: int

    def differs(self, other: Description) -> str | None:
        """In what, if they do not read alike to the last bit."""
        for hook, mine in self.provenance.items():
            if mine != other.provenance.get(hook):
                return "weights or tokenizers"
        if self.versions != other.versions:
            return f"versions ({self.versions} and {other.versions})"
        return f"processors ({self.processor} and {other.processor})" if self.processor != other.processor else None


class _Reader:
    """In a worker: a model, and the reading of it."""

    def start(self, around: Surroundings, model: str, tokenizer: Any, hooks: list, settings: dict) -> Description:
        around.enter()
        self.model = models.load_model(model, tokenizer, hooks=hooks, stream_layers=False, **settings)
        names = ("tokenizer", "n_layers", "dtype", "d", "hook_points", "_layout", "_vocabulary")
        return Description(
            {name: getattr(self.model, name) for name in names},
            self.model.max_length,
            {hook: self.model.provenance(hook) for hook in self.model.hook_points},
            versions(),
            self.model.processor,
            torch.get_num_threads(),
            os.getpid(),
        )

    def read(self, ids: Any, mask: Any) -> dict[str, tuple[Any, torch.dtype]]:
        """Bytes and type of the activations at every hook point: NumPy knows no bfloat16."""
        found = self.model.read(ids, mask)
        return {name: (x.cpu().contiguous().view(torch.uint8).numpy(), x.dtype) for name, x in found.items()}


class Workers(HookedModel):
    """A model that several processes read together, each with all of it; it stands where a `HookedModel` does.

    `read_all` hands the groups of rows out as workers are free, and gives their activations in the order of the groups.
    A group has the same rows, so the same shape, whoever reads it, and workers take over the number of threads from
    here; what they read is what this process would read on a processor of their kind, to the last bit.
    """

    def __init__(self, crew: Crew, found: Description, device: torch.device) -> None:
        self.crew, self._found, self.device = crew, found, device
        for name, value in found.attributes.items():
            setattr(self, name, value)
        self._is_causal = False

    @property
    def max_length(self) -> int | None:
        """The longest row that the model has positions for; None where there is no limit."""
        return self._found.max_length

    def at(self, hooks: Iterable[int | str], tokenizer: Any) -> HookedModel:
        """These workers, if it is these hook points that they read."""
        if {self.canonical(hook) for hook in hooks} != set(self.hook_points):
            raise InputError(
                f"These workers read {', '.join(self.hook_points)}: ask for those, or load the model anew."
            )
        return self

    @property
    def processor(self) -> str | None:
        """That of the workers."""
        return self._found.processor

    def provenance(self, hook: int | str) -> dict:
        """What an activation at `hook` comes from, as JSON can hold it."""
        return dict(self._found.provenance[self.canonical(hook)])

    def read(self, ids: Any, mask: Any) -> dict[str, Tensor]:
        """The activations at every hook point, by canonical name, as one worker reads them."""
        ids, mask = self._checked(ids, mask)
        return next(self.read_all([Group(0, ids, mask)]))

    def read_all(self, groups: Iterable[Group]) -> Iterator[dict[str, Tensor]]:
        """What `read` gives of group after group, in their order."""
        waiting: dict[int, dict[str, Tensor]] = {}
        turn = count()
        at = next(turn)
        calls = ((ids.numpy(), mask.numpy()) for ids, mask in (self._checked(g.ids, g.mask) for g in groups))
        ahead = AHEAD * len(self.crew.workers)
        for index, parts in self.crew.run("read", calls, each=EACH, ahead=ahead):
            # Copied out of Ray's store, which then has room again.
            waiting[index] = {
                name: torch.from_numpy(data.copy()).view(dtype).to(self.device) for name, (data, dtype) in parts.items()
            }
            del parts
            while at in waiting:
                yield waiting.pop(at)
                at = next(turn)


@contextmanager
def workers_of(
    model: Any,
    hooks: Sequence[int | str],
    *,
    workers: int | None = None,
    ray: bool | str = False,
    tokenizer: Any = None,
    device: str | None = None,
    **settings: Any,
) -> Iterator[Workers]:
    """Processes that have loaded `model`: so many `workers`, else one for each GPU, else one for each machine.

    `ray` is the address of a cluster, or True for this machine. `settings` are those of `itda.load_model`.
    """
    if not isinstance(model, str | Path):
        raise InputError("Workers load the model by themselves: give its id or its folder, not the loaded model.")
    found: list[Description] = []

    def check(answer: Description) -> None:
        if answer.versions["itda"] != __version__:
            raise InputError(
                f"A worker has itda {answer.versions['itda']}, and this is {__version__}: install one for all."
            )
        if found and (what := found[0].differs(answer)):
            raise InputError(f"Workers differ in their {what}, so they do not read alike: use machines that are alike.")
        found.append(answer)

    with connected(ray, workers) as module:
        number, gpus = shares(module, workers, device, settings.get("device_map"))
        settings["device"] = "cuda" if str(device).startswith("cuda") else device  # Ray says which
        args = (Surroundings.here(), str(model), tokenizer, list(hooks), settings)
        tell(f"loading {model} in {counted(number, 'process')}")
        crew = Crew(module, _Reader, args, number, gpus=gpus, check=check)
        try:
            crew.first()
            kind = str(found[0].attributes["dtype"]).removeprefix("torch.")
            tell(f"reading {model} in {kind}" + " (--dtype auto)" * (settings.get("dtype") in (None, "auto")))
            yield Workers(crew, found[0], _own_device(device))
        finally:
            crew.close()


def versions() -> dict[str, str]:
    """Of what decides the last bits of an activation, as far as it is software."""
    return {"itda": __version__, "torch": torch.__version__, "transformers": metadata.version("transformers")}


def _own_device(device: str | None) -> torch.device:
    """Where this process builds with what the workers read."""
    if device is not None and not str(device).startswith("cuda"):
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
