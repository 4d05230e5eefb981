"""What `speed.py` compares: the data, the systems, and the check that they compute the same before they are timed.

Every system encodes (tokens, d) with prepared atoms (n, d) and returns codes in its own form. Each is compared with the
algorithm written plainly below, in float64: `algorithm2`, `plain_omp`, `plain_gp`.
"""

import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from itda import Codes, normalize, pursue
from itda.models.hooked_model import HookedModel
from itda.models.loading import load_model
from itda.models.pretrained import Layout

SEEDS = dict(world=0, atoms=1, tokens=2, mixture=3, checked=4, large=5, stream=1000, model=0)
FEATURES = 1024  # directions that the synthetic activations are made of
NEAR_TIE = 1e-5  # the two largest correlations differ by less than this share of the larger
VALUES = 1e-4  # what codes, and reconstruction errors, may differ by, relative
SHARE = 0.99  # of the tokens on which another library must choose the same atoms


@dataclass(frozen=True)
class Case:
    """One setting: n atoms and tokens in d dimensions, k steps of a method, on a device with so many threads.

    Non-negative pursuit is compared on centred activations: with a mean that all atoms share, it ends after few steps.
    """

    d: int
    n: int
    k: int = 40
    method: str = "mp"
    threads: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    nonneg: bool = False

    def atoms(self) -> torch.Tensor:
        """The dictionary (n, d): activations scaled to unit norm."""
        out = activations(self.n, self.d, SEEDS["atoms"], centred=self.nonneg)
        for part in out.split(4096):
            part.copy_(normalize(part))
        return out.to(self.device, getattr(torch, self.dtype))

    def tokens(self, count: int, seed: int = SEEDS["tokens"]) -> torch.Tensor:
        """Activations (count, d) to encode, from the same distribution as the atoms."""
        return activations(count, self.d, seed, self.nonneg).to(self.device, getattr(torch, self.dtype))


def activations(count: int, d: int, seed: int, centred: bool = False) -> torch.Tensor:
    """Synthetic activations (count, d): a heavy shared mean, about 30 of 1024 features with heavy tails, and noise.

    Mean, features and noise have norms of about 3, 2 and 0.5. Mean and features are the same for every `seed`;
    `centred` takes the mean away.
    """
    world, drawn = torch.Generator().manual_seed(SEEDS["world"]), torch.Generator().manual_seed(seed)
    mean = torch.randn(d, generator=world) * (0 if centred else 3 / d**0.5)
    features = torch.randn(FEATURES, d, generator=world) * (0.25 / d**0.5)
    out = torch.empty(count, d)
    for part in out.split(4096):
        weights = -torch.rand(len(part), FEATURES, generator=drawn).clamp_min(1e-6).log()  # exponential
        weights *= torch.rand(len(part), FEATURES, generator=drawn) < 30 / FEATURES
        noise = torch.randn(len(part), d, generator=drawn) * (0.5 / d**0.5)
        part.copy_(mean + (weights - centred * 30 / FEATURES) @ features + noise)
    return out


@cache
def mixture_parts(d, topics=40_000):
    """What `mixture` draws from: log shares of the topics, their centres, 256 directions, and a mean."""
    world = torch.Generator().manual_seed(SEEDS["mixture"])
    centres = torch.randn(topics, 64, generator=world) @ torch.randn(64, d, generator=world) / 8
    return (
        1 / torch.arange(1, topics + 1),
        centres,
        torch.randn(256, d, generator=world),
        torch.randn(d, generator=world),
    )


def mixture(count, d, seed):
    """Activations (count, d) of a stream: topics whose frequencies fall as 1/rank, so that new ones keep coming."""
    shares, centres, directions, mean = mixture_parts(d)
    drawn = torch.Generator().manual_seed(SEEDS["stream"] + seed)
    topic = torch.multinomial(shares, count, True, generator=drawn)
    weights = torch.randn(count, 256, generator=drawn) * (torch.rand(count, 256, generator=drawn) < 0.05)
    return centres[topic] + 0.2 * weights @ directions + 0.7 * mean + 0.15 * torch.randn(count, d, generator=drawn)


def random_model(device, quick):
    """A GPT-2 of random weights, read after its eighth block, and rows of ids with frequencies that fall as 1/rank."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=8, n_embd=128, n_head=4) if quick else GPT2Config()
    torch.manual_seed(SEEDS["model"])
    module = GPT2LMHeadModel(config).to(device).eval()
    model = HookedModel(module, module.base_model, None, Layout.of(module.base_model, "gpt2"), ["transformer.h.7"])
    shares = 1 / torch.arange(1, config.vocab_size + 1)
    return model, torch.multinomial(shares, rows_of(quick) * 128, True).reshape(-1, 128)


def real_model(folder, device, quick):
    """A trained model, read after its fourth block, and rows of ids of the text beside it."""
    model = load_model(folder, hooks=3, device=device, dtype=torch.float32)
    text = (folder.parents[1] / "wikitext2_valid.txt").read_text()[: rows_of(quick) * 128 * 8]
    ids = torch.tensor(model.tokenizer(text, verbose=False)["input_ids"])
    return model, ids[: len(ids) // 128 * 128].reshape(-1, 128)[: rows_of(quick)]


def rows_of(quick):
    """How many rows of 128 tokens a language model reads."""
    return 64 if quick else 1024


# The algorithms as they are printed.


def algorithm2(x, atoms, k, nonneg=False, gaps=None):
    """Matching pursuit, Algorithm 2 of the paper: all correlations at every step. Atoms and coefficients, (tokens, k).

    Into `gaps`, a list, goes the relative difference of the two largest correlations at every step.
    """
    residual, indices, values = x.clone(), [], []
    for _ in range(k):
        corr = residual @ atoms.T
        size = corr if nonneg else corr.abs()
        j = size.argmax(1)
        c = corr.gather(1, j[:, None])
        residual -= c * atoms[j]
        indices.append(j)
        values.append(c[:, 0])
        if gaps is not None:
            gaps.append(relative_gap(size))
    return torch.stack(indices, 1), torch.stack(values, 1)


def plain_omp(x, atoms, k, nonneg=False, gaps=None, recursive=False):
    """Orthogonal matching pursuit: at every step the coefficients are the least squares fit on the atoms chosen.

    `recursive` chooses the atom whose fit leaves the smallest residual (ORMP, or orthogonal least squares): that of the
    largest |<r, d>| / |d - P d|, P the projection on the span of the atoms chosen.
    """
    residual, chosen = x, x.new_zeros(len(x), len(atoms), dtype=torch.bool)
    rest = x.new_ones(len(x), len(atoms))  # |d - P d|^2
    support = torch.zeros(len(x), 0, dtype=torch.long, device=x.device)
    for _ in range(k):
        size = (residual @ atoms.T).abs().masked_fill(chosen, 0.0)
        if recursive:
            size /= rest.clamp_min(1e-12).sqrt()
        gaps.append(relative_gap(size))
        j = size.argmax(1, keepdim=True)
        support = torch.cat([support, j], 1)
        chosen.scatter_(1, j, True)
        basis = atoms[support].mT  # (tokens, d, step)
        fit = torch.linalg.lstsq(basis, x[:, :, None]).solution
        before, residual = residual, x - (basis @ fit)[:, :, 0]
        new = torch.nn.functional.normalize(before - residual, dim=1)  # the direction that this step added to the span
        rest -= (new @ atoms.T).square()
    return support, fit[:, :, 0]


def plain_ormp(x, atoms, k, nonneg=False, gaps=None):
    """Order-recursive matching pursuit."""
    return plain_omp(x, atoms, k, gaps=gaps, recursive=True)


def plain_gp(x, atoms, k, nonneg=False, gaps=None):
    """Gradient pursuit (Blumensath & Davies 2008): one exact line search on the support at every step."""
    codes, support = x.new_zeros(len(x), len(atoms)), x.new_zeros(len(x), len(atoms))
    residual = x
    for _ in range(k):
        corr = residual @ atoms.T
        gaps.append(relative_gap(corr.abs()))
        support.scatter_(1, corr.abs().argmax(1, keepdim=True), 1.0)
        gradient = corr * support
        direction = gradient @ atoms
        step = (residual * direction).sum(1, keepdim=True) / direction.square().sum(1, keepdim=True)
        codes += step * gradient
        residual = x - codes @ atoms
    places = torch.arange(len(atoms), device=x.device).expand(len(x), -1)
    return places, codes


def relative_gap(size):
    """How much larger the largest entry of a row is than the second, relative to it."""
    best = size.topk(min(2, size.shape[1]), dim=1).values
    return (best[:, 0] - best[:, -1]) / best[:, 0]


PLAIN = {"mp": algorithm2, "omp": plain_omp, "ormp": plain_ormp, "gp": plain_gp}


# The systems. `prepare(atoms, case)` does what is done once per dictionary and returns the encoder that is timed.


@dataclass(frozen=True)
class System:
    """An encoder to compare; `slow` ones are timed on fewer tokens, and only `ours` must agree on every token."""

    name: str
    prepare: Callable
    methods: tuple = ("mp",)
    devices: tuple = ("cpu", "cuda")
    signs: tuple = (False,)
    slow: bool = True
    ours: bool = False
    dtypes: tuple = ("float32",)
    computes: str = ""  # if it is another algorithm than the method it is compared on

    def does(self, case: Case) -> bool:
        """Whether this is a system for such a case."""
        return case.method in self.methods and case.nonneg in self.signs and case.dtype in self.dtypes


def itda_with(backend: str | None):
    """`itda.pursue`, which keeps the Gram matrix of the atoms between calls; None is the fastest of the device."""

    def prepare(atoms, case):
        kernels = {"cpu": "cpu", "cuda": "gpu" if case.method == "mp" else "auto"}[case.device]
        settings = dict(method=case.method, nonneg=case.nonneg, backend=backend or kernels)
        return lambda x: pursue(x, atoms, case.k, **settings)

    return prepare


def prepare_algorithm2(atoms, case):
    """Algorithm 2 in torch, in float32 whatever comes."""
    full = atoms.float()
    return lambda x: torch_codes(algorithm2(x.float(), full, case.k), case.n)


def prepare_saelens(atoms, case):
    """SAELens' matching pursuit, non-negative; its two ways of stopping early are off."""
    from sae_lens.saes.matching_pursuit_sae import MatchingPursuitSAE, MatchingPursuitSAEConfig

    stops = dict(max_iterations=case.k, residual_threshold=0.0, stop_on_duplicate_support=False)
    config = MatchingPursuitSAEConfig(case.d, case.n, device=case.device, apply_b_dec_to_input=False, **stops)
    sae = MatchingPursuitSAE(config)
    sae.W_dec.data = atoms
    return sae.encode


def prepare_overcomplete(atoms, case):
    """Overcomplete's matching pursuit, which takes the largest correlation, as non-negative pursuit does.

    The package's `__init__` fails without torchvision and with matplotlib 3.9 or newer. Encoding needs neither, so it
    is passed over.
    """
    if "overcomplete" not in sys.modules:
        spec = importlib.util.find_spec("overcomplete")
        if spec is None:
            raise ImportError("No module named 'overcomplete'")
        package = types.ModuleType("overcomplete")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["overcomplete"] = package
    from overcomplete.sae.mp_sae import MpSAE

    settings = dict(normalization="identity", initializer=atoms)
    sae = MpSAE(case.d, case.n, k=case.k, dictionary_params=settings, device=case.device).eval()
    return lambda x: sae.encode(x)[1]


def prepare_spams(atoms, case):
    """SPAMS' `omp` (C++), which is order-recursive. It makes its Gram matrix anew in every call.

    Without `eps` it may return no codes at all.
    """
    import spams

    columns = np.asfortranarray(atoms.numpy().T)
    return lambda x: spams.omp(np.asfortranarray(x.numpy().T), columns, L=case.k, eps=0.0, numThreads=case.threads)


def prepare_run_omp(atoms, case):
    """`run_omp` without the centring and scaling it does by default. It makes its Gram matrix anew in every call."""
    from orthogonal_matching_pursuit_gpu import run_omp

    columns = atoms.T
    return lambda x: run_omp(columns, x, case.k, normalize=False, fit_intercept=False)


def prepare_sklearn(atoms, case):
    """scikit-learn's `orthogonal_mp_gram`, its Gram matrix made once."""
    from sklearn.linear_model import orthogonal_mp_gram

    table, matrix = atoms.numpy(), (atoms @ atoms.T).numpy()
    return lambda x: orthogonal_mp_gram(matrix, table @ x.numpy().T, n_nonzero_coefs=case.k)


BOTH = ("float32", "bfloat16")
SYSTEMS = (
    System("itda", itda_with(None), ("mp", "omp", "gp"), signs=(False, True), slow=False, ours=True, dtypes=BOTH),
    System("itda, dense backend", itda_with("dense"), ours=True, dtypes=BOTH),
    System("Algorithm 2 in torch", prepare_algorithm2, dtypes=BOTH),
    System("SAELens MatchingPursuitSAE", prepare_saelens, signs=(True,)),
    System("overcomplete MpSAE", prepare_overcomplete, signs=(True,)),
    System("SPAMS omp (which is ORMP)", prepare_spams, ("omp",), ("cpu",), slow=False, computes="ormp"),
    System("orthogonal-matching-pursuit-gpu run_omp", prepare_run_omp, ("omp",)),
    System("scikit-learn orthogonal_mp_gram", prepare_sklearn, ("omp",), ("cpu",)),
)


# Agreement.


def torch_codes(steps, n):
    """Steps (indices, values) as dense codes (tokens, n)."""
    indices, values = steps
    return values.new_zeros(len(values), n).scatter_add_(1, indices, values)


def dense(output, device):
    """Codes in any system's form as (tokens, n) in float64."""
    if isinstance(output, Codes):
        output = output.dense()
    elif not isinstance(output, torch.Tensor):  # SPAMS gives a SciPy matrix, scikit-learn an array, a column a token
        output = torch.from_numpy(np.asarray(output.toarray() if hasattr(output, "toarray") else output).T.copy())
    return output.detach().to(device).double()


@dataclass
class Truth:
    """Codes in float64 by the plain algorithm, and which tokens met a near tie."""

    x: torch.Tensor
    atoms: torch.Tensor
    codes: torch.Tensor
    near: torch.Tensor

    @classmethod
    def of(cls, x, atoms, method, k, nonneg):
        """The truth for tokens `x`."""
        exact, table, gaps = x.double(), atoms.double(), []
        steps = PLAIN[method](exact, table, k, nonneg=nonneg, gaps=gaps)
        near = (torch.stack(gaps, 1) < NEAR_TIE).any(1)
        return cls(exact, table, torch_codes(steps, len(atoms)), near)

    def errors(self, codes):
        """Relative reconstruction error |x - x_hat|^2 / |x|^2 of every token."""
        return (self.x - codes @ self.atoms).square().sum(1) / self.x.square().sum(1)

    def agreement(self, output, ours, values=True):
        """On how many tokens a system chose the same atoms, with the same `values`; `AssertionError` if too few.

        Ours must on every token that met no near tie; for the others `SHARE` of the tokens will do. Where the atoms are
        the same, so are the reconstruction errors.
        """
        codes = dense(output, self.x.device)
        same = ((codes != 0) == (self.codes != 0)).all(1)
        apart = (self.errors(codes) / self.errors(self.codes) - 1).abs()[same]
        if values:
            same &= ((codes - self.codes).abs() <= VALUES * self.codes.abs().amax(1, keepdim=True)).all(1)
        found = dict(checked=len(same), same=int(same.sum()), near_ties=int(self.near.sum()))
        found["different_without_tie"] = int((~same & ~self.near).sum())
        found["error_apart"] = float(apart.max()) if len(apart) else 0.0
        allowed = 0 if ours else (1 - SHARE) * len(same)
        assert found["different_without_tie"] <= allowed, f"disagrees with the plain algorithm: {found}"
        assert found["error_apart"] <= VALUES, f"reconstructions differ from those of the plain algorithm: {found}"
        return found
