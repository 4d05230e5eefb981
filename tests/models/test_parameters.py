"""Weights on disk, or quantised: the activations are those of the weights, and what is said of these stays true."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from itda.dictionary.build import build
from itda.errors import InputError
from itda.models import parameters
from itda.models.loading import language_model, load_model
from itda.models.parameters import quantization
from itda.reading.activations import activations
from itda.reading.own_model import model_of
from tests.tiny_models import DOCUMENTS, save, tokenizer

SIZES = {"context_length": 24, "batch_rows": 3}
# The embedding stays in memory where there is room for it, and everything is on disk where there is none.
MAPS = {
    "auto": {"device_map": "auto"},
    "memory": {"device_map": {"": "cpu"}},
    "disk": {"device_map": {"": "disk"}},
    "some on disk": {"device_map": "auto", "max_memory": {"cpu": 80_000}},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: str(save(family, tmp_path_factory.mktemp(family))) for family in ("gpt2", "llama", "gemma2")}


@pytest.fixture
def llama(folders):
    return folders["llama"]


def same(a, b) -> bool:
    """Are the activations of two readings the same to the last bit, and is what they say of themselves?"""
    equal = [torch.equal(x.activations, y.activations) for x, y in zip(a, b, strict=True)]
    assert len(equal) > 2
    return all(equal) and a.provenance == b.provenance


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("how", MAPS)
def test_offloaded_weights_are_the_weights(how, family, folders, tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed (`pip install 'itda[big]'`)")
    plain = activations(folders[family], DOCUMENTS, layer=2, **SIZES)
    placed = activations(folders[family], DOCUMENTS, layer=2, offload_folder=str(tmp_path), **MAPS[how], **SIZES)
    assert any(p.is_meta for p in placed.model.module.parameters()) == ("disk" in how)
    assert placed.model.device == torch.device("cpu")
    assert same(plain, placed)
    assert any(p.is_meta for p in placed.model.module.parameters()) == ("disk" in how)  # and so they stay


def test_offloaded_weights_of_half_precision(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed (`pip install 'itda[big]'`)")
    folder = str(save("llama", tmp_path / "model", dtype=torch.float16))
    for dtype in ("float32", "bfloat16"):
        plain = activations(folder, DOCUMENTS, hook="layers.1.mlp", dtype=dtype, device="cpu", **SIZES)
        placed = activations(folder, DOCUMENTS, hook="layers.1.mlp", dtype=dtype, **MAPS["disk"], **SIZES)
        assert placed.model.dtype == getattr(torch, dtype)
        assert same(plain, placed)


def test_an_offloaded_language_model(llama):
    pytest.importorskip("accelerate", reason="accelerate is not installed (`pip install 'itda[big]'`)")
    plain, placed = (language_model(llama, hooks=1, **how) for how in ({}, MAPS["disk"]))
    ids = torch.arange(10).reshape(2, 5)
    assert torch.equal(plain.logits(ids, torch.ones_like(ids)), placed.logits(ids, torch.ones_like(ids)))
    assert plain.provenance(1) == placed.provenance(1)


def test_weights_on_disk_are_fetched_once_for_a_fingerprint(llama, monkeypatch):
    pytest.importorskip("accelerate", reason="accelerate is not installed (`pip install 'itda[big]'`)")
    model = load_model(llama, hooks=1, **MAPS["disk"])
    found, fetched, present = model.provenance(1), [], parameters.present
    monkeypatch.setattr(parameters, "present", lambda base, name: fetched.append(name) or present(base, name))
    assert model.provenance(1) == found
    assert not fetched


def test_offloaded_weights_through_nnsight(llama):
    pytest.importorskip("accelerate", reason="accelerate is not installed (`pip install 'itda[big]'`)")
    pytest.importorskip("nnsight", reason="nnsight is not installed (`pip install 'itda[nnsight]'`)")
    plain = activations(llama, DOCUMENTS, layer=1, **SIZES)
    assert same(plain, activations(llama, DOCUMENTS, layer=1, backend="nnsight", **MAPS["disk"], **SIZES))


def test_the_flag(llama, tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed (`pip install 'itda[big]'`)")
    from itda.cli.main import main

    (tmp_path / "text.txt").write_text("\n".join(DOCUMENTS))
    words = ["train", llama, str(tmp_path / "text.txt"), "--layer", "1", "--context-length", "24", "--k", "4", "--out"]
    outs = [tmp_path / name for name in ("plain", "placed")]
    for out, more in zip(outs, ([], ["--device-map", "auto"]), strict=True):
        assert main([*words, str(out), *more]) == 0
    for path in outs[0].iterdir():
        assert path.read_bytes() == (outs[1] / path.name).read_bytes()
    assert main([*words, str(tmp_path / "third"), "--device-map", "nowhere"]) == 2  # it does reach the loader


def test_where_and_how_are_one_choice(llama):
    with pytest.raises(InputError, match="Give either `device` or `device_map`"):
        load_model(llama, hooks=1, device="cpu", device_map="auto")


def test_weights_that_are_nowhere():
    from tests.tiny_models import module

    nowhere = load_model(module("gpt2"), tokenizer(), hooks=1)
    nowhere.module.to("meta")
    with pytest.raises(InputError, match="has no values"):
        nowhere.provenance(1)


def test_arguments_that_say_where_reach_transformers(llama, monkeypatch):
    """`tp_plan` cannot run on one device: that it gets there is all that is seen here."""
    from transformers import PreTrainedModel

    seen, own = [], PreTrainedModel.from_pretrained.__func__
    moved = []
    monkeypatch.setattr(PreTrainedModel, "to", lambda self, *args: moved.append(args) or self)

    def from_pretrained(cls, *args, tp_plan=None, **kwargs):
        seen.append(tp_plan)
        return own(cls, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))
    load_model(llama, hooks=1, tp_plan="auto")
    assert seen == ["auto"] and not moved
    load_model(llama, hooks=1)
    assert seen == ["auto", None] and moved


# -- quantised --------------------------------------------------------------------------------------------------------


def int8():
    quantize = pytest.importorskip("torchao.quantization", reason="torchao is not installed (`pip install torchao`)")
    from transformers import TorchAoConfig

    return TorchAoConfig(quantize.Int8WeightOnlyConfig())


def test_quantised_weights(llama):
    plain = activations(llama, DOCUMENTS, layer=2, **SIZES)
    small = activations(llama, DOCUMENTS, layer=2, quantization_config=int8(), **SIZES)
    again = activations(llama, DOCUMENTS, layer=2, quantization_config=int8(), **SIZES)
    assert same(small, again)
    x, y = (torch.cat([batch.activations for batch in stream]) for stream in (plain, small))
    error = ((x - y).norm() / x.norm()).item()
    assert 1e-5 < error < 0.1
    said, expected = small.provenance["model"], plain.provenance["model"]
    assert "quantization" not in expected
    assert said == expected | {"quantization": "torchao", "fingerprint": said["fingerprint"]}
    assert said["fingerprint"] != expected["fingerprint"]


def test_a_dictionary_of_quantised_weights_says_so(llama):
    model = build(activations(llama, DOCUMENTS, layer=2, quantization_config=int8(), **SIZES), k=4, n_atoms=20)
    assert model.cfg["model"]["quantization"] == "torchao"
    with pytest.raises(InputError, match=r"differs .* in its weights .* and its quantisation \(torchao, not None\)"):
        model_of(model.cfg)
    quantised = load_model(llama, hooks=2, quantization_config=int8())
    assert model_of(model.cfg, {"model": quantised})[1] == "model.layers.2"


@pytest.mark.parametrize("method", ["gptq", "enum"])
def test_methods_that_pack_weights_into_buffers(method, llama):
    """What they keep is no parameter, and tells their models apart all the same."""
    from tests.tiny_models import module

    def packed(value: int):
        model = module("llama")
        projection = model.model.layers[0].mlp.gate_proj
        weight = projection.weight.detach()
        del projection.weight
        projection.register_buffer("weight", weight)
        projection.register_buffer("qweight", torch.full((4,), value, dtype=torch.int32))
        projection.register_buffer("scratch", torch.rand(3), persistent=False)
        model.config.quantization_config = {"quant_method": "gptq"} if method == "gptq" else Config()
        return load_model(model, tokenizer(), hooks=1).provenance(1)

    class Config:
        class quant_method:  # as an enum of transformers
            value = "gptq"

    assert packed(1) == packed(1)
    assert packed(1)["quantization"] == "gptq"
    assert packed(1)["fingerprint"] != packed(2)["fingerprint"]


def beside_the_weight(scale, code=1.0):
    """As bitsandbytes keeps them for four bits, the scales themselves packed by others."""
    inner = SimpleNamespace(absmax=torch.tensor([scale]), code=torch.ones(2), dtype=torch.float32)
    state = SimpleNamespace(absmax=torch.ones(3), code=torch.tensor([code]), shape=(2, 2), state2=inner)
    return lambda projection: setattr(projection.weight, "quant_state", state)


def in_rows(scale):
    """As bitsandbytes keeps them for eight bits: until its first pass."""
    return lambda projection: setattr(projection.weight, "SCB", torch.full((4,), scale))


def in_its_state(scale):
    """And after it."""
    return lambda projection: setattr(projection, "state", SimpleNamespace(SCB=torch.full((4,), scale)))


def in_its_meta(scale):
    """As HQQ does, whose weight is called W_q."""

    def put(projection):
        projection.W_q = torch.nn.Parameter(torch.ones(3, dtype=torch.uint8), requires_grad=False)
        projection.meta = {"scale": torch.tensor([scale]), "zero": torch.zeros(1), "nbits": 4}

    return put


def test_scales_that_no_parameter_holds_are_in_the_fingerprint():
    from tests.tiny_models import module

    def of(put):
        model = module("llama")
        put(model.model.layers[0].mlp.gate_proj)
        return load_model(model, tokenizer(), hooks=1).provenance(1)["fingerprint"]

    plain = of(lambda projection: None)
    for kind in (beside_the_weight, in_rows, in_its_state, in_its_meta):
        assert of(kind(1.0)) == of(kind(1.0)) != of(kind(2.0)), kind.__name__
        assert of(kind(1.0)) != plain
    assert of(beside_the_weight(1.0)) != of(beside_the_weight(1.0, code=2.0))
    assert of(in_rows(2.0)) == of(in_its_state(2.0))


def test_weights_as_they_are_have_no_method(llama):
    assert quantization(load_model(llama, hooks=1).module.config) is None


def test_without_accelerate(llama, monkeypatch):
    from transformers import modeling_utils

    monkeypatch.setattr(modeling_utils, "is_accelerate_available", lambda *_: False)
    if "transformers.integrations.accelerate" in sys.modules:
        module = sys.modules["transformers.integrations.accelerate"]
        monkeypatch.setattr(module, "is_accelerate_available", lambda *_: False)
    with pytest.raises(InputError, match=r"`device_map` needs accelerate: install it with `pip install 'itda\[big\]'`"):
        load_model(llama, hooks=1, device_map="auto")
