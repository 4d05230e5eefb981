"""SAEs in the formats of other libraries, read without them: Gemma Scope, sparsify, dictionary_learning.

All become `itda.saes.sae.SAE`s. Files are read as numbers only: .npz and .safetensors hold nothing else, and a pickle
is read by torch's loader of weights alone, which makes no other objects. What a file does not say of its place is taken
from the names of its folders, as these libraries give them; else it is told that nothing says it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from itda import remote
from itda.disk import json_object
from itda.errors import InputError, counted, first_line, shortened
from itda.interop.made_for import transcoder
from itda.progress import tell
from itda.provenance import section
from itda.saes.sae import SAE

NPZ, SPARSIFY, LEARNED = "params.npz", "sae.safetensors", "ae.pt"
_BLOCK = re.compile(r"(?:^|\.)(?:layers?|h|blocks)\.(\d+)(?:\.(\w+))?$")
_OUTPUTS = {None: "hook_resid_post", "mlp": "hook_mlp_out", "attn": "hook_attn_out", "self_attn": "hook_attn_out"}
_GEMMA = re.compile(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att)\b")
_GEMMA_HOOKS = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}


def read(path: str | os.PathLike) -> SAE | None:
    """The SAE in a file, or in a folder with one, in one of these formats; None for what is in none of them.

    Raises `InputError` for a transcoder, a kind that is not read, a folder of several, a pickle of other objects than
    weights, and files that are damaged or not finite.
    """
    path = Path(path)
    for name, ending, reader in (
        (NPZ, ".npz", _gemma_scope),
        (SPARSIFY, SPARSIFY, _sparsify),
        (LEARNED, ".pt", _dictionary_learning),
    ):
        if os.path.isfile(path / name):
            return reader(path / name)
        if os.path.isfile(path) and path.name.endswith(ending):
            return reader(path)
        if several := sorted(file.parent.name for file in path.glob(f"*/{name}")):
            raise InputError(f"{path} is a folder of {len(several)} SAEs: give one of them, such as {several[0]}.")
    if os.path.isfile(path) and path.suffix in (".pth", ".bin", ".pkl", ".ckpt"):
        raise InputError(f"{path} is a pickle, which could run any code and is not read: give weights as safetensors.")
    return None


def name_of(path: str | os.PathLike) -> str:
    """What an SAE is called: its folder."""
    path = Path(os.path.abspath(path))
    return path.name if path.is_dir() else path.parent.name


def _gemma_scope(file: Path) -> SAE:
    """JumpReLU weights in .npz (Lieberum et al., arXiv 2408.05147); the bias is not taken from the input."""

    def load() -> dict[str, Tensor]:
        with np.load(file, allow_pickle=False) as data:
            return {name: torch.from_numpy(data[name].astype(np.float32)) for name in data.files}

    found = _loaded(file, "an .npz file of numbers", load)
    if "transcoder" in str(file.absolute()):
        raise transcoder(name_of(file))
    said = _GEMMA.search(str(file.absolute()))
    layer = re.search(r"layer_(\d+)", str(file.absolute()))
    metadata = {}
    if said and layer:
        hook = f"blocks.{layer[1]}.{_GEMMA_HOOKS[said[3]]}"
        metadata = {"model_name": f"gemma-2-{said[1]}{'-it' if said[2] == 'it' else ''}", "hook_name": hook}
    return _sae(file, "jumprelu", found, threshold="threshold", subtract=False, metadata=metadata)


def _sparsify(file: Path) -> SAE:
    """EleutherAI's TopK SAEs: cfg.json beside sae.safetensors, in a folder that is called as its place."""
    from safetensors.torch import load_file

    cfg = json_object(file.parent / "cfg.json")
    found = _loaded(file, "a file of safetensors", lambda: load_file(file))
    if "W_skip" in found or cfg.get("transcode") or cfg.get("skip_connection"):
        raise transcoder(name_of(file))
    activation, k = cfg.get("activation", "topk"), cfg.get("k")
    if activation != "topk" or cfg.get("signed"):
        how = "signed" if cfg.get("signed") else activation
        raise InputError(f"{file.parent} has the activation {shortened(how)}, which is not read: give one of 'topk'.")
    if type(k) is not int:
        raise InputError(f"{file.parent / 'cfg.json'} does not say `k`, the latents of a token: give a whole folder.")
    named = {"W_enc": _turned(found, "encoder.weight"), "b_enc": found.get("encoder.bias")}
    named |= {name: found.get(name) for name in ("W_dec", "b_dec")}
    return _sae(file, "topk", named, k=k, metadata=_place(name_of(file)))


def _dictionary_learning(file: Path) -> SAE:
    """Dictionaries of dictionary_learning: ae.pt, a pickle of weights, and its trainer in config.json."""

    def load() -> Any:
        return torch.load(file, map_location="cpu", weights_only=True)

    found = _loaded(file, "a pickle of weights alone (another could run any code, and is not read)", load)
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise InputError(f"{file} holds no weights by name, so it is no SAE: give one of dictionary_learning.")
    said = section(json_object(file.parent / "config.json"), "trainer")
    kind = said.get("dict_class")
    linear: dict[str, Any] = {"W_enc": _turned(found, "encoder.weight"), "b_enc": found.get("encoder.bias")}
    linear["W_dec"] = _turned(found, "decoder.weight")
    metadata = {"model_name": said.get("lm_name")}
    if isinstance(at := said.get("submodule_name"), str) and (layer := re.fullmatch(r"resid_post_layer_(\d+)", at)):
        metadata["hook_name"] = f"blocks.{layer[1]}.hook_resid_post"
    named = frozenset(found)
    if named == {"encoder.weight", "encoder.bias", "decoder.weight", "bias"}:
        return _sae(file, "relu", linear | {"b_dec": found["bias"]}, metadata=metadata)
    if named == {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}:
        return _sae(file, "relu", linear | {"b_dec": found["decoder.bias"]}, subtract=False, metadata=metadata)
    if named == {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}:
        return _sae(file, "jumprelu", dict(found), threshold="threshold", subtract=False, metadata=metadata)
    if named - {"threshold"} == {"encoder.weight", "encoder.bias", "decoder.weight", "b_dec", "k"}:
        k, linear["b_dec"] = int(found["k"].reshape(-1)[0]), found["b_dec"]
        if kind == "AutoEncoderTopK":
            return _sae(file, "topk", linear, k=k, metadata=metadata)
        if kind == "BatchTopKSAE" and "threshold" in found:
            linear["threshold"] = found["threshold"].float().expand(linear["W_dec"].shape[:1])
            return _sae(file, "batchtopk", linear, k=k, threshold="threshold", metadata=metadata)
    what = f"of the kind {shortened(kind)}" if kind else "of a kind that config.json does not say"
    raise InputError(f"{file} is {what}, which is not read: AutoEncoder, TopK, BatchTopK and JumpReLU are.")


def _loaded(file: Path, what: str, load: Callable[[], Any]) -> Any:
    def sentence(error: Exception) -> str:
        return f"{file} could not be read as {what} ({type(error).__name__}: {first_line(error)}): give another file."

    with remote.door(f"{file} could not be read", sentence):
        return load()


def _sae(
    file: Path,
    kind: str,
    tensors: Mapping[str, Tensor | None],
    *,
    k: int | None = None,
    threshold: str | None = None,
    subtract: bool = True,
    metadata: Mapping[str, Any],
) -> SAE:
    """An SAE of tensors that are called as ours, once they are known to fit together and to be finite."""
    names = ["W_enc", "b_enc", "W_dec", "b_dec"] + ([threshold] if threshold else [])
    if missing := [name for name in names if tensors.get(name) is None]:
        raise InputError(f"{file} has no {missing[0]}, so it is no SAE: give another file.")
    found: dict[str, Any] = {name: tensors[name].float() for name in names}  # type: ignore[union-attr]
    n, d = found["W_dec"].shape if found["W_dec"].ndim == 2 else (0, 0)
    for name, shape in {"W_enc": (d, n), "b_enc": (n,), "W_dec": (n, d), "b_dec": (d,), "threshold": (n,)}.items():
        if name in found and tuple(found[name].shape) != shape:
            raise InputError(
                f"{file} has {name} of shape {tuple(found[name].shape)}, and {shape} was wanted: give another file."
            )
        if name in found and not bool(found[name].isfinite().all()):
            raise InputError(f"{file} has numbers in {name} that are not finite: give another file.")
    if k is not None and not 0 < k <= n:
        raise InputError(f"{file} is of {counted(n, 'latent')} and has k = {k}: give another file.")
    known = {name: value for name, value in metadata.items() if isinstance(value, str) and value}
    if "hook_name" not in known:
        tell(f"{name_of(file)} does not say at which hook point it was made, so that it may be for another")
    return SAE(kind, **found, k=k, subtract=subtract, metadata=known)


def _turned(tensors: Mapping[str, Tensor], name: str) -> Tensor | None:
    found = tensors.get(name)
    return None if found is None else found.mT


def _place(folder: str) -> dict[str, str]:
    """The hook point of a module that is called layers.3 or h.3.mlp, by the name that TransformerLens has for it."""
    found = _BLOCK.search(folder)
    output = _OUTPUTS.get(found[2]) if found else None
    return {"hook_name": f"blocks.{found[1]}.{output}"} if found and output else {}
