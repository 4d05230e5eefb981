"""What an SAE says it was made for: whether its errors on activations here mean what the table says of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from itda.disk import json_object
from itda.errors import InputError, shortened
from itda.provenance import section

_CENTRED = ("center_writing_weights", "fold_value_biases", "refactor_factored_attn_matrices")
_WANTED = "and an SAE in SAELens' format was wanted: save it as one (`save_model` of SAELens does)"


def foreign(path: str | os.PathLike) -> str | None:
    """What a file or folder of SAEs that is not in SAELens' format is, in a few words; None for any other."""
    path = Path(path)
    names = set(os.listdir(path)) if os.path.isdir(path) else {path.name}
    if any(name.endswith(".npz") for name in names):
        return "a dictionary of Gemma Scope (JumpReLU weights in .npz)"
    inner = [name for name in sorted(names) if os.path.isfile(path / name / "sae.safetensors")]
    if "sae.safetensors" in names or inner:
        return "an SAE of sparsify (sae.safetensors)" if not inner else "a folder of SAEs of sparsify"
    if "ae.pt" in names or "trainer" in json_object(path / "config.json"):
        return "a dictionary of dictionary_learning (ae.pt, a pickle, with its trainer in config.json)"
    if os.path.isfile(path) and path.suffix in (".pt", ".pth", ".bin"):
        return "a pickle, which could run any code and is not read"
    return None


def check_format(path: str | os.PathLike) -> None:
    """Raise `InputError` for an SAE in the format of another library, and name that."""
    if (what := foreign(path)) is not None:
        raise InputError(f"{path} is {what}, {_WANTED}.")


def check(cfg: Mapping[str, Any], name: str) -> None:
    """Raise `InputError` for what is no SAE of activations as they are here, at one place and in all its dimensions.

    `cfg` is what cfg.json of SAELens says.
    """
    kind, said = str(cfg["architecture"]), section(cfg, "metadata")

    def no(why: str, advice: str) -> InputError:
        return InputError(f"{name!r} {why}, so its error here would say nothing: {advice}.")

    hook, out = said.get("hook_name"), said.get("hook_name_out") or cfg.get("hook_name_out")
    another = "give an SAE, which writes the activations that it reads"
    if "coder" in kind or (out and hook and out != hook):
        where = f" at {shortened(out)}" if out else ""
        raise no(f"is a {kind.replace('_', ' ')}, which predicts other activations{where} than it reads", another)
    if kind == "temporal":
        raise no("reads the tokens before each one too (architecture 'temporal')", "give an SAE of single tokens")
    reshaped, normalised = cfg["reshape_activations"], cfg["normalize_activations"]
    if reshaped != "none" or said.get("hook_head_index") is not None:
        raise no(
            f"reads attention heads apart (`reshape_activations` is {shortened(reshaped)})",
            "give an SAE of a residual stream, of an attention's output or of an MLP's",
        )
    if normalised in ("expected_average_only_in", "covariance_whitening"):
        fold = "fold_activation_norm_scaling_factor" if normalised[0] == "e" else "fold_activation_whitening"
        raise no(
            f"was trained on scaled activations (`normalize_activations` is {normalised!r}), by what is not in it",
            f"fold the scale in (`sae.{fold}`) and save it again",
        )
    how = said.get("model_from_pretrained_kwargs")
    processed = [key for key in _CENTRED if isinstance(how, dict) and how.get(key)]
    if isinstance(how, dict) and how.get("fold_ln") and isinstance(hook, str) and ("ln" in hook or "norm" in hook):
        processed.append("fold_ln")
    if processed:
        raise no(
            f"was made for a model with processed weights (`{processed[0]}`), whose activations are others",
            "give one that was trained without such processing",
        )


def check_place(cfg: Mapping[str, Any], name: str) -> None:
    """Raise `InputError` if an SAE does not say where it was made for."""
    if not isinstance(hook := section(cfg, "metadata").get("hook_name"), str) or not hook:
        raise InputError(
            f"{name!r} does not say at which hook point it was made, so it may be for another: write `hook_name` into "
            "`metadata` of its cfg.json, such as blocks.8.hook_resid_post."
        )
