"""The adapter for SAEBench, which the environment of the tests need not have: a stand-in of its base class is ours."""

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

from itda.dictionary.itda import ITDA
from itda.errors import InputError
from itda.interop import saebench
from itda.labels import Labels
from itda.pursuit import normalize

N, D, K = 30, 16, 5
MODEL = {"id": "gpt2", "hook_point": "transformer.h.3", "layer": 3}
STREAM = {"context_length": 24, "data": "some/text", "prefix": [0]}
METHODS = [(method, nonneg, centred) for method in ("mp", "omp", "gp") for nonneg in (0, 1) for centred in (0, 1)]
BASE = "sae_bench.custom_saes.base_sae"


class BaseSAE(torch.nn.Module):
    """What SAEBench 0.6.0 gives its custom SAEs, as far as the adapter leans on it."""

    def __init__(self, d_in, d_sae, model_name, hook_layer, device, dtype, hook_name=None):
        super().__init__()
        shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,)}
        for name, shape in shapes.items():
            setattr(self, name, torch.nn.Parameter(torch.zeros(shape)))
        self.device, self.dtype = device, dtype
        fields = dict(d_in=d_in, d_sae=d_sae, model_name=model_name, hook_layer=hook_layer)
        self.cfg = SimpleNamespace(**fields, hook_name=hook_name, dtype=str(dtype).partition(".")[2])
        self.to(dtype=dtype, device=device)


@pytest.fixture
def bench(monkeypatch):
    """A `sae_bench` that has the base class and nothing else."""
    for name in ("sae_bench", "sae_bench.custom_saes", BASE):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[BASE].BaseSAE = BaseSAE


def dictionary(method="mp", nonneg=False, centred=False):
    noise = torch.Generator().manual_seed(3)
    atoms, ones = normalize(torch.randn(N, D, generator=noise)), torch.ones(N)
    mean = torch.randn(D, generator=noise) if centred else None
    cfg = {"method": method, "nonneg": bool(nonneg), "model": MODEL, "stream": STREAM}
    return ITDA(atoms, Labels.counted(0, N), K, mean, ones, ones, cfg)


def activations(*batch):
    return torch.randn(*batch, D, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(("method", "nonneg", "centred"), METHODS)
def test_codes_and_reconstructions_are_those_of_the_dictionary(bench, method, nonneg, centred):
    d, x = dictionary(method, nonneg, centred), activations(3, 20)
    sae, width = saebench.adapter(d), N if nonneg else 2 * N
    codes, dense = sae.encode(x), d.encode(x).dense()
    assert isinstance(sae, BaseSAE) and codes.shape == (3, 20, width) and codes.dtype == torch.float32
    assert bool((codes >= 0).all()) and bool((dense < 0).any()) is not bool(nonneg)
    assert torch.equal(codes if nonneg else codes[..., :N] - codes[..., N:], dense)
    assert torch.equal((codes != 0).sum(-1), d.encode(x).l0())  # no atom with both signs
    for x_hat in (sae.decode(codes), sae(x)):
        assert x_hat.shape == x.shape and torch.allclose(x_hat, d.reconstruct(x), rtol=0, atol=1e-5)
    assert torch.equal(sae.encode(x[0]), codes[0]) and torch.equal(sae.encode(x[0, 0]), codes[0, 0])


@pytest.mark.parametrize(("nonneg", "centred"), [(0, 0), (1, 1)])
def test_weights_and_cfg_are_what_saebench_looks_for(bench, nonneg, centred):
    d = dictionary("omp", nonneg, centred)
    sae, width = saebench.adapter(d), N if nonneg else 2 * N
    assert sae.W_dec.shape == (width, D) and sae.W_enc.shape == (D, width) and sae.b_enc.shape == (width,)
    assert torch.equal(sae.W_dec[:N], d.atoms) and (nonneg or torch.equal(sae.W_dec[N:], -d.atoms))
    assert torch.equal(sae.b_dec, d.mean if centred else torch.zeros(D))
    assert not sae.W_enc.any() and not sae.b_enc.any() and not any(p.requires_grad for p in sae.parameters())
    said = dict(model_name="gpt2", hook_name="blocks.3.hook_resid_post", hook_layer=3, d_in=D, d_sae=width)
    said |= dict(dtype="float32", device="cpu", context_size=24, prepend_bos=True, dataset_path="some/text")
    said |= dict(architecture="itda", activation_fn_kwargs={"k": K, "nonneg": bool(nonneg)}, apply_b_dec_to_input=True)
    assert vars(sae.cfg).items() >= said.items() and sae.cfg.activation_fn_str == "omp"
    sae.cfg.model_name = "gpt2-small"
    assert sae.cfg.model_name == "gpt2-small" and saebench.adapter(d).cfg.model_name == "gpt2"


def test_a_dictionary_that_says_no_place_has_none_in_cfg(bench):
    cfg = saebench.adapter(replace(dictionary(), cfg={})).cfg
    assert cfg.model_name is None and cfg.hook_name is None and cfg.hook_layer is None and cfg.prepend_bos is False


def test_codes_are_computed_in_float32_whatever_the_dtype(bench):
    d, x = dictionary(centred=True), activations(50).bfloat16()
    sae = saebench.adapter(d, dtype=torch.bfloat16)
    codes = sae.encode(x)
    assert codes.dtype == sae.W_dec.dtype == sae(x).dtype == torch.bfloat16 and sae.cfg.dtype == "bfloat16"
    assert torch.equal(codes[:, :N] - codes[:, N:], d.encode(x).dense().bfloat16())
    exact = d.reconstruct(x)
    assert float((sae(x) - exact).norm() / exact.norm()) < 2e-2
    assert saebench.adapter(d).to(torch.float64).encode(x).dtype == torch.float64


@pytest.mark.parametrize("error", [ModuleNotFoundError("No module named 'sae_bench'"), RuntimeError("a. b\nc")])
def test_without_saebench_a_sentence_says_how_to_install_it(monkeypatch, error):
    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name == "sae_bench":
                raise error

    for name in [name for name in sys.modules if name.partition(".")[0] == "sae_bench"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(InputError) as caught:
        saebench.adapter(dictionary())
    said = str(caught.value)
    assert "pip install sae-bench" in said and str(error)[:1] in said
    assert said.endswith(".") and "\n" not in said and ". " not in said
