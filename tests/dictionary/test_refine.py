"""Improving a dictionary: what is kept, how atoms move, and what stays true of their labels."""

import numpy as np
import pytest
import torch

import itda
from itda import metrics
from itda.codes import Codes
from itda.dictionary import refine
from itda.dictionary.moves import MEMORY, START, Moves
from itda.errors import InputError
from itda.labels import Labels
from itda.training import improve
from itda.training import train as training
from tests import tiny_models

D, TRUE, K = 24, 60, 4


def planted(tokens=3000, seed=0):
    """Sparse sums of `TRUE` directions, and the directions."""
    g = torch.Generator().manual_seed(7)
    atoms = itda.normalize(torch.randn(TRUE, D, generator=g))
    g.manual_seed(seed)
    x = torch.zeros(tokens, D)
    for _ in range(3):
        which = torch.randint(TRUE, (tokens,), generator=g)
        x += atoms[which] * (1 + torch.rand(tokens, 1, generator=g))
    return x + 0.02 * torch.randn(tokens, D, generator=g), atoms


def built(n_atoms=80, x=None, **settings):
    x = planted()[0] if x is None else x
    return itda.build(x, k=K, threshold=0.02, max_atoms=n_atoms, **settings)


def error(model, x):
    return metrics.fvu(x.double(), model.reconstruct(x).double())


@pytest.mark.parametrize("nonneg", [False, True])
def test_an_atom_costs_what_is_left_when_the_nearest_one_takes_its_place(nonneg):
    x, _ = planted(200)
    atoms = built(30, center=False).atoms.double()
    codes = itda.pursue(x, atoms.float(), K, nonneg=nonneg)
    found = refine.removal_costs(x, atoms.float(), codes, refine._nearest(atoms.float(), nonneg), nonneg)
    dense = codes.dense().double()
    before = (x.double() - dense @ atoms).square().sum()
    for j in range(len(atoms)):
        cosine = atoms @ atoms[j] if nonneg else (atoms @ atoms[j]).abs()
        cosine[j] = -1
        nearest, without = int(cosine.argmax()), dense.clone()
        without[:, j] = 0
        rest = x.double() - without @ atoms
        instead = rest @ atoms[nearest] * (dense[:, j] != 0)
        instead = instead.clamp(min=0) if nonneg else instead
        after = (rest - instead[:, None] * atoms[nearest]).square().sum()
        assert float(found[j]) == pytest.approx(float(after - before), rel=1e-4, abs=1e-3)


def test_of_two_alike_one_stays():
    """Each of a pair could do the other's work, so each costs nothing; both together cost much."""
    x, true = planted()
    pairs = itda.normalize(torch.cat([true, true + 1e-4 * torch.randn(true.shape, generator=torch.Generator())]))
    ones = torch.ones(len(pairs))
    chosen = refine.select(itda.ITDA(pairs, Labels.counted(0, len(pairs)), K, None, ones, ones), x, TRUE, rounds=1)
    assert sorted(chosen.labels.position % TRUE) == list(range(TRUE))


def test_the_last_atoms_go_though_their_nearest_has_gone():
    x, _ = planted(300)
    model = built(40)
    for size in (1, 2, 5):
        assert len(refine.select(model, x, size, rounds=1)) == size


@pytest.mark.parametrize("center", [False, True])
def test_selection_keeps_real_atoms_and_beats_chance_and_the_first_ones(center):
    x, _ = planted()
    held, _ = planted(1000, seed=1)
    candidates = built(240, center=center)
    chosen = refine.select(candidates, x, 60, rounds=3)
    pairs = candidates.labels.pairs().tolist()
    rows = [pairs.index(pair) for pair in chosen.labels.pairs().tolist()]
    assert rows == sorted(rows) and len(chosen) == 60
    for name in ("atoms", "norms", "losses"):
        assert torch.equal(getattr(chosen, name).nan_to_num(), getattr(candidates, name)[rows].nan_to_num())
    others = [refine.select(candidates, torch.randn(50, D, generator=torch.Generator().manual_seed(s)), 60, rounds=1)
              for s in range(5)]  # fmt: skip
    assert error(chosen, held) < min(error(other, held) for other in others)
    first = itda.build(x, k=K, threshold=0.02, max_atoms=60, center=center)
    assert error(chosen, held) < error(first, held)
    assert chosen.cfg["selected"] == {"from": 240, "tokens": 3000, "rounds": 3, "k": K}
    assert torch.equal(refine.select(candidates, x, 240).atoms, candidates.atoms)


def test_an_atom_moves_towards_what_is_left_of_its_tokens_less_the_more_it_had_to_do():
    x, _ = planted(800)
    model = built()
    codes, moves = model.encode(x), Moves(len(model))
    dense, atoms, energy, weight = codes.dense().double(), model.atoms.double(), None, START
    for _ in range(3):
        mine = dense.square().sum(0)
        energy = START * (mine + mine.mean()) if energy is None else energy
        energy = energy * weight / (weight + MEMORY) + mine
        weight += 1
        wanted = atoms + dense.T @ (x.double() - dense @ atoms) / energy[:, None]
        after = moves.of(x, atoms.float(), codes)
        assert torch.allclose(after.double(), itda.normalize(wanted), atol=1e-4)
        assert torch.allclose(moves.energy, energy, rtol=1e-4)
        assert (x.double() - dense @ after.double()).square().sum() < (x.double() - dense @ atoms).square().sum()
        atoms = after.double()


def test_an_atom_that_no_token_uses_stays_where_it_is():
    x, _ = planted(800)
    atoms = torch.cat([built().atoms, itda.normalize(torch.ones(1, D))])
    codes = itda.pursue(x, atoms[:-1], K)
    after = Moves(len(atoms)).of(x, atoms, Codes(codes.indices, codes.values, len(atoms)))
    assert torch.equal(after[-1], atoms[-1]) and not torch.equal(after[0], atoms[0])


def test_refined_atoms_are_better_on_text_they_have_not_seen_and_nearer_the_truth():
    x, true = planted()
    held, _ = planted(1000, seed=1)
    model = built(TRUE)
    once, thrice = (refine.refine(model, x, passes=p) for p in (1, 8))
    assert error(thrice, held) < error(once, held) < error(model, held)

    def recovered(atoms):
        return float((atoms @ true.T).abs().amax(0).mean())

    assert recovered(thrice.atoms) > recovered(model.atoms) + 0.05


def test_atoms_keep_their_labels_and_say_how_far_they_moved(tmp_path):
    x, _ = planted()
    model = built()
    found = refine.refine(model, x, passes=2, seed=3)
    assert found.labels.pairs().tolist() == model.labels.pairs().tolist()
    assert torch.allclose(found.moved, (found.atoms * model.atoms).sum(1), atol=1e-6)
    assert found.moved.max() <= 1 + 1e-6 and 0 < found.moved.min() < 0.99
    assert found.cfg["refined"] == {"passes": 2, "tokens": 3000, "k": K, "method": "mp", "seed": 3}
    assert torch.equal(refine.refine(model, x, passes=2, seed=3).atoms, found.atoms)
    assert not torch.equal(refine.refine(model, x, passes=2, seed=4).atoms, found.atoms)
    found.save(tmp_path / "d")
    again = itda.ITDA.load(tmp_path / "d")
    assert torch.equal(again.moved, found.moved) and torch.equal(again.atoms, found.atoms)
    with pytest.raises(InputError, match="is refined already"):
        refine.refine(again, x)


def test_show_says_what_was_selected_and_how_far_atoms_moved():
    x, _ = planted()
    chosen = refine.select(built(240), x, 60, rounds=2)
    line = "those of most use of 240 atoms, on 3,000 tokens in 2 rounds"
    shown = str(itda.report.summary(chosen))
    assert shown.count(line) == 1 and "refined" not in shown and "selected" not in str(itda.report.summary(built()))
    found = refine.refine(chosen, x, passes=2)
    shown, moved = str(itda.report.summary(found)), found.moved
    levels = f"median {np.median(moved):.4g}, least {moved.min():.4g}"
    assert (
        line in shown
        and f"2 passes over 3,000 tokens; cosine of atoms with their labels' activations: {levels}" in shown
    )
    chosen.cfg["selected"] = {"from": "many"}  # whoever wrote that
    assert "those of most use of ? atoms" in str(itda.report.summary(chosen))


def test_choosing_among_refined_atoms_keeps_how_far_they_moved():
    x, _ = planted()
    found = refine.refine(built(), x)
    chosen = refine.select(found, x, 20)
    rows = [found.labels.pairs().tolist().index(pair) for pair in chosen.labels.pairs().tolist()]
    assert torch.equal(chosen.moved, found.moved[rows])


def test_an_atom_that_nothing_uses_stays_where_it_is():
    x, _ = planted()
    x[:, -1] = 0
    model = built(20, x)
    lone = torch.zeros(1, D)
    lone[0, -1] = 1
    atoms, labels = torch.cat([model.atoms, lone]), Labels.counted(0, 21)
    ones = torch.ones(21)
    found = refine.refine(itda.ITDA(atoms, labels, K, None, ones, ones), x, passes=2)
    assert torch.equal(found.atoms[20], lone[0]) and found.moved[20] == 1
    assert (found.moved[:20] < 1).any()


def test_the_sample_is_that_of_the_new_atoms():
    x, _ = planted()
    model, labels = built(), Labels.counted(0, 3000)
    for found in (refine.refine(model, x, labels=labels), refine.select(model, x, 40, labels=labels)):
        rows = found.sample.labels.position
        assert torch.equal(found.sample.codes.values, found.encode(x[torch.from_numpy(rows)]).values)
        assert found.cfg["fvu"] == pytest.approx(error(found, x[torch.from_numpy(rows)]))
    bare = refine.refine(model, x)
    assert bare.sample is None and "fvu" not in bare.cfg


def test_a_centred_dictionary_is_refined_about_its_mean():
    x = planted()[0] + 5
    model = built(x=x, center=True)
    found = refine.refine(model, x, passes=4)
    assert torch.equal(found.mean, model.mean) and error(found, x) < error(model, x)


def test_progress_is_told():
    steps = []
    refine.refine(built(), planted()[0], passes=2, progress=steps.append)
    assert [step.tokens for step in steps][-1] == steps[-1].total == 6000


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m, x: refine.select(m, x, 0), "`n_atoms` is 0"),
        (lambda m, x: refine.select(m, x, 1000), "out of 80 candidates"),
        (lambda m, x: refine.select(m, x, 10, rounds=0), "`rounds` is 0"),
        (lambda m, x: refine.select(m, x[:, :5], 10), "activations (tokens, 24)"),
        (
            lambda m, x: refine.select(m, x, 10, labels=Labels.counted(0, 7)),
            "`labels` has 7 entries and `x` 3,000 acti",
        ),
        (lambda m, x: refine.refine(m, x, labels=Labels.counted(0, 7)), "`labels` has 7 entries and `x` 3,000 activat"),
        (lambda m, x: refine.refine(m, x, seed=-1), "`seed` is -1: pass a whole number, 0 or more"),
        (lambda m, x: refine.refine(m, x, passes=0), "`passes` is 0"),
        (lambda m, x: refine.refine(m, x, method="lasso"), "`method` is 'lasso'"),
        (lambda m, x: refine.refine(m, x[:0]), "There is nothing to improve on"),
        (lambda m, x: refine.refine(m, x * np.nan), "`x` must be finite"),
        (lambda m, x: refine.refine(m, x.int()), "floating point"),
        (lambda m, x: refine.refine(m, x[0]), "`x` is (24,)"),
    ],
)
def test_bad_input_is_said_in_one_sentence(call, says):
    with pytest.raises(InputError) as found:
        call(built(), planted()[0])
    assert says in str(found.value) and str(found.value).endswith(".") and "\n" not in str(found.value)


def test_what_cannot_be_refined_is_refused_before_it_is_built(tmp_path, monkeypatch):
    tiny_models.save("gpt2", tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(tiny_models.DOCUMENTS * 3), encoding="utf-8")

    def train(name, free, **settings):
        monkeypatch.setattr(improve, "free_bytes", lambda device: free)
        settings = dict(layer=2, k=6, context_length=24, tokens=600, **settings)
        return itda.train(tmp_path / "model", tmp_path / "text.txt", tmp_path / name, **settings)

    rows = 4 * tiny_models.WIDTH * 600  # bytes of 600 activations
    assert train("fits", 3 * rows, n_atoms=40, candidates=2, refine_tokens=10**9)[0].n_atoms == 40  # the text is short

    def never(*args, **settings):
        raise AssertionError("it was built")

    monkeypatch.setattr(training, "build", never)
    for how in (dict(candidates=2), dict(refine=1)):
        with pytest.raises(InputError, match=r"Refining on 600 tokens holds 0\.0 GB of activations, more than half"):
            train("x", 1.9 * rows, n_atoms=20, refine_tokens=10**9, **how)
    assert not (tmp_path / "x").exists()


def test_train_refines_show_says_so_and_a_kill_changes_nothing(tmp_path, capfd):
    tiny_models.save("gpt2", tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(tiny_models.DOCUMENTS * 3), encoding="utf-8")
    settings = dict(layer=2, k=6, threshold=0.2, context_length=24, refine=2, refine_tokens=500)
    (plain,) = itda.train(tmp_path / "model", tmp_path / "text.txt", tmp_path / "plain", **{**settings, "refine": 0})
    (trained,) = itda.train(tmp_path / "model", tmp_path / "text.txt", tmp_path / "d", **settings)
    d, was = itda.ITDA.load(tmp_path / "d"), itda.ITDA.load(tmp_path / "plain")
    kept = (d.labels.pairs() == was.labels.pairs()).all(1)
    assert kept.mean() > 0.5 and torch.equal(d.norms[kept], was.norms[kept])
    assert d.cfg["refined"]["tokens"] == 500 and d.sample is not None and trained.fvu == d.cfg["fvu"] < plain.fvu
    batches = list(itda.activations(str(tmp_path / "model"), tmp_path / "text.txt", layer=2, context_length=24))
    x = torch.cat([batch.activations for batch in batches])[:500]
    assert torch.equal(refine.refine(was, x, passes=2).atoms, d.atoms)

    asked = []
    itda.train(tmp_path / "model", tmp_path / "text.txt", tmp_path / "count", stop=lambda: asked.append(1), **settings)
    left = iter([False] * (len(asked) - 2) + [True])  # while it refines
    with pytest.raises(KeyboardInterrupt):
        itda.train(tmp_path / "model", tmp_path / "text.txt", tmp_path / "again", stop=lambda: next(left), **settings)
    assert not (tmp_path / "again" / "cfg.json").exists()
    itda.train(tmp_path / "model", tmp_path / "text.txt", tmp_path / "again", **settings)
    for name in ("atoms.safetensors", "labels.parquet", "sample.parquet"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "d" / name).read_bytes()
    assert "2 passes over 500 tokens" in str(itda.report.summary(d)) and "refined: cosine" in str(
        itda.report.atom_report(d, 3)
    )
    assert itda.report.atom_report(d, 3).moved == pytest.approx(float(d.moved[3]))
    assert "passes over" not in str(itda.report.summary(was))
    with pytest.raises(InputError, match="`refine` is -1"):
        itda.train(tmp_path / "model", tmp_path / "text.txt", tmp_path / "x", **{**settings, "refine": -1})


def test_train_keeps_the_most_useful_of_several_candidates(tmp_path):
    tiny_models.save("gpt2", tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(tiny_models.DOCUMENTS * 3), encoding="utf-8")
    settings = dict(layer=2, k=6, context_length=24)
    read = tmp_path / "model", tmp_path / "text.txt"
    itda.train(*read, tmp_path / "many", n_atoms=120, admission="sequential", **settings)
    itda.train(*read, tmp_path / "few", n_atoms=40, candidates=3, **settings)
    few, many = (itda.ITDA.load(tmp_path / name) for name in ("few", "many"))
    batches = list(itda.activations(str(tmp_path / "model"), tmp_path / "text.txt", layer=2, context_length=24))
    x = torch.cat([batch.activations for batch in batches])
    want = refine.select(many, x, 40)
    assert few.labels.pairs().tolist() == want.labels.pairs().tolist() and torch.equal(few.atoms, want.atoms)
    assert few.moved is None and few.sample is not None and few.cfg["selected"]["from"] == len(many)
    with pytest.raises(InputError, match="times as many as `n_atoms`: give that too"):
        itda.train(*read, tmp_path / "x", candidates=3, **settings)
    with pytest.raises(InputError, match="`n_atoms` is 400 and `candidates` 30, but the stream has 1,223 tokens"):
        itda.train(*read, tmp_path / "x", candidates=30, n_atoms=400, **settings)
    with pytest.raises(InputError, match=r"Both `threshold` \(0\.3\) and `n_atoms` \(40\) were given"):
        itda.train(*read, tmp_path / "x", candidates=3, n_atoms=40, threshold=0.3, **settings)


@pytest.mark.parametrize("setting", ["autocast", "default dtype", "default device"])
def test_no_setting_of_the_caller_changes_the_atoms(setting):
    x = torch.randn(200, 8)
    model = itda.build(x, k=3, threshold=0.2)

    def improved():
        return refine.refine(refine.select(model, x, 20), x, passes=1).atoms

    want = improved()
    try:
        if setting == "default dtype":
            torch.set_default_dtype(torch.float64)
        if setting == "default device":
            torch.set_default_device("meta")
        with torch.autocast("cpu", torch.bfloat16, enabled=setting == "autocast"):
            found, coherence = improved(), itda.metrics.coherence(want)["max"]
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(want, found)
    assert coherence == itda.metrics.coherence(want)["max"] < 1
