"""`max_norm` and `scale` from the command line to the folder, through trainings, sweeps and what reads the result."""

import json

import pytest
import torch

import itda
from itda.cli.main import main
from itda.interop import saelens
from tests import tiny_models

FLAGS = ["--layer", "2", "--k", "4", "--threshold", "0.3", "--context-length", "24"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A model of which one coordinate of some tokens is huge after block 2, and a text, in the current folder."""
    model = tiny_models.module("gpt2", len(tiny_models.tokenizer("gpt2")))
    with torch.no_grad():
        model.transformer.wte.weight[[284, 51], 5] += 300.0  # of few tokens of the text
    model.save_pretrained(tmp_path / "model")
    tiny_models.tokenizer("gpt2").save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(tiny_models.DOCUMENTS * 2), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def document(capfd, *words):
    capfd.readouterr()
    assert main([*words, "--json"]) == 0
    return json.loads(capfd.readouterr().out)


def test_the_commands_take_them_and_the_folder_keeps_them(home, capfd):
    told = document(capfd, "train", "model", "text.txt", *FLAGS, "--max-norm", "5", "--scale", "std", "--out", "d")
    d = itda.ITDA.load("d")
    assert (d.cfg["max_norm"], d.cfg["scale"]) == (5.0, "std") and d.scale is not None
    assert told["massive"]["left_out"] == d.cfg["massive"]["left_out"] > 0
    for name in ("fvu", "fvu_robust", "fvu_standardised", "relative_error", "median_error", "variance"):
        assert told[name] == d.cfg[name]
    stream = itda.activations("model", "text.txt", layer=2, context_length=24)
    built = itda.build(stream, k=4, threshold=0.3, max_norm=5, scale="std")
    assert torch.equal(built.atoms, d.atoms) and torch.equal(built.scale, d.scale)
    assert main(["train", "model", "text.txt", *FLAGS, "--out", "plain"]) == 0
    said = " ".join(capfd.readouterr().out.split())
    plain = itda.ITDA.load("plain")
    assert f"robust {plain.cfg['fvu_robust']:.4f}" in said and "median " in said and "of the variance" in said
    assert plain.scale is None and not {"max_norm", "scale"} & set(plain.cfg)
    shown = document(capfd, "show", "plain")
    assert shown["massive"]["atoms"] > 0 and document(capfd, "show", "d")["massive"]["atoms"] == 0
    assert main(["eval", "d", "text.txt", "--in-sample", "--tokens", "200", "--ce-tokens", "60"]) == 0
    said = " ".join(capfd.readouterr().out.split())
    assert (
        "random tokens: mean error" in said
        and "each coordinate over its deviation" in said
        and "of the variance" in said
    )
    assert document(capfd, "decompose", "d", "Call me")["texts"][0]["scaled"]
    with pytest.raises(itda.InputError, match="was built with `scale` = 'std', and an SAE has one weight"):
        saelens.export(d, home / "sae")
    assert not (home / "sae").exists()


def test_a_sweep_varies_them(home, capfd):
    flags = ["--model", "model", "--data", "text.txt", *FLAGS, "--max-norm", "5", "--scale", "none", "std"]
    flags += ["--out", "sweep"]
    found = document(capfd, "sweep", *flags)
    assert [row["settings"]["scale"] for row in found["rows"]] == ["none", "std"]
    for row in found["rows"]:
        cfg = itda.ITDA.load(home / "sweep" / row["folder"]).cfg
        assert cfg["max_norm"] == 5 and cfg.get("scale", "none") == row["settings"]["scale"]
        for name in ("fvu", "fvu_robust", "fvu_standardised", "relative_error", "median_error"):
            assert row[name] == cfg[name]
        assert "of the variance" in row["concentrated"]
    assert main(["sweep", *flags]) == 0
    said = " ".join(capfd.readouterr().out.split())
    assert "robust standardised mean error median" in said and "tokens hold" in said
    head = (home / "sweep" / "results.csv").read_text().splitlines()[0]
    assert head.endswith("folder,problem,fvu_robust,fvu_standardised,relative_error,median_error")
