"""AFA: figures against worked examples, the laws that hold of all codes, and the authors' own measurements."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import itda
from itda import afa as module
from itda.codes import Codes
from itda.errors import InputError
from itda.metrics import afa
from tests.untyped import untyped

DATA = Path(os.environ.get("ITDA_DATA", Path(__file__).parents[1].parent / "shared" / "data"))

W = torch.tensor([[1, 0, 0], [0, 1, 0], [0.6, 0, 0.8], [0, -0.6, -0.8]], dtype=torch.float64)
BIAS = torch.tensor([0.5, -0.5, 1], dtype=torch.float64)
X = torch.tensor(
    [[2.5, 0.5, 3], [0.5, -0.5, 1], [1.5, -1.5, -1], [-0.5, -1.5, 3], [10.5, 9.5, 1], [1, 2, 4]], dtype=torch.float64
)
F = torch.tensor(
    [[0, 0, 3.5, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 2], [10, 10, 0, 0], [0, 0, 4.5, 0]], dtype=torch.float64
)


def sparse(dense):
    """All entries of dense codes, zeros too."""
    return Codes(torch.arange(dense.shape[1]).expand(dense.shape), dense, dense.shape[1])


def per_token(x, dense, rows, bias=None):
    """`Piece` of codes over decoder rows, which need not be of unit norm."""
    x_hat = dense @ rows + (0 if bias is None else bias)
    return module.lengths(x, x_hat, sparse(dense), rows.norm(dim=1), bias)


def test_example_with_a_bias():
    """Example E2."""
    found = per_token(X, F, W, BIAS).with_bias
    assert found.ratio() == pytest.approx([0.941858, 1, 0.522233, 0.751809, 1, 1.017700], abs=1e-6)
    assert found.e() == pytest.approx([0.127273, 0, 2.666667, 0.769231, 0, 0.034483], abs=1e-6)
    assert np.abs(found.interference()) == pytest.approx([0.56, 0, 0, 0.363077, 0, 0.455172], abs=1e-6)
    out = afa(X, F @ W + BIAS, sparse(F), W.norm(dim=1), BIAS)
    assert out["with_bias"]["h"] == 5 and out["centred"]["h"] == 4
    assert out["with_bias"]["active"] == out["centred"]["active"] + 1 == 2
    assert out["with_bias"]["ratio"] == pytest.approx((0.941858 + 1) / 2, abs=1e-6)
    assert out["with_bias"]["e"] == pytest.approx((0.034483 + 0.127273) / 2, abs=1e-6)
    assert out["with_bias"]["over"] == pytest.approx(1 / 6)  # two are equal
    long = torch.tensor([[1 + 4e-7], [1 + 1e-6], [1 - 1e-3]], dtype=torch.float64)
    assert afa(torch.ones(3, 1), torch.ones(3, 1), sparse(long))["centred"]["over"] == pytest.approx(1 / 3)
    empty = per_token(X, F, W, BIAS).centred  # of the second token both are 0, of the third the code is
    assert empty.ratio()[1:3].tolist() == [1, 0] and empty.e()[1:3].tolist() == [0, np.inf]


@pytest.mark.parametrize(
    ("f", "z", "ratio", "e", "epsilon", "bound"),
    [((3, 2, 0), 20.2, 0.802225, 0.553846, 0.276923, 0.8), ((1, 1, 1), 2.6, 1.074172, 0.133333, 0.066667, 1.6)],
)
def test_example_of_the_bound(f, z, ratio, e, epsilon, bound):
    """Example E3: the first two rows."""
    rows = torch.tensor([[1, 0], [0.6, 0.8], [0, -1]], dtype=torch.float64)
    codes = torch.tensor([f], dtype=torch.float64)
    out = afa(codes @ rows, codes @ rows, sparse(codes), rows.norm(dim=1))
    assert out["centred"] == out["with_bias"]
    found = out["centred"]
    assert per_token(codes @ rows, codes, rows).centred.z == pytest.approx([z])
    assert [found[name] for name in ("ratio", "e", "epsilon")] == pytest.approx([ratio, e, epsilon], abs=1e-6)
    mu, k = itda.metrics.coherence(rows)["max"], found["active"]
    assert mu * (k - 1) == pytest.approx(bound) and found["e"] <= bound
    assert found["interference"] == pytest.approx(found["e"] if z > sum(v * v for v in f) else -found["e"])


def test_example_of_pursuits():
    """Example E3: matching pursuit by the norm of its code, and orthogonal matching pursuit."""
    atoms = itda.normalize(torch.tensor([[1, 0, 0], [0, 1, 0], [0, 1, 1]], dtype=torch.float64))
    x = torch.tensor([[1.0, 2, 3]], dtype=torch.float64)
    names = ("ratio", "e", "interference", "unexplained")
    for method, k, expected in (
        ("mp", 4, (1.081500, 0.145038, -0.167939, 0.022901)),
        ("omp", 3, (1.195229, 0.3, -0.3, 0)),
    ):
        codes = itda.pursue(x, atoms, k, method=method)
        found = afa(x, codes.decode(atoms), codes)["centred"]
        assert [found[name] for name in names] == pytest.approx(expected, abs=1e-6), method


def test_of_matching_pursuit_that_takes_no_atom_twice_e_is_the_error():
    noise = torch.Generator().manual_seed(3)
    atoms = itda.normalize(torch.randn(60, 16, generator=noise, dtype=torch.float64))
    x = torch.randn(200, 16, generator=noise, dtype=torch.float64)
    codes = itda.pursue(x, atoms, 5)
    x_hat, once = codes.decode(atoms), (codes.l0() == 5).numpy()
    error = itda.metrics.relative_error(x, x_hat).numpy()
    assert once.sum() > 100 and not once.all()
    found = module.lengths(x, x_hat, codes).centred.e()
    assert found[once] == pytest.approx((error / (1 - error))[once], rel=1e-9)
    assert found[~once] != pytest.approx((error / (1 - error))[~once], rel=0.01)


def planted(seed=0, n=40, d=12, tokens=300):
    """Signed codes of one to six rows of any norm, a bias, and activations near what they stand for."""
    noise = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=noise, dtype=torch.float64)
    dense = torch.zeros(tokens, n, dtype=torch.float64)
    for t in range(tokens):
        some = torch.randperm(n, generator=noise)[: 1 + t % 6]
        dense[t, some] = torch.randn(len(some), generator=noise, dtype=torch.float64)
    bias = torch.randn(d, generator=noise, dtype=torch.float64)
    x = dense @ rows + bias + 0.3 * torch.randn(tokens, d, generator=noise, dtype=torch.float64)
    return x, dense, rows, bias


@pytest.mark.parametrize("way", ["centred", "with_bias"])
def test_interference_is_within_coherence_and_e_is_the_size_of_both_parts(way):
    x, dense, rows, bias = planted()
    found = getattr(per_token(x, dense, rows, bias), way)
    unit = itda.normalize(torch.cat([rows, bias[None]]) if way == "with_bias" else rows)
    cosines = (unit @ unit.T).abs().fill_diagonal_(0).numpy()
    active = (torch.cat([dense, torch.ones(len(x), 1)], 1) if way == "with_bias" else dense) != 0
    for t, which in enumerate(active.numpy()):
        bound = cosines[np.ix_(which, which)].max() * (which.sum() - 1)  # of those in use alone: tighter than of all
        assert abs(found.interference()[t]) <= bound + 1e-12
    assert found.e() == pytest.approx(np.abs(found.interference() + found.unexplained()), rel=1e-9)
    assert (found.interference() > 0.1).any() and (found.interference() < -0.1).any()


def test_order_and_scale_change_nothing():
    x, dense, rows, bias = planted(1)
    expected = afa(x, dense @ rows + bias, sparse(dense), rows.norm(dim=1), bias)
    order, weight = torch.randperm(40, generator=torch.Generator().manual_seed(2)), 0.5 + torch.arange(40.0).double()
    others = {
        "latents permuted": (x, dense[:, order], rows[order], bias),
        "all scaled": (7 * x, 7 * dense, rows, 7 * bias),
        "rows against codes": (x, dense / weight, rows * weight[:, None], bias),
    }
    for name, (a, f, w, b) in others.items():
        found = afa(a, f @ w + b, sparse(f), w.norm(dim=1), b)
        for way in expected:
            assert found[way] == pytest.approx(expected[way], rel=1e-9), name


def test_many_tokens_are_measured_in_pieces(monkeypatch):
    x, dense, rows, bias = planted(2)
    args = x.float(), (dense @ rows + bias).float(), sparse(dense.float()), rows.norm(dim=1), bias
    whole = afa(*args)
    monkeypatch.setattr(module, "PIECE", 7)
    assert afa(*args) == whole
    assert afa(args[0].numpy(), args[1].numpy(), *args[2:]) == whole
    none = afa(x[:0], x[:0], sparse(dense[:0]))["centred"]
    assert np.isnan([none[name] for name in ("ratio", "e", "over", "active", "epsilon")]).all() and none["h"] == 40


def test_welch_is_below_the_coherence_of_any_directions():
    assert module.welch(16_384, 768) == pytest.approx(0.035230, abs=1e-6)
    assert module.welch(17_939, 8_192) == pytest.approx(0.008144, abs=1e-6)
    simplex = itda.normalize(torch.eye(4).double() - 0.25) @ torch.linalg.svd(torch.eye(4) - 0.25)[2].double().T[:, :3]
    assert itda.metrics.coherence(simplex)["max"] == pytest.approx(module.welch(4, 3))  # which reaches it
    assert module.welch(3, 3) == module.welch(1, 3) == 0


# Of the authors' GPT-2 figures, layers 1 to 12: medians of eps_LBO (h - 1), of |f| / |z|, and of the relative error.
PUBLISHED = {
    "e": (0.059, 0.060, 0.149, 0.240, 0.335, 0.414, 0.503, 0.558, 0.611, 0.607, 0.528, 0.287),
    "ratio": (0.972, 0.978, 0.933, 0.898, 0.865, 0.841, 0.816, 0.801, 0.788, 0.789, 0.809, 0.884),
    "error": (0.0010, 0.0121, 0.0167, 0.0289, 0.0430, 0.0545, 0.0663, 0.0774, 0.0840, 0.0915, 0.1050, 0.0818),
}


@pytest.mark.skipif(not (DATA / "afa" / "gpt2.csv").is_file(), reason="the authors' figures are not here (ITDA_DATA)")
def test_medians_of_the_published_figures():
    with open(DATA / "afa" / "gpt2.csv", newline="") as file:
        table = list(csv.DictReader(file))
    columns = {name: np.array([float(row[name]) for row in table]) for name in table[0]}
    for layer in range(1, 13):
        z, f, z_hat, error = (
            columns[name][columns["layer"] == layer] for name in ("ztz", "ftf", "norm_z_hat", "l_recon")
        )
        assert len(z) == 1000
        found = module.Lengths(z, f, z_hat**2)
        out = found.figures(np.ones(len(z), int), 24_577, 768)
        for name in ("e", "ratio"):
            assert out[name] == pytest.approx(PUBLISHED[name][layer - 1], abs=6e-4), (name, layer)
        assert np.median(error / z) == pytest.approx(PUBLISHED["error"][layer - 1], abs=6e-5), layer
        if layer == 9:
            assert [out["interference"], out["unexplained"]] == pytest.approx([0.353, 0.230], abs=6e-4)
            assert out["epsilon"] == pytest.approx(2.49e-5, rel=5e-3)


def test_shapes_that_do_not_fit_are_refused():
    x, dense, rows, bias = planted()
    for args, sentence in (
        ((x[0], x, sparse(dense)), r"`x` has shape \(12,\): pass activations"),
        ((x, x[:9], sparse(dense)), r"`x_hat` has shape \(9, 12\); \(300, 12\) was wanted"),
        ((x, x, sparse(dense[:9])), r"`codes` has shape \(9, 40\); \(300, 40\) was wanted"),
        ((x, x, sparse(dense), bias), r"`norms` has shape \(12,\); \(40,\) was wanted"),
        ((x, x, sparse(dense), None, rows[:, 0]), r"`bias` has shape \(40,\); \(12,\) was wanted"),
    ):
        with pytest.raises(InputError, match=sentence):
            untyped(afa)(*args)
