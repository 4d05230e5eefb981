"""Evaluation on held-out text: every figure against a plain computation, which text is held out, and its controls."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

import itda
from itda import metrics
from itda.cli.main import main
from itda.errors import InputError
from itda.evaluation import heldout, verdict
from itda.evaluation.evaluate import evaluate
from itda.evaluation.measures import Bootstrap, measure
from itda.evaluation.splicing import cross_entropy
from itda.evaluation.systems import System
from itda.labels import Labels
from itda.models import loading
from itda.models.splice import Spliced
from itda.text.prompts import Row, TokenStream
from tests import tiny_models

LENGTH = 24
TEXTS = [f"{text} {word}." for word in ("one", "two", "three", "four", "five") for text in tiny_models.DOCUMENTS]
QUICK = dict(tokens=300, ce_tokens=0, controls=False)


def texts(folder, name, documents):
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in documents), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model on disk, a text, another one, and a dictionary built on the first half of the text's documents."""
    home = tmp_path_factory.mktemp("home")
    tiny_models.save("gpt2", home / "model")
    tiny_models.save("gpt2", home / "other", seed=3)
    tiny_models.save("bert", home / "bert")
    texts(home, "train", TEXTS)
    texts(home, "new", [text.upper() for text in tiny_models.DOCUMENTS] + ["Something else, of a second document."])
    settings = dict(layer=2, k=6, threshold=0.2, context_length=LENGTH, batch_rows=2, center=False)
    itda.train(home / "model", home / "train.jsonl", home / "d", tokens=700, **settings)
    itda.train(home / "model", home / "train.jsonl", home / "all", tokens=None, **settings)
    itda.train(home / "bert", home / "train.jsonl", home / "d-bert", tokens=700, **settings)
    return home


def activations(home, data, **settings):
    settings = {"layer": 2, "context_length": LENGTH, **settings}
    batches = list(itda.activations(str(home / "model"), data, **settings))
    return torch.cat([b.activations for b in batches]), Labels.concat([b.labels for b in batches])


def test_figures_are_those_of_a_plain_computation(home):
    d = itda.ITDA.load(home / "d")
    result = evaluate(d, home / "new.jsonl", tokens=10_000, ce_tokens=0, controls=False)
    x, labels = activations(home, home / "new.jsonl")
    codes = d.encode(x)
    x_hat = d.decode(codes).double()
    x = x.double()
    error = metrics.relative_error(x, x_hat).numpy()
    assert result.tokens == len(x) and result.fvu == pytest.approx(metrics.fvu(x, x_hat), rel=1e-6)
    assert result.relative_error == pytest.approx(error.mean(), rel=1e-6)
    assert result.tails == pytest.approx({"50 %": np.quantile(error, 0.5), "90 %": np.quantile(error, 0.9),
        "99 %": np.quantile(error, 0.99), "99.9 %": np.quantile(error, 0.999)}, rel=1e-6)  # fmt: skip
    assert result.above == pytest.approx((error > 0.2).mean()) and 0 < result.above < 1
    assert result.cosine == pytest.approx(float(torch.cosine_similarity(x, x_hat, dim=1).mean()), rel=1e-6)
    assert result.l0 == pytest.approx(float(codes.l0().double().mean()))
    dense = codes.dense()
    assert result.use == (dense != 0).sum(0).tolist()
    assert result.alive == pytest.approx(float((dense != 0).any(0).double().mean()))
    few = evaluate(d, home / "new.jsonl", tokens=9, ce_tokens=0, controls=False)
    assert (
        few.tokens == 9 and few.alive == pytest.approx(float((dense[:9] != 0).any(0).double().mean())) and few.alive < 1
    )
    assert result.negative == pytest.approx(float((dense < 0).sum() / (dense != 0).sum()))
    for part in result.positions:
        there = (labels.position >= part["first"]) & (labels.position <= part["last"])
        assert part["scored"] == there.sum()
        if part["first"] > 1:
            assert part["fvu"] == pytest.approx(metrics.fvu(x[there], x_hat[there]), rel=1e-6)
    assert [part["share"] for part in result.positions if not part["scored"]] == [None]  # position 0
    shares = [(part["scored"], part["share"]) for part in result.positions if part["scored"]]
    mean = sum(n * share for n, share in shares) / sum(n for n, _ in shares)
    assert len(shares) > 3 and mean == pytest.approx(result.fvu, rel=1e-6)
    every, _ = activations(home, home / "new.jsonl", special_tokens=True)
    both = metrics.fvu(every.double(), d.reconstruct(every).double())
    assert result.with_position_0["fvu"] == pytest.approx(both, rel=1e-6) != pytest.approx(result.fvu, rel=1e-2)


def test_above_is_of_the_loss_that_admits(home):
    itda.train(home / "model", home / "train.jsonl", home / "d-centred", tokens=700, layer=2, k=6,
               threshold=0.3, context_length=LENGTH, batch_rows=2)  # fmt: skip
    d = itda.ITDA.load(home / "d-centred")
    result = evaluate(d, home / "new.jsonl", **{**QUICK, "tokens": 10_000})
    x, _ = activations(home, home / "new.jsonl")
    rest = x - d.mean
    loss = metrics.relative_error(rest.double(), d.encode(x).decode(d.atoms).double())
    assert result.above == pytest.approx(float((loss > 0.3).double().mean())) and 0 < result.above < 1
    same = replace(System.of(d, "same"), mean=None)  # what an SAE knows of the dictionary beside it
    lost = replace(same, name="lost", run=lambda x: (x * torch.nan, d.encode(x)))
    beside = evaluate(d, home / "new.jsonl", **{**QUICK, "tokens": 10_000}, systems=[same, lost]).systems
    assert beside["same"]["above"] == result.above and beside["lost"]["above"] == 1
    d.cfg["selected"] = {"from": 4 * len(d)}  # whose threshold was that of so many
    assert evaluate(d, home / "new.jsonl", **QUICK).above is None


def test_names_of_levels_are_nobodys(home):
    d = itda.ITDA.load(home / "d")
    names = ("mean", "zero", "clean", "activations")
    twins = [System.of(d, name, k=1) for name in names]
    result = evaluate(d, home / "new.jsonl", tokens=100, ce_tokens=60, controls=False, systems=twins)
    plain = evaluate(d, home / "new.jsonl", tokens=100, ce_tokens=60, controls=False)
    assert result.ce == plain.ce and result.clean == plain.clean
    assert list(result.systems) == ["itda", *(f"{name}#2" for name in names)]


def test_coherence_is_that_of_all_pairs():
    atoms = itda.normalize(torch.randn(300, 7, generator=torch.Generator().manual_seed(0)))
    cosines = (atoms.double() @ atoms.double().T).abs()[torch.ones(300, 300).triu(1).bool()].numpy()
    found = metrics.coherence(atoms)
    assert found["max"] == pytest.approx(cosines.max(), rel=1e-5)
    assert found["mean"] == pytest.approx(cosines.mean(), rel=1e-5)
    assert found["99.9 %"] == pytest.approx(np.quantile(cosines, 0.999), rel=1e-3)
    assert all(np.isnan(value) for value in metrics.coherence(atoms[:1]).values())


def test_the_score_of_what_is_spliced_in_is_eq_7(home):
    result = evaluate(home / "d", home / "new.jsonl", tokens=400, ce_tokens=200, controls=["gaussian"])
    ce, clean = result.ce, result.clean
    assert ce["score"] == pytest.approx((clean["zero"] - ce["loss"]) / (clean["zero"] - clean["clean"]))
    assert ce["score_mean"] == pytest.approx((clean["mean"] - ce["loss"]) / (clean["mean"] - clean["clean"]))
    assert ce["kl"] > 0 and ce["score_interval"][0] <= ce["score"] <= ce["score_interval"][1]
    assert result.systems["gaussian"]["ce"]["loss"] != ce["loss"]
    d, model = itda.ITDA.load(home / "d"), loading.language_model(home / "model", hooks=2)
    rows = list(TokenStream(home / "new.jsonl", model.tokenizer, context_length=LENGTH))
    losses, count = [], 0
    for row in rows:
        if count >= 200:
            break
        ids = torch.from_numpy(row.ids)[None]

        def put_back(x):
            out = x.clone()
            out[0, 1:] = d.reconstruct(x[0, 1:])
            return out

        logits = model.logits(ids, torch.ones_like(ids), {"transformer.h.2": put_back})
        losses += torch.nn.functional.cross_entropy(logits[0, :-1].double(), ids[0, 1:], reduction="none").tolist()
        count += len(row.ids) - 1
    assert clean["tokens"] == len(losses) and ce["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_scores_at_their_ends():
    losses = {"clean": np.array([1.0, 2.0]), "zero": np.array([5.0, 6.0]), "mean": np.array([3.0, 4.0])}
    losses |= {"identity": losses["clean"], "nothing": losses["zero"], "worse": np.array([7.0, 8.0])}
    out = Spliced(losses, {name: np.zeros(2) for name in losses})
    assert [cross_entropy(out, name)["score"] for name in ("identity", "nothing", "worse")] == [1.0, 0.0, -0.5]
    assert [cross_entropy(out, name)["score_mean"] for name in ("identity", "mean")] == [1.0, 0.0]
    assert np.isnan(metrics.ce_score(1.0, 1.0, 1.0))


def test_documents_that_were_read_are_left_out(home, monkeypatch):
    read = []
    monkeypatch.setattr(heldout.Reader, "read", lambda self, *a: read.append(self.split) or stop())

    def stop():
        raise StopIteration

    def split(dictionary, data, **settings):
        with pytest.raises(StopIteration):
            evaluate(home / dictionary, data, **{**QUICK, **settings})
        return read[-1]

    d = itda.ITDA.load(home / "d")
    found = split("d", home / "train.jsonl", controls=["random tokens"])
    was = set(d.labels.document.tolist())
    held, pool = ({row.document for row in rows} for rows in (found.held, found.pool))
    assert not held & was and not held & pool and was & pool and min(held) > max(pool)
    assert found.about["by"] == "document" and "built on" in found.about["random_tokens_from"]
    read_text = {json.loads(line)["text"] for line in (home / "train.jsonl").read_text().splitlines()[: max(was) + 1]}
    for name, documents in {"reversed": TEXTS[::-1], "late": ["New words, of no document before."] * 3 + TEXTS}.items():
        for cut in ({}, {"context_length": 16}):
            moved = split("d", texts(home, name, documents), tokens=10_000, **cut)
            assert moved.about["read_in_training"] and moved.held
            assert not {documents[row.document] for row in moved.held} & read_text
    longer = split("d", texts(home, "longer", [TEXTS[0] + " And some more words at the end of it."]), tokens=10_000)
    assert all(row.text not in TEXTS[0] for row in longer.held) and "rows after those read" in longer.about["by"]
    other = split("d", home / "new.jsonl", controls=["random tokens"], tokens=10_000)
    assert {row.document for row in other.held} == set(range(9)) and other.about["random_tokens_from"] == heldout.OWN
    assert {row.document for row in other.pool} <= pool
    renamed = replace(d, cfg=d.cfg | {"stream": d.cfg["stream"] | {"data": "gone.jsonl"}})
    renamed.save(home / "renamed")
    halves = split("renamed", home / "new.jsonl", controls=["random tokens"])
    assert not {row.document for row in halves.held} & {row.document for row in halves.pool}
    assert halves.about["random_tokens_from"] == "other documents of this text"
    assert "not there to compare with" in halves.about["by"]
    bare = split("renamed", home / "new.jsonl")
    assert bare.about["by"].startswith("nothing; what the dictionary was built on (gone.jsonl) was not there")
    with pytest.raises(InputError, match="All documents of this text were read"):
        evaluate(home / "all", home / "train.jsonl", **QUICK)
    inside = split("all", home / "train.jsonl", in_sample=True)
    assert inside.held[0].document == 0 and "nothing" in inside.about["by"]


def test_text_that_was_read_is_not_held_out_where_it_stands_once_more(home, tmp_path, monkeypatch):
    words, draw = " ".join(tiny_models.DOCUMENTS).split(), random.Random(0)
    own = [" ".join(draw.sample(words, 40)) for _ in range(12)]
    again = texts(tmp_path, "again", own[:4] + own[8:] + own[:4])
    (tmp_path / "twice.txt").write_text(" ".join([*own, own[0]]), encoding="utf-8")
    read, real = [], heldout.Reader.read
    monkeypatch.setattr(heldout.Reader, "read", lambda self, *a: (read.append(self.split), real(self, *a))[1])
    settings = dict(layer=2, k=4, threshold=0.4, context_length=LENGTH, batch_rows=2)
    itda.train(home / "model", again, tmp_path / "d", tokens=300, **settings)
    result = evaluate(tmp_path / "d", again, **{**QUICK, "tokens": 10_000})
    last = itda.ITDA.load(tmp_path / "d").labels.document.max()
    assert last < 7 and {row.document for row in read[-1].held} == {i for i in range(12) if i % 8 > last}
    assert result.held_out["by"] == "document"
    itda.train(home / "model", tmp_path / "twice.txt", tmp_path / "one", seed=1, tokens=700, **settings)
    d = itda.ITDA.load(tmp_path / "one")
    evaluate(d, tmp_path / "twice.txt", **{**QUICK, "tokens": 10_000})
    stream = TokenStream(tmp_path / "twice.txt", tiny_models.tokenizer(), context_length=LENGTH, seed=1)
    held = {row.prompt for row in read[-1].held}
    known = {row.ids.tobytes() for row in stream if row.prompt <= d.labels.prompt.max()}
    assert held and not {row.ids.tobytes() for row in read[-1].held} & known
    assert held == {row.prompt for row in stream if row.ids.tobytes() not in known and row.prompt >= min(held)}


def test_one_long_document_is_measured_after_what_was_read(home):
    (home / "book.txt").write_text(" ".join(TEXTS * 2), encoding="utf-8")
    settings = dict(layer=2, k=6, threshold=0.4, context_length=LENGTH, batch_rows=2, tokens=700)
    itda.train(home / "model", home / "book.txt", home / "d-book", **settings)
    result = evaluate(home / "d-book", home / "book.txt", tokens=200, ce_tokens=0, controls=False)
    assert result.held_out["by"] == "rows after those read, of one document" and result.tokens == 200
    itda.train(home / "model", home / "book.txt", home / "d-mixed", **settings, seed=1)
    mixed = evaluate(home / "d-mixed", home / "book.txt", tokens=200, ce_tokens=0, controls=False)
    assert mixed.held_out["by"].endswith("one document, shuffled: they stand between rows that were read")
    (home / "new.txt").write_text(" ".join(text.upper() for text in TEXTS), encoding="utf-8")
    d = itda.ITDA.load(home / "d-book")
    gone = replace(d, cfg=d.cfg | {"stream": d.cfg["stream"] | {"data": "gone.txt"}})
    result = evaluate(gone, home / "new.txt", tokens=200, ce_tokens=0, controls=["random tokens"])
    assert result.held_out["by"].startswith("halves of the one document; ")


def test_a_text_of_one_document_is_read_whole(home):
    settings = dict(layer=2, k=6, threshold=0.4, context_length=LENGTH, batch_rows=2, truncate=True)
    itda.train(home / "model", home / "train.jsonl", home / "d-first", **settings)
    (home / "other.txt").write_text(" ".join(text.upper() for text in TEXTS), encoding="utf-8")
    result = evaluate(home / "d-first", home / "other.txt", tokens=500, ce_tokens=0, controls=["gaussian"])
    assert result.tokens == 500 and result.settings["text"]["truncate"] is False
    one = evaluate(home / "d-first", home / "other.txt", truncate=True, **QUICK)
    assert one.tokens == LENGTH - 1 and one.settings["text"]["truncate"] is True
    longer = evaluate(home / "d-first", [" ".join([TEXTS[3], *TEXTS[:20]])], **QUICK)  # its first row was read
    assert longer.held_out["by"] == "rows after those read, of one document" and longer.tokens == 300
    several = evaluate(home / "d-first", home / "new.jsonl", **{**QUICK, "tokens": 500})
    assert several.settings["text"]["truncate"] is True and several.tokens <= 9 * (LENGTH - 1)
    every = {json.loads(line)["text"] for line in (home / "new.jsonl").read_text().splitlines()}
    (home / "own.txt").write_text(text := " ".join(every), encoding="utf-8")
    stream = itda.activations(str(home / "model"), home / "own.txt", layer=2, context_length=LENGTH, truncate=True)
    result = evaluate(itda.build(stream, k=4, threshold=0.2), home / "own.txt", **QUICK)
    assert result.held_out["by"] == "rows after those read, of one document" and result.tokens == 300
    assert itda.activations(str(home / "model"), [text], layer=2, context_length=LENGTH).count_tokens() > 320


def test_what_was_read_is_known_where_another_dictionary_was_full_later(home):
    settings = dict(layer=[0, 2], k=6, threshold=0.3, context_length=LENGTH, batch_rows=2, max_atoms=30, center=False)
    itda.train(home / "model", home / "train.jsonl", home / "both", **settings)
    read = []
    for layer in (0, 2):
        d = itda.ITDA.load(home / "both" / f"transformer.h.{layer}")
        read.append(d.cfg["tokens"])
        result = evaluate(d, home / "train.jsonl", **QUICK)
        assert result.held_out["read_in_training"] and result.held_out["by"] == "document"
    assert read[0] != read[1]


def lines(documents, tokens=10):
    """Rows of `tokens` valid tokens, one for each number, which is that of its document."""
    for prompt, document in enumerate(documents):
        ids = np.array([prompt // 256, prompt % 256, *range(tokens - 2)])
        yield Row(prompt, document, ids, ids, ids, np.zeros(tokens, bool), "", 0)


def test_no_more_is_held_than_is_measured(monkeypatch):
    monkeypatch.setattr(heldout, "ENDLESS", 200)
    taken = []

    def unread(documents, known=lambda row: False, seen=(0,)):
        taken.clear()
        rows = (taken.append(row) or row for row in lines(documents))
        return heldout._unread(rows, known, set(seen), 100, special_tokens=True)[1:]

    def prompts(rows):
        return [row.prompt for row in rows]

    new, after = unread([0] * 5000)  # no other document comes
    assert not new and prompts(after) == list(range(10)) and len(taken) == 201
    new, after = unread([0] * 50 + [1] * 5000)  # what is left of a document does not count as held out
    assert prompts(new) == list(range(50, 60)) and len(after) == 10 and len(taken) == 60
    new, after = unread([0] * 50 + [1, 0, 2] * 30)
    assert {row.document for row in new} == {1, 2} and len(new) == 10

    def known(row):
        return row.prompt % 7 == 0 and row.prompt < 4000

    new, after = unread([row // 5 for row in range(8000)], known, seen=())
    held = {row.document for row in new}
    assert len(new) == 10 and not held & {prompt // 5 for prompt in range(0, 4000, 7)}
    new, after = unread([row // 2000 for row in range(8000)], known, seen=())
    assert {row.document for row in new} == {2} and prompts(new) == list(range(4000, 4010))
    new, after = unread([0] * 8000, known, seen=())  # the row after the last known one may have been read in part
    assert not new and prompts(after) == list(range(3999, 4009))


def test_controls_are_what_they_say(home):
    d = itda.ITDA.load(home / "d")
    result = evaluate(d, home / "new.jsonl", tokens=300, ce_tokens=100)
    rows = result.systems
    assert list(rows) == ["itda", "random tokens", "gaussian", "untrained model"]
    assert {row["n_atoms"] for name, row in rows.items() if name != "untrained model"} == {len(d)}
    assert abs(rows["untrained model"]["n_atoms"] - len(d)) <= 0.1 * len(d) + 1
    assert rows["untrained model"]["ce"] is None
    assert rows["gaussian"]["fvu"] > rows["random tokens"]["fvu"]  # which know the data
    again = evaluate(d, home / "new.jsonl", tokens=300, ce_tokens=100)
    assert {**again.to_json(), "seconds": 0} == {**result.to_json(), "seconds": 0}
    assert (
        evaluate(d, home / "new.jsonl", tokens=300, ce_tokens=0, seed=1).systems["random tokens"]
        != rows["random tokens"]
    )


def test_more_steps_and_refitting_lower_the_error(home):
    few, many, omp = (evaluate(home / "d", home / "new.jsonl", **QUICK, **s).fvu
                      for s in (dict(k=2), dict(k=12), dict(k=12, method="omp")))  # fmt: skip
    assert few > many > omp
    row = evaluate(home / "d", home / "new.jsonl", k=2, **QUICK)
    assert row.k == 2 and row.l0 <= 2


def test_any_system_can_stand_in_the_table(home):
    d = itda.ITDA.load(home / "d")
    copy = System.of(d, "the same", k=6)
    result = evaluate(d, home / "new.jsonl", tokens=200, ce_tokens=100, controls=False, systems=[copy])
    same = result.systems["the same"]
    assert same["fvu"] == result.fvu and same["ce"] == result.ce


def test_names_in_the_table_are_told_apart_and_other_places_refused(home):
    d = itda.ITDA.load(home / "d")
    twins = [replace(System.of(d, name, k=k), hook_point="blocks.2.hook_resid_post")
             for name, k in (("itda", 2), ("sae", 3), ("sae", 4), ("gaussian", 5))]  # fmt: skip
    result = evaluate(d, home / "new.jsonl", **QUICK, systems=twins)
    assert {name: row["k"] for name, row in result.systems.items()} == {
        "itda": 6, "itda#2": 2, "sae": 3, "sae#2": 4, "gaussian#2": 5}  # fmt: skip
    elsewhere = replace(twins[1], hook_point="transformer.h.1")
    with pytest.raises(
        InputError, match=r"sae was made for transformer\.h\.1, and the dictionary for transformer\.h\.2"
    ):
        evaluate(d, home / "new.jsonl", **QUICK, systems=[elsewhere])
    assert "sae" in evaluate(d, home / "new.jsonl", **QUICK, systems=[elsewhere], force=True).systems
    for place in ("some.where.else", "blocks.17.hook_resid_post"):
        with pytest.raises(InputError, match="give one of the same place"):
            evaluate(d, home / "new.jsonl", **QUICK, systems=[replace(twins[1], hook_point=place)])
    narrow = replace(twins[1], atoms=twins[1].atoms[:, :5])
    with pytest.raises(InputError, match="sae is for activations of width 5, and these have 32"):
        evaluate(d, home / "new.jsonl", **QUICK, systems=iter([narrow]))


def test_an_encoder_has_no_cross_entropy(home):
    result = evaluate(home / "d-bert", home / "new.jsonl", tokens=200, ce_tokens=100, controls=["gaussian"])
    assert result.clean is None and result.ce is None and 0 < result.fvu < 2
    assert "CE score" not in str(result) and "no cross-entropy: " in str(result)
    reason = "is read without a language modelling head, so it predicts nothing"
    assert result.to_json()["no_ce"].endswith(reason) and reason in " ".join(str(result).split())


def test_it_says_why_there_is_no_cross_entropy(home, monkeypatch):
    result = evaluate(home / "d", home / "new.jsonl", **QUICK)
    assert result.to_json()["no_ce"] == "it was asked for on 0 tokens (`ce_tokens`)"
    assert "no cross-entropy: it was asked for on 0 tokens" in str(result)
    measured = evaluate(home / "d", home / "new.jsonl", **{**QUICK, "ce_tokens": 50})
    assert measured.no_ce is None and "no cross-entropy" not in str(measured)
    model = loading.language_model(home / "model", hooks=2)
    sees = model.module.forward

    def forward(input_ids, **settings):  # as an encoder with a head does: it sees the row from its end
        return sees(input_ids=input_ids.flip(1), **settings)

    monkeypatch.setattr(model.module, "forward", forward)
    result = evaluate(home / "d", home / "new.jsonl", **{**QUICK, "ce_tokens": 50}, model=model)
    assert result.no_ce.endswith("sees the tokens that it is to predict (it is an encoder)") and result.clean is None


def test_the_settings_are_said(home, tmp_path):
    d, versions = itda.ITDA.load(home / "d"), {"itda": itda.__version__, "torch": torch.__version__}
    plain = evaluate(d, home / "new.jsonl", **QUICK).to_json()["settings"]
    given = dict(
        k=3, method="omp", seed=5, special_tokens=True, force=True, tokens=200, ce_tokens=0, controls=["gaussian"]
    )
    result = evaluate(d, home / "new.jsonl", **given)
    result.save(tmp_path)
    found = json.loads((tmp_path / "eval.json").read_text())["settings"]
    assert {name: found[name] for name in given} == given and found["nonneg"] is False and found["in_sample"] is False
    assert {"k": 6, "method": "mp", "seed": 0, "special_tokens": False, "controls": []}.items() <= plain.items()
    assert versions.items() <= found["versions"].items() and found["dictionary"]["itda_version"] == itda.__version__
    assert found["model"].items() >= d.cfg["model"].items() and found["model"]["device"] == "cpu"
    assert (found["text"]["context_length"], found["text"]["data"]) == (LENGTH, str(home / "new.jsonl"))
    for part in ("dictionary", "model"):
        assert found[part] == plain[part]
    assert found["text"]["hash"] != plain["text"]["hash"]  # of fewer rows
    turned = replace(d, atoms=d.atoms.flip(1))
    assert (
        evaluate(turned, home / "new.jsonl", **QUICK).settings["dictionary"]["sha256"] != found["dictionary"]["sha256"]
    )


def test_intervals_are_over_documents():
    x = torch.randn(900, 8, generator=torch.Generator().manual_seed(1))
    labels = replace(Labels.counted(0, 900), document=np.arange(900) // 10, prompt=np.arange(900) // 10)
    atoms = itda.normalize(torch.randn(30, 8, generator=torch.Generator().manual_seed(2)))

    def row(x, labels):
        def run(x):
            codes = itda.pursue(x, atoms, 2)
            return codes.decode(atoms), codes

        return measure(System("s", atoms, run, 2), x, labels)

    found = row(x, labels)
    for name in ("fvu", "relative_error", "cosine", "l0"):
        low, high = found[f"{name}_interval"]
        assert low <= found[name] <= high and (name == "l0" or high - low > 1e-4)
    alike = row(x[:10].repeat(90, 1), labels)
    low, high = alike["relative_error_interval"]
    assert high - low < 1e-9  # documents that are all one say no less and no more when drawn again


def test_one_table_one_file(home, capfd):
    assert main(["eval", str(home / "d"), str(home / "new.jsonl"), "--tokens", "200", "--ce-tokens", "60"]) == 0
    out, err = capfd.readouterr()
    assert "eval.json written" in err and "random tokens" in out and "CE score" in out
    written = json.loads((home / "d" / "eval.json").read_text())
    assert (
        main(["eval", str(home / "d"), str(home / "new.jsonl"), "--tokens", "200", "--ce-tokens", "60", "--json"]) == 0
    )
    printed = json.loads(capfd.readouterr().out)
    assert {**printed, "seconds": 0} == {**written, "seconds": 0}
    threshold = itda.ITDA.load(home / "d").cfg["threshold"]
    assert printed["settings"]["dictionary"]["threshold"] == threshold and f"above {threshold:.4g}" in out
    d = itda.ITDA.load(home / "d")  # eval.json is no part of it
    d.save(home / "d")
    assert not (home / "d" / "eval.json").exists()  # it was another dictionary's


def test_a_result_goes_to_the_file_named(home, tmp_path, capfd):
    words = ["eval", str(home / "d"), str(home / "new.jsonl"), "--tokens", "100", "--ce-tokens", "0", "--no-controls"]
    assert main(words) == 0
    before = (home / "d" / "eval.json").read_bytes()
    assert main([*words, "--k", "2", "--out", str(tmp_path / "two.json")]) == 0
    assert f"{tmp_path / 'two.json'} written" in capfd.readouterr().err
    assert json.loads((tmp_path / "two.json").read_text())["systems"]["itda"]["k"] == 2
    assert (home / "d" / "eval.json").read_bytes() == before
    for place, why in ((tmp_path, "it is a folder"), (tmp_path / "no" / "x.json", "there is no folder")):
        assert main([*words, "--model", "nothing", "--out", str(place)]) == 2
        assert why in capfd.readouterr().err  # before the model is looked for


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(tokens=0), "`tokens` is 0: pass a whole number, 1 or more"),
        (dict(ce_tokens=-1), "`ce_tokens` is -1"),
        (dict(seed=1 << 63), "a whole number below 2**63"),
        (dict(controls=["sae"]), "There is no control 'sae'"),
        (dict(controls="sae"), "There is no control 'sae'"),
        (dict(model="nowhere/at/all"), "is not there"),
        (dict(k=-1), "`k` is -1"),
        (dict(method="lasso"), "`method` is 'lasso'"),
        (dict(context_length=999), "64 positions"),
    ],
)
def test_bad_settings_are_said_in_one_sentence(home, settings, says):
    with pytest.raises(InputError) as error:
        evaluate(home / "d", home / "new.jsonl", **{**QUICK, **settings})
    assert says in str(error.value) and str(error.value).endswith(".") and "\n" not in str(error.value)


def test_what_cannot_be_measured_is_refused(home):
    with pytest.raises(InputError, match="differs from"):
        evaluate(home / "d", home / "new.jsonl", model=str(home / "other"), **QUICK)
    assert evaluate(home / "d", home / "new.jsonl", model=str(home / "other"), force=True, **QUICK).fvu > 0
    plain = itda.build(torch.randn(50, 4, generator=torch.Generator().manual_seed(0)), k=2, threshold=0.3)
    with pytest.raises(InputError, match="does not say which model"):
        evaluate(plain, home / "new.jsonl", **QUICK)
    with pytest.raises(InputError, match="empty"):
        evaluate(home / "d", [""], **QUICK)
    with pytest.raises(InputError, match="no valid token"):
        evaluate(home / "d", ["<s>"], **QUICK)
    with pytest.raises(AttributeError, match="an Evaluation has no 'fvuu'"):
        _ = evaluate(home / "d", home / "new.jsonl", **QUICK).fvuu


# -- verdict, denominators, massive tokens ----------------------------------------------------------------------------


def system_of(name, d, atoms, k=4):
    return System.of(replace(d, atoms=atoms, sample=None), name, k=k)


def test_errors_have_the_denominator_of_the_threshold(home):
    """Mean, tails and share above are of one quantity: that of the loss that admits."""
    how = dict(
        k=6,
        n_atoms=40,
        admission="sequential",
        layer=2,
        tokens=700,
        context_length=LENGTH,
        batch_rows=2,
        overwrite=True,
    )
    x, _ = activations(home, home / "new.jsonl")
    said = {}
    for name, settings in {
        "plain": dict(center=False),
        "centred": {},
        "weighed": dict(scale="std", max_norm=5),
    }.items():
        itda.train(home / "model", home / "train.jsonl", home / name, **how, **settings)
        d = itda.ITDA.load(home / name)
        result = evaluate(d, home / "new.jsonl", tokens=10_000, ce_tokens=0, controls=False)
        rest = d.standardised(x).double()
        error = metrics.relative_error(rest, d.encode(x).decode(d.atoms).double()).numpy()
        assert result.relative_error == pytest.approx(error.mean(), rel=1e-5)
        assert result.median_error == pytest.approx(np.median(error), rel=1e-5)
        assert result.tails["99 %"] == pytest.approx(np.quantile(error, 0.99), rel=1e-5)
        assert result.above == pytest.approx((error > d.cfg["threshold"]).mean(), abs=2 / len(x))
        assert result.fvu == pytest.approx(metrics.fvu(x, d.reconstruct(x)), rel=1e-5)
        said[name] = result.denominator
        assert f"divided by its {result.denominator}" in " ".join(str(result).split())
        both = result.with_position_0["relative_error"]
        special, _ = activations(home, home / "new.jsonl", special_tokens=True)
        inner, inner_hat = d.standardised(special).double(), d.encode(special).decode(d.atoms).double()
        assert both == pytest.approx(float(metrics.relative_error(inner, inner_hat).mean()), rel=1e-5)
    weighed = "|x - mean|², each coordinate over its deviation"
    assert said == {"plain": "|x|²", "centred": "|x - mean|²", "weighed": weighed}


def test_controls_have_the_scale_of_the_dictionary(home):
    itda.train(home / "model", home / "train.jsonl", home / "scaled", k=6, n_atoms=40, layer=2, tokens=700,
               context_length=LENGTH, batch_rows=2, scale="std", overwrite=True)  # fmt: skip
    d, seen = itda.ITDA.load(home / "scaled"), []

    def run(x):
        seen.append(x)
        return x * 0.9, d.encode(x)

    own = replace(System.of(d, "own"), run=run)
    result = evaluate(d, home / "new.jsonl", tokens=300, ce_tokens=100, systems=[own])
    x = torch.cat(seen[:1])
    rest, left = d.standardised(x).double(), (0.1 * x / d.scale).double()
    want = (left.square().sum(1) / rest.square().sum(1))[torch.from_numpy(np.ones(len(x), bool))]
    tails = result.systems["own"]["positions"]
    assert sum(part["tokens"] * part["relative_error"] for part in tails) / len(x) == pytest.approx(float(want.mean()))
    rows = result.systems
    assert rows["gaussian"]["relative_error"] > rows["random tokens"]["relative_error"] > rows["itda"]["relative_error"]
    assert rows["untrained model"]["n_atoms"] > 30


def test_every_stage_has_a_name_and_ends(home):
    said = []
    evaluate(itda.ITDA.load(home / "d"), home / "new.jsonl", tokens=300, ce_tokens=50, progress=said.append)
    assert said[-1] is None and None not in said[:-1]
    names = list(dict.fromkeys(step.what for step in said[:-1]))
    assert names == [
        "choosing held-out text",
        "reading held-out text",
        "reading text for the controls",
        "itda: encoding (1 of 3 systems)",
        "random tokens: encoding (2 of 3 systems)",
        "gaussian: encoding (3 of 3 systems)",
        "cross-entropy: clean pass and 5 replacements",
        "untrained model: reading held-out text",
        "untrained model: reading text for the controls",
        "untrained model: choosing a threshold",
        "untrained model: building",
        "untrained model: encoding",
    ]
    for name in names[1:]:
        if name.endswith("threshold"):  # which is found after fewer tries than there are at most
            continue
        mine = [step for step in said[:-1] if step.what == name]
        assert mine[-1].tokens == mine[-1].total, name


def test_the_verdict_is_that_of_the_figures(home):
    d = itda.ITDA.load(home / "d")
    result = evaluate(d, home / "new.jsonl", tokens=600, ce_tokens=300)
    mine, theirs, found = result.systems["itda"], result.systems["random tokens"], result.verdict
    assert found["error"]["change"] == pytest.approx(mine["relative_error"] / theirs["relative_error"] - 1)
    assert found["tail"]["change"] == pytest.approx(mine["tails"]["99 %"] / theirs["tails"]["99 %"] - 1)
    assert found["cross_entropy"]["change"] == pytest.approx(mine["ce"]["loss"] - theirs["ce"]["loss"])
    for name in ("error", "tail", "cross_entropy"):
        low, high = found[name]["interval"]
        assert low <= found[name]["change"] <= high
        assert found[name]["says"] == ("better" if high < 0 else "worse" if low > 0 else "not told apart")
    lines = str(result).splitlines()
    place = next(i for i, line in enumerate(lines) if f"than {len(d)} random tokens" in line or "told apart" in line)
    assert place < next(i for i, line in enumerate(lines) if "FVU" in line)  # it begins with it
    text = " ".join(str(result).split())
    assert "to try: `itda train … --n-atoms N --candidates 6` keeps" in text and "`--n-atoms N` alone draws" in text
    done = replace(result, settings={"dictionary": {"selected": True, "refined": True}})
    assert "to try: more atoms" in str(done) and "candidates" not in str(done)
    json.loads(json.dumps(result.to_json(), allow_nan=False))
    bare = evaluate(d, home / "new.jsonl", **QUICK)
    assert bare.verdict is None and "no verdict, since random tokens were not measured" in str(bare)


def test_a_verdict_from_plain_errors():
    groups, draw = np.arange(4000) // 20, np.random.default_rng(0)
    base = draw.gamma(2.0, 0.1, 4000)
    for factor, want in ((0.9, "better"), (1.1, "worse")):
        found = verdict.of_errors({"itda": base * factor, "random tokens": base}, Bootstrap(groups, 0))
        assert verdict.overall(found) == want == found["error"]["says"] == found["tail"]["says"]
        assert found["error"]["interval"] == pytest.approx((factor - 1, factor - 1))
        assert found["tail"]["interval"] == pytest.approx((factor - 1, factor - 1))
    shuffled = {"itda": draw.permutation(base), "random tokens": base}
    assert verdict.overall(verdict.of_errors(shuffled, Bootstrap(groups, 0))) == "not told apart"
    heavy = {"itda": np.where(np.arange(4000) % 37 == 0, 3 * base + 1, 0.5 * base), "random tokens": base}
    found = verdict.of_errors(heavy, Bootstrap(groups, 0))
    assert (found["error"]["says"], found["tail"]["says"], verdict.overall(found)) == ("better", "worse", "mixed")
    losses = {"itda": base + 0.01, "random tokens": base}
    assert verdict.of_cross_entropy(losses, Bootstrap(groups, 0))["change"] == pytest.approx(0.01)
    assert verdict.of_errors({"itda": base}, Bootstrap(groups, 0)) is None


def test_the_quantile_of_a_draw_is_that_of_its_tokens():
    groups, draw = np.arange(600) // 6, np.random.default_rng(1)
    errors, draws = draw.random(600), Bootstrap(groups, 0)
    found = verdict._quantiles(errors, draws)
    assert len(found) == verdict.DRAWS
    for i in (0, 7, 199):
        every = np.repeat(errors, draws.weights[i, groups].astype(int))
        assert np.quantile(every, 0.99, method="lower") <= found[i] <= np.quantile(every, 0.99, method="higher") + 1e-3


def test_massive_tokens_stand_apart_and_are_said():
    x = torch.randn(900, 16, generator=torch.Generator().manual_seed(1))
    x[[4, 400]] = 0.0
    x[[4, 400], 3] = 900.0
    labels = replace(Labels.counted(0, 900), document=np.arange(900) // 10, prompt=np.arange(900) // 10)
    d = itda.build([(x, labels)], k=3, threshold=0.3)
    row = measure(System.of(d, "itda"), x, labels, None, 0.3)
    usual = torch.ones(900, dtype=torch.bool)
    usual[[4, 400]] = False
    x_hat = d.reconstruct(x)
    assert row["fvu"] < 2e-3 < row["fvu_robust"] == pytest.approx(metrics.fvu(x[usual], x_hat[usual]), rel=1e-5)
    low, high = row["fvu_robust_interval"]
    assert low < row["fvu_robust"] < high
    weights = 1 / (x[usual] - x[usual].mean(0)).double().square().sum(0)
    want = float(((x - x_hat)[usual].double().square().sum(0) * weights).mean())
    assert row["fvu_standardised"] == pytest.approx(want, rel=1e-5)
    said = metrics.concentrated(metrics.variance(x))
    assert said.startswith("2 of 900 tokens hold 9") and "robust FVU leaves them out" in said


def test_random_tokens_say_why_they_cohere(home):
    d = itda.ITDA.load(home / "d")
    result = evaluate(d, home / "new.jsonl", tokens=300, ce_tokens=0, controls=["random tokens"])
    found = result.systems["random tokens"]["coherence"]
    assert found["max"] > 0.99 and found["copies"] > 0
    assert f"of random tokens {found['copies']:.1%} have another in nearly their direction" in " ".join(
        str(result).split()
    )
    twice = torch.eye(6)[[0, 1, 2, 0, 3, 1]]
    assert metrics.coherence(twice)["copies"] == pytest.approx(4 / 6)
