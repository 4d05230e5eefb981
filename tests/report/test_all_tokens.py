"""All tokens of texts: each as `decompose` has it, why coefficients are negative, and what the terminal shows."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

import itda
from itda.errors import InputError
from itda.models.loading import load_model
from itda.report import decomposition as made
from tests import tiny_models
from tests.untyped import untyped

TEXTS = ["The mouse sat on the carpet.", "Call me Ishmael, she said."]


def drawn(thing, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(thing)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    hooked = load_model(tiny_models.save("gpt2", tmp_path_factory.mktemp("model")), hooks=1)
    stream = itda.activations(hooked, tiny_models.DOCUMENTS, layer=1, context_length=32)
    return hooked, itda.build(stream, k=6)


@pytest.mark.parametrize("settings", [{}, {"k": 3, "method": "omp"}, {"nonneg": True}], ids=str)
def test_every_token_is_as_decompose_has_it(tiny, settings):
    hooked, built = tiny
    found = itda.decompose_all(built, TEXTS, model=hooked, **settings)
    assert [tokens[0].text for tokens in found.texts] == TEXTS
    for text, tokens in zip(TEXTS, found.texts, strict=True):
        assert "".join(tokens[0].tokens) == text and len(tokens) == len(tokens[0].tokens)
        for which, token in enumerate(tokens):
            assert token.to_json() == itda.decompose(built, text, which, model=hooked, **settings).to_json()
    said = found.to_json()["texts"]
    for text, tokens in zip(said, found.texts, strict=True):
        shared = {name: value for name, value in text.items() if name != "decompositions"}
        assert [shared | one for one in text["decompositions"]] == [token.to_json() for token in tokens]
    one = itda.decompose_all(built, TEXTS[0], model=hooked, **settings)
    assert one.to_json()["texts"] == said[:1]


def test_the_model_is_loaded_once_and_read_once_a_text(tiny, monkeypatch):
    hooked, built = tiny
    loads, reads = [], []
    load, read = made.model_of, type(hooked).read
    monkeypatch.setattr(made, "model_of", lambda *given: loads.append(1) or load(*given))
    monkeypatch.setattr(type(hooked), "read", lambda *given: reads.append(1) or read(*given))
    itda.decompose_all(built, TEXTS, model=hooked)
    assert (len(loads), len(reads)) == (1, 2)


def test_a_negative_atom_corrects_the_one_that_brought_it():
    """Two atoms at 0.8: x along the first, with less of the second than that brings along."""
    atoms = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0]])
    built = itda.ITDA(atoms, itda.Labels.counted(0, 3), 3, None, torch.ones(3), torch.ones(3))
    parts, _ = made._pursued(built, torch.tensor([1.0, -0.7, -0.4], dtype=torch.float64), 3, "mp")
    first, second, third = parts
    assert [part["atom"] for part in parts] == [0, 1, 2] and second["coefficient"] < 0 and third["coefficient"] < 0
    assert first["corrects"] is None and first["alone"] == 1.0
    assert second["alone"] == pytest.approx(0.8 - 0.42) and second["corrects"]["atom"] == 0
    assert second["corrects"]["cosine"] == pytest.approx(0.8)
    assert third["alone"] == pytest.approx(-0.4) and third["corrects"] is None
    said = drawn(replace_atoms(built, parts))
    assert "takes back what atom 0" in said and "(cosine +0.80)" in said and "points away from it" in said


def replace_atoms(built, parts):
    """A report of these parts."""
    return made.Decomposition(
        model="m", hook_point="h", text="x", tokens=["x"], token=0, position=1, in_training=True, start=0, end=1,
        norm=1.0, from_mean=1.0, usual_norm=1.0, massive=False, scaled=False, k=built.k, method="mp",
        relative_error=0.1, usual_error=None, atoms=parts,
    )  # fmt: skip


def test_the_table_has_every_token_with_its_error_and_marks_massive_ones(tiny):
    hooked, built = tiny
    found = itda.decompose_all(built, TEXTS, model=hooked)
    found.texts[0][2] = replace(found.texts[0][2], massive=True)
    said = drawn(found)
    assert max(map(len, said.splitlines())) <= 80
    for tokens in found.texts:
        for token in tokens:
            assert f"{token.relative_error:.3f}" in said
    assert "†" in said and "a massive token" in said
    best = max(found.texts[1][-1].atoms, key=lambda part: part["share"])
    assert f"{best['coefficient']:+.4g}·{best['atom']}" in said


def test_hostile_texts_command_no_terminal(tiny):
    hooked, built = tiny
    text = "\x1b[31mred [bold]x[/] \u202eevil"
    said = drawn(itda.decompose_all(built, [text], model=hooked))
    assert not set("\x1b\u202e") & set(said) and "[bold]x[/]" in said


def test_bad_texts_are_said_in_one_sentence(tiny):
    hooked, built = tiny
    for wrong in ([], "", ["a", ""], ["a", 3], 3, b"bytes", [["a"]]):
        with pytest.raises(InputError, match=r"pass (a text|some words)"):
            untyped(itda.decompose_all)(built, wrong, model=hooked)
    with pytest.raises(InputError, match="shorten it"):
        itda.decompose_all(built, ["word " * 200], model=hooked)
    json.dumps(itda.decompose_all(built, ["a"], model=hooked).to_json(), allow_nan=False)
    assert np.isfinite(itda.decompose_all(built, ["a"], model=hooked).texts[0][0].relative_error)
