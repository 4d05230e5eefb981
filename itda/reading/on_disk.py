"""Activations on disk as data: our stores, and the caches of SAELens, folders of Arrow files as `datasets` writes them.

SAELens' `CacheActivationsRunner` writes rows of a column named for the hook point, (context, d) each, and `token_ids`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from itda.errors import InputError, shortened
from itda.labels import Labels
from itda.reading.saelens_cache import Cache, is_cache
from itda.reading.store import Store, is_store
from itda.settings import groups, kept, names, verbs
from itda.settings.groups import Padding


def is_stored(data: Any) -> bool:
    """Whether `data` is a store or a cache, or the folder of one."""
    return isinstance(data, Store | Cache) or is_store(data) or is_cache(data)


def from_disk(model: Any, data: Any, given: Mapping[str, Any]) -> Store | Cache:
    """What `itda.activations` gives for a folder of activations: they were read before, so no model is loaded.

    Raises `InputError` for another `model`, and where `given`, the settings of a reading, asks for anything but the
    default that is not as it was.
    """
    path = data.path if isinstance(data, Store | Cache) else data
    if unknown := [name for name in given if name not in verbs.ACTIVATIONS.settings]:
        raise InputError(f"`activations` has no setting `{unknown[0]}`: `help(itda.activations)` lists all of them.")
    idle = set(names(verbs.Loading, groups.Tokenizer)) - {"dtype", "device", "revision"}
    verbs.ACTIVATIONS.refuse(given, sorted(idle), "activations on disk are read without a model")
    how: dict[str, Any] = {name: given[name] for name in ("layer", "hook", "tokens", "device")}
    name = _name_of(model)
    if not is_store(path):
        of = {name: given[name] for name in ("batch_rows", "special_tokens")}
        for setting in names(verbs.Text, Padding):
            if given[setting] != verbs.ACTIVATIONS.settings[setting].default:
                raise InputError(
                    f"{path} is an activation cache, without text that `{setting}` = {shortened(given[setting])} could "
                    "be about: leave it out."
                )
        return Cache(path, **how, **of, model=name)
    store = Store(path, **how)
    said = next(iter(store.contents.provenance.values()))
    if name is not None and not _same_name(name, said["model"].get("id")):
        raise InputError(
            f"{path} holds activations of {said['model'].get('id')!r}, and {name!r} was named: name that model, or "
            "collect those of this one."
        )
    was = {**said["stream"], **said, "data_revision": said["stream"].get("revision")}
    was |= {name: said["model"].get(name) for name in ("dtype", "revision")}
    for name in (*kept(verbs.Reading), "dtype", "revision"):
        value = str(given[name]).removeprefix("torch.") if name == "dtype" else given[name]
        if value not in (verbs.ACTIVATIONS.settings[name].default, was.get(name)):
            raise InputError(
                f"{path} was collected with `{name}` = {was.get(name)!r}, and {value!r} was asked for: leave it out, "
                "or collect anew."
            )
    return store


def _name_of(model: Any) -> str | None:
    """The id or folder of a model, loaded or not."""
    if model is None or isinstance(model, str | os.PathLike):
        return None if model is None else os.fspath(model)
    if hasattr(model, "_layout"):
        return model._layout.model
    return getattr(getattr(model, "config", None), "_name_or_path", None) or type(model).__name__


def _same_name(a: str, b: Any) -> bool:
    return a == b or (isinstance(b, str) and os.path.isdir(a) and os.path.realpath(a) == os.path.realpath(b))


def all_labels(stream: Any) -> tuple[Labels, list[tuple[int, str]]]:
    """All labels; and after how many tokens the stream has which hash."""
    parts, hashes, count = [], [], 0
    for labels, read in stream.labels():
        parts.append(labels)
        count += len(labels)
        hashes.append((count, read))
    return Labels.concat(parts), hashes
