"""A model to read, by name or loaded: which of the ways to hold it is taken is decided here, in `load_model`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from itda.arguments import listed
from itda.devices import checked_device, free_bytes
from itda.errors import InputError, counted
from itda.models.adapters import unwrapped as unwrapped_module
from itda.models.classes import base_of
from itda.models.hooked_model import HookedModel
from itda.models.hub import load_tokenizer
from itda.models.layout import Layout
from itda.models.nnsight_model import TracedModel, remote_model, unwrapped
from itda.models.pretrained import Survey, adapted, causal, pretrained, random_model, survey
from itda.models.shared_model import shared
from itda.models.streamed_model import StreamedModel
from itda.progress import tell
from itda.settings import takes, verbs


@takes(verbs.LOAD)
def load_model(
    model: Any, tokenizer: Any = None, *, hooks: int | str | Sequence[int | str], **settings: Unpack[verbs.Loading]
) -> HookedModel:
    """A model to read `hooks` from: layers (the residual stream after that block), module paths, TransformerLens names.

    `model` is a hub id or a local folder, of which the blocks up to the last one needed are loaded (what is no setting
    here goes to `from_pretrained`), or a loaded one, Hugging Face module or `HookedModel`, used as and where it is.
    `dtype` "auto" is that of the checkpoint on CUDA; else float32, but bfloat16 for such a checkpoint on a CPU with
    AMX. Activations are those of the weights as they are: TransformerLens' folded and centred weights give others under
    the same names.

    `backend` "nnsight" reads the same in nnsight's traces, also of a model of nnsight's; with `remote`, on NDIF (see
    `itda.models.nnsight_model.RemoteModel`).

    With `stream_layers` one block at a time is in memory (`itda.models.streamed_model.StreamedModel`, which takes
    `state_gb` and `state_dir`); None is for where the weights take more than 0.9 of the memory that is free.

    With `tensor_parallel` so many processes on this machine, each with a GPU, share every block
    (`itda.models.shared_model.SharedModel`); 1 is as without.
    """
    hooks = listed(hooks)
    if not hooks:
        raise InputError("No hook point is given: pass at least one layer or module path.")
    how: dict[str, Any] = dict(settings)
    if (size := how["tensor_parallel"]) is not None and size != 1:
        tell(f"loading {model} in {counted(size, 'process')}")
        return _said(shared(model, tokenizer, hooks, size, how), how["dtype"])
    if how["backend"] != "hooks" or how["remote"]:
        return _traced(model, tokenizer, hooks, how)
    if how["device"] is not None and how["device_map"] is not None:
        raise InputError("Give either `device` or `device_map`, not both.")
    if not isinstance(model, nn.Module | HookedModel):
        return _said(_named(model, tokenizer, hooks, how), how["dtype"])
    defaults = {name: declared.default for name, declared in verbs.LOAD.settings.items()}
    unused = ("trust_remote_code", "state_gb", "state_dir", "tensor_parallel")  # which say nothing of a loaded model
    idle = [
        name for name, value in how.items() if name not in unused and value not in (defaults.get(name), None, False)
    ]
    if idle:
        raise InputError(f"`model` is loaded already and used as it is: drop `{idle[0]}`, or pass the model's name.")
    if isinstance(model, HookedModel):
        tokenizer = model.tokenizer if tokenizer is None else load_tokenizer(tokenizer)
        return model.at(hooks, tokenizer)
    from transformers import PreTrainedModel

    model, origin = unwrapped_module(model)
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"`model` is a {type(model).__name__}: pass a Hugging Face `PreTrainedModel`, the id of one, or its folder."
        )
    if tokenizer is None:
        raise InputError("`model` is a loaded module, which does not know its tokenizer: pass `tokenizer=` too.")
    base = base_of(model)
    layout = Layout.of(base, model.config._name_or_path or type(model).__name__)
    return HookedModel(model, base, load_tokenizer(tokenizer), layout, hooks, origin=origin)


def _traced(model: Any, tokenizer: Any, hooks: list[int | str], how: dict[str, Any]) -> HookedModel:
    """`load_model` with a backend that is not our own."""
    if how["backend"] != "nnsight":
        raise InputError("`remote` is nnsight's: pass `backend='nnsight'` (`--backend nnsight`) too.")
    if how["remote"]:
        return remote_model(model, tokenizer, hooks, how)
    model, tokenizer = unwrapped(model, tokenizer)
    return TracedModel.of(load_model(model, tokenizer, hooks=hooks, **(how | {"backend": "hooks"})))


def _named(model: Any, tokenizer: Any, hooks: list[int | str], how: dict[str, Any]) -> HookedModel:
    """`load_model` for a hub id or a folder."""
    place = checked_device(how["device"])
    tell(f"loading {model}")
    return _held(survey(model, place, how), tokenizer, hooks, place, how)


def _held(
    found: Survey, tokenizer: Any, hooks: list[int | str], place: torch.device, how: Mapping[str, Any]
) -> HookedModel:
    """A model that was surveyed, in the way that suits it and the memory."""
    streams = how["stream_layers"]
    if streams:
        found.unpacked("stream_layers")
    if found.adapter is not None:
        return _hooked(*adapted(found, tokenizer, place), found, hooks)
    if streams or (streams is None and found.bytes(hooks) > 0.9 * free_bytes(place)):
        return StreamedModel(found, hooks, tokenizer, device=place, state_gb=how["state_gb"], folder=how["state_dir"])
    base, tokenizer, layout, missing = pretrained(found, hooks, tokenizer, place)
    return HookedModel(base, base, tokenizer, layout, hooks, missing, found.origin)


def _said(model: HookedModel, dtype: Any) -> HookedModel:
    """The model, after what `dtype` came to was told: one model has other activations in another."""
    chosen = " (--dtype auto)" if dtype in (None, "auto") else ""
    tell(f"reading {model._layout.model} in {str(model.dtype).removeprefix('torch.')} on {model.device}{chosen}")
    return model


def _hooked(whole: Any, tokenizer: Any, found: Survey, hooks: list[int | str]) -> HookedModel:
    """A whole model that was loaded by name."""
    base = base_of(whole)
    return HookedModel(whole, base, tokenizer, Layout.of(base, found.name), hooks, origin=found.origin)


@takes(verbs.LOAD)
def language_model(
    model: Any, tokenizer: Any = None, *, hooks: int | str | Sequence[int | str], **settings: Unpack[verbs.Loading]
) -> HookedModel:
    """As `load_model`, but whole: all blocks and the language modelling head, so that it has `logits`.

    Of a model without a head (an encoder), or one that does not fit into memory whole, it is what `load_model` gives.
    """
    if not isinstance(model, nn.Module | HookedModel):
        place = checked_device(settings["device"])
        tell(f"loading {model}")
        found = survey(model, place, settings)
        with_head = causal(found, tokenizer, place) if found.bytes() <= 0.9 * free_bytes(place) else None
        places = listed(hooks)
        if with_head is not None:
            return _said(_hooked(*with_head, found, places), settings["dtype"])
        if settings["backend"] == "hooks" and settings["tensor_parallel"] in (None, 1):
            return _said(_held(found, tokenizer, places, place, settings), settings["dtype"])
    return load_model(model, tokenizer, hooks=hooks, **settings)


def untrained(
    model: str | Path | HookedModel,
    tokenizer: Any,
    *,
    seed: int = 0,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype = torch.float32,
) -> HookedModel:
    """A model of the same config with random weights as its family draws them, with all of its blocks.

    They are of `dtype`, or that of a loaded model.
    What such models share is architecture, tokens and chance: the control of every comparison.
    """
    if isinstance(model, HookedModel):
        base = random_model(model.module.config, seed, model.device, trust_remote_code, model.dtype)
    else:
        base = random_model(model, seed, device, trust_remote_code, dtype)
    return load_model(base, tokenizer, hooks=-1)
