"""itda: dictionaries of real activations (Inference-Time Decomposition of Activations, arXiv 2505.17769)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from itda._version import __version__

if (
    TYPE_CHECKING
):  # what type checkers and editors read; `_HOMES` says the same to Python, and a test holds them together
    from itda.codes import Codes
    from itda.comparison.compare import compare
    from itda.comparison.diff import diff
    from itda.dictionary.build import PAPER, build
    from itda.dictionary.itda import ITDA
    from itda.errors import InputError
    from itda.evaluation.evaluate import evaluate
    from itda.labels import Batch, Labels
    from itda.models.loading import load_model
    from itda.pages.write import page
    from itda.pursuit import normalize, pursue
    from itda.reading.activations import activations
    from itda.reading.collect import collect
    from itda.reading.store import Store
    from itda.report import decompose, decompose_all
    from itda.report.hook_points import hook_points
    from itda.saes.sae import SAE
    from itda.saes.train import train_sae
    from itda.similarity import match_layers
    from itda.training.sweep import sweep
    from itda.training.train import train
    from itda.usage.kept import Uses
    from itda.usage.uses import uses

# Where each public name lives. It is imported when first used: `import itda` alone loads neither torch nor anything.
_HOMES = {
    "Batch": "labels",
    "Codes": "codes",
    "ITDA": "dictionary.itda",
    "InputError": "errors",
    "Labels": "labels",
    "PAPER": "dictionary.build",
    "SAE": "saes.sae",
    "Store": "reading.store",
    "activations": "reading.activations",
    "build": "dictionary.build",
    "collect": "reading.collect",
    "compare": "comparison.compare",
    "decompose": "report",
    "decompose_all": "report",
    "diff": "comparison.diff",
    "evaluate": "evaluation.evaluate",
    "hook_points": "report.hook_points",
    "load_model": "models.loading",
    "match_layers": "similarity",
    "normalize": "pursuit",
    "page": "pages.write",
    "pursue": "pursuit",
    "sweep": "training.sweep",
    "train": "training.train",
    "train_sae": "saes.train",
    "Uses": "usage.kept",
    "uses": "usage.uses",
}
_MODULES = {
    "interop": "interop",
    "metrics": "metrics",
    "places": "report.hook_points",  # the name of before `itda.hook_points`
    "refine": "refine",
    "saes": "saes",
    "report": "report",
    "similarity": "similarity",
}

__all__ = [
    "ITDA",
    "PAPER",
    "SAE",
    "Batch",
    "Codes",
    "InputError",
    "Labels",
    "Store",
    "Uses",
    "__version__",
    "activations",
    "build",
    "collect",
    "compare",
    "decompose",
    "decompose_all",
    "diff",
    "evaluate",
    "hook_points",
    "load_model",
    "match_layers",
    "normalize",
    "page",
    "pursue",
    "sweep",
    "train",
    "train_sae",
    "uses",
]


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
