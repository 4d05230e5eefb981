"""The weights of a loaded model where they are not simply there: offloaded by accelerate, or quantised."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from itda.errors import InputError
from itda.models.fingerprint import sample_of


def input_device(base: Any) -> torch.device:
    """Where `base` wants its ids: where its embedding is, or, if that is offloaded, where accelerate runs it."""
    words = embedding(base)
    if not words.weight.is_meta:
        return words.weight.device
    devices = [getattr(getattr(m, "_hf_hook", None), "execution_device", None) for m in (words, base)]
    return next((torch.device(device) for device in devices if device is not None), words.weight.device)


def embedding(base: Any) -> Any:
    """The module that has a vector for every token id: its `weight` is (vocabulary, d)."""
    parts = [base, *(getattr(base, name, None) for name in ("language_model", "text_model"))]
    for part in parts:
        with suppress(AttributeError, NotImplementedError):  # code from elsewhere that does not say
            if (found := part.get_input_embeddings()) is not None:
                return found
    raise InputError(
        f"A {type(base).__name__} does not say where its token embeddings are (`get_input_embeddings`): pass the "
        "language model in it."
    )


def quantization(config: Any) -> str | None:
    """The method by which the weights of a model with this config were quantised ("torchao"); None if they were not."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method))


def quantised(base: Any) -> str | None:
    """How the weights of a loaded model are quantised: what its config says, or the library that packed them."""
    if (method := quantization(base.config)) is not None:
        return method
    if any(is_packed(module) for module in base.modules()):
        return "torch"
    kinds = {type(p).__module__.partition(".")[0] for p in base.parameters() if hasattr(p, "__tensor_flatten__")}
    return next((kind for kind in sorted(kinds) if kind != "torch"), None)  # those of torch are spread, not quantised


def is_packed(module: nn.Module) -> bool:
    """Whether this is a module of torch's own quantisation, whose weight is no parameter and is unpacked by a call."""
    return not module._parameters and callable(getattr(module, "weight", None))


def stored(base: Any) -> list[str]:
    """The names of what a checkpoint of `base` holds its weights in.

    These are its parameters, and the saved buffers of a quantised model, where some methods keep what they pack.
    """
    names = [name for name, _ in base.named_parameters()]
    names += [f"{path}.weight" for path, module in base.named_modules() if path and is_packed(module)]
    if quantization(base.config) is not None:
        for path, module in base.named_modules():
            own = module._buffers.keys() - module._non_persistent_buffers_set
            names += [f"{path}.{name}" if path else name for name in sorted(own)]
    return names


def is_there(base: Any, name: str) -> bool:
    """Whether the values of the parameter `name` can be read as they stand."""
    path, _, own = name.rpartition(".")
    values = getattr(base.get_submodule(path), own)
    if not isinstance(values, Tensor):
        return False
    return not (values.is_meta or hasattr(values, "__tensor_flatten__"))


@contextmanager
def present(base: Any, name: str) -> Iterator[Tensor]:
    """The parameter `name` of `base` with its values, which accelerate may have to fetch for as long as this lasts."""
    path, _, own = name.rpartition(".")
    module: nn.Module = base.get_submodule(path)
    if is_packed(module):
        yield module.weight().detach().dequantize()  # type: ignore[operator]
        return
    if not getattr(module, own).is_meta:
        yield plain(getattr(module, own))
        return
    from accelerate.utils import align_module_device

    with torch.no_grad(), align_module_device(module):
        values = getattr(module, own)
        if values.is_meta:
            raise InputError(
                f"The weight `{name}` has no values (it is on the meta device): load the model with its weights, "
                "or pass its id."
            )
        yield plain(values)


def plain(values: Tensor) -> Tensor:
    """The numbers that `values` stands for: a quantised tensor's own, the whole of one that is spread over devices."""
    values = values.detach()
    if not hasattr(values, "__tensor_flatten__"):  # which tensors have that are made of others
        return values
    return values.full_tensor() if hasattr(values, "full_tensor") else values.dequantize()


def unpacked_with(base: Any, names: Iterable[str]) -> dict[str, bytes]:
    """Samples of what the packed weights `names` are unpacked with, where that is neither a parameter nor a buffer.

    bitsandbytes keeps it beside the weight (`quant_state`, `SCB`; this moves to the `state` of the module in its first
    pass), HQQ in the `meta` of the module.
    """
    out: dict[str, Tensor] = {}
    for name in names:
        path, _, own = name.rpartition(".")
        module = base.get_submodule(path)
        values = getattr(module, own)
        rows = getattr(values, "SCB", None)
        rows = getattr(getattr(module, "state", None), "SCB", None) if rows is None else rows
        out |= dict(_tensors(f"{name}.quant_state", getattr(values, "quant_state", None)))
        out |= dict(_tensors(f"{name}.SCB", rows))
        if own == "W_q":
            out |= dict(_tensors(f"{name}.meta", getattr(module, "meta", None)))
    return {where: sample_of(where, values) for where, values in out.items()}


def _tensors(where: str, held: Any) -> Iterator[tuple[str, Tensor]]:
    """All tensors in `held`: one, a dictionary, or an object with such."""
    if isinstance(held, Tensor):
        yield where, held
    elif isinstance(held, dict) or hasattr(held, "__dict__"):
        for name, value in (held if isinstance(held, dict) else vars(held)).items():
            if isinstance(value, Tensor | dict) or name == "state2":  # which bitsandbytes packed the scales with
                yield from _tensors(f"{where}.{name}", value)


# -- adapters of peft in the modules ----------------------------------------------------------------------------------


def idle(base: Any) -> set[str]:
    """The parameters of adapters that are there and not at work."""
    out: set[str] = set()
    for path, module in _with_adapters(base):
        at_work = () if module.disable_adapters else module.active_adapters
        for name, _ in module.named_parameters(prefix=path):
            parts = set(name[len(path) + 1 :].split("."))
            if "base_layer" not in parts and any(other in parts for other in _names(module) if other not in at_work):
                out.add(name)
    return out


def scales(base: Any, names: Iterable[str]) -> dict[str, bytes]:
    """By what adapters are multiplied in the modules of the parameters `names`: no weight says it to a fingerprint."""
    owners = {name.partition(".base_layer.")[0] for name in names if ".base_layer." in name}
    out: dict[str, bytes] = {}
    for path, module in _with_adapters(base):
        scaling = getattr(module, "scaling", None)
        if path in owners and isinstance(scaling, dict) and not module.disable_adapters:
            said = sorted((name, float(scaling[name])) for name in module.active_adapters if name in scaling)
            out[f"{path}.scaling"] = f"{path}.scaling {said} ".encode()
    return out


def _with_adapters(base: Any) -> list[tuple[str, Any]]:
    known = ("base_layer", "active_adapters", "disable_adapters")
    return [(path, module) for path, module in base.named_modules() if all(hasattr(module, name) for name in known)]


def _names(module: Any) -> set[str]:
    """The names of the adapters in a module."""
    layers = (getattr(module, name, ()) for name in getattr(module, "adapter_layer_names", ()))
    return {name for layer in layers if hasattr(layer, "keys") for name in layer}
