"""A Hugging Face model by name: what is known before its weights are read, and loading no more of them than needed."""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from itda.devices import checked_device, has_bfloat16
from itda.errors import InputError, counted
from itda.models.adapters import Adapter, adapter_of, put_on
from itda.models.classes import auto_class, base_of, class_with_head, empty, named_kinds
from itda.models.hub import check_hub, commit_of, door, file_of, load_tokenizer, place_of, quiet
from itda.models.layout import Layout
from itda.settings import groups, names, verbs

_SPREAD = ("device_map", "tp_plan", "distributed_config")  # arguments with which transformers chooses the devices
PLACED = ("device_map", "quantization_config", "tp_plan", "tp_size", "distributed_config")  # of `from_pretrained`
_HUB_ARGUMENTS = ("token", "cache_dir", "subfolder", "local_files_only", "force_download", "gguf_file")


def pretrained(
    found: Survey, hooks: Sequence[int | str], tokenizer: Any, device: torch.device
) -> tuple[nn.Module, Any, Layout, frozenset[str]]:
    """Load the base model that was surveyed up to the last block that `hooks` need, on `device`, with its tokenizer.

    Returns module, tokenizer, layout and the names of the parameters that the checkpoint did not have. Everything
    that can be checked on the config (the layers, the hook points) is checked before any weight is read.
    """
    layout = None if found.skeleton is None else found.layout
    keep = None if layout is None else layout.needed(hooks)
    tokenizer = found.tokenizer(tokenizer)
    with found.door():
        how = found.hub | _dtype_argument(found.dtype) | found.kwargs
        base, missing = _load(found, layout, keep, **how)
        if layout is None:
            layout = Layout.of(base, found.name)
        if not found.is_spread:
            base = aligned(base.to(device))
    return base.eval(), tokenizer, layout, missing


@dataclass(frozen=True)
class Survey:
    """What is known of a model by name before any of its weights is read."""

    name: str  # as it was given
    model: str  # the folder or hub id of its weights
    config: Any
    whole: Any  # what its class makes of that, without storage for its weights; None where it cannot be built so
    hub: dict[str, Any]  # where on the hub it is
    dtype: torch.dtype | str
    kwargs: dict[str, Any]  # for `from_pretrained`
    adapter: Adapter | None = None  # that belongs on it

    @cached_property
    def skeleton(self) -> Any:
        """The base model of `whole`."""
        return None if self.whole is None else base_of(self.whole)

    @property
    def is_spread(self) -> bool:
        """Whether transformers or accelerate choose the devices of its weights."""
        return any(self.kwargs.get(name) for name in _SPREAD)

    @cached_property
    def layout(self) -> Layout:
        """Where its blocks are."""
        return Layout.of(self.skeleton, self.name)

    def again(self) -> Survey:
        """The same, with a skeleton of its own."""
        return replace(self, whole=empty(auto_class(self.config), self.config, self.hub["trust_remote_code"]))

    @cached_property
    def origin(self) -> dict[str, Any]:
        """What a provenance says of where it is from, besides its name: the commit, which configs no longer keep."""
        if self.adapter is not None:
            return self.adapter.origin
        with self.door():
            path = file_of(self.model, self.hub.get("gguf_file") or "config.json", self.hub)
        commit = None if path is None or os.path.isdir(self.model) else commit_of(path)
        return {} if commit is None else {"revision": commit}

    @contextmanager
    def door(self) -> Iterator[None]:
        """Whatever the libraries that load say on the way is not shown, and an error of theirs becomes a sentence."""
        # Of a GGUF file there is a bar that no setting turns off.
        unsaid = redirect_stderr(io.StringIO()) if self.hub.get("gguf_file") else nullcontext()
        with quiet(), door(self.name, self.hub["revision"]), unsaid:
            yield

    def tokenizer(self, given: Any = None) -> Any:
        """The tokenizer that is given, loaded or not, or the model's own."""
        with self.door():
            if given is not None:
                return load_tokenizer(given)
            if self.adapter is not None and file_of(self.adapter.folder, "tokenizer_config.json", {}) is not None:
                return load_tokenizer(self.adapter.folder)
            return load_tokenizer(self.model, **self.hub)

    def bytes(self, hooks: Sequence[int | str] | None = None) -> int:
        """What the weights that `hooks` need, or all, take in memory; 0 where that cannot be told."""
        if (
            self.skeleton is None
            or any(name in self.kwargs for name in PLACED)
            or hasattr(self.config, "quantization_config")
        ):
            return 0  # whoever says where the weights go, or how they are packed, knows
        keep = None if hooks is None else self.layout.needed(hooks)
        last = self.layout.n_layers if keep is None else keep
        blocks = ((p.numel(), self.layout.layer(name)) for name, p in self.skeleton.named_parameters())
        dtype = self.config.dtype if self.dtype == "auto" else self.dtype
        size = dtype.itemsize if isinstance(dtype, torch.dtype) else 4
        return size * sum(numel for numel, block in blocks if block is None or block < last)

    def fetch(self, file: str) -> str | None:
        """The local path of a file of the model, downloaded if need be; None if it has none of that name."""
        with door(self.name, self.hub["revision"]):
            return file_of(self.model, file, self.hub)

    def unpacked(self, how: str) -> None:
        """Raise `InputError` unless its own safetensors are the model, as reading it with the setting `how` takes."""
        packed = "an adapter" if self.adapter is not None else "a GGUF file" if self.hub.get("gguf_file") else None
        if packed is not None:
            advice = (
                "merge it into its model (`merge_and_unload`) and" if self.adapter is not None else "read it whole and"
            )
            raise InputError(
                f"`{self.name}` is {packed}, and `{how}` needs a model in safetensors: {advice} save it "
                "(`save_pretrained`), and pass that folder."
            )

    def part(self, keep: Callable[[str], bool], tensors: dict[str, Tensor]) -> tuple[Any, frozenset[str]]:
        """The base model with the modules whose paths `keep` names, from `tensors`; and what these lack.

        The library that made the model turns the tensors of the checkpoint into the weights of its modules.
        """
        with self.door():
            found: Any = _parts(type(self.skeleton), self.layout.blocks, keep)
            base, info = found.from_pretrained(
                None,
                config=copy.deepcopy(self.config),
                state_dict=tensors,
                output_loading_info=True,
                **_dtype_argument(self.dtype),
                **self.kwargs,
            )
        return base.eval(), frozenset(info["missing_keys"])


def handed_on(how: Mapping[str, Any]) -> dict[str, Any]:
    """What of the settings of loading is for the library that loads, device_map aside."""
    own = set(names(verbs.Loading)) - set(names(groups.Transformers))
    return {name: value for name, value in how.items() if name not in own and value is not None}


class _AdapterError(InputError):
    """The base of an adapter is an adapter."""


def survey(
    model: str | Path, device: torch.device, how: Mapping[str, Any] | None = None, above: Adapter | None = None
) -> Survey:
    """Read the config of a hub id or folder, and build what can be built without weights.

    `how` has settings of loading by name, and whatever else `from_pretrained` is to be given.
    `above` is the adapter that the model is the base of.
    """
    how = how or {}
    revision, trust_remote_code = how.get("revision"), bool(how.get("trust_remote_code"))
    asked = _checked_dtype(how.get("dtype") or "auto")
    kwargs = handed_on(how)
    kwargs |= {"device_map": how["device_map"]} if how.get("device_map") is not None else {}
    name = str(model)
    place, packed = place_of(name, kwargs.get("subfolder", ""), kwargs.get("gguf_file"))
    hub, kwargs = _hub_arguments(kwargs, revision=revision, trust_remote_code=trust_remote_code)
    hub |= {"gguf_file": packed} if packed is not None else {}
    with quiet(), door(name, revision):
        from transformers import AutoConfig

        check_hub(place, hub)
        if not hub.get("gguf_file") and (adapter := adapter_of(place, hub)) is not None:
            if above is not None:
                raise _AdapterError(_of_two(above, adapter))
            return _of_adapter(replace(adapter, name=name), device, how)
        config = AutoConfig.from_pretrained(place, **hub)
        skeleton = empty(auto_class(config), config, trust_remote_code)
        return Survey(name, place, config, skeleton, hub, _dtype(asked, config, device), kwargs)


def _of_adapter(adapter: Adapter, device: torch.device, how: Mapping[str, Any]) -> Survey:
    """What is known of the model that an adapter belongs on."""
    own = {name: value for name, value in how.items() if name not in ("revision", "subfolder")}
    try:
        found = survey(adapter.base, device, own | {"revision": adapter.base_revision}, adapter)
    except _AdapterError:
        raise
    except InputError as error:
        why = str(error).rstrip(".")
        raise InputError(
            f"`{adapter.name}` is an adapter of `{adapter.base}`, and that cannot be loaded ({why}): "
            "write where it is into `base_model_name_or_path` of its adapter_config.json."
        ) from error
    return replace(found, name=adapter.name, adapter=adapter)


def _of_two(adapter: Adapter, base: Adapter) -> str:
    """What is said of an adapter whose base is one: itself, one of itself, or another."""
    name = "name the model that it was made for as `base_model_name_or_path` in its adapter_config.json."
    if os.path.realpath(base.folder) == os.path.realpath(adapter.folder):
        return f"`{adapter.name}` is an adapter whose base is itself: {name}"
    if os.path.realpath(Path(base.base).expanduser()) == os.path.realpath(adapter.folder):
        return f"`{adapter.name}` is an adapter of `{adapter.base}`, and that is an adapter of it: {name}"
    return (
        f"`{adapter.name}` is an adapter of `{adapter.base}`, which is an adapter too: merge that into its model "
        "(`merge_and_unload`), save it, and name the folder as `base_model_name_or_path`."
    )


def adapted(found: Survey, tokenizer: Any, device: torch.device) -> tuple[Any, Any]:
    """The whole model that was surveyed with its adapter on it, and its tokenizer."""
    assert found.adapter is not None
    plain = replace(found, name=found.model, adapter=None)
    tokenizer = found.tokenizer(tokenizer)
    loaded = causal(plain, tokenizer, device)
    whole = pretrained(plain, [], tokenizer, device)[0] if loaded is None else loaded[0]
    with found.door():
        whole = put_on(whole, found.adapter)
        return whole if found.is_spread else whole.to(device), tokenizer


def causal(found: Survey, tokenizer: Any, device: torch.device) -> tuple[Any, Any] | None:
    """The whole causal language model that was surveyed, head and all, with its tokenizer; None if it has no head."""
    if found.adapter is not None:
        return adapted(found, tokenizer, device)
    with found.door():
        loader = class_with_head(found.config, found.skeleton, found.hub["trust_remote_code"])
    if loader is None:
        return None
    tokenizer = found.tokenizer(tokenizer)
    with found.door():
        how = found.hub | _dtype_argument(found.dtype) | found.kwargs
        whole, info = loader.from_pretrained(
            found.model, config=found.config, use_safetensors=True, output_loading_info=True, **how
        )
        if whole.get_output_embeddings() is None or (info["missing_keys"] and not named_kinds(found.config)):
            return None
        if info["missing_keys"]:
            raise InputError(
                f"`{found.model}` lacks {counted(len(info['missing_keys']), 'weight')} of its language model "
                f"(`{sorted(info['missing_keys'])[0]}` for one): download or save it again, with its head."
            )
        if not found.is_spread:
            whole = aligned(whole.to(device))
    return whole.eval(), tokenizer


def _hub_arguments(kwargs: dict[str, Any], **own: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What says where on the hub a model is, for its config, tokenizer and weights; and the rest, for the weights."""
    hub = own | {name: value for name, value in kwargs.items() if name in _HUB_ARGUMENTS}
    return hub, {name: value for name, value in kwargs.items() if name not in _HUB_ARGUMENTS}


def random_model(
    model: Any,
    seed: int,
    device: Any = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """The base model of a config, or of that of a hub id or folder, with the weights it has before any training.

    They are drawn in float32, and then rounded to `dtype`.
    """
    name = model if isinstance(model, str | Path) else model._name_or_path or type(model).__name__
    with quiet(), door(str(name), None):
        if isinstance(model, str | Path):
            model = survey(model, torch.device("cpu"), {"trust_remote_code": trust_remote_code}).config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = copy.deepcopy(model)
            config.dtype = torch.float32
            base = base_of(auto_class(config).from_config(config, trust_remote_code=trust_remote_code))
        return base.eval().to(checked_device(device), dtype)


def aligned(module: Any) -> Any:
    """`module` with weights that begin where processors like them to.

    Those mapped from a file begin wherever it has them, and sums of products then differ in their last bits from those
    of the same weights in another file.
    """
    for p in module.parameters():
        if p.device.type == "cpu" and not hasattr(p, "__tensor_flatten__") and p.data_ptr() % 64:  # or packed
            p.data = p.data.clone()
    return module


def _load(found: Survey, layout: Layout | None, keep: int | None, **kwargs: Any) -> tuple[Any, frozenset[str]]:
    """The base model with its first `keep` blocks (all with None), and the names of the parameters it lacks."""
    auto = auto_class(found.config)
    loaders: list[Any] = [auto]
    outer = ""
    if layout is not None and keep is not None and keep < layout.n_layers:
        outer = next(f"{path}." if path else "" for path, m in found.whole.named_modules() if m is found.skeleton)
        loaders.insert(0, _cut(type(found.whole), outer + layout.blocks, keep))
    for loader in loaders:
        if loader is not auto:  # the class itself is at hand, and needs no permission to be found
            arguments = {name: value for name, value in kwargs.items() if name != "trust_remote_code"}
        else:
            arguments = kwargs
        try:
            # Pickles are not read, whatever the repository holds.
            whole, info = loader.from_pretrained(
                found.model,
                config=copy.deepcopy(found.config),
                use_safetensors=True,
                output_loading_info=True,
                **arguments,
            )
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError):
            if loader is auto:
                raise
            continue  # this architecture does not stand being cut
        base = base_of(whole)
        outer = next(f"{path}." if path else "" for path, m in whole.named_modules() if m is base)
        return base, frozenset(name.removeprefix(outer) for name in info["missing_keys"])
    raise AssertionError("unreachable")


def _cut(cls: Any, blocks: str, keep: int) -> type:
    """`cls` with the first `keep` blocks only, so that the weights of the others are never read.

    The config stays whole: setting its `num_hidden_layers` would change the lower blocks of the families that
    compute with it (minicpm3 scales its residuals by the depth; gemma4 tells by it which blocks share keys).
    """

    def __init__(self, *args, **kwargs):
        cls.__init__(self, *args, **kwargs)
        del self.get_submodule(blocks)[keep:]

    return type(cls.__name__, (cls,), {"__init__": __init__, "__module__": cls.__module__})


class _LeftOut(nn.Identity):
    """In place of a module without its weights: it says where the model is, as the code around it may ask."""

    device = torch.device("cpu")

    def _apply(self, fn: Callable, recurse: bool = True) -> _LeftOut:
        self.device = fn(torch.empty(0)).device
        return super()._apply(fn, recurse)


def _parts(cls: Any, blocks: str, keep: Callable[[str], bool]) -> type:
    """`cls` without the parameters of modules whose path `keep` does not name, so that they need no weights."""

    def __init__(self, *args, **kwargs):
        cls.__init__(self, *args, **kwargs)
        kept = [blocks, *(path for path, _ in self.named_modules() if keep(path))]
        gone: list[str] = []
        for path, module in list(self.named_modules()):
            if keep(path) or not any(True for _ in module.parameters()) or path.startswith(tuple(gone)):
                continue
            if not path or any(f"{name}.".startswith(path + ".") for name in kept):
                module._parameters.update(dict.fromkeys(module._parameters))  # of its own, and not of its children
            else:
                self.set_submodule(path, _LeftOut())
                gone.append(path + ".")

    return type(cls.__name__, (cls,), {"__init__": __init__, "__module__": cls.__module__})


def _dtype_argument(dtype) -> dict:
    """`dtype` was called `torch_dtype` before transformers 4.56."""
    import transformers

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    return {"dtype" if version >= (4, 56) else "torch_dtype": dtype}


def _checked_dtype(dtype: Any) -> torch.dtype | str:
    """`dtype` as torch has it, or "auto"."""
    if isinstance(dtype, str) and dtype == "auto":
        return dtype
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"`dtype` is {dtype!r}: pass 'auto', 'float32', 'bfloat16' or 'float16'.")
    return found


def _dtype(dtype: torch.dtype | str, config: Any, device: torch.device) -> torch.dtype | str:
    """What transformers is asked for.

    "auto" is what the checkpoint has on CUDA (so "auto" there). On other devices it is float32, but bfloat16 for a
    checkpoint of bfloat16 on a CPU that has instructions for its products (AMX).
    """
    if dtype != "auto" or device.type == "cuda":
        return dtype
    own = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    fast = own == torch.bfloat16 and device.type == "cpu" and has_bfloat16()
    return torch.bfloat16 if fast else torch.float32
