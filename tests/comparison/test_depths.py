"""Layers of models of different depth: none is the right one, and the most similar ones are told by relative depth."""

import json

import numpy as np
import pytest

import itda
from itda.cli.main import main
from itda.comparison import layers
from tests import tiny_models

HOW = {"context_length": 32, "atoms": 40, "k": 3, "controls": False}


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """Two models of four blocks, one of six."""
    home = tmp_path_factory.mktemp("home")
    tiny_models.save("gpt2", home / "four")
    tiny_models.save("gpt2", home / "other", seed=1)
    tiny_models.save("gpt2", home / "six", seed=2, n_layer=6)
    (home / "text.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in tiny_models.DOCUMENTS), "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        yield home


def compare(models, **settings):
    return itda.compare(models, tiny_models.DOCUMENTS, **{**HOW, "measures": ["relative_centred"], **settings})


def words(found):
    return " ".join(str(found).split())


def test_the_number_of_layers_asked_for_is_no_depth():
    found = compare(["four", "six"], layer=[0, 1, 3])
    measure, said = found.measures["relative_centred"], words(found)
    assert [model["n_layers"] for model in found.models] == [4, 6]
    assert [model["layers"] for model in found.models] == [[0, 1, 3]] * 2
    assert measure.matching is None and measure.alike["diagonal"] is None
    assert "matched" not in said and "margin" not in said and "equal number" not in said
    assert "four: 3 of 4 layers" in said and "six: 3 of 6 layers" in said
    matrix = measure.pairs["four", "six"]
    assert measure.best["four", "six"] == matrix.argmax(1).tolist()
    at = [(layer + 1) / 6 for layer in (0, 1, 3)]
    apart = np.mean([abs((layer + 1) / 4 - at[j]) for layer, j in zip((0, 1, 3), matrix.argmax(1), strict=True)])
    assert f"{apart:.0%} of the depth apart in the mean" in said and "layer of four at most similar at" in said
    rows = [line.split() for line in str(found).splitlines() if line.split()[1:2] in (["25%"], ["50%"], ["100%"])]
    best = [(0, 1, 3)[j] for j in matrix.argmax(1)]
    assert [row[:4] for row in rows] == [
        [f"{layer}", f"{(layer + 1) / 4:.0%}", f"{b}", f"{(b + 1) / 6:.0%}"]
        for layer, b in zip((0, 1, 3), best, strict=True)
    ]
    assert json.loads(json.dumps(found.to_json()))["measures"]["relative_centred"]["best"][0]["layers"]


@pytest.mark.parametrize(
    ("models", "layer"), [(["four", "six"], [1, 3]), (["four", "other"], [1, 3]), (["four"] * 2, 1)]
)
def test_of_one_or_two_layers_nothing_is_said_of_matching(models, layer):
    said = words(compare(models, layer=layer))
    assert not any(word in said for word in ("matched", "margin", "rank", "most similar"))


def test_the_same_layers_of_models_of_one_depth_are_matched():
    found = compare(["four", "other"], layer=[0, 1, 3])
    assert found.measures["relative_centred"].matching is not None and "margin" in words(found)
    assert "is not known here" not in words(found)


def test_two_layers_of_one_model_are_no_layers_of_equal_number():
    found = itda.compare(["four", "four"], tiny_models.DOCUMENTS, **HOW, layer=[1], measures=["cka"], names=["x", "y"])
    assert "layers of equal number" not in words(found) or found.models[0]["layers"] == found.models[1]["layers"]
    stream = itda.activations("four", tiny_models.DOCUMENTS, layer=[1, 3], context_length=32)
    one, other = itda.build(stream, k=3, threshold=0.6).values()
    found = itda.compare([one, other])
    assert "equal number" not in words(found) and "mean similarity of the layers compared" in words(found)
    assert found.measures["jaccard"].matching is None


def test_dictionaries_of_unknown_depth_say_so(tmp_path):
    for name in ("four", "other"):
        stream = itda.activations(name, tiny_models.DOCUMENTS, layer=[0, 1, 2], context_length=32)
        for hook, dictionary in itda.build(stream, k=3, threshold=0.6).items():
            dictionary.save(tmp_path / name / hook)
    found = itda.compare([tmp_path / "four", tmp_path / "other"])
    assert "margin" in words(found) and "which is not known here" in words(found)


def test_few_fast_measures_unless_all_are_asked_for(capsys):
    assert 3 <= len(layers.DEFAULT) <= 4 and set(layers.DEFAULT) <= set(layers.FAMILIES)
    assert "sets" not in {layers.FAMILIES[name] for name in layers.DEFAULT}  # which take dictionaries
    found = compare(["four", "other"], layer=1, measures=None)
    assert tuple(found.measures) == layers.DEFAULT and found.settings == {} and found.sizes == []
    assert tuple(compare(["four", "other"], layer=1, measures="all").measures) == tuple(layers.FAMILIES)
    flags = ["--context-length", "32", "--no-controls", "--layer", "1", "--measure", "all", "--json"]
    assert main(["compare", "four", "other", "--data", "text.jsonl", *flags]) == 0
    assert len(json.loads(capsys.readouterr().out)["measures"]) == len(layers.FAMILIES)


def test_seconds_of_a_measure_are_without_what_it_shares(monkeypatch):
    clock = iter(range(10**9))
    monkeypatch.setattr(layers.time, "monotonic", lambda: float(next(clock)))
    found = compare(["four", "other"], layer=1, measures=["cka", "procrustes", "jaccard", "overlap"], threshold=0.6)
    seconds = {name: measure.seconds for name, measure in found.measures.items()}
    assert set(seconds.values()) == {3.0}  # a tick for each of three pairs of layers
    assert found.seconds["shared"]["sums"] >= 4 and found.seconds["shared"]["sets"] >= 1
    said = words(found)
    assert "without what several share" in said and "for products of layers" in said and "for dictionaries" in said
    assert {"reading", "measures", "controls", "all"} <= found.seconds.keys()


def test_that_its_dictionaries_are_uncentred_is_said():
    found = compare(["four", "other"], layer=1, measures=["jaccard"], threshold=0.6)
    assert found.settings == {"k": 3, "n_atoms": None, "threshold": 0.6, "center": False}
    assert "without taking off a mean, unlike by itda train" in words(found)
    assert "without taking off a mean" not in words(compare(["four", "other"], layer=1))


def test_controls_compare_no_model_with_itself(monkeypatch):
    calls, procrustes = [], layers.spaces.procrustes
    monkeypatch.setattr(layers.spaces, "procrustes", lambda pair: calls.append(1) or procrustes(pair))
    compare(["four", "other"], layer=[0, 1], measures=["shared_atoms_procrustes"], controls=True)
    assert len(calls) == 10 + 4 + 4  # all pairs of four layers; twice, those between models


def test_the_command_names_its_own_flag(tmp_path, capsys):
    for name, length in (("x", 32), ("y", 20)):
        stream = itda.activations("four", "text.jsonl", layer=1, context_length=length)
        itda.build(stream, k=3, threshold=0.6).save(tmp_path / name)
    words = ["compare", str(tmp_path / "x"), str(tmp_path / "y")]
    assert main(words) == 2 and "`--data TEXT`" in capsys.readouterr().err
    assert main([*words, "--data", "text.jsonl"]) == 0  # the advice has been tried
