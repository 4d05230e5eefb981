"""How a command is written down beside its results."""

import shlex
from pathlib import Path


def told(words):
    """A command line without the folders of this machine: of an absolute path its last part."""
    return shlex.join(Path(word).name if Path(word).is_absolute() else word for word in words)
