"""SAEs that SAELens knows on the Hugging Face hub: release/sae_id, or org/repository/folder."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from itda import remote
from itda.errors import InputError, shortened
from itda.models import hub

if TYPE_CHECKING:
    from sae_lens import SAE as TheirSAE

ONLY_WEIGHTS = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # what older releases of torch do not do by themselves


def load(name: str, device: str) -> TheirSAE:
    """The SAE that is called `name` on the hub, by SAELens, which finds it in its cache or downloads it.

    Raises `InputError` for a name that is none, one that the hub does not have, and where it is not reached.
    """
    from sae_lens import SAE as TheirSAE

    release, sae_id = parted(name)
    repo, folder = _place(release, sae_id)
    with hub.quiet(), hub.door(name, None), _weights_only():
        remote.check_answers(repo, lambda file: file.startswith(folder))
        return TheirSAE.from_pretrained(release, sae_id, device=device)


def check_name(name: str) -> None:
    """Raise `InputError` for what looks like a path and not like a name on the hub; needs no SAELens."""
    if name.startswith((".", "/", "~")):
        raise InputError(f"{name} is not there: give the folder of an SAE, or its name on the hub, release/sae_id.")


def parted(name: str) -> tuple[str, str]:
    """Release and id of `name`; raises `InputError` where SAELens knows no such release, or the release no such id."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    known = get_pretrained_saes_directory()
    release, _, sae_id = name.partition("/")
    if release in known:
        every = list(known[release].saes_map)
        if sae_id not in every:
            near = (difflib.get_close_matches(sae_id, every, 1, 0.0) or every)[0]
            raise InputError(
                f"SAELens has no {shortened(sae_id)} in its release {release!r}: give one of its {len(every)} ids, "
                f"such as {release}/{near}."
            )
        return release, sae_id
    parts = name.split("/", 2)
    if len(parts) < 3 or not remote.HUB_ID.fullmatch("/".join(parts[:2])):
        near = difflib.get_close_matches(release, known, 1)
        raise InputError(
            f"{name} is no folder here, and SAELens has no release {release!r}"
            f"{f' (but {near[0]})' if near else ''}: give a folder, or release/sae_id of its list."
        )
    return "/".join(parts[:2]), parts[2]


def _place(release: str, sae_id: str) -> tuple[str, str]:
    from sae_lens.loading.pretrained_saes_directory import get_repo_id_and_folder_name

    return get_repo_id_and_folder_name(release, sae_id)


@contextmanager
def _weights_only() -> Iterator[None]:
    """Inside, torch loads weights alone from a pickle, also where its caller does not say so."""
    before = os.environ.get(ONLY_WEIGHTS)
    os.environ[ONLY_WEIGHTS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[ONLY_WEIGHTS]
        else:
            os.environ[ONLY_WEIGHTS] = before
