"""AFA figures and codes of as many atoms as a token needs in `evaluate`, against plain computations; the ZF plot."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.standard_sae import StandardSAEConfig

import itda
from itda.cli.main import main
from itda.errors import InputError
from itda.evaluation import measures
from itda.evaluation.evaluate import evaluate
from itda.evaluation.systems import System
from itda.interop.saelens import system_of
from itda.labels import Labels
from itda.report import zf_plot
from itda.results import finite
from tests import tiny_models

LENGTH = 24
HOW = {"layer": 1, "context_length": LENGTH, "batch_rows": 2}
NEW = [text.upper() for text in tiny_models.DOCUMENTS]
QUICK = {"tokens": 200, "ce_tokens": 0, "controls": False}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model, a centred dictionary of it, one over deviations, and text that is new to both."""
    home = tmp_path_factory.mktemp("home")
    tiny_models.save("gpt2", home / "gpt2")
    documents = [f"{text} {word}." for word in ("one", "two", "three") for text in tiny_models.DOCUMENTS]
    for name, more in {"d": {}, "scaled": {"scale": "std"}}.items():
        itda.train(str(home / "gpt2"), documents, home / name, k=5, tokens=500, threshold=0.1, **HOW, **more)
    (home / "new.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in NEW))
    return home


def held(home, tokens=200):
    """The activations that `evaluate` measures on, with their labels."""
    batches = list(itda.activations(str(home / "gpt2"), home / "new.jsonl", **HOW))
    x = torch.cat([batch.activations for batch in batches])[:tokens]
    return x, Labels.concat([batch.labels for batch in batches])[:tokens]


def test_every_system_has_the_figures_of_its_codes(home):
    d, scaled = itda.ITDA.load(home / "d"), itda.ITDA.load(home / "scaled")
    found = evaluate(d, home / "new.jsonl", **QUICK | {"controls": ["gaussian"]}, systems=[System.of(scaled, "scaled")])
    x, _ = held(home)
    for name, own, norms in (("itda", d, None), ("scaled", scaled, (scaled.atoms * scaled.scale).double().norm(dim=1))):
        codes = own.encode(x)
        expected = itda.metrics.afa(x, own.decode(codes), codes, norms, own.mean)
        for way in ("centred", "with_bias"):
            assert found.systems[name]["afa"][way] == pytest.approx(expected[way], rel=1e-5), (name, way)
    assert found.systems["itda"]["afa"]["with_bias"]["h"] == len(d) + 1
    ours, random = (found.systems[name]["afa"]["centred"] for name in ("itda", "gaussian"))
    assert ours != random and json.dumps(found.to_json(), allow_nan=False)
    shown = str(found)
    row = next(line for line in shown.splitlines()[::-1] if line.lstrip().startswith("gaussian"))
    assert f"{random['ratio']:.4f}" in row and f"{random['interference']:+.3f}" in row
    plain = evaluate(replace(d, mean=None), home / "new.jsonl", **QUICK).systems["itda"]["afa"]
    assert plain["centred"] == plain["with_bias"]


def test_special_tokens_count_only_where_they_are_scored(home):
    d = itda.ITDA.load(home / "d")
    x, labels = held(home)
    scored = labels.position % 2 == 0
    found = measures.measure(System.of(d, "itda"), x, labels, scored)
    some = x[torch.from_numpy(scored)]
    codes = d.encode(some)
    expected = itda.metrics.afa(some, d.decode(codes), codes, None, d.mean)
    assert found["afa"]["centred"] == pytest.approx(expected["centred"], rel=1e-9)


@pytest.mark.parametrize("normalised", ["none", "layer_norm", "constant_norm_rescale"])
def test_an_sae_is_measured_in_the_units_of_its_codes(home, normalised):
    noise = torch.Generator().manual_seed(0)
    cfg = StandardSAEConfig(d_in=32, d_sae=48, normalize_activations=normalised, metadata=SAEMetadata(hook_name=None))
    sae = SAE.get_sae_class_for_architecture("standard")(cfg)
    for p in sae.parameters():
        p.data = torch.randn(p.shape, generator=noise) * 0.3  # decoder rows of any norm
    x, labels = held(home)
    found = measures.measure(system_of(sae, "sae"), x, labels)["afa"]
    z = x.double()
    if normalised == "layer_norm":
        z = (z - z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + 1e-5)
    if normalised == "constant_norm_rescale":
        z = z * 32**0.5 / z.norm(dim=1, keepdim=True)
    w, b = sae.W_dec.data.double(), sae.b_dec.data.double()
    inside = z - b if cfg.apply_b_dec_to_input else z
    f = (inside @ sae.W_enc.data.double() + sae.b_enc.data.double()).relu()
    length, z_hat = (f * w.norm(dim=1)).norm(dim=1), f @ w + b
    e = ((z - b).norm(dim=1) ** 2 - length**2).abs() / length**2
    assert found["centred"]["ratio"] == pytest.approx(float((length / (z - b).norm(dim=1)).median()), rel=0.02)
    assert found["centred"]["e"] == pytest.approx(np.median(e.numpy()), rel=1e-3)
    interference = ((z_hat - b).norm(dim=1) ** 2 - length**2) / length**2
    assert found["centred"]["interference"] == pytest.approx(np.median(interference.numpy()), rel=1e-3)
    long = (length**2 + b @ b).sqrt()
    assert found["with_bias"]["ratio"] == pytest.approx(np.median((long / z.norm(dim=1)).numpy()), rel=1e-3)
    assert found["with_bias"]["over"] == pytest.approx(float((long > z.norm(dim=1)).double().mean()), abs=0.011)


def test_dots_are_the_last_tokens_of_rows(home, monkeypatch):
    d = itda.ITDA.load(home / "d")
    x, labels = held(home)
    dots = evaluate(d, home / "new.jsonl", **QUICK).systems["itda"]["zf"]
    last = [i for i in range(len(x)) if i + 1 == len(x) or labels.prompt[i + 1] != labels.prompt[i]]
    codes = d.encode(x[last])
    f = (codes.energy() + d.mean.double().square().sum()).sqrt()
    assert 1 < len(last) < len(x) / 4
    assert np.array(dots) == pytest.approx(torch.stack([x[last].double().norm(dim=1), f], 1).numpy(), rel=1e-5)
    monkeypatch.setattr(measures, "DOTS", 3)
    few = evaluate(d, home / "new.jsonl", **QUICK).systems["itda"]["zf"]
    assert 1 < len(few) <= 3 and all(dot in dots for dot in few)


@pytest.mark.parametrize("method", ["mp", "omp"])
def test_a_token_has_as_many_atoms_as_it_needs(home, method):
    d = itda.ITDA.load(home / "d")
    found = evaluate(d, home / "new.jsonl", **QUICK, tol=0.05, method=method).systems
    x, _ = held(home)
    one = [d.encode(row[None], k=32, tol=0.05, method=method) for row in x]  # token by token
    l0 = np.array([int(codes.l0()) for codes in one])
    rest = torch.cat([d.decode(codes) for codes in one]) - x
    error = (rest.double().norm(dim=1) / (x - d.mean).double().norm(dim=1)) ** 2
    needed = found["itda, tol 0.05"]
    assert needed["l0"] == pytest.approx(l0.mean()) and len(set(l0)) > 3 and needed["k"] is None
    assert needed["relative_error"] == pytest.approx(float(error.mean()), rel=1e-4)
    assert needed["tails"]["99.9 %"] <= 0.05 < found["itda"]["tails"]["99.9 %"]
    k = round(l0.mean())
    same = found[f"itda, k {k}"]
    alone = evaluate(d, home / "new.jsonl", **QUICK, k=k, method=method).systems["itda"]
    assert finite(same) == finite(alone)
    assert list(found) == ["itda", "itda, tol 0.05", f"itda, k {k}"]


def test_what_is_needed_is_encoded_in_pieces(home, monkeypatch):
    d = itda.ITDA.load(home / "d")
    x, _ = held(home)
    whole = System.needed(d, "needed", 0.05).run(x)
    monkeypatch.setattr("itda.evaluation.systems.ENTRIES", 32 * 7)
    parts = System.needed(d, "needed", 0.05).run(x)
    assert torch.equal(parts[0], whole[0])
    assert torch.equal(parts[1].indices, whole[1].indices) and torch.equal(parts[1].values, whole[1].values)
    assert whole[1].values.shape[1] == int(whole[1].l0().max())  # no unused places
    monkeypatch.setattr("itda.evaluation.systems.MOST", 2)
    assert int(System.needed(d, "needed", 0.05).run(x)[1].l0().max()) == 2


def test_tol_and_the_names_of_its_rows(home):
    d = itda.ITDA.load(home / "d")
    twin = System.of(d, "itda, tol 0.05", k=1)
    found = evaluate(d, home / "new.jsonl", **QUICK, tol=0.05, systems=[twin]).systems
    assert found["itda, tol 0.05#2"]["k"] == 1
    for wrong in (0, 1, -0.1, 2.0):
        with pytest.raises(InputError, match=r"`tol` is .*: pass a relative error between 0 and 1, such as 0.1"):
            evaluate(d, home / "nothing.jsonl", **QUICK, tol=wrong)
    itda.collect(str(home / "gpt2"), NEW, home / "acts", tokens=300, **HOW)
    stored = evaluate(d, home / "acts", tokens=200, controls=False, in_sample=True, tol=0.05)
    assert "itda, tol 0.05" in stored.systems and stored.settings["tol"] == 0.05


def test_pictures_are_drawn(home, tmp_path, capfd):
    words = ["eval", str(home / "d"), str(home / "new.jsonl"), "--tokens", "200", "--ce-tokens", "0", "--controls"]
    words = [*words[:-1], "--no-controls", "--tol", "0.05", "--out", str(tmp_path / "out.json")]
    assert main([*words, "--zf", str(tmp_path / "zf.svg"), str(tmp_path / "zf.png")]) == 0
    assert "zf.svg written" in capfd.readouterr().err and (tmp_path / "zf.png").read_bytes()[:4] == b"\x89PNG"
    first = (tmp_path / "zf.svg").read_bytes()
    result = evaluate(home / "d", home / "new.jsonl", **QUICK, tol=0.05)
    result.zf(tmp_path / "zf.svg")
    assert (tmp_path / "zf.svg").read_bytes() == first
    assert main([*words, "--zf", str(tmp_path / "zf.gif")]) == 2
    assert "`zf` is" in capfd.readouterr().err


def test_a_square_has_its_dots_and_guides():
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    zf_plot._square(axis, np.array([[1.0, 2.0], [4.0, 3.0], [np.nan, 1.0], [2.0, 0.0], [5.0, np.inf]]))
    assert axis.collections[0].get_offsets().tolist() == [[1, 2], [4, 3]]
    slopes = sorted(float(line.get_ydata()[1] / line.get_xdata()[1]) for line in axis.lines)
    assert slopes == pytest.approx([2**-0.5, 1.5**-0.5, 1.25**-0.5, 1, 0.75**-0.5, 0.5**-0.5])
    zf_plot._square(Figure().subplots(), np.zeros((0, 2)))  # of no dots
