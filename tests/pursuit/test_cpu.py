"""The numba backend beside its laws: threads, processes, drift, what it keeps, and life without numba."""

import gc
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import itda
from itda import pursuit
from itda.pursuit import cpu, dense, reference
from itda.pursuit.gram import Gram
from tests.pursuit.test_pursuit import case


def close_atoms(n=400, d=64, seed=0):
    """Atoms of cosine 0.9999 to each other."""
    g = torch.Generator().manual_seed(seed)
    return itda.normalize(torch.randn(1, d, generator=g) / d**0.5 + 0.01 * torch.randn(n, d, generator=g) / d**0.5)


@pytest.mark.parametrize("method", ["mp", "omp", "gp"])
def test_correlations_do_not_drift(method):
    """Five hundred steps, over atoms that float32 hardly tells apart: the reference's choices to the last."""
    atoms = close_atoms()
    cosines = atoms @ atoms.T
    assert cosines.min() > 0.9997
    x, _ = case(4, 64, 0)
    k = 512 if method == "mp" else 40
    want = itda.pursue(x, atoms, k, method=method, backend="reference")
    got = itda.pursue(x, atoms, k, method=method, backend="cpu")
    assert torch.equal(got.indices, want.indices)
    torch.testing.assert_close(got.values, want.values, rtol=1e-4, atol=1e-5)


def test_many_steps():
    x, atoms = case(6, 128, 900, "mean")
    want = [reference.mp(row, atoms.double().numpy(), 512)[0] for row in x.double().numpy()]
    steps = cpu.mp(x, Gram(atoms), 512)
    assert steps.indices.tolist() == want


def test_correlations_are_computed_anew_when_that_is_cheaper():
    """After hundreds of steps the bound is so wide that most choices are close; a product narrows it again."""
    x, atoms = case(20, 64, 300)
    gram = Gram(atoms)
    gram.fill()
    drifting, renewed = dense.mp(x, gram, 600), cpu.mp(x, gram, 600)
    assert torch.equal(drifting.indices, renewed.indices)
    assert renewed.settled.sum() < 0.5 * drifting.settled.sum()


@pytest.mark.parametrize("method", ["mp", "omp", "gp"])
def test_threads_change_nothing(method):
    x, atoms = case(101, 32, 300, "mean")
    before = torch.get_num_threads()
    want = itda.pursue(x, atoms, 12, method=method, backend="cpu")
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            got = itda.pursue(x, atoms, 12, method=method, backend="cpu")
            assert torch.equal(got.indices, want.indices)
            assert torch.equal(got.values, want.values)
    finally:
        torch.set_num_threads(before)


def test_as_many_threads_as_torch_uses(monkeypatch):
    made = []
    pool = cpu.ThreadPoolExecutor
    monkeypatch.setattr(cpu, "ThreadPoolExecutor", lambda threads, name: made.append(threads) or pool(threads, name))
    monkeypatch.setattr(cpu, "_pools", {})
    x, atoms = case(50, 8, 20)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3, 3, 2):
            torch.set_num_threads(threads)
            itda.pursue(x, atoms, 3, backend="cpu")
    finally:
        torch.set_num_threads(before)
    assert made == [3, 2]


def _worker(inputs):
    x, atoms = (torch.tensor(a) for a in inputs)
    return itda.pursue(x, atoms, 5, backend="cpu").values.tolist()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_in_worker_processes(method):
    """After the parent has used its threads, of which a forked child has none."""
    x, atoms = case(64, 16, 100)
    want = itda.pursue(x, atoms, 5, backend="cpu").values.tolist()
    with multiprocessing.get_context(method).Pool(2) as pool:
        results = pool.map_async(_worker, [(x.tolist(), atoms.tolist())] * 3).get(timeout=120)
    assert results == [want] * 3


def test_the_gram_matrix_is_kept_as_long_as_the_atoms(monkeypatch):
    made = []
    allocate = Gram._allocate
    monkeypatch.setattr(Gram, "_allocate", lambda *args: made.append(1) or allocate(*args))
    x, atoms = case(30, 16, 40)
    want = itda.pursue(x, atoms, 4)
    assert torch.equal(itda.pursue(x, atoms, 4).values, want.values)
    assert len(made) == 1
    atoms[0], atoms[1] = atoms[1].clone(), atoms[0].clone()  # in place: the same object is another dictionary
    swapped = itda.pursue(x, atoms, 4)
    assert len(made) == 2
    assert torch.equal(swapped.decode(atoms), want.decode(atoms[[1, 0, *range(2, 40)]]))
    itda.pursue(x, atoms, 4, max_gram_bytes=1e4)
    assert len(made) == 3
    kept = len(pursuit._kept)
    del atoms
    gc.collect()
    assert len(pursuit._kept) == kept - 1
    many = [case(1, 16, 40, seed=i)[1] for i in range(2 * pursuit.KEPT)]
    for atoms in many:
        itda.pursue(x, atoms, 4)
    assert len(pursuit._kept) == pursuit.KEPT


def test_callers_in_several_threads():
    """They share the rows of one Gram matrix, which come and go."""
    x, atoms = case(400, 16, 500, "mean")
    want = itda.pursue(x, atoms, 9, backend="cpu")
    with ThreadPoolExecutor(4) as pool:
        parts = pool.map(lambda part: itda.pursue(part, atoms, 9, max_gram_bytes=2 * 512 * 20), x.split(20))
        assert torch.equal(torch.cat([codes.indices for codes in parts]), want.indices)


def test_limits_of_memory_change_nothing():
    x, atoms = case(200, 16, 500, "mean")
    want = itda.pursue(x, atoms, 9, backend="cpu")
    for size in (0, 2 * 512 * 16, 2 * 512 * 40, 2 * 512 * 499, 1e9):
        got = itda.pursue(x, atoms, 9, backend="cpu", max_gram_bytes=size)
        assert torch.equal(got.indices, want.indices)
        torch.testing.assert_close(got.values, want.values)


WITHOUT_NUMBA = """
import sys, warnings
sys.modules["numba"] = None
import torch, itda
x, atoms = torch.eye(3)[:2] + 0.5, torch.eye(3)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    values = [itda.pursue(x, atoms, 2).values.tolist() for _ in range(3)]
    try:
        itda.pursue(x, atoms, 2, backend="cpu")
    except itda.InputError as error:
        print(error)
print([str(warning.message) for warning in said])
print(values[0])
"""


def test_without_numba():
    out = subprocess.run([sys.executable, "-c", WITHOUT_NUMBA], capture_output=True, text=True, check=True).stdout
    sentence, said, values = out.splitlines()
    assert sentence == "`backend` 'cpu' needs numba, which cannot be imported: install numba."
    assert said.count("pursuit runs in plain torch, with the same results but slower") == 1
    assert values == str(itda.pursue(torch.eye(3)[:2] + 0.5, torch.eye(3), 2).values.tolist())


@pytest.mark.parametrize("place", ["/proc/1/nowhere", "file"])
def test_where_no_cache_can_be_written(place, tmp_path):
    if place == "file":
        place = tmp_path / "file"
        place.write_text("not a folder")
    code = "import torch, itda; print(itda.pursue(torch.eye(3), torch.eye(3), 2, backend='cpu').l0().tolist())"
    env = os.environ | {"NUMBA_CACHE_DIR": str(place)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert out.stdout.strip() == "[1, 1, 1]", out.stderr


@pytest.mark.parametrize("setting", ["autocast", "default dtype", "tf32 allowed"])
def test_settings_of_the_caller_change_nothing(setting):
    x, atoms = case(60, 32, 200)
    for method in ("mp", "omp"):
        want = itda.pursue(x, atoms.clone(), 9, method=method)
        given = atoms.clone()
        try:
            if setting == "default dtype":
                torch.set_default_dtype(torch.float64)
            if setting == "tf32 allowed":
                torch.set_float32_matmul_precision("medium")
            with torch.autocast("cpu", torch.bfloat16, enabled=setting == "autocast"):
                got = [itda.pursue(x, given, 9, method=method, backend=backend) for backend in ("cpu", "dense")]
                built = itda.build(x, k=5, threshold=0.3)
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_float32_matmul_precision("highest")
        for codes in [*got, itda.pursue(x, given, 9, method=method)]:
            assert torch.equal(codes.indices, want.indices)
            torch.testing.assert_close(codes.values, want.values)
        assert torch.equal(built.atoms, itda.build(x, k=5, threshold=0.3).atoms)


def test_a_support_that_nearly_depends_goes_on():
    """Coefficients of 1e4 that cancel: the energy that is left is not lost in their rounding."""
    unit = torch.eye(4)
    atoms = itda.normalize(torch.stack([unit[0], unit[0] + 1e-4 * unit[1], unit[2]]))
    x = unit[0] + unit[1] + 3e-5 * unit[2]
    want = itda.pursue(x, atoms, 3, method="omp", backend="reference")
    got = itda.pursue(x.repeat(9, 1), atoms, 3, method="omp", backend="cpu")
    assert want.l0() == 3
    assert torch.equal(got.indices[0], want.indices)


def test_bad_backends():
    x, atoms = case(3, 4, 5)
    with pytest.raises(itda.InputError, match="`backend` is 'gpu' but `x` is on cpu: move it, or leave `backend` out"):
        itda.pursue(x, atoms, 2, backend="gpu")
    with pytest.raises(itda.InputError, match="computes in float32"):
        itda.pursue(x.double(), atoms.double(), 2, backend="cpu")


def test_damaged_compiled_kernels_are_compiled_again(tmp_path):
    code = "import torch, itda; print(itda.pursue(torch.eye(3), torch.eye(3), 2).indices[:, 0].tolist())"

    def run():
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.stdout == "[0, 1, 2]\n", done.stderr

    run()
    files = [path for path in tmp_path.rglob("*") if path.suffix in (".nbi", ".nbc")]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[:7])
    run()
