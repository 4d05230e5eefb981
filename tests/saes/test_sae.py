"""`SAE`: its codes by definition, its folder as SAELens reads it, and what is no SAE."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from itda import pursuit
from itda.errors import InputError
from itda.saes import activations, folder
from itda.saes.sae import KINDS, SAE

D, N, K = 12, 40, 5
META = {"model_name": "gpt2", "hook_name": "blocks.1.hook_resid_post"}


def made(kind, seed=0, **changes):
    """A random SAE with latents of unit norm."""
    noise = torch.Generator().manual_seed(seed)
    W_dec = pursuit.normalize(torch.randn(N, D, generator=noise))
    W_enc = W_dec.T if kind == "mp" else torch.randn(D, N, generator=noise)
    b_enc = torch.zeros(N) if kind == "mp" else torch.randn(N, generator=noise) * 0.3
    k = K if kind in ("topk", "batchtopk", "mp") else None
    threshold = torch.rand(N, generator=noise) if kind in ("jumprelu", "batchtopk") else None
    settings = dict(k=k, threshold=threshold, metadata=META) | changes
    return SAE(kind, W_enc, b_enc, W_dec, torch.randn(D, generator=noise), **settings)


def refusal(function, *args, **settings):
    with pytest.raises(InputError) as caught:
        function(*args, **settings)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def x():
    return torch.randn(700, D, generator=torch.Generator().manual_seed(9)) * 2  # more than are encoded together


def slow(sae, x):
    """The dense codes of one activation, by the definition."""
    x, (W_enc, b_enc) = x.double().numpy(), (t.double().numpy() for t in (sae.W_enc, sae.b_enc))
    if sae.normalize == "layer_norm":
        x = (x - x.mean()) / (x.std(ddof=1) + 1e-5)
    x = x - sae.b_dec.double().numpy() * sae.subtract
    if sae.kind == "mp":
        rest, out = x.copy(), np.zeros(sae.n_atoms)
        for _ in range(sae.k):
            correlations = sae.W_dec.double().numpy() @ rest
            j = correlations.argmax()
            out[j] += correlations[j]
            rest -= correlations[j] * sae.W_dec[j].double().numpy()
        return out
    pre = x @ W_enc + b_enc
    if sae.kind == "top-afa":
        order, pre = np.argsort(-np.maximum(pre, 0), kind="stable"), np.maximum(pre, 0)
        norms = np.sqrt((pre[order] ** 2).cumsum())
        norms[-1] = np.inf
        pre[order[np.abs(norms - np.linalg.norm(x)).argmin() + 1 :]] = 0
    if sae.kind == "topk":
        pre[np.argsort(-pre)[sae.k :]] = 0
    if sae.threshold is not None:
        pre[pre <= sae.threshold.double().numpy()] = 0
    return np.maximum(pre, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{}, {"normalize": "layer_norm"}, {"subtract": False}], ids=str)
def test_codes_are_those_of_the_definition(kind, changes, x):
    if kind == "mp" and "subtract" in changes:
        pytest.skip("a pursuit is of what is centred")
    sae = made(kind, **changes)
    codes = sae.encode(x)
    expected = torch.tensor(np.stack([slow(sae, row) for row in x]))
    torch.testing.assert_close(codes.dense().double(), expected, rtol=1e-4, atol=1e-4)
    assert codes.n_atoms == N and codes.indices.shape == codes.values.shape and bool((codes.values >= 0).all())
    x_hat = expected @ sae.W_dec.double() + sae.b_dec
    if sae.normalize != "none":
        x_hat = x_hat * x.double().std(1, keepdim=True) + x.double().mean(1, keepdim=True)
    torch.testing.assert_close(sae.decode(codes, x).double(), x_hat, rtol=1e-4, atol=1e-4)
    assert torch.equal(sae.reconstruct(x), sae.decode(codes, x))
    rows = sae.encode(x.view(7, 100, D))
    assert torch.equal(rows.dense().view(-1, N), codes.dense()) and sae.encode(x[:0]).dense().shape == (0, N)


def test_batchtopk_keeps_the_largest_of_all_tokens_together():
    pre = torch.randn(30, N, generator=torch.Generator().manual_seed(0))
    found = activations.batchtopk(pre, 3)
    kept = np.sort(pre.numpy().ravel())[-90:]
    assert np.array_equal(np.sort(found[found > 0].numpy()), kept) and set((found > 0).sum(1).tolist()) != {3}
    assert torch.equal(found, torch.where(found > 0, pre, 0))
    assert torch.equal(activations.batchtopk(pre, N), pre.relu()) and torch.equal(activations.topk(pre, N), pre.relu())
    assert torch.equal(activations.topk(pre[:1], 3), activations.batchtopk(pre[:1], 3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_saelens_computes_the_same(kind, normalize, x, tmp_path):
    sae_lens = pytest.importorskip("sae_lens", reason="SAELens is not installed")
    from itda.interop import saelens

    sae = made(kind, normalize=normalize)
    if kind == "top-afa":
        saelens.register()
    assert sae.save(tmp_path / "x", tokens=7) == tmp_path / "x"
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "x")
    assert theirs.cfg.metadata.hook_name == META["hook_name"] and theirs.cfg.metadata.itda["tokens"] == 7
    with torch.no_grad():
        codes = theirs.encode(x)
        torch.testing.assert_close(sae.encode(x).dense(), codes, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sae.reconstruct(x), theirs.decode(codes), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_loaded_and_saved_again_the_same(kind, tmp_path):
    sae = made(kind)
    again = SAE.load(sae.save(tmp_path / "x"))
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"):
        ours, theirs = getattr(sae, name), getattr(again, name)
        assert ours is theirs is None or torch.equal(ours, theirs)
    assert (again.kind, again.k, again.hook_point) == (kind, sae.k, META["hook_name"])
    again.save(tmp_path / "y")
    for name in (folder.CFG, folder.WEIGHTS):
        assert (tmp_path / "x" / name).read_bytes() == (tmp_path / "y" / name).read_bytes()
    made(kind, 1).save(tmp_path / "x")  # one that was trained here is replaced
    assert not torch.equal(SAE.load(tmp_path / "x").W_dec, sae.W_dec)


def test_decoder_norms_that_rescale_are_folded_in(x, tmp_path):
    sae_lens = pytest.importorskip("sae_lens", reason="SAELens is not installed")
    sae = replace(made("topk"), W_dec=made("topk").W_dec * torch.rand(N, 1) * 3)
    sae.save(tmp_path / "x")
    cfg = json.loads((tmp_path / "x" / folder.CFG).read_text())
    (tmp_path / "x" / folder.CFG).write_text(json.dumps(cfg | {"rescale_acts_by_decoder_norm": True}))
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "x")
    ours = SAE.load(tmp_path / "x")
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(x).dense(), theirs.encode(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.reconstruct(x), theirs(x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours.encode(x).dense(), sae.encode(x).dense(), rtol=1e-2)


def test_what_is_no_sae_is_refused(tmp_path):
    sae = made("topk")
    sae.save(tmp_path / "x")
    assert "is for activations of width 12, and these have 11" in refusal(sae.encode, torch.ones(3, D - 1))
    assert "pass the activations too" in refusal(
        replace(sae, normalize="layer_norm").decode, sae.encode(torch.ones(2, D))
    )
    assert "holds no cfg.json" in refusal(SAE.load, tmp_path)

    def changed(name, old, new):
        shutil.copytree(tmp_path / "x", tmp_path / "y", dirs_exist_ok=True)
        path = tmp_path / "y" / name
        path.write_bytes(path.read_bytes().replace(old, new, 1))
        return refusal(SAE.load, tmp_path / "y")

    assert "its sha256 differs): train again" in changed(folder.WEIGHTS, b"\0", b"\1")
    for old, new in (
        (b'"topk"', b'"gated"'),
        (b'"k": 5', b'"k": 41'),
        (b'"k": 5', b'"k": "5"'),
        (b'"d_sae": 40', b'"d_sae": 41'),
        (b'"reshape_activations": "none"', b'"reshape_activations": "hook_z"'),
        (b'"normalize_activations": "none"', b'"normalize_activations": "constant_norm_rescale"'),
    ):
        assert "no SAE that can be run without SAELens" in changed(folder.CFG, old, new)
    worn = replace(sae, b_enc=sae.b_enc.clone().fill_(torch.inf))
    worn.save(tmp_path / "worn")
    assert "numbers in b_enc that are not finite" in refusal(SAE.load, tmp_path / "worn")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    said = refusal(sae.save, tmp_path / "mine")
    assert "holds 'notes.txt', which is no part of an SAE that was trained here" in said
    with pytest.raises(InputError, match="is a file"):
        sae.save(tmp_path / "mine" / "notes.txt")
