"""top-AFA against the rule as it is written, one token at a time, and the worked examples."""

import math

import numpy as np
import pytest
import torch

from itda.errors import InputError
from itda.saes import top_afa
from itda.saes import top_afa as package_name
from itda.saes.top_afa import FIRST, kept
from tests.untyped import untyped


def reference(acts, target, norms=None):
    """The rule as it is written: sort, add up in float64, take the nearest."""
    acts = np.asarray(acts)
    out = np.zeros_like(acts)
    counts = []
    for t, row in enumerate(acts):
        length = row if norms is None else row * np.asarray(norms)
        order = sorted(range(len(row)), key=lambda i: (-length[i], i))
        best, k, total = math.inf, 0, 0.0
        for place, i in enumerate(order):
            total += float(length[i]) ** 2
            norm = math.inf if place == len(row) - 1 else math.sqrt(total)
            if abs(norm - float(target[t])) < best or place == 0:
                best, k = abs(norm - float(target[t])), place + 1
        for i in order[:k]:
            out[t, i] = row[i]
        counts.append(k)
    return out, counts


E1 = [
    ((4, 3, 0, 12, 0, 84), {0: [5], 84.4: [5], 84.9: [5, 3, 0], 1e6: [5, 3, 0, 1]}),
    ((2, 2, 2, 2, 0, 0), {0: [0], 2.9: [0, 1], 3.4: [0, 1, 2], 3.5: [0, 1, 2], 4: [0, 1, 2, 3]}),
    ((0, 0, 0), {0: [], 5: []}),
    ((1, 2, 3, 4, 5, 6), {6: [5], 9.5: [5, 4, 3, 2, 1], 100: [5, 4, 3, 2, 1]}),
    ((4, 3, 0, 0), {4.5: [0], 4.51: [0, 1], 4.52: [0, 1]}),
    ((2,), {7: [0]}),
    ((0.5, 3, 0, 2, 1, 0.1), {0: [1], 1: [1], 3.2: [1], 3.5: [1, 3], 3.7: [1, 3, 4], 10: [1, 3, 4, 0, 5]}),
]


@pytest.mark.parametrize(("acts", "target", "chosen"), [(a, t, c) for a, table in E1 for t, c in table.items()])
def test_worked_examples_of_the_selection(acts, target, chosen):
    """Example E1."""
    expected = torch.zeros(1, len(acts), dtype=torch.float64)
    for i in chosen:
        expected[0, i] = acts[i]
    rows = torch.tensor([acts], dtype=torch.float64)
    assert torch.equal(top_afa(rows, torch.tensor([float(target)])), expected)
    assert np.array_equal(reference(rows.numpy(), [target])[0], expected.numpy())


def test_the_published_example_with_decoder_norms():
    acts = torch.tensor([[5.0, 4, 3], [1, 1, 1], [1, 10, 2]])
    norms = torch.tensor([[1.0, 2], [3, 4], [5, 6]]).norm(dim=1)
    out = top_afa(acts, torch.tensor([54.405882, 15, 67.801180]), norms)
    assert out.tolist() == [[0, 4, 3], [0, 1, 1], [0, 10, 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize("n", [1, 2, 7, FIRST, FIRST + 1, 3 * FIRST + 5])
def test_equals_the_rule_as_it_is_written(n, with_norms, dtype):
    noise = torch.Generator().manual_seed(n)
    acts = torch.randn(60, n, generator=noise).relu()
    acts[20:40] = (4 * acts[20:40]).round()  # many are equal
    acts[55] = 0
    acts = acts.to(dtype)
    norms = 2.0 ** torch.randint(-2, 3, (n,), generator=noise) if with_norms else None
    total = (acts.double() * (1 if norms is None else norms)).norm(dim=1)
    target = (total * torch.rand(60, generator=noise) * 1.2).float()
    target[:3] = 0
    expected, counts = reference(acts.double().numpy(), target.tolist(), norms)
    out = top_afa(acts, target, norms)
    assert out.dtype == dtype and np.array_equal(out.double().numpy(), expected)
    assert np.array_equal(kept(acts, target, norms).sum(1).numpy(), [(row != 0).sum() for row in expected])
    assert n < 3 or len(set(counts)) > 2


def test_permuting_latents_permutes_what_is_kept_and_scale_changes_nothing():
    noise = torch.Generator().manual_seed(0)
    acts, target = torch.rand(50, 90, generator=noise), 5 * torch.rand(50, generator=noise)
    norms = 2.0 ** torch.randint(-1, 2, (90,), generator=noise)
    out, order = top_afa(acts, target, norms), torch.randperm(90, generator=noise)
    assert torch.equal(top_afa(acts[:, order], target, norms[order]), out[:, order])
    assert torch.equal(top_afa(8 * acts, 8 * target, norms), 8 * out)
    assert torch.equal(top_afa(acts * norms, target) / norms, out)  # decoder rows rescaled against codes


def test_what_is_kept_has_the_gradient_and_nothing_else_has():
    noise = torch.Generator().manual_seed(1)
    acts, target, norms = (torch.rand(*shape, generator=noise) for shape in ((9, 30), (9,), (30,)))
    for each in (acts, target, norms):
        each.requires_grad_()
    weights = torch.randn(9, 30, generator=noise)
    out = top_afa(acts, target, norms)
    (out * weights).sum().backward()
    assert torch.equal(acts.grad, torch.where(out > 0, weights, 0.0)) and 0 < (out > 0).sum() < out.numel()
    assert target.grad is None and norms.grad is None


def test_the_public_name_is_the_function():
    assert package_name is top_afa and callable(top_afa)
    assert top_afa(torch.zeros(0, 5), torch.zeros(0)).shape == (0, 5)
    assert top_afa(torch.zeros(4, 0), torch.zeros(4)).shape == (4, 0)


BAD = [
    ((torch.ones(3), torch.ones(3)), r"`acts` has shape \(3,\).*pass activations \(tokens, n\)"),
    ((torch.ones(3, 2, dtype=torch.long), torch.ones(3)), "dtype torch.int64: pass activations"),
    (
        (torch.ones(3, 2), torch.ones(2)),
        r"`target` has shape \(2,\), and `acts` \(3, 2\): pass one norm for each token",
    ),
    ((torch.ones(3, 2), torch.ones(3), torch.ones(3)), r"`norms` has shape \(3,\).*one norm for each latent"),
    ((-torch.ones(3, 2), torch.ones(3)), "`acts` goes from -1 to -1: pass finite values, 0 or more"),
    ((torch.ones(3, 2), torch.tensor([1, torch.inf, 2])), "`target` goes from 1 to inf"),
    ((torch.full((3, 2), torch.nan), torch.ones(3)), "`acts` goes from nan"),
    ((torch.ones(3, 2), torch.ones(3), torch.tensor([1, -1.0])), "`norms` goes from -1 to 1"),
]


@pytest.mark.parametrize(("args", "sentence"), BAD)
def test_bad_arguments_are_refused_in_one_sentence(args, sentence):
    with pytest.raises(InputError, match=sentence):
        untyped(top_afa)(*args)
