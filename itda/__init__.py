"""itda: dictionaries of real activations (Inference-Time Decomposition of Activations, arXiv 2505.17769)."""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from itda._version import __version__

# Where each public name lives. It is imported when first used: `import itda` alone loads neither torch nor anything.
_HOMES = {
    "Batch": "labels",
    "Codes": "codes",
    "ITDA": "model",
    "InputError": "errors",
    "Labels": "labels",
    "PAPER": "build",
    "Store": "store",
    "activations": "hooks",
    "build": "build",
    "collect": "collect",
    "compare": "compare",
    "decompose": "report",
    "diff": "diff",
    "evaluate": "evaluate",
    "match_layers": "similarity",
    "normalize": "pursuit",
    "pursue": "pursuit",
    "sweep": "sweep",
    "train": "runs",
}

__all__ = [*_HOMES, "__version__"]

_MODULES = ("interop", "metrics", "places", "refine", "report", "similarity")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"itda.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'itda' has no attribute {name!r}")
    value = getattr(import_module(f"itda.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    """Keeps `itda.build` the function when the import system binds the module of that name to the package."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _HOMES.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
