"""Atoms that are drawn at the start and moved by all that goes by."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import itda
from itda import metrics
from itda.dictionary import folder, online
from itda.dictionary.naming import nearer
from itda.errors import InputError
from itda.labels import Labels
from tests import tiny_models

D, TRUE, K = 24, 60, 4
HOW = dict(k=K, n_atoms=TRUE, admission="online")


def planted(tokens=12_000, seed=0):
    """Sparse sums of `TRUE` directions, and the directions."""
    g = torch.Generator().manual_seed(7)
    atoms = itda.normalize(torch.randn(TRUE, D, generator=g))
    g.manual_seed(seed)
    x = torch.zeros(tokens, D)
    for _ in range(3):
        x += atoms[torch.randint(TRUE, (tokens,), generator=g)] * (1 + torch.rand(tokens, 1, generator=g))
    return x + 0.02 * torch.randn(tokens, D, generator=g), atoms


def error(model, x):
    return metrics.fvu(x.double(), model.reconstruct(x).double())


def same(a, b):
    return (
        torch.equal(a.atoms, b.atoms) and torch.equal(a.moved, b.moved) and (a.labels.pairs() == b.labels.pairs()).all()
    )


@pytest.mark.parametrize("more", [{}, {"nonneg": True}, {"center": False}, {"max_norm": 1.5}, {"scale": "std"}])
def test_the_batches_in_which_tokens_come_change_nothing(more):
    x, _ = planted()
    whole = itda.build([x], **HOW, **more)
    assert len(whole) == TRUE and whole.cfg["threshold"] is None and whole.cfg["tokens"] == len(x)
    for size in (1777, 97, 5000):
        assert same(itda.build(list(x.split(size)), **HOW, **more), whole)


def test_they_are_better_than_what_was_drawn_and_nearer_the_truth():
    x, true = planted()
    held, _ = planted(1000, seed=1)
    moved = itda.build([x], **HOW)
    drawn = itda.build([x[:8192]], **HOW)  # fewer steps
    start = online.Online(D, K)
    rows = start.draw(x[:8192] - x[:8192].mean(0), TRUE)

    def recovered(atoms):
        return float((atoms @ true.T).abs().amax(0).mean())

    assert len(set(rows)) == TRUE
    assert recovered(moved.atoms) > recovered(drawn.atoms) > recovered(start.start)
    assert error(moved, held) < error(drawn, held)
    assert torch.allclose(moved.atoms.norm(dim=1), torch.ones(TRUE), atol=1e-5)


def test_an_atom_is_called_by_a_token_it_is_near_to_and_no_two_by_one():
    x, _ = planted()
    labels = Labels.counted(0, len(x))
    d = itda.build([itda.Batch(x, labels)], **HOW)
    found = x[torch.from_numpy(d.labels.position)] - d.mean
    assert torch.allclose((itda.normalize(found) * d.atoms).sum(1), d.moved, atol=1e-5)
    assert torch.allclose(found.norm(dim=1), d.norms, rtol=1e-5)
    assert len({tuple(pair) for pair in d.labels.pairs().tolist()}) == TRUE
    sample = x[torch.from_numpy(d.sample.labels.position)] - d.mean
    nearest = (d.atoms @ itda.normalize(sample).T).amax(1)
    assert float((d.moved >= nearest - 1e-5).float().mean()) > 0.9  # another atom may have the nearest
    assert d.losses.isnan().all()


def test_equal_tokens_are_drawn_once():
    x, _ = planted(9000)
    x[:8192] = x[:8192][torch.arange(8192) % 50]
    d = itda.build([x], k=K, n_atoms=200, admission="online", center=False)
    assert len(d) == 50


def test_interrupted_anywhere_and_again_while_it_goes_on_the_result_is_the_same(tmp_path):
    x, _ = planted()
    parts = list(x.split(700))
    whole = itda.build(parts, **HOW)
    for first in (2, 11, 13, 15, 17):
        for second in (0, 1, 5):
            where = tmp_path / f"{first} {second}"
            for stops in (first, first + second, None):
                asked = iter(range(99))
                stop = (lambda: False) if stops is None else (lambda stops=stops: next(asked) == stops)  # noqa: B023
                try:
                    found = itda.build(parts, **HOW, checkpoint=where, stop=stop)
                except KeyboardInterrupt:
                    assert (where / folder.CHECKPOINT).is_file()
            assert same(found, whole)


def test_threads_change_nothing():
    x, _ = planted()
    whole, before = itda.build([x], **HOW), torch.get_num_threads()
    torch.set_num_threads(1 if before > 1 else 2)
    try:
        assert same(itda.build([x], **HOW), whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(admission="online"), "say how many (`n_atoms`)"),
        (dict(admission="online", n_atoms=10, threshold=0.1), "Both `threshold` (0.1) and `n_atoms` (10) were given"),
        (dict(admission="online", n_atoms=10, loss="cosine"), "`loss` is 'cosine', which says what is admitted"),
        (dict(admission="online", n_atoms=10, max_atoms=5), "`max_atoms` is 5, which says what is admitted"),
        (dict(admission="online", n_atoms=901), "`n_atoms` is 901 but the stream has 900 tokens"),
    ],
)
def test_what_would_have_no_effect_is_refused(settings, says):
    with pytest.raises(InputError) as found:
        itda.build([planted(900)[0]], k=K, **settings)
    assert says in str(found.value) and str(found.value).endswith(".")


def test_activations_that_are_all_zero_are_refused():
    with pytest.raises(InputError, match="came as zero, so none can be an atom"):
        itda.build([torch.zeros(9000, D)], **HOW, center=False)


def test_a_training_does_so_unless_something_is_asked_for_that_admission_alone_has(tmp_path):
    tiny_models.save("gpt2", tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(tiny_models.DOCUMENTS * 3), encoding="utf-8")

    def trained(name, **settings):
        settings = dict(layer=2, k=6, context_length=24) | settings
        (said,) = itda.train(tmp_path / "model", tmp_path / "text.txt", tmp_path / name, **settings)
        return said, itda.ITDA.load(tmp_path / name)

    said, d = trained("usual")
    assert len(d) == said.tokens // 8 and d.cfg["admission"] == "online" and said.threshold is None
    assert said.moved == pytest.approx(float(d.moved.median())) and "moved to a cosine of" in str(said)
    assert "online, centred" in str(itda.report.summary(d)) and "in the one pass" in str(itda.report.summary(d))
    assert len(trained("sized", n_atoms=40)[1]) == 40
    for name, more in {"a": {"threshold": 0.3}, "b": {"max_atoms": 9}, "c": {"loss": "cosine"}}.items():
        said, d = trained(name, **more)
        assert d.cfg["admission"] == "sequential" and d.moved is None and said.threshold is not None
    assert trained("d", n_atoms=40, refine=1)[1].cfg["admission"] == "sequential"
    with pytest.raises(InputError, match=r"`n_atoms` is 5,000 but the stream has 1,\d\d\d tokens"):
        trained("x", n_atoms=5000)
    assert not np.isnan(itda.evaluate(tmp_path / "usual", tiny_models.DOCUMENTS[:4], ce_tokens=0, in_sample=True).fvu)


def test_of_two_atoms_near_one_token_the_nearer_has_it():
    atoms = itda.normalize(torch.tensor([[1.0, 0.1, 0.0], [1.0, 0.2, 0.0], [0.0, 0.0, 1.0]]))
    tokens, old = Labels.counted(10, 3), Labels.counted(0, 3)
    x = torch.tensor([[5.0, 0.5, 0.0], [1.0, 0.0, 0.5], [0.0, 1.0, 1.0]])
    found = nearer(atoms, torch.tensor([0.3, 0.3, 0.9]), old, x, tokens)
    assert {atom: token for atom, (token, _) in found.items()} == {0: 0, 1: 1}  # the third is nearer to its own
    assert found[0][1] == pytest.approx(1.0) and found[1][1] == pytest.approx(float(atoms[1] @ itda.normalize(x)[1]))
    own = Labels.counted(10, 3)  # a token that is a label stays that of its atom
    assert nearer(atoms, torch.tensor([0.3, 0.3, 0.9]), own, x, tokens) == {}
