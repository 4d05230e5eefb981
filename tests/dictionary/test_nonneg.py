"""Dictionaries without negative coefficients: built so, exact all the same, kept, and used by what reads them."""

import itertools
import math

import numpy as np
import pytest
import torch

import itda
from itda.dictionary import admission, builder
from itda.metrics import LOSSES
from itda.progress import Progress
from itda.pursuit import reference


def mixed(tokens=450, d=24, seed=0):
    """Tokens of which some point exactly away from others, which signed pursuit takes for the same."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, d, generator=g) @ torch.diag(torch.linspace(2, 0.3, d))
    x[1::9] = -2 * x[::9][: len(x[1::9])]
    x[5::50] = x[2]
    x[60] = 0
    return x


def one_at_a_time(x, k, threshold, loss="relative"):
    """The definition, in float64: each token is judged by non-negative pursuit over all that were admitted before."""
    atoms, rows = np.zeros((0, x.shape[1])), []
    for t, row in enumerate(x.double().numpy()):
        _, steps, residual = reference.mp(row, atoms, k, nonneg=True)
        norm = math.sqrt(reference.energy(row))
        repeats = bool(steps) and steps[0] >= (1 - 1e-6) * norm
        if norm and LOSSES[loss](row, row - residual) > threshold and not repeats:
            atoms = np.concatenate([atoms, (row / norm).astype(np.float32).astype(np.float64)[None]])
            rows.append(t)
    return rows


def rows_of(model):
    return model.labels.position.tolist()


def build(x, **settings):
    return itda.build(x, **{"k": 5, "threshold": 0.35, "center": False, "nonneg": True} | settings)


@pytest.mark.parametrize("kept_bytes", [admission.KEPT_BYTES, 0])
def test_construction_is_the_definition_for_every_chunk_size(kept_bytes, monkeypatch):
    monkeypatch.setattr(admission, "KEPT_BYTES", kept_bytes)
    x = mixed()
    want = one_at_a_time(x, 5, 0.35)
    assert 50 < len(want) < 0.9 * len(x)
    for chunk_size, batch in [(1, 64), (7, 500), (256, 100), (4096, 10_000)]:
        model = build(x.split(batch), chunk_size=chunk_size)
        assert rows_of(model) == want, chunk_size
    assert want != rows_of(build([x], nonneg=False))  # which signed pursuit does not give


@pytest.mark.parametrize(("loss", "threshold"), [("cosine", 2e-2), ("squared", 9.0)])
def test_every_loss(loss, threshold):
    x = mixed(250)
    want = one_at_a_time(x, 4, threshold, loss)
    assert 30 < len(want) < 240
    assert rows_of(build([x], k=4, threshold=threshold, loss=loss)) == want


@pytest.mark.parametrize("settings", [{}, {"n_atoms": 120, "threshold": None}, {"center": True}])
def test_interrupted_it_goes_on_to_the_same(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "MEAN_TOKENS", 300)
    batches = list(mixed(2600).split(100))
    whole = build(batches, **settings)
    for tokens in (2200, 2500):
        folder, read = tmp_path / str(tokens), [0]

        def watch(progress, read=read):
            read[0] = max(read[0], progress.tokens if isinstance(progress, Progress) else 0)

        with pytest.raises(KeyboardInterrupt):
            stop = lambda read=read, tokens=tokens: read[0] >= tokens  # noqa: E731
            build(batches, checkpoint=folder, progress=watch, stop=stop, **settings)
        again = build(batches, checkpoint=folder, **settings)
        assert torch.equal(again.atoms, whole.atoms) and rows_of(again) == rows_of(whole)
        assert again.cfg == whole.cfg and again.cfg["nonneg"] is True


def test_a_build_does_not_go_on_with_other_signs(tmp_path):
    batches = list(mixed(1500).split(100))
    calls = itertools.count(1)
    with pytest.raises(KeyboardInterrupt):
        build(batches, checkpoint=tmp_path / "d", stop=lambda: next(calls) > 10)
    with pytest.raises(itda.InputError, match="nonneg = True"):
        build(batches, checkpoint=tmp_path / "d", nonneg=False)


def test_a_size_is_met_by_the_thresholds_of_such_pursuits():
    model = build([mixed(3000, seed=3)], n_atoms=200, threshold=None, k=6)
    assert 180 <= len(model) <= 220


@pytest.mark.parametrize("kind", ["batch", "paper"])
def test_a_batch_keeps_tokens_that_point_away_from_each_other(kind):
    x = torch.tensor([[1.0, 0, 0], [-2.0, 0, 0], [3.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]])
    signed = build([x], k=2, admission=kind, nonneg=False)
    assert (-1.0 in signed.atoms[:, 0].tolist()) is (kind == "paper")  # which keeps what comes twice
    apart = build([x], k=2, admission=kind)
    assert {1.0, -1.0} <= set(apart.atoms[:, 0].tolist())


def test_it_is_kept_and_encodes_so_from_then_on(tmp_path):
    x = mixed()
    build([x]).save(tmp_path / "d")
    model = itda.ITDA.load(tmp_path / "d")
    assert model.cfg["nonneg"] is True and bool((model.encode(x).values >= 0).all())
    assert bool((model.sample.codes.values >= 0).all())
    assert bool((model.encode(x, nonneg=False).values < 0).any())
    assert build([x], nonneg=False).cfg["nonneg"] is False


def test_a_tokens_error_is_no_more_than_the_threshold_unless_it_is_an_atom_again():
    x = mixed()
    model = build([x], k=24)
    rest = x - model.reconstruct(x, k=24)
    loss = rest.square().sum(1) / x.square().sum(1).clamp_min(1e-30)
    assert float(loss[x.any(1)].max()) <= 0.35 + 1e-4


# -- on the command line ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    from itda import demo

    folder = tmp_path_factory.mktemp("nonneg")
    (folder / "book.txt").write_text("\n".join(demo.corpus()[:40])[:6_000], "utf-8")
    (folder / "other.txt").write_text("\n".join(demo.corpus()[300:330])[:6_000], "utf-8")
    words = f"train {demo.model_path()} {folder}/book.txt --layer 2 --tokens 800 --threshold 0.1 --k 10 --nonneg"
    assert run(*words.split(), "--out", f"{folder}/d") == 0
    return folder


def run(*words):
    from itda.cli.main import main

    return main(list(words))


def test_commands_take_it_and_a_dictionary_keeps_it(trained, capsys):
    import json

    assert itda.ITDA.load(trained / "d").cfg["nonneg"] is True
    signs = {}
    for name, flags in {"own": (), "signed": ("--no-nonneg",), "said": ("--nonneg",)}.items():
        assert run("decompose", f"{trained}/d", "Return the number of elements.", "--token=-1", "--json", *flags) == 0
        signs[name] = [part["coefficient"] < 0 for part in json.loads(capsys.readouterr().out)["atoms"]]
    assert not any(signs["own"]) and signs["own"] == signs["said"] and any(signs["signed"])
    shares = {}
    for name, flags in {"own": (), "signed": ("--no-nonneg", "--no-controls")}.items():
        words = ("eval", f"{trained}/d", f"{trained}/other.txt", "--tokens", "300", "--ce-tokens", "0", "--json")
        assert run(*words, "--out", f"{trained}/eval.json", *flags) == 0
        found = json.loads(capsys.readouterr().out)
        shares[name] = {system: row["negative"] for system, row in found["systems"].items()}
        assert found["settings"]["nonneg"] is (name == "own")
    assert set(shares["own"].values()) == {0.0} and all(share > 0.05 for share in shares["signed"].values())
