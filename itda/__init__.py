"""itda: dictionaries of real activations (Inference-Time Decomposition of Activations, arXiv 2505.17769)."""

from itda._version import __version__
from itda.build import PAPER, build
from itda.codes import Codes
from itda.errors import InputError
from itda.hooks import activations
from itda.labels import Batch, Labels
from itda.model import ITDA
from itda.pursuit import normalize, pursue

__all__ = [
    "ITDA",
    "PAPER",
    "Batch",
    "Codes",
    "InputError",
    "Labels",
    "__version__",
    "activations",
    "build",
    "normalize",
    "pursue",
]
