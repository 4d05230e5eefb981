"""A Hugging Face model by name: where its blocks are, what hook points are called, and loading no more than needed."""

from __future__ import annotations

import copy
import difflib
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from itda.errors import InputError

_LENS_NAME = re.compile(r"blocks\.(\d+)\.hook_(resid_post|resid_pre|attn_out|mlp_out)")  # TransformerLens
_ATTENTION, _MLP = ("attn", "self_attn", "attention"), ("mlp", "feed_forward", "fc2")
_HUB_ARGUMENTS = ("token", "cache_dir", "subfolder", "local_files_only", "force_download")


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

    def path(self, hook: int | str) -> str:
        """The path that `hook` names: a layer, a module path with or without the prefix, a TransformerLens name."""
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
            f"`{self.model}` has no module `{hook}`: name a layer (0 to {self.n_layers - 1}) or one of its modules"
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


def pretrained(
    model: str | Path,
    hooks: Sequence[int | str],
    *,
    tokenizer: Any = None,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    **kwargs,
) -> tuple[nn.Module, Any, Layout, frozenset[str]]:
    """Load the base model `model` up to the last block that `hooks` need, on `device`, with its tokenizer.

    Returns module, tokenizer, layout and the names of the parameters that the checkpoint did not have. Everything
    that can be checked on the config (the layers, the hook points) is checked before any weight is read.
    """
    model = checked_name(str(model), kwargs.get("subfolder", ""))
    device = _device(device)
    dtype = _dtype(dtype, device)
    hub, kwargs = _hub_arguments(kwargs, revision=revision, trust_remote_code=trust_remote_code)
    with _quiet(), _door(model, revision):
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(model, **hub)
        skeleton = _skeleton(config, trust_remote_code)
        layout = keep = None
        if skeleton is not None:
            layout = Layout.of(skeleton, model)
            layers = [layout.layer(layout.path(hook)) for hook in hooks]
            inside = [layer for layer in layers if layer is not None]
            keep = max(inside) + 1 if inside == layers else None  # a module outside the blocks may come after them
        tokenizer = load_tokenizer(model, **hub) if tokenizer is None else load_tokenizer(tokenizer)
        base, missing = _load(model, config, skeleton, layout, keep, **hub, **_dtype_argument(dtype), **kwargs)
        if layout is None:
            layout = Layout.of(base, model)
        if "device_map" not in kwargs:
            base = base.to(device)
    return base.eval(), tokenizer, layout, missing


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
    device = _device(device)
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
        if "device_map" not in kwargs:
            whole = whole.to(device)
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
        return base.float().eval().to(_device(device))


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


def _device(device: str | torch.device | None) -> torch.device:
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
