"""Hook points read through nnsight: the same activations, from a model here or on a server (NDIF)."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from itda.errors import InputError, one_line
from itda.models.hooked_model import HookedModel, rows_of
from itda.models.hub import load_tokenizer
from itda.models.layout import Layout
from itda.models.pretrained import handed_on, survey


class TracedModel(HookedModel):
    """A `HookedModel` that reads in traces of nnsight; in all else, its weights' fingerprint too, it is the same.

    nnsight leaves a controller in the modules, which does nothing outside a trace.
    """

    _envoy: Any  # what nnsight made of the base model
    _places: list[Any]  # and of the modules at the hook points

    @classmethod
    def of(cls, model: HookedModel) -> TracedModel:
        """The same model and hook points, read by nnsight. How they come one after another was seen without it."""
        if isinstance(model, TracedModel):
            return model
        if type(model) is not HookedModel:
            raise InputError(
                "nnsight cannot read a model that is streamed or in parts: drop `backend`, or `stream_layers` and "
                "`tensor_parallel`."
            )
        found = cls.__new__(cls)
        vars(found).update(vars(model))
        # nnsight would move the ids to where the first parameter is, and that is nowhere if it is offloaded.
        placed = type("Placed", (library().NNsight,), {"device": None})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that BERT's `output` has another name there
            found._envoy = placed(model._base)
        found._places = found._found()
        return found

    def at(self, hooks: Iterable[int | str], tokenizer: Any) -> HookedModel:
        """The same model, to be read at other hook points."""
        return TracedModel.of(super().at(hooks, tokenizer))

    def read(self, ids: Any, mask: Any) -> dict[str, Tensor]:
        """As that of `HookedModel`, in one trace, which is stopped after the last hook point."""
        ids, mask = self._checked(ids, mask)
        inputs = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}
        with self._hooked((), lambda path, output: None):  # eval mode, nothing for gradients
            found = _trace(self._envoy, self._places, **inputs, **self._taken_by(self._base))
        return self._named(found, *ids.shape)

    def _found(self) -> list[Any]:
        modules = {envoy._module: envoy for envoy in self._envoy.modules()}
        return [modules[self._base.get_submodule(path)] for path in self._paths]

    def _named(self, found: list[Tensor], rows: int, length: int) -> dict[str, Tensor]:
        out = {}
        for path, output in zip(self._paths, found, strict=True):
            x = rows_of(output, rows, length)
            assert x is not None, "a hook point was tried when the model was loaded"
            out[self._layout.name(path)] = x
        return out


class RemoteModel(TracedModel):
    """A model that runs on a server of NDIF, of which only the config and the tokenizer are here.

    What is sent is ids and mask, what comes back the activations at the hook points. Nothing says which weights the
    server has: provenance has None for their fingerprint and dtype, and says that they were remote. Tried with
    nnsight's simulation (`remote="local"`), which sends and runs the same request in this process, and on no server.
    """

    def __init__(self, envoy: Any, tokenizer: Any, layout: Layout, hooks: Iterable[int | str], remote: bool | str):
        base = envoy._module.base_model
        HookedModel.__init__(self, envoy._module, base, tokenizer, layout, hooks)
        self._envoy, self._remote = envoy, remote
        self._places = self._found()  # now: a simulation puts other modules into what nnsight made
        self.device = torch.device("cpu")  # where activations arrive

    def at(self, hooks: Iterable[int | str], tokenizer: Any) -> HookedModel:
        """The same model, to be read at other hook points."""
        return RemoteModel(self._envoy, tokenizer, self._layout, hooks, self._remote)

    @property
    def processor(self) -> str | None:
        """Not known of a server."""
        return None

    def provenance(self, hook: int | str) -> dict:
        """As that of `HookedModel`, without what cannot be known of weights elsewhere."""
        return super().provenance(hook) | {"dtype": None, "remote": True}

    def _fingerprint(self, path: str) -> None:  # type: ignore[override]
        return None

    def read(self, ids: Any, mask: Any) -> dict[str, Tensor]:
        """As that of `HookedModel`, by one request."""
        ids, mask = self._checked(ids, mask)
        inputs = {"input_ids": ids, "attention_mask": mask}
        try:
            with redirect_stdout(sys.stderr):  # where nnsight says how the request is doing
                found = _trace(self._envoy, self._places, inputs, remote=self._remote)
        except Exception as error:
            said = one_line(f"{type(error).__name__}: {error}"[:240])
            raise InputError(
                f"`{self._layout.model}` could not be read remotely ({said}): check your key (`NDIF_API_KEY`), and "
                "that the server has this model."
            ) from error
        return self._named([x.cpu() for x in found], *ids.shape)

    def _forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Shapes alone, in the order of a forward pass; the server is not asked."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode(allow_non_fake_inputs=True):
            return super()._forward(ids, mask)

    def _logits(self, ids: Tensor, mask: Tensor, replace: Mapping[str, Any]) -> Tensor:
        raise InputError(
            f"`{self._layout.model}` is remote, where activations are read and no logits: load it here, without "
            "`remote`."
        )


def remote_model(
    model: Any,
    tokenizer: Any,
    hooks: Iterable[int | str],
    how: Mapping[str, Any],
) -> RemoteModel:
    """The model that nnsight knows as the hub id `model`, or as the nnsight model itself, on NDIF.

    `how` are the settings of `load_model`, of which `remote` is nnsight's: True, the address of another server, or
    "local" for a simulation. What else is in it goes to `nnsight.TransformersModel`.
    """
    remote = how["remote"]
    for name in ("dtype", "device", "device_map", "stream_layers"):
        if how[name] not in (None, "auto", False):
            raise InputError(
                f"`{name}` is {how[name]!r}, but the server chooses how a remote model runs: drop `{name}`."
            )
    nnsight = library()
    if isinstance(model, nnsight.Envoy):
        envoy, tokenizer = model, model.tokenizer if tokenizer is None else tokenizer
    elif isinstance(model, str | Path):
        if remote is True and Path(model).is_dir():
            raise InputError(
                f"`{model}` is a folder, and a server has models of the hub: give its id, or drop `remote`."
            )
        here = torch.device("cpu")  # for what is here: the config
        found = survey(model, here, {name: how[name] for name in ("revision", "trust_remote_code")})
        tokenizer = found.tokenizer(tokenizer)
        with found.door():
            words = copy.deepcopy(tokenizer)  # nnsight changes its padding
            given = {"task": "text-generation", "tokenizer": words, **found.hub, **handed_on(how)}
            envoy = nnsight.TransformersModel(found.model, **given)
    else:
        raise InputError(
            f"`model` is a {type(model).__name__}, which is here: pass its id on the hub, or drop `remote`."
        )
    layout = Layout.of(envoy._module.base_model, str(envoy.repo_id))
    return RemoteModel(envoy, load_tokenizer(tokenizer), layout, hooks, remote)


def unwrapped(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """The module and the tokenizer of a model of nnsight; another as it is."""
    if not isinstance(model, library().Envoy):
        return model, tokenizer
    if hasattr(model, "dispatch"):
        model.dispatch()  # its weights are loaded when they are first needed
    return model._module, model.tokenizer if tokenizer is None else tokenizer


def library() -> Any:
    """nnsight, or an `InputError` where it is not installed."""
    try:
        import nnsight
    except ImportError as error:
        raise InputError("The nnsight backend needs nnsight: install it with `pip install 'itda[nnsight]'`.") from error
    return nnsight


def _trace(envoy: Any, places: list[Any], *args: Any, **inputs: Any) -> list[Tensor]:
    """The outputs of the modules `places`, in the order in which they run, from one trace that ends with the last.

    nnsight reads the source of the block below, and sends it where the model is remote: all of it must be said there.
    """
    import nnsight

    with envoy.trace(*args, **inputs) as tracer:
        found = nnsight.save([])
        for place in places:
            output = place.output
            while isinstance(output, tuple | list | dict):  # as a block of transformers 4 gives, or an attention
                output = next(iter(output.values() if isinstance(output, dict) else output))
            found.append(output.detach().clone())  # later modules may write into it
        tracer.stop()
    return found
