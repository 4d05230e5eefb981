"""What fine-tuning changed: laws of the change, planted changes that must be found, and a page that is safe to open."""

import copy
import json
import math
import re
import sys

import numpy as np
import pytest
import torch

import itda
from itda.comparison import token_changes
from itda.comparison.common_tokens import Reading
from itda.comparison.diff import diff, of_readings, token_scores
from itda.comparison.token_changes import code_change
from itda.errors import InputError
from itda.labels import Labels
from itda.models.loading import load_model
from itda.report import diff_page
from tests import tiny_models

SMALL = dict(n_atoms=20, k=4, context_length=tiny_models.POSITIONS)
TEXTS = [f"{text} {other}" for text in tiny_models.DOCUMENTS for other in tiny_models.DOCUMENTS if text != other][:30]
HOSTILE = "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>"


def hooked(seed=0, change=None, name="gpt2", tokenizer=None):
    """A tiny model with its tokenizer, after `change` of its module."""
    words = tokenizer or tiny_models.tokenizer(name)
    module = tiny_models.module(name, len(words), seed)
    if change:
        with torch.no_grad():
            change(module)
    return load_model(module, words, hooks=-1)


def shift(path, amount=0.5):
    """Adds noise to one weight."""

    def change(module):
        weight = module.get_parameter(path)
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)), alpha=amount)

    return change


def reading(name, x, texts=None, hook="layer"):
    """A reading of rows of ten one-character tokens, of which `texts` are the texts."""
    x = {hook: x} if isinstance(x, torch.Tensor) else x
    n = len(next(iter(x.values())))
    texts = texts or ["abcdefghij" for _ in range(n // 10)]
    row, position = np.divmod(np.arange(n), 10)
    labels = Labels(
        row, position, np.arange(n) % 7, row, position, position + 1, row, tuple(texts), np.zeros(n // 10, np.int64)
    )
    return Reading(name, x, labels, n, {})


def noise(n=400, d=16, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + 1


def drifted(x, seed, scale=0.05):
    """`x` as another fine-tune would leave it: a little changed everywhere."""
    return x + scale * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))


def orthogonal(d, seed=5):
    return torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed)))[0]


@pytest.fixture(scope="module")
def same():
    return diff(hooked(), hooked(), TEXTS, names=["a", "b"], **SMALL)


@pytest.fixture(scope="module")
def changed():
    return diff(hooked(), hooked(change=shift("transformer.h.2.mlp.c_fc.weight")), TEXTS, names=["a", "b"], **SMALL)


# -- laws -------------------------------------------------------------------------------------------------------------


def test_a_model_does_not_differ_from_itself(same):
    assert len(same.layers) == tiny_models.LAYERS
    for layer in same.layers:
        assert layer["change"]["max"] == 0 and layer["above"] == 0
        assert layer["only_tuned"] == layer["only_base"] == {"count": 0, "tokens": 0, "atoms": []}
        assert layer["n_base"] == layer["n_tuned"] == layer["common"]
        moved = layer["transfer"]
        assert moved["own"] == moved["reread"] == moved["as_is"] > 0
    assert same.top == []


def test_changes_appear_at_the_changed_block_and_above(changed):
    means = [layer["change"]["mean"] for layer in changed.layers]
    assert means[0] == means[1] == 0
    assert min(means[2:]) > 0.01
    assert changed.top and all(token["layers"][:2] == [0, 0] for token in changed.top)


def test_transfer_orders_the_dictionaries():
    x = noise(800)
    y = drifted(x @ orthogonal(16), 1)
    (layer,) = of_readings([reading("a", x), reading("b", y)], n_atoms=60, k=4).layers
    moved = layer["transfer"]
    assert (
        moved["own"] < moved["as_is"] and moved["reread"] < moved["as_is"]
    )  # other bases, so vectors do not carry over
    assert abs(moved["own"] - moved["reread"]) < 0.2 * moved["own"]
    assert moved["tokens"] <= 800 - 2 * moved["n_atoms"]


@pytest.mark.parametrize("width", [16, 40])
def test_change_does_not_depend_on_basis_scale_origin_or_width(width):
    x = noise()
    y = drifted(x, 1, 0.3)
    anchors = np.arange(0, 400, 2)
    turned = 3 * y @ orthogonal(width)[:16] + 7
    before, after = code_change(x, y, anchors), code_change(x, turned, anchors)
    assert before.min() > 0
    np.testing.assert_allclose(before, after, atol=1e-4)


def test_change_is_symmetric_and_of_no_more_than_two():
    x, y, anchors = noise(), -noise(seed=1), np.arange(200)
    np.testing.assert_allclose(code_change(x, y, anchors), code_change(y, x, anchors), atol=1e-5)
    assert code_change(x, y, anchors).max() <= 2 + 1e-6


def test_change_is_the_distance_to_the_best_rotation():
    x = noise().double()
    y = drifted(x, 1, 0.3).double()
    a, b = ((z - z.mean(0)).numpy() for z in (x, y))
    a, b = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (a, b))
    anchors = np.arange(50, 350)
    from scipy.linalg import orthogonal_procrustes

    rotation, _ = orthogonal_procrustes(b[anchors], a[anchors])
    wanted = np.linalg.norm(a - b @ rotation, axis=1)
    np.testing.assert_allclose(code_change(x.float(), y.float(), anchors), wanted, atol=1e-5)


def test_scores_follow_the_tokens_when_rows_are_permuted():
    x = noise()
    y, null = drifted(x, 1), drifted(x, 2)
    y[::37] += 2
    rows = np.random.default_rng(0).permutation(40)
    order = (rows[:, None] * 10 + np.arange(10)).reshape(-1)
    readings = [reading(name, z) for name, z in zip("abc", (x, y, null), strict=True)]
    moved = [reading(name, z[order]) for name, z in zip("abc", (x, y, null), strict=True)]
    a, b = token_scores(readings)[0][order], token_scores(moved)[0]
    assert np.corrcoef(a, b)[0, 1] > 0.95  # the shared atoms are others


def test_null_takes_away_what_any_fine_tune_changes():
    x = noise(800)
    fragile, planted = np.arange(0, 800, 41), np.arange(7, 800, 53)
    y, null = drifted(x, 1), drifted(x, 2)
    y[fragile] += 1.5 * noise(len(fragile), seed=8)
    null[fragile] += 1.5 * noise(len(fragile), seed=8)
    y[planted] += 1.2 * noise(len(planted), seed=9)
    with_null = token_scores([reading("a", x), reading("b", y), reading("c", null)])[0]
    without = token_scores([reading("a", x), reading("b", y)])[0]
    n = len(planted)
    assert np.isin(np.argsort(-with_null)[:n], planted).mean() == 1
    assert np.isin(np.argsort(-without)[:n], planted).mean() < 0.8


def test_false_discoveries_are_few_for_planted_tokens_and_many_for_a_second_null():
    x = noise(800)
    y, null = drifted(x, 1), drifted(x, 2)
    second = of_readings([reading("a", x), reading("b", y), reading("c", null)], n_atoms=20, k=4)
    assert second.top[30]["false"] > 0.3 and 0 < second.pooled["above"] < 0.03
    y[::20] += noise(40, seed=9)
    found = of_readings([reading("a", x), reading("b", y), reading("c", null)], n_atoms=20, k=4)
    assert found.top[30]["false"] < 0.1 and found.null["kind"] == "model" and found.null["name"] == "c"


def test_an_atom_is_found_that_only_one_model_needs():
    x = noise(800, 16) * torch.cat([torch.ones(8), torch.zeros(8)])  # the base uses half of the directions
    y, null = x.clone(), drifted(x, 2, 0.001)
    y[5::40, 12] += 9
    readings = [reading("a", x), reading("b", y), reading("c", null)]
    (layer,) = of_readings(readings, n_atoms=60, k=4).layers
    (atom,) = layer["only_tuned"]["atoms"]  # all of them are one new direction
    assert layer["only_tuned"]["tokens"] == 20 and atom["label"]["position"] == 5
    assert atom["loss"]["tuned"] > layer["threshold"] >= max(atom["loss"]["base"], atom["loss"]["null"])
    (layer,) = of_readings([readings[1], readings[0]], n_atoms=50, k=4).layers
    assert layer["only_tuned"]["tokens"] == 0 and layer["only_base"]["tokens"] == 20


def kept_apart(readings, monkeypatch, **settings):
    """The layers of a diff, and of each the tokens that count for the tuned model alone, and for the base."""
    found, only = [], token_changes._only

    def noted(losses, who, more, rest, labels, threshold):
        others = np.max([loss for name, loss in losses.items() if name != who], axis=0)
        tokens = np.flatnonzero((losses[who] > threshold) & (others <= threshold) & more)
        found.append((who, set(tokens.tolist())))
        out = only(losses, who, more, rest, labels, threshold)
        assert out["tokens"] == len(tokens)
        return out

    monkeypatch.setattr(token_changes, "_only", noted)
    layers = of_readings(readings, **{"n_atoms": 60, "k": 4} | settings).layers
    sides = {who: [tokens for name, tokens in found if name == who] for who in ("tuned", "base")}
    return list(zip(layers, sides["tuned"], sides["base"], strict=True))


def test_no_token_is_needed_by_each_model_alone(monkeypatch):
    x = noise(800) * torch.linspace(2, 0.1, 16)
    one, other = x.clone(), drifted(x, 1)
    one[3::40, 15] += 9
    other[5::40, 14] += 9
    one[7::40, 13] += 9
    other[7::40, 12] += 9  # what was there is gone, and what is there is new
    for pair in ((one, other), (other, one)):
        readings = [reading(name, z) for name, z in zip("ab", pair, strict=True)]
        ((_, tuned, base),) = kept_apart(readings, monkeypatch)
        assert tuned and base and not tuned & base, (len(tuned), len(base))
        gone, new = (set(range(3, 800, 40)), set(range(5, 800, 40)))
        for found, wanted in ((tuned, new), (base, gone)) if pair[0] is one else ((tuned, gone), (base, new)):
            assert len(found & wanted) >= 18


def test_atoms_are_counted_by_one_rule_and_those_beside_the_other_list_come_last():
    x = noise(800) * torch.linspace(2, 0.1, 16)
    one, other = x.clone(), drifted(x, 1)
    one[3::40, 15] += 9
    other[5::40, 14] += 9  # beside what is gone
    other[27::40, 13] += 9  # and by itself
    report = of_readings([reading("a", one), reading("b", other)], n_atoms=60, k=4)
    (layer,) = report.layers
    for side in (layer["only_tuned"], layer["only_base"]):
        assert side["count"] == len(side["atoms"]) < 20  # none was cut off
        assert sum(atom["tokens"] for atom in side["atoms"]) == side["tokens"] >= 18
        beside = [atom["beside"] for atom in side["atoms"]]
        assert beside == sorted(beside)
    alone = [a["label"] for a in layer["only_tuned"]["atoms"] if not a["beside"]]
    assert alone and all((a["prompt"] * 10 + a["position"]) % 40 == 27 for a in alone[:1])
    assert any(atom["beside"] for atom in layer["only_base"]["atoms"])
    shown, page = " ".join(str(report).split()), report.html()
    for key, who in (("only_tuned", "the tuned model"), ("only_base", "the base")):
        count, tokens = layer[key]["count"], layer[key]["tokens"]
        atoms = f"{count} atom" + "s" * (count != 1)
        assert f"{atoms} that only {who} needs, for {tokens} tokens" in shown
        assert f"{atoms} that only {who} needs, for {tokens} tokens" in page and "1 hook point." in page


def test_models_far_apart_need_few_tokens_alone(monkeypatch):
    """Where the vectors of one say little of the other, that is no token's own."""
    x = noise(800) * torch.linspace(2, 0.1, 16)
    for far in (x @ orthogonal(16), drifted(x, 1, 1.0), noise(800, seed=2)):
        readings = [reading("a", x), reading("b", far)]
        ((layer, tuned, base),) = kept_apart(readings, monkeypatch)
        assert max(layer["rise"].values()) > 1.5
        assert len(tuned) <= 160 and len(base) <= 160, (len(tuned), len(base))


def test_planted_tokens_are_found_in_a_model_that_drifted(monkeypatch):
    x = noise(800) * torch.linspace(2, 0.1, 16)
    y = drifted(x, 1, 0.2)
    planted = np.arange(5, 800, 40)
    y[planted] += 6 * torch.nn.functional.normalize(noise(1, seed=4) - 1)
    ((layer, tuned, _),) = kept_apart([reading("a", x), reading("b", y)], monkeypatch)
    assert len(tuned & set(planted.tolist())) >= 14 and len(tuned) <= 24, len(tuned)
    shown = [atom["label"] for atom in layer["only_tuned"]["atoms"]]
    assert (shown[0]["prompt"] * 10 + shown[0]["position"]) % 40 == 5


def test_a_model_of_another_width_needs_what_is_new_in_it(monkeypatch):
    x = noise(800) * torch.cat([torch.ones(8), torch.zeros(8)])
    y = torch.cat([x @ orthogonal(16), torch.zeros(800, 8)], dim=1)
    same = kept_apart([reading("a", x), reading("b", y)], monkeypatch)
    assert [(tuned, base) for _, tuned, base in same] == [(set(), set())]
    y[405::40, 20] += 9  # at no token that is an atom of the base, which is read again in the wider model
    ((layer, tuned, base),) = kept_apart([reading("a", x), reading("b", y)], monkeypatch, n_atoms=30)
    assert layer["transfer"]["as_is"] is None and len(tuned & set(range(405, 800, 40))) >= 8 and not base


@pytest.mark.parametrize("n_atoms", [20, 60, 200])
def test_dictionaries_of_the_base_have_the_size_asked_for_to_a_tenth(n_atoms):
    x = noise(3000) * torch.linspace(2, 0.1, 16)
    x[:2400] *= torch.linspace(1, 0, 16) ** 3  # the text begins with what is easy
    (layer,) = of_readings([reading("a", x), reading("b", drifted(x, 1))], n_atoms=n_atoms, k=4).layers
    assert abs(layer["n_base"] - n_atoms) <= n_atoms / 10


def test_a_size_that_no_threshold_gives_is_met_as_nearly_as_can_be():
    x = noise(2).repeat(200, 1)
    (layer,) = of_readings([reading("a", x), reading("b", x)], n_atoms=20, k=4).layers
    assert layer["n_base"] == 2


def test_rows_that_begin_alike_are_one_token_counted():
    x = noise(800)
    y = drifted(x, 1)
    x[::40], y[::40] = x[0], y[0] + 2 * noise(1, seed=4)
    a, b = (reading(name, z) for name, z in (("a", x), ("b", y)))
    for one in (a, b):
        one.labels.token_id[::40] = 5
    top = of_readings([a, b], n_atoms=20, k=4).top
    assert [token["times"] for token in top if token["label"]["position"] == 0 and token["times"] > 1] == [20]


def test_positions_and_rows_say_where():
    x = noise(800)
    y = drifted(x, 1)
    y[np.arange(800) % 10 == 9] += noise(80, seed=3)
    y[300:310] += noise(10, seed=4)
    report = of_readings([reading("a", x), reading("b", y), reading("c", drifted(x, 2))], n_atoms=20, k=4, rows=3)
    buckets = {part["first"]: part["change"] for part in report.positions}
    assert list(buckets) == [0, 1, 2, 4, 8] and max(buckets, key=buckets.get) == 8
    assert sum(part["tokens"] for part in report.positions) == 800
    assert report.rows[0]["prompt"] == 30 and len(report.rows) == 3
    assert "".join(piece["text"] for piece in report.rows[0]["pieces"]) == "abcdefghij"


# -- planted ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("null", [False, True])
def test_tokens_whose_embedding_changed_come_first(null):
    words = tiny_models.tokenizer()
    ids = words(" the", add_special_tokens=False)["input_ids"]
    assert len(ids) == 1

    def plant(module):
        shift("transformer.h.3.mlp.c_proj.weight", 0.02)(module)
        module.transformer.wte.weight[ids] += 2

    def drift(module):
        shift("transformer.h.1.mlp.c_proj.weight", 0.02)(module)

    third = {"null": hooked(change=drift)} if null else {}
    report = diff(hooked(), hooked(change=plant), TEXTS, top=20, layer=[0, 1], **third, **SMALL)
    first = [token["label"]["token_id"] for token in report.top[:20]]
    assert np.mean(np.isin(first, ids)) >= 0.9
    token = report.top[0]
    assert token["label"]["token"] == " the" and len(token["layers"]) == 2 and len(token["base"]) == 3


def test_different_tokenizers_are_aligned():
    tokenizer = tiny_models.tokenizer()
    spaced = tiny_models.tokenizer("bert")
    report = diff(hooked(), hooked(name="bert", tokenizer=spaced), TEXTS, layer=1, **SMALL)
    assert 0 < report.shares["base"] < 1 and report.tokens > 100
    assert report.layers[0]["change"]["mean"] > 0.1
    for row in report.rows:  # with the text between the tokens in common
        assert any("score" not in piece for piece in row["pieces"])
        assert "".join(piece["text"] for piece in row["pieces"]) in TEXTS[row["document"]]
    assert diff(hooked(tokenizer=tokenizer), hooked(), TEXTS, layer=1, **SMALL).shares == {"base": 1, "tuned": 1}


def test_models_of_another_width_can_be_compared():
    wide = load_model(
        tiny_models.module("gpt2", len(tiny_models.tokenizer()), n_embd=48), tiny_models.tokenizer(), hooks=-1
    )
    report = diff(hooked(), wide, TEXTS, layer=[1, 2], null=wide, names=["a", "b", "c"], **SMALL)
    assert all(layer["transfer"]["as_is"] is None for layer in report.layers)
    assert report.top == [] and report.null["99 %"] == 0  # tuned and null are the same


# -- what is shown ----------------------------------------------------------------------------------------------------


def test_json_round_trip(changed):
    said = changed.to_json()
    assert json.loads(json.dumps(said, allow_nan=False)) == said
    assert said["settings"]["n_atoms"] == 20 and said["base"] == "a" and said["hook_points"][0] == "transformer.h.0"


def test_terminal_shows_layers_tokens_and_names(changed, same):
    text = str(changed)
    assert "a → b" in text and "transformer.h.3" in text and "tokens that changed most" in text
    assert "usual at its position" in text and "a → b" in str(same)


def flat(text):
    return " ".join(re.sub(r"<[^>]*>", "", text).split())


def test_terminal_and_page_say_what_is_measured_in_the_same_words():
    import html

    x, names = noise(800), "abc"
    y = drifted(x, 1)
    y[::20] += 3 * noise(40, seed=9)
    for given in ((x, y), (x, y, drifted(x, 2))):
        report = of_readings([reading(*each) for each in zip(names, given, strict=False)], n_atoms=20, k=4, top=15)
        shown, written = flat(str(report)), flat(html.unescape(report.html())).lower()
        assert len(report.top) == 15 and "and 3 more (--json, --html)" in shown
        for said in (diff_page.CHANGE, diff_page.ONLY, diff_page.TRANSFER, *diff_page.LIMITS[report.null["kind"]]):
            assert said in shown and said.lower() in written, said
        assert ("--null MODEL" in shown) == ("with a null model" in written) == (len(given) == 2)
        (layer,) = report.layers
        row = [line for line in str(report).splitlines() if line.startswith("layer ")][2].split()
        assert row[1:4] == [str(layer[name]) for name in ("n_base", "n_tuned", "common")]
        table = report.html().partition("Tokens that changed most</h2>")[2].partition("</table>")[0]
        assert table.count("<tr>") == 1 + 15
    assert "more (" not in str(of_readings([reading("a", x), reading("b", y)], n_atoms=20, k=4, top=12))
    assert f"{token_changes.TELLING} times" in diff_page.ONLY


def test_what_rounding_leaves_of_a_loss_is_shown_as_0_and_ranks_nothing():
    x = noise(800, 16) * torch.cat([torch.ones(8), torch.zeros(8)])
    y = x.clone()
    y[5::40, 12] += 9
    report = of_readings([reading("a", x), reading("b", y)], n_atoms=60, k=4)
    (layer,) = report.layers
    (atom,) = layer["only_tuned"]["atoms"]
    atom["loss"] |= {"base": 3e-17, "tuned": 0.5}
    assert "3e-17" not in report.html()
    second = copy.deepcopy(layer)
    second["hook_point"], (other,) = "transformer.h.9", second["only_tuned"]["atoms"]
    other["loss"] |= {"base": 5e-16, "tuned": 0.9}
    report.layers.append(second)
    text = str(report).partition("only the tuned model needs")[2]
    assert not re.search(r"e-1\d", text) and text.index("transformer.h.9") < text.index("0.5 ")


def hostile_report(**settings):
    x = noise()
    y = drifted(x, 1)
    y[::37] += 2
    texts = [(HOSTILE * 2)[i : i + 10] for i in range(40)]
    a, b = (reading(name, {HOSTILE: z}, texts) for name, z in ((HOSTILE, x), ("b", y)))
    return of_readings([a, b], n_atoms=20, k=4, **settings)


def test_page_escapes_all_text_and_needs_nothing_else():
    text = hostile_report().html()
    assert "<script" not in text and "<img" not in text and HOSTILE not in text
    assert "&lt;script&gt;" in text
    tags = re.findall(r"<[a-zA-Z][^>]*>", text)
    assert not {tag[1:].split()[0].rstrip(">") for tag in tags} & {"script", "img", "link", "iframe", "object", "base"}
    bare = [re.sub(r'"[^"]*"', '""', tag) for tag in tags]
    assert not any(re.search(r"\b(on\w+|src|srcset|data|action)=", tag) for tag in bare)
    assert all(target.startswith("#") for tag in tags for target in re.findall(r'href="([^"]*)"', tag))
    style = re.search("<style>(.*?)</style>", text, re.S)[1]
    assert not re.search(r"url\(|@import|https?:", style)
    assert not re.search(r"[\ud800-\udfff]", text)


def test_no_character_of_the_page_commands_what_shows_it():
    """No control character but those of lines, and nothing that turns the direction of what follows."""
    report = hostile_report().to_json()
    bad = "\x00\x1b[31m\x07\x08\x7f\x9b\u202e\u2066\u2069"
    report |= {"base": f"a{bad}b", "tuned": bad, "hook_points": [bad + hook for hook in report["hook_points"]]}
    report["rows"][0]["pieces"] += [{"text": f"x{bad}\r\n\ty"}, {"text": bad, "score": 1.0, "layers": [1.0]}]
    for layer in report["layers"]:
        layer["hook_point"] = bad
    text = diff_page.html(report)
    assert not set(bad) - {*"[31m"} & set(text)
    assert "x��[31m" in text and "\r\n\ty" in text


def test_page_marks_changed_tokens_and_keeps_the_text(changed, tmp_path):
    changed.save_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text("utf-8")
    assert text.count("<article>") == len(changed.rows) and "prefers-color-scheme:dark" in text
    for i in range(tiny_models.LAYERS):
        assert f'id="l{i}"' in text
    strongest = changed.rows[0]["pieces"]
    piece = max((p for p in strongest if "score" in p), key=lambda p: p["score"])
    assert re.search(rf'style="--p:0\.[4-9][^"]*" title="score {piece["score"]:.3g}[^"]*">', text)
    shown = re.search(r'<div class="text">(.*?)</div>', text, re.S)[1]
    import html

    assert html.unescape(re.sub(r"<[^>]*>", "", shown)) == "".join(p["text"] for p in strongest)


def test_page_that_cannot_be_written(same, tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        same.save_html(tmp_path / "missing" / "page.html")
    for path, why in ((tmp_path, "it is a folder"), (tmp_path / "missing" / "page.html", "there is no folder")):
        with pytest.raises(InputError, match=why):
            diff_page.check(path)


def test_a_page_that_cannot_be_written_loses_nothing(capfd, tmp_path, monkeypatch):
    from itda.cli.main import main

    for seed, name in enumerate("ab"):
        tiny_models.save("gpt2", tmp_path / name, seed=seed)
    (tmp_path / "text.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    (tmp_path / "old.html").write_text("old")
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)

    def full(*places):
        raise OSError(28, "No space left on device")

    words = [
        "diff",
        "a",
        "b",
        "text.txt",
        "--layer",
        "1",
        "--n-atoms",
        "20",
        "--k",
        "4",
        "--context-length",
        "32",
        "--html",
        "old.html",
        "--json",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["itda.disk"].os, "replace", full)
        assert main(words) == 2
    out, err = capfd.readouterr()
    assert json.loads(out)["base"] == "a" and "old.html could not be written, because the disk is full" in err
    assert (tmp_path / "old.html").read_text() == "old" and sorted(tmp_path.iterdir()) == before
    assert main(words) == 0
    assert (tmp_path / "old.html").read_text("utf-8").startswith("<!DOCTYPE html>")


def test_tokens_that_are_zero_in_one_model_are_no_atoms_there():
    x, y = noise(), drifted(noise(), 1)
    y[0] = y[7] = 0  # the first token is an atom of the base
    (layer,) = of_readings([reading("a", x), reading("b", y), reading("c", x)], n_atoms=20, k=4).layers
    assert layer["n_base"] >= 10 and all(math.isfinite(layer["transfer"][name]) for name in ("own", "reread"))
    (layer,) = of_readings([reading("a", y), reading("b", x), reading("c", x)], n_atoms=20, k=4).layers
    assert layer["n_tuned"] >= 10 and math.isfinite(layer["transfer"]["as_is"])


def test_as_many_shared_atoms_are_reported_as_there_were():
    x = noise()
    found = of_readings([reading("a", x), reading("b", drifted(x, 1))], n_atoms=20, k=4, n_anchors=101)
    assert found.settings["n_anchors"] == 100  # as many of each half


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(n_atoms=0), "`n_atoms` is 0"),
        (dict(n_atoms=100_000), "at most half of the `tokens` = 50,000 can be atoms"),
        (dict(n_atoms=20_000), "tokens in common"),
        (dict(n_anchors=1), "`n_anchors` is 1"),
        (dict(n_anchors=100_000), "at most half"),
        (dict(k=0), "`k` is 0"),
        (dict(top=-1), "`top` is -1"),
        (dict(rows=True), "`rows` is True"),
        (dict(seed=-1), "`seed` is -1"),
        (dict(tokens=1, n_atoms=1), "`n_atoms` is 1, and at most half of the `tokens` = 1 can be atoms"),
        (dict(layer=99), "99"),
        (dict(layer=1, hook="transformer.h.1"), "Pass one of `layer`"),
        (dict(tokens=0), "`tokens` is 0"),
    ],
)
def test_bad_settings_are_said_in_one_sentence(settings, says):
    with pytest.raises(InputError) as error:
        diff(hooked(), hooked(), TEXTS, **{"context_length": tiny_models.POSITIONS, **settings})
    assert says in str(error.value) and str(error.value).endswith(".") and "\n" not in str(error.value)


def test_dictionaries_and_misspelled_settings_are_refused(tmp_path):
    itda.build(noise(), k=4, threshold=0.3).save(tmp_path / "d")
    with pytest.raises(InputError, match="is a dictionary, and `diff` reads models"):
        diff(hooked(), tmp_path / "d", TEXTS)
    with pytest.raises(InputError, match="has no setting `n_anchor`: perhaps `n_anchors` was meant"):
        diff(hooked(), hooked(), TEXTS, n_anchor=3)


def test_hook_points_that_do_not_pair_up():
    x = noise()
    with pytest.raises(InputError, match="cannot be compared one by one"):
        of_readings([reading("a", {"one": x, "two": x}), reading("b", x)], n_atoms=20)


def test_errors_of_single_tokens_stand_beside_the_fvu_of_a_transfer():
    from itda.comparison.token_changes import _transfer

    g = torch.Generator().manual_seed(0)
    x = torch.randn(600, 16, generator=g) + 1
    y = x + 0.1 * torch.randn(600, 16, generator=g)
    y[[300, 444], 3] = 800.0
    found = _transfer(x, y, np.arange(40), np.r_[300, 20:59], 3, 0)
    assert found["own"] < 0.1 < found["robust"]["own"]
    assert 0 < found["median_error"]["own"] < found["mean_error"]["own"] < 1
    assert found["concentrated"].startswith("1 of ") and set(found["robust"]) == {"own", "reread", "as_is", "random"}
    narrow = _transfer(x[:, :9], y, np.arange(40), np.arange(20, 60), 3, 0)
    assert narrow["as_is"] is None and "as_is" not in narrow["robust"]
