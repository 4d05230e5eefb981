"""A folder in SAELens' format: cfg.json and sae_weights.safetensors, written by us so that each says the other is its.

`metadata.itda` in cfg.json says that it is ours: with "kind" it is an SAE that was trained here, with "labels" a
dictionary that was exported. Its "sha256" is that of the weights.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from itda.dictionary.folder import check_writable_target
from itda.disk import (
    ELSEWHERE,
    LARGEST,
    as_input_error,
    leftover_of,
    remove_leftovers,
    safetensors_chunks,
    small_file,
    staged,
    sync_folder,
    write_file,
)
from itda.errors import InputError
from itda.locks import PATIENCE, locked
from itda.provenance import section

CFG, WEIGHTS, NEXT = "cfg.json", "sae_weights.safetensors", "sae_weights.next"
CHECKPOINT = "sae_training.safetensors"  # of a training that has not finished
FORMAT = "6.0.0"  # SAELens' version of it: what says none is read as older, and loses its metadata
EXPORT, TRAINED = "labels", "kind"  # the key of `metadata.itda` that says which of the two it is
_SAID = {EXPORT: "an export", TRAINED: "an SAE that was trained here"}


def target_of(out: str | os.PathLike) -> Path:
    """The folder `out`, if something can be written there; raises `InputError` if not."""
    target = Path(out)
    if not os.path.isdir(target):
        check_writable_target(target)
    return target


def write(out: Path, cfg: dict[str, Any], tensors: dict[str, Tensor], what: str) -> None:
    """Put an SAE into `out`, by one process at a time; cfg.json comes last, and says which weights it is of.

    `what` is `EXPORT` or `TRAINED`: one of the same is replaced. Raises `InputError` for a folder with anything else.
    """
    weights = safetensors_chunks(tensors, {"format": "pt", "itda": what})
    digest = hashlib.sha256()
    for chunk in weights:
        digest.update(chunk)
    cfg["metadata"]["itda"]["sha256"] = digest.hexdigest()
    with locked(Path(os.path.realpath(out)), patience=PATIENCE, within=True):
        check_alone(out, what)
        for name in (CFG, WEIGHTS):
            remove_leftovers(out / name)  # of one that was killed
        with as_input_error(f"{out} could not be written", ELSEWHERE):
            (out / NEXT).unlink(missing_ok=True)  # of one by an earlier version
            with staged(out / WEIGHTS, weights) as temporary:  # a full disk leaves the old one
                (out / CFG).unlink(missing_ok=True)  # never old labels beside new weights
                os.replace(temporary, out / WEIGHTS)
                sync_folder(out)
        write_file(out / CFG, [(json.dumps(cfg, indent=1, allow_nan=False) + "\n").encode()])


def check_alone(target: Path, what: str) -> None:
    """Raise `InputError` for a folder with anything but `what`; known within its lock, when nobody else writes."""
    with as_input_error(f"{target} could not be used", ELSEWHERE):
        found = [path for path in target.iterdir() if not _is_leftover(path)]
    part = _SAID[what]
    known = {CFG, WEIGHTS} | ({CHECKPOINT} if what == TRAINED else set())
    # What has vanished meanwhile was a temporary file of another writer.
    if foreign := sorted({path.name for path in found if os.path.lexists(path)} - known):
        raise InputError(f"{target} holds {foreign[0]!r}, which is no part of {part}: choose a new or empty folder.")
    if (target / WEIGHTS).exists() and not (target / CFG).exists() and not _is_ours(target / WEIGHTS):
        raise InputError(f"{target} holds {WEIGHTS} of something else: choose a new or empty folder.")
    if (target / CFG).exists() and not is_written(target, what):
        raise InputError(f"{target} holds a {CFG} that is not of {part}: choose a new or empty folder.")


def is_written(folder: Path, what: str) -> bool:
    """Whether there is a cfg.json of `what` in `folder`; that of any other SAE has the same name."""
    with suppress(OSError):
        return what in said(small_file(folder / CFG))
    return False


def _is_leftover(path: Path) -> bool:
    """Whether this is what a killed writer left."""
    plain = path.is_file() and not path.is_symlink()
    ours = leftover_of(path.name) in (CFG, WEIGHTS, CHECKPOINT)
    return plain and (ours or (path.name == NEXT and _is_ours(path)))


def _is_ours(path: Path) -> bool:
    """Whether the weights at `path`, which may have been cut short, were written by `write`."""
    with suppress(OSError, ValueError, RecursionError, AttributeError), open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return "itda" in json.loads(file.read(min(size, LARGEST)))["__metadata__"]
    return False


def said(data: bytes) -> dict[str, Any]:
    """What a cfg.json of ours says of itself; of anything else, nothing."""
    with suppress(ValueError, RecursionError):
        document = json.loads(data)
        return section(section(document, "metadata"), "itda") if isinstance(document, dict) else {}
    return {}


def digests(folder: Path) -> tuple[str | None, str]:
    """The sha256 of cfg.json (None if it is not ours) and of the weights, which are of one SAE if it is.

    Raises `InputError` if they are not: somebody is replacing it, or was killed by a power cut.
    """
    with as_input_error(f"{folder} could not be read", "give another folder"):
        data = small_file(folder / CFG)
        known = said(data).get("sha256")
        if known is None:  # of SAELens, or of an earlier version
            return None, ""
        with open(folder / WEIGHTS, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != known:
        raise InputError(
            f"{folder / WEIGHTS} is not of the export that {CFG} is of (its sha256 differs): "
            f"{'train' if TRAINED in said(data) else 'export the dictionary'} again."
        )
    return hashlib.sha256(data).hexdigest(), found


def metadata(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What SAELens and its users look for: the model, the place and the text that activations came from."""
    model, stream = (section(provenance, part) for part in ("model", "stream"))
    hook, layer = model.get("hook_point"), model.get("layer")
    is_block = layer is not None and hook is not None and hook.rpartition(".")[2] == str(layer)
    return {
        "sae_lens_version": FORMAT,
        "sae_lens_training_version": None,
        "model_name": model.get("id"),
        "hook_name": f"blocks.{layer}.hook_resid_post" if is_block else hook,
        "hf_hook_name": hook,
        "context_size": stream.get("context_length"),
        "dataset_path": stream.get("data"),
        "prepend_bos": bool(stream.get("prefix")),
        "exclude_special_tokens": not provenance.get("special_tokens", False),
    }
