"""Which class of transformers holds a model: what its config is known by, or the code that it brings names."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch

# `AutoModel` has no head. The others are tried in this order, where the installed transformers has them.
WITH_HEAD = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
WITHOUT = ("AutoModel", *WITH_HEAD)
_HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def auto_classes(config: Any, names: Iterable[str]) -> list[Any]:
    """Those of the auto classes `names` that know this config, by its type or by its `auto_map`."""
    import transformers

    own = getattr(config, "auto_map", None) or {}
    found = (getattr(transformers, name, None) for name in names)
    return [
        auto for auto in found if auto is not None and (auto.__name__ in own or type(config) in auto._model_mapping)
    ]


def auto_class(config: Any) -> Any:
    """The auto class for a model without a head, or for one with it where there is no other."""
    from transformers import AutoModel

    return next(iter(auto_classes(config, WITHOUT)), AutoModel)  # which says what is wrong


def base_of(module: Any) -> Any:
    """The model without its head, as far as that is one by itself."""
    from transformers import PreTrainedModel

    base = module.base_model
    return base if isinstance(base, PreTrainedModel) else module


def empty(auto: Any, config: Any, trust_remote_code: bool) -> Any:
    """The model of a config without storage for its weights; None where it cannot be built so."""
    try:
        with torch.device("meta"):
            return auto.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
    except Exception:  # code from elsewhere that computes with its weights, or a config that will not load either
        return None


def named_kinds(config: Any) -> list[str]:
    """The classes that a config names for its checkpoint."""
    return [*(getattr(config, "architectures", None) or ()), *(getattr(config, "auto_map", None) or {})]


def class_with_head(config: Any, skeleton: Any, trust_remote_code: bool) -> Any:
    """The auto class for the language model around the base model `skeleton`, with its head; None if it has none."""
    kinds = named_kinds(config)
    if (kinds and not any(kind.endswith(_HEADS) for kind in kinds)) or getattr(config, "is_encoder_decoder", False):
        return None
    for auto in auto_classes(config, WITH_HEAD):
        whole = empty(auto, config, trust_remote_code)
        if whole is None or skeleton is None:  # then it is judged once it is loaded
            return auto
        # A class of the same config may be another model: the decoder of an encoder and a decoder, for one.
        if type(base_of(whole)) is type(skeleton) and whole.get_output_embeddings() is not None:
            return auto
    return None
