"""While a model loads that is said, and what its numbers are: also without a terminal."""

from __future__ import annotations

import pytest
import torch

from itda.cli.main import main
from itda.models import pretrained
from itda.models.loading import language_model, load_model
from itda.progress import tell, telling
from tests.tiny_models import DOCUMENTS, module, save, tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save("gpt2", tmp_path_factory.mktemp("gpt2"), dtype=torch.bfloat16)


@pytest.mark.parametrize("fast", [False, True])  # whether the processor has instructions for bfloat16
@pytest.mark.parametrize(
    ("loader", "settings", "said"),
    [
        (load_model, {}, "reading {} in AUTO on cpu (--dtype auto)"),
        (load_model, {"dtype": "bfloat16"}, "reading {} in bfloat16 on cpu"),
        (load_model, {"dtype": "float32"}, "reading {} in float32 on cpu"),
        (load_model, {"stream_layers": True}, "reading {} in AUTO on cpu (--dtype auto)"),
        (language_model, {}, "reading {} in AUTO on cpu (--dtype auto)"),
        (language_model, {"dtype": "bfloat16"}, "reading {} in bfloat16 on cpu"),
    ],
)
def test_loading_and_the_type_of_the_numbers_are_told(loader, settings, said, fast, folder, monkeypatch):
    monkeypatch.setattr(pretrained, "has_bfloat16", lambda: fast)
    said = said.replace("AUTO", "bfloat16" if fast else "float32")
    told: list[str] = []
    with telling(told.append):
        model = loader(folder, hooks=1, device="cpu", **settings)
    assert told == [f"loading {folder}", said.format(folder)]
    assert model.provenance(1)["dtype"] == said.split()[3]
    tell("nobody listens")
    assert len(told) == 2


def test_a_loaded_model_is_not_loaded_again():
    told: list[str] = []
    with telling(told.append):
        load_model(module("gpt2"), tokenizer(), hooks=1)
    assert told == []


def test_a_checkpoint_of_float32_is_read_so_in_any_case(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "has_bfloat16", lambda: True)
    model = load_model(save("gpt2", tmp_path / "gpt2", dtype=torch.float32), hooks=1, device="cpu")
    assert model.provenance(1)["dtype"] == "float32"


def test_the_command_line_says_it_without_a_terminal(folder, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(pretrained, "has_bfloat16", lambda: False)
    (tmp_path / "text.txt").write_text("\n".join(DOCUMENTS))
    words = ["train", str(folder), str(tmp_path / "text.txt"), "--layer", "1", "--k", "4", "--device", "cpu"]
    words += ["--context-length", "32"]
    assert main([*words, "--out", str(tmp_path / "out"), "--json"]) == 0
    lines = capfd.readouterr().err.splitlines()
    first, second = (next(i for i, line in enumerate(lines) if what in line) for what in ("loading ", "in float32"))
    assert first < second and "(--dtype auto)" in lines[second]
