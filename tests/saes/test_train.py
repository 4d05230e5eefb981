"""`train_sae`: the same bytes however it was interrupted, folders that SAELens and `eval` take, and bad input."""

import json

import pytest
import torch

import itda
from itda.cli.main import main
from itda.errors import InputError, Interrupted
from itda.saes import folder
from itda.saes.sae import SAE
from tests import tiny_models
from tests.saes.test_sae import refusal

TEXTS = [f"{text} {word}." for word in ("one", "two", "three", "four", "five") for text in tiny_models.DOCUMENTS]
KINDS = ["topk", "batchtopk", "relu", "top-afa", "mp"]
HOW = dict(layer=1, context_length=24, batch_rows=2, n_atoms=64, k=4, batch=64, tokens=640, buffer=256)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    tiny_models.save("gpt2", home / "gpt2")
    itda.train(str(home / "gpt2"), TEXTS, home / "d", layer=1, k=4, n_atoms=40, tokens=500, context_length=24)
    itda.collect(str(home / "gpt2"), TEXTS, home / "acts", layer=1, context_length=24, batch_rows=2, tokens=600)
    itda.train_sae(str(home / "gpt2"), TEXTS, home / "saes", kind=KINDS, **HOW)
    return home


def files(path):
    return {file.relative_to(path): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_all_kinds_are_loaded_by_saelens_and_compute_the_same(home):
    sae_lens = pytest.importorskip("sae_lens", reason="SAELens is not installed")
    itda.interop.saelens.register()
    (batch,) = itda.activations(str(home / "gpt2"), TEXTS, layer=1, context_length=24, batch_rows=10**4)
    names = {
        "topk": "topk",
        "batchtopk": "jumprelu",
        "relu": "standard",
        "top-afa": "top_afa",
        "mp": "matching_pursuit",
    }
    for kind in KINDS:
        sae, theirs = SAE.load(home / "saes" / kind), sae_lens.SAE.load_from_disk(home / "saes" / kind)
        assert sae.kind == kind and theirs.cfg.architecture() == names[kind] and sae.n_atoms == 64
        assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(64), atol=1e-5)
        with torch.no_grad():
            codes = theirs.encode(batch.activations)
            torch.testing.assert_close(sae.encode(batch.activations).dense(), codes, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(sae.reconstruct(batch.activations), theirs.decode(codes), rtol=1e-3, atol=1e-3)
        said = sae.metadata["itda"]
        assert said["tokens"] == 640 and said["provenance"]["model"]["hook_point"] == "transformer.h.1"
        assert len(said["provenance"]["stream"]["hash"]) == 64 and said["figures"]["l0"] > 0


@pytest.mark.parametrize("buffer", [256, 10**6], ids=["several buffers", "one buffer"])
@pytest.mark.parametrize("data", ["texts", "acts"])
def test_an_interrupted_training_gives_the_same_bytes(data, buffer, home, tmp_path):
    source = TEXTS if data == "texts" else home / "acts"
    how = HOW | {"buffer": buffer} | ({} if data == "texts" else {"context_length": 24})
    how = how if data == "texts" else {k: v for k, v in how.items() if k not in ("context_length", "batch_rows")}
    run = lambda out, **more: itda.train_sae(str(home / "gpt2"), source, out, kind=KINDS, **how, **more)  # noqa: E731
    run(tmp_path / "whole")
    for stops in range(1, 4):
        asked = iter(range(4))
        with pytest.raises(Interrupted) as interrupted:
            run(tmp_path / "parts", stop=lambda: next(asked) >= 2)  # noqa: B023
        assert interrupted.value.tokens == 192 * stops and (tmp_path / "parts" / folder.CHECKPOINT).is_file()
    run(tmp_path / "parts")
    assert files(tmp_path / "whole") == files(tmp_path / "parts")
    assert "holds a trained SAE already" in refusal(run, tmp_path / "parts")


def test_one_that_was_killed_while_it_saved_goes_on(home, tmp_path, monkeypatch):
    run = lambda out: itda.train_sae(str(home / "gpt2"), TEXTS, out, kind=KINDS[:2], **HOW)  # noqa: E731
    run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        save = SAE.save

        def killed(sae, path, **about):
            if sae.kind == "batchtopk":
                raise RuntimeError("killed")
            save(sae, path, **about)

        patch.setattr(SAE, "save", killed)
        with pytest.raises(RuntimeError):
            run(tmp_path / "parts")
    run(tmp_path / "parts")
    assert files(tmp_path / "whole") == files(tmp_path / "parts")


def test_it_learns(home, tmp_path):
    (found,) = itda.train_sae(str(home / "gpt2"), TEXTS, tmp_path / "x", kind="topk", **HOW | {"tokens": 20_000})
    first = SAE.load(home / "saes" / "topk").metadata["itda"]["figures"]["fvu"]
    assert found.fvu < 0.5 * first and found.rounds > 5 and found.l0 == pytest.approx(4, rel=0.01)
    (steered,) = itda.train_sae(str(home / "gpt2"), TEXTS, tmp_path / "r", kind="relu", **HOW | {"tokens": 60_000})
    assert steered.l0 == pytest.approx(4, rel=0.3)


def test_it_begins_with_the_atoms_of_a_dictionary(home, tmp_path):
    d = itda.ITDA.load(home / "d")
    itda.train_sae(home / "gpt2", TEXTS, tmp_path / "x", kind="mp", from_itda=d, **HOW | {"tokens": 64, "lr": 0.0})
    sae = SAE.load(tmp_path / "x")
    torch.testing.assert_close(sae.W_dec[: len(d)], d.atoms)
    torch.testing.assert_close(sae.b_dec, d.mean)


def test_the_command_line_trains_and_measures(home, tmp_path, capfd):
    (home / "new.jsonl").write_text("\n".join(json.dumps({"text": text.upper()}) for text in TEXTS))
    words = [str(home / "gpt2"), str(home / "new.jsonl"), "--layer", "1", "--kind", "topk", "relu", "--k", "3"]
    words += ["--n-atoms", "32", "--tokens", "4096", "--batch", "128", "--context-length", "24"]
    words += ["--out", str(tmp_path / "saes")]
    assert main(["sae", *words, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert [each["kind"] for each in found] == ["topk", "relu"] and found[0]["l0"] == pytest.approx(3, rel=0.01)
    words = ["eval", str(home / "d"), str(home / "new.jsonl"), "--tokens", "300", "--ce-tokens", "60", "--no-controls"]
    assert main([*words, "--json", "--sae", *(each["path"] for each in found)]) == 0
    assert json.loads(capfd.readouterr().out)["systems"]["topk"]["l0"] <= 3


def test_bad_input_is_said_in_one_sentence(home, tmp_path):
    def says(data=TEXTS, out="x", **changes):
        return refusal(itda.train_sae, str(home / "gpt2"), data, tmp_path / out, **HOW | changes)

    assert "`k` has no effect with top-afa" in says(kind="top-afa")
    assert "say how many with `k`" in says(kind=["mp", "topk"], k=None)
    assert "`k` is 65, and there are 64 latents" in says(k=65)
    assert "`afa` is -1.0: pass a number, 0 or more" in says(kind=["top-afa", "topk"], afa=-1.0)
    assert "`afa` is of top-afa alone" in says(afa=0.1)
    assert "`kind` is 'tipk': choose some of topk" in says(kind="tipk")
    assert "needs `l1`" in says(kind="relu", k=None)
    assert "fewer than the 64 of one batch" in says(tokens=63)
    assert "one hook point at a time" in says(layer=[0, 1])
    assert not (tmp_path / "x").exists()
    assert "activations, and a batch has 64" in says(["a few words only"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    assert "holds 'notes', which is no part of an SAE" in says(out="mine")
    assert "holds 'notes', which is no SAE's folder" in says(out="mine", kind=["topk", "mp"])
    other = itda.ITDA.load(home / "d")
    assert "was made for transformer.h.1, and this is transformer.h.0" in says(layer=0, from_itda=other)
    wide = itda.build(torch.randn(100, 9), k=2, n_atoms=10)
    assert "is of width 9, and the activations have 32" in says(from_itda=wide)
    from itda.locks import locked

    with locked(tmp_path / "busy"):
        import threading

        caught = []
        thread = threading.Thread(target=lambda: caught.append(says(out="busy")))
        thread.start()
        thread.join()
    assert "Another process is training into" in caught[0]


def test_what_is_not_finite_ends_it_and_the_checkpoint_stays(home, tmp_path, monkeypatch):
    from itda.saes import fit

    run = lambda **more: itda.train_sae(str(home / "gpt2"), TEXTS, tmp_path / "x", kind="topk", **HOW, **more)  # noqa: E731
    asked = iter(range(9))
    with pytest.raises(Interrupted):
        run(stop=lambda: next(asked) >= 2)
    kept = files(tmp_path / "x")
    with monkeypatch.context() as patch:
        patch.setattr(fit.Batches, "__iter__", lambda self: iter([torch.full((64, 32), torch.nan)]))
        assert "Activations that are not finite came at step 4, after 192 tokens" in refusal(run)
    with monkeypatch.context() as patch:
        patch.setattr(fit.Learner, "backward", lambda *_: fit.Figures(torch.inf, 1.0, 1.0))
        assert "The loss of topk is inf at step 4, after 192 tokens" in refusal(run)
    assert files(tmp_path / "x") == kept
    said = refusal(itda.train_sae, str(home / "gpt2"), TEXTS, tmp_path / "x", kind="topk", **HOW | {"tokens": 704})
    assert "tokens = 640, and now it is 704" in said
    assert "The text has changed since this training began" in refusal(
        itda.train_sae, str(home / "gpt2"), [text.upper() for text in TEXTS], tmp_path / "x", kind="topk", **HOW
    )
    assert files(tmp_path / "x") == kept
    run()
    with pytest.raises(InputError, match="holds a trained SAE already"):
        run()
