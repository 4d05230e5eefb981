"""What an SAE says it was made for: whether its errors on activations here mean what the table says of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from itda.errors import InputError, shortened
from itda.provenance import section

_CENTRED = ("center_writing_weights", "fold_value_biases", "refactor_factored_attn_matrices")
_ANOTHER = "give an SAE, which writes the activations that it reads"


def no_sae(name: str, why: str, advice: str) -> InputError:
    """What is said of an SAE whose error here would say nothing."""
    return InputError(f"{name!r} {why}, so its error here would say nothing: {advice}.")


def transcoder(name: str, kind: str = "transcoder", where: str = "") -> InputError:
    """What is said of one that writes other activations than it reads."""
    return no_sae(
        name, f"is a {kind.replace('_', ' ')}, which predicts other activations{where} than it reads", _ANOTHER
    )


def check(cfg: Mapping[str, Any], name: str) -> None:
    """Raise `InputError` for what is no SAE of activations as they are here, at one place and in all its dimensions.

    `cfg` is what cfg.json of SAELens says.
    """
    kind, said = str(cfg["architecture"]), section(cfg, "metadata")

    hook, out = said.get("hook_name"), said.get("hook_name_out") or cfg.get("hook_name_out")
    if "coder" in kind or (out and hook and out != hook):
        raise transcoder(name, kind, f" at {shortened(out)}" if out else "")
    if kind == "temporal":
        raise no_sae(
            name, "reads the tokens before each one too (architecture 'temporal')", "give an SAE of single tokens"
        )
    reshaped, normalised = cfg["reshape_activations"], cfg["normalize_activations"]
    if reshaped != "none" or said.get("hook_head_index") is not None:
        raise no_sae(
            name,
            f"reads attention heads apart (`reshape_activations` is {shortened(reshaped)})",
            "give an SAE of a residual stream, of an attention's output or of an MLP's",
        )
    if normalised in ("expected_average_only_in", "covariance_whitening"):
        fold = "fold_activation_norm_scaling_factor" if normalised[0] == "e" else "fold_activation_whitening"
        raise no_sae(
            name,
            f"was trained on scaled activations (`normalize_activations` is {normalised!r}), by what is not in it",
            f"fold the scale in (`sae.{fold}`) and save it again",
        )
    how = said.get("model_from_pretrained_kwargs")
    processed = [key for key in _CENTRED if isinstance(how, dict) and how.get(key)]
    if isinstance(how, dict) and how.get("fold_ln") and isinstance(hook, str) and ("ln" in hook or "norm" in hook):
        processed.append("fold_ln")
    if processed:
        raise no_sae(
            name,
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
