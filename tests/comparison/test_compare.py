"""Comparing models and their dictionaries: one set of readings against plain functions, alignment, refusals."""

import io
import json
import math
import shutil
import sys
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from rich.console import Console

import itda
from itda import InputError, similarity
from itda.cli.main import main
from itda.comparison import common_tokens, layers
from itda.comparison.common_tokens import valid_tokens
from itda.comparison.compare import compare
from itda.labels import Labels, groups_of
from itda.models import loading
from itda.report import plots
from itda.report.drawing_comparisons import layer_numbers
from itda.similarity import expected_jaccard, expected_jaccard_by_token, jaccard, match_layers, model_similarity
from itda.text.prompts import TokenStream
from tests import tiny_models
from tests.untyped import untyped

DOCUMENTS = tiny_models.DOCUMENTS
HARD = [
    "naïve café, 東京 and 🙂🙂 in\n\nbetween",
    "東京タワーは高い。",
    "e\u0301 \u200b  x",
    "🙂",
    "",
    "plain words again",
]
OTHER_TEXT = ["public static void main and other words of code, return the value of it", "東京の天気は晴れ、京都は雨"]
SETS = ["jaccard", "jaccard_corrected", "jaccard_by_token", "overlap", "soft_overlap"]


def byte_pairs(texts, vocabulary=340, bos="<s>"):
    """A byte-level BPE trained on `texts`; None for `bos`: one that opens rows with nothing."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [bos] if bos else []
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **({"bos_token": bos, "eos_token": bos} if bos else {}))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Models on disk, a text, and the dictionaries of two of the tiny_models."""
    home = tmp_path_factory.mktemp("home")
    tiny_models.save("gpt2", home / "a")
    tiny_models.save("gpt2", home / "b", seed=1)
    tiny_models.save("gpt2", home / "six", seed=2, n_layer=6)
    tiny_models.save("llama", home / "llama", hidden_size=48, head_dim=12)
    tiny_models.save("bert", home / "bert")
    code = byte_pairs(OTHER_TEXT)
    tiny_models.module("gpt2", len(code), seed=3).save_pretrained(home / "code")
    code.save_pretrained(home / "code")
    (home / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS), encoding="utf-8")
    for name in ("a", "b"):
        for layer, dictionary in trained(home, name).items():
            dictionary.save(home / f"{name}-itda" / layer)
    return home


@pytest.fixture(scope="module", autouse=True)
def few_draws():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["itda.comparison.compare"], "DRAWS", 20)
        yield


@pytest.fixture(autouse=True)
def here(home, monkeypatch):
    monkeypatch.chdir(home)


@cache
def trained(home, name, layer=(0, 2), text="text.jsonl", **settings) -> dict[str, itda.ITDA]:
    settings = {"context_length": 32, **settings}
    stream = itda.activations(str(home / name), str(home / text), layer=list(layer), **settings)
    return itda.build(stream, k=3, threshold=0.6)


def quick(models, data=DOCUMENTS, **settings):
    """A comparison that takes little time: pilots of a size do."""
    settings = {"atoms": 60, "k": 3, "context_length": 32, "controls": False, "layer": [0, 2], **settings}
    settings.setdefault("measures", "all")
    if "n_atoms" not in settings:
        settings.setdefault("threshold", 0.7)
    return compare(models, data, **settings)


def readings_of(*names, data=DOCUMENTS, **settings):
    return common_tokens.read(names, data, **{"context_length": 32, **settings})


def settings_of(readings, **changes) -> layers.Settings:
    tokens, ids = len(readings[0]), readings[0].labels.token_id
    made = {
        "anchors": np.random.default_rng(1).permutation(tokens)[:50],
        "atoms": layers.shared_atoms(ids, 60, 2),
        "scored": np.arange(tokens),
        "k": 3,
        "n_atoms": None,
        "threshold": 0.6,
        "groups": groups_of(readings[0].labels),
        "report": lambda step: None,
    }
    return layers.Settings(**{**made, **changes})


def same_json(one, other):
    """Whether two comparisons say the same but for the time it took."""
    documents = [json.loads(json.dumps(c.to_json(), allow_nan=False)) for c in (one, other)]
    for document in documents:
        del document["seconds"]
        for measure in document["measures"].values():
            del measure["seconds"]
    return documents[0] == documents[1]


# -- one text, one set of readings


def test_a_reading_is_what_activations_gives():
    for reading, name in zip(readings_of("a", "six"), ("a", "six"), strict=True):
        hook = reading.hook_points[2]
        batches = list(itda.activations(name, DOCUMENTS, layer=2, context_length=32))
        assert reading.activations[hook].equal(torch.cat([batch.activations for batch in batches]))
        assert (
            reading.batch(hook).labels.pairs().tolist() == np.concatenate([b.labels.pairs() for b in batches]).tolist()
        )
        assert [reading.labels.text(i) for i in (0, 200)] == [
            Labels.concat([b.labels for b in batches]).text(i) for i in (0, 200)
        ]
        assert (reading.share, reading.valid) == (1, len(reading))
        assert reading.provenance[hook]["stream"]["hash"] == reading.provenance[hook]["stream"]["hash"]
    assert [len(r.hook_points) for r in readings_of("a", "six")] == [4, 6]
    (few,) = readings_of("a", layer=[3, 1], tokens=100)
    assert (few.hook_points, len(few)) == (("transformer.h.1", "transformer.h.3"), 100)


@pytest.fixture(scope="module")
def engine(home):
    """Readings of two models of different width and depth, and all measures of all their layers."""
    readings = common_tokens.read([str(home / "a"), str(home / "llama")], DOCUMENTS, layer=[0, 1, 3], context_length=32)
    settings = settings_of(readings)
    return readings, settings, layers.compare_layers(readings, list(layers.FAMILIES), settings)


def direct(name, readings, settings, m, i, n, j) -> float:
    """A measure of two layers, by the plain function."""
    x, y = (list(readings[p].activations.values())[q] for p, q in ((m, i), (n, j)))
    if layers.FAMILIES[name] == "sums":
        return similarity.MEASURES[name].function(x, y)
    if name.startswith("relative"):
        return similarity.relative(x, y, settings.anchors, center=name == "relative_centred")
    if name == "shared_atoms":
        return similarity.shared_atoms(x, y, settings.atoms, k=settings.k)
    if name == "shared_atoms_procrustes":
        return similarity.procrustes(x[settings.atoms], y[settings.atoms])
    a, b = (settings.dictionaries[p][q] for p, q in ((m, i), (n, j)))
    if name == "soft_overlap":
        return similarity.soft_overlap(x[a], y[b], y[a], x[b])
    one, other = readings[m].labels[a], readings[n].labels[b]
    stream = {"jaccard_corrected": len(readings[0]), "jaccard_by_token": readings[0].labels.token_id}
    if name in stream:
        return similarity.corrected_jaccard(one, other, stream[name])
    return getattr(similarity, name)(one, other)


@pytest.mark.parametrize("name", layers.FAMILIES)
def test_every_measure_is_the_plain_function_of_each_two_layers(engine, name):
    readings, settings, found = engine
    pairs = found[name].pairs
    assert {pair: matrix.shape for pair, matrix in pairs.items()} == {(m, n): (3, 3) for m in (0, 1) for n in (0, 1)}
    for m, i, n, j in ((0, 0, 1, 2), (1, 2, 0, 0), (0, 2, 0, 1), (0, 1, 0, 2), (1, 1, 1, 1)):
        assert pairs[m, n][i, j] == pytest.approx(direct(name, readings, settings, m, i, n, j), abs=1e-9)
    assert np.diag(pairs[0, 0]) == pytest.approx(1)  # a layer with itself
    symmetric = name in (*SETS, "shared_atoms_procrustes") or similarity.MEASURES[name].symmetric
    assert np.allclose(pairs[0, 1], pairs[1, 0].T, atol=1e-12) == symmetric


def test_dictionaries_are_those_that_build_makes_cut_to_one_size(home):
    readings = readings_of("a", "llama", layer=[1], tokens=150)
    settings = settings_of(readings, n_atoms=40, threshold=None)
    found, sizes = layers.dictionaries(readings, settings), []
    for reading, side in zip(readings, found, strict=True):
        for hook, rows in zip(reading.hook_points, side, strict=True):
            built = itda.build([reading.batch(hook)], k=settings.k, n_atoms=40, center=False)
            sizes.append(len(built))
            assert reading.labels[rows].pairs().tolist() == built.labels.pairs()[: len(rows)].tolist()
    assert {len(rows) for side in found for rows in side} == {min(sizes)} != {max(sizes)}
    free = layers.dictionaries(readings, settings_of(readings))
    assert len({len(rows) for side in free for rows in side}) > 1  # with a threshold, whatever size comes


def test_codes_are_compared_on_the_tokens_that_are_scored_alone(engine):
    readings, settings, _ = engine
    scored = np.arange(90, 250)
    found = layers.compare_layers(readings, ["shared_atoms"], replace(settings, scored=scored))["shared_atoms"]
    x, y = (list(reading.activations.values())[1] for reading in readings)
    codes = (similarity.shared_atom_codes(z, settings.atoms, settings.k) for z in (x, y))
    rows = np.setdiff1d(scored, settings.atoms)
    want = float(similarity.support_overlap(*codes)[rows].mean())
    assert found.pairs[0, 1][1, 1] == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("name", ["shared_atoms", "relative", "relative_centred", "jaccard", "overlap"])
def test_parts_of_the_text_add_up(engine, name):
    readings, settings, found = engine
    similar, groups = found[name], settings.groups
    ones = np.ones(groups.max() + 1)
    for pair, matrix in similar.resampled(ones).items():
        assert matrix == pytest.approx(similar.pairs[pair], abs=1e-12)
    ones[[3, 4]] = 0, 2  # without one group of tokens, and with another twice
    x, y = (list(reading.activations.values())[i] for reading, i in zip(readings, (0, 2), strict=True))
    if name in ("jaccard", "overlap"):
        a, b = settings.dictionaries[0][0], settings.dictionaries[1][2]
        common, a, b = (ones[groups[rows]].sum() for rows in (np.intersect1d(a, b), a, b))
        want = common / (a + b - common) if name == "jaccard" else common / a
    else:
        special = settings.atoms if name == "shared_atoms" else settings.anchors
        rows = np.setdiff1d(np.arange(len(x)), special)
        if name == "shared_atoms":
            codes = [similarity.shared_atom_codes(z, settings.atoms, settings.k)[rows] for z in (x, y)]
            each = similarity.support_overlap(*codes)
        else:
            center = name == "relative_centred"
            each = [similarity.relative_representations(z, settings.anchors, center)[rows] for z in (x, y)]
            each = torch.nn.functional.cosine_similarity(*each)
        want = np.average(each, weights=ones[groups[rows]])
    assert similar.resampled(ones)[0, 1][0, 2] == pytest.approx(want, abs=1e-9)


def test_tokens_are_drawn_by_document_or_by_stretch_of_text():
    def of(documents) -> np.ndarray:
        counted = Labels.counted(0, len(documents))
        return groups_of(replace(counted, document=np.asarray(documents), start=counted.position))

    many = of(np.repeat(np.arange(40) * 3, 5))
    assert many.tolist() == np.repeat(np.arange(40), 5).tolist()
    few = of(np.repeat([0, 7], 100))
    assert few.tolist() == np.repeat(np.arange(20), 10).tolist()
    most = of(np.repeat(np.arange(1000), 2))  # neighbours together, no document in two
    assert (most.max() + 1, most.tolist()) == (200, np.repeat(np.arange(200), 10).tolist())
    order = np.random.default_rng(0).permutation(200)
    counted = Labels.counted(0, 200)[order]  # in any order: by where they stand in the text
    assert groups_of(replace(counted, start=counted.position)).tolist() == (order // 10).tolist()


def test_shared_atoms_are_the_first_of_each_token_id_before_the_second_of_any():
    ids = np.array([5, 5, 5, 5, 2, 2, 9, 5, 2])
    drawn = layers.shared_atoms(ids, 9, 0)
    assert sorted(drawn) == list(range(9))
    assert [sorted(ids[drawn[part]]) for part in (slice(3), slice(3, 5), slice(5, 7))] == [[2, 5, 9], [2, 5], [2, 5]]
    assert layers.shared_atoms(ids, 4, 0).tolist() == drawn[:4].tolist()
    assert any(layers.shared_atoms(ids, 9, seed).tolist() != drawn.tolist() for seed in (1, 2))


# -- what comes of it


@pytest.fixture(scope="module")
def both(home):
    """Two models with all measures and controls."""
    return quick([str(home / "a"), str(home / "b")], n_atoms=8, tokens=100, controls=True)


def test_a_model_equals_itself(home):
    found = quick(["a", "a"])
    assert [model["name"] for model in found.models] == ["a", "a#2"]
    for name, measure in found.measures.items():
        assert np.diag(measure.pairs["a", "a#2"]) == pytest.approx(1), name
        assert measure.matching.without_self.accuracy == 1
        assert measure.models["a", "a#2"] == pytest.approx(1)


def test_the_order_of_models_only_transposes(home, both):
    back = quick(["b", "a"], n_atoms=8, tokens=100)
    for name, measure in back.measures.items():
        assert measure.pairs.keys() == both.measures[name].pairs.keys()
        for pair, matrix in measure.pairs.items():
            assert matrix == pytest.approx(both.measures[name].pairs[pair], abs=1e-9), (name, pair)
        if name != "jaccard":
            assert measure.models["b", "a"] == pytest.approx(np.diag(measure.pairs["b", "a"]).mean())


def test_scores_are_those_of_the_matrices(both):
    for name, measure in both.measures.items():
        assert measure.matching == match_layers(measure.pairs)
        assert (measure.matching.without_self.rows, measure.matching.interval) == (4, None)
        assert (measure.documents is None) == (
            name not in ("shared_atoms", "jaccard", "overlap", "relative", "relative_centred")
        )
        if measure.documents:
            low, high = measure.documents
            assert 0 <= low <= high <= 1
    mean = np.diag(both.measures["cka"].pairs["a", "b"]).mean()
    assert both.measures["cka"].models == {("a", "b"): pytest.approx(mean)}


def test_jaccards_come_with_their_unions_sizes_and_levels_of_chance(both):
    readings = readings_of("a", "b", layer=[0, 2], tokens=100)
    settings = settings_of(readings, n_atoms=8, threshold=None)
    layers.compare_layers(readings, ["jaccard"], settings)
    (a, b), ids = settings.dictionaries, readings[0].labels.token_id
    measure, size = both.measures["jaccard"], len(a[0])
    assert measure.models["a", "b"] == pytest.approx(model_similarity(a, b))  # eq. 10, of what was compared
    assert [model["n_atoms"] for model in both.models] == [[size] * 2] * 2
    random = measure.controls["random"]
    assert random["all"] == random["diagonal"] == pytest.approx(expected_jaccard(size, size, len(ids)))
    by_token = np.array([[expected_jaccard_by_token(ids[x], ids[y], ids)[0] for y in b] for x in a])
    level = measure.controls["random by token"]
    assert level["all"] == pytest.approx(by_token.mean()) and level["diagonal"] == pytest.approx(np.trace(by_token) / 2)
    assert level["accuracy"] == match_layers({(0, 1): by_token, (1, 0): by_token.T}).without_self.accuracy
    assert [row["n_atoms"] for row in both.sizes] == [size // 4, size // 2, size]
    for row in both.sizes:
        cut = [[jaccard(x[: row["n_atoms"]], y[: row["n_atoms"]]) for y in b] for x in a]
        assert row["diagonal"] == pytest.approx(np.diag(cut).mean())
        assert row["all"] == pytest.approx(np.mean(cut))
        assert row["accuracy"] is not None
        assert row["random"] == pytest.approx(expected_jaccard(row["n_atoms"], row["n_atoms"], len(ids)))


def test_controls_find_nothing_where_there_is_nothing(home, both):
    measures = ["cka_debiased", "relative_centred", "shared_atoms"]
    found = quick(["a", "a"], measures=measures, controls=True)
    for measure in found.measures.values():
        assert np.diag(measure.pairs["a", "a#2"]) == pytest.approx(1)
        assert abs(measure.controls["shuffled"]["diagonal"]) < 0.1
        assert 0.1 < measure.controls["untrained"]["diagonal"] < 0.9  # what tokens and architecture alone make alike
    for measure in both.measures.values():
        assert {"shuffled", "untrained"} <= measure.controls.keys()
        assert measure.controls["untrained"]["all"] != pytest.approx(measure.pairs["a", "b"].mean(), abs=1e-6)


def test_untrained_models_are_read_as_the_trained_ones_are(home, monkeypatch):
    """In numbers of the same type, by the tokenizers that are there already."""
    loaded, types = [], []
    load, random = common_tokens.load_tokenizer, loading.random_model
    monkeypatch.setattr(common_tokens, "load_tokenizer", lambda *a, **k: loaded.append(a) or load(*a, **k))
    monkeypatch.setattr(loading, "random_model", lambda *a: types.append(a[-1]) or random(*a))
    quick(["a", "b"], measures=["cka"], controls=True, dtype="bfloat16")
    assert len(loaded) == 2
    assert types == [torch.bfloat16, torch.bfloat16]


def test_untrained_models_have_other_weights_each_and_the_same_ones_again(home):
    def x(names, **settings):
        return [list(r.activations.values())[1] for r in readings_of(*names, layer=[0, 1], **settings)]

    one, other = x(["a", "a"], random_weights=5)
    assert not torch.allclose(one, other, atol=0.1)
    assert not torch.allclose(one, x(["a"])[0], atol=0.1)
    assert one.equal(x(["a"], random_weights=5)[0])
    assert other.equal(x(["a"], random_weights=6)[0])


def test_the_same_call_gives_the_same_and_another_draw_another(home):
    one, again, other = (quick(["a", "b"], measures=["shared_atoms"], draw=d) for d in (0, 0, 1))
    assert same_json(one, again)
    assert not same_json(one, other)


def test_loaded_models_are_compared_as_their_folders_are(home):
    loaded = [loading.load_model("a", hooks=-1), loading.load_model("b", hooks=-1)]
    wanted = {"measures": ["cka", "jaccard"], "controls": True}
    found = quick(loaded, names=["one", "two"], **wanted)
    by_folder = quick(["a", "b"], names=["one", "two"], **wanted)
    assert same_json(found, by_folder)
    assert [model["name"] for model in quick(loaded, measures=["cka"]).models] == ["a", "b"]


def test_six_layers_of_gpt2_against_four_of_llama(home):
    found = quick(["six", "llama"], controls=True, layer=None, measures=["shared_atoms", "cka"])
    for measure in found.measures.values():
        assert measure.pairs["six", "llama"].shape == (6, 4)
        assert measure.pairs["llama", "six"].shape == (4, 6)
        assert np.isfinite(measure.pairs["six", "llama"]).all()
        assert measure.matching is None  # no layer is the right one
        assert measure.controls["shuffled"]["diagonal"] is None
        assert measure.controls["untrained"]["all"] is not None
    assert not found.aligned
    assert "six: 6 layers" in str(found)
    said = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert said["measures"]["cka"]["models"] == [{"a": "six", "b": "llama", "similarity": None}]
    sets = quick(["six", "llama"], measures=["jaccard"], layer=[0, 3]).to_json()
    assert sets["measures"]["jaccard"]["models"][0]["similarity"] > 0


def test_three_models_have_an_interval_over_models(home):
    found = quick(["a", "b", "a"], measures=["cka"])  # all of one depth
    assert found.measures["cka"].matching.without_self.rows == 12
    low, high = found.measures["cka"].matching.interval
    assert low <= found.measures["cka"].matching.without_self.accuracy <= high
    assert len(found.measures["cka"].models) == 3


def test_half_precision_is_read_in_float32(home):
    half, full = (quick(["a", "b"], measures=["cka", "relative"], dtype=dtype) for dtype in ("float16", "float32"))
    for name in ("cka", "relative"):
        assert half.measures[name].pairs["a", "b"] == pytest.approx(full.measures[name].pairs["a", "b"], abs=0.02)
        assert not np.array_equal(half.measures[name].pairs["a", "b"], full.measures[name].pairs["a", "b"])


def test_activations_that_are_not_finite_are_refused(home):
    broken = loading.load_model("b", hooks=-1)
    with torch.no_grad():
        broken.module.h[2].mlp.c_fc.bias[3] = math.nan
    with pytest.raises(InputError, match=r"transformer\.h\.2 is not finite \(reading b \(2 of 2\)\)"):
        quick(["a", broken])


# -- different tokenizers

TOKENIZERS = {
    "bpe": lambda: tiny_models.tokenizer(),
    "code": lambda: byte_pairs(OTHER_TEXT),
    "open": lambda: byte_pairs(OTHER_TEXT, bos=None),
    "words": lambda: tiny_models.tokenizer("bert"),
}


@pytest.mark.parametrize("context_length", [4, 7, 512])
@pytest.mark.parametrize("name", ["bpe", "code", "open"])
def test_a_byte_level_token_ends_where_all_bytes_of_its_character_are_read(name, context_length):
    tokenizer = TOKENIZERS[name]()
    rows = list(TokenStream(HARD, tokenizer, context_length=context_length))
    labels, ends = valid_tokens(rows)
    ids = {document: [] for document in range(len(HARD))}
    whole = []  # whether the ids up to each valid token are text up to its end
    for row in rows:
        for position, (token, end) in enumerate(zip(row.ids, row.ends, strict=True)):
            ids[row.document] += [] if row.special[position] else [token]
            if position and not row.special[position]:
                whole.append(tokenizer.decode(ids[row.document]) == HARD[row.document][:end])
    assert ((ends >= 0) == whole).all()
    assert (ends[ends >= 0] == (labels.document << 40)[ends >= 0] + labels.end[ends >= 0]).all()
    assert len(set(ends[ends >= 0].tolist())) == (ends >= 0).sum()
    assert 0 < (ends < 0).sum() < len(ends)
    left = iter(rows)
    valid_tokens(left, 1)
    assert len(list(left)) == len(rows) - 2  # the row with the token, and one more that may end its character
    for some in range(1, len(labels)):
        few, few_ends = valid_tokens(rows, some)
        assert few.pairs().tolist() == labels.pairs()[:some].tolist()
        assert few_ends.tolist() == ends[:some].tolist()


@pytest.mark.parametrize("pair", [("bpe", "code"), ("bpe", "words"), ("words", "open")])
def test_tokens_in_common_end_at_the_same_character(pair):
    texts = DOCUMENTS + HARD
    streams = [TokenStream(texts, TOKENIZERS[name](), context_length=16) for name in pair]
    there = [valid_tokens(stream)[0] for stream in streams]
    place = common_tokens._common(streams, 10**6, False, None, list(pair))
    read = []
    for labels, at in zip(there, place, strict=True):
        kept = labels[at >= 0][np.argsort(at[at >= 0])]  # in the order of what is in common
        read.append([(d, texts[d][:end]) for d, end in zip(kept.document, kept.end, strict=True)])
        assert 0.2 < (at >= 0).mean() < 1
    assert read[0] == read[1]
    assert len(set(read[0])) == len(read[0])
    assert any(text.endswith(("ï", "京", "🙂")) for _, text in read[0])
    every = [{(d, texts[d][:end]) for d, end in zip(lab.document, lab.end, strict=True)} for lab in there]
    assert set(read[0]) <= every[0] & every[1]


@pytest.mark.parametrize(("other", "seed"), [("code", None), ("bert", None), ("code", 1)])
def test_models_of_different_tokenizers_are_compared_where_tokens_end_alike(home, other, seed):
    readings = readings_of("a", other, layer=[0, 2], seed=seed)  # shuffled, their rows come in different orders
    one, two = readings
    assert len(one) == len(two) < min(one.valid, two.valid)
    assert (one.labels.document == two.labels.document).all()
    assert (one.labels.end == two.labels.end).all()
    for reading, name in zip(readings, ("a", other), strict=True):
        batches = itda.activations(name, DOCUMENTS, layer=2, context_length=32, seed=seed)
        there = {tuple(p): x for b in batches for p, x in zip(b.labels.pairs().tolist(), b.activations, strict=True)}
        x = reading.activations[reading.hook_points[1]]
        assert all(there[tuple(p)].equal(x[i]) for i, p in enumerate(reading.labels.pairs().tolist()))
    found = quick(["a", other], measures=["cka", "jaccard"], seed=seed)
    assert (found.aligned, found.tokens) == (True, len(one))
    assert [(m["tokens"], m["share"]) for m in found.models] == [(r.valid, len(r) / r.valid) for r in readings]
    back = readings_of(other, "a", layer=[0, 2], seed=seed)
    assert sorted(zip(back[0].labels.document, back[0].labels.end, strict=True)) == sorted(
        zip(one.labels.document, one.labels.end, strict=True)
    )


def test_alignment_of_equal_rows_drops_only_parts_of_characters(home):
    (plain, _), (ended, _) = readings_of("a", "b"), readings_of("a", "b", align=True)
    assert len(plain) - 20 < len(ended) < len(plain)
    dropped = set(map(tuple, plain.labels.pairs())) - set(map(tuple, ended.labels.pairs()))
    assert {plain.labels.document[i] for i, p in enumerate(plain.labels.pairs()) if tuple(p) in dropped} == {4}


# -- dictionaries


def test_saved_dictionaries_are_compared_as_sets(home):
    a, b = (list(trained(home, name).values()) for name in ("a", "b"))
    found = compare(["a-itda", "b-itda"])
    assert set(found.measures) == {"jaccard", "jaccard_corrected", "overlap"}
    want = [[jaccard(x, y) for y in b] for x in a]
    assert found.measures["jaccard"].pairs["a-itda", "b-itda"] == pytest.approx(np.array(want))
    assert found.measures["jaccard"].models["a-itda", "b-itda"] == pytest.approx(model_similarity(a, b))
    assert found.tokens == a[0].cfg["tokens"]
    assert [m["n_atoms"] for m in found.models] == [[len(x) for x in side] for side in (a, b)]
    assert [m["hook_points"] for m in found.models] == [["transformer.h.0", "transformer.h.2"]] * 2
    assert set(found.measures["jaccard"].controls) == {"random"}
    smallest = min(map(len, a + b))
    assert [row["n_atoms"] for row in found.sizes] == [smallest // 4, smallest // 2, smallest]
    assert same_json(found, compare([a, b[::-1]], names=["a-itda", "b-itda"]))  # in the order of layers
    single = compare(["a-itda/transformer.h.2", b[1]])
    assert single.measures["jaccard"].pairs["transformer.h.2", "b"].tolist() == [[want[1][1]]]


def test_with_the_text_dictionaries_are_corrected_by_token_too(home):
    bare, found = compare(["a-itda", "b-itda"]), compare(["a-itda", "b-itda"], "text.jsonl")
    assert set(found.measures) == {*bare.measures, "jaccard_by_token"}
    assert not found.aligned
    for name, measure in bare.measures.items():
        pairs = found.measures[name].pairs
        assert all(matrix == pytest.approx(pairs[pair], abs=1e-12) for pair, matrix in measure.pairs.items())
    assert set(found.measures["jaccard"].controls) == {"random", "random by token"}
    lower = found.measures["jaccard_by_token"].pairs["a-itda", "b-itda"]
    assert (lower < found.measures["jaccard_corrected"].pairs["a-itda", "b-itda"]).all()


@pytest.mark.parametrize("change", ["tokenizer", "context_length"])
def test_dictionaries_of_different_rows_are_aligned_by_the_text(home, change):
    a = trained(home, "a")
    b = trained(home, "code") if change == "tokenizer" else trained(home, "a", context_length=20)
    with pytest.raises(InputError, match="aligns them if it is given the text"):
        compare([list(a.values()), list(b.values())])
    with pytest.raises(InputError, match="were built on different rows"):
        compare([list(a.values()), list(b.values())], "text.jsonl", align=False)
    found = compare([list(a.values()), list(b.values())], "text.jsonl", names=["a", "b"])
    assert found.aligned
    kept, ends, ids = [], [], {}  # of all atoms and tokens, where they end in the text
    for name, side, length in (
        ("a", a, 32),
        ("code" if change == "tokenizer" else "a", b, 20 if change == "context_length" else 32),
    ):
        tokenizer = loading.load_model(name, hooks=0).tokenizer
        labels, end = valid_tokens(TokenStream("text.jsonl", tokenizer, context_length=length))
        by_pair = dict(zip(map(tuple, labels.pairs().tolist()), end.tolist(), strict=True))
        kept.append([[by_pair[tuple(p)] for p in d.labels.pairs().tolist()] for d in side.values()])
        ends.append(set(end.tolist()) - {-1})
        ids = ids or dict(zip(end.tolist(), labels.token_id.tolist(), strict=True))  # of the first
    common = ends[0] & ends[1]
    sets = [[set(rows) & common for rows in side] for side in kept]
    want = np.array([[jaccard(x, y) for y in sets[1]] for x in sets[0]])
    assert found.measures["jaccard"].pairs["a", "b"] == pytest.approx(want)
    assert found.tokens == len(common)
    x, y, stream = (np.array([ids[end] for end in of]) for of in (sets[0][0], sets[1][1], common))
    chance, _ = expected_jaccard_by_token(x, y, stream)
    by_token = found.measures["jaccard_by_token"].pairs["a", "b"][0, 1]
    assert by_token == pytest.approx((want[0, 1] - chance) / (1 - chance))
    for model, side, all_of in zip(found.models, sets, kept, strict=True):
        assert model["share"] == pytest.approx(sum(map(len, side)) / sum(map(len, all_of)))
        assert 0 < model["share"] < 1 or (model["share"] == 1 and change == "context_length")


def test_dictionaries_of_one_stream_that_took_different_tokens_are_told_apart(home):
    """One took special tokens too, the other did not; and one read fewer tokens of the same rows."""
    special, plain = trained(home, "a", special_tokens=True), trained(home, "a")
    first, second = special["transformer.h.0"], plain["transformer.h.0"]
    assert first.cfg["stream"]["hash"] == second.cfg["stream"]["hash"]
    want = jaccard(first, second)
    for order in ([first, second], [second, first]):
        found = compare(order, "text.jsonl", names=["x", "y"])
        assert found.measures["jaccard"].pairs["x", "y"].tolist() == [[pytest.approx(want)]]
    fewer = trained(home, "a", tokens=300)["transformer.h.0"]  # of the one group of rows that there is
    assert fewer.cfg["stream"]["hash"] == second.cfg["stream"]["hash"]
    assert compare([fewer, second], "text.jsonl", names=["x", "y"]).tokens == second.cfg["tokens"]


def test_dictionaries_of_plain_arrays_are_compared(home):
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    one, other = (itda.build(z, k=2, threshold=0.4) for z in (x, x @ torch.linalg.qr(torch.randn(8, 8))[0]))
    found = compare([one, other])
    assert [model["name"] for model in found.models] == ["dictionary", "dictionary#2"]
    assert found.measures["jaccard"].pairs["dictionary", "dictionary#2"].tolist() == [[jaccard(one, other)]]
    with pytest.raises(InputError, match="does not say what it was built on"):
        compare([one, other], "text.jsonl")
    many = replace(one, cfg=one.cfg | {"tokens": 1 << 53})  # of a file that says so, which no memory is taken for
    assert compare([many, other]).measures["jaccard"].controls["random"]["all"] == pytest.approx(0, abs=1e-9)
    assert compare([many, other]).tokens == 1 << 53
    empty = replace(one, atoms=one.atoms[:0], labels=one.labels[:0], norms=one.norms[:0], losses=one.losses[:0])
    found = compare([empty, other])
    assert found.sizes == []
    assert found.to_json()["measures"]["overlap"]["pairs"][1]["similarity"] == [[None]]


# -- pictures


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_heatmap_has_the_same_bytes_every_time(home, both, tmp_path, ending):
    first, second = tmp_path / f"first.{ending}", tmp_path / f"second.{ending.upper()}"
    both.heatmap(first)
    both.heatmap(second, next(iter(both.measures)))
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")
    both.heatmap(second, "cka")
    assert first.read_bytes() != second.read_bytes()
    with pytest.raises(InputError, match="no measure 'nothing' in this comparison"):
        both.heatmap(first, "nothing")


def test_hostile_names_are_shown_and_do_no_harm(home, tmp_path):
    names = ["<b>&amp;", "line\nbreak", r"$\frac$", "a--b \x1b[31m", "x" * 60]
    for name in names:
        shutil.copytree(home / "a", tmp_path / name)
    found = quick([str(tmp_path / name) for name in [*names, names[2]]], measures=["cka"], layer=0)
    assert [model["name"] for model in found.models] == [*names, names[2] + "#2"]
    assert all(line.isprintable() for line in str(found).splitlines())
    assert json.loads(json.dumps(found.to_json()))["models"][1]["name"] == "line\nbreak"
    found.heatmap(tmp_path / "x.svg")
    ElementTree.parse(tmp_path / "x.svg")


def test_hostile_hook_points_are_shown_and_do_no_harm(home, both, tmp_path):
    hostile = ["h.0.[/x]", r"h.1.$\frac$"]
    found = replace(both, models=[model | {"hook_points": hostile} for model in both.models])
    stream = io.StringIO()
    Console(file=stream, width=200).print(found)  # which reads markup
    assert stream.getvalue().count("0.[/x]") == 2
    found.heatmap(tmp_path / "x.svg")
    ElementTree.parse(tmp_path / "x.svg")
    found = replace(both, models=[model | {"hook_points": ["h.0.\x1b[31m", "h.1"]} for model in both.models])
    assert all(line.isprintable() for line in str(found).splitlines())


def test_names_are_told_apart():
    assert common_tokens.named(None, ["a", "a", "a#2", "a"]) == ["a", "a#2", "a#2#2", "a#3"]
    assert common_tokens.named(("x", "y"), ["a", "a"]) == ["x", "y"]
    told = {
        ("org/a", "b"): ["a", "b"],
        ("s0/h.2", "s1/h.2"): ["s0/h.2", "s1/h.2"],
        ("x/s0/h.2", "y/s0/h.2/", "/y/s0/h.2"): ["x/s0/h.2", "y/s0/h.2", "y/s0/h.2"],
        ("a/m", "b/m", "other"): ["a/m", "b/m", "other"],
        ("a/m", "a/m"): ["m", "m"],
        ("m", "a/m"): ["m", "a/m"],
        ("/", ""): ["/", ""],
    }
    for paths, names in told.items():
        assert common_tokens.told_apart(paths) == names
    for wrong in (["x", "x"], ["x"], [], "xy"):
        with pytest.raises(InputError, match="pass a list of 2 different ones, one for each model"):
            common_tokens.named(wrong, ["a", "b"])


def test_a_heatmap_says_what_is_framed_and_beyond_its_colours(home, both):
    figure = plots._drawn(both, "cka")
    squares = [axis for axis in figure.axes if axis.images]
    assert len(squares) == 4 and squares[-1].images[0].colorbar.extend == "max"  # a model is most like itself
    assert "Framed: the most similar layer of each row" in figure.get_supxlabel().replace("\n", " ")
    for axis, matrix in zip(squares, both.measures["cka"].pairs.values(), strict=True):
        assert [text.get_text() for text in axis.texts] == [f"{value:.2f}" for value in matrix.ravel()]
    zeros = np.zeros((plots.FEW + 1, plots.FEW + 1))
    many = [{"name": name, "hook_points": [f"h.{i}" for i in range(len(zeros))]} for name in "ab"]
    pairs = {(a, b): zeros for a in "ab" for b in "ab"}
    large = SimpleNamespace(models=many, tokens=1, measures={"cka": SimpleNamespace(pairs=pairs)})
    squares = [axis for axis in plots._drawn(large, "cka").axes if axis.images]
    assert not any(axis.texts for axis in squares) and squares[-1].images[0].colorbar.extend == "neither"


def test_layers_are_numbered_with_what_is_read_there():
    assert layer_numbers(["transformer.h.2", "transformer.h.10"]) == ["2", "10"]
    assert layer_numbers(["transformer.h.2.mlp"]) == ["2.mlp"]
    assert layer_numbers(["model.layers.3", "model.layers.3.self_attn.o_proj"]) == ["3", "3.self_attn.o_proj"]
    assert layer_numbers(["one", "two"]) == layer_numbers(["layer 7", "layer 7"]) == ["0", "1"]


def test_a_heatmap_of_nothing_known_can_be_drawn(home, tmp_path):
    x = torch.eye(4)
    one, other = (itda.build(z, k=2, threshold=0.4) for z in (x[:1], x[:1]))
    found = compare([one, other], names=["x", "y"])
    assert np.isnan(found.measures["jaccard_corrected"].pairs["x", "y"]).all()  # one token: all is chance
    found.heatmap(tmp_path / "x.png", "jaccard_corrected")


# -- refusals


def refused(words, *args, **settings):
    with pytest.raises(InputError) as error:
        compare(*args, **settings)
    sentence = str(error.value)
    assert words in sentence
    assert sentence.endswith(".") and "\n" not in sentence
    return sentence


@pytest.mark.parametrize(
    ("words", "models", "settings"),
    [
        ("One model came (a): pass two or more models", ["a"], {}),
        ("No model came: pass two or more models", [], {}),
        ("`models` is 'a': pass a list of two or more, as in `compare([a, b], data)`", "a", {}),
        ("has no setting `measure`: perhaps `measures` was meant", ["a", "b"], {"measure": "cka"}),
        ("has no setting `batchrows`: perhaps `batch_rows` was meant", ["a", "b"], {"batchrows": 3}),
        ("has no setting `zzzzz`: `help", ["a", "b"], {"zzzzz": 3}),
        ("There is no measure 'similar'", ["a-itda", "b-itda"], {"measures": ["similar"]}),
        ("give `data`", ["a", "b"], {"data": None}),
        ("'a-itda' is a dictionary and 'b' is not: compare dictionaries only, or", ["a-itda", "b"], {}),
        ("There is no measure 'similar'", ["a", "b"], {"measures": ["cka", "similar"]}),
        ("There is no measure 'similar'", ["a", "b"], {"measures": "similar"}),
        ("were given: choose one of them", ["a", "b"], {"n_atoms": 10, "threshold": 0.1}),
        ("`atoms` is 0: pass a whole number, 1 or more", ["a", "b"], {"atoms": 0}),
        ("`k` is 0", ["a", "b"], {"k": 0}),
        ("`n_atoms` is -2", ["a", "b"], {"n_atoms": -2}),
        ("`threshold` is -1.0", ["a", "b"], {"threshold": -1.0}),
        ("`draw` is -1: pass a whole number, 0 or more", ["a", "b"], {"draw": -1}),
        ("`tokens` is 0", ["a", "b"], {"tokens": 0}),
        ("pass a list of 2 different ones, one for each model", ["a", "b"], {"names": ["x", "x"]}),
        ("pass a list of 2 different ones, one for each model", ["a", "b"], {"names": ["x"]}),
        (
            "pass a list of 2 different ones, one for each model",
            ["a-itda", "b-itda"],
            {"names": ["x", "x"], "data": None},
        ),
        ("Pass one of `layer`", ["a", "b"], {"layer": 1, "hook": "h.1"}),
        ("have different tokenizers, so their rows differ", ["a", "code"], {"align": False}),
        (
            "cannot be compared by 'cka', because it needs models and a text: give these, or choose of jaccard",
            ["a-itda", "b-itda"],
            {"measures": ["cka"]},
        ),
        ("because it needs the text", ["a-itda", "b-itda"], {"measures": ["jaccard_by_token"], "data": None}),
        ("pass its folder, or a list of loaded dictionaries", [[], []], {}),
        ("pass its folder, or a list of loaded dictionaries", [["a-itda"], ["b-itda"]], {}),
    ],
)
def test_what_is_wrong_is_said_before_any_model_is_read(home, monkeypatch, words, models, settings):
    def read(*args, **settings):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(common_tokens, "load_model", read)
    settings = {"data": DOCUMENTS, **settings}
    refused(words, models, settings.pop("data"), **settings)


def test_what_is_of_another_kind_is_refused_where_no_types_are_checked(home):
    plain = untyped(compare)
    for wrong, settings, words in (
        (["a", "b"], {"draw": 1.5}, "`draw` is 1.5: pass a whole number, 0 or more"),
        (iter(["a", "b"]), {}, "pass a list of two or more"),
        ({"a", "b"}, {}, "pass a list of two or more"),
        (None, {}, "pass a list of two or more"),
    ):
        with pytest.raises(InputError, match=words):
            plain(wrong, DOCUMENTS, **settings)


def test_one_layer_is_matched_with_nothing(home):
    """Of one layer the most similar one is always right, so nothing is said of it."""
    path = sorted((home / "a-itda").iterdir())[0].name
    found = compare([home / "a-itda" / path, home / "b-itda" / path])
    shown = str(found)
    assert "1 layer, " in shown and "1 layers" not in shown
    assert "matched" not in shown and "margin" not in shown
    row = next(line for line in shown.splitlines() if line.startswith("jaccard ")).split()
    assert float(row[1]) == pytest.approx(
        found.measures["jaccard"].models[f"a-itda/{path}", f"b-itda/{path}"], abs=1e-3
    )


def test_what_is_shown_stands_beside_what_it_compares_with(home, both):
    shown, measure = str(both), both.measures["jaccard"]
    layers_alike, models_alike = np.diag(measure.pairs["a", "b"]).mean(), measure.models["a", "b"]
    assert layers_alike != pytest.approx(models_alike, abs=1e-3)
    row = next(line for line in shown.splitlines() if line.startswith("jaccard ")).split()
    random = measure.controls["random"]["diagonal"]
    assert [float(row[1]), float(row[4])] == [pytest.approx(layers_alike, abs=1e-3), pytest.approx(random, abs=1e-3)]
    assert f"(eq. 10): {models_alike:.4g}" in shown
    for cut in both.sizes:
        assert f"{cut['diagonal']:.4g} at {cut['n_atoms']} atoms ({cut['random']:.4g})" in " ".join(shown.split())
    assert "…" not in shown  # no number is cut
    for name, each in both.measures.items():
        across = [each.pairs["a", "b"], each.pairs["b", "a"]]
        assert each.alike["diagonal"] == pytest.approx(np.mean([np.diag(matrix).mean() for matrix in across])), name
        assert each.alike["all"] == pytest.approx(np.mean(across)), name
        assert each.alike["accuracy"] == each.matching.without_self.accuracy
    other = quick(["six", "llama"], measures=["cka"], layer=None)  # of different depth: of all layers, and no columns
    shown, mean = str(other), other.measures["cka"].pairs["six", "llama"].mean()
    assert "matched" not in shown and "mean similarity of all layers" in shown
    row = next(line for line in shown.splitlines() if line.startswith("cka ")).split()
    assert float(row[1]) == pytest.approx(mean, abs=1e-3)


def test_what_shows_while_reading_is_refused_too(home):
    refused("with 401 tokens in common: choose fewer", ["a", "b"], DOCUMENTS, context_length=32, atoms=401)
    refused("64 positions: pass 64 or fewer", ["a", "b"], DOCUMENTS, context_length=65)
    refused("0 of 1 token would be anchors", ["a", "b"], DOCUMENTS, context_length=32, tokens=1, measures=["relative"])
    refused("have no token in common", ["a", "bert"], ["surprised"], context_length=32, tokens=1)
    refused("holds no valid token", ["a", "b"], [{"text": "<s>"}], context_length=32)
    refused("No hook point is given", ["a", "b"], DOCUMENTS, layer=[], context_length=32)
    assert "nowhere" in refused("nowhere", ["a", "nowhere"], DOCUMENTS)
    found = quick(["a", "b"], measures="cka", atoms=10**6)  # which has nothing to do with atoms
    assert list(found.measures) == ["cka"]


def test_few_tokens_give_half_of_them_as_atoms(home):
    found, want = (
        itda.compare(
            [home / "a", home / "b"], DOCUMENTS, measures="shared_atoms", controls=False, context_length=32, atoms=atoms
        )
        for atoms in (None, 200)
    )
    assert found.tokens == 401
    assert found.to_json()["measures"]["shared_atoms"]["pairs"] == want.to_json()["measures"]["shared_atoms"]["pairs"]


def test_dictionaries_of_different_text_are_refused(home, tmp_path):
    (tmp_path / "other.txt").write_text("Another text altogether, of which nothing else is known. " * 12)
    (tmp_path / "long.jsonl").write_text((home / "text.jsonl").read_text() * 200)
    other = trained(home, "b", text=tmp_path / "other.txt")
    sentence = refused("of different text, or of more of it", ["a-itda", list(other.values())])
    assert "text.jsonl" in sentence and "other.txt" in sentence
    mixed = [next(iter(other.values())), next(iter(trained(home, "b").values()))]
    refused("of different text", ["a-itda", mixed])
    refused("of different text", ["a-itda", mixed], "text.jsonl")
    for data in (str(tmp_path / "other.txt"), DOCUMENTS[1:], DOCUMENTS[:-1]):
        refused("`data` is not the text that this dictionary was built on", ["a-itda", "b-itda"], data)
    nothing = replace(mixed[0], cfg={})
    refused("of different text", [nothing, *mixed])
    refused("of different text", [nothing, [mixed[0], nothing, mixed[1]]])
    bare = [replace(d, cfg={}) for d in (mixed[0], trained(home, "a")["transformer.h.0"])]
    refused("the same prompt and position is another token: build them on the same text", bare)


def test_a_long_wrong_text_is_not_read_to_its_end(home):
    read = []

    def texts():
        for i in range(5000):
            read.append(i)
            yield f"Text number {i}. " * 20

    rows = TokenStream(["x"], tiny_models.tokenizer(), context_length=32)
    rows._documents = lambda: (iter([text]) for text in texts())
    from itda.comparison.dictionaries import _same_rows

    with pytest.raises(InputError, match="`data` is not the text that this dictionary was built on"):
        list(_same_rows(rows, "0" * 64, 32, 400))
    assert len(read) < 2000


@pytest.mark.parametrize(
    ("path", "words"),
    [("x.jpg", "ends with .png"), ("nowhere/x.png", "there is no folder nowhere"), ("folder.png", "is a folder")],
)
def test_a_picture_that_cannot_be_drawn_is_refused_first(home, capfd, monkeypatch, path, words):
    (home / "folder.png").mkdir(exist_ok=True)
    monkeypatch.setattr(common_tokens, "load_model", None)
    with pytest.raises(InputError, match=words):
        plots.check(path)
    assert main(["compare", "a", "b", "--data", "text.jsonl", "--heatmap", path]) == 2
    out, err = capfd.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert words in err


def test_a_picture_that_cannot_be_written_loses_nothing(home, both, capfd, tmp_path, monkeypatch):
    old = tmp_path / "old.png"
    old.write_bytes(b"old")
    replaced = sys.modules["itda.disk"].os.replace

    def full(*places):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys.modules["itda.disk"].os, "replace", full)
    with pytest.raises(InputError, match=r"old.png could not be written, because the disk is full"):
        both.heatmap(old)
    assert main(["compare", "a-itda", "b-itda", "--heatmap", str(old), "--json"]) == 2
    out, err = capfd.readouterr()
    assert json.loads(out)["tokens"] and "the disk is full" in err and len(err.splitlines()) == 1
    assert old.read_bytes() == b"old" and list(tmp_path.iterdir()) == [old]
    monkeypatch.setattr(sys.modules["itda.disk"].os, "replace", replaced)
    assert main(["compare", "a-itda", "b-itda", "--heatmap", str(old)]) == 0
    assert old.read_bytes()[:4] == b"\x89PNG"


# -- interrupts


@pytest.mark.parametrize("stage", ["reading a", "reading b", "comparing layers", "comparing relative", "building"])
def test_an_interrupt_ends_the_comparison_and_leaves_models_as_they_were(home, stage):
    loaded = [loading.load_model(name, hooks=-1) for name in ("a", "b")]
    wanted = {"measures": ["cka", "relative", "jaccard"]}

    def interrupt(step):
        if step is not None and step.what.startswith(stage):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quick(loaded, progress=interrupt, **wanted)
    assert not any(m._forward_hooks or m._forward_pre_hooks for one in loaded for m in one.module.modules())


def test_progress_ends_with_none_and_tells_of_every_stage(home):
    steps = []
    quick(["a", "b"], progress=steps.append, controls=True, measures=["shared_atoms", "cka", "jaccard"])
    assert steps[-1] is None
    said = {step.what.split(" (")[0] for step in steps if step is not None}
    assert {"reading a", "reading b", "comparing layers", "comparing shared_atoms", "building dictionaries"} <= said
    said |= {step.what for step in steps if step is not None}
    assert {"tokenising the text", "control, shuffled tokens: comparing layers"} <= said
    assert {"control, untrained models: comparing layers", "intervals"} <= said
    counted = [step for step in steps if step is not None and step.total is not None]
    assert all(step.tokens <= step.total and str(step) for step in counted)


# -- the command line

QUICK = ["--context-length", "32", "--atoms", "60", "--no-controls", "--layer", "0", "2"]


def test_the_command_line_says_what_the_library_finds(home, capfd, tmp_path):
    picture = tmp_path / "layers.svg"
    words = [
        "compare",
        "a",
        "b",
        "--data",
        "text.jsonl",
        "--measure",
        "cka",
        "jaccard",
        "--threshold",
        "0.7",
        "--k",
        "3",
    ]
    assert main([*words, *QUICK, "--names", "x", "y", "--heatmap", str(picture), "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    found = quick(["a", "b"], "text.jsonl", measures=["cka", "jaccard"], names=["x", "y"])
    want = json.loads(json.dumps(found.to_json()))
    for measure in (*said["measures"].values(), *want["measures"].values()):
        del measure["seconds"]
    assert (said["measures"], said["models"], said["sizes"]) == (want["measures"], want["models"], want["sizes"])
    found.heatmap(tmp_path / "again.svg")
    assert picture.read_bytes() == (tmp_path / "again.svg").read_bytes()


def test_the_command_line_shows_a_table(home, capfd):
    assert main(["compare", "a-itda", "b-itda"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert "jaccard_corrected" in out and "a-itda: 2 layers" in out
    assert main(["compare", "a-itda", "b-itda", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["measures"].keys() == {"jaccard", "jaccard_corrected", "overlap"}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["a", "b"], "give `data` (`--data`)"),
        (["a", "--data", "text.jsonl"], "two or more"),
        (["a", "a-itda", "--data", "text.jsonl"], "is a dictionary"),
        (["a", "b", "--data", "text.jsonl", "--measure", "x"], "no measure 'x'"),
        (["a", "b", "--data", "nowhere.txt", *QUICK], "nowhere.txt"),
        (["a", "b", "--data", "text.jsonl", "--context-length", "32", "--atoms", "9e3"], "tokens in common"),
        (["a-itda", "code", "--data", "text.jsonl"], "is a dictionary"),
    ],
)
def test_bad_input_is_said_in_one_sentence(home, capfd, words, sentence):
    assert main(["compare", *words]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert sentence in err
    stages = ("loading ", "reading ")  # which are told before what is found out while reading
    assert len([line for line in err.splitlines() if not line.startswith(stages)]) == 1
