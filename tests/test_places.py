"""Where a model can be read: every name that is listed is one, of all families, and no weights are read."""

import json
from pathlib import Path

import pytest

from itda import cli
from itda.errors import InputError
from itda.hooks import load
from itda.places import hook_points
from tests.models import FAMILIES, LAYERS, WIDTH, save


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
    model = load(folder, hooks=-1)
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


def test_the_command(tmp_path, bare, capfd):
    assert cli.main(["hooks", str(bare("bert")), "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert said["n_layers"] == LAYERS and said["hook_points"][-1]["kind"]
    assert cli.main(["hooks", str(tmp_path)]) == 2
    assert "Traceback" not in capfd.readouterr().err
    with pytest.raises(InputError, match="`itda hooks` lists them"):
        load(save("gpt2", tmp_path / "g"), hooks="transformer.h.1.mpl")
