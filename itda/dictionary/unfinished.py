"""The state of unfinished work, in one file that is replaced atomically; tensors and JSON, no pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from itda.dictionary.checkpoint import digest, signed, unreadable
from itda.disk import remove_leftovers, safetensors_chunks, write_file
from itda.errors import InputError
from itda.provenance import differing, said_of

VERSION = "1"


def save(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Write a state; `identity` says what of (`load` compares it)."""
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    said = json.dumps({"version": VERSION, "identity": identity, **state})
    metadata = {"state": said, "sha256": digest(said, kept)}
    write_file(path, safetensors_chunks(kept, metadata))


def load(
    path: Path, identity: Mapping[str, Any], work: str = "training"
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and state of a `work` in the file `path`; None where there is none.

    Raises `InputError` for one of other settings, another model or other activations, and one that is damaged.
    """
    from safetensors import SafetensorError

    remove_leftovers(path)
    if not path.is_file():
        return None
    try:
        state, tensors = signed(path, VERSION)
        name = differing(state["identity"], json.loads(json.dumps(identity)))
    except (SafetensorError, MemoryError, OSError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise unreadable(path, error) from error
    if name is not None:
        raise InputError(
            f"The unfinished {work} in {path.parent} was started with "
            f"{said_of(name, state['identity'].get(name), identity.get(name))}, or remove {path} to start anew."
        )
    return tensors, state
