"""One rule for labels of different token streams: refused wherever they would be put side by side."""

import itertools

import numpy as np
import pytest
import torch

import itda
from itda import similarity
from itda.labels import Labels
from tests.untyped import untyped

ONE = {"hash": "a" * 64, "tokenizer_hash": "x", "context_length": 128, "data": "book.txt"}
OTHERS = {
    "made by different tokenizers": ONE | {"hash": "b" * 64, "tokenizer_hash": "y"},
    "cut differently (context_length)": ONE | {"hash": "c" * 64, "context_length": 64},
    "of different text": ONE | {"hash": "d" * 64},
}
OPERATIONS = {
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "sub": lambda a, b: a - b,
    "jaccard": similarity.jaccard,
    "overlap": similarity.overlap,
    "eq10": lambda a, b: similarity.model_similarity([a], [b]),
}


def dictionary(stream):
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    model = itda.build([x], k=2, threshold=0.2)
    return itda.ITDA(model.atoms, model.labels, 2, model.mean, model.norms, model.losses, {"stream": stream})


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("said", OTHERS)
def test_bare_labels_know_their_stream(name, said):
    a, b = dictionary(ONE).labels, dictionary(OTHERS[said]).labels
    for one, other in itertools.permutations((a, b, b[:5], Labels.concat([b[:3], b[3:]])), 2):
        if (one is a) is not (other is a):
            with pytest.raises(itda.InputError) as error:
                OPERATIONS[name](one, other)
            assert said in str(error.value) and str(error.value).startswith("The labels come from")
        else:
            OPERATIONS[name](one, other)
    OPERATIONS[name](a, dictionary(dict(ONE)).labels)
    OPERATIONS[name](a, dictionary({}).labels)  # which says nothing, and fits any


def test_a_dictionary_that_is_loaded_or_cut_has_labels_that_know(tmp_path):
    model = dictionary(ONE)
    model.save(tmp_path / "d")
    again = itda.ITDA.load(tmp_path / "d")
    assert again.labels.stream["hash"] == ONE["hash"] and (again.labels & model.labels).stream == ONE
    assert (model.labels | dictionary({}).labels).stream == ONE
    assert Labels.concat([model.labels, dictionary(OTHERS["of different text"]).labels]).stream == {}


def test_what_a_model_reads_knows_its_tokenizer(tmp_path):
    from itda import demo

    text = demo.corpus()[:2]
    batch = next(iter(itda.activations(demo.model_path(), text, layer=0, tokens=60)))
    model = itda.build(itda.activations(demo.model_path(), text, layer=0, tokens=60), k=2, threshold=0.2)
    assert len(batch.labels & model.labels) == len(model)
    other = next(iter(itda.activations(demo.model_path(), text, layer=0, tokens=60, context_length=16)))
    with pytest.raises(itda.InputError, match="cut differently"):
        batch.labels & other.labels
    with pytest.raises(itda.InputError, match="cut differently"):
        model.labels - other.labels


def test_only_labels_go_with_labels():
    labels = Labels.counted(0, 3)
    for wrong in (None, 3, np.zeros(3), [1], "the"):
        with pytest.raises(itda.InputError, match="pass those of a dictionary"):
            untyped(Labels.__and__)(labels, wrong)
