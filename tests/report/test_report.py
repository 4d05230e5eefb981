"""Reports: laws of a decomposition, what a summary counts, and that no text commands the terminal."""

import io
import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

import itda
from itda import report
from itda.dictionary import usual
from itda.labels import Batch, Labels
from itda.models.loading import load_model
from itda.progress import Progress, Step, bar
from itda.report import decomposition as made
from itda.report import drawing
from tests import tiny_models

HOSTILE = [
    "\x1b[31mred\x1b[0m",
    "[bold red]loud[/]",
    "\x9b2J",
    "\u202eevil",
    "\x07\x08\r\n",
    "[link=http://x]y[/link]",
    ":boom:",
]


def labels(texts):
    """Labels of one token per text: its middle character."""
    n, middle = len(texts), np.array([len(text) // 2 for text in texts], np.int64)
    return Labels(
        prompt=np.arange(n),
        position=np.full(n, 3),
        token_id=np.arange(n) + 7,
        document=np.arange(n),
        start=middle,
        end=middle + 1,
        row=np.arange(n),
        texts=tuple(texts),
        text_start=np.zeros(n, np.int64),
    )


def dictionary(n=60, d=8, texts=None, **settings):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    texts = texts or [f"text number {i}, and more of it" for i in range(n)]
    return itda.build([Batch(x, labels([texts[i % len(texts)] for i in range(n)]))], **{"k": 4, **settings}), x


def drawn(thing, width=100, **settings):
    console = Console(file=io.StringIO(), width=width, **settings)
    console.print(thing)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model with its tokenizer, and a dictionary built on it."""
    hooked = load_model(tiny_models.save("gpt2", tmp_path_factory.mktemp("model")), hooks=1)
    stream = itda.activations(hooked, tiny_models.DOCUMENTS, layer=1, context_length=32)
    return hooked, itda.build(stream, k=6, center=False)


@pytest.fixture(scope="module", params=["mp", "omp", "gp"])
def decomposition(tiny, request):
    hooked, built = tiny
    return report.decompose(built, "The mouse sat on the carpet.", -2, model=hooked, method=request.param)


# -- decompose --------------------------------------------------------------------------------------------------------


def test_decomposition_is_that_of_encode(tiny, decomposition):
    hooked, built = tiny
    text = decomposition.text
    ids = [hooked.tokenizer.bos_token_id, *hooked.tokenizer(text, add_special_tokens=False)["input_ids"]]
    x = hooked.read(np.array([ids]), np.ones((1, len(ids)), int))["transformer.h.1"][0, -2]
    codes = built.encode(x, method=decomposition.method)
    wanted = {int(i): float(v) for i, v in zip(codes.indices, codes.values, strict=True) if v}
    assert [part["atom"] for part in decomposition.atoms] == list(wanted)
    assert [part["coefficient"] for part in decomposition.atoms] == pytest.approx(list(wanted.values()), rel=1e-4)
    error = (x - built.decode(codes)).square().sum() / x.square().sum()
    assert decomposition.relative_error == pytest.approx(float(error), rel=1e-3)
    assert decomposition.norm == pytest.approx(float(x.norm()))
    assert decomposition.position == len(ids) - 2


def test_shares_and_the_rest_are_all_of_the_energy(decomposition):
    shares = [part["share"] for part in decomposition.atoms]
    assert sum(shares) + decomposition.relative_error == pytest.approx(1, abs=1e-9)
    assert [part["cumulative"] for part in decomposition.atoms] == pytest.approx(np.cumsum(shares))


def test_steps_of_one_atom_are_put_together():
    # Two correlated atoms: pursuit comes back to the first one.
    atoms = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0]]), dim=1)
    built = itda.ITDA(atoms, labels(["one", "two"]), 6, None, torch.ones(2), torch.ones(2))
    x = torch.tensor([1.0, 1.0, 0.5], dtype=torch.float64)
    parts, error = made._pursued(built, x, 6, "mp")
    residual, coefficients, shares = x.numpy(), np.zeros(2), np.zeros(2)
    for _ in range(6):
        c = atoms.double().numpy() @ residual
        j = np.abs(c).argmax()
        residual = residual - c[j] * atoms[j].double().numpy()
        coefficients[j] += c[j]
        shares[j] += c[j] ** 2 / 2.25
    assert [part["atom"] for part in parts] == [1, 0]
    assert [part["coefficient"] for part in parts] == pytest.approx(coefficients[::-1])
    assert [part["share"] for part in parts] == pytest.approx(shares[::-1])
    assert error == pytest.approx(residual @ residual / 2.25)


def test_an_atom_is_itself(tiny):
    hooked, built = tiny
    atom = int(np.flatnonzero(built.labels.prompt == 0)[-1])  # of the first row of the first document
    found = report.decompose(built, tiny_models.DOCUMENTS[0][: built.labels.end[atom]], model=hooked)
    assert [part["atom"] for part in found.atoms] == [atom]
    assert found.atoms[0]["share"] == pytest.approx(1)
    assert found.norm == pytest.approx(float(built.norms[atom]), rel=1e-5)
    assert found.tokens[found.token] == found.atoms[0]["label"]["token"] == found.text[found.start : found.end]


def test_a_centred_dictionary_decomposes_what_is_left_of_the_mean(tiny):
    hooked, _ = tiny
    stream = itda.activations(hooked, tiny_models.DOCUMENTS, layer=1, context_length=32)
    built = itda.build(stream, k=6, center=True)
    found = report.decompose(built, "Call me", model=hooked)
    x = hooked.read(
        np.array([[0, *hooked.tokenizer("Call me", add_special_tokens=False)["input_ids"]]]),
        np.ones((1, 1 + len(found.tokens))),
    )
    rest = x["transformer.h.1"][0, -1] - built.mean
    assert sum(p["share"] for p in found.atoms) + found.relative_error == pytest.approx(1, abs=1e-9)
    codes = built.encode(x["transformer.h.1"][0, -1])
    error = (rest - codes.decode(built.atoms)).square().sum() / rest.square().sum()
    assert found.relative_error == pytest.approx(float(error), rel=1e-3)
    assert found.from_mean == pytest.approx(float(rest.norm())) and found.norm != found.from_mean
    shown = drawn(found, width=300)
    assert f"{found.norm:.4g}, {found.from_mean:.4g} from the mean" in shown
    assert f"error {found.relative_error:.3f} of |x - mean|²" in shown
    assert f"error {found.relative_error:.3f} of |x|²" in drawn(replace(found, from_mean=found.norm), width=300)


@pytest.mark.parametrize("token", ["mouse", " mouse", "at", 3, -1])
def test_token_by_number_and_by_text(token):
    tokens = ["The", " mouse", " s", "at", " on", " mouse", "."]
    wanted = {"mouse": 5, " mouse": 5, "at": 3, 3: 3, -1: 6}
    assert made._which(tokens, token) == wanted[token]


def test_a_text_of_its_own_wins_over_one_with_a_blank():
    assert made._which(["at", " at"], "at") == 0
    assert made._which(["at", " at"], " at") == 1


@pytest.mark.parametrize("token", [7, -8, "cat", "", " "])
def test_a_token_that_is_not_there_is_refused_with_those_that_are(token):
    with pytest.raises(itda.InputError, match=r"0 'The', 1 ' mouse'"):
        made._which(["The", " mouse", " s", "at", " on", " mouse", "."], token)


@pytest.mark.parametrize("token", ["sat", " sat", "sat "])
def test_a_word_of_several_tokens_is_refused_with_these(token):
    with pytest.raises(itda.InputError, match="it is spelt by those from 5 to 6"):
        made._which([" s", "at", " mouse", " s", "ate", " s", "at", "."], token)


def test_tokens_that_are_alike_are_told(decomposition):
    alike = replace(decomposition, tokens=["The", " mouse", " the", "mouse", " mouse"], token=4)
    assert "token 4 (one of 1, 3, 4) of 0 to 4" in drawn(alike, width=300)
    assert "one of" not in drawn(replace(alike, token=0), width=300)
    many = replace(alike, tokens=[" the"] * (drawing.SHOWN + 1))
    assert f", {drawing.SHOWN - 1}, ...)" in drawn(many, width=300)
    few = replace(alike, tokens=[" the"] * drawing.SHOWN)
    assert f", {drawing.SHOWN - 1}) of" in drawn(few, width=300)


def test_another_model_tokenizer_and_width_are_refused(tiny, tmp_path):
    _, built = tiny
    same = tiny_models.save("gpt2", tmp_path / "same")
    assert report.decompose(built, "Call me", model=same).atoms
    other = tiny_models.save("gpt2", tmp_path / "other", seed=1)
    with pytest.raises(itda.InputError, match=r"weights \(\w{12}, not \w{12}\): give"):
        report.decompose(built, "Call me", model=other)
    assert report.decompose(built, "Call me", model=other, force=True).atoms
    words = tiny_models.tokenizer()
    words.add_tokens(["qqqq"])
    words.save_pretrained(tmp_path / "same")
    with pytest.raises(itda.InputError, match="tokenizer"):
        report.decompose(built, "Call me", model=same)
    wide = tiny_models.save("gpt2", tmp_path / "wide", n_embd=64)
    with pytest.raises(itda.InputError, match="width d"):
        report.decompose(built, "Call me", model=wide, force=True)


@pytest.mark.parametrize(
    ("text", "sentence"), [("", "`text` is ''"), ("word " * 100, "shorten it"), ("<s>", "special")]
)
def test_texts_that_do_not_do(tiny, text, sentence):
    with pytest.raises(itda.InputError, match=sentence):
        report.decompose(tiny[1], text, model=tiny[0])


@pytest.mark.parametrize("settings", [{"k": 0}, {"method": "lasso"}])
def test_settings_out_of_range(tiny, settings):
    with pytest.raises(itda.InputError, match=next(iter(settings))):
        report.decompose(tiny[1], "Call me", model=tiny[0], **settings)


def test_a_dictionary_of_plain_arrays_has_no_model():
    with pytest.raises(itda.InputError, match="which model"):
        report.decompose(dictionary()[0], "Call me")


# -- summary and atom_report ------------------------------------------------------------------------------------------


def test_summary_counts_the_sample(tmp_path):
    built, x = dictionary()
    built.save(tmp_path / "d")
    found = report.summary(tmp_path / "d")
    dense = built.encode(x).dense()
    uses = (dense != 0).sum(0)
    assert found.sample["tokens"] == len(x)
    assert found.sample["share_alive"] == pytest.approx(float((uses > 0).double().mean()))
    assert found.sample["l0"] == pytest.approx(float((dense != 0).sum(1).double().mean()))
    assert found.most_used[0]["uses"] == int(uses.max())
    assert [row["uses"] for row in found.most_used] == sorted((row["uses"] for row in found.most_used), reverse=True)
    assert all(row["uses"] == int(uses[row["atom"]]) for row in found.most_used + found.first)
    assert found.norms["median"] == pytest.approx(float(built.norms.median()), rel=0.1)
    assert math.isfinite(found.losses["min"])  # the first atom's NaN does not count
    assert found.first[0]["label"]["token"] == built.labels.token(0)


def test_the_first_atoms_are_of_different_rows():
    one = labels([f"text number {i}" for i in range(60)])
    for per_row, want in ((1, range(12)), (4, range(0, 48, 4)), (20, [*range(10), 20, 40])):
        rows = np.arange(60) // per_row
        batch = Batch(torch.eye(60), replace(one, prompt=rows, position=np.arange(60)))
        built = itda.build([batch], k=1, threshold=0.0, center=False)  # every token is an atom
        found = report.summary(built)
        assert [row["atom"] for row in found.first] == [*want]


def test_the_threshold_is_a_range_where_it_was_moved_to_meet_a_size():
    built, _ = dictionary()
    summary = report.summary(built)
    for history, want in [([[0, 0.2], [9, 0.1], [20, 0.15]], "0.1 to 0.2"), ([[0, 0.15]], "0.15"), ("forged", "0.15")]:
        summary.cfg.update(threshold=0.15, thresholds=history)
        assert summary.threshold == want and f"loss above {want}" in str(summary)
    summary.cfg["threshold"] = None
    assert summary.threshold is None and "loss above" not in str(summary)


def test_atoms_are_found_by_their_token():
    built, _ = dictionary(texts=["a the b", "athena", " lathe", "THE", "other", "a cat"])
    spans = {"a the b": " the ", "athena": "athena", " lathe": " lathe", "THE": "THE", "other": "other", "a cat": "cat"}
    starts = np.array([text.index(spans[text]) for text in built.labels.texts])[built.labels.row]
    ends = starts + np.array([len(spans[text]) for text in built.labels.texts])[built.labels.row]
    built = replace(built, labels=replace(built.labels, start=starts, end=ends))
    own = [built.labels.token(i) for i in range(len(built))]
    found = report.find(built, "the")
    atoms = [row["atom"] for row in found.atoms]
    assert sorted(atoms) == [i for i, token in enumerate(own) if "the" in token.lower()] and atoms
    alone = [own[i].strip().lower() == "the" for i in atoms]
    assert alone == sorted(alone, reverse=True) and {True, False} == set(alone)
    uses = [row["uses"] for row, first in zip(found.atoms, alone, strict=True) if first]
    assert uses == sorted(uses, reverse=True) and len(set(uses)) > 1
    assert report.find(built, "zebra").atoms == [] and "0 atoms of" in drawn(report.find(built, "zebra"))
    many, _ = dictionary(n=300, d=300, texts=["token"], threshold=0.0)
    text = drawn(report.find(many, "k"))
    assert text.count("⟦k⟧") == drawing.FOUND and f"{len(many) - drawing.FOUND} more are in --json" in text
    for nothing in ("", " "):
        with pytest.raises(itda.InputError, match="pass some characters"):
            report.find(built, nothing)


def test_a_token_without_text_is_found_by_its_whole_name_only():
    built, _ = dictionary(texts=["a token b"])
    some = np.arange(len(built)) % 2 == 1
    row = np.where(some, -1, built.labels.row)
    mixed = replace(built, labels=replace(built.labels, row=row))
    name = mixed.labels.token(1)
    assert name == f"<token {mixed.labels.token_id[1]}>"
    assert [row["atom"] for row in report.find(mixed, name.upper()).atoms] == [1]
    middle = built.labels.token(0)
    assert middle in name and sorted(row["atom"] for row in report.find(mixed, middle).atoms) == [
        *np.flatnonzero(~some)
    ]
    plain = itda.build(torch.randn(40, 8), k=2)
    with pytest.raises(itda.InputError, match="have no text, as it was built on plain activations: name an atom by"):
        report.find(plain, "token")
    none = replace(plain, **{name: getattr(plain, name)[:0] for name in ("atoms", "labels", "norms", "losses")})
    assert report.find(none, "token").atoms == [] and "0 atoms of 0" in str(report.find(none, "token"))


def test_atom_report_has_both_signs():
    built, x = dictionary()
    dense = built.encode(x).dense()
    for atom in range(len(built)):
        found = report.atom_report(built, atom, top=1000)
        column = dense[:, atom]
        assert found.uses == int((column != 0).sum()) == sum(found.histogram["counts"])
        assert found.negative == int((column < 0).sum()) == len(found.negative_tokens)
        values = [row["coefficient"] for row in found.positive_tokens]
        assert values == pytest.approx(sorted(column[column > 0].tolist(), reverse=True), rel=1e-4)
        assert [row["coefficient"] for row in found.negative_tokens] == pytest.approx(
            sorted(column[column < 0].tolist()), rel=1e-4
        )
        best = [row["label"]["prompt"] for row in found.positive_tokens[:1]]
        assert best == ([int(column.argmax())] if len(values) else [])
    assert len(report.atom_report(built, 0, top=2).positive_tokens) <= 2


def test_a_dictionary_without_a_sample_and_one_without_atoms():
    built, _ = dictionary()
    built.sample = None
    assert report.summary(built).most_used == []
    assert report.atom_report(built, 0).uses == 0
    assert "first atoms" in drawn(report.summary(built))
    assert "atom 0" in drawn(report.atom_report(built, 0))
    empty = itda.ITDA(torch.zeros(0, 8), labels([]), 4, None, torch.zeros(0), torch.zeros(0))
    assert "0 atoms" in drawn(report.summary(empty))


@pytest.mark.parametrize("atom", [-1, 60, 10**9])
def test_atoms_out_of_range(atom):
    with pytest.raises(itda.InputError, match=f"`atom` is {atom}"):
        report.atom_report(dictionary()[0], atom)


def test_json_is_json(decomposition):
    built, _ = dictionary(texts=HOSTILE)
    for thing in (report.summary(built), report.atom_report(built, 0), decomposition):
        json.loads(json.dumps(thing.to_json(), allow_nan=False))


# -- drawing ----------------------------------------------------------------------------------------------------------


def hostile_reports(tiny):
    built, _ = dictionary(texts=HOSTILE)
    built.cfg |= {
        "model": {"id": HOSTILE[0], "hook_point": HOSTILE[1]},
        "stream": {"data": HOSTILE[2], "hash": HOSTILE[0]},
    }
    yield from (report.summary(built), *(report.atom_report(built, i) for i in range(7)))
    yield from (report.find(built, text[len(text) // 2]) for text in HOSTILE if text[len(text) // 2].strip())
    yield from (report.find(built, text) for text in HOSTILE)
    spoiled = itda.ITDA(**{name: getattr(tiny[1], name) for name in ("atoms", "k", "mean", "norms", "losses", "cfg")},
                        labels=labels([HOSTILE[i % len(HOSTILE)] for i in range(len(tiny[1]))]))  # fmt: skip
    for text in HOSTILE:
        yield report.decompose(spoiled, text, model=tiny[0])


def test_no_text_commands_the_terminal_or_is_markup(tiny):
    for thing in hostile_reports(tiny):
        plain = drawn(thing, color_system=None)
        assert all(c.isprintable() for c in plain.replace("\n", "")), ascii(plain)
        coloured = drawn(thing, force_terminal=True, color_system="standard")
        # Only rich's own colours: they come in pairs of `ESC [ number m` and `ESC [ 0 m`.
        assert not any(bad in coloured for bad in ("\x1b[31mred", "\x9b", "\u202e", "\x07", "\x08", "\r"))
    text = "".join(drawn(thing, color_system=None) for thing in hostile_reports(tiny))
    assert "[bold" in text
    assert ":boom:" in text or "m⟦:⟧" in text or "⟦o⟧" in text


def test_names_in_the_progress_do_not_command_the_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for name in HOSTILE:
        shown = Terminal()
        monkeypatch.setattr(sys, "stderr", shown)
        report = bar()
        for done in (1, 2):
            report(Step(f"reading {name} ", done, 2, 1.0))
        report(None)
        assert "reading " in shown.getvalue()
        assert not any(bad in shown.getvalue() for bad in ("\x1b[31mred", "\x9b", "\u202e", "\x07", "\x08"))


def test_no_line_is_wider_than_the_terminal(decomposition):
    built, _ = dictionary(texts=["wide 東京 東京 東京 東京 東京 東京 東京 東京" * 4, "long " * 60])
    for width in (60, 80, 120, 400):
        for thing in (report.summary(built), report.atom_report(built, 1), report.find(built, "o"), decomposition):
            from rich.cells import cell_len

            assert max(map(cell_len, drawn(thing, width).splitlines())) <= width


def test_the_token_stays_in_sight_in_a_narrow_terminal():
    label = {"before": "before " * 40, "token": " mouse", "after": " after" * 40}
    for width in (24, 40, 100):
        text = drawing.in_context(label, width).plain
        assert "⟦ mouse⟧" in text
        assert len(text) <= width
        assert text[0] == text[-1] == "…"
    whole = drawing.in_context({"before": "a ", "token": "b", "after": " c"}, 24).plain
    assert whole == "a ⟦b⟧ c"


def test_before_the_first_atom_progress_says_what_is_read():
    assert "0 atoms" not in (before := str(Progress(4064, 40_000, 0, 0.0, 2.0)))
    assert "what the mean and the threshold are chosen on" in before
    assert "7 atoms · 10.0% admitted" in str(Progress(4064, 40_000, 7, 0.1, 2.0))


def test_rows_that_are_not_shown_are_counted(tiny):
    found = report.decompose(tiny[1], "The mouse sat on the carpet.", model=tiny[0], k=40)
    text = drawn(found, 120)
    assert f"and {len(found.atoms) - drawing.SHOWN} more atoms" in text
    assert "⟦.⟧" in text


# -- massive tokens, and how usual an error is ------------------------------------------------------------------------


def planted():
    """A dictionary of which some tokens have one coordinate at a hundred times the others."""
    x = torch.randn(400, 16, generator=torch.Generator().manual_seed(3)) + 1
    x[[7, 200], 5] = 500.0
    return itda.build([Batch(x, labels([f"text {i} of many" for i in range(400)]))], k=4, threshold=0.3), x


def test_massive_atoms_are_flagged():
    built, x = planted()
    beyond = x.norm(dim=1) > 5 * x.norm(dim=1).median()
    want = {i for i, row in enumerate(built.labels.prompt.tolist()) if beyond[row]}
    assert want
    scaled = itda.build([Batch(x, built.sample.labels)], k=4, threshold=0.3, scale="std")
    old = replace(built, cfg={})  # of an earlier version, which kept no median
    for d in (built, scaled, old, itda.build([x], k=4, threshold=0.3, center=False)):
        found = report.summary(d)
        mine = {
            i
            for i, row in enumerate((d.labels.prompt if d.labels.prompt.any() else d.labels.position).tolist())
            if beyond[row]
        }
        assert found.massive["atoms"] == len(mine) > 0
        rows = d.labels.prompt if d.labels.prompt.any() else d.labels.position
        raw = usual.raw_norms(d, np.arange(len(d)))
        assert raw == pytest.approx(x[torch.from_numpy(rows)].norm(dim=1).numpy(), rel=1e-4)
        assert {row["atom"] for row in found.first if row["massive"]} == {i for i in mine if i < len(found.first)}
        assert report.atom_report(d, min(mine)).massive and not report.atom_report(d, 2).massive
        assert all(row["massive"] == (row["atom"] in mine) for row in found.most_used)
    text = " ".join(drawn(report.summary(built), 200).split())
    assert "2 of 400 tokens hold 98% of the variance" in text and "massive atoms" in text
    assert f"{min(want)}†" in text and "† a massive token" in text
    assert ", massive · admission loss" in drawn(report.atom_report(built, min(want)))
    assert "massive" not in drawn(report.summary(dictionary()[0]))


def test_the_summary_has_all_errors():
    built, _ = planted()
    text = " ".join(drawn(report.summary(built), 300).split())
    cfg = built.cfg
    assert f"robust {cfg['fvu_robust']:.4f}, standardised {cfg['fvu_standardised']:.4f}, mean error " in text
    assert f"mean error {cfg['relative_error']:.4f}, median {cfg['median_error']:.4f}" in text
    assert "massive tokens those of |x| beyond" in text and "left out: 2 not in the mean" in text
    old = replace(built, cfg={"fvu": 0.25, "variance": "forged", "massive": [1]})
    assert "FVU 0.2500, L0" in drawn(report.summary(old))


def test_a_decomposition_says_how_usual_its_error_is(tiny):
    hooked, _ = tiny
    stream = itda.activations(hooked, tiny_models.DOCUMENTS, layer=1, context_length=32)
    for settings in (
        {},
        {"loss": "cosine", "threshold": 0.02},
        {"scale": "std"},
        {"loss": "squared", "threshold": 60.0},
    ):
        built = itda.build(stream, k=4, **settings)
        found = report.decompose(built, "The mouse sat on the hill.", model=hooked)
        x = hooked.read(
            np.array([[0, *hooked.tokenizer(found.text, add_special_tokens=False)["input_ids"]]]),
            np.ones((1, 1 + len(found.tokens))),
        )
        x = x["transformer.h.1"][0, -1]
        rest, codes = built.standardised(x), built.encode(x)
        loss = itda.metrics.LOSSES[built.cfg["loss"]](rest.double(), codes.decode(built.atoms).double())
        assert found.usual_error == pytest.approx(
            float((built.sample.losses.double() < loss).double().mean()), abs=0.01
        )
        assert f"({found.usual_error:.0%} of sampled tokens have less)" in " ".join(drawn(found).split())
        shares = sum(part["share"] for part in found.atoms)
        assert shares + found.relative_error == pytest.approx(1) and found.scaled == ("scale" in settings)
        assert found.relative_error == pytest.approx(
            float(itda.metrics.relative_error(rest, codes.decode(built.atoms))), rel=1e-3
        )
        assert found.from_mean == pytest.approx(float((x - built.mean).norm()), rel=1e-4)
        assert report.decompose(built, "The mouse", model=hooked, k=7).usual_error is None
        assert not found.massive and found.usual_norm == built.cfg["variance"]["median_norm"]
    assert "sampled tokens have less" not in drawn(replace(found, usual_error=None))


def test_a_decomposition_flags_massive_tokens_and_explains_its_columns(tiny):
    hooked, _ = tiny
    stream = itda.activations(hooked, tiny_models.DOCUMENTS, layer=1, context_length=32)
    built = itda.build(stream, k=4)
    built.cfg["variance"] = built.cfg["variance"] | {"median_norm": 1e-3}
    found = report.decompose(built, "The mouse", model=hooked)
    assert found.massive and all(part["massive"] for part in found.atoms)
    text = " ".join(drawn(found, 200).split())
    assert (
        f"norm {found.norm:.4g}, massive: {found.norm / 1e-3:.0f} times the median" in text
        and "† a massive token" in text
    )
    for word in ("coefficient: how much", "share: of |x - mean|²", "error: what all of them leave", "FVU: the same"):
        assert word in text
