"""A model that processes on this machine share: transformers' tensor parallelism, every block in as many parts.

The process that was started has the first part and starts the others. They make every forward pass that it makes, and
end it at the same place: parts are added up in the middle of every block, and whoever adds waits for all.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from itda.devices import checked_device
from itda.errors import InputError, one_line
from itda.models import parameters
from itda.models.hooked_model import HookedModel
from itda.models.pretrained import PLACED, Survey, aligned, pretrained, survey
from itda.models.processes import Team, connection


class SharedModel(HookedModel):
    """A `HookedModel` whose every block is shared between processes; made by `load(..., tensor_parallel=N)`.

    Its activations are those of the model read whole up to rounding: parts are added in another order. The processes
    end with `close`, with the last reference to the model, or with this process, however that ends. `module` must not
    be called by itself: the other processes would not know.
    """

    def __init__(self, team: Team, *args: Any) -> None:
        self._team = team
        super().__init__(*args)

    def at(self, hooks: Iterable[int | str], tokenizer: Any) -> SharedModel:
        """The same model, to be read at other hook points."""
        return SharedModel(
            self._team, self.module, self._base, tokenizer, self._layout, hooks, self._missing, self._origin
        )

    def close(self) -> None:
        """End the other processes; the model cannot be read any more."""
        self._team.close()

    def provenance(self, hook: int | str) -> dict:
        """As that of `HookedModel`, with the number of processes, on which the last bits of an activation depend."""
        return super().provenance(hook) | {"tensor_parallel": self._team.size}

    def _try(self) -> None:
        super()._try()
        ids, paths = torch.zeros(2, 3, dtype=torch.int64), list(self._paths)
        mask = torch.ones_like(ids)
        with self._team.at_work("forward", paths, ids, mask, True):
            mine = super()._forward(ids, mask)
            for theirs in self._team.hear("found"):
                for path, x in mine.items():
                    if not _same(x.float().cpu(), torch.from_numpy(theirs[path])):
                        raise InputError(
                            f"`{self._layout.name(path)}` is computed in parts, of which each process has one "
                            "(`tensor_parallel`): read the output of a block, of its attention or of its MLP."
                        )

    def _readable(self) -> None:
        """Not tried: the other processes would wait for the end of a forward pass that they do not know of."""

    def _forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        with self._team.at_work("forward", list(self._paths), ids.cpu(), mask.cpu(), False):
            return super()._forward(ids, mask)

    def _sample(self, name: str) -> bytes:
        if name in self._fetched or parameters.is_there(self._base, name):
            return super()._sample(name)
        with self._team.at_work("gather", name):
            return super()._sample(name)

    def _logits(self, ids: Tensor, mask: Tensor, replace: Mapping[str, Any]) -> Tensor:
        raise InputError(
            f"`{self._layout.model}` is shared between processes, where no logits are computed: load it without "
            "`tensor_parallel`."
        )


class _Part(HookedModel):
    """The model in another process, which does what the first does."""

    def _try(self) -> None:
        """The first process tries."""

    def forward(self, paths: list[str], ids: Tensor, mask: Tensor, shown: bool) -> dict[str, Any] | None:
        self._paths = dict.fromkeys(paths)
        with suppress(InputError):  # which the first process raises at the same place
            found = self._forward(ids, mask)
            return {path: x.float().cpu().numpy() for path, x in found.items()} if shown else None
        return None

    def gather(self, name: str) -> None:
        with parameters.present(self._base, name):
            pass


def shared(model: Any, tokenizer: Any, hooks: Sequence[int | str], size: int, how: Mapping[str, Any]) -> SharedModel:
    """A model by name, loaded in `size` processes, of which this is one; `how` are the settings of `load_model`.

    Raises `InputError` for what cannot be shared, before any process is started.
    """
    if not isinstance(model, str | Path):
        raise InputError(
            "`model` is loaded already and used as it is: drop `tensor_parallel`, or pass the model's name."
        )
    if how["backend"] != "hooks" or how["remote"]:
        raise InputError("nnsight reads a model in one process: drop `tensor_parallel` or `backend`.")
    if how["stream_layers"]:
        raise InputError("A model that is streamed is read by one process: drop `tensor_parallel` or `stream_layers`.")
    if placed := [name for name in PLACED if how.get(name) is not None]:
        raise InputError(f"`{placed[0]}` says how weights are kept, and so does `tensor_parallel`: choose one of them.")
    place = _place(how["device"], size)
    found = survey(model, place, how)
    found.unpacked("tensor_parallel")
    _check_plan(found, size)
    team = Team(found.model, size, place.type, (found.model, list(hooks), dict(how)))
    try:
        team.meet()
        base, tokenizer, layout, missing = _load(found, hooks, tokenizer, place, size)
        team.hear("loaded")
        return SharedModel(team, base, base, tokenizer, layout, hooks, missing, found.origin)
    except BaseException as error:
        why = team.reason(1.0) if isinstance(error, Exception) else None
        team.close()
        if why is None or str(error) in why:  # which all may have met
            raise
        raise InputError(why) from error


def follow() -> None:
    """What the other processes do: load a part, do what the first process does, and end when it does."""
    tasks, say = connection()
    try:
        start = tasks.get()
        torch.set_num_threads(start.threads)
        torch.set_float32_matmul_precision(start.precision)
        model, hooks, how = start.load
        place = torch.device(start.kind)
        found = survey(model, place, how)
        say("here", None)
        start.enter()
        base, _, layout, missing = _load(found, hooks, False, place, start.size)  # it needs no tokenizer
        part = _Part(base, base, None, layout, hooks, missing)
        say("loaded", None)
        while (task := tasks.get()) is not None:
            what, *args = task
            answer = getattr(part, what)(*args)
            if answer is not None:
                say("found", answer)
        dist.destroy_process_group()
        os._exit(0)
    except BaseException as error:
        text = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        with suppress(OSError):
            say("failed", one_line(text.strip().partition("\n")[0]))
        time.sleep(0.5)  # in which it ends by itself if it is the first process that is gone
        os._exit(1)  # whatever may still wait for the others


# -- what can be shared -----------------------------------------------------------------------------------------------


def _place(device: Any, size: int) -> torch.device:
    """Where the first part comes; transformers gives each process a GPU of its own, or the CPU where there is none."""
    place = checked_device(device)
    if place.type not in ("cuda", "cpu") or place.index or (place.type == "cpu" and torch.cuda.is_available()):
        raise InputError(
            f"`device` is {str(device or place)!r}, and `tensor_parallel` takes the first {size} CUDA devices, or the "
            "CPU where there are none: drop one of the two."
        )
    if place.type == "cuda" and size > torch.cuda.device_count():
        raise InputError(
            f"`tensor_parallel` is {size}, and CUDA devices are {torch.cuda.device_count()}: pass at most that many."
        )
    gc.collect()  # a model that nothing refers to has left its group then
    if not dist.is_available() or dist.is_initialized() or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError(
            "`tensor_parallel` starts its processes itself, and this one is in a group of torch.distributed already: "
            "close the other model (`close()`), or run without torchrun."
        )
    return place


def _check_plan(found: Survey, size: int) -> None:
    """Raise `InputError` unless transformers knows how to share the model between `size` processes."""
    plan = getattr(found.skeleton, "_tp_plan", None)
    if not plan:
        raise InputError(
            f"`{found.model}` ({found.config.model_type}) has no plan in transformers by which processes could share "
            "it: drop `tensor_parallel`."
        )
    if hasattr(found.config, "quantization_config"):
        raise InputError(f"`{found.model}` is quantised, and such weights are not shared: drop `tensor_parallel`.")
    _config(size)
    if not any(style == "colwise" and "att" in name for name, style in plan.items()):
        return
    config = found.config.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if isinstance(heads, int) and heads % size:
            raise InputError(
                f"`tensor_parallel` is {size}, and `{found.model}` has {heads} {name.split('_', 1)[1]}, which "
                f"processes share evenly: pass a number that divides {heads}."
            )


def _config(size: int) -> Any:
    try:
        from transformers.distributed import DistributedConfig

        return DistributedConfig(tp_size=size)
    except (ImportError, TypeError) as error:
        import transformers

        raise InputError(
            f"`tensor_parallel` needs a newer transformers than {transformers.__version__}: upgrade it (5.23 works)."
        ) from error


def _load(found: Survey, hooks: Any, tokenizer: Any, place: torch.device, size: int) -> tuple[Any, Any, Any, Any]:
    """The part of this process, which `torch.distributed` knows, and the rest of what `pretrained` gives."""
    from torch.distributed.tensor import DTensor

    found = replace(found, kwargs=found.kwargs | {"distributed_config": _config(size)})
    base, *rest = pretrained(found, hooks, tokenizer, place)
    for module in base.modules():
        for name, p in module._parameters.items():
            if isinstance(p, DTensor) and p.device.type == "cpu" and p.to_local().data_ptr() % 64:  # as in `aligned`
                module._parameters[name] = nn.Parameter(p.detach().clone(), requires_grad=False)
    return aligned(base), *rest


def _same(x: Tensor, y: Tensor) -> bool:
    """Whether two processes have the same, and not each its part: rounding aside, for which GPUs may differ."""
    return x.shape == y.shape and bool((x - y).abs().max() <= 0.05 * x.abs().max())
