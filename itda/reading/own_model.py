"""The model that a dictionary was built on, loaded again and compared with what the dictionary knows of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from itda.errors import InputError
from itda.models.loading import language_model, load_model
from itda.provenance import section
from itda.reading.activations import activations


def model_of(cfg: Mapping[str, Any], how: Mapping[str, Any] | None = None, *, head: bool = False) -> tuple[Any, str]:
    """The model to read, and the name of its hook point, after comparing it with the one the dictionary knows.

    `cfg` is that of the dictionary, `how` has settings of `groups.Again`.
    With `head` it is the whole language model, where it is one. Raises `InputError` for another model unless `force`.
    """
    how = how or {}
    model, force = how.get("model"), how.get("force")
    was = section(cfg, "model")
    if not was.get("hook_point") or (model is None and not was.get("id")):
        raise InputError(
            "This dictionary does not say which model it was built on, so it reads no text: use its `encode` on "
            "activations."
        )
    by_name = model is None or isinstance(model, str | os.PathLike)
    if not by_name and how.get("dtype") is not None:
        raise InputError("`model` is loaded already and used as it is: drop `dtype`, or pass the model's name.")
    settings: dict[str, Any] = {"device": how.get("device"), "trust_remote_code": bool(how.get("trust_remote_code"))}
    if by_name:
        settings |= {
            "dtype": how.get("dtype") or was.get("dtype") or "auto",
            "revision": None if model else was.get("revision"),
        }
    try:
        name = was["id"] if model is None else model
        loader = language_model if head else load_model
        hooked = loader(name, how.get("tokenizer"), hooks=was["hook_point"], **settings)
    except InputError as error:
        if model is not None:
            raise
        advice = "name the place of the model with `model` (`--model`)"
        raise InputError(f"The model of this ITDA cannot be loaded ({str(error).rstrip('.')}): {advice}.") from error
    hook = hooked.hook_points[0]
    now = hooked.provenance(hook)
    named = {"fingerprint": "weights", "quantization": "quantisation", "tokenizer_hash": "tokenizer", "d": "width d"}
    if was.get("remote"):
        del named["fingerprint"]  # of which nothing was known
    differ = differences(was, now, named)
    if differ and (not force or was.get("d") != now["d"]):
        raise InputError(
            f"This ITDA was built on a model that differs from `{now['id']}` in its {' and its '.join(differ)}: give "
            "that model, or take this one all the same with `force` (`--force`)."
        )
    return hooked, hook


def stored_of(cfg: Mapping[str, Any], d: int, data: Any, force: bool, reading: Mapping[str, Any]) -> Any:
    """The activations on disk (`data`) at the hook point of a dictionary with this `cfg` and of width `d`.

    Raises `InputError` for those of another width, for those that were not read as `reading` has it (`None`: as they
    were), and unless `force` for those of other weights or another tokenizer.
    """
    was = section(cfg, "model")
    given = {name: value for name, value in reading.items() if value is not None}
    stream: Any = activations(given.pop("model", None), data, **given)
    names = list(stream.hook_points)
    hook = was.get("hook_point")
    if hook not in names and len(names) == 1 and force:
        hook = names[0]
    stream = activations(None, data, hook=hook, **({"tokens": given["tokens"]} if "tokens" in given else {}))
    now = stream.provenance["model"]
    differ = differences(was, now, {"fingerprint": "weights", "tokenizer_hash": "tokenizer"})
    if d != now["d"]:
        differ, force = [f"width d ({d}, not {now['d']})"], False
    if differ and not force:
        raise InputError(
            f"{stream.path} holds activations of a model that differs from the dictionary's in its "
            f"{' and its '.join(differ)}: give those of its model, or take these all the same with `force` (`--force`)."
        )
    return stream


def differences(was: dict[str, Any], now: dict[str, Any], named: dict[str, str]) -> list[str]:
    """What two models are said to be, where it is not the same; `named` is what to call the keys."""
    return [
        f"{what} ({str(was.get(key))[:12]}, not {str(now.get(key))[:12]})"
        for key, what in named.items()
        if was.get(key) != now.get(key)
    ]
