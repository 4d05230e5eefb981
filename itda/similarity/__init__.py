"""How alike two dictionaries, or what two models make of the same tokens, are.

`sets`: dictionaries as sets of labels. `spaces`: clouds of vectors. `codes`: codes over atoms that two models share.
`matching`: which layer is which (eq. 9, eq. 10). `paper`: the published code's baselines with their defects.
A kernel like `pursuit`, which it may use: tensors or labels in, numbers out.
"""

from itda.similarity import paper
from itda.similarity.clouds import Cloud, Pair
from itda.similarity.codes import code_cosine, shared_atom_codes, shared_atoms, support_overlap
from itda.similarity.matching import Matching, Score, match_layers, model_similarity
from itda.similarity.sets import (
    corrected_jaccard,
    expected_jaccard,
    expected_jaccard_by_token,
    jaccard,
    overlap,
    soft_overlap,
)
from itda.similarity.spaces import (
    INVARIANCES,
    Measure,
    cca,
    cca_coefficients,
    cka,
    cka_debiased,
    cka_standardised,
    linear_regression,
    procrustes,
    relative,
    relative_representations,
    svcca,
)
from itda.similarity.spaces import MEASURES as _SPACES

_ROTATED = frozenset({"orthogonal", "scale"})
_OURS = (
    Measure("shared_atoms", shared_atoms, _ROTATED, True, "this library", False),
    Measure("jaccard", jaccard, _ROTATED, True, "Leask et al. 2025, eq. 8, of dictionaries built on both", False),
    Measure("overlap", overlap, _ROTATED, True, "Szymkiewicz 1934; Simpson 1943, of dictionaries built on both", False),
)

# Every measure, with what it is blind to. Those of sets take two dictionaries, the others two arrays (tokens, d).
MEASURES: dict[str, Measure] = {**_SPACES, **{measure.name: measure for measure in _OURS}}

__all__ = [
    "INVARIANCES",
    "MEASURES",
    "Cloud",
    "Matching",
    "Measure",
    "Pair",
    "Score",
    "cca",
    "cca_coefficients",
    "cka",
    "cka_debiased",
    "cka_standardised",
    "code_cosine",
    "corrected_jaccard",
    "expected_jaccard",
    "expected_jaccard_by_token",
    "jaccard",
    "linear_regression",
    "match_layers",
    "model_similarity",
    "overlap",
    "paper",
    "procrustes",
    "relative",
    "relative_representations",
    "shared_atom_codes",
    "shared_atoms",
    "soft_overlap",
    "support_overlap",
    "svcca",
]
