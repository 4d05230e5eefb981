"""itda: dictionaries of real activations (Inference-Time Decomposition of Activations, arXiv 2505.17769)."""

from importlib import import_module
from typing import Any

from itda._version import __version__

# Where each public name lives. It is imported when first used: `import itda` alone loads neither torch nor anything.
_HOMES = {
    "Batch": "labels",
    "Codes": "codes",
    "ITDA": "dictionary.itda",
    "InputError": "errors",
    "Labels": "labels",
    "PAPER": "dictionary.build",
    "Store": "reading.store",
    "activations": "reading.activations",
    "build": "dictionary.build",
    "collect": "reading.collect",
    "compare": "comparison.compare",
    "decompose": "report",
    "diff": "comparison.diff",
    "evaluate": "evaluation.evaluate",
    "hook_points": "report.hook_points",
    "load_model": "models.loading",
    "match_layers": "similarity",
    "normalize": "pursuit",
    "pursue": "pursuit",
    "sweep": "training.sweep",
    "train": "training.train",
}
_MODULES = {
    "interop": "interop",
    "metrics": "metrics",
    "places": "report.hook_points",  # the name of before `itda.hook_points`
    "refine": "dictionary.refine",
    "report": "report",
    "similarity": "similarity",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"itda.{_MODULES[name]}")
    if name not in _HOMES:
        raise AttributeError(f"module 'itda' has no attribute {name!r}")
    value = getattr(import_module(f"itda.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
