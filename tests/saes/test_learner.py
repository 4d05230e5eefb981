"""The gradients of a batch, which are written out, against automatic ones of the loss as it is defined."""

import math

import numpy as np
import pytest
import torch

from itda import pursuit
from itda.pursuit import cpu_sparse
from itda.saes import activations, learner
from itda.saes.learner import AUX, Aim, Learner
from itda.saes.top_afa import top_afa

TOKENS, D, N, K = 50, 12, 64, 3
KINDS = ("topk", "batchtopk", "relu", "top-afa", "mp")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(kind, dead=()):
    """An SAE some way into its training, of which some latents count as dead."""
    out = Learner(Aim(kind, N, 1000, None if kind == "top-afa" else K, 1 / 16, 0.3 if kind == "relu" else None),
                  pursuit.normalize(random(N, D)), random(D, seed=1))  # fmt: skip
    if kind != "mp":
        out.W_enc += 0.1 * random(N, D, seed=2)
        out.b_enc += 0.1 * random(N, seed=3) - (0.5 if kind == "relu" else 0)
    out.idle[list(dead)] = 5000
    return out


def chosen(kind, pre, xc):
    if kind == "topk":
        return activations.topk(pre, K)
    if kind == "batchtopk":
        return activations.batchtopk(pre, K)
    return pre.relu() if kind == "relu" else top_afa(pre.relu(), xc.detach().norm(dim=1))


def loss_of(one, x, weights, dead):
    """The loss, as it is defined, of weights that have gradients."""
    kind, W_dec, b_dec = one.aim.kind, weights["W_dec"], weights["b_dec"]
    xc = x - b_dec
    if kind == "mp":
        rest = xc
        for _ in range(K):
            j = (rest.detach() @ W_dec.detach().T).argmax(1)
            rest = rest - (rest * W_dec[j]).sum(1, keepdim=True) * W_dec[j]
        x_hat, pre, read = x - rest, rest.detach() @ W_dec[dead].T, None
        more = 0.0
    else:
        read = xc @ weights["W_enc"].T + weights["b_enc"]
        acts = chosen(kind, read, xc)
        x_hat, more = acts @ W_dec + b_dec, 0.0
        if kind == "relu":
            more = 0.5 * one.l1 * acts.sum(1).mean() / math.sqrt(D)
        if kind == "top-afa":
            more = one.aim.afa * (acts.norm(dim=1) - xc.detach().norm(dim=1)).square().mean()
        if len(dead):
            pre = (xc.detach() @ weights["W_enc"].T + weights["b_enc"])[:, dead]
    if len(dead) and kind != "relu":
        values, at = pre.topk(min(len(dead), D // 2), dim=1)
        acts = torch.zeros_like(pre).scatter(1, at, values.relu())
        more = more + AUX * (acts @ W_dec[dead] - (x - x_hat).detach()).square().mean()
    return (x_hat - x).square().mean() + more, (x_hat - x).square().mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparse", [True, False], ids=["sums", "products"])
def test_gradients_are_those_of_the_loss(kind, sparse, monkeypatch):
    monkeypatch.setattr(learner, "SPARSE", 1.0 if sparse else -1.0)
    if kind == "mp" and not sparse:
        monkeypatch.setattr(cpu_sparse, "unrolled", learner.unrolled)
    x = 2 * random(TOKENS, D, seed=5)
    probe = made(kind)
    probe.backward(x, 0.5)
    dead = [] if kind == "relu" else (probe.idle > 0).nonzero()[:5, 0].tolist()  # those that this batch does not use
    assert kind in ("relu", "top-afa") or dead
    one = made(kind, dead)
    weights = {name: tensor.double().requires_grad_() for name, tensor in one.parameters.items()}
    loss, error = loss_of(one, x.double(), weights, dead)
    loss.backward()
    found = one.backward(x, 0.5)
    assert found.loss == pytest.approx(loss.item(), rel=1e-5) and found.error == pytest.approx(error.item(), rel=1e-5)
    for name, tensor in one.parameters.items():
        torch.testing.assert_close(tensor.grad.double(), weights[name].grad, rtol=1e-4, atol=1e-6, msg=f"{kind} {name}")
    assert one.idle[dead].tolist() == [5000 + TOKENS] * len(dead)
    assert bool((one.W_dec.grad != 0).any()) and 0 < found.l0 <= N


def test_the_largest_are_those_of_torch_with_the_lowest_index_first():
    pre = random(40, 100).mul(3).round()  # many are equal
    found = cpu_sparse.largest(pre, 7)
    for t in range(40):
        row = pre[t].numpy()
        order = [j for j in np.argsort(-row, kind="stable")[:7] if row[j] > 0]
        part = slice(found.first[t], found.last[t])
        assert sorted(found.latent[part]) == sorted(order) and np.array_equal(
            found.value[part], row[found.latent[part]]
        )
    few = cpu_sparse.largest(pre, 100)
    assert few.l0() == int((pre > 0).sum())


@pytest.mark.parametrize("guess", [0.0, 1.9, 2.4, 9.0])
def test_a_guess_changes_nothing(guess):
    pre = random(40, 100)
    found = cpu_sparse.of_batch(pre, 90, guess)
    dense = np.zeros(pre.shape, np.float32)
    for t in range(40):
        part = slice(found.first[t], found.last[t])
        dense[t, found.latent[part]] = found.value[part]
    expected = np.where(pre.numpy() >= np.sort(pre.numpy().ravel())[-90], pre.numpy(), 0)
    assert np.array_equal(dense, expected) and found.l0() == 90
