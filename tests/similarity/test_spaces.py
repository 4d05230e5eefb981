"""Laws of the measures between clouds of vectors: worked numbers, direct computation, sums, invariances, bad input."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from itda import InputError
from itda.similarity import clouds as clouds_module
from itda.similarity import paper, spaces
from itda.similarity.clouds import Cloud, Pair
from itda.similarity.spaces import INVARIANCES, MEASURES

FROM_SUMS = [name for name, measure in MEASURES.items() if measure.from_sums]
NAN = float("nan")


def example():
    """Twelve tokens that need no random numbers; with two checksums."""
    i, j = np.arange(12)[:, None], np.arange(4)
    x = np.sin(0.7 * (i + 1) * (j + 1)) + 0.1 * (i % 3)
    mix = np.array([[1, 0.5, 0], [-0.5, 1, 0.2], [0, -0.2, 2]])
    y = x[:, :3] @ mix + 0.3 * np.cos(1.3 * (i + 1) + np.arange(3))
    assert (round(x.sum(), 6), round(y.sum(), 6)) == (8.310669, 7.890943)
    return x, y


def gauss(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clouds(n=400, dx=6, dy=5, seed=0):
    """Two clouds that share three directions, each with noise of falling variance and away from the origin."""
    shared, both = gauss(n, 3, seed=seed), []
    for d, own in ((dx, seed + 1), (dy, seed + 4)):
        noise = 2 * gauss(n, d, seed=own) * torch.logspace(0, -2, d)
        both.append(shared @ gauss(3, d, seed=own + 1) + noise @ orthogonal(d, own + 2) + gauss(d, seed=own + 2))
    return both[0], both[1]


def orthogonal(d, seed):
    return torch.linalg.qr(gauss(d, d, seed=seed)).Q


def measure(name, x, y):
    """As in `MEASURES`, with anchors for fewer than 300 tokens."""
    function = MEASURES[name].function
    return function(x, y) if MEASURES[name].from_sums else function(x, y, anchors=len(x) // 4)


def plain(function):
    """Past the type checker of the tests, as a user would call it."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


# -- worked numbers

X4, Y4 = np.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]]), np.array([[1.0], [-1], [0], [0]])
X3, Y3 = np.array([[1.0, 0], [0, 1], [1, 1]]), np.array([[2.0, 0], [0, 3], [1, 2]])
X12, Y12 = example()
published_relative = partial(spaces.relative, exclude_anchors=False)

WORKED = [
    (spaces.cka, X4, Y4, 0.707107),
    (spaces.linear_regression, X4, Y4, 1.0),
    (spaces.linear_regression, Y4, X4, 0.5),
    (spaces.cca, X4, Y4, 1.0),
    (partial(spaces.relative, anchors=[0, 1]), X3, Y3, 0.948683),  # of the third row alone: 3 / sqrt(10)
    (partial(published_relative, anchors=[0, 1]), X3, Y3, 0.982894),
    (spaces.cka, X12, Y12, 0.702452),
    (spaces.cka_standardised, X12, Y12, 0.815740),
    (spaces.cka_debiased, X12, Y12, 0.608740),
    (spaces.cca, X12, Y12, 0.981720),
    (spaces.svcca, X12, Y12, 0.981720),
    (partial(spaces.svcca, variance=0.9), X12, Y12, 0.981720),
    (partial(spaces.svcca, components=2), X12, Y12, 0.601160),
    (partial(spaces.svcca, components=1), X12, Y12, 0.301640),
    (partial(spaces.svcca, components=3), X12, Y12, 0.870594),
    (partial(paper.paper_svcca, components=2), X12, Y12, 0.600265),
    (partial(paper.paper_svcca, components=2), Y12, X12, 0.539871),
    (partial(paper.paper_svcca, components=3), X12, Y12, 0.869102),
    (partial(paper.paper_svcca, components=3), Y12, X12, 0.838360),
    (spaces.linear_regression, X12, Y12, 0.975291),
    (spaces.linear_regression, Y12, X12, 0.732543),
    (paper.paper_linear_regression, X12, Y12, 0.974631),
    (paper.paper_linear_regression, Y12, X12, 0.722842),
    (partial(published_relative, anchors=[0, 3, 6, 9]), X12, Y12, 0.714586),
    (partial(published_relative, anchors=[0, 3, 6, 9], center=True), X12, Y12, 0.498614),
    (spaces.procrustes, X12, Y12, 0.813331),
    (paper.paper_cka, X12, Y12, 0.815740),
]


@pytest.mark.parametrize(("function", "x", "y", "want"), WORKED)
def test_worked_numbers(function, x, y, want):
    got = function(x, y)
    assert isinstance(got, float)
    assert abs(got - want) < 1e-6


def test_worked_coefficients():
    want = torch.tensor([1.0, 0.995586, 0.949575], dtype=torch.float64)
    torch.testing.assert_close(spaces.cca_coefficients(X12, Y12), want, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        spaces.relative_representations(np.vstack([X3, X3, Y3]), [3, 4])[[2, 8]],
        torch.tensor([[0.707107, 0.707107], [0.447214, 0.894427]], dtype=torch.float64),
        rtol=0,
        atol=1e-6,
    )


# -- against direct computation, with tokens x tokens matrices and QR


def gram_cka(x, y):
    x, y = x - x.mean(0), y - y.mean(0)
    k, kk = x @ x.T, y @ y.T
    return float((k * kk).sum() / (k.norm() * kk.norm()))


def gram_cka_debiased(x, y):
    def hsic(k, kk):
        k, kk = k - k.diag().diag(), kk - kk.diag().diag()
        n, ones = len(k), torch.ones(len(k), dtype=k.dtype)
        total = (k @ kk).trace() + (ones @ k @ ones) * (ones @ kk @ ones) / ((n - 1) * (n - 2))
        return (total - 2 / (n - 2) * (ones @ k @ kk @ ones)) / (n * (n - 3))

    k, kk = x @ x.T, y @ y.T
    return float(hsic(k, kk) / (hsic(k, k) * hsic(kk, kk)).sqrt())


def orthonormal(x, variance=None):
    u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    share = s.square().cumsum(0) / s.square().sum()
    keep = s > 1e-10 * s[0] if variance is None else torch.arange(len(s)) <= (share < variance).sum()
    return u[:, keep]


def qr_cca(x, y):
    return float(torch.linalg.svdvals(orthonormal(x).T @ orthonormal(y)).mean())


def svd_svcca(x, y):
    return float(torch.linalg.svdvals(orthonormal(x, 0.99).T @ orthonormal(y, 0.99)).mean())


def least_squares(x, y):
    x, y = x - x.mean(0), y - y.mean(0)
    rest = y - x @ torch.linalg.lstsq(x, y, driver="gelsd").solution
    return float(1 - rest.square().sum() / y.square().sum())


def best_rotation(x, y):
    x, y = x - x.mean(0), y - y.mean(0)
    u, _, v = torch.linalg.svd(x.T @ y, full_matrices=False)
    return float((x @ u @ v * y).sum() / (x.norm() * y.norm()))


def token_by_token(x, y, anchors, center=False):
    if center:
        x, y = x - x.mean(0), y - y.mean(0)
    cosine = torch.nn.functional.cosine_similarity
    counted = [t for t in range(len(x)) if t not in anchors]
    scores = [cosine(*(torch.stack([cosine(c[t], c[a], 0) for a in anchors]) for c in (x, y)), 0) for t in counted]
    return float(torch.stack(scores).mean())


DIRECT = {
    "cka": gram_cka,
    "cka_debiased": gram_cka_debiased,
    "cca": qr_cca,
    "svcca": svd_svcca,
    "linear_regression": least_squares,
    "procrustes": best_rotation,
}


@pytest.mark.parametrize("shape", [(120, 6, 5), (30, 100, 40), (30, 8, 60), (4, 3, 7)], ids=str)
@pytest.mark.parametrize("name", DIRECT)
def test_sums_equal_direct_computation(name, shape):
    x, y = clouds(*shape)
    assert measure(name, x, y) == pytest.approx(DIRECT[name](x, y), abs=1e-9)


def test_relative_equals_token_by_token():
    x, y = clouds(40)
    for center in (False, True):
        got = spaces.relative(x, y, [3, 17, 30, 39], center=center)
        assert got == pytest.approx(token_by_token(x, y, [3, 17, 30, 39], center), abs=1e-12)


def test_how_many_anchors_draws_the_same_for_both(monkeypatch):
    x, y = clouds(40)
    drawn = torch.randperm(40, generator=torch.Generator().manual_seed(42))[:7]
    assert spaces.relative(x, y, 7) == spaces.relative(x, y, drawn) == spaces.relative(x, y, drawn.numpy())
    assert spaces.relative(x, y, 7) != spaces.relative(x, y, 7, seed=43)
    assert spaces.relative_representations(x, 7).shape == (40, 7)
    assert paper.paper_relative(x, y, 7) == spaces.relative(x, y, drawn, exclude_anchors=False)
    whole = spaces.relative(x, y, 7, center=True), spaces.relative_representations(x, 7)
    monkeypatch.setattr(clouds_module, "CHUNK", 20)  # three tokens at a time
    assert spaces.relative(x, y, 7, center=True) == pytest.approx(whole[0], abs=1e-12)
    torch.testing.assert_close(spaces.relative_representations(x, 7), whole[1])


def test_independent_clouds():
    x, y = gauss(2000, 16, seed=1), gauss(2000, 16, seed=2)
    assert 0.001 < spaces.cka(x, y) < 0.05
    assert abs(spaces.cka_debiased(x, y)) < 0.005
    few = [spaces.cka_debiased(gauss(20, 64, seed=s), gauss(20, 64, seed=s + 100)) for s in range(40)]
    assert abs(np.mean(few)) < 0.02
    assert spaces.cka(gauss(20, 64), gauss(20, 64, seed=100)) > 0.5  # the bias that is gone


# -- sums


@pytest.mark.parametrize("name", FROM_SUMS)
def test_uneven_batches_equal_one(name, monkeypatch):
    x, y = clouds()
    want = measure(name, x, y)
    pair = Pair()
    for part in torch.arange(400).split([1, 2, 17, 80, 300]):
        pair.update(x[part], y[part])
    assert MEASURES[name].function(pair) == pytest.approx(want, abs=1e-10)
    shared, crossed = Cloud(), Cloud()
    for part in torch.arange(400).split([150, 250]):
        shared.update(x[part])
        crossed.update(y[part])
    crossing = Pair(shared, crossed)
    for part in torch.arange(400).split(90):
        crossing.update_cross(x[part], y[part])
    assert MEASURES[name].function(crossing) == pytest.approx(want, abs=1e-10)
    monkeypatch.setattr(clouds_module, "CHUNK", 50)
    assert measure(name, x, y) == pytest.approx(want, abs=1e-10)


@pytest.mark.parametrize("name", FROM_SUMS)
def test_weighted_parts_equal_repetition(name):
    x, y = clouds(60)
    parts = [Pair().update(x[:20], y[:20])]
    shifts = parts[0].x.shift, parts[0].y.shift
    parts += [Pair(*map(Cloud, shifts)).update(x[s], y[s]) for s in (slice(20, 35), slice(35, 60))]
    function = MEASURES[name].function
    assert function(Pair.sum(parts)) == pytest.approx(function(x, y), abs=1e-10)
    drawn = torch.cat([torch.arange(20, 35), torch.arange(35, 60).repeat(3)])
    total = Pair.sum(parts, [0, 1, 3])
    assert total.x.n == len(drawn)
    assert function(total) == pytest.approx(function(x[drawn], y[drawn]), abs=1e-10)
    cloud = Cloud.sum([p.x for p in parts], np.array([0, 1, 3]))
    again = Pair.sum(parts, torch.tensor([0, 1, 3]), x=cloud)
    assert again.x is cloud
    assert function(again) == pytest.approx(function(total), abs=1e-12)
    weights = [1.0, 1 / 19, 1 / 3]
    shares = Pair.sum(parts, weights, x=Cloud.sum([p.x for p in parts[::-1]], weights[::-1]))
    assert shares.x.n != shares.y.n  # but for rounding
    assert math.isfinite(function(shares))


def test_what_was_derived_follows_the_sums():
    x, y = clouds()
    pair = Pair().update(x[:50], y[:50])
    before = {name: MEASURES[name].function(pair) for name in FROM_SUMS}
    basis = pair.x.basis
    assert pair.x.basis is basis  # kept, as long as the sums are
    pair.update(x[50:], y[50:])
    for name in FROM_SUMS:
        assert MEASURES[name].function(pair) == pytest.approx(measure(name, x, y), abs=1e-10)
        assert MEASURES[name].function(pair) != before[name]


def test_a_large_mean_costs_no_digits():
    x, y = clouds()
    for name in FROM_SUMS:
        assert measure(name, x + 1e6, y - 1e6) == pytest.approx(measure(name, x, y), abs=1e-7)


# -- laws

TRANSFORMS = {
    "orthogonal": lambda a, seed: a @ orthogonal(a.shape[1], seed),
    "scale": lambda a, seed: a * (0.01 if seed else 70.0),
    "translation": lambda a, seed: a + 10 * gauss(a.shape[1], seed=seed),
    "column_scale": lambda a, seed: a * (2 * gauss(a.shape[1], seed=seed)).exp(),
    "linear": lambda a, seed: a @ gauss(a.shape[1], a.shape[1], seed=seed),
    "linear_x": lambda a, seed: a if seed else a @ gauss(a.shape[1], a.shape[1], seed=7) + gauss(a.shape[1]),
}


@pytest.mark.parametrize("invariance", INVARIANCES)
@pytest.mark.parametrize("name", MEASURES)
def test_declared_invariances_hold_and_no_others(name, invariance):
    x, y = clouds()
    before = measure(name, x, y)
    after = measure(name, TRANSFORMS[invariance](x, 0), TRANSFORMS[invariance](y, 1))
    if invariance in MEASURES[name].invariances:
        assert after == pytest.approx(before, abs=1e-8)
    else:
        assert abs(after - before) > 1e-3


@pytest.mark.parametrize("name", MEASURES)
def test_symmetry_as_declared(name):
    x, y = clouds()
    assert (abs(measure(name, x, y) - measure(name, y, x)) < 1e-10) == MEASURES[name].symmetric


def test_the_published_svcca_depends_on_the_order():
    x, y = clouds(dx=30, dy=25)
    assert abs(paper.paper_svcca(x, y) - paper.paper_svcca(y, x)) > 1e-3


@pytest.mark.parametrize("n", [400, 12])
@pytest.mark.parametrize("name", MEASURES)
def test_a_cloud_equals_itself(name, n):
    x, _ = clouds(n, 20)
    assert measure(name, x, x) == pytest.approx(1, abs=1e-9)
    assert measure(name, x, x) <= 1


@pytest.mark.parametrize("name", MEASURES)
def test_range(name):
    for seed in range(0, 70, 7):
        x, y = clouds(40, 9, 12, seed)
        assert -1 <= measure(name, x, y) <= 1
        assert name == "cka_debiased" or measure(name, x, y) >= 0 or not MEASURES[name].from_sums


# -- rank, constants and dtypes


@pytest.mark.parametrize("name", MEASURES)
def test_constant_columns_are_dropped(name):
    x, y = clouds()
    constant = torch.full((400, 1), 0.1, dtype=torch.float64)
    assert math.isfinite(measure(name, torch.cat([x, 3 * constant], 1), torch.cat([constant, y], 1)))
    if "translation" in MEASURES[name].invariances:
        got = measure(name, torch.cat([x, 3 * constant], 1), torch.cat([constant, y], 1))
        assert got == pytest.approx(measure(name, x, y), abs=1e-10)


def test_columns_of_rounding_noise_are_constant():
    x, y = clouds()
    noise = 0.3 + 5e-17 * (gauss(400, 2, seed=9) > 0).double()
    assert len(noise.unique()) == 2
    for extra in (noise, 1e9 * noise):
        got = spaces.cka_standardised(torch.cat([x, extra], 1), y)
        assert got == pytest.approx(spaces.cka_standardised(x, y), abs=1e-10)
    assert spaces.cka_standardised(torch.cat([x, 0.3 + 1e-9 * gauss(400, 2)], 1), y) != pytest.approx(got, abs=1e-3)


def test_duplicate_columns_add_no_rank():
    x, y = clouds()
    twice = torch.cat([x, x[:, :3], x[:, :1] + x[:, 1:2]], 1)
    assert Cloud().update(twice).basis.shape == (10, 6)
    assert Cloud().update(gauss(12, 30)).basis.shape == (30, 11)
    for name in ("cca", "linear_regression"):
        assert measure(name, twice, y) == pytest.approx(measure(name, x, y), abs=1e-9)
    assert len(spaces.cca_coefficients(twice, x)) == 6


def test_a_massive_coordinate_hides_no_direction():
    x, y = clouds()
    x[:, 0] *= 1e8
    assert Cloud().update(x).basis.shape == (6, 6)
    assert measure("cca", x, y) == pytest.approx(qr_cca(x, y), abs=1e-7)


CONSTANT = torch.full((59, 3), 0.1, dtype=torch.float64)


@pytest.mark.parametrize("name", FROM_SUMS)
def test_constant_clouds_have_no_similarity(name):
    x = gauss(59, 4)
    for flat in (CONSTANT, CONSTANT @ gauss(3, 3) + 1e5, torch.zeros(59, 2)):
        assert math.isnan(measure(name, x, flat))
        assert math.isnan(measure(name, flat, flat))
        assert math.isnan(measure(name, flat, x)) or name == "linear_regression"  # where X predicts nothing of Y
        shifts = gauss(4, seed=1), gauss(flat.shape[1], seed=2).double()
        pair = Pair(*map(Cloud, shifts)).update(x, flat)
        assert math.isnan(MEASURES[name].function(pair))  # about a shift that leaves rounding
    assert spaces.linear_regression(CONSTANT, x) == 0


def test_equidistant_points_have_no_debiased_similarity():
    """Their products with zero diagonals are constant, which is what the estimate takes out."""
    points = orthogonal(12, 0)
    assert math.isnan(spaces.cka_debiased(points, gauss(12, 3)))
    assert math.isnan(spaces.cka_debiased(points, points))


def test_zero_vectors_have_no_direction():
    x, y = clouds(40)
    x[5] = 0
    rel = spaces.relative_representations(x, [0, 5])
    assert rel[5].tolist() == [0, 0] and not rel[:, 1].any()
    assert spaces.relative(x, torch.zeros_like(y), 4) == 0
    others = [t for t in range(40) if t not in (0, 1, 2, 5)]
    score = token_by_token(x[[0, 1, 2, *others]], y[[0, 1, 2, *others]], [0, 1, 2])
    assert spaces.relative(x, y, [0, 1, 2]) == pytest.approx(score * 36 / 37, abs=1e-12)
    assert spaces.relative(CONSTANT, gauss(59, 4), 5, center=True) == 0


@pytest.mark.parametrize("name", MEASURES)
def test_any_dtype_is_computed_in_float64(name):
    x, y = clouds()
    for dtype in (torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32):
        assert measure(name, x.to(dtype), y) == measure(name, x.to(dtype).double(), y)
    whole = (10 * x).round()
    for same in (whole.int(), whole.int().numpy(), whole.numpy()[::-1].copy()[::-1], whole.numpy().astype(">f4")):
        assert measure(name, same, y) == measure(name, whole, y)
    frozen = whole.numpy()
    frozen.flags.writeable = False
    assert measure(name, frozen.astype(np.longdouble), frozen) == measure(name, whole, whole)


# -- the published linear regression


def test_massive_activations_make_the_published_regression_pick_one_layer():
    """Its tolerance leaves their two directions of a layer, and all layers predict the most massive one best."""
    g = torch.Generator().manual_seed(0)
    layers = [torch.randn(40_000, 32, generator=g) for _ in range(6)]
    for i, layer in enumerate(layers):
        layer[::128, :2] = 5e3 * (i + 1)
    published = torch.tensor([[paper.paper_linear_regression(a, b) for b in layers] for a in layers])
    assert published.argmax(1).tolist() == [5] * 6  # right once in six
    own = [Cloud().update(x) for x in layers]
    pairs = [[Pair(own[i], own[j]).update_cross(layers[i], layers[j]) for j in range(6)] for i in range(6)]
    correct = torch.tensor([[spaces.linear_regression(pair) for pair in row] for row in pairs])
    assert correct.argmax(1).tolist() == list(range(6))
    assert correct.diagonal().min() == pytest.approx(1, abs=1e-9)


def test_the_published_cka_looks_at_the_first_tokens(monkeypatch):
    x, y = clouds()
    monkeypatch.setattr(paper, "MOST_TOKENS", 100)
    assert paper.paper_cka(x, y) == spaces.cka_standardised(x[:100], y[:100]) != spaces.cka_standardised(x, y)


def test_published_names():
    x, y = clouds()
    assert set(paper.PAPER) == {"cka", "svcca", "linear_regression", "relative"}
    for name, function in paper.PAPER.items():
        assert function.__name__ == f"paper_{name}"
        assert 0 < function(x, y) < 2  # the wrong eigenvalues can be above 1
        assert function is not paper.paper_relative or function(x, y) == spaces.relative(x, y, exclude_anchors=False)
    assert math.isnan(paper.paper_svcca(CONSTANT, x[:59]))
    assert math.isnan(paper.paper_linear_regression(x[:59], CONSTANT))


# -- bad input

X, Y = clouds(10, 4, 3)
PAIR = Pair().update(X, Y)
OUTLIER = X.clone()
OUTLIER[2, 1] = torch.nan
INFINITE = OUTLIER.nan_to_num(torch.inf)
BAD = [
    (lambda: spaces.cka(X[0], Y), "`X` has shape (4,): pass (tokens, d), at least one of each"),
    (lambda: spaces.cka(X, Y[None]), "`Y` has shape (1, 10, 3)"),
    (lambda: spaces.cka(X[:0], Y[:0]), "`X` has shape (0, 4)"),
    (lambda: spaces.cka(X[:, :0], Y), "`X` has shape (10, 0)"),
    (lambda: spaces.cka(X, Y[:9]), "`X` has 10 tokens but `Y` 9: pass the same tokens"),
    (lambda: spaces.relative(X, Y[:9]), "`X` has 10 tokens but `Y` 9"),
    (lambda: spaces.cka(X, OUTLIER), "`Y` must be finite; the entry at (2, 1) is nan. Drop or repair that token"),
    (lambda: spaces.cka(X * torch.inf, Y), "`X` must be finite; the entry at (0, 0) is"),
    (lambda: spaces.cka(INFINITE.float(), Y), "`X` must be finite; the entry at (2, 1) is inf"),
    (lambda: spaces.relative(X, -INFINITE.half(), 4), "`Y` must be finite; the entry at (2, 1) is -inf"),
    (lambda: Cloud().update(INFINITE.bfloat16()), "`X` must be finite; the entry at (2, 1) is inf"),
    (lambda: spaces.cka(X * 1e70, Y), "`X` must be at most 1e+60; the entry at (0, 0) is"),
    (lambda: spaces.cka(X.cfloat(), Y), "`X` has dtype torch.complex64: pass real numbers"),
    (lambda: spaces.cka(X, Y.numpy().astype(complex)), "`Y` has dtype complex128"),
    (lambda: spaces.cka(X > 0, Y), "`X` has dtype torch.bool"),
    (lambda: spaces.cka(X), "`Y` has type NoneType"),
    (lambda: spaces.cka(PAIR, Y), "A `Pair` holds both clouds: leave `Y` out"),
    (
        lambda: spaces.cka(Pair()),
        "The `Pair` has summed 0 and 0 tokens of its clouds, but 0 of their products: update all with the",
    ),
    (
        lambda: spaces.cka(Pair(PAIR.x, PAIR.y).update_cross(X[:4], Y[:4])),
        "summed 10 and 10 tokens of its clouds, but 4",
    ),
    (
        lambda: spaces.cka(Pair(PAIR.x, Cloud().update(Y).update(Y)).update_cross(X, Y)),
        "summed 10 and 20 tokens of its",
    ),
    (lambda: Pair().update_cross(X, Y), "`update_cross` needs clouds that have a shift"),
    (lambda: Pair().update(X, Y).update(Y, Y), "`X` is 3 wide on cpu, its cloud 4 on cpu: pass batches of one width"),
    (lambda: Cloud().update(X).update(Y), "`X` is 3 wide on cpu, its cloud 4"),
    (lambda: Cloud.sum([Cloud().update(X), Cloud().update(X[1:])]), "one shift: make each with `Cloud(shift="),
    (lambda: Cloud.sum([Cloud()]), "`parts` must have tokens"),
    (
        lambda: Pair.sum([Pair(PAIR.x, PAIR.y)]),
        "`parts` must have products about the shifts of `x` and `y`: give each clouds of those",
    ),
    (lambda: Pair.sum([PAIR], x=Cloud().update(X[1:])), "`parts` must have products about the shifts of"),
    (lambda: Pair.sum([]), "`weights` are [] for 0 parts"),
    (
        lambda: Pair.sum([PAIR], [1, 2]),
        "`weights` are [1.0, 2.0] for 1 part: pass one each, at least 0 and not all 0",
    ),
    (lambda: Pair.sum([PAIR], [-1]), "`weights` are [-1.0] for 1 part"),
    (lambda: Pair.sum([PAIR], [0]), "`weights` are [0.0] for 1 part"),
    (lambda: spaces.cka_debiased(X[:3], Y[:3]), "`X` has 3 tokens, and `cka_debiased` needs 4 or more"),
    (lambda: spaces.svcca(X, Y, 0.0), "`variance` is 0.0: pass a share of the variance, above 0 and at most 1"),
    (lambda: spaces.svcca(X, Y, 1.01), "`variance` is 1.01"),
    (lambda: spaces.svcca(X, Y, NAN), "`variance` is nan"),
    (lambda: spaces.svcca(X, Y, components=0), "`components` is 0: pass a whole number, 1 or more"),
    (lambda: paper.paper_svcca(X, Y, components=0), "`components` is 0"),
    (lambda: spaces.relative(X, Y), "`anchors` is 300: pass 1 to 10, the number of tokens"),
    (lambda: spaces.relative(X, Y, 0), "`anchors` is 0"),
    (lambda: spaces.relative(X, Y, [0, 10]), "`anchors` reach from 0 to 10: pass indices of 0 to 9"),
    (lambda: spaces.relative(X, Y, [-1]), "`anchors` reach from -1 to -1"),
    (
        lambda: spaces.relative_representations(X, []),
        "`anchors` are torch.float32 of shape (0,): pass indices of tokens",
    ),
    (lambda: spaces.relative(X, Y, X[0] > 0), "`anchors` are torch.bool of shape (4,)"),
    (lambda: spaces.relative(X, Y, 10), "Each of the 10 tokens is an anchor: pass fewer `anchors`"),
    (lambda: plain(clouds_module.vectors)([[1.0]], "X"), "`X` has type list: pass real numbers in a tensor or array"),
]


@pytest.mark.parametrize(("call", "sentence"), BAD, ids=[sentence for _, sentence in BAD])
def test_bad_input(call, sentence):
    with pytest.raises(InputError) as error:
        call()
    assert sentence in str(error.value)


def test_a_refused_batch_leaves_the_sums_alone():
    pair = Pair().update(X, Y)
    for x, y in ((X, OUTLIER[:, :3]), (X, Y[:4]), (Y, X)):
        with pytest.raises(InputError):
            pair.update(x, y)
    assert spaces.cka(pair) == spaces.cka(PAIR)


def test_each_measure_is_named_once():
    for name, entry in MEASURES.items():
        assert entry.name == name
        assert entry.invariances <= set(INVARIANCES)
        assert entry.source
    with pytest.raises(AttributeError):
        MEASURES["cka"].name = "other"
