"""Laws of pursuit, over methods x backends x dtypes x shapes; the reference judges, other libraries witness."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import itda
from itda.pursuit import dense, reference
from itda.pursuit.gram import FEWEST, STEP, Gram

METHODS = ("mp", "omp", "gp")
VARIANTS = [(method, nonneg) for method in METHODS for nonneg in (False, True)]
# (tokens, d, n, k): one of everything, k beyond n, n beyond d, no atoms, no steps, no tokens.
SHAPES = [
    (5, 1, 1, 3), (6, 1, 4, 2), (9, 7, 5, 12), (20, 16, 100, 6), (8, 64, 10, 10), (12, 32, 500, 20),
    (4, 1024, 300, 5), (3, 48, 4096, 16), (4, 5, 0, 3), (4, 5, 6, 0), (0, 5, 6, 3), (3, 5, 0, 0),
]  # fmt: skip


def case(tokens, d, n, kind="gauss", seed=0, dtype=torch.float32):
    """Activations and atoms: independent, sharing a strong mean, sparse sums of atoms, or full of exact ties."""
    g = torch.Generator().manual_seed(seed)
    x, atoms = torch.randn(tokens, d, generator=g), torch.randn(n, d, generator=g)
    if kind == "mean":
        mean = 4 * torch.randn(d, generator=g)
        x, atoms = x + 2 * mean, atoms + mean
    if kind == "ties":
        x, atoms = x.sign(), atoms.sign()
    atoms = itda.normalize(atoms.to(torch.float64 if dtype == torch.float64 else torch.float32))
    if kind == "ties" and n > 4:
        atoms[3], atoms[4] = atoms[1], -atoms[1]
    if kind == "planted" and n:
        weights = torch.zeros(tokens, n)
        weights.scatter_(1, torch.randint(n, (tokens, min(n, 3)), generator=g), 1.0)
        x = weights @ atoms.float()
    return x.to(dtype), atoms.to(dtype)


def norms(x):
    return x.double().square().sum(-1).sqrt()


@pytest.mark.parametrize("kind", ["gauss", "mean", "ties", "planted"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("method", "nonneg"), VARIANTS)
def test_all_make_the_choices_of_the_reference(method, nonneg, shape, kind):
    tokens, d, n, k = shape
    x, atoms = case(tokens, d, n, kind)
    want = itda.pursue(x, atoms, k, method=method, nonneg=nonneg, backend="reference")
    settings = dict(method=method, nonneg=nonneg)
    # With the Gram matrix, with few of its rows, and without.
    for backend, size in [("dense", None), ("dense", 0.0), ("cpu", None), ("cpu", 64.0 * 2 * n), ("cpu", 0.0)]:
        got = itda.pursue(x, atoms, k, backend=backend, max_gram_bytes=size, **settings)
        assert got.indices.shape == got.values.shape == (tokens, k)
        assert torch.equal(got.indices, want.indices)
        torch.testing.assert_close(got.values, want.values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "dense", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype, backend):
    x, atoms = case(20, 24, 60)
    if backend == "cpu" and dtype == torch.float64:
        with pytest.raises(itda.InputError, match=r"`backend` 'cpu' computes in float32, but `x` is float64"):
            itda.pursue(x.double(), atoms.double(), 5, backend="cpu")
        backend = "auto"
    codes = itda.pursue(x.to(dtype), atoms.to(dtype), 5, backend=backend)
    assert codes.values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for t in range(20):
        chosen, coefficients, _ = reference.mp(x.to(dtype)[t].double().numpy(), atoms.to(dtype).double().numpy(), 5)
        want = torch.zeros(60, dtype=torch.float64)
        want.index_add_(0, torch.tensor(chosen), torch.tensor(coefficients, dtype=torch.float64))
        torch.testing.assert_close(codes.dense()[t].double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "dense", "reference"])
@pytest.mark.parametrize(("method", "nonneg"), VARIANTS)
class TestLaws:
    def test_form_of_the_codes(self, method, nonneg, backend):
        x, atoms = case(30, 16, 40, "mean")
        codes = itda.pursue(x, atoms, 12, method=method, nonneg=nonneg, backend=backend)
        assert codes.l0().max() <= 12
        for indices, values in zip(codes.indices, codes.values, strict=True):
            used = values != 0
            assert len(set(indices[used].tolist())) == int(used.sum())
            assert not used[int(used.sum()) :].any()  # padding stands at the end
            assert not indices[~used].any()
        if nonneg:
            assert (codes.values >= 0).all()
        elif method != "gp":
            assert (codes.values < 0).any()

    def test_residual_never_grows_with_k(self, method, nonneg, backend):
        x, atoms = case(20, 16, 40)
        before = norms(x)
        for k in range(1, 14):
            codes = itda.pursue(x, atoms, k, method=method, nonneg=nonneg, backend=backend)
            now = norms(x - codes.decode(atoms))
            # Clipping at zero can cost gradient pursuit what its line search had gained.
            assert (now <= before * (1 + 1e-6)).all() or (method == "gp" and nonneg)
            before = now

    def test_an_atom_encodes_to_itself(self, method, nonneg, backend):
        _, atoms = case(0, 16, 40)
        scale = 1 + torch.arange(40.0)
        codes = itda.pursue(scale[:, None] * atoms, atoms, 5, method=method, nonneg=nonneg, backend=backend)
        assert codes.indices[:, 0].tolist() == list(range(40))
        assert (codes.l0() == 1).all()
        torch.testing.assert_close(codes.values[:, 0], scale)

    def test_scaling(self, method, nonneg, backend):
        x, atoms = case(20, 16, 40)
        a = itda.pursue(x, atoms, 6, method=method, nonneg=nonneg, backend=backend)
        for c in (1e-20, 0.1, 3.0, 1e10):
            b = itda.pursue(c * x, atoms, 6, method=method, nonneg=nonneg, backend=backend)
            assert torch.equal(a.indices, b.indices)
            torch.testing.assert_close(b.values, c * a.values, rtol=1e-4, atol=1e-6 * c)

    def test_rotation(self, method, nonneg, backend):
        dtype = torch.float32 if backend == "cpu" else torch.float64
        x, atoms = case(20, 16, 40, dtype=dtype)
        q, _ = torch.linalg.qr(torch.randn(16, 16, dtype=dtype, generator=torch.Generator().manual_seed(1)))
        a = itda.pursue(x, atoms, 6, method=method, nonneg=nonneg, backend=backend)
        b = itda.pursue(x @ q, atoms @ q, 6, method=method, nonneg=nonneg, backend=backend)
        assert torch.equal(a.indices, b.indices)
        torch.testing.assert_close(a.values, b.values, rtol=1e-5, atol=1e-5)

    def test_permuting_atoms_permutes_indices(self, method, nonneg, backend):
        x, atoms = case(20, 16, 40)
        order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
        a = itda.pursue(x, atoms, 6, method=method, nonneg=nonneg, backend=backend)
        b = itda.pursue(x, atoms[order], 6, method=method, nonneg=nonneg, backend=backend)
        assert torch.equal(torch.where(b.values != 0, order[b.indices], 0), a.indices)

    def test_zero_vectors_and_duplicates(self, method, nonneg, backend):
        x, atoms = case(6, 16, 10)
        x[2] = 0
        atoms = torch.cat([atoms, atoms])  # every atom twice: the first of each pair is taken
        codes = itda.pursue(x, atoms, 4, method=method, nonneg=nonneg, backend=backend)
        assert codes.l0()[2] == 0
        assert codes.indices.max() < 10

    def test_tol_stops_early(self, method, nonneg, backend):
        x, atoms = case(30, 16, 60)
        full = itda.pursue(x, atoms, 12, method=method, nonneg=nonneg, backend=backend)
        codes = itda.pursue(x, atoms, 12, method=method, nonneg=nonneg, tol=0.3, backend=backend)
        error = (norms(x - codes.decode(atoms)) / norms(x)) ** 2
        full_error = (norms(x - full.decode(atoms)) / norms(x)) ** 2
        assert ((error <= 0.3 + 1e-6) | (full_error > 0.3)).all()
        assert codes.l0().float().mean() < full.l0().float().mean()
        nothing = itda.pursue(x, atoms, 12, method=method, nonneg=nonneg, tol=1.0, backend=backend)
        assert nothing.l0().max() == 0

    def test_batch_axes(self, method, nonneg, backend):
        x, atoms = case(24, 16, 40)
        flat = itda.pursue(x, atoms, 6, method=method, nonneg=nonneg, backend=backend)
        deep = itda.pursue(x.reshape(2, 3, 4, 16), atoms, 6, method=method, nonneg=nonneg, backend=backend)
        assert torch.equal(deep.values.reshape(24, 6), flat.values)
        assert deep.decode(atoms).shape == (2, 3, 4, 16)
        one = itda.pursue(x[0], atoms, 6, method=method, nonneg=nonneg, backend=backend)
        assert torch.equal(one.indices, flat.indices[0])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(0, 60), st.integers(0, 50), st.integers(0, 10_000))
def test_energy_identity(d, n, k, seed):
    """|x|^2 = sum_s c_s^2 + |r|^2: every step is an orthogonal projection of the residual."""
    x, atoms = case(16, d, n, seed=seed, dtype=torch.float64)
    steps = dense.mp(x, Gram(atoms), k)
    codes = itda.pursue(x, atoms, k)
    residual = x - codes.decode(atoms)
    total = steps.coefficients.square().sum(1) + residual.square().sum(1)
    torch.testing.assert_close(total, x.square().sum(1), rtol=1e-10, atol=1e-10)


def test_orthonormal_atoms_leave_nothing():
    x = case(10, 12, 0)[0]
    codes = itda.pursue(x, torch.eye(12), 12)
    torch.testing.assert_close(codes.dense(), x, rtol=0, atol=2e-5 * float(norms(x).max()))


# x = (1, 2, 3) and the atoms e1, e2, (0, 1, 1)/sqrt 2, by hand. Columns: k, codes, sum c^2, |r|^2, sum a^2, |x_hat|^2.
A11 = [
    (1, [0, 0, 3.535534], 12.5, 1.5, 12.5, 12.5),
    (2, [1, 0, 3.535534], 13.5, 0.5, 13.5, 13.5),
    (3, [1, -0.5, 3.535534], 13.75, 0.25, 13.75, 11.25),
    (4, [1, -0.5, 3.889087], 13.875, 0.125, 16.375, 13.625),
    (5, [1, -0.75, 3.889087], 13.9375, 0.0625, 16.6875, 12.5625),
]
A11_OMP = [(1, [0, 0, 3.535534], 1.5), (2, [1, 0, 3.535534], 0.5), (3, [1, -1, 4.242641], 0.0)]
A11_ATOMS = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0.5**0.5, 0.5**0.5]], dtype=torch.float64)
A11_X = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)


def in_dtype_of(backend, *tensors):
    """The kernels compute in float32, the reference and torch in what comes."""
    return tuple(a.float() if backend == "cpu" else a for a in tensors)


@pytest.mark.parametrize("backend", ["cpu", "dense", "reference"])
@pytest.mark.parametrize(("k", "codes", "steps2", "rest", "codes2", "x_hat2"), A11)
def test_worked_example(k, codes, steps2, rest, codes2, x_hat2, backend):
    x, atoms = in_dtype_of(backend, A11_X, A11_ATOMS)
    got = itda.pursue(x, atoms, k, backend=backend)
    x_hat = got.decode(atoms)
    assert got.dense().tolist() == pytest.approx(codes, abs=1e-6)
    assert float((x - x_hat).square().sum()) == pytest.approx(rest, abs=1e-6)
    assert float(got.energy()) == pytest.approx(codes2, abs=1e-5)
    assert float(x_hat.square().sum()) == pytest.approx(x_hat2, abs=1e-5)
    assert float(dense.mp(A11_X[None], Gram(A11_ATOMS), k).coefficients.square().sum()) == pytest.approx(steps2)


@pytest.mark.parametrize("backend", ["cpu", "dense", "reference"])
@pytest.mark.parametrize(("k", "codes", "rest"), A11_OMP)
def test_worked_example_omp(k, codes, rest, backend):
    x, atoms = in_dtype_of(backend, A11_X, A11_ATOMS)
    got = itda.pursue(x, atoms, k, method="omp", backend=backend)
    assert got.dense().tolist() == pytest.approx(codes, abs=1e-6)
    assert float((x - got.decode(atoms)).square().sum()) == pytest.approx(rest, abs=1e-6)


def test_steps_of_the_worked_example():
    """The atom and coefficient of each step, an atom chosen twice among them."""
    steps = dense.mp(A11_X[None], Gram(A11_ATOMS), 5)
    assert steps.indices[0].tolist() == [2, 0, 1, 2, 1]
    assert steps.coefficients[0].tolist() == pytest.approx([3.535534, 1.0, -0.5, 0.353553, -0.25], abs=1e-6)


def test_omp_equals_scikit_learn():
    from sklearn.linear_model import orthogonal_mp

    x, atoms = case(40, 32, 100, dtype=torch.float64)
    codes = itda.pursue(x, atoms, 8, method="omp")
    want = orthogonal_mp(atoms.numpy().T, x.numpy().T, n_nonzero_coefs=8)
    np.testing.assert_allclose(codes.dense().numpy(), want.T, atol=1e-9)


def test_omp_with_all_atoms_is_least_squares():
    x, atoms = case(10, 32, 12, dtype=torch.float64)
    codes = itda.pursue(x, atoms, 12, method="omp")
    want = torch.linalg.lstsq(atoms.T, x.T).solution.T
    torch.testing.assert_close(codes.dense(), want, rtol=1e-4, atol=1e-4)


def test_nonneg_omp_is_nnls_on_its_support():
    from scipy.optimize import nnls

    x, atoms = case(30, 24, 60, dtype=torch.float64)
    codes = itda.pursue(x, atoms, 10, method="omp", nonneg=True)
    for t in range(30):
        support = codes.indices[t][codes.values[t] > 0]
        want, _ = nnls(atoms[support].T.numpy(), x[t].numpy())
        np.testing.assert_allclose(codes.values[t][codes.values[t] > 0].numpy(), want, atol=1e-8)


def test_nonneg_mp_equals_saelens():
    sae = pytest.importorskip("sae_lens.saes.matching_pursuit_sae")
    x, atoms = case(50, 32, 80)
    cfg = sae.MatchingPursuitSAEConfig(
        d_in=32, d_sae=80, max_iterations=7, residual_threshold=0.0, stop_on_duplicate_support=False
    )
    theirs = sae.MatchingPursuitSAE(cfg)
    with torch.no_grad():
        theirs.W_dec.copy_(atoms)
        theirs.b_dec.zero_()
        want = theirs.encode(x)
    codes = itda.pursue(x, atoms, 7, nonneg=True)
    torch.testing.assert_close(codes.dense(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("d", "n", "k", "kind"), [(64, 600, 40, "gauss"), (256, 900, 64, "mean"), (24, 400, 200, "mean")]
)
def test_error_bound_holds_with_room(d, n, k, kind):
    """The stated bound on float32 correlations, against float64, after every step.

    With a matrix in float32, observed errors are far below it; in whole numbers, an entry may be half a step away.
    """
    x, atoms = case(64, d, n, kind)
    gram = Gram(atoms)
    gram.fill()
    steps = dense.mp(x, gram, k)
    for matrix, entry, most in [(atoms @ atoms.T, 0.0, 0.5), (gram.rows(torch.arange(n)), STEP / 2, 1.0)]:
        corr, residual, spent, worst = x @ atoms.T, x.double(), torch.zeros(64, dtype=torch.float64), 0.0
        for s in range(k):
            error = (corr.double() - residual @ atoms.double().T).abs().amax(1)
            worst = max(worst, float((error / dense.error_bound(d, norms(x), spent, entry=entry)).max()))
            c, j = steps.coefficients[:, s], steps.indices[:, s]
            corr = corr - matrix[j] * c.float()[:, None]
            residual = residual - atoms[j].double() * c[:, None]
            spent += c.abs()
        assert 0 < worst < most


def test_close_choices_are_settled_in_float64():
    """Atoms that float32 cannot tell apart: the reference's choice, where the float32 maximum is often another."""
    g = torch.Generator().manual_seed(3)
    base = itda.normalize(torch.randn(1, 96, generator=g))
    atoms = itda.normalize(base + 1e-7 * torch.randn(300, 96, generator=g))
    x = base + 0.3 * torch.randn(200, 96, generator=g)
    want = itda.pursue(x, atoms, 1, backend="reference").indices[:, 0]
    assert torch.equal(itda.pursue(x, atoms, 1).indices[:, 0], want)
    assert (dense.mp(x, Gram(atoms), 1).settled == 1).all()
    assert not torch.equal((x @ atoms.T).abs().argmax(1), want)


def test_near_ties_in_float64_are_those_of_the_reference():
    x = torch.tensor([[1.0, 1 + 5e-13]], dtype=torch.float64)
    for order in ([0, 1], [1, 0]):
        atoms = torch.eye(2, dtype=torch.float64)[order]
        codes = [itda.pursue(x, atoms, 1, backend=backend).indices.item() for backend in ("dense", "reference")]
        assert codes == [0, 0]


def test_tol_is_met_exactly_in_every_backend():
    """After two steps the residual energy is 0.2 |x|^2 up to the last bit, which must not decide."""
    atoms = itda.normalize(torch.tensor([[0, 1, 1, 0, 0], [1, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0.0]]))
    x = torch.tensor([[1, 1, 0, 0, 0.0]])
    dense, exact = (itda.pursue(x, atoms, 4, method="omp", tol=0.2, backend=name) for name in ("dense", "reference"))
    assert torch.equal(dense.indices, exact.indices)
    assert dense.l0() == exact.l0() == 3


def test_many_steps_take_no_memory_of_their_square():
    """A table of k x k for one token would be 3 GB of truth values here."""
    x, atoms = case(2, 8, 5)
    codes = itda.pursue(x, atoms, 60_000)
    torch.testing.assert_close(codes.dense(), itda.pursue(x, atoms, 1000).dense())
    assert codes.indices.shape == (2, 60_000)
    assert int(codes.l0().max()) <= 5


def test_what_a_refit_makes_zero_is_no_coefficient():
    """The least squares have a coefficient of 0, or of what rounding leaves of it."""
    atoms = itda.normalize(torch.tensor([[0, 1, 0, 0, 0], [1, 0, 1, 0, 1], [0, 0, 1, 1, 1], [0, 1, 0, 1, 0.0]]))
    x = torch.tensor([0, 1, 1, 1, 0.0])
    dense, exact = (itda.pursue(x, atoms, 4, method="omp", tol=0.1, backend=name) for name in ("dense", "reference"))
    assert torch.equal(dense.indices, exact.indices)
    assert dense.l0() == exact.l0() == 3


@pytest.mark.parametrize("method", ["mp", "omp", "gp"])
@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e30])
def test_choices_at_the_ends_of_float32(method, scale):
    """Where products underflow, their error is not a share of the activation's norm."""
    x, atoms = case(100, 16, 80)
    dense, exact = (itda.pursue(x * scale, atoms, 5, method=method, backend=b) for b in ("dense", "reference"))
    assert torch.equal(dense.indices, exact.indices)


def test_float32_means_float32_in_the_settings_of_torch_2_9():
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("older torch has the older setting only, tested below")
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        itda.pursue(*case(5, 6, 7), 2)
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def assert_gram(gram, atoms):
    """Every row of the matrix is at hand, to within half a step of its whole numbers."""
    assert gram.complete
    got = gram.rows(torch.arange(len(atoms)))
    torch.testing.assert_close(got, atoms @ atoms.T, rtol=0, atol=STEP / 2 + 1e-6)
    assert not torch.equal(got, atoms @ atoms.T)


def test_rows_of_the_gram_matrix_are_computed_when_asked_for():
    _, atoms = case(0, 8, 600)
    gram = Gram(atoms)
    assert not gram.complete
    gram.need(torch.tensor([7, 599, 7]))
    assert (gram.slot >= 0).sum() == FEWEST  # as fast as two
    torch.testing.assert_close(gram.rows(torch.tensor([7, 599])), atoms[[7, 599]] @ atoms.T, rtol=0, atol=1e-4)
    assert gram.fill()
    assert_gram(gram, atoms)
    assert not Gram(atoms, max_bytes=2 * 599 * 640).fill()
    assert Gram(atoms, max_bytes=2 * 600 * 640).fill()


def test_the_gram_matrix_keeps_the_rows_used_last():
    """A table of 100 rows for 600 atoms: never more, always right, and what was used stays."""
    _, atoms = case(0, 8, 600)
    gram = Gram(atoms, max_bytes=2 * 640 * 100)
    g = torch.Generator().manual_seed(0)
    favourites = torch.arange(50)
    for _ in range(20):
        wanted = torch.cat([favourites, torch.randint(50, 600, (30,), generator=g)]).unique()
        gram.need(wanted)
        torch.testing.assert_close(gram.rows(wanted), atoms[wanted] @ atoms.T, rtol=0, atol=1e-4)
        held = gram.owner[gram.owner >= 0]
        assert len(held) <= 100
        assert torch.equal(gram.slot[held], (gram.owner >= 0).nonzero()[:, 0])
        assert (gram.slot >= 0).sum() == len(held)
        gram.used.zero_()
        gram.used[gram.slot[favourites]] = 1
    kept = gram.slot[favourites].clone()
    gram.need(torch.arange(500, 530))
    assert torch.equal(gram.slot[favourites], kept)


def test_chunks_change_nothing(monkeypatch):
    x, atoms = case(300, 16, 50, "mean")
    x[::5] = atoms[7] * 3  # tokens that end at once, at the floor
    want = itda.pursue(x, atoms, 8)
    for backend, workspace, at_once in [
        ("cpu", 1, 1 << 24), ("cpu", 20_000, 1 << 24), ("dense", 1, 1 << 24), ("dense", 20_000, 1 << 24),
        ("dense", 8_000_000, 1),
    ]:  # fmt: skip
        monkeypatch.setitem(itda.pursuit.WORKSPACE_BYTES, backend, workspace)
        monkeypatch.setattr(dense, "SETTLED_AT_ONCE", at_once)
        got = itda.pursue(x, atoms, 8, backend=backend)
        assert torch.equal(got.indices, want.indices)
        assert torch.equal(got.values, want.values)


def test_float32_means_float32():
    """A caller who allows bfloat16 products elsewhere gets float32 here, and keeps the setting."""
    x, atoms = case(30, 16, 50)
    want = itda.pursue(x, atoms, 4)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(itda.pursue(x, atoms, 4).values, want.values)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("rows", [100, 700])
def test_gram_grows_without_being_rebuilt(rows):
    _, atoms = case(0, 16, 700)
    grown = Gram(atoms[:0], max_bytes=2 * rows * 1024)
    for atom in atoms:
        correlations = grown.append(atom)
        torch.testing.assert_close(correlations, grown.atoms @ atom)
    assert torch.equal(grown.atoms, atoms)
    assert grown.complete == (rows == 700)
    held = grown.owner[grown.owner >= 0]
    assert len(held) == rows
    torch.testing.assert_close(grown.rows(held), atoms[held] @ atoms.T, rtol=0, atol=STEP / 2 + 1e-6)


def test_replay_is_the_reference_to_the_bit():
    x, atoms = case(20, 33, 50)
    rows, exact = x.double().numpy(), atoms.double().numpy()
    runs = [reference.mp(row, exact, 9) for row in rows]
    indices = np.array([chosen + [0] * (9 - len(chosen)) for chosen, _, _ in runs])
    coefficients, residual = reference.replay(rows, exact, indices, np.array([len(c) for c, _, _ in runs]))
    assert all((residual[t] == run[2]).all() and coefficients[t, : len(run[1])].tolist() == run[1]
               for t, run in enumerate(runs))  # fmt: skip


X, D = case(3, 4, 5)
BAD = [
    (dict(x=X.int()), "`x` has dtype torch.int32; a dense floating-point tensor was wanted"),
    (dict(x=X.int().numpy()), "`x` has dtype int32; a dense floating-point tensor was wanted: pass `x.astype"),
    (dict(x=X.to_sparse()), "layout torch.sparse_coo; a dense floating-point tensor was wanted"),
    (dict(x=X.to("meta")), "`x` has device meta"),
    (dict(x=X[:, :0], atoms=D[:, :0]), "pass vectors of one entry or more"),
    (dict(nonneg="yes"), "`nonneg` is 'yes': pass True or False"),
    (dict(x=[1.0]), "`x` has type list"),
    (dict(x=X[:, :3]), "`x` has shape (3, 3) but `atoms` (5, 4)"),
    (dict(x=torch.tensor(1.0)), "`x` has shape ()"),
    (dict(x=torch.full((2, 4), torch.nan)), "`x` must be finite; the entry at (0, 0) is nan"),
    (dict(x=torch.full((2, 4), 3e38)), "`x` must be at most 1e+36; the entry at (0, 0) is 3"),
    (dict(x=X.numpy().astype(np.longdouble)), "`x` has dtype"),
    (dict(atoms=D[0]), "`atoms` has shape (4,): pass a dictionary (n_atoms, d)"),
    (dict(atoms=D * torch.tensor([1, 1, 2.31, 1, 1])[:, None]), "row 2 has norm 2.31. Normalise with `itda.normalize"),
    (dict(atoms=D * torch.nan), "row 0 has norm nan"),
    (dict(k=-1), "`k` is -1"),
    (dict(k=2.5), "`k` is 2.5: pass a whole number"),
    (dict(k=torch.eye(2)), "`k` is tensor([[1., 0.], [0., 1.]]): pass a whole number"),
    (dict(k=True), "`k` is True"),
    (dict(k=10**18), "pass a whole number of pursuit steps, 0 to 65,536"),
    (dict(method="lasso"), "`method` is 'lasso'; choose one of 'mp', 'omp', 'gp'"),
    (dict(tol=2.0), "`tol` is 2.0: pass a share of the energy between 0 and 1"),
    (dict(tol="0.1"), "`tol` is '0.1'"),
    (dict(max_gram_bytes="8GB"), "`max_gram_bytes` is '8GB': pass a number of bytes, 0 or more, or None"),
    (dict(max_gram_bytes=float("nan")), "`max_gram_bytes` is nan"),
    (dict(backend="tpu"), "`backend` is 'tpu'; choose one of"),
]


@pytest.mark.parametrize(("changed", "sentence"), BAD, ids=[s for _, s in BAD])
def test_bad_input(changed, sentence):
    from itda.pursuit import pursue

    # Past the type checker of the tests, as a user would call it.
    plain = getattr(pursue, "__wrapped__", pursue)
    while hasattr(plain, "__wrapped__"):
        plain = plain.__wrapped__
    with pytest.raises(itda.InputError) as error:
        plain(**({"x": X, "atoms": D, "k": 3} | changed))
    assert sentence in str(error.value)


def test_numpy_arrays_are_welcome():
    want = itda.pursue(X, D, 2)
    backwards = X.flip(0).numpy()[::-1]
    for x in (X.numpy(), backwards, np.asfortranarray(X.numpy()), X.numpy().astype(">f4")):
        assert torch.equal(itda.pursue(x, D.numpy(), 2).values, want.values)


def test_decode_wants_its_own_dictionary():
    with pytest.raises(itda.InputError, match="codes are over 5 atoms"):
        itda.pursue(X, D, 2).decode(D[:4])


@pytest.mark.parametrize("backend", ["cpu", "dense"])
def test_how_many_tokens_come_at_once_decides_no_close_choice(backend):
    # Products of matrices may add d terms in one chain, and each partial sum of these rounds the same way.
    d = 128
    x = torch.full((d,), 2.0**-12 * 0.998)
    x[0], x[-1] = 1 + 2**-10, 0.25
    second = x.clone()
    second[-1] = 0
    second = itda.normalize(second[None])[0]
    close = float(x.double() @ second.double()) - 20 * 2**-24
    angle = math.atan2(0.25, float(x[0])) + math.acos(close / math.hypot(float(x[0]), 0.25))
    first = torch.zeros(d)
    first[0], first[-1] = math.cos(angle), math.sin(angle)
    atoms = torch.cat([first[None], second[None], torch.eye(d)[1:40]])
    for tokens in (1, 16, 300):
        codes = itda.pursue(x.repeat(tokens, 1), atoms.clone(), 1, backend=backend)
        assert (codes.indices == 1).all()


def test_excluded_atoms_hide_no_others():
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        d, n = (int(torch.randint(*ends, (1,), generator=generator)) for ends in ((1, 5), (2, 9)))
        half = itda.normalize(torch.randn(n, d, generator=generator))
        atoms, x = torch.cat([half, -half]), torch.randn(30, d, generator=generator)
        want, found = (
            itda.pursue(x, atoms, 8, method="omp", nonneg=True, backend=backend).indices
            for backend in ("reference", "cpu")
        )
        assert torch.equal(want, found)


def test_an_atom_that_was_passed_over_hides_none_of_many_candidates():
    # Of x = (0, -0.2, 1) the first choice is of no use once the next two are there, and its negative depends on these.
    atoms = torch.eye(20)[2:]
    atoms[:4, :3] = torch.tensor([[0, 0.3, 0.954], [0.714, 0, 0.7], [-0.714, 0, 0.7], [0, -0.3, -0.954]])
    atoms[:4, 3:] = 0
    atoms, x = itda.normalize(atoms), torch.zeros(30, 20)
    x[:, :3], x[:, 10] = torch.tensor([0, -0.2, 1]), 3e-5
    for backend in ("reference", "dense", "cpu"):
        codes = itda.pursue(x, atoms, 8, method="omp", nonneg=True, backend=backend)
        assert codes.indices[0].tolist() == [1, 2, 8, 0, 0, 0, 0, 0]


def test_dependence_is_not_decided_by_rounding():
    """A support that nearly depends on itself leaves nothing of a Gram matrix to tell whether an atom does too."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        base = itda.normalize(torch.randn(20, 16, generator=generator))
        x = torch.randint(-2, 3, (60, 16), generator=generator).float()
    atoms = torch.cat([base, base, -base])
    want, found = (
        itda.pursue(x[10:16], atoms, 20, method="omp", nonneg=True, backend=backend) for backend in ("reference", "cpu")
    )
    assert torch.equal(want.indices, found.indices)
    torch.testing.assert_close(want.values, found.values, rtol=0, atol=1e-5)


def test_inference_mode_leaves_nothing_behind():
    x, atoms = torch.randn(50, 16), itda.normalize(torch.randn(100, 16))
    with torch.inference_mode():
        itda.pursue(x[:1], atoms, 4)
    again = itda.pursue(x, atoms, 4)
    assert torch.equal(again.indices, itda.pursue(x, atoms.clone(), 4).indices)


def test_more_steps_than_atoms_take_no_more_room():
    """Orthogonal pursuit takes an atom once, whatever the budget."""
    x, atoms = case(40, 12, 5)
    few, many = (itda.pursue(x, atoms, k, method="omp", backend="dense") for k in (5, 60_000))
    assert torch.equal(many.values[:, :5], few.values) and not many.values[:, 5:].any()
    assert many.indices.shape == (40, 60_000)


def test_arrays_that_may_not_be_written_to_are_read():
    x, atoms = (a.numpy() for a in case(4, 6, 8))
    want = itda.pursue(x, atoms, 3)
    x.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(itda.pursue(x, atoms, 3).values, want.values)
