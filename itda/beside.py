"""What may stand beside a dictionary in its folder, never part of it: what was measured of it, and what its atoms do.

Both go when the dictionary is replaced, since they are of another one then.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

from itda.disk import bytes_of, json_object, leftover_of

EVAL = "eval.json"  # what `itda eval` measured
EVAL_FORMAT = "itda-evaluation"
_EVAL_KEYS = {"dictionary", "hook_point", "held_out", "systems", "settings"}  # of one without a format, as all were
USES = "uses"  # the folder of what `itda uses` saw
USES_FORMAT, USES_MANIFEST, USES_STATE = "itda-uses", "uses.json", "unfinished.safetensors"
USES_TABLES = ("atoms.parquet", "signs.parquet", "examples.parquet", "texts.parquet", "tokens.parquet")
_USES_FILE = re.compile(r"rows-\d{5,}\.parquet")  # of texts, while there are more to come


def is_evaluation(path: Path) -> bool:
    """Whether the file `path` is what `itda eval` writes; anybody may have an eval.json."""
    document = json_object(path)
    return document.get("format", EVAL_FORMAT) == EVAL_FORMAT and set(document) >= _EVAL_KEYS


def is_uses_file(name: str) -> bool:
    """Whether a file of this name is one of those that `itda uses` writes."""
    name = leftover_of(name) or name
    return name in (USES_MANIFEST, USES_STATE, *USES_TABLES) or _USES_FILE.fullmatch(name) is not None


def is_uses(path: Path) -> bool:
    """Whether the folder `path` is what `itda uses` writes, finished or not; names alone prove nothing."""
    if not path.is_dir() or path.is_symlink():
        return False
    names = os.listdir(path)
    ours = all(is_uses_file(name) and (path / name).is_file() for name in names)
    said = json_object(path / USES_MANIFEST).get("format") == USES_FORMAT if USES_MANIFEST in names else False
    return ours and (said or not names or any((leftover_of(name) or name) == USES_STATE for name in names))


def remove_uses(path: Path) -> None:
    """Remove that folder, if it is one."""
    if is_uses(path):
        shutil.rmtree(path)


def content_hash(dictionary: Any) -> str:
    """A sha256 of what a dictionary encodes with."""
    content = hashlib.sha256()
    for tensor in (dictionary.atoms, dictionary.mean, dictionary.scale):
        content.update(b"" if tensor is None else bytes_of(tensor.cpu().contiguous()))
    return content.hexdigest()
