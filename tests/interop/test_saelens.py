"""SAELens: what it computes from our exports and says of them, our architecture in it, and its SAEs in our tables."""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import sae_lens
import torch
from datasets import Dataset
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.standard_sae import StandardSAEConfig
from sae_lens.saes.topk_sae import TopKSAEConfig
from sae_lens.training.activation_scaler import ActivationScaler

import itda
from itda import locks, metrics
from itda.cli.main import main
from itda.codes import Codes
from itda.errors import InputError
from itda.evaluation.evaluate import evaluate
from itda.interop import saelens
from itda.models import loading
from itda.models.splice import spliced
from itda.saes import folder
from itda.text.prompts import TokenStream
from tests import tiny_models

LENGTH, HOOK = 24, "blocks.2.hook_resid_post"
TEXTS = [f"{text} {word}." for word in ("one", "two", "three", "four", "five") for text in tiny_models.DOCUMENTS]
NEW = [f"{a} {b}".swapcase() for a in tiny_models.DOCUMENTS for b in tiny_models.DOCUMENTS[:4]]
load = sae_lens.SAE.load_from_disk

# What a user without this library does: it is given the folders, and nothing of it is imported.
STOCK = """
import sys, torch, sae_lens
x, found = torch.load("x.pt"), {}
for name in sys.argv[1:]:
    try:
        sae = sae_lens.SAE.load_from_disk(name)
        codes, kind = sae.encode(x).detach(), type(sae).__name__
        found[name] = codes, sae.decode(codes).detach(), kind, sae.cfg.metadata.to_dict()
    except Exception as error:
        found[name] = repr(error)
assert "itda" not in sys.modules
torch.save(found, "found.pt")
"""


def apart(a, b):
    """The largest relative distance of two rows."""
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max().detach())


def train(model, out, **settings):
    settings = {"layer": 2, "k": 6, "context_length": LENGTH, "batch_rows": 2, "tokens": 700, **settings}
    itda.train(model, TEXTS, out, **settings)
    return itda.ITDA.load(out)


def sae_of(kind, folder, d=32, **metadata):
    """A random SAE of SAELens' own, saved by it."""
    config, own = {"topk": (TopKSAEConfig, {"k": 5}), "standard": (StandardSAEConfig, {})}[kind]
    cfg = config(d_in=d, d_sae=64, metadata=SAEMetadata(hook_name=HOOK, **metadata), **own)
    sae, noise = sae_lens.SAE.get_sae_class_for_architecture(kind)(cfg), torch.Generator().manual_seed(1)
    for p in sae.parameters():
        p.data = torch.randn(p.shape, generator=noise) * 0.3
    sae.save_model(folder)
    return sae


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model on disk, a dictionary of it, another text, and activations there."""
    home = tmp_path_factory.mktemp("home")
    tiny_models.save("gpt2", home / "model")
    train(home / "model", home / "d", threshold=0.4, center=False)
    (home / "new.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in NEW), encoding="utf-8")
    settings = dict(layer=2, context_length=LENGTH, special_tokens=True)
    x = torch.cat([batch.activations for batch in itda.activations(str(home / "model"), NEW, **settings)])
    torch.save(torch.cat([x, x[:50] / 1e5]), home / "x.pt")  # small ones too: no threshold but a relative one is right
    return home


@pytest.fixture(scope="module")
def x(home):
    return torch.load(home / "x.pt")


@pytest.fixture(scope="module")
def dictionaries(home):
    """By name; their codes differ in sign, centring and method."""
    d, centred = itda.ITDA.load(home / "d"), train(home / "model", home / "c", threshold=0.3)
    named = {"signed": d, "centred": centred, "nonneg": replace(centred, cfg=centred.cfg | {"nonneg": True})}
    return named | {method: replace(centred, cfg=centred.cfg | {"method": method}) for method in ("omp", "gp")}


@pytest.fixture(scope="module")
def stock(home, dictionaries):
    """What SAELens alone makes of our exports, by name of the dictionary; "own" is of our architecture."""
    names = ["signed", "centred", "nonneg"]
    assert [saelens.export(dictionaries[name], home / name) for name in names] == [home / name for name in names]
    saelens.export(dictionaries["signed"], home / "own", architecture="itda")
    subprocess.run([sys.executable, "-c", STOCK, *names, "own"], cwd=home, check=True, capture_output=True)
    return torch.load(home / "found.pt")


@pytest.mark.parametrize("name", ["signed", "centred", "nonneg"])
def test_saelens_alone_computes_our_codes_and_reconstructions(name, stock, dictionaries, x):
    d, (found, x_hat, kind, _) = dictionaries[name], stock[name]
    codes, n = d.encode(x), len(d)
    dense = codes.dense()
    assert kind == "MatchingPursuitSAE" and bool((found >= 0).all())
    assert found.shape == (len(x), n if name == "nonneg" else 2 * n)
    assert bool((dense < 0).any()) is (name != "nonneg") and (d.mean is None) is (name == "signed")
    assert apart(found if name == "nonneg" else found[:, :n] - found[:, n:], dense) < 1e-5
    assert apart(x_hat, d.decode(codes)) < 1e-5


def test_the_hook_point_and_the_labels_survive_in_the_metadata(stock, dictionaries, home):
    for name in ("signed", "nonneg"):
        d, meta = dictionaries[name], stock[name][3]
        assert meta["hook_name"] == HOOK and meta["hf_hook_name"] == "transformer.h.2"
        assert meta["model_name"] == str(home / "model") and meta["context_size"] == LENGTH
        assert meta["prepend_bos"] is True and meta["exclude_special_tokens"] is True
        labels = [[*pair, d.labels.text(i)] for i, pair in enumerate(d.labels.pairs().tolist())]
        settings = {"k": 6, "split": name == "signed", "stream_hash": d.cfg["stream"]["hash"]}
        digest = meta["itda"].pop("sha256")
        assert len(digest) == 64 and int(digest, 16)
        assert meta["itda"] == {**settings, "labels": labels} and "⟦" in labels[0][2] and len(labels) == len(d)


def test_a_hook_point_that_is_no_block_keeps_its_name(home, tmp_path):
    d = train(home / "model", tmp_path / "mlp", layer=None, hook="transformer.h.1.mlp", threshold=0.5)
    assert load(saelens.export(d, tmp_path / "sae")).cfg.metadata.hook_name == "transformer.h.1.mlp"


def test_saelens_refuses_our_architecture_before_it_is_registered(stock):
    assert stock["own"] == "KeyError('itda')"


@pytest.mark.parametrize("name", ["signed", "centred", "nonneg", "omp", "gp"])
def test_our_architecture_in_saelens_has_the_codes_of_the_dictionary(name, dictionaries, x, tmp_path):
    d, (sae_class, cfg_class) = dictionaries[name], saelens.register()
    sae = load(saelens.export(d, tmp_path / "sae", architecture="itda"))
    assert type(sae) is sae_class and type(sae.cfg) is cfg_class and sae.W_dec.shape == d.atoms.shape
    codes = d.encode(x)
    assert torch.equal(sae.encode(x), codes.dense())
    rows = x[: len(x) // 4 * 4].view(2, -1, 2, 32)
    assert torch.equal(sae.encode(rows), d.encode(rows).dense())
    out, cache = sae.run_with_cache(x)
    assert torch.equal(cache["hook_sae_acts_post"], codes.dense()) and torch.equal(cache["hook_sae_recons"], out)
    assert apart(out, d.decode(codes)) < 1e-5
    without = sae.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_post", lambda acts, hook: acts * 0)])
    assert torch.equal(without, (torch.zeros(32) if d.mean is None else d.mean).expand_as(x))
    sae.save_model(tmp_path / "again")
    for other in (load(tmp_path / "again"), saelens.as_sae(d)):
        kept = [one.cfg.to_dict() for one in (other, sae)]
        for cfg in kept:
            cfg["metadata"]["itda"].pop("sha256", None)  # of the files, which what is in memory has not
        assert type(other) is sae_class and kept[0] == kept[1]
        assert other.state_dict().keys() == {"W_dec", "b_dec"}
        assert torch.equal(other.W_dec, sae.W_dec) and torch.equal(other.b_dec, sae.b_dec)


def run_saelens(bridge, sae, ids, **settings):
    """All figures of `run_evals` on the rows `ids`; as long as its context, they pass as they are, in one batch."""
    data = Dataset.from_dict({"input_ids": ids.tolist()})
    store = sae_lens.ActivationsStore.from_sae(bridge, sae, data, context_size=LENGTH, streaming=False, total_tokens=1)
    config = get_eval_everything_config(len(ids), 1, 1)
    found, _ = run_evals(sae, store, bridge, ActivationScaler(), config, **settings)
    return {name: value for part in found.values() for name, value in part.items()}


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def judged(request, home, tmp_path_factory):
    """A dictionary, three SAEs by name, the model as SAELens has it and as we have it, text, and its rows, all full."""
    out = tmp_path_factory.mktemp(request.param)
    model = tiny_models.save(request.param, out / "model")
    d = train(model, out / "d", threshold=0.4, center=request.param == "llama")  # one of each
    ours = loading.language_model(model, hooks=2)
    texts = [text for text in NEW if len(ours.tokenizer(text).input_ids) > LENGTH]
    rows = list(TokenStream(texts, ours.tokenizer, context_length=LENGTH, truncate=True))
    bridge = SAETransformerBridge.boot_transformers(str(model), device="cpu")
    bridge.enable_compatibility_mode(no_processing=True)  # without it, it knows no "hook_resid_post"
    sae_of("topk", out / "topk", d.d, prepend_bos=True)
    saes = {"split": load(saelens.export(d, out / "split")), "own": saelens.as_sae(d), "topk": load(out / "topk")}
    return d, saes, bridge, ours, texts, rows, torch.from_numpy(np.stack([row.ids for row in rows]))


def test_run_evals_says_what_evaluate_says(judged):
    d, saes, bridge, ours, texts, rows, ids = judged
    x = bridge.run_with_cache(ids, names_filter=[HOOK], stop_at_layer=3)[1][HOOK].flatten(0, 1)
    settings = dict(context_length=LENGTH, truncate=True, special_tokens=True)
    (batch,) = itda.activations(ours, texts, layer=2, batch_rows=99, **settings)
    assert len(rows) >= 20 and x.shape == batch.activations.shape and apart(x, batch.activations) < 1e-5

    # With nothing excluded SAELens reads and replaces every token, as we do with `special_tokens`. Its explained
    # variance is 1 - FVU, global and centred like ours; its ablation is the zero one, and its score the same quotient.
    # It takes means in float32, so that losses of 6 nats agree to 1e-6, and the score to that over what the ablation
    # changes, which is 0.02 nats in the random GPT-2. Its KL counts the last token of a row too, which predicts none.
    systems = [saelens.system_of(sae, name) for name, sae in saes.items()]
    result = evaluate(d, texts, ce_tokens=None, controls=False, systems=systems, **settings)
    clean, zero = result.clean["clean"], result.clean["zero"]
    assert result.tokens == len(x)
    for name, sae in saes.items():
        theirs, mine = run_saelens(bridge, sae, ids, exclude_special_tokens=False), result.systems[name]
        assert 1 - theirs["explained_variance"] == pytest.approx(mine["fvu"], rel=2e-6)
        assert theirs["cossim"] == pytest.approx(mine["cosine"], abs=1e-6)
        assert theirs["l0"] == pytest.approx(mine["l0"], rel=1e-6)
        assert theirs["ce_loss_without_sae"] == pytest.approx(clean, abs=2e-6)
        assert theirs["ce_loss_with_ablation"] == pytest.approx(zero, abs=2e-6)
        assert theirs["ce_loss_with_sae"] == pytest.approx(mine["ce"]["loss"], abs=2e-6)
        assert theirs["ce_loss_score"] == pytest.approx(mine["ce"]["score"], abs=4e-6 / abs(zero - clean))
    split, own = result.systems["split"], result.systems["own"]
    for row in (split, own):
        assert row["fvu"] == pytest.approx(result.fvu, rel=1e-5)
        assert row["ce"]["loss"] == pytest.approx(result.ce["loss"], abs=2e-6)
    # An atom that the pursuit of a token took with either sign is two latents of the split export, and one of ours.
    z = saes["split"].encode(batch.activations)
    twice = ((z[:, : len(d)] > 0) & (z[:, len(d) :] > 0)).sum(1).double().mean().item()
    assert own["l0"] == result.l0 and split["l0"] == pytest.approx(result.l0 + twice) and twice > 0


def test_without_special_tokens_run_evals_predicts_and_ablates_others(judged):
    # Both then leave BOS out of what is measured and replaced. SAELens also leaves out the loss of the token after it,
    # and its ablation zeroes it all the same: that is all that the scores differ in.
    d, saes, bridge, ours, texts, rows, ids = judged
    theirs = run_saelens(bridge, saes["own"], ids)
    result = evaluate(d, texts, truncate=True, ce_tokens=None, controls=False)
    assert 1 - theirs["explained_variance"] == pytest.approx(result.fvu, rel=2e-6)
    assert theirs["l0"] == pytest.approx(result.l0, rel=1e-6)
    hook = ours.hook_points[0]
    kept = spliced(ours, rows, hook, {"with_sae": d.reconstruct})
    ablated = spliced(ours, rows, hook, {"with_ablation": torch.zeros_like}, special_tokens=True)
    losses = {"without_sae": kept.cross_entropy["clean"], **kept.cross_entropy, **ablated.cross_entropy}
    for name in ("without_sae", "with_sae", "with_ablation"):
        assert theirs[f"ce_loss_{name}"] == pytest.approx(losses[name][kept.position > 1].mean(), abs=2e-6)
    assert theirs["ce_loss_score"] != pytest.approx(result.ce["score"], rel=1e-3)


@pytest.mark.parametrize("kind", ["topk", "standard"])
def test_an_sae_of_saelens_is_measured_as_it_computes(kind, home, tmp_path, monkeypatch):
    sae = sae_of(kind, tmp_path / kind)
    system = saelens.load_sae(tmp_path / kind)
    assert system.name == kind == saelens.load_sae(f"{tmp_path / kind}/").name and system.atoms.shape == (64, 32)
    assert system.k == (5 if kind == "topk" else None) and torch.allclose(system.atoms.norm(dim=1), torch.ones(64))
    monkeypatch.chdir(tmp_path / kind)
    assert saelens.load_sae(".").name == kind and saelens.load_sae(".", "it").name == "it"
    result = evaluate(home / "d", home / "new.jsonl", ce_tokens=0, controls=False, systems=[system])
    x = torch.cat([b.activations for b in itda.activations(str(home / "model"), NEW, layer=2, context_length=LENGTH)])
    with torch.no_grad():
        z = sae.encode(x)
        x_hat = sae.decode(z)
    row = result.systems[kind]
    assert result.tokens == len(x) > 600  # more than one part of `run`
    assert row["fvu"] == pytest.approx(metrics.fvu(x.double(), x_hat.double()), rel=1e-5) != result.fvu
    assert row["l0"] == pytest.approx((z != 0).sum(1).double().mean().item())
    assert row["use"] == (z != 0).sum(0).tolist() and row["n_atoms"] == 64 and row["negative"] == 0


def test_sparse_codes_are_the_dense_ones(dictionaries):
    dense = torch.randn(40, 9, generator=torch.Generator().manual_seed(0))
    dense[dense.abs() < 0.8] = 0.0
    dense[3] = 0.0
    codes = Codes.of_dense(dense)
    assert torch.equal(codes.dense(), dense) and codes.indices.shape[1] == (dense != 0).sum(1).max() < 9
    assert bool((codes.values.abs().diff(dim=1) <= 0).all()) and bool((codes.indices[codes.values == 0] == 0).all())
    for nothing in (dense[:0], torch.zeros(2, 9)):
        assert torch.equal(Codes.of_dense(nothing).dense(), nothing)
    d = dictionaries["signed"]
    system, x = saelens.system_of(saelens.as_sae(d), "own"), torch.zeros(1100, 32)
    x[:600] = torch.randn(600, 32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(system.run(x)[1].dense(), d.encode(x).dense())  # in parts, the last one without a code
    x_hat, codes = system.run(x[:0])
    assert x_hat.shape == (0, 32) and codes.dense().shape == (0, len(d))


def test_the_command_line_measures_saes_and_exports(home, tmp_path, capfd):
    for kind in ("topk", "standard"):
        sae_of(kind, tmp_path / kind)
    words = ["eval", str(home / "d"), str(home / "new.jsonl"), "--tokens", "200", "--ce-tokens", "60", "--no-controls"]
    assert main([*words, "--json", "--sae", str(tmp_path / "topk"), str(tmp_path / "standard")]) == 0
    found = json.loads(capfd.readouterr().out)["systems"]
    systems = [saelens.load_sae(tmp_path / kind) for kind in ("topk", "standard")]
    result = evaluate(home / "d", home / "new.jsonl", tokens=200, ce_tokens=60, controls=False, systems=systems)
    assert list(found) == ["itda", "topk", "standard"] and found == result.to_json()["systems"]
    assert found["topk"]["l0"] <= 5 < found["standard"]["l0"] and found["topk"]["ce"]["loss"] > 0
    assert main([*words, "--sae", str(tmp_path / "gone")]) == 2 and "is not there" in capfd.readouterr().err

    out, n = tmp_path / "out", len(itda.ITDA.load(home / "d"))
    words = ["export", str(home / "d"), "--to", "saelens", "--out", str(out)]
    assert main([*words, "--json"]) == 0
    said = {"path": str(out), "architecture": "matching_pursuit", "n_atoms": n, "latents": 2 * n}
    said["signs"] = {"positive": [0, n], "negative": [n, 2 * n]}
    shown = capfd.readouterr()
    assert json.loads(shown.out) == said and load(out).W_dec.shape == (2 * n, 32)
    assert f"load it with: sae_lens.SAE.load_from_disk({str(out)!r})" in shown.err
    assert main([*words, "--architecture", "itda"]) == 0
    shown = capfd.readouterr()
    saelens.register()
    assert f"{n} latents of {n} atoms" in shown.out and load(out).W_dec.shape == (n, 32)
    assert "load it after `itda.interop.saelens.register()` with" in shown.err


def refusal(function, *args, **settings):
    with pytest.raises(InputError) as error:
        function(*args, **settings)
    sentence = str(error.value)
    assert sentence.endswith(".") and "\n" not in sentence and ". " not in sentence
    return sentence


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(dictionaries, home, tmp_path):
    d, out, file = dictionaries["signed"], tmp_path / "out", tmp_path / "file"
    assert "method 'omp'" in refusal(saelens.export, dictionaries["omp"], out)
    assert "method 'gp'" in refusal(saelens.export, dictionaries["gp"], out)
    assert "'lista'; choose one of 'matching_pursuit', 'itda'" in refusal(saelens.export, d, out, architecture="lista")
    assert not out.exists()
    file.write_text("mine")
    assert "is a file" in refusal(saelens.export, d, file) and "is a file" in refusal(saelens.export, d, file / "sae")
    assert file.read_text() == "mine"
    assert "'config.json', which is no part" in refusal(saelens.export, d, home / "model")
    assert "'atoms.safetensors'" in refusal(saelens.export, d, home / "d") and len(itda.ITDA.load(home / "d")) == len(d)


def test_names_that_no_folder_can_have_are_said_in_one_sentence(dictionaries, home, tmp_path, capfd):
    d, long = dictionaries["signed"], "x" * 300
    for name in (long, f"new/{long}", f"{long}/sae"):
        for write in (lambda path: saelens.export(d, path), d.save):
            assert refusal(write, tmp_path / name).endswith(
                "could not be used (File name too long): choose another place."
            )
        assert "is not there: give the folder of an SAE" in refusal(saelens.load_sae, tmp_path / name)
        assert "There is no folder" in refusal(itda.report.summary, tmp_path / name)
    for write in (lambda path: saelens.export(d, path), d.save, lambda path: itda.train("no", "no", path, layer=1)):
        assert "has a NUL in it, which no path can have" in refusal(write, tmp_path / "a\0b")
    assert not list(tmp_path.iterdir())
    assert main(["export", str(home / "d"), "--to", "saelens", "--out", str(tmp_path / long)]) == 2
    assert capfd.readouterr().err.endswith("could not be used (File name too long): choose another place.\n")


def test_an_export_replaces_an_export_and_no_other_sae(dictionaries, tmp_path, monkeypatch):
    d, centred = dictionaries["signed"], dictionaries["centred"]
    out = saelens.export(d, tmp_path / "sae")
    assert torch.equal(load(saelens.export(centred, out)).b_dec, centred.mean)
    trained = sae_of("topk", tmp_path / "trained")
    assert "cfg.json that is not of an export" in refusal(saelens.export, d, tmp_path / "trained")
    assert torch.equal(load(tmp_path / "trained").W_dec, trained.W_dec)

    def full(path, chunks, write=folder.write_file):
        if path.name == "cfg.json":
            raise InputError("The disk is full.")
        write(path, chunks)

    monkeypatch.setattr(folder, "write_file", full)
    refusal(saelens.export, d, out)
    assert not (out / "cfg.json").exists()  # else new weights would be read with the old settings
    monkeypatch.undo()
    assert not load(saelens.export(d, out)).b_dec.any()


def test_what_lies_in_a_folder_is_judged_when_nobody_else_exports_into_it(dictionaries, tmp_path, monkeypatch):
    d, out = dictionaries["signed"], saelens.export(dictionaries["signed"], tmp_path / "sae")

    def listed(path, is_leftover=folder._is_leftover):
        (out / ".cfg.json.tmp-0123456789abcdef").unlink(missing_ok=True)  # moved by its writer since it was listed
        return is_leftover(path)

    with monkeypatch.context() as patch:
        patch.setattr(folder, "_is_leftover", listed)
        (out / ".cfg.json.tmp-0123456789abcdef").touch()
        saelens.export(d, out)
    with ThreadPoolExecutor(1) as thread:
        with locks.locked(out):
            (out / "cfg.json").write_text("{}")  # what another export is about to replace
            waiting = thread.submit(saelens.export, d, out)
            time.sleep(0.3)
            (out / "cfg.json").unlink()
        assert load(waiting.result()).W_dec.shape[1] == d.d


def test_what_is_no_sae_for_the_dictionary_is_refused(home, tmp_path):
    def says(file, old, new):
        path = tmp_path / str(hash((file, old))) / file
        sae_of("topk", path.parent)
        path.write_bytes(path.read_bytes().replace(old, new) if old else new)
        return refusal(saelens.load_sae, path.parent)

    sae_of("topk", tmp_path / "wide", d=48)
    weights = (tmp_path / "wide" / "sae_weights.safetensors").read_bytes()
    assert f"{tmp_path / 'nowhere'} is not there: give the folder" in refusal(saelens.load_sae, tmp_path / "nowhere")
    assert f"{home} holds no cfg.json" in refusal(saelens.load_sae, home)
    assert "is an ITDA, and an SAE in SAELens' format was wanted" in refusal(saelens.load_sae, home / "d")
    assert "SafetensorError" in says("sae_weights.safetensors", b"", weights[:-100])
    assert "JSONDecodeError" in says("cfg.json", b"{", b"no json")
    assert "KeyError: 'tip-top'" in says("cfg.json", b'"topk"', b'"tip-top"')
    assert "RuntimeError" in says("cfg.json", b'"d_sae": 64', b'"d_sae": 65')
    worn = sae_of("topk", tmp_path / "worn")
    worn.W_dec.data[3, 4] = torch.nan
    worn.save_model(tmp_path / "worn")
    assert "numbers in W_dec that are not finite" in refusal(saelens.load_sae, tmp_path / "worn")
    out = saelens.export(itda.ITDA.load(home / "d"), tmp_path / "out")
    cfg = json.loads((out / "cfg.json").read_text())
    (out / "cfg.json").write_text(json.dumps(cfg | {"max_iterations": "ten"}))
    assert "SAELens cannot run 'out' (TypeError: " in refusal(saelens.load_sae(out).run, torch.ones(2, 32))
    wide = saelens.load_sae(tmp_path / "wide")
    said = refusal(evaluate, home / "d", home / "new.jsonl", controls=False, systems=[wide], ce_tokens=0)
    assert "wide is for activations of width 48, and these have 32" in said
