"""Sparse probing on a labelled set that is made here: what a probe sees, how texts are split, what is refused."""

import json
import sys

import numpy as np
import pytest
import torch

import itda
from itda.errors import InputError
from itda.evaluation import probing
from itda.evaluation.evaluate import evaluate
from itda.evaluation.probing import labelled as read_texts
from itda.evaluation.systems import System
from itda.models import loading
from tests import tiny_models

PLACES = ["harbour", "market", "orchard", "river", "tower", "valley"]
KINDS = {
    "code": "def f_{n}(x): return x + {n} # {place}",
    "prose": "In the {place} she counted {n} small birds, and nobody was surprised.",
    "list": "- {place}: {n}\n- {place}: {n}",
}


def probe(model, hook, systems, data, **settings):
    return probing.probe(model, hook, systems, data, **{"context_length": 48, **settings})


def labelled(each=40, kinds=("code", "prose")):
    """Texts of different kinds, which any model's activations tell apart."""
    return [
        {"text": KINDS[kind].format(n=n, place=PLACES[n % 6]), "label": kind} for n in range(each) for kind in kinds
    ]


@pytest.fixture(scope="module")
def read():
    """A model, its hook point, and an ITDA and random directions as systems."""
    tokenizer = tiny_models.tokenizer()
    model = loading.load_model(tiny_models.module("gpt2", len(tokenizer)), tokenizer, hooks=2)
    texts = [record["text"] for record in labelled(20)]
    d = itda.build(itda.activations(model, texts, layer=2, context_length=32), k=4, threshold=0.3)
    return model, model.hook_points[0], [System.of(d, "itda")]


def test_latents_tell_kinds_of_text_apart_and_labels_drawn_at_random_do_not(read):
    found = probe(*read, labelled())
    assert found["texts"] == 80 and found["labels"] == ["code", "prose"] and (found["train"], found["test"]) == (60, 20)
    for name in ("itda", "activations"):
        assert found["systems"][name]["all"] == 1.0
    assert found["systems"]["itda"]["top 5"] > 0.9
    drawn = np.random.default_rng(0).permutation([record["label"] for record in labelled()])
    shuffled = [record | {"label": label} for record, label in zip(labelled(), drawn, strict=True)]
    scores = [probe(*read, shuffled, seed=seed)["systems"]["itda"]["all"] for seed in range(4)]
    assert abs(np.mean(scores) - 0.5) < 0.2
    assert probe(*read, labelled(), seed=3) == probe(*read, labelled(), seed=3)


def test_every_class_is_told_from_the_rest(read):
    found = probe(*read, labelled(kinds=tuple(KINDS)))
    assert found["labels"] == ["code", "list", "prose"] and found["systems"]["activations"]["all"] > 0.9


def test_a_text_is_the_mean_of_its_split_codes(read):
    model, hook, systems = read
    texts = [labelled()[0]["text"], "", labelled()[1]["text"]]
    stream, repeated = probing._rows(model, texts, 60)
    dense, codes, there = probing._means(model, hook, systems, stream, 3, False, lambda *_: None)
    assert there.tolist() == [0, 2] and repeated == 0
    for row, i in enumerate(there):
        (batch,) = itda.activations(model, [texts[i]], layer=2, context_length=60)
        x = batch.activations
        signed = systems[0].run(x)[1].dense()
        want = torch.cat([signed.clamp_min(0), (-signed).clamp_min(0)], 1).mean(0)
        assert np.allclose(codes["itda"][row].toarray()[0], want.numpy(), atol=1e-4)
        assert np.allclose(dense[row], x.mean(0).numpy(), atol=1e-4)


def test_one_latent_is_the_one_whose_means_differ_most():
    rng = np.random.default_rng(0)
    y = np.arange(200) % 2 == 0
    features = rng.normal(size=(200, 6))
    features[:, 4] += 6 * y
    features[:, 1] += 0.5 * y
    train = np.arange(200) < 150
    scores = probing._accuracies(features, y, train, (1, 2))
    assert scores["top 1"] == pytest.approx(1.0, abs=0.02)
    features[:, 4] = rng.normal(size=200)
    assert probing._accuracies(features, y, train, (1,))["top 1"] < 0.8


def test_classes_are_balanced_and_split(read):
    y = np.array([0] * 90 + [1] * 30)
    ((c, rows, train),) = probing._tasks(y, ["a", "b"], 0.2, 0)
    assert c == 0 and len(rows) == 60 and len(set(rows.tolist())) == 60
    for part in (train, ~train):
        assert (y[rows[part]] == 0).sum() == (y[rows[part]] == 1).sum()
    assert (~train).sum() == 12


def test_no_text_is_on_both_sides_of_the_split(read, monkeypatch):
    sides = []

    def watched(features, y, train, tops):
        if isinstance(features, np.ndarray):  # the activations themselves
            sides.extend((features[train], features[~train]))
        return real(features, y, train, tops)

    real = probing._accuracies
    monkeypatch.setattr(probing, "_accuracies", watched)
    endless = "She counted the birds again and again, until nobody was left to be surprised. " * 3
    tails = [{"text": f"{endless}{n}", "label": "prose"} for n in range(5)]  # alike as far as one row reaches
    twice = [{"text": record["text"], "label": "code"} for record in labelled(3)]  # whatever their label
    found = probe(*read, [*labelled(), *labelled(), *twice, *tails])
    assert found["texts"] == 81 and found["repeated"] == 80 + 6 + 4
    train, test = sides
    assert len(train) == 60 and np.abs(test[:, None] - train).max(2).min() > 1e-3
    assert probe(*read, labelled())["repeated"] == 0


def test_it_stands_in_the_evaluation(tmp_path):
    tiny_models.save("gpt2", tmp_path / "model")
    itda.train(
        tmp_path / "model", tiny_models.DOCUMENTS, tmp_path / "d", layer=2, k=4, threshold=0.3, context_length=32
    )
    path = tmp_path / "labelled.jsonl"
    rows = [{"body": r["text"], "kind": r["label"]} for r in labelled()]
    path.write_text("\n".join(map(json.dumps, [*rows, *rows[:2]])))
    settings = dict(tokens=100, ce_tokens=0, controls=["random tokens"], in_sample=True)
    result = evaluate(
        tmp_path / "d", tiny_models.DOCUMENTS, probe=path, probe_column="body", probe_label="kind", **settings
    )
    assert set(result.probing["systems"]) == {"itda", "random tokens", "activations"}
    assert "probe on" in str(result) and result.to_json()["probing"]["texts"] == 80
    shown = " ".join(str(result).split())
    assert f"0.5 is chance, one text is {1 / result.probing['test']:.3f}; 2 repeated texts left out" in shown


def test_records_come_from_files_too(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    want = ([r["text"] for r in labelled(3)], [r["label"] for r in labelled(3)])
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, labelled(3))) + "\n\n")
    parquet.write_table(pa.Table.from_pylist(labelled(3)), tmp_path / "a.parquet")
    for data in (labelled(3), tmp_path / "a.jsonl", tmp_path / "a.parquet"):
        assert read_texts(data) == want
    numbers = [{"text": "x", "label": 3}]
    assert read_texts(numbers) == (["x"], ["3"])


def test_what_cannot_be_probed_is_refused_in_one_sentence(read, tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("{no json")
    (tmp_path / "b.txt").write_text("x")
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    cases = [
        (tmp_path / "none.jsonl", "There is no file"),
        (tmp_path / "a.jsonl", "cannot be read as labelled texts"),
        (tmp_path / "b.txt", "neither .jsonl nor .parquet"),
        (tmp_path / "c.parquet", "cannot be read as labelled texts"),
        ([{"text": "x"}], "Record 0 (from 0) has no text 'text' or no label"),
        (["x"], "Record 0 (from 0) has no text"),
        ([{"text": "x", "label": float("nan")}], "Record 0 (from 0) has no text 'text' or no label"),
        ([{"text": "x", "label": 1}, {"text": "y", "label": "y" * 999}], f"the label '{'y' * 76}..., of another"),
        (
            [{"text": "x", "label": 1}, {"text": "y", "label": "1"}],
            "has the label '1', of another type than the first, 1",
        ),
        (labelled(3), "The label 'code' has 3 different texts, and all others have 3"),
        ([*labelled(3)] * 9, "The label 'code' has 3 different texts, and all others have 3"),
        (labelled(kinds=("code",)), "All texts have one label"),
    ]
    for data, says in cases:
        with pytest.raises(InputError) as error:
            probe(*read, data)
        assert says in str(error.value) and str(error.value).endswith(".") and "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"`test` is 1\.0"):
        probe(*read, labelled(), test=1.0)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(InputError, match="Probing needs scikit-learn"):
        probe(*read, labelled())
