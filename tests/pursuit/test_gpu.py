"""The Triton backend against torch and the reference, in Triton's interpreter; and that it compiles for a GPU.

With TRITON_INTERPRET=0 in the environment the same tests run on the GPU that is there.
"""

import os
import subprocess
import sys

import pytest
import torch

from tests.pursuit.test_pursuit import case, norms

pytest.importorskip("triton")

import itda
from itda.pursuit import dense, gpu, reference
from itda.pursuit.gram import Gram

SHAPES = [(2, 1, 1, 3), (3, 1, 4, 2), (2, 7, 5, 9), (3, 16, 100, 4), (2, 33, 150, 5)]
INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
BLOCK = 32 if INTERPRETED else 512  # a thread's 4 entries, for 4 warps
# Where rows and residuals stay, in several blocks if in memory.
FORMS = {
    "registers": {},
    "memory": dict(LONGEST=0, SPAN=BLOCK, DEEPEST=BLOCK // 2 if INTERPRETED else BLOCK),
    "row in memory": dict(LONGEST=0, SPAN=512),
    "residual in memory": dict(DEEPEST=512),
}


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    for name, value in FORMS[request.param].items():
        monkeypatch.setattr(gpu, name, value)


def both_forms(test):
    return pytest.mark.parametrize("form", ["registers", "memory"], indirect=True)(test)


def filled(atoms):
    gram = Gram(atoms.to(DEVICE))
    assert gram.complete or gram.fill()
    return gram


def steps(x, gram, *settings, module=gpu):
    return dense.Steps(*(a.cpu() for a in module.mp(x.to(DEVICE), gram, *settings)))


def agree(x, gram, k, nonneg=False, tol=0.0, exact=2):
    """The steps of `gpu`, which are those of `dense`, and of the reference for the first `exact` tokens."""
    got, want = steps(x, gram, k, nonneg, tol), steps(x, gram, k, nonneg, tol, module=dense)
    atoms = gram.atoms.cpu().double().numpy()
    for name in ("indices", "length"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    scale = norms(x).clamp_min(1e-300)
    for name, unit in [("coefficients", scale[:, None]), ("energy", scale**2), ("overlap", scale**2)]:
        have, due = getattr(got, name), getattr(want, name)
        assert have.dtype == torch.float64
        assert ((have - due).abs() <= 1e-10 * due.abs() + 1e-13 * unit).all(), name
    assert (got.settled <= got.length).all()
    for t in range(min(exact, len(x))):
        chosen, coefficients, _ = reference.mp(x[t].double().numpy(), atoms, k, nonneg, tol)
        assert got.indices[t].tolist() == chosen + [0] * (k - len(chosen))
        assert got.coefficients[t, : len(chosen)].tolist() == pytest.approx(coefficients, rel=1e-9, abs=0)
    return got


@pytest.mark.parametrize("kind", ["gauss", "mean", "ties", "planted"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("nonneg", [False, True])
@both_forms
def test_choices_are_those_of_the_reference(form, nonneg, shape, kind):
    tokens, d, n, k = shape
    x, atoms = case(tokens, d, n, kind)
    agree(x, filled(atoms), k, nonneg)


@pytest.mark.parametrize("nonneg", [False, True])
def test_every_form_makes_the_same_choices(form, nonneg):
    x, atoms = case(2, 600, 1100)
    agree(x, filled(atoms), 3, nonneg)


def test_public_door(monkeypatch):
    """As `itda.pursue` calls it, codes of the reference come out."""
    x, atoms = case(4, 16, 70, "mean")
    want = itda.pursue(x, atoms, 6, backend="reference")
    monkeypatch.setattr(itda.pursuit, "_encoder", lambda x, gram, *_: (gram.fill(), ("dense", gpu.mp))[1])
    got = itda.pursue(x.to(DEVICE), atoms.to(DEVICE), 6)
    assert torch.equal(got.indices.cpu(), want.indices)
    torch.testing.assert_close(got.values.cpu(), want.values)


@both_forms
def test_zero_vectors_and_nothing_to_do(form):
    x, atoms = case(3, 8, 20)
    x[1] = 0
    assert agree(x, filled(atoms), 3).length.tolist() == [3, 0, 3]
    assert agree(x, filled(atoms), 0).indices.shape == (3, 0)
    assert agree(x[:0], filled(atoms), 3).indices.shape == (0, 3)
    assert agree(x, filled(atoms[:0]), 3).length.tolist() == [0, 0, 0]


@both_forms
@pytest.mark.parametrize("nonneg", [False, True])
def test_tol_stops_early(form, nonneg):
    x, atoms = case(5, 16, 60)
    full = steps(x, filled(atoms), 10, nonneg)
    got = agree(x, filled(atoms), 10, nonneg, tol=0.3)
    assert (got.length < full.length).any()
    assert (got.energy <= 0.3 * norms(x) ** 2)[got.length < full.length].all()
    assert agree(x, filled(atoms), 10, nonneg, tol=1.0).length.max() == 0


def test_tol_is_met_in_float64():
    """After one step 0.9 of the energy is left; 0.9 in float32 is less."""
    assert agree(torch.ones(1, 10), filled(torch.eye(10)), 3, tol=0.9).length.tolist() == [1]


@both_forms
def test_close_choices_are_settled_in_float64(form):
    """Atoms that float32 cannot tell apart: the reference's choice, where the float32 maximum is often another."""
    g = torch.Generator().manual_seed(3)
    base = itda.normalize(torch.randn(1, 96, generator=g))
    atoms = itda.normalize(base + 1e-7 * torch.randn(25, 96, generator=g))
    x = base + 0.3 * torch.randn(5, 96, generator=g)
    got = agree(x, filled(atoms), 1, exact=5)
    assert (got.settled == 1).all()
    assert not torch.equal((x @ atoms.T).abs().argmax(1), got.indices[:, 0])


@both_forms
@pytest.mark.parametrize("later", [515, 570])
def test_close_choices_that_stand_far_apart(form, later):
    """Twins that float32 cannot tell apart, in one lane of two blocks or in two: now the earlier is better, now not."""
    _, atoms = case(0, 16, 600)
    g = torch.Generator().manual_seed(6)
    atoms[later : later + 6] = itda.normalize(atoms[3:9] + 5e-6 * torch.randn(6, 16, generator=g))
    got = agree(atoms[later : later + 6], filled(atoms), 1, exact=6)
    assert 0 < int((got.indices >= later).sum()) < 6
    assert (got.settled == 1).all()


@both_forms
def test_ties_go_to_the_lowest_index(form):
    """Sums of the same numbers in another order, which differ in their last bits."""
    g = torch.Generator().manual_seed(11)
    entries = torch.randn(33, generator=g).mul(4).exp()
    atoms = itda.normalize(torch.stack([entries[torch.randperm(33, generator=g)] for _ in range(20)]))
    assert agree(torch.full((1, 33), 0.1), filled(atoms), 1).indices.tolist() == [[0]]


@both_forms
def test_atoms_that_are_nearly_alike(form):
    """Atoms of cosine 0.9999, and activations along them: the Gram table tells the next choices apart no better."""
    g = torch.Generator().manual_seed(4)
    base, noise = torch.randn(1, 48, generator=g), torch.randn(80, 48, generator=g)
    atoms = itda.normalize(itda.normalize(base) + 0.01 * itda.normalize(noise))
    assert 0.9997 < float((atoms @ atoms.T).min()) < 0.9999
    got = agree(60 * base + torch.randn(3, 48, generator=g), filled(atoms), 5, exact=3)
    assert got.settled.sum() > 0


@both_forms
@pytest.mark.parametrize("many", [0, 3, 256])
def test_new_correlations_change_nothing(form, many, monkeypatch):
    """Tokens close to an atom, whose residuals drown in the error of their first correlations; and one that ends."""
    g = torch.Generator().manual_seed(5)
    _, atoms = case(0, 24, 70)
    noise = torch.tensor([1e-2, 1e-3, 1e-4, 1e-6])[:, None] * torch.randn(4, 24, generator=g)
    launches, go_on = [], gpu.go_on
    monkeypatch.setattr(gpu, "MANY", many)
    monkeypatch.setattr(gpu, "go_on", lambda todo, *rest: (launches.append(todo.tolist()), go_on(todo, *rest))[1])
    got = agree(3 * atoms[:4] + noise, filled(atoms), 5, exact=4)
    assert launches[0] == [0, 1, 2, 3]
    assert (len(launches) > 1) == (many < 256)
    assert got.length[3] == 1 and all(3 not in todo for todo in launches[1:])


def test_many_comparisons_before_the_first_step():
    """New correlations would not help a token that has had none: more equal atoms than `MANY`."""
    x, atoms = case(1, 4, 1)
    assert agree(x, filled(atoms.repeat(gpu.MANY + 10, 1)), 1).indices.tolist() == [[0]]


@both_forms
def test_rows_of_the_table_in_any_order(form):
    x, atoms = case(4, 16, 100, "mean")
    gram = Gram(atoms.to(DEVICE))
    gram.need(torch.arange(60, 90, device=DEVICE))
    assert gram.fill()
    assert gram.slot.tolist() != list(range(100))
    agree(x, gram, 6)


@both_forms
def test_a_table_with_room_for_more(form):
    x, atoms = case(3, 16, 70)
    gram = Gram(atoms[:10].to(DEVICE))
    for atom in atoms[10:].to(DEVICE):
        gram.append(atom)
    assert gram.table.shape[1] > 128 and gram.fill()
    agree(x, gram, 5)


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e30])
def test_choices_at_the_ends_of_float32(scale):
    x, atoms = case(2, 16, 40)
    agree(x * scale, filled(atoms), 4)


def test_activations_of_any_strides():
    x, atoms = case(6, 16, 40)
    want = steps(x, filled(atoms), 4)
    for strided in (x.T.contiguous().T, x.repeat(1, 2)[:, :16]):
        assert not strided.is_contiguous()
        assert torch.equal(steps(strided, filled(atoms), 4).coefficients, want.coefficients)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from itda.pursuit import gpu

kinds = dict(corr="fp32", residual="fp64", limits="fp64", atoms="fp32", table="i16", coefficients="fp64", waiting="i32")
pointers = "todo corr residual limits atoms table slot indices coefficients length settled waiting".split()
kernel = gpu.mp_kernel
for width, d, nonneg, architecture in [(16384, 1024, False, 90), (65536, 8192, True, 80)]:
    options = gpu.form(width, d, nonneg)
    chosen = {name: options.pop(name) for name in list(options) if name in kernel.arg_names}
    types = {name: "constexpr" if name in chosen else "i32" for name in kernel.arg_names}
    types |= {name: "*" + kinds.get(name, "i64") for name in pointers}
    aligned = [*pointers, "d", "width", "columns"]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    values = {(kernel.arg_names.index(name),): value for name, value in chosen.items()}
    source = triton.compiler.ASTSource(kernel, types, values, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    print(chosen["KEPT"], chosen["HELD"], *sorted(compiled.asm))
"""


def test_compiles_for_a_gpu(tmp_path):
    """To machine code, with the assembler that comes with Triton; no GPU is needed."""
    environment = dict(os.environ, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    out = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    stages = "cubin llir ptx source ttgir ttir"
    assert out.stdout.splitlines() == [f"True True {stages}", f"False False {stages}"]
