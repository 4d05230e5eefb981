"""What commands say: sentences with a bound, tables that fit, words that are found, latents with their sign."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

import itda
from itda import report
from itda.cli.main import main
from itda.errors import LONGEST, InputError, NoSuchHook
from itda.labels import Labels
from itda.training.sweep import MEASURED, Sweep


@pytest.mark.parametrize("huge", ["9" * 1_000_000, "a b " * 300_000, "x" * 150 + " " + "y" * 999_999])
def test_however_long_what_came_is_the_sentence_is_not(huge, capsys):
    error = InputError(f"`k` is {huge}: pass a whole number, 1 or more.")
    assert len(str(error)) <= LONGEST and str(error).startswith("`k` is ") and str(error).endswith("1 or more.")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert main(["train", "gpt2", "book.txt", "--layer", "1", "--k", huge, "--out", "x"]) == 2
    err = capsys.readouterr().err
    assert len(err) <= LONGEST + 50 and len(err.splitlines()) == 1


def test_short_sentences_stay_as_they_are():
    path = "/".join(["folder"] * 120)
    assert str(InputError(f"{path} is no dictionary.")) == f"{path} is no dictionary."
    assert pickle.loads(pickle.dumps(NoSuchHook("no layer", 3))).hook == 3 and str(InputError()) == ""


def spelt(text, tokens):
    """Labels of `tokens`, which follow each other in one text."""
    starts = np.cumsum([0, *map(len, tokens)])[:-1]
    ends, n = starts + [len(t) for t in tokens], len(tokens)
    zero = np.zeros(n, np.int64)
    return Labels(zero, np.arange(n), np.arange(n), zero, starts, ends, zero, (text,), np.zeros(1, np.int64))


def test_words_that_the_tokenizer_cuts_are_found():
    tokens = ["The", " wh", "ale", " ate", " the", " wh", "eel", " and", " ale", "s", " Whale"]
    model = itda.build(torch.eye(len(tokens)), k=1, threshold=0.0, center=False)
    model = replace(model, labels=spelt("".join(tokens), tokens))
    found = report.find(model, "whale")
    assert [(row["atom"], row["match"]) for row in found.atoms] == [(10, "token"), (1, "part of it"), (2, "part of it")]
    assert "1 atom of 11 with 'whale' in its token, 2 whose token is a part of it" in str(found)
    assert [row["atom"] for row in report.find(model, "ale").atoms] == [2, 8, 10]
    assert [row["match"] for row in report.find(model, "the wheel").atoms] == ["part of it"] * 3
    assert "2 atoms of 11 with 'the' in their token" in str(report.find(model, "the"))
    assert report.find(model, "zebra").atoms == []
    assert [row["atom"] for row in report.find(model, "e a").atoms] == [2, 3]


def test_one_that_was_refined_without_labels_says_that_there_is_no_sample():
    x = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    model = itda.build([x], k=2, threshold=0.2)
    moved = itda.refine.refine(model, x, passes=1)
    said = " ".join(str(report.atom_report(moved, 0)).split())
    assert "no sample was kept" in said and "0 of 0 sampled" not in said
    kept = itda.refine.refine(model, x, passes=1, labels=Labels.counted(0, 60))
    assert "of 60 sampled tokens" in str(report.atom_report(kept, 0))


def sweep_of(hooks):
    rows = []
    for hook in hooks:
        row = {"settings": {"layer": 2, "k": 40}, "folder": f"gpt2-0123456789abcdef/{hook}", "problem": None}
        rows.append(row | dict.fromkeys(MEASURED) | {"hook_point": hook, "k": 40, "threshold": 0.123456, "fvu": 0.0123})
        rows[-1] |= {"n_atoms": 16_384, "tokens": 1_000_000, "seconds": 1234.5}
    return Sweep("sweep", {"layer": [2, 4], "model": ["a"]}, rows, 0)


def test_at_80_columns_a_sweep_shows_every_layer():
    for hooks, shown in (
        (["model.layers.2", "model.layers.14"], ["layer", "2 ", "14 "]),
        (["transformer.h.2.mlp", "transformer.h.2"], ["layer", "2.mlp", "2 "]),
    ):
        console = Console(width=80, color_system=None)
        with console.capture() as captured:
            console.print(sweep_of(hooks))
        lines = [line.rstrip() for line in captured.get().splitlines()]
        assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines[:-1])
        assert all(any(line.startswith(word) for line in lines) for word in shown)
        assert lines[0].split()[0] == "layer" and lines[0].split()[-1] == "seconds" and lines[1].strip() == "folder"
        assert "1,000,000" in captured.get() and all(f"    gpt2-0123456789abcdef/{hook}" in lines for hook in hooks)


def test_an_export_says_which_latents_are_which_sign(tmp_path, capsys):
    x = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    for nonneg, said, signs in (
        (False, "latent i is atom i with a positive coefficient, latent {n} + i the same atom with a negative one", 2),
        (True, "latent i is atom i, with coefficients of zero or more", 1),
    ):
        model = itda.build([x], k=2, threshold=0.5, nonneg=nonneg)
        model.save(tmp_path / "d")
        words = ["export", str(tmp_path / "d"), "--to", "saelens", "--out", str(tmp_path / "sae")]
        assert main(words) == 0 and said.format(n=len(model)) in capsys.readouterr().out
        assert main([*words, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert len(told["signs"]) == signs and told["latents"] == signs * len(model)
