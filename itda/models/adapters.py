"""Adapters: what a fine-tune changed and nothing besides, put on the model that they were made for, with peft."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from itda.errors import InputError, first_line, shortened
from itda.models import hub

CONFIG, WEIGHTS = hub.ADAPTER, "adapter_model.safetensors"
# What peft says where a base has no module of those names, and torch where one has another shape.
_MISFIT = re.compile("not found in the base model|No modules were targeted|size mismatch")


@dataclass(frozen=True)
class Adapter:
    """An adapter that was found, and not loaded yet."""

    name: str  # as it was given
    folder: str  # with both of its files, here or in the cache of the hub
    base: str  # the model that it was made for
    base_revision: str | None
    kind: str  # "LORA", ...

    @property
    def origin(self) -> dict[str, Any]:
        """What a provenance says of it."""
        made = {"type": self.kind, "base": self.base, "base_revision": self.base_revision}
        return {"revision": hub.commit_of(self.folder), "adapter": made}


def adapter_of(model: str, where: Mapping[str, Any]) -> Adapter | None:
    """The adapter that a hub id or a folder is; None where it is something else.

    Raises `InputError` for one whose base is not said, whose weights are a pickle, or beside which a model lies.
    """
    path = hub.file_of(model, CONFIG, where)
    if path is None:
        return None
    try:
        settings = json.loads(Path(path).read_bytes())
        base, revision, kind = settings["base_model_name_or_path"], settings.get("revision"), settings["peft_type"]
        if not (isinstance(base, str) and base and isinstance(kind, str) and isinstance(revision, str | None)):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"`{model}` is an adapter whose {CONFIG} does not say which model it was made for: write its id or folder "
            "there as `base_model_name_or_path`, or save the adapter again with peft."
        ) from error
    if os.path.isdir(model) and (Path(path).parent / "model.safetensors").exists():
        raise InputError(
            f"The folder `{model}` holds a model and an adapter ({CONFIG}) beside it, and one was wanted: move one of "
            "the two to a folder of its own."
        )
    if hub.file_of(model, WEIGHTS, where) is None:
        raise InputError(
            f"`{model}` is an adapter of `{base}` without {WEIGHTS}, and pickles are not read: save it again with "
            "peft (`save_pretrained`)."
        )
    return Adapter(model, str(Path(path).parent), base, revision, kind)


def put_on(whole: Any, adapter: Adapter) -> Any:
    """`whole`, the language model that the adapter was made for, with the adapter at work in its modules.

    Raises `InputError` if that is not such a model, and for adapters that are prompts: those change no module.
    """
    peft = library(adapter.name)
    config = peft.PeftConfig.from_pretrained(adapter.folder)
    _check_changes_modules(adapter.name, {"default": config}, ["default"])
    try:
        found = peft.PeftModel(whole, config)
        lacks = found.load_adapter(adapter.folder, "default", torch_device=str(whole.device))
    except (ValueError, RuntimeError) as error:
        if not _MISFIT.search(str(error)):
            raise
        raise InputError(
            f"The adapter `{adapter.name}` does not fit `{adapter.base}` ({first_line(error)}): name the model that it "
            f"was made for in its {CONFIG}."
        ) from error
    if wrong := [*lacks.missing_keys, *lacks.unexpected_keys]:
        raise InputError(
            f"The adapter `{adapter.name}` does not fit `{adapter.base}` ({len(wrong)} of its weights have no place "
            f"there, {shortened(wrong[0])} for one): name the model that it was made for in its {CONFIG}."
        )
    return found.get_base_model().eval()


def library(name: str) -> Any:
    """peft, or an `InputError` where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise InputError(
            f"`{name}` is an adapter, which peft puts on its base model: install it with `pip install 'itda[peft]'`, "
            "or merge the adapter into the model (`merge_and_unload`) and pass that."
        ) from error
    return peft


def unwrapped(module: Any) -> tuple[Any, dict[str, Any]]:
    """The model in what peft, torch.compile and torch's parallel classes wrap around it; what peft says of itself.

    The modules are those of the wrapper: adapters stay at work in them. Raises `InputError` for an adapter that is no
    part of the modules.
    """
    origin: dict[str, Any] = {}
    while True:
        inner = getattr(module, "_orig_mod", None)  # torch.compile
        if inner is None and type(module).__name__ in ("DataParallel", "DistributedDataParallel"):
            inner = module.module
        if inner is None and hasattr(module, "peft_config") and hasattr(module, "get_base_model"):
            active = getattr(module, "active_adapters", None) or [module.active_adapter]
            _check_changes_modules(type(module).__name__, module.peft_config, active)
            inner = module.get_base_model()
        if inner is None:
            break
        module = inner
    if isinstance(configs := getattr(module, "peft_config", None), dict) and configs:
        config = next(iter(configs.values()))
        kind = getattr(config.peft_type, "value", config.peft_type)
        origin["adapter"] = {"type": str(kind), "base": config.base_model_name_or_path, "base_revision": None}
    return module, origin


def _check_changes_modules(name: str, configs: Mapping[str, Any], active: Any) -> None:
    for one in active:
        config = configs.get(one)
        if config is not None and config.is_prompt_learning:
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise InputError(
                f"`{name}` is an adapter of type {kind}, which puts vectors before the text and changes no module of "
                "the model, so labels would not fit: pass the base model, or an adapter such as LoRA."
            )
