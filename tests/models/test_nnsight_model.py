"""Read through nnsight, the activations and what is said of them are those of our own hooks, to the last bit."""

from __future__ import annotations

import sys

import pytest
import torch

from itda.dictionary.build import build
from itda.errors import InputError
from itda.models import nnsight_model
from itda.models.hooked_model import HookedModel
from itda.models.loading import load_model
from itda.models.nnsight_model import RemoteModel, TracedModel
from itda.reading.activations import activations
from itda.reading.own_model import model_of
from tests.tiny_models import DOCUMENTS, LAYERS, save, tokenizer

nnsight = pytest.importorskip("nnsight", reason="nnsight is not installed (`pip install 'itda[nnsight]'`)")

BLOCKS = {"gpt2": "transformer.h", "bert": "bert.encoder.layer"}  # "model.layers" in the others
FAMILIES = {"gpt2": "mlp", "llama": "self_attn", "qwen3": "mlp.gate_proj", "gemma2": "mlp", "bert": "output"}
SIZES = {"context_length": 24, "batch_rows": 3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: str(save(family, tmp_path_factory.mktemp(family))) for family in FAMILIES}


@pytest.fixture
def gpt2(folders):
    return folders["gpt2"]


def points(family: str) -> list[str]:
    """A block, a module of the block above it, and the last block, as a forward pass reaches them."""
    blocks = BLOCKS.get(family, "model.layers")
    return [f"{blocks}.0", f"{blocks}.1.{FAMILIES[family]}", f"{blocks}.{LAYERS - 1}"]


def same(a, b) -> bool:
    """Are the batches of two readings the same to the last bit, and is what they say of themselves?"""
    first, second = list(a), list(b)
    assert len(first) == len(second) > 2
    for x, y in zip(first, second, strict=True):
        assert list(x) == list(y)
        for hook in x:
            assert len(x[hook].activations) > 0
            if not torch.equal(x[hook].activations, y[hook].activations):
                return False
            assert (x[hook].labels.pairs() == y[hook].labels.pairs()).all()
    return a.provenance == b.provenance


@pytest.mark.parametrize("family", FAMILIES)
def test_what_nnsight_reads_is_what_hooks_read(family, folders):
    hook = points(family)
    plain = activations(folders[family], DOCUMENTS, hook=hook, **SIZES)
    nnsight_model = activations(folders[family], DOCUMENTS, hook=hook[::-1], backend="nnsight", **SIZES)
    assert type(plain.model) is HookedModel and type(nnsight_model.model) is TracedModel
    assert nnsight_model.hook_points == tuple(hook)
    assert same(plain, nnsight_model)


def test_dictionaries_are_the_same(gpt2):
    first, second = (
        build(activations(gpt2, DOCUMENTS, layer=1, backend=backend, **SIZES), k=4, n_atoms=20)
        for backend in ("hooks", "nnsight")
    )
    assert torch.equal(first.atoms, second.atoms)
    assert first.cfg == second.cfg
    assert (first.labels.pairs() == second.labels.pairs()).all()


def test_forward_stops_at_the_last_hook_point(gpt2):
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(gpt2).train()
    model = load_model(module, tokenizer(), hooks=[0, 2], backend="nnsight")
    ids = torch.arange(10).reshape(2, 5)
    plain = load_model(module, tokenizer(), hooks=[0, 2]).read(ids, torch.ones_like(ids))
    ran = []
    for number, block in enumerate(module.transformer.h):
        block.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    found = model.read(ids, torch.ones_like(ids))
    assert ran == [0, 1, 2]
    assert all(torch.equal(plain[hook], found[hook]) for hook in model.hook_points)  # without dropout
    assert not any(x.requires_grad for x in found.values())
    assert all(part.training for part in module.modules())  # as it was


def test_what_a_later_module_writes_into_does_not_change(gpt2):
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(gpt2)
    module.transformer.h[1].register_forward_pre_hook(lambda m, args: (args[0].zero_(),))
    model = load_model(module, tokenizer(), hooks=[0, 1], backend="nnsight")
    ids = torch.arange(10).reshape(2, 5)
    assert model.read(ids, torch.ones_like(ids))["transformer.h.0"].abs().min() > 0


def test_a_model_of_nnsights_own(gpt2):
    plain = activations(gpt2, DOCUMENTS, hook=points("gpt2"), **SIZES)
    own = nnsight.TransformersModel(gpt2, task="text-generation", tokenizer=tokenizer())
    assert not own.dispatched
    assert same(plain, activations(own, DOCUMENTS, hook=points("gpt2"), backend="nnsight", **SIZES))


def test_a_traced_model_stays_one(gpt2):
    model = load_model(gpt2, hooks=[0, 1], backend="nnsight")
    for again in (load_model(model, hooks=[1]), load_model(model, hooks=[1], backend="nnsight")):
        assert type(again) is TracedModel and again.hook_points == ("transformer.h.1",)
    assert type(load_model(load_model(gpt2, hooks=[1]), hooks=[0], backend="nnsight")) is TracedModel


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_remote_request(family, folders):
    """In nnsight's simulation: the request is packed, unpacked where this package is not, and run."""
    hook = points(family)
    plain = activations(folders[family], DOCUMENTS, hook=hook, **SIZES)
    remote = activations(folders[family], DOCUMENTS, hook=hook, backend="nnsight", remote="local", **SIZES)
    assert type(remote.model) is RemoteModel
    assert all(p.is_meta for p in remote.model.module.parameters())  # no weights are here
    for x, y in zip(plain, remote, strict=True):
        for name in hook:
            torch.testing.assert_close(x[name].activations, y[name].activations, rtol=1e-5, atol=1e-5)
    unknown = {"fingerprint": None, "dtype": None, "remote": True}
    for name, said in plain.provenance.items():
        versions = {library: version for library, version in said["versions"].items() if library != "processor"}
        assert remote.provenance[name] == said | {"model": said["model"] | unknown, "versions": versions}
    again = load_model(remote.model, hooks=[1])
    assert type(again) is RemoteModel and again.provenance(1)["remote"] is True
    assert again.predicts is False


def test_a_dictionary_of_a_remote_model_is_opened_here(gpt2):
    """Whether the weights are the same cannot be told, and is not."""
    model = build(activations(gpt2, DOCUMENTS, layer=1, backend="nnsight", remote="local", **SIZES), k=4, n_atoms=20)
    assert model.cfg["model"]["fingerprint"] is None
    hooked, hook = model_of(model.cfg)
    assert type(hooked) is HookedModel and hook == "transformer.h.1"


def test_what_the_server_says_is_no_result(gpt2, monkeypatch, capsys):
    """nnsight prints how a request is doing to standard output, which is for results."""
    words = tokenizer()
    model = load_model(gpt2, words, hooks=[1], backend="nnsight", remote="local")
    assert (words.padding_side, words.pad_token) == ("right", None)  # nnsight pads on the left
    trace = nnsight_model._trace
    monkeypatch.setattr(nnsight_model, "_trace", lambda *args, **inputs: print("RUNNING") or trace(*args, **inputs))
    ids = torch.arange(10).reshape(2, 5)
    model.read(ids, torch.ones_like(ids))
    said = capsys.readouterr()
    assert not said.out and "RUNNING" in said.err


def test_a_server_that_is_not_reached(gpt2):
    model = load_model(gpt2, hooks=[1], backend="nnsight", remote="http://127.0.0.1:9")
    ids = torch.arange(10).reshape(2, 5)
    with pytest.raises(InputError, match=r"could not be read remotely \(.*\): check your key \(`NDIF_API_KEY`\)"):
        model.read(ids, torch.ones_like(ids))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"backend": "torch"}, "`backend` is 'torch'; choose one of 'hooks', 'nnsight'."),
        ({"remote": True}, "`remote` is nnsight's: pass `backend='nnsight'`"),
        (
            {"backend": "nnsight", "remote": True, "dtype": "float16"},
            "`dtype` is 'float16', but the server chooses .*: drop `dtype`",
        ),
        ({"backend": "nnsight", "stream_layers": True}, "nnsight cannot read a model that is streamed"),
        ({"backend": "nnsight", "hook": "h.1.mlq", "layer": None}, "has no module `h.1.mlq`"),
    ],
)
def test_bad_settings(settings, sentence, gpt2):
    with pytest.raises(InputError, match=sentence.replace("(", r"\(")):
        activations(gpt2, DOCUMENTS, **{"layer": 1} | settings)


def test_a_module_is_not_remote(gpt2):
    from transformers import AutoModelForCausalLM

    with pytest.raises(InputError, match="`model` is a GPT2LMHeadModel, which is here"):
        load_model(AutoModelForCausalLM.from_pretrained(gpt2), tokenizer(), hooks=[1], backend="nnsight", remote=True)
    with pytest.raises(InputError, match="is a folder, and a server"):
        load_model(gpt2, hooks=[1], backend="nnsight", remote=True)


def test_without_nnsight(gpt2, monkeypatch):
    monkeypatch.setitem(sys.modules, "nnsight", None)
    with pytest.raises(InputError, match=r"needs nnsight: install it with `pip install 'itda\[nnsight\]'`"):
        load_model(gpt2, hooks=[1], backend="nnsight")


def test_the_command(gpt2, tmp_path, capfd):
    """`--backend nnsight` makes the same files as without; `--remote` without it is refused."""
    from itda.cli.main import main

    (tmp_path / "text.txt").write_text("\n".join(DOCUMENTS))
    words = ["train", gpt2, str(tmp_path / "text.txt"), "--layer", "1", "--context-length", "24", "--k", "4", "--out"]
    outs = [tmp_path / name for name in ("plain", "traced")]
    for out, more in zip(outs, ([], ["--backend", "nnsight"]), strict=True):
        assert main([*words, str(out), *more]) == 0
    for path in outs[0].iterdir():
        assert path.read_bytes() == (outs[1] / path.name).read_bytes()
    assert main([*words, str(tmp_path / "third"), "--remote"]) == 2
    assert "pass `backend='nnsight'` (`--backend nnsight`) too" in capfd.readouterr().err
