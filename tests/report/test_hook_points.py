"""Where a model can be read: every name that is listed is one, of all families, and no weights are read."""

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console
from transformers import dynamic_module_utils

from itda.cli.main import main
from itda.errors import InputError
from itda.models.loading import load_model
from itda.report.hook_points import hook_points
from tests.tiny_models import FAMILIES, LAYERS, WIDTH, save


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The folder of a family with nothing in its files of weights, made when it is first asked for."""
    made = {}

    def folder(family):
        if family not in made:
            made[family] = save(family, tmp_path_factory.mktemp(family))
            for weights in Path(made[family]).glob("*.safetensors"):
                weights.rename(weights.with_suffix(".kept"))
                weights.touch()
        return made[family]

    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_listed_can_be_read(family, bare):
    folder = bare(family)
    found = hook_points(folder)
    assert (found.model_type, found.n_layers, found.d) == (family, LAYERS, WIDTH)
    names = [point["name"] for point in found.hook_points]
    assert len(set(names)) == len(names)
    blocks = [point for point in found.hook_points if (point["alias"] or "").endswith("resid_post")]
    assert [point["layer"] for point in blocks] == list(range(LAYERS))
    for weights in Path(folder).glob("*.kept"):
        weights.rename(weights.with_suffix(".safetensors"))
    model = load_model(folder, hooks=-1)
    assert [model.canonical(name) for name in names] == names
    for point in found.hook_points:
        assert point["alias"] is None or model.canonical(point["alias"]) == point["name"]
    assert [model.canonical(layer) for layer in range(LAYERS)] == [point["name"] for point in blocks]
    shown = str(found)
    assert blocks[0]["name"].replace(".0", ".N") in shown and "--layer N" in shown and f"0 to {LAYERS - 1}" in shown
    assert len(shown.splitlines()) <= 4 + len(names) - (LAYERS - 1) * sum(p["layer"] == 0 for p in found.hook_points)


def test_blocks_that_differ_are_told_apart(tmp_path):
    kinds = ["full_attention", "sliding_attention"] * (LAYERS // 2)
    found = hook_points(save("qwen3", tmp_path / "q", layer_types=kinds, use_sliding_window=True))
    odd = [point for point in found.hook_points if point["layer"] == 1]
    found.hook_points.append(odd[0] | {"name": odd[0]["name"] + ".extra", "alias": None})
    assert "layers.N.extra (N: 1)" in str(found) and "layers.N.mlp " in str(found)


CODE = """
import torch
from transformers import PreTrainedConfig, PreTrainedModel

class Config(PreTrainedConfig):
    model_type = "odd"
    def __init__(self, num_hidden_layers=2, stubborn=False, **rest):
        self.num_hidden_layers, self.stubborn = num_hidden_layers, stubborn
        super().__init__(**rest)

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("[bold]one[/x]", "two\\x1b[31m"):
            setattr(self, name, torch.nn.Linear(4, 4))

class Model(PreTrainedModel):
    config_class, base_model_prefix = Config, "model"
    def __init__(self, config):
        super().__init__(config)
        if config.stubborn:
            raise RuntimeError("no")
        self.layers = torch.nn.ModuleList([Block() for _ in range(config.num_hidden_layers)])
        self.post_init()
"""


ODD = {"model_type": "odd", "auto_map": {"AutoConfig": "code_of_odd.Config", "AutoModel": "code_of_odd.Model"}}


def test_a_model_with_code_of_its_own(tmp_path, monkeypatch, capfd):
    """Its config says no width, and its names are no markup."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    odd = tmp_path / "[bold]m"
    odd.mkdir()
    (odd / "code_of_odd.py").write_text(CODE, "utf-8")
    (odd / "config.json").write_text(json.dumps(ODD), "utf-8")
    (odd / "model.safetensors").touch()
    assert main(["hooks", str(odd)]) == 2
    assert "runs code of its own" in (said := capfd.readouterr().err) and "`--trust-remote-code`" in said
    found = hook_points(odd, trust_remote_code=True)
    assert found.d is None and found.n_layers == 2 and len(found.hook_points) == 6
    assert "2 layers\n" in str(found) and "None" not in str(found)
    stream = io.StringIO()
    Console(file=stream, width=200, force_terminal=False).print(found)  # which reads markup
    shown = stream.getvalue()
    assert "[bold]m" in shown and "model.layers.N.[bold]one[/x]" in shown and "\x1b" not in shown
    (odd / "config.json").write_text(json.dumps(ODD | {"stubborn": True}), "utf-8")
    with pytest.raises(InputError, match="cannot be told without its weights"):
        hook_points(odd, trust_remote_code=True)


def test_the_command(tmp_path, bare, capfd):
    assert main(["hooks", str(bare("bert")), "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert said["n_layers"] == LAYERS and said["hook_points"][-1]["kind"]
    assert main(["hooks", str(tmp_path)]) == 2
    assert "Traceback" not in capfd.readouterr().err
    with pytest.raises(InputError, match="`itda hooks` lists them"):
        load_model(save("gpt2", tmp_path / "g"), hooks="transformer.h.1.mpl")
