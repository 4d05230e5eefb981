"""A Hugging Face model by name: what is known before its weights are read, and loading no more of them than needed."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from itda.errors import InputError
from itda.layout import Layout

_SPREAD = ("device_map", "tp_plan", "distributed_config")  # arguments with which transformers chooses the devices
PLACED = ("device_map", "quantization_config", "tp_plan", "tp_size", "distributed_config")  # of `from_pretrained`
_HUB_ARGUMENTS = ("token", "cache_dir", "subfolder", "local_files_only", "force_download")


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
        base, missing = _load(found.model, found.config, found.skeleton, layout, keep, **how)
        if layout is None:
            layout = Layout.of(base, found.model)
        if not any(found.kwargs.get(name) for name in _SPREAD):
            base = aligned(base.to(device))
    return base.eval(), tokenizer, layout, missing


@dataclass(frozen=True)
class Survey:
    """What is known of a model by name before any of its weights is read."""

    model: str
    config: Any
    skeleton: Any  # the base model without storage for its weights; None where it cannot be built so
    hub: dict[str, Any]  # where on the hub it is
    dtype: torch.dtype | str
    kwargs: dict[str, Any]  # for `from_pretrained`

    @cached_property
    def layout(self) -> Layout:
        """Where its blocks are."""
        return Layout.of(self.skeleton, self.model)

    def again(self) -> Survey:
        """The same, with a skeleton of its own."""
        return replace(self, skeleton=_skeleton(self.config, self.hub["trust_remote_code"]))

    @contextmanager
    def door(self) -> Iterator[None]:
        """Whatever the libraries that load say on the way is not shown, and an error of theirs becomes a sentence."""
        with _quiet(), _door(self.model, self.hub["revision"]):
            yield

    def tokenizer(self, given: Any = None) -> Any:
        """The tokenizer that is given, loaded or not, or the model's own."""
        with self.door():
            return load_tokenizer(self.model, **self.hub) if given is None else load_tokenizer(given)

    def bytes(self, hooks: Sequence[int | str]) -> int:
        """What the weights that `hooks` need take in memory; 0 where that cannot be told."""
        if (
            self.skeleton is None
            or any(name in self.kwargs for name in PLACED)
            or hasattr(self.config, "quantization_config")
        ):
            return 0  # whoever says where the weights go, or how they are packed, knows
        keep = self.layout.needed(hooks)
        last = self.layout.n_layers if keep is None else keep
        blocks = ((p.numel(), self.layout.layer(name)) for name, p in self.skeleton.named_parameters())
        dtype = self.config.dtype if self.dtype == "auto" else self.dtype
        size = dtype.itemsize if isinstance(dtype, torch.dtype) else 4
        return size * sum(numel for numel, block in blocks if block is None or block < last)

    def fetch(self, file: str) -> str | None:
        """The local path of a file of the model, downloaded if need be; None if it has none of that name."""
        from transformers.utils import cached_file

        where = {name: value for name, value in self.hub.items() if name != "trust_remote_code"}
        with _door(self.model, self.hub["revision"]):
            return cached_file(self.model, file, _raise_exceptions_for_missing_entries=False, **where)

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


def survey(
    model: str | Path, device: torch.device, *, revision: str | None, dtype: Any, trust_remote_code: bool, **kwargs
) -> Survey:
    """Read the config of a hub id or folder, and build what can be built without weights."""
    dtype = _dtype(dtype, device)
    model = checked_name(str(model), kwargs.get("subfolder", ""))
    hub, kwargs = _hub_arguments(kwargs, revision=revision, trust_remote_code=trust_remote_code)
    with _quiet(), _door(model, revision):
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(model, **hub)
        return Survey(model, config, _skeleton(config, trust_remote_code), hub, dtype, kwargs)


def causal(
    model: str | Path,
    *,
    tokenizer: Any = None,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    **kwargs,
) -> tuple[Any, Any] | None:
    """The whole causal language model `model`, head and all, with its tokenizer; None if what it is has no head."""
    model = checked_name(str(model), kwargs.get("subfolder", ""))
    device = checked_device(device)
    dtype = _dtype(dtype, device)
    hub, kwargs = _hub_arguments(kwargs, revision=revision, trust_remote_code=trust_remote_code)
    with _quiet(), _door(model, revision):
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(model, **hub)
        kinds = [*(config.architectures or ()), *getattr(config, "auto_map", {})]
        if kinds and not any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds):
            return None
        tokenizer = load_tokenizer(model, **hub) if tokenizer is None else load_tokenizer(tokenizer)
        how = hub | _dtype_argument(dtype) | kwargs
        loader: Any = AutoModelForCausalLM
        whole, info = loader.from_pretrained(
            model, config=config, use_safetensors=True, output_loading_info=True, **how
        )
        if info["missing_keys"] and not kinds:
            return None
        if info["missing_keys"]:
            raise InputError(
                f"`{model}` lacks {len(info['missing_keys'])} weights of its language model "
                f"(`{sorted(info['missing_keys'])[0]}` for one): download or save it again, with its head."
            )
        if not any(kwargs.get(name) for name in _SPREAD):
            whole = aligned(whole.to(device))
    return whole.eval(), tokenizer


def _hub_arguments(kwargs: dict[str, Any], **own: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What says where on the hub a model is, for its config, tokenizer and weights; and the rest, for the weights."""
    hub = own | {name: value for name, value in kwargs.items() if name in _HUB_ARGUMENTS}
    return hub, {name: value for name, value in kwargs.items() if name not in _HUB_ARGUMENTS}


def random_model(model: Any, seed: int, device: Any = None, trust_remote_code: bool = False) -> nn.Module:
    """The base model of a config, or of that of a hub id or folder, with the weights it has before any training."""
    name = model if isinstance(model, str | Path) else model._name_or_path or type(model).__name__
    with _quiet(), _door(str(name), None):
        from transformers import AutoConfig, AutoModel

        if isinstance(model, str | Path):
            model = AutoConfig.from_pretrained(checked_name(str(model)), trust_remote_code=trust_remote_code)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = copy.deepcopy(model)
            config.dtype = torch.float32
            base = AutoModel.from_config(config, trust_remote_code=trust_remote_code)
        return base.float().eval().to(checked_device(device))


def aligned(module: Any) -> Any:
    """`module` with weights that begin where processors like them to.

    Those mapped from a file begin wherever it has them, and sums of products then differ in their last bits from those
    of the same weights in another file.
    """
    for p in module.parameters():
        if p.device.type == "cpu" and not hasattr(p, "__tensor_flatten__") and p.data_ptr() % 64:  # or packed
            p.data = p.data.clone()
    return module


def _skeleton(config, trust_remote_code: bool) -> nn.Module | None:
    """The base model without storage for its weights; None where it cannot be built so."""
    from transformers import AutoModel

    try:
        with torch.device("meta"):
            return AutoModel.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
    except Exception:  # code from elsewhere that computes with its weights, or a config that will not load either
        return None


def _load(model, config, skeleton, layout, keep, **kwargs) -> tuple[nn.Module, frozenset[str]]:
    """The base model with its first `keep` blocks (all with None), and the names of the parameters it lacks."""
    from transformers import AutoModel

    loaders: list[Any] = [AutoModel]
    if keep is not None and keep < layout.n_layers:
        loaders.insert(0, _cut(type(skeleton), layout.blocks, keep))
    for loader in loaders:
        if loader is not AutoModel:  # the class itself is at hand, and needs no permission to be found
            arguments = {name: value for name, value in kwargs.items() if name != "trust_remote_code"}
        else:
            arguments = kwargs
        try:
            # Pickles are not read, whatever the repository holds.
            base, info = loader.from_pretrained(
                model, config=copy.deepcopy(config), use_safetensors=True, output_loading_info=True, **arguments
            )
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError):
            if loader is AutoModel:
                raise
            continue  # this architecture does not stand being cut
        return base, frozenset(info["missing_keys"])
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
                self.set_submodule(path, nn.Identity())
                gone.append(path + ".")

    return type(cls.__name__, (cls,), {"__init__": __init__, "__module__": cls.__module__})


def load_tokenizer(tokenizer: Any, **hub) -> Any:
    """The tokenizer of a hub id or folder; one that is loaded already as it is."""
    if not isinstance(tokenizer, str | Path):
        return tokenizer
    with _quiet():
        try:
            found = _auto_tokenizer(str(tokenizer), **hub)
            if len(found) <= len(found.all_special_ids):  # what transformers 5 makes up where there are no files
                raise OSError("it has no vocabulary")
        except Exception as error:
            if "trust_remote_code" in str(error):
                raise InputError(_sentence(str(tokenizer), None, error)) from error
            raise InputError(
                f"`{tokenizer}` has no tokenizer that can be loaded ({_one_line(error)}): "
                "pass one with `tokenizer=`, loaded or as an id or folder."
            ) from error
        return found


def _auto_tokenizer(tokenizer: str, **hub) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        return AutoTokenizer.from_pretrained(tokenizer, **hub)
    except ValueError as error:
        if "TokenizersBackend" not in str(error):
            raise
        # What transformers 5 calls a fast tokenizer of no model's own; 4 does not know the name.
        return PreTrainedTokenizerFast.from_pretrained(tokenizer, **hub)


def _dtype_argument(dtype) -> dict:
    """`dtype` was called `torch_dtype` before transformers 4.56."""
    import transformers

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    return {"dtype" if version >= (4, 56) else "torch_dtype": dtype}


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype | str:
    """What transformers is asked for: with "auto" float32, and on CUDA (so "auto" there) what the checkpoint has."""
    if isinstance(dtype, str) and dtype == "auto":
        return "auto" if device.type == "cuda" else torch.float32
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"`dtype` is {dtype!r}: pass 'auto', 'float32', 'bfloat16' or 'float16'.")
    return found


def checked_device(device: str | torch.device | None) -> torch.device:
    """`device`, after trying it; without one the fastest there is."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device is None:
        return torch.device(next(name for name, is_there in there.items() if is_there))
    try:
        torch.zeros(1, device=device).item()
        return torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        names = " or ".join(repr(name) for name, is_there in there.items() if is_there)
        raise InputError(f"`device` is {str(device)!r}, which cannot be used here: pass {names}.") from error


def checked_name(model: str, subfolder: str = "") -> str:
    """`model`; what is a path, or looks like one, must be a folder with a config and safetensors."""
    folder = Path(model).expanduser()
    if not (folder.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model):
        return model  # a hub id
    folder = folder / subfolder
    wanted = "pass a folder that `save_pretrained` wrote, or the id of a model on the Hugging Face hub."
    if not folder.is_dir():
        raise InputError(f"`{model}` is {'a file' if folder.exists() else 'not there'}: {wanted}")
    if not (folder / "config.json").is_file():
        raise InputError(f"The folder `{model}` holds no config.json, so it is not a model: {wanted}")
    if not any(folder.glob("*.safetensors")):
        pickles = any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth"))
        raise InputError(
            f"The folder `{model}` holds its weights as a pickle only, which could run any code and is not read: "
            "save the model as safetensors (`save_pretrained` does) and pass that folder."
            if pickles
            else f"The folder `{model}` holds no weights (no *.safetensors): {wanted}"
        )
    return str(Path(model).expanduser())


@contextmanager
def _door(model: str, revision: str | None) -> Iterator[None]:
    """Whatever goes wrong in loading `model` leaves as one sentence."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(_sentence(model, revision, error)) from error


def _sentence(model: str, revision: str | None, error: BaseException) -> str:
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    kinds = {kind.__name__ for cause in causes for kind in type(cause).__mro__}
    if "trust_remote_code" in str(error):
        return f"`{model}` runs code of its own: read that code, and if you trust it pass `trust_remote_code=True`."
    if "GatedRepoError" in kinds:
        return f"`{model}` is gated: ask for access on its hub page, log in with `hf auth login`, and run this again."
    if "RevisionNotFoundError" in kinds:
        return f"`{model}` has no revision `{revision}`: pass a branch, tag or commit that its hub page lists."
    if kinds & {"RepositoryNotFoundError", "HFValidationError"}:
        return f"The Hugging Face hub has no model `{model}` that you may read: check the id, or pass a local folder."
    if kinds & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectionError", "TimeoutError"}:
        return (
            f"`{model}` is neither a local folder nor in the local cache, and the Hugging Face hub was not reached: "
            "check the name and the network, or pass a local folder."
        )
    if "requires `accelerate`" in str(error):
        return "`device_map` needs accelerate: install it with `pip install 'itda[big]'`."
    if "SafetensorError" in kinds:
        return f"The weights of `{model}` are damaged ({_one_line(error)}): download or save them again."
    return (
        f"`{model}` could not be loaded ({type(error).__name__}: {_one_line(error)}): "
        "check that it is complete, and that the installed transformers knows its kind of model."
    )


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 240 else text[:237] + "..."


@contextmanager
def _quiet() -> Iterator[None]:
    """No logging, progress bars or warnings of the libraries that load, and their settings as before afterwards."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.get_verbosity()  # sets its level up, if this is its first use
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    bars, hub_bars = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            transformers_logging.disable_progress_bar()
            disable_progress_bars()
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if bars:
                transformers_logging.enable_progress_bar()
            (enable_progress_bars if hub_bars else disable_progress_bars)()
